"""A checkpoint on the disk: RUN/checkpoints/step-00000200/, complete or absent, with nothing in it that is code.

    manifest.json            what is where, with sizes and digests, and the state that is not a tensor
    rank-00000.safetensors   fragments of flattened parameters, fp32: `KIND:NAME:START`, KIND one of master,
                             exp_avg, exp_avg_sq; the first file also holds the model's constants, `buffer:NAME`
    ../latest                names the checkpoint to resume from

The manifest maps every parameter to fragments, so that a reader of any number of ranks finds the stretches it
needs. Nothing here knows of ranks that run, of DeepSpeed or of the trainer.
"""

import hashlib
import json
import logging
import shutil
from bisect import bisect_right
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cctrain.data.files import sync_to_disk
from cctrain.errors import CheckpointError
from cctrain.model.saved import load_weights
from cctrain.run_directory import CHECKPOINTS, LATEST, WEIGHTS, write_atomically

log = logging.getLogger(__name__)

MANIFEST, FORMAT = "manifest.json", 1


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, by step."""
    found = (Path(run_dir) / CHECKPOINTS).glob("step-" + "[0-9]" * 8)
    return sorted(path for path in found if (path / MANIFEST).is_file())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """What `latest` names, or the newest where it names nothing that is there."""
    found, named = find_checkpoints(run_dir), _named_by_latest(run_dir)
    return next((path for path in found if path.name == named), found[-1] if found else None)


def _named_by_latest(run_dir: Path) -> str | None:
    try:
        return (Path(run_dir) / CHECKPOINTS / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def checkpoints_to_try(run_dir: Path) -> list[Path]:
    """The latest one first, then the ones before it, then any newer ones."""
    latest = latest_checkpoint(run_dir)
    found = find_checkpoints(run_dir)
    older = [path for path in reversed(found) if latest is not None and path <= latest]
    return older + [path for path in found if path not in older]


def incomplete_checkpoints(run_dir: Path) -> list[str]:
    """What should be a checkpoint and is none: a folder without its manifest, a name in `latest` without a folder."""
    folder, found = Path(run_dir) / CHECKPOINTS, {path.name for path in find_checkpoints(run_dir)}
    there = {path.name for path in folder.glob("step-" + "[0-9]" * 8)}
    said = [f"{folder / name} has no {MANIFEST}" for name in sorted(there - found)]
    named = _named_by_latest(run_dir)
    if named is not None and named not in there:
        said.append(f"{folder / LATEST} names {named[:100]!r}, which is not there")
    return said


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """The content with a digest of itself."""
    text = json.dumps({**content, "digest": _digest_of(content)}, allow_nan=False)
    write_atomically(folder / MANIFEST, text.encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if it is missing, damaged or of another format."""
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        digest = content.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error})") from error
    if digest != _digest_of(content):
        raise CheckpointError(f"{path / MANIFEST} is damaged: its digest does not match")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {content.get('format')}, this cctrain reads format {FORMAT}: use the one that wrote it"
        )
    return content


def damaged_files(path: Path, manifest: dict[str, Any], of: Iterable[int] | None = None) -> list[str]:
    """Names and defects of the files, or of those with the given indices, that are not as they were written."""
    found = []
    for index in range(len(manifest["files"])) if of is None else of:
        entry = manifest["files"][index]
        file = path / entry["name"]
        try:
            if file.stat().st_size != entry["bytes"]:
                found.append(f"{entry['name']} has {file.stat().st_size:,} bytes instead of {entry['bytes']:,}")
            elif file_digest(file) != entry["sha256"]:
                found.append(f"{entry['name']} is not what was written (SHA-256)")
        except OSError as error:
            found.append(f"{entry['name']}: {error.strerror}")
    return found


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FragmentReader:
    """Stretches of parameters, whatever fragments they were saved in."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self._open: dict[int, Any] = {}

    @cached_property
    def _fragments(self) -> dict[str, list[tuple[int, int, int]]]:
        """For each parameter (start, length, file), by start."""
        names = [entry["name"] for entry in self.manifest["parameters"]]
        found: dict[str, list[tuple[int, int, int]]] = {name: [] for name in names}
        for parameter, file, start, length in self.manifest["fragments"]:
            found[names[parameter]].append((start, length, file))
        return {name: sorted(fragments) for name, fragments in found.items()}

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill `out` (length,) with the elements of the flattened parameter from `start` on."""
        fragments, end, place = self._fragments[name], start + len(out), start
        index = bisect_right(fragments, place, key=lambda fragment: fragment[0]) - 1
        while place < end:
            if not 0 <= index < len(fragments) or not fragments[index][0] <= place < sum(fragments[index][:2]):
                raise CheckpointError(f"{self.path} lacks element {place} of {name}")
            first, length, file = fragments[index]
            stop = min(end, first + length)
            piece = self._file(file).get_slice(f"{kind}:{name}:{first}")[place - first : stop - first]
            out[place - start : stop - start].copy_(piece)
            place, index = stop, index + 1

    def read_whole(self, kind: str, name: str, shape: list[int]) -> Tensor:
        whole = torch.empty(shape, dtype=torch.float32)
        self.read(kind, name, 0, whole.view(-1))
        return whole

    def read_buffers(self) -> dict[str, Tensor]:
        file = self._file(0)
        return {key.removeprefix("buffer:"): file.get_tensor(key) for key in file.keys() if key.startswith("buffer:")}  # noqa: SIM118

    def _file(self, index: int) -> Any:
        if index not in self._open:
            name = self.manifest["files"][index]["name"]
            try:
                self._open[index] = safe_open(self.path / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.path / name} cannot be read ({error})") from error
        return self._open[index]


