"""What a resumed run may change, key by key, and what the journal says of earlier attempts."""

from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from cctrain.config import Config, field_help, load_config, to_yaml
from cctrain.errors import CheckpointError, UsageError
from cctrain.run_directory import CONFIG
from cctrain.tracking.journal import Journal
from cctrain.training.checkpoint_files import partial_folder, publish, write_manifest
from cctrain.training.resume import Past, check_changes, check_checkpoints_are_there, read_past

CLASSES = {key: resume for key, (_, resume, _) in field_help().items()}
# Another value for each key that has no default to depart from, or whose neighbour is not allowed.
OTHERS: dict[str, Any] = {
    "run.dir": "elsewhere",
    "data.store": "another-store",
    "data.digest": "feed",
    "data.context": "group",
    "data.window": 9,
    "data.max_tokens": 999,
    "data.weights": "donor",
    "data.weights_digest": "beef",
    "data.workers": 3,
    "data.micro_batch_tokens": 9_999,
    "model.attention": "dense",
    "model.latent_width": 24,
    "model.init_from": "another-run",
    "model.backend": "reference",
    "model.cell_encoding": 64,
    "memory.offload": "host",
    "memory.offload_dir": "elsewhere",
    "memory.tile_tokens": 77,
    "training.precision": "bf16",
    "training.schedule": "wsd",
    "tracking.uri": "sqlite:///elsewhere.db",
    "tracking.experiment": "another",
    "deepspeed": {"zero_optimization": {"overlap_comm": True}},
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "mine.yaml"
    path.write_text("data: {store: my-store}\n")
    return load_config(path)


@pytest.fixture
def run_dir(config: Config, tmp_path: Path) -> Path:
    """A run that began with `config`."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CONFIG).write_text(to_yaml(config))
    return folder


def get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def put(config: Config, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    node: Any = config
    for section in sections:
        node = getattr(node, section)
    assert not is_dataclass(getattr(node, name))
    setattr(node, name, value)


def change(config: Config, key: str) -> tuple[Any, Any]:
    """Gives the key another value; returns both."""
    old = get(config, key)
    new = OTHERS.get(key)
    if new is None:
        new = not old if isinstance(old, bool) else old + 1 if isinstance(old, int) else old / 2 + 0.07
    assert new != old
    put(config, key, new)
    return old, new


def of_class(resume: str) -> list[str]:
    return [key for key, found in CLASSES.items() if found == resume]


def test_every_key_is_fixed_scheduled_or_free():
    assert set(CLASSES.values()) == {"fixed", "schedule", "free"}
    assert of_class("schedule") == [
        *("training.steps", "training.precision", "training.clip", "training.learning_rate", "training.schedule"),
        *("training.warmup", "training.decay", "training.final_learning_rate", "deepspeed"),
    ]
    where_and_how = ("evaluation.", "parallel.", "memory.", "checkpoint.", "tracking.")
    assert [key for key in of_class("fixed") if key.startswith(where_and_how)] == []
    assert {"run.seed", "data.digest", "data.global_batch", "model.width", "training.beta1"} <= set(of_class("fixed"))
    assert {"run.dir", "data.store", "data.micro_batch_tokens", "parallel.zero_stage"} <= set(of_class("free"))


def test_the_same_configuration_resumes_without_a_change(config, run_dir):
    assert check_changes(run_dir, config, accept_changes=False) == []
    assert check_changes(run_dir, load_config(run_dir / CONFIG), accept_changes=False) == []


@pytest.mark.parametrize("key", of_class("free"))
def test_a_free_key_changes_as_one_likes(config, run_dir, key):
    old, new = change(config, key)
    [found] = check_changes(run_dir, config, accept_changes=False)
    assert (found.key, found.resume, found.old, found.new) == (key, "free", old, new)


@pytest.mark.parametrize("key", of_class("fixed"))
def test_a_fixed_key_never_changes(config, run_dir, key):
    old, new = change(config, key)
    shown = "unset" if old is None else old
    for accept in (False, True):
        with pytest.raises(UsageError) as refused:
            check_changes(run_dir, config, accept)
        assert f"\n  {key}: {shown} → {new}\n" in str(refused.value)
        assert "run.dir=DIR" in str(refused.value)
        assert "--accept-changes" not in str(refused.value)


@pytest.mark.parametrize("key", of_class("schedule"))
def test_a_scheduled_key_changes_on_purpose_only(config, run_dir, key):
    old, new = change(config, key)
    with pytest.raises(UsageError) as refused:
        check_changes(run_dir, config, accept_changes=False)
    assert f"\n  {key}: {old} → {new}\n" in str(refused.value)
    assert "--accept-changes" in str(refused.value)
    [found] = check_changes(run_dir, config, accept_changes=True)
    assert str(found) == f"{key}: {old} → {new}"


def test_all_differences_of_a_kind_are_listed_the_fixed_ones_first(config, run_dir):
    for key in ("model.width", "model.depth", "training.steps", "checkpoint.every"):
        change(config, key)
    with pytest.raises(UsageError) as refused:
        check_changes(run_dir, config, accept_changes=True)
    listed = [line.strip().split(":")[0] for line in str(refused.value).splitlines() if " → " in line]
    assert listed == ["model.width", "model.depth"]


def test_a_value_taken_back_is_shown_as_unset(config, run_dir):
    put(config, "model.latent_width", 8)
    (run_dir / CONFIG).write_text(to_yaml(config))
    put(config, "model.latent_width", None)
    with pytest.raises(UsageError, match=r"model\.latent_width: 8 → unset"):
        check_changes(run_dir, config, accept_changes=False)


def test_a_damaged_configuration_of_the_run_is_an_error_that_names_it(config, run_dir):
    (run_dir / CONFIG).write_bytes(b"\x80\x04N.")
    with pytest.raises(UsageError, match=r"run/config\.yaml"):
        check_changes(run_dir, config, accept_changes=False)


# ---- earlier attempts


@pytest.fixture
def write(run_dir: Path) -> Callable[..., None]:
    """Writes an attempt into the journal: its events with their steps, in order."""

    def write(attempt: int, *events: tuple[str, int], **start: Any) -> None:
        journal = Journal(run_dir, attempt)
        for event, step in events:
            journal.write(event, step, **(start if event == "start" else {}))
        journal.close()

    return write


def test_a_run_without_a_journal_has_no_past(run_dir):
    assert read_past(run_dir) == Past(attempts=0, run=None, looks=frozenset(), last_checkpoint=None)


def test_the_past_counts_attempts_and_keeps_the_first_name_of_the_run(run_dir, write):
    write(1, ("start", 0), ("evaluate", 0), ("step", 1), ("step", 2), ("checkpoint", 2), run="first")
    write(2, ("start", 2), ("step", 3), ("evaluate", 3), ("checkpoint", 3), ("step", 4), run="second")
    assert read_past(run_dir) == Past(attempts=2, run="first", looks=frozenset({0, 3}), last_checkpoint=3)


def test_a_torn_last_line_is_no_part_of_the_past(run_dir, write):
    write(1, ("start", 0), ("step", 1), run="first")
    with open(run_dir / "metrics.jsonl", "ab") as journal:
        journal.write(b'{"event": "checkpoint", "attempt": 1, "step": 1, "ti')
    assert read_past(run_dir).last_checkpoint is None


def test_a_run_that_saved_does_not_begin_anew_when_its_checkpoints_are_gone(run_dir, write):
    check_checkpoints_are_there(run_dir, read_past(run_dir))  # it has not begun
    write(1, ("start", 0), ("step", 1), run="first")
    check_checkpoints_are_there(run_dir, read_past(run_dir))  # it was killed before it could save
    write(2, ("start", 0), ("step", 1), ("checkpoint", 1), run="first")
    with pytest.raises(CheckpointError, match=r"has saved step 1, but .* holds no checkpoint any more"):
        check_checkpoints_are_there(run_dir, read_past(run_dir))
    partial_folder(run_dir, 1).mkdir(parents=True)
    write_manifest(partial_folder(run_dir, 1), {})
    publish(run_dir, 1)
    check_checkpoints_are_there(run_dir, read_past(run_dir))
