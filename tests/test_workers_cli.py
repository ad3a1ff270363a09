"""Trainings whose batches are made by background processes, through the command line: nothing else changes."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cctrain.data.store.store import TokenStore
from cctrain.tracking.journal import history, read_journal
from cctrain.tracking.restarts import repeatable
from cctrain.training.checkpoint_files import latest_checkpoint, step_of
from cctrain.training.guards import read_outcome
from tests.data.conftest import prepared, random_counts, write_h5ad
from tests.data.stores import flip_a_bit
from tests.trainer import Started, Trainer, ended, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.processes]

STEPS = 400
CONFIG = f"""
data: {{global_batch: 8, block: 4}}
model: {{width: 16, depth: 1, heads: 2, latents: 4}}
training: {{steps: {STEPS}, warmup: 2, learning_rate: 2e-3, precision: fp32}}
evaluation: {{every: 0}}
checkpoint: {{every: 0}}
"""


@pytest.fixture(scope="module")
def trainer(tiny_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("workers")
    (folder / "small.yaml").write_text(CONFIG)
    with Trainer(folder / "small.yaml", tiny_store, folder) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def alone(trainer: Trainer) -> Path:
    run_dir = trainer.folder / "alone"
    trainer.run(run_dir, 0, "data.workers=0")
    return run_dir


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The history without what a clock says, bit for bit."""
    lines = [line for line in history(read_journal(run_dir)) if line["event"] == "step"]
    return [repeatable(line) for line in lines]


def data_workers(process: Started) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if any("spawn_main" in word for word in child.cmdline())]


def disturbed(trainer: Trainer, run_dir: Path, code: int, deed: Callable[[Started], None]) -> str:
    """A training with two workers, in whose midst something is done; returns what it said."""
    process = trainer.start(run_dir, "data.workers=2")
    before = len(read_journal(run_dir))
    wait_until(lambda: sum(line["event"] == "step" for line in read_journal(run_dir)[before:]) >= 3, process)
    workers = data_workers(process)
    assert len(workers) == 2
    deed(process)
    said = ended(process, code)
    assert not any(worker.is_running() for worker in workers)
    return said


def to_all(number: int) -> Callable[[Started], None]:
    return lambda process: os.killpg(process.pid, number)


def test_asked_to_stop_it_saves_and_goes_on_to_the_history_of_a_run_without_workers(trainer, alone):
    run_dir = trainer.folder / "helped"
    saved = []
    for number, code, outcome in ((signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 0, "requeue")):
        said = disturbed(trainer, run_dir, code, to_all(number))
        assert "saving a checkpoint at the end of this step" in said
        assert read_outcome(run_dir) == outcome
        saved.append(step_of(latest_checkpoint(run_dir)))
        assert saved[-1] == steps_of(run_dir)[-1]["step"]
    assert saved[0] < saved[1] < STEPS
    trainer.run(run_dir, 0, "data.workers=1")
    assert steps_of(run_dir) == steps_of(alone)
    assert (run_dir / "weights.safetensors").read_bytes() == (alone / "weights.safetensors").read_bytes()


def test_a_lost_worker_ends_the_run_with_one_message(trainer):
    said = disturbed(trainer, trainer.folder / "lost", 5, lambda process: data_workers(process)[1].kill())
    assert re.search(r"the data worker \d \(process \d+\) was lost: it ended with SIGKILL", said)
    [stop] = [line for line in read_journal(trainer.folder / "lost") if line["event"] == "stop"]
    assert (stop["status"], read_outcome(trainer.folder / "lost")) == ("failed", "failed")


def test_a_damaged_shard_ends_the_run_as_it_does_without_workers(trainer, tmp_path):
    store = prepared(tmp_path / "store", write_h5ad(tmp_path / "cells.h5ad", random_counts(300, 800)))
    shard = store.path / "cells.zarr" / "X" / "indices" / "c" / "0"
    assert shard.stat().st_size > 2**16 + 100  # so its first bytes are looked at when they are read, not at opening
    flip_a_bit(shard, 40)
    said = [
        trainer.run(tmp_path / f"run-{workers}", 3, f"data.store={store.path}", f"data.workers={workers}")
        for workers in (0, 2)
    ]
    errors = [[line for line in text.splitlines() if "the store is damaged" in line] for text in said]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 1, said
    assert str(shard) in errors[0][0]
