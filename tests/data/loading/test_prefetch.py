"""Steps made by background processes, real ones: what they make, what they cost, and how they end."""

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from cctrain.data.loading.contexts import ContextRule
from cctrain.data.loading.loader import Loader, RankStep, Share
from cctrain.data.loading.order import Order
from cctrain.data.loading.prefetch import prefetched, step_positions
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import DataError, TrainingError
from tests.data.conftest import prepared, random_counts, write_h5ad
from tests.data.stores import flip_a_bit

GLOBAL_BATCH = 6
SECONDS_OF_AN_ORPHAN = 3.0
PIPE_BYTES = 65_536

# A program as a person may write it: without a guard around its main part, and read from standard input.
PROGRAM = """
import multiprocessing, signal, sys, time
from pathlib import Path
import numpy as np
from cctrain.data.loading.contexts import ContextRule
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.loading.order import Order
from cctrain.data.loading.prefetch import prefetched
from cctrain.data.store.store import open_store

store = open_store(Path({store!r}))
num_genes = len(store.genes.ids)
rule = ContextRule(0, "training", np.full(num_genes, 0.2), store.genes.share, 15)
loader = Loader(store, rule, Share(), 10_000)
steps = prefetched(loader, Order(store.num_train, store.digest, 0, 8, 2), 6, 0, 100_000, workers={workers})
next(steps)
"""
SHOW_STEPS = """
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: print("signal", number, flush=True))
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
for step in steps:
    print("step", step.position, flush=True)
    time.sleep(0.01)
"""


def loader_of(store: TokenStore, share: Share | None = None, limit: int = 10_000) -> Loader:
    rule = ContextRule(0, "training", np.full(len(store.genes.ids), 0.2), store.genes.share, max_tokens=3_000)
    return Loader(store, rule, share or Share(), limit)


def order_of(store: TokenStore) -> Order:
    return Order(store.num_train, store.digest, 0, 8, 2)


def steps_of(
    store: TokenStore, workers: int, num_steps: int = 100_000, position: int = 0, **loader
) -> Generator[RankStep, None, None]:
    return prefetched(loader_of(store, **loader), order_of(store), GLOBAL_BATCH, position, num_steps, workers)


def assert_same(step: RankStep, other: RankStep) -> None:
    assert (step.position, step.num_contexts) == (other.position, other.num_contexts)
    for batch, other_batch in zip(step.batches, other.batches, strict=True):
        for entry in fields(batch):
            ours, theirs = getattr(batch, entry.name), getattr(other_batch, entry.name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs, err_msg=entry.name)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """20 cells of 3,000 genes, so that a step is larger than what a pipe holds."""
    folder = tmp_path_factory.mktemp("wide")
    return prepared(folder / "store", write_h5ad(folder / "cells.h5ad", random_counts(20, 3_000)))


@pytest.fixture
def program(tiny_store: TokenStore) -> Iterator[Callable[[int, str], subprocess.Popen]]:
    """Starts PROGRAM, as a terminal does, with what shall follow it."""
    started = []

    def start(workers: int, then: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdin is not None
        process.stdin.write(PROGRAM.format(store=str(tiny_store.path), workers=workers) + then)
        process.stdin.close()
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


# ---- what they make


def test_a_batch_of_the_order_ends_where_the_position_of_the_next_step_is(tiny_store):
    order = order_of(tiny_store)
    for position in (0, 5, tiny_store.num_train - 1):
        positions = list(islice(step_positions(order, GLOBAL_BATCH, position), 30))
        ends = [start + len(order.batch(start, GLOBAL_BATCH)) for start in positions]
        assert positions == [position, *ends[:-1]]


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_steps_are_the_same_whoever_makes_them_from_any_position_and_over_the_end_of_an_epoch(tiny_store, workers):
    position, num_steps = 15, 2 * tiny_store.num_train // GLOBAL_BATCH
    share = Share(data_rank=1, num_data_ranks=2)
    alone, helped = (
        list(steps_of(tiny_store, count, num_steps, position, share=share, limit=100)) for count in (0, workers)
    )
    assert len(alone) == len(helped) == num_steps
    assert {step.num_contexts for step in alone} > {GLOBAL_BATCH}
    assert {len(step.batches) for step in alone} != {1}
    for step, other in zip(helped, alone, strict=True):
        assert_same(step, other)
    assert multiprocessing.active_children() == []


def test_one_step_needs_no_second_worker(tiny_store):
    with closing(steps_of(tiny_store, workers=3, num_steps=1)) as steps:
        next(steps)
        assert len(multiprocessing.active_children()) <= 1
        with pytest.raises(StopIteration):
            next(steps)


# ---- how they end


def test_who_stops_early_leaves_no_process_and_does_not_wait_and_no_worker_has_loaded_torch(wide_store):
    with closing(steps_of(wide_store, workers=1)) as steps:
        next(steps)
        [worker] = multiprocessing.active_children()
        loaded = Path(f"/proc/{worker.pid}/maps").read_text()
        assert "numpy" in loaded
        assert "libtorch" not in loaded
        before = time.monotonic()
    assert time.monotonic() - before < 1
    assert multiprocessing.active_children() == []
    assert not is_running(worker.pid)


def test_a_store_that_is_damaged_while_it_is_read_is_the_same_error_as_without_workers(tiny_store, tmp_path):
    store = open_store(Path(shutil.copytree(tiny_store.path, tmp_path / "store")))
    shard = store.path / "cells.zarr" / "X" / "indices" / "c" / "0"
    flip_a_bit(shard, 40)
    said = []
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            next(steps_of(store, workers))
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert f"{shard}: cannot be decoded" in said[0]
    assert multiprocessing.active_children() == []


def test_a_defect_in_a_worker_shows_where_it_is(tiny_store):
    loader = loader_of(tiny_store)
    loader.rule = replace(loader.rule, share=None)
    with pytest.raises(RuntimeError, match=r"(?s)a data worker failed:\nTraceback.*loader\.py"):
        next(prefetched(loader, order_of(tiny_store), GLOBAL_BATCH, 0, 10, workers=1))


def test_a_worker_that_is_killed_even_amid_sending_a_step_is_one_error_that_says_what_to_do(wide_store):
    with closing(steps_of(wide_store, workers=1)) as steps:
        assert len(pickle.dumps(next(steps))) > 2 * PIPE_BYTES
        [worker] = multiprocessing.active_children()
        # It waits in the middle of the first step that was not asked for yet.
        assert within(10, lambda: psutil.Process(worker.pid).status() == psutil.STATUS_SLEEPING)
        worker.kill()
        with pytest.raises(TrainingError, match=r"worker 0 .*SIGKILL, as when memory runs out.*lower data\.workers"):
            list(steps)
    assert multiprocessing.active_children() == []


def test_workers_ignore_requests_to_stop_and_die_with_their_parent(program):
    process = program(2, SHOW_STEPS)
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.killpg(process.pid, number)  # a terminal and Slurm send it to all of them
        while process.stdout.readline() != f"signal {number}\n":
            assert process.poll() is None
    # More steps than there were ready when the signals came.
    assert all(process.stdout.readline().startswith("step") for _ in range(20))
    assert all(map(is_running, workers))
    process.kill()
    assert within(SECONDS_OF_AN_ORPHAN, lambda: not any(map(is_running, workers)))


def test_a_program_that_ends_without_closing_the_steps_does_not_hang(program):
    assert program(1, "").wait(30) == 0
