"""Checkpoints as files: what is complete, which one counts, which ones stay, and reading across fragments."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cctrain.errors import CheckpointError
from cctrain.model.saved import save_weights
from cctrain.run_directory import CHECKPOINTS, LATEST
from cctrain.training import checkpoint_files
from cctrain.training.checkpoint_files import (
    FORMAT,
    MANIFEST,
    FragmentReader,
    checkpoint_name,
    checkpoints_to_try,
    damaged_files,
    discard_leftovers,
    file_digest,
    find_checkpoints,
    incomplete_checkpoints,
    latest_checkpoint,
    partial_folder,
    prune,
    publish,
    read_manifest,
    read_weights,
    run_weights,
    step_of,
    write_manifest,
)

KINDS = ("master", "exp_avg", "exp_avg_sq")
# A parameter: its flattened elements; and its fragments as (start, length, file).
Fragments = Sequence[tuple[int, int, int]]


def write_partial(run_dir: Path, step: int, nll: float | None = None, elements: int = 6) -> Path:
    """A small checkpoint of one parameter `w` (elements / 2, 2) in two files, not yet published."""
    values = {kind: (1 + index) * torch.arange(float(elements)) + step for index, kind in enumerate(KINDS)}
    partial = partial_folder(run_dir, step)
    write_fragments(partial, {"w": values}, {"w": [elements // 2, 2]}, {"w": [(0, 4, 0), (4, elements - 4, 1)]})
    manifest = {key: value for key, value in read_manifest(partial).items() if key != "digest"}
    write_manifest(partial, {**manifest, "step": step, "held_out_nll": nll})
    return partial


def write_fragments(
    folder: Path,
    values: dict[str, dict[str, torch.Tensor]],
    shapes: dict[str, list[int]],
    fragments: dict[str, Fragments],
) -> None:
    folder.mkdir(parents=True)
    names = list(values)
    num_files = 1 + max(file for cuts in fragments.values() for *_, file in cuts)
    contents: list[dict[str, torch.Tensor]] = [{} for _ in range(num_files)]
    contents[0]["buffer:share"] = torch.tensor([0.25, 0.75])
    for name, cuts in fragments.items():
        for start, length, file in cuts:
            for kind, whole in values[name].items():
                contents[file][f"{kind}:{name}:{start}"] = whole[start : start + length].clone()
    files = []
    for index, content in enumerate(contents):
        path = folder / f"rank-{index:05d}.safetensors"
        save_file(content, path)
        files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)})
    manifest = {
        "format": FORMAT,
        "parameters": [{"name": name, "shape": shapes[name]} for name in names],
        "files": files,
        "fragments": [
            [names.index(name), file, start, n] for name, cuts in fragments.items() for start, n, file in cuts
        ],
    }
    write_manifest(folder, manifest)


def save(run_dir: Path, *steps: int, **looks: float) -> list[Path]:
    """Publish checkpoints in this order; `nll_10=2.5` says what a look at step 10 found."""
    for step in steps:
        write_partial(run_dir, step, looks.get(f"nll_{step}"))
        publish(run_dir, step)
    return [run_dir / CHECKPOINTS / checkpoint_name(step) for step in steps]


def point_latest(run_dir: Path, content: bytes) -> None:
    (run_dir / CHECKPOINTS / LATEST).write_bytes(content)


def steps_of(paths: list[Path]) -> list[int]:
    return [step_of(path) for path in paths]


def flip_a_byte(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# ---- the manifest


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    content = {"format": FORMAT, "step": 7, "loss_scale": None, "held_out_nll": 0.1 + 0.2, "files": [], "ä": [1, [2]]}
    write_manifest(tmp_path, content)
    assert read_manifest(tmp_path) == content
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_any_other_content_than_was_written_is_refused_by_the_digest(tmp_path):
    write_manifest(tmp_path, {"format": FORMAT, "step": 7, "position": 70})
    changed = (tmp_path / MANIFEST).read_text().replace("70", "71")
    (tmp_path / MANIFEST).write_text(changed)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: its digest does not match"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b'{"format": 1}', b"\xff\xfe", b"\x80\x04N.", b"[" * 100_000]
)
def test_what_is_no_manifest_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_format_is_refused_with_both_formats(tmp_path):
    write_manifest(tmp_path, {"format": FORMAT + 1})
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}, this cctrain reads format {FORMAT}"):
        read_manifest(tmp_path)


# ---- complete or absent


def test_a_checkpoint_is_absent_until_it_is_published(tmp_path):
    write_partial(tmp_path, 10)
    assert find_checkpoints(tmp_path) == []
    assert latest_checkpoint(tmp_path) is None
    publish(tmp_path, 10)
    assert find_checkpoints(tmp_path) == [tmp_path / CHECKPOINTS / "step-00000010"]
    assert (tmp_path / CHECKPOINTS / LATEST).read_text() == "step-00000010\n"


def test_latest_moves_last(tmp_path, monkeypatch):
    save(tmp_path, 10)
    write_partial(tmp_path, 20)

    def killed(path: Path, content: bytes) -> None:
        assert path == tmp_path / CHECKPOINTS / LATEST
        assert steps_of(find_checkpoints(tmp_path)) == [10, 20]  # complete under its name by now
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 20)
    assert step_of(latest_checkpoint(tmp_path)) == 10


def test_publishing_replaces_a_checkpoint_of_the_same_step(tmp_path):
    save(tmp_path, 10, nll_10=3.0)
    (tmp_path / CHECKPOINTS / checkpoint_name(10) / "rank-00007.safetensors").write_bytes(b"of more ranks")
    save(tmp_path, 10, nll_10=2.0)
    [path] = find_checkpoints(tmp_path)
    assert read_manifest(path)["held_out_nll"] == 2.0
    assert not (path / "rank-00007.safetensors").exists()
    assert sorted(entry.name for entry in path.parent.iterdir()) == [LATEST, path.name]


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_ones_before(tmp_path, monkeypatch):
    save(tmp_path, 10, 20)
    write_partial(tmp_path, 20)
    rename = Path.rename

    def killed(source: Path, target: Path) -> Path:
        if source == partial_folder(tmp_path, 20):
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 20)
    monkeypatch.undo()
    assert steps_of(checkpoints_to_try(tmp_path)) == [10]
    discard_leftovers(tmp_path)
    assert sorted(entry.name for entry in (tmp_path / CHECKPOINTS).iterdir()) == [LATEST, checkpoint_name(10)]


def test_leftovers_of_a_killed_attempt_are_discarded_and_nothing_else(tmp_path):
    save(tmp_path, 10)
    write_partial(tmp_path, 20)
    (tmp_path / CHECKPOINTS / ".step-00000005.removed").mkdir()
    (tmp_path / CHECKPOINTS / ".mine").mkdir()
    discard_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [".mine", LATEST, checkpoint_name(10)]


def test_a_run_without_checkpoints_has_none_and_nothing_to_discard(tmp_path):
    discard_leftovers(tmp_path)
    prune(tmp_path, keep=1, keep_every=0, keep_best=True)
    assert find_checkpoints(tmp_path) == checkpoints_to_try(tmp_path) == list(tmp_path.iterdir()) == []


# ---- which one counts


def test_checkpoints_are_in_the_order_of_their_steps_however_they_came(tmp_path):
    save(tmp_path, 100, 9, 20)
    assert steps_of(find_checkpoints(tmp_path)) == [9, 20, 100]


def test_folders_of_other_names_or_without_a_manifest_are_no_checkpoints(tmp_path):
    save(tmp_path, 10)
    for name in ("step-20", "step-00000030", "step-0000004x", "old-00000050"):
        (tmp_path / CHECKPOINTS / name).mkdir()
    for name in ("step-20", "step-0000004x", "old-00000050"):
        (tmp_path / CHECKPOINTS / name / MANIFEST).write_text("{}")
    assert steps_of(find_checkpoints(tmp_path)) == [10]


def test_latest_may_name_an_older_checkpoint_and_then_counts(tmp_path):
    save(tmp_path, 10, 20, 30)
    point_latest(tmp_path, b"step-00000020\n")
    assert step_of(latest_checkpoint(tmp_path)) == 20


@pytest.mark.parametrize(
    "content", [None, b"", b"step-00000099\n", b"step-00000099", b"../../elsewhere\n", b"\x80\x04N.", b"\xff" * 40]
)
def test_without_a_latest_that_names_one_the_newest_counts(tmp_path, content):
    save(tmp_path, 10, 20)
    (tmp_path / CHECKPOINTS / LATEST).unlink()
    if content is not None:
        point_latest(tmp_path, content)
    assert step_of(latest_checkpoint(tmp_path)) == 20


def test_a_folder_without_manifest_and_a_name_without_folder_are_told(tmp_path):
    save(tmp_path, 10, 20)
    assert incomplete_checkpoints(tmp_path) == []
    (tmp_path / CHECKPOINTS / "step-00000020" / MANIFEST).unlink()
    [told] = incomplete_checkpoints(tmp_path)
    assert "step-00000020 has no manifest.json" in told
    point_latest(tmp_path, b"step-00000099\n")
    assert "names 'step-00000099', which is not there" in incomplete_checkpoints(tmp_path)[1]


def test_those_before_the_latest_are_tried_newest_first_and_then_the_newer_ones(tmp_path):
    save(tmp_path, 10, 20, 30, 40, 50)
    assert steps_of(checkpoints_to_try(tmp_path)) == [50, 40, 30, 20, 10]
    point_latest(tmp_path, b"step-00000030\n")
    assert steps_of(checkpoints_to_try(tmp_path)) == [30, 20, 10, 40, 50]


# ---- which ones stay


def test_the_last_ones_stay(tmp_path):
    save(tmp_path, 10, 20, 30, 40)
    prune(tmp_path, keep=2, keep_every=0, keep_best=False)
    assert steps_of(find_checkpoints(tmp_path)) == [30, 40]
    assert not list((tmp_path / CHECKPOINTS).glob(".*"))


def test_every_nth_stays_for_good(tmp_path):
    save(tmp_path, *range(10, 90, 10))
    prune(tmp_path, keep=1, keep_every=30, keep_best=False)
    assert steps_of(find_checkpoints(tmp_path)) == [30, 60, 80]


def test_the_best_by_held_out_nll_stays_and_those_without_a_look_never_are(tmp_path):
    save(tmp_path, 10, 20, 30, 40, 50, nll_20=2.0, nll_30=1.0, nll_40=1.5)
    prune(tmp_path, keep=1, keep_every=0, keep_best=True)
    assert steps_of(find_checkpoints(tmp_path)) == [30, 50]


def test_the_best_stays_where_it_is_the_only_one_that_could_go(tmp_path):
    save(tmp_path, 10, 20, nll_10=1.0, nll_20=2.0)
    prune(tmp_path, keep=1, keep_every=0, keep_best=True)
    assert steps_of(find_checkpoints(tmp_path)) == [10, 20]


def test_a_better_one_takes_the_place_of_the_best(tmp_path):
    save(tmp_path, 10, 20, 30, nll_10=2.0, nll_20=1.0, nll_30=1.5)
    prune(tmp_path, keep=1, keep_every=0, keep_best=True)
    save(tmp_path, 40, nll_40=0.5)
    save(tmp_path, 50)
    prune(tmp_path, keep=1, keep_every=0, keep_best=True)
    assert steps_of(find_checkpoints(tmp_path)) == [40, 50]


def test_a_damaged_one_is_nobodys_best(tmp_path):
    _, best, _, _ = save(tmp_path, 10, 20, 30, 40, nll_10=2.0, nll_20=1.0, nll_30=3.0)
    flip_a_byte(best / MANIFEST)
    prune(tmp_path, keep=1, keep_every=0, keep_best=True)
    assert steps_of(find_checkpoints(tmp_path)) == [10, 40]


def test_what_latest_names_stays_and_newer_ones_are_left_alone(tmp_path):
    save(tmp_path, 10, 20, 30, 40, 50)
    point_latest(tmp_path, b"step-00000030\n")
    prune(tmp_path, keep=1, keep_every=0, keep_best=False)
    assert steps_of(find_checkpoints(tmp_path)) == [30, 40, 50]
    assert step_of(latest_checkpoint(tmp_path)) == 30


def test_pruning_removes_nothing_while_all_may_stay(tmp_path):
    save(tmp_path, 10, 20)
    prune(tmp_path, keep=3, keep_every=0, keep_best=True)
    assert steps_of(find_checkpoints(tmp_path)) == [10, 20]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=7, unique=True).map(sorted),
    st.data(),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_the_latest_and_the_last_ones_always_stay(steps, data, keep, keep_every):
    named = data.draw(st.sampled_from(steps))
    with TemporaryDirectory() as folder:
        run_dir = Path(folder)
        save(run_dir, *steps)
        point_latest(run_dir, checkpoint_name(named).encode())
        prune(run_dir, keep, keep_every, keep_best=False)
        older = [step for step in steps if step <= named]
        wanted = {*older[-keep:], *(step for step in steps if step > named)}
        wanted |= {step for step in older if keep_every and step % keep_every == 0}
        assert steps_of(find_checkpoints(run_dir)) == sorted(wanted)


# ---- damage


def test_each_damaged_file_is_named_with_its_defect(tmp_path):
    [path] = save(tmp_path, 10)
    manifest = read_manifest(path)
    assert damaged_files(path, manifest) == []
    first, second = (path / entry["name"] for entry in manifest["files"])
    flip_a_byte(first)
    second.write_bytes(second.read_bytes()[:-1])
    size = manifest["files"][1]["bytes"]
    assert damaged_files(path, manifest) == [
        "rank-00000.safetensors is not what was written (SHA-256)",
        f"rank-00001.safetensors has {size - 1} bytes instead of {size}",
    ]
    assert damaged_files(path, manifest, of=[1]) == damaged_files(path, manifest)[1:]
    second.unlink()
    assert damaged_files(path, manifest, of=[1]) == ["rank-00001.safetensors: No such file or directory"]


# ---- reading across fragments


@st.composite
def fragmented(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, Fragments]]:
    """Some parameters of some lengths, cut anywhere, the pieces in any files."""
    lengths = {f"layer.{i}": draw(st.integers(1, 40)) for i in range(draw(st.integers(1, 3)))}
    fragments: dict[str, Fragments] = {}
    for name, length in lengths.items():
        bounds = sorted({0, length, *draw(st.lists(st.integers(1, max(1, length - 1)), max_size=6))})
        pieces = [(start, stop - start) for start, stop in pairwise(bounds)]
        files = draw(st.lists(st.integers(0, 3), min_size=len(pieces), max_size=len(pieces)))
        placed = [(start, size, file) for (start, size), file in zip(pieces, files, strict=True)]
        fragments[name] = draw(st.permutations(placed))
    return lengths, fragments


@settings(max_examples=60, deadline=None)
@given(fragmented(), st.data())
def test_any_stretch_is_read_from_any_fragments_as_from_the_whole(parameters, data):
    lengths, fragments = parameters
    values = {
        name: {kind: torch.randn(length, generator=torch.Generator().manual_seed(i)) for i, kind in enumerate(KINDS)}
        for name, length in lengths.items()
    }
    with TemporaryDirectory() as folder:
        write_fragments(Path(folder, "saved"), values, {name: [n] for name, n in lengths.items()}, fragments)
        reader = FragmentReader(Path(folder, "saved"), read_manifest(Path(folder, "saved")))
        for name, length in lengths.items():
            start = data.draw(st.integers(0, length))
            stop = data.draw(st.integers(start, length))
            for kind in KINDS:
                out = torch.full((stop - start,), torch.nan)
                reader.read(kind, name, start, out)
                assert torch.equal(out, values[name][kind][start:stop])
                assert torch.equal(reader.read_whole(kind, name, [1, length]), values[name][kind][None])


@pytest.mark.parametrize(
    ("fragments", "missing"),
    [
        ([(0, 3, 0), (5, 3, 0)], 3),  # in the middle
        ([(2, 6, 0)], 0),  # at the start
        ([(0, 6, 1)], 6),  # at the end
    ],
)
def test_a_gap_between_fragments_is_an_error_that_names_it(tmp_path, fragments, missing):
    values = {"w": {"master": torch.arange(8.0)}}
    write_fragments(tmp_path / "saved", values, {"w": [8]}, {"w": fragments})
    reader = FragmentReader(tmp_path / "saved", read_manifest(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match=f"lacks element {missing} of w"):
        reader.read_whole("master", "w", [8])


def test_a_parameter_without_any_fragment_is_an_error(tmp_path):
    values = {name: {"master": torch.arange(4.0)} for name in ("v", "w")}
    write_fragments(tmp_path / "saved", values, {"v": [4], "w": [4]}, {"w": [(0, 4, 0)]})
    with pytest.raises(CheckpointError, match="lacks element 0 of v"):
        read_weights(tmp_path / "saved")


def test_a_file_that_is_no_safetensors_is_an_error_that_names_it(tmp_path):
    [path] = save(tmp_path, 10)
    (path / "rank-00001.safetensors").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors cannot be read"):
        read_weights(path)


def test_the_weights_of_a_checkpoint_are_its_masters_in_their_shapes_and_its_buffers(tmp_path):
    [path] = save(tmp_path, 10)
    weights = read_weights(path)
    assert weights.keys() == {"w", "share"}
    assert weights["w"].tolist() == [[10.0, 11.0], [12.0, 13.0], [14.0, 15.0]]
    assert weights["share"].tolist() == [0.25, 0.75]


# ---- the weights of a run


def test_the_weights_of_a_run_are_its_final_ones_or_those_of_its_latest_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights yet: neither weights\.safetensors nor a checkpoint"):
        run_weights(tmp_path)
    save(tmp_path, 10, 20)
    assert run_weights(tmp_path)["w"][0, 0] == 20.0
    point_latest(tmp_path, b"step-00000010\n")
    assert run_weights(tmp_path)["w"][0, 0] == 10.0
    save_weights({"w": torch.tensor([[99.0]])}, tmp_path / "weights.safetensors")
    assert run_weights(tmp_path)["w"][0, 0] == 99.0


def test_a_damaged_checkpoint_gives_no_weights(tmp_path):
    [path] = save(tmp_path, 10)
    flip_a_byte(path / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000010 is damaged: rank-00000\.safetensors is not what was"):
        run_weights(tmp_path)
