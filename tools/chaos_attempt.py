"""The run that `chaos` disturbs: its cells and configuration, an attempt, its processes, what it has written so far."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import psutil
import scipy.sparse

from cctrain.run_directory import CHECKPOINTS, LATEST, WEIGHTS, log_file
from cctrain.tracking.journal import JOURNAL_NAME, MEASURED_EVENTS, last_attempt, read_journal, read_journal_from
from cctrain.tracking.restarts import repeatable
from cctrain.training.checkpoint_files import file_digest, latest_checkpoint, step_of

NUM_RANKS = 2
NUM_CELLS, NUM_GENES = 60, 150
EVERY = 5  # steps between checkpoints, and between looks at the held-out cells
LAUNCHER, RANKS = "the launcher", tuple(f"rank {rank}" for rank in range(NUM_RANKS))
MARK = "CCTRAIN_CHAOS"  # in the environment of every process of one attempt, whoever started it
OUTPUT = "output.log"

START_UP, BEFORE_FIRST, BETWEEN = "at start-up", "before the first checkpoint", "between checkpoints"
IN_SAVE, AFTER_SAVE = "inside a save", "between a save and its journal line"
PRUNING = "while removing an old checkpoint"
AT_END = "after the last step"
PHASES = (START_UP, BEFORE_FIRST, BETWEEN, IN_SAVE, AFTER_SAVE, PRUNING, AT_END)

SETTINGS = """
run: {{dir: run}}
data: {{store: {store}, global_batch: 8, block: 4, mixed_blocks: 3}}
model: {{width: 16, depth: 2, heads: 2, latents: 4, latent_width: 8}}
training: {{steps: {steps}, warmup: 5, learning_rate: 5e-3}}
evaluation: {{every: {every}, cells: 6}}
checkpoint: {{every: {every}}}
# Without this ZeRO 3 would not shard parameters as small as these.
deepspeed: {{zero_optimization: {{stage3_param_persistence_threshold: 0}}}}
"""


class Kind(NamedTuple):
    zero_stage: int
    precision: str

    def __str__(self) -> str:
        return f"ZeRO {self.zero_stage}, {self.precision}"


@dataclass(frozen=True)
class Attempt:
    launcher: subprocess.Popen
    run_dir: Path
    number: int
    mark: str
    started: float  # seconds since the epoch, as the journal's times
    journal_start: int  # bytes that earlier attempts wrote


def prepare(folder: Path, steps: int) -> Path:
    """Cells, their token store, and the configuration of all runs."""
    draw = np.random.default_rng(0)
    rates = draw.gamma(0.8, size=NUM_GENES) * np.exp(draw.normal(0.0, 1.0, size=(2, NUM_GENES)))
    rates /= rates.sum(axis=1, keepdims=True)
    counts = draw.poisson(np.geomspace(30, 3000, NUM_CELLS)[:, None] * rates[np.arange(NUM_CELLS) % 2])
    cells = anndata.AnnData(scipy.sparse.csr_matrix(counts.astype(np.float32)))
    cells.obs_names = [f"cell{cell}" for cell in range(NUM_CELLS)]
    cells.var_names = [f"ENSG{gene:011d}" for gene in range(NUM_GENES)]
    cells.write_h5ad(folder / "cells.h5ad")
    done = cctrain(folder, "prepare", "cells.h5ad", "--out=store", "--min-genes=1", "--min-cells=1")
    if done.returncode != 0:
        raise SystemExit(f"cctrain prepare failed:\n{done.stderr}")
    config = folder / "chaos.yaml"
    config.write_text(SETTINGS.format(store=folder / "store", steps=steps, every=EVERY))
    return config


def cctrain(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cctrain", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def environment() -> dict[str, str]:
    """On the CPU, one thread a rank, and not as a part of the job that this process may belong to."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID")}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def attempt_of(folder: Path, config: Path, kind: Kind) -> Iterator[Attempt]:
    """The same command each time. Whatever it started is gone when this ends."""
    folder.mkdir(exist_ok=True)
    settings = [f"parallel.zero_stage={kind.zero_stage}", f"training.precision={kind.precision}"]
    command = [sys.executable, "-m", "cctrain", "train", str(config), *settings, "--ranks", str(NUM_RANKS)]
    mark = uuid.uuid4().hex
    number = last_attempt(read_journal(folder / "run")) + 1
    journal = folder / "run" / JOURNAL_NAME
    journal_start = journal.stat().st_size if journal.exists() else 0
    with open(folder / OUTPUT, "ab") as output:
        launcher = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment(), MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield Attempt(launcher, folder / "run", number, mark, time.time(), journal_start)
    finally:
        for process in processes_of(mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()


def find_processes(attempt: Attempt) -> dict[str, psutil.Process]:
    """The processes of an attempt that there are now: launcher, ranks, and whatever else they started."""
    launcher = psutil.Process(attempt.launcher.pid)
    found = {LAUNCHER: launcher}
    for process in launcher.children(recursive=True):
        with suppress(psutil.Error):
            is_rank = process.ppid() == launcher.pid and "RANK" in process.environ()
            found[f"rank {process.environ()['RANK']}" if is_rank else f"process {process.pid}"] = process
    return found


def processes_of(mark: str) -> list[psutil.Process]:
    """Every process on this machine that carries the mark, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and is_alive(process):
                found.append(process)
    return found


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def phase_of(attempt: Attempt, last: int) -> str:
    """Where the attempt was, from what is on the disk; `last` is the last step of the training."""
    folder, lines, step = attempt.run_dir / CHECKPOINTS, lines_of(attempt), last_step(attempt)
    if not lines:
        return START_UP
    latest, newest = latest_step(attempt.run_dir), max(map(step_of, folder.glob("step-*")), default=0)
    if leftovers(folder, "partial") or latest < newest <= step:
        return IN_SAVE
    if lines[0]["step"] < latest and latest not in [line["step"] for line in lines if line["event"] == "checkpoint"]:
        return AFTER_SAVE
    if leftovers(folder, "removed"):
        return PRUNING
    if step == last or lines[0]["step"] == last:
        return AT_END
    return BETWEEN if latest else BEFORE_FIRST


def lines_of(attempt: Attempt) -> list[dict[str, Any]]:
    return read_journal_from(attempt.run_dir, attempt.journal_start)[0]


def last_step(attempt: Attempt) -> int:
    """The last one that this attempt has written down; 0 if none."""
    return max((line["step"] for line in lines_of(attempt) if line["event"] == "step"), default=0)


def latest_step(run_dir: Path) -> int:
    latest = latest_checkpoint(run_dir)
    return 0 if latest is None else step_of(latest)


def latest_text(folder: Path) -> str:
    try:
        return (folder / LATEST).read_text()
    except FileNotFoundError:
        return ""


def leftovers(folder: Path, ending: str) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.startswith(".step-") and name.endswith(ending)]
    except FileNotFoundError:
        return []


def measured(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] in MEASURED_EVENTS]


def comparable(lines: list[dict[str, Any]]) -> list[str]:
    """The measured lines as texts, with all their digits, without what may differ."""
    return [json.dumps(repeatable(line), sort_keys=True) for line in measured(lines)]


def final_state(run_dir: Path) -> dict[str, str]:
    """Digests of the final weights, and of every rank's part of the last checkpoint: masters and optimizer state."""
    latest = latest_checkpoint(run_dir)
    files = [] if latest is None else sorted(latest.glob("*.safetensors"))
    found = [run_dir / WEIGHTS, *files]
    return {str(path.relative_to(run_dir)): file_digest(path) for path in found if path.exists()}


def tail(attempt: Attempt) -> str:
    paths = [attempt.run_dir.parent / OUTPUT, *(log_file(attempt.run_dir, rank) for rank in range(1, NUM_RANKS))]
    texts = [f"{path.name}:\n" + path.read_text(errors="replace")[-2000:] for path in paths if path.exists()]
    return "\n".join(texts)
