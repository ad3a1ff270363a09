"""Saving and loading the whole training state, by all ranks together.

Each rank writes the fragments that it owns; on loading each rank reads the stretches that it holds, from whichever
files have them. So a checkpoint fits any number of ranks and any ZeRO stage. What a rank fails at is told to all,
and all raise the same error: nobody is left waiting.
"""

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cctrain.errors import CheckpointError
from cctrain.parallel.mesh import Mesh, agree_on_errors, gather_rows
from cctrain.run_directory import CHECKPOINTS
from cctrain.training.checkpoint_files import (
    FORMAT,
    FragmentReader,
    checkpoint_name,
    checkpoints_to_try,
    damaged_files,
    file_digest,
    incomplete_checkpoints,
    partial_folder,
    publish,
    read_manifest,
    step_of,
    write_manifest,
)
from cctrain.training.sharded_state import (
    KINDS,
    applied_steps,
    held_fragments,
    loss_scale_state,
    owned_fragments,
    set_applied_steps,
    set_loss_scale_state,
    weights_from_masters,
)

log = logging.getLogger(__name__)

ROOM_TO_SPARE = 16 * 2**20  # bytes, for the manifest, the journal and the logs


def save_checkpoint(engine: Any, run_dir: Path, mesh: Mesh, step: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Write RUN/checkpoints/step-…; all ranks call this. Returns what the journal says of it.

    `facts` join the manifest. Raises CheckpointError on all ranks if it could not be written; what was there before
    is as it was.
    """
    started = time.perf_counter()
    partial = partial_folder(run_dir, step)
    fragments = owned_fragments(engine, mesh)
    names = {name: index for index, (name, _) in enumerate(engine.module.named_parameters())}
    table = gather_rows(
        _rows([(names[f.name], mesh.rank, f.start, f.length) for f in fragments], 4, mesh.device)
    ).tolist()
    size = len(KINDS) * 4 * sum(length for *_, length in table)
    _all_or_none(_make_room(partial, size) if mesh.is_first else None, mesh, run_dir, step)

    tensors = {f"{kind}:{f.name}:{f.start}": f.tensors[kind] for f in fragments for kind in KINDS}
    if mesh.is_first:
        tensors |= {f"buffer:{name}": buffer.detach() for name, buffer in engine.module.named_buffers()}
    file = partial / _file_name(mesh.rank)
    _all_or_none(_write(tensors, file), mesh, run_dir, step)
    files = _gather_files(file, mesh)

    reason = None
    if mesh.is_first:
        manifest = {
            "format": FORMAT,
            "step": step,
            **facts,
            "num_ranks": mesh.num_ranks,
            "zero_stage": engine.zero_optimization_stage(),
            "applied_steps": applied_steps(engine),
            "loss_scale": loss_scale_state(engine),
            "kinds": list(KINDS),
            "parameters": [
                {"name": name, "shape": _shape(parameter)} for name, parameter in engine.module.named_parameters()
            ],
            "files": files,
            "fragments": table,
        }
        try:
            write_manifest(partial, manifest)
            publish(run_dir, step)
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}"
    _all_or_none(reason, mesh, run_dir, step)
    return {
        "path": f"{CHECKPOINTS}/{checkpoint_name(step)}",
        "bytes": sum(entry["bytes"] for entry in files),
        "seconds": time.perf_counter() - started,
    }


def load_checkpoint(engine: Any, run_dir: Path, mesh: Mesh) -> dict[str, Any] | None:
    """Restore the latest checkpoint that is whole; returns its manifest, None if the run has no checkpoint.

    All ranks call this. A damaged one is passed over, and the log says so. Raises CheckpointError if all are
    damaged, or if the model is of another shape.
    """
    # What the first rank sees counts: on a network file system others may see it a moment later.
    mine = [(step_of(path),) for path in checkpoints_to_try(run_dir)] if mesh.is_first else []
    steps = [step for (step,) in gather_rows(_rows(mine, 1, mesh.device)).tolist()]
    by_step = {step: partial_folder(run_dir, step).with_name(checkpoint_name(step)) for step in steps}
    damages = []
    if mesh.is_first:
        for lost in incomplete_checkpoints(run_dir):
            log.warning("%s: taking the newest one that is complete", lost)
    for step in steps:
        path = by_step[step]
        damage = _damage(path, mesh)
        if damage is not None:
            damages.append(f"{path} is damaged: {damage}")
            if mesh.is_first:
                log.warning("%s; trying the one before it", damages[-1])
            continue
        manifest = read_manifest(path)
        _check_shapes(engine, path, manifest)
        _all_or_raise(_restore(engine, mesh, path, manifest), mesh, path)
        set_applied_steps(engine, manifest["applied_steps"])
        set_loss_scale_state(engine, manifest["loss_scale"])
        weights_from_masters(engine)
        return manifest
    if damages:
        raise CheckpointError(
            "no checkpoint of this run is whole; restore one from a copy, or train anew in another run.dir:\n"
            + "\n".join(damages)
        )
    return None


def _make_room(partial: Path, size: int) -> str | None:
    """On the first rank: the folder to write into, if the disk has room for it."""
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    if free < size + ROOM_TO_SPARE:
        return f"it needs {(size + ROOM_TO_SPARE) / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free"
    return None


def _write(tensors: dict[str, torch.Tensor], file: Path) -> str | None:
    try:
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, file)
        file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors lets nobody but the owner read it
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _gather_files(file: Path, mesh: Mesh) -> list[dict[str, Any]]:
    """Name, size and digest of every rank's file; the digest travels as four 64-bit integers."""
    digest = bytes.fromhex(file_digest(file))
    words = [int.from_bytes(digest[at : at + 8], "big", signed=True) for at in range(0, 32, 8)]
    rows = gather_rows(_rows([(file.stat().st_size, *words)], 5, mesh.device)).tolist()
    return [
        {
            "name": _file_name(rank),
            "bytes": size,
            "sha256": b"".join(word.to_bytes(8, "big", signed=True) for word in row).hex(),
        }
        for rank, (size, *row) in enumerate(rows)
    ]


def _damage(path: Path, mesh: Mesh) -> str | None:
    """What is wrong with a checkpoint; the ranks share the reading of its files."""
    try:
        manifest = read_manifest(path)
        found = damaged_files(path, manifest, range(mesh.rank, len(manifest["files"]), mesh.num_ranks))
        mine = "; ".join(found) or None
    except CheckpointError as error:
        mine = str(error).removeprefix(f"{path}{os.sep}")
    said = agree_on_errors(mine, mesh)
    return "; ".join(dict.fromkeys(said.values())) if said else None


def _check_shapes(engine: Any, path: Path, manifest: dict[str, Any]) -> None:
    saved = {entry["name"]: entry["shape"] for entry in manifest["parameters"]}
    model = {name: _shape(parameter) for name, parameter in engine.module.named_parameters()}
    if saved != model:
        differing = sorted(name for name in saved.keys() | model.keys() if saved.get(name) != model.get(name))
        first = differing[0]
        raise CheckpointError(
            f"{path} is of another model: {len(differing)} parameters differ, such as {first} "
            f"({saved.get(first, 'absent')} there, {model.get(first, 'absent')} here)"
        )


def _restore(engine: Any, mesh: Mesh, path: Path, manifest: dict[str, Any]) -> str | None:
    reader = FragmentReader(path, manifest)
    try:
        for fragment in held_fragments(engine, mesh):
            for kind in KINDS:
                reader.read(kind, fragment.name, fragment.start, fragment.tensors[kind])
    except (CheckpointError, SafetensorError, OSError) as error:
        return str(error)
    return None


def _all_or_none(reason: str | None, mesh: Mesh, run_dir: Path, step: int) -> None:
    """Raise on all ranks what went wrong on any; nothing of the checkpoint stays then."""
    said = agree_on_errors(reason, mesh)
    if not said:
        return
    if mesh.is_first:
        shutil.rmtree(partial_folder(run_dir, step), ignore_errors=True)
    raise CheckpointError(
        f"the checkpoint of step {step} could not be written in {run_dir}: {_by_rank(said)}. Earlier checkpoints are "
        "as they were: make room, then resume with the same command"
    )


def _all_or_raise(reason: str | None, mesh: Mesh, path: Path) -> None:
    said = agree_on_errors(reason, mesh)
    if said:
        raise CheckpointError(f"{path} could not be read: {_by_rank(said)}")


def _by_rank(said: dict[int, str]) -> str:
    return "; ".join(f"{reason} (rank {rank})" for rank, reason in said.items())


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _rows(rows: Sequence[tuple[int, ...]], columns: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, columns)


def _shape(parameter: torch.Tensor) -> list[int]:
    return list(getattr(parameter, "ds_shape", parameter.shape))
