"""Trainings for tests that disturb them: small, and in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from cctrain.data.store.store import TokenStore
from tests.forked import ForkedCommand

REPOSITORY = Path(__file__).parents[1]
Started = subprocess.Popen | ForkedCommand

CELL_YAML = REPOSITORY / "configs" / "cell.yaml"
# What makes a training of seconds of it.
SMALL = (
    "model.width=16",
    "model.depth=1",
    "model.heads=2",
    "model.latents=4",
    "data.global_batch=8",
    "training.steps=4",
    "training.warmup=2",
    "training.precision=fp32",
    "evaluation.every=2",
)

# What disturbances have in common.
HEAD = """
import math, os, time
from pathlib import Path
from cctrain.training import checkpoint, loop
rank, train_step, loss = int(os.environ.get("RANK", "0")), loop.train_step, loop.negative_log_likelihood

def before_step(deed):
    def step(engine, config, mesh, rank_step, number, requests):
        loop.negative_log_likelihood = loss
        deed(number, rank_step)
        return train_step(engine, config, mesh, rank_step, number, requests)
    loop.train_step = step

def poison_count(rank_step):
    rank_step.batches[0].target_counts[0] = math.nan

def poison_gradient():
    def finite_loss(counts, log_mu, log_theta):
        if log_mu.requires_grad:
            log_mu.register_hook(lambda gradient: gradient * math.nan)
        return loss(counts, log_mu, log_theta)
    loop.negative_log_likelihood = finite_loss
"""
# The launcher of several ranks does not train, and needs none of it.
IN_RANKS_ONLY = 'import sys\nif not any(word.startswith("--ranks") for word in sys.orig_argv):\n'


@dataclass(frozen=True)
class Trainer:
    """Starts `cctrain train` for runs that differ in nothing but their folder, unless arguments say so.

    Left, it kills what is still there of all that it has started.
    """

    config: Path
    store: TokenStore
    folder: Path  # for what disturbs them
    started: list[Started] = field(default_factory=list)

    def start(self, run_dir: Path, *arguments: str, config: Path | None = None, disturbance: str = "") -> Started:
        """In a process group of its own, as a terminal does; as under Slurm, where the journal alone is written.

        `config` says all by itself. A disturbance is a few lines that every rank runs as it starts, after HEAD. One
        rank is forked; several are started by their launcher.
        """
        ours = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"SLURM_JOB_ID": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        given = [str(self.config), f"data.store={self.store.path}", f"run.dir={run_dir}"]
        command = ["train", *([str(config)] if config else given), *arguments]
        place, script = self.folder / f"start-{len(self.started)}", HEAD + disturbance if disturbance else ""
        several = any(argument.startswith("--ranks") for argument in arguments)
        if several:
            process: Started = self._launch(command, environment, place, script)
        else:
            process = ForkedCommand(command, environment, REPOSITORY, place, script)
        self.started.append(process)
        return process

    def _launch(self, command: list[str], environment: dict[str, str], place: Path, script: str) -> subprocess.Popen:
        if script:
            place.mkdir()
            lines = "\n".join(f"    {line}" for line in script.splitlines())
            (place / "sitecustomize.py").write_text(f"{IN_RANKS_ONLY}{lines}\n")
            environment["PYTHONPATH"] = os.pathsep.join([str(place), environment.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "cctrain", *command],
            env=environment,
            cwd=REPOSITORY,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, run_dir: Path, code: int, *arguments: str, disturbance: str = "") -> str:
        """To its end, with this exit code; returns what it said on standard error, which is never a traceback."""
        return ended(self.start(run_dir, *arguments, disturbance=disturbance), code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ended(process: Started, code: int, timeout: float = 240) -> str:
    said = process.communicate(timeout=timeout)[1]
    assert process.returncode == code, said
    assert "Traceback" not in said, said
    return said


def wait_until(holds: Callable[[], bool], process: Started) -> None:
    deadline = time.monotonic() + 180
    while not holds():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the training did not get there"
        time.sleep(0.02)


def rank_processes(launcher: Started) -> dict[int, psutil.Process]:
    """By rank."""
    children = psutil.Process(launcher.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}