def read_weights(path: Path) -> dict[str, Tensor]:
    """All parameters (the fp32 masters) and buffers of a checkpoint, by their names in the plain model."""
    manifest = read_manifest(path)
    reader = FragmentReader(path, manifest)
    weights = {
        entry["name"]: reader.read_whole("master", entry["name"], entry["shape"]) for entry in manifest["parameters"]
    }
    return weights | reader.read_buffers()


def run_weights(run_dir: Path) -> dict[str, Tensor]:
    """The weights of a run: its final ones, or those of its latest checkpoint while it has not ended.

    Raises CheckpointError if it has neither, or if they are damaged.
    """
    final, latest = Path(run_dir) / WEIGHTS, latest_checkpoint(run_dir)
    if final.is_file():
        return load_weights(final)
    if latest is None:
        raise CheckpointError(f"{run_dir} has no weights yet: neither {WEIGHTS} nor a checkpoint")
    log.info("the training of %s has not ended: taking the weights of %s", run_dir, latest.name)
    damage = damaged_files(latest, read_manifest(latest))
    if damage:
        raise CheckpointError(f"{latest} is damaged: {'; '.join(damage)}")
    return read_weights(latest)


def partial_folder(run_dir: Path, step: int) -> Path:
    return Path(run_dir) / CHECKPOINTS / f".{checkpoint_name(step)}.partial"


def publish(run_dir: Path, step: int) -> None:
    """Give a complete partial folder its name, then move `latest` to it; a checkpoint of that name is replaced."""
    partial, final = partial_folder(run_dir, step), Path(run_dir) / CHECKPOINTS / checkpoint_name(step)
    sync_to_disk(partial)
    if final.exists():
        _discard(final)
    partial.rename(final)
    sync_to_disk(final.parent)
    write_atomically(final.parent / LATEST, f"{final.name}\n".encode())
    sync_to_disk(final.parent)


def discard_leftovers(run_dir: Path) -> None:
    """What a killed attempt had begun to write or to remove."""
    for leftover in (Path(run_dir) / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(run_dir: Path, keep: int, keep_every: int, keep_best: bool) -> None:
    """Remove what need not be kept of the checkpoints up to the latest one.

    Kept are the last `keep`, every one whose step is a multiple of `keep_every`, and the one with the lowest
    held-out NLL. Newer ones than the latest are left alone: someone has gone back behind them, or they are damaged.
    """
    latest = latest_checkpoint(run_dir)
    if latest is None:
        return
    found = [path for path in find_checkpoints(run_dir) if path <= latest]
    kept = {latest, *found[-keep:]}
    kept |= {path for path in found if keep_every and step_of(path) % keep_every == 0}
    if keep_best and len(found) > len(kept):
        kept |= _best(found)
    for path in found:
        if path not in kept:
            _discard(path)


def _best(found: list[Path]) -> set[Path]:
    looks = {}
    for path in found:
        try:
            looks[path] = read_manifest(path).get("held_out_nll")
        except CheckpointError:
            continue  # a damaged one is nobody's best
    measured = {path: nll for path, nll in looks.items() if nll is not None}
    return {min(measured, key=measured.__getitem__)} if measured else set()


def _discard(path: Path) -> None:
    """Never half there: first its name goes, then its content."""
    leaving = path.with_name(f".{path.name}.removed")
    shutil.rmtree(leaving, ignore_errors=True)
    path.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _digest_of(content: dict[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
