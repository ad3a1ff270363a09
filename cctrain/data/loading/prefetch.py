"""Steps of a loader made ahead of time, by background processes: the same steps in the same order, however many.

Worker w of W makes steps w, w + W, w + 2·W, …: a step is a pure function of its position, so workers agree on nothing
and carry nothing. Each opens the store by itself and sends its steps through a pipe of its own, where it waits with
one finished step at most; a thread of this process reads the pipes in turn, STEPS_AHEAD steps ahead of the caller.

Workers know nothing of the model and never import torch. Requests to stop are their parent's business alone; they end
with it, however it ends. What one of them meets (a damaged store, a kill) is raised here, at the step it concerns.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType

import zarr

from cctrain.data.loading.loader import Loader, RankStep
from cctrain.data.loading.order import Order
from cctrain.errors import CctrainError, TrainingError

STEPS_AHEAD = 2
SECONDS_TO_END = 5.0  # for the exit code of a worker whose pipe has closed
# A terminal's Ctrl-C, and what Slurm sends to a whole job step, reach workers as well.
SIGNALS_OF_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def prefetched(
    loader: Loader, order: Order, global_batch: int, position: int, num_steps: int, workers: int
) -> Generator[RankStep, None, None]:
    """The next `num_steps` steps after `position` consumed samples, made by `workers` processes; by this one if 0.

    Close it to end the workers before the last step. Raises what `Loader.step` raises, and TrainingError where a
    worker was lost.
    """
    if workers == 0:
        yield from loader.training_steps(order, global_batch, position, num_steps)
        return
    # Each makes its own, from little: a loader holds some numbers for every cell of the store.
    make_loader = partial(type(loader), loader.store, loader.rule, loader.share, loader.micro_batch_tokens)
    work = (make_loader, order, global_batch, position, num_steps)
    with ThreadPoolExecutor(1, "steps") as reader, _running(min(workers, num_steps), work) as running:
        turns = islice(cycle(running), num_steps)
        coming = deque(reader.submit(_receive, worker) for worker in islice(turns, STEPS_AHEAD))
        while coming:
            step = coming.popleft().result()
            coming.extend(reader.submit(_receive, worker) for worker in islice(turns, 1))
            yield step


def step_positions(order: Order, global_batch: int, position: int) -> Iterator[int]:
    """The position of every step after `position` consumed samples; the last batch of an epoch is short."""
    while True:
        yield position
        position += min(global_batch, order.num_samples - position % order.num_samples)


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    steps: Connection


@contextmanager
def _running(workers: int, work: tuple[Callable[[], Loader], Order, int, int, int]) -> Iterator[list[_Worker]]:
    """Started one after the other, killed at the end: they hold nothing that could be lost."""
    context = multiprocessing.get_context("spawn")  # forking where threads run may hang
    running: list[_Worker] = []

    def end() -> None:
        for worker in running:
            worker.process.kill()
        for worker in running:
            worker.process.join()

    # Else the interpreter, at its exit, would wait for workers that nobody has ended.
    atexit.register(end)
    try:
        with _sheltered_start():
            for index in range(workers):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work, args=(theirs, index, workers, *work), name=f"data worker {index}", daemon=True
                )
                process.start()
                # Now the worker alone holds that end: its death, even amid a step, ends what we read.
                theirs.close()
                running.append(_Worker(process, ours))
        yield running
    finally:
        atexit.unregister(end)
        end()


@contextmanager
def _sheltered_start() -> Iterator[None]:
    """Processes started in here never receive SIGNALS_OF_THE_PARENT, and do not import what this program runs.

    A mask of signals is inherited, so there is no moment at which a worker could be hit. And `__main__` may be a
    script without a guard, or have come from standard input: a worker needs nothing of it.
    """
    main = sys.modules["__main__"]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_PARENT)
    try:
        resource_tracker.ensure_running()  # the start of a process would, and take some of them off the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_PARENT)
        sys.modules["__main__"] = ModuleType("__main__")
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _receive(worker: _Worker) -> RankStep:
    try:
        received = worker.steps.recv()
    except (EOFError, OSError) as error:
        worker.process.join(SECONDS_TO_END)
        raise TrainingError(
            f"the {worker.process.name} (process {worker.process.pid}) was lost: it ended with "
            f"{_described(worker.process.exitcode)}. Give the job more memory, or lower data.workers (0: no "
            "background processes); the same command resumes from the newest checkpoint"
        ) from error
    if isinstance(received, Exception):
        raise received
    return received


def _described(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL, as when memory runs out"
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


# ---- in a worker


def _work(
    steps: Connection,
    index: int,
    workers: int,
    make_loader: Callable[[], Loader],
    order: Order,
    global_batch: int,
    position: int,
    num_steps: int,
) -> None:
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    zarr.config.set({"threading.max_workers": 1})  # each worker would take all cores for its decoding
    with suppress(BrokenPipeError):  # the parent has ended
        try:
            loader = make_loader()
            for start in islice(step_positions(order, global_batch, position), index, num_steps, workers):
                steps.send(loader.step(order, global_batch, start))
        except CctrainError as error:
            steps.send(error)
        except Exception:  # a defect, or no memory: the parent shall show where
            steps.send(RuntimeError(f"a data worker failed:\n{traceback.format_exc()}"))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by another process"
    parent.join()
    os._exit(1)
