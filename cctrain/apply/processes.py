"""A measurement in new processes, one for each rank: memory begins at nothing, and running out of it is a fact to note,
not the end of whoever asked."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from cctrain.errors import CctrainError
from cctrain.launch.local import free_port, rank_environment
from cctrain.parallel.mesh import join_mesh

LEFT_OUT = "left_out"
OUT_OF_MEMORY = "out of memory"
KILLED = "its process was killed: out of memory, most likely"
SECONDS_FOR_THE_OTHERS = 5.0  # to say what happened to them, once one rank has failed; or to end, once all are done
PATIENCE = 7200.0  # seconds that a rank waits for another
_REFUSED, _FAILED = "refused", "failed"
_NO_RESULT = {LEFT_OUT, _REFUSED, _FAILED}


def in_new_processes(
    task: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
    num_ranks: int = 1,
    num_context_ranks: int | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """The first rank's answer, or {left_out: why}; where `num_context_ranks` is given, `task` also gets the mesh, with
    rows of so many, for a model of that precision.

    They end with this process, however it ends. A task's CctrainError is raised here; where it fails otherwise, a
    RuntimeError with its traceback.
    """
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes, answers = [], []
    try:
        for rank in range(num_ranks):
            ours, theirs = context.Pipe(duplex=False)
            environment = rank_environment(rank, num_ranks, port) if num_ranks > 1 else {}
            process = context.Process(
                target=_answer, args=(theirs, environment, num_context_ranks, precision, task, arguments)
            )
            process.start()
            theirs.close()  # so that its end is seen here
            processes.append(process)
            answers.append(ours)
        found = _collect(answers)
        if not any(answer is None or answer.keys() & _NO_RESULT for answer in found):
            for process in processes:  # killed before it has tidied up, it leaves semaphores, and Python warns of them
                process.join(SECONDS_FOR_THE_OTHERS)
        return _judge(found)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(answers: list[Connection]) -> list[dict[str, Any] | None]:
    """By rank; of those that failed, one may be the consequence of another, so all are heard. None: no answer."""
    found: dict[int, dict[str, Any]] = {}
    open_ones = dict(zip(answers, range(len(answers)), strict=True))
    deadline: float | None = None
    while open_ones and (deadline is None or time.monotonic() < deadline):
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        for answer in wait(list(open_ones), timeout):
            assert isinstance(answer, Connection)
            rank = open_ones.pop(answer)
            try:
                found[rank] = answer.recv()
            except EOFError:
                found[rank] = {LEFT_OUT: KILLED}
            if deadline is None and found[rank].keys() & _NO_RESULT:
                deadline = time.monotonic() + SECONDS_FOR_THE_OTHERS
    return [found.get(rank) for rank in range(len(answers))]


def _judge(answers: list[dict[str, Any] | None]) -> dict[str, Any]:
    given = [answer for answer in answers if answer is not None]
    left_out = [answer for answer in given if LEFT_OUT in answer]
    if left_out:
        return min(left_out, key=lambda answer: answer[LEFT_OUT] == KILLED)  # what a rank says itself is surer
    for answer in given:
        if _REFUSED in answer:
            raise answer[_REFUSED]
    for answer in given:
        if _FAILED in answer:
            raise RuntimeError(answer[_FAILED])
    return given[0]


def _answer(
    answer: Connection,
    environment: dict[str, str],
    num_context_ranks: int | None,
    precision: str,
    task: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asked ends this process
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(OSError):  # when memory is short, the kernel shall end this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        result = _run(environment, num_context_ranks, precision, task, arguments)
    except (torch.OutOfMemoryError, MemoryError):
        result = {LEFT_OUT: OUT_OF_MEMORY}
    except CctrainError as error:
        result = {_REFUSED: error}
    except Exception as error:
        says_so = "can't allocate memory" in str(error)  # torch on CPUs has no error of its own for that
        result = {LEFT_OUT: OUT_OF_MEMORY} if says_so else {_FAILED: traceback.format_exc()}
    answer.send(result)


def _run(
    environment: dict[str, str],
    num_context_ranks: int | None,
    precision: str,
    task: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
) -> dict[str, Any]:
    os.environ.update(environment)
    if environment:  # left alone, each of several ranks would take all cores
        torch.set_num_threads(threads_of_a_rank(torch.get_num_threads(), int(environment["WORLD_SIZE"])))
    if num_context_ranks is None:
        return task(*arguments)
    with join_mesh(PATIENCE, num_context_ranks, precision) as mesh:
        return task(*arguments, mesh)


def threads_of_a_rank(threads: int, num_ranks: int) -> int:
    """On a CPU; `threads` are those of one rank alone."""
    return max(1, threads // num_ranks)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
