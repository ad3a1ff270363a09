"""Work as a list of tasks, done by some processes: the result does not depend on how many, nor on who did what.

A task is a pure function of its arguments that leaves one file behind, under a temporary name until it is
complete; a task whose file exists is not run again, which is all that continuing after a kill needs. Tasks of
one list do not depend on each other. Worker processes are spawned, never forked: forking where HDF5 or
BLAS has started threads may hang. With one worker, or one task, everything runs in this process.

A worker ends with this process, however it dies, and a worker that dies is one error, not a wait for ever.
"""

import atexit
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from cctrain.data.progress import bars
from cctrain.errors import CctrainError, DataError

MAX_DEFAULT_WORKERS = 4
_SECONDS_BETWEEN_NEWS = 0.2
_SECONDS_TO_LEAVE = 5.0

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """`run(*arguments, advance)`, a function of a module, called in whichever process; it makes `produces`."""

    title: str  # of the bar on which it advances
    unit: str  # of that bar
    amount: int  # units that this task advances
    produces: Path
    run: Callable[..., None]
    arguments: tuple[Any, ...]


class WorkerError(DataError):
    """A worker process ended in the middle of a task. What was done is good."""


def default_workers() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_DEFAULT_WORKERS)


class Workers:
    """Up to `num_workers` processes for the task lists of one `prepare`; started when a list has two tasks."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # an idle worker reads the end of the pipe and leaves
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(_SECONDS_TO_LEAVE)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []

    def run(self, tasks: list[Task], keep_going: bool = False) -> list[CctrainError | None]:
        """Do what is not done yet; per task its error, which is raised at once unless `keep_going`."""
        waiting = deque(i for i, task in enumerate(tasks) if not task.produces.exists())
        totals: dict[str, tuple[str, int]] = {}
        for i in waiting:
            unit, amount = totals.get(tasks[i].title, (tasks[i].unit, 0))
            totals[tasks[i].title] = (unit, amount + tasks[i].amount)
        errors: list[CctrainError | None] = [None] * len(tasks)
        if not waiting:
            return errors
        with bars(totals) as advance:
            if self.num_workers == 1 or len(waiting) == 1:
                for i in waiting:
                    errors[i] = _run_here(tasks[i], advance, keep_going)
            else:
                self._start(min(self.num_workers, len(waiting)))
                self._deal(tasks, waiting, errors, advance, keep_going)
        return errors

    def _start(self, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        # The terminal sends Ctrl-C to all; the first process decides. Workers inherit the mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(num_workers - len(self._processes)):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _deal(
        self,
        tasks: list[Task],
        waiting: deque[int],
        errors: list[CctrainError | None],
        advance: Callable[[str, int], None],
        keep_going: bool,
    ) -> None:
        running: dict[Connection, int] = {}
        for pipe in self._pipes:
            self._give(pipe, tasks, waiting, running)
        while running:
            heard = set(wait(list(running)))
            for pipe in [pipe for pipe in running if pipe in heard]:
                task = tasks[running[pipe]]
                kind, content = self._hear(pipe, task)
                if kind == "advance":
                    advance(task.title, content)
                    continue
                if kind == "error":
                    if not (keep_going and isinstance(content, DataError)):
                        raise content
                    errors[running[pipe]] = content
                del running[pipe]
                self._give(pipe, tasks, waiting, running)

    def _give(self, pipe: Connection, tasks: list[Task], waiting: deque[int], running: dict[Connection, int]) -> None:
        if waiting:
            running[pipe] = waiting.popleft()
            task = tasks[running[pipe]]
            try:
                pipe.send((task.run, task.arguments))
            except (BrokenPipeError, ConnectionResetError):
                raise self._died(pipe, task) from None

    def _hear(self, pipe: Connection, task: Task) -> tuple[str, Any]:
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._died(pipe, task) from None

    def _died(self, pipe: Connection, task: Task) -> WorkerError:
        process = self._processes[self._pipes.index(pipe)]
        process.join(_SECONDS_TO_LEAVE)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        why = (
            " (9 is what the system sends when memory runs out: use fewer --workers)" if code == -signal.SIGKILL else ""
        )
        return WorkerError(
            f"A worker process {how}{why} while {task.title}. Nothing is lost: the same command continues."
        )


def _run_here(task: Task, advance: Callable[[str, int], None], keep_going: bool) -> CctrainError | None:
    try:
        task.run(*task.arguments, advance=lambda amount: advance(task.title, amount))
    except DataError as error:
        if not keep_going:
            raise
        return error
    return None


def _work(pipe: Connection) -> None:
    """The life of a worker: tasks in, errors and progress out, until the pipe ends."""
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):  # nobody listens any more: an error elsewhere has ended the work
        while True:
            run, arguments = pipe.recv()
            news = _News(pipe)
            try:
                run(*arguments, advance=news.advance)
                news.flush()
                pipe.send(("done", None))
            except (CctrainError, OSError) as error:
                pipe.send(("error", error))
            except Exception:
                pipe.send(("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))
    # Leaving already, which is not to begin anew. With SIG_IGN, Python would print a traceback about a signal that it
    # has received and not handled yet.
    signal.signal(signal.SIGTERM, lambda *_: None)


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once, but give back what libraries hold, such as semaphores, of which Python warns otherwise. Not by an
    exception: Python drops it, with a traceback, where the signal meets a callback of a weak reference."""
    atexit._run_exitfuncs()
    os._exit(1)


class _News:
    """Progress, sent five times a second and not for every block."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._amount = 0
        self._sent = time.monotonic()

    def advance(self, amount: int) -> None:
        self._amount += amount
        if time.monotonic() - self._sent > _SECONDS_BETWEEN_NEWS:
            self.flush()

    def flush(self) -> None:
        if self._amount:
            self._pipe.send(("advance", self._amount))
        self._amount = 0
        self._sent = time.monotonic()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
