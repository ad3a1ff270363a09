"""What a run leaves for others to use: configuration, vocabulary and weights, none of it code.

    config.yaml            resolved
    vocabulary.json        gene ids and names, in the order of the model's gene table
    weights.safetensors    once it has finished: every parameter and buffer in fp32, by its name in the plain model

A newcomer finds the journal (`metrics.jsonl`), `checkpoints/`, `mlflow.json` and `logs/` beside them.
"""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cctrain.config import Config, load_config
from cctrain.errors import CheckpointError, UsageError

CONFIG, VOCABULARY, WEIGHTS = "config.yaml", "vocabulary.json", "weights.safetensors"
CHECKPOINTS, LATEST = "checkpoints", "latest"  # the file `latest` in there names the one to resume from


@dataclass(frozen=True)
class TrainedRun:
    path: Path
    config: Config
    gene_ids: list[str]
    gene_names: list[str]


def open_run(path: Path) -> TrainedRun:
    """Raises UsageError (no run there) or CheckpointError (it has not begun to train, or is damaged)."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path} is not a run directory (no {CONFIG}): pass the run.dir that `cctrain train` named")
    if not (path / VOCABULARY).is_file():
        raise CheckpointError(f"{path / VOCABULARY} is missing: has this run begun to train?")
    try:
        vocabulary = json.loads((path / VOCABULARY).read_text(encoding="utf-8"))
        ids, names = vocabulary["ids"], vocabulary["names"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / VOCABULARY} is damaged ({error}): copy the run again") from error
    return TrainedRun(path, load_config(path / CONFIG), ids, names)


def log_file(run_dir: Path, rank: int) -> Path:
    return Path(run_dir) / "logs" / f"rank-{rank:04d}.log"


def write_vocabulary(path: Path, ids: list[str], names: list[str]) -> None:
    write_atomically(Path(path) / VOCABULARY, json.dumps({"ids": ids, "names": names}).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """The file is there whole, or as it was before."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
