"""What a token store, a run or a checkpoint holds, as facts and as a page of text."""

import json
import math
from pathlib import Path
from typing import Any

from cctrain.config import load_config
from cctrain.data.inspect import describe as describe_store
from cctrain.data.inspect import inspect_store
from cctrain.errors import CheckpointError, UsageError
from cctrain.run_directory import CONFIG, WEIGHTS
from cctrain.tracking.journal import JOURNAL_NAME, history, read_journal
from cctrain.training.checkpoint_files import (
    MANIFEST,
    damaged_files,
    find_checkpoints,
    incomplete_checkpoints,
    latest_checkpoint,
    read_manifest,
)
from cctrain.training.guards import read_outcome

Facts = dict[str, Any]


def inspect(path: Path, verify: bool) -> tuple[Facts, str]:
    """Facts and a page of text.

    Raises DataError or CheckpointError, naming each damaged file, and UsageError where there is nothing to inspect.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}: pass a token store, a run directory or a checkpoint")
    if (path / JOURNAL_NAME).is_file() or (path / CONFIG).is_file():
        facts = run_facts(path, verify)
        return facts, describe_run(facts)
    if is_checkpoint(path):
        facts = checkpoint_facts(path, verify)
        return facts, describe_checkpoint(facts)
    manifest = inspect_store(path, verify)
    return manifest, describe_store(path, manifest, verify)


def is_checkpoint(path: Path) -> bool:
    if path.name.startswith("step-"):
        return True
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "fragments" in manifest


def checkpoint_facts(path: Path, verify: bool) -> Facts:
    manifest = read_manifest(path)
    if verify and (damaged := damaged_files(path, manifest)):
        raise CheckpointError(f"{path} is damaged: {'; '.join(damaged)}. A resumed run uses the one before it")
    names = ("step", "position", "attempt", "num_ranks", "zero_stage", "precision", "applied_steps", "held_out_nll")
    return {
        "path": str(path),
        **{name: manifest.get(name) for name in names},
        "store_digest": manifest.get("store_digest"),
        "parameters": sum(math.prod(entry["shape"]) for entry in manifest["parameters"]),
        "files": len(manifest["files"]),
        "bytes": sum(entry["bytes"] for entry in manifest["files"]),
        "verified": verify,
    }


def describe_checkpoint(facts: Facts) -> str:
    nll = facts["held_out_nll"]
    return "\n".join(
        [
            f"checkpoint {facts['path']}" + (", every file verified" if facts["verified"] else ""),
            f"step        {facts['step']:,}, {facts['position']:,} samples consumed, attempt {facts['attempt']}"
            + ("" if nll is None else f", held-out NLL {nll:.4f}"),
            f"weights     {facts['parameters']:,} parameters, AdamW's state after {facts['applied_steps']:,} steps",
            f"written by  {facts['num_ranks']} rank(s), ZeRO {facts['zero_stage']}, {facts['precision']}; "
            "it loads on any other number and stage",
            f"size        {facts['bytes'] / 2**20:,.1f} MiB in {facts['files']} file(s)",
        ]
    )


def run_facts(run_dir: Path, verify: bool) -> Facts:
    lines = read_journal(run_dir)
    counted = history(lines)
    steps = [line for line in counted if line["event"] == "step"]
    looks = [line for line in counted if line["event"] == "evaluate"]
    checkpoints, damaged = [], incomplete_checkpoints(run_dir)
    for path in find_checkpoints(run_dir):
        try:
            checkpoints.append(checkpoint_facts(path, verify))
        except CheckpointError as error:
            damaged.append(str(error))
    if verify and damaged:
        raise CheckpointError("\n".join(damaged))
    latest = latest_checkpoint(run_dir)
    return {
        "path": str(run_dir),
        "steps": load_config(run_dir / CONFIG).training.steps if (run_dir / CONFIG).is_file() else None,
        "last_step": steps[-1]["step"] if steps else 0,
        "loss": _number(steps[-1]["loss"]) if steps else None,
        "held_out": {key: _number(looks[-1][key]) for key in ("step", "nll", "difference")} if looks else None,
        "outcome": read_outcome(run_dir),
        "attempts": attempts_of(lines),
        "checkpoints": checkpoints,
        "latest": None if latest is None else latest.name,
        "damaged": damaged,
        "has_weights": (run_dir / WEIGHTS).is_file(),
        "verified": verify,
    }


def attempts_of(lines: list[Facts]) -> list[Facts]:
    """Each attempt: where it started, on how many ranks, where it was last seen, how it ended."""
    found: dict[int, Facts] = {}
    for line in lines:
        entry = found.setdefault(line["attempt"], {"attempt": line["attempt"], "status": "killed, or still training"})
        entry["last_step"] = line["step"]
        if line["event"] == "start":
            entry |= {"started": line["time"], "from_step": line["step"], "ranks": line.get("world_size")}
            entry["zero_stage"] = line.get("zero_stage")
        elif line["event"] == "stop":
            entry["status"] = line.get("status")
            entry["reason"] = line.get("reason")
    return list(found.values())


def describe_run(facts: Facts) -> str:
    of = "" if facts["steps"] is None else f" of {facts['steps']:,}"
    text = [
        f"run {facts['path']}" + (", every checkpoint verified" if facts["verified"] else ""),
        f"step        {facts['last_step']:,}{of}"
        + ("" if facts["loss"] is None else f", loss {float(facts['loss']):.4f}")
        + ("" if facts["outcome"] is None else f"; {facts['outcome']}"),
    ]
    if facts["held_out"] is not None:
        look = facts["held_out"]
        text.append(
            f"held out    NLL {float(look['nll']):.4f} at step {look['step']:,}, "
            f"{float(look['difference']):+.4f} against the gene mean"
        )
    text += [
        f"attempt {entry['attempt']:<3} from step {entry.get('from_step', 0):,} to {entry['last_step']:,} on "
        f"{entry.get('ranks')} rank(s), ZeRO {entry.get('zero_stage')}: {entry['status']}"
        + (f" ({entry['reason']})" if entry.get("reason") else "")
        for entry in facts["attempts"]
    ]
    text += [
        f"checkpoint  step {entry['step']:,}, {entry['bytes'] / 2**20:,.1f} MiB"
        + ("" if entry["held_out_nll"] is None else f", held-out NLL {entry['held_out_nll']:.4f}")
        + (" (latest)" if Path(entry["path"]).name == facts["latest"] else "")
        for entry in facts["checkpoints"]
    ]
    text += [f"damaged     {message}" for message in facts["damaged"]]
    text.append(f"weights     {WEIGHTS if facts['has_weights'] else 'none yet: it has not finished'}")
    return "\n".join(text)


def _number(value: float) -> float | str:
    """As the journal writes it: JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)
