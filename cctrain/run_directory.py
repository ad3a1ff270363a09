"""What a finished run leaves for others to use: configuration, vocabulary and weights, none of it code.

    config.yaml            resolved
    vocabulary.json        gene ids and names, in the order of the model's gene table
    weights.safetensors    every parameter and buffer in fp32, by its name in the plain model

A newcomer finds the journal (`metrics.jsonl`), `mlflow.json` and `logs/` beside them.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cctrain.config import Config, load_config
from cctrain.errors import CheckpointError, UsageError

CONFIG, VOCABULARY, WEIGHTS = "config.yaml", "vocabulary.json", "weights.safetensors"


@dataclass(frozen=True)
class TrainedRun:
    path: Path
    config: Config
    gene_ids: list[str]
    gene_names: list[str]


def open_run(path: Path) -> TrainedRun:
    """A run whose training has ended. Raises UsageError (no run there) or CheckpointError (no weights yet)."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path} is not a run directory (no {CONFIG}): pass the run.dir that `cctrain train` named")
    for name in (VOCABULARY, WEIGHTS):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing: has the training of this run ended?")
    try:
        vocabulary = json.loads((path / VOCABULARY).read_text(encoding="utf-8"))
        ids, names = vocabulary["ids"], vocabulary["names"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / VOCABULARY} is damaged ({error}): copy the run again") from error
    return TrainedRun(path, load_config(path / CONFIG), ids, names)


def claim_run_directory(run_dir: Path) -> None:
    """A new run needs a place of its own; a run that is there already is never overwritten."""
    if (run_dir / "metrics.jsonl").exists() or (run_dir / CONFIG).exists():
        raise UsageError(f"{run_dir} already holds a run: choose another with run.dir=DIR, or move that one away")


def take_run_directory(run_dir: Path) -> None:
    """Of two trainings that start at once in one place, the second gets UsageError."""
    try:
        (run_dir / CONFIG).touch(exist_ok=False)
    except FileExistsError:
        claim_run_directory(run_dir)


def write_vocabulary(path: Path, ids: list[str], names: list[str]) -> None:
    write_atomically(Path(path) / VOCABULARY, json.dumps({"ids": ids, "names": names}).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there whole, or as it was before."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
