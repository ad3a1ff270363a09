"""Start the ranks of a run on this machine, and end them together.

Each rank is a process of `python -m cctrain train` that finds itself in its environment. The first one talks to
the terminal; what the others say is in RUN/logs. Signals reach the ranks through the launcher alone, once each:

- SIGTERM, SIGUSR1 and the first Ctrl-C are passed on; the ranks save and leave, however long that takes.
- A second SIGTERM or Ctrl-C ends them without a save.
- Ctrl-Z stops the ranks with the launcher, and they go on with it.
- When a rank dies, the others wait for it in vain: they get a moment to say their word, then they are killed.
- When the launcher is killed, the kernel kills the ranks.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cctrain.run_directory import log_file
from cctrain.training.guards import SECONDS_OF_ONE_REQUEST

SECONDS_TO_LEAVE = 2.0
SECONDS_TO_FOLLOW = 20.0
SECONDS_FOR_STACKS = 0.5
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGTSTP)
INTERRUPTED = 130
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_ranks(arguments: list[str], num_ranks: int, run_dir: Path) -> int:
    """Run `python -m cctrain ARGUMENTS` in `num_ranks` processes.

    Returns their common exit code, that of the rank that failed (5 if a signal ended it), or 128 + the number of
    the signal that ended them before they could save. Call it from the main thread.
    """
    logs = [log_file(run_dir, rank) for rank in range(num_ranks)]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    old_lengths = [_length(log) for log in logs]
    port = free_port()
    ranks: list[subprocess.Popen] = []
    with _noted_signals() as signals:
        try:
            for rank, log in enumerate(logs):
                ranks.append(_start(arguments, rank_environment(rank, num_ranks, port), log))
            return _wait(ranks, signals, logs, old_lengths)
        finally:
            _kill(ranks)


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    # Left alone, every rank would take all cores.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    return environment


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start(arguments: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    # The first rank has the terminal, and writes its log beside it.
    output = None if environment["RANK"] == "0" else open(log, "ab")  # noqa: SIM115
    launcher = os.getpid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it

    def end_with_launcher() -> None:
        # Between fork and exec, where little is allowed: two system calls, looked up before.
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != launcher:
                os._exit(1)

    try:
        return subprocess.Popen(
            [sys.executable, "-m", "cctrain", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # A session of its own: a terminal's Ctrl-C reaches the launcher alone, as `kill -INT` does.
            start_new_session=True,
            preexec_fn=end_with_launcher,
        )
    finally:
        if output is not None:
            output.close()


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Signals are noted, in order, instead of ending this process."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen], signals: list[int], logs: list[Path], old_lengths: list[int]) -> int:
    passed_on: dict[int, float] = {}
    left_since = None
    while True:
        while signals:
            number, now = signals.pop(0), time.monotonic()
            if number == signal.SIGTSTP:
                _pause(ranks)
            elif number not in passed_on:
                passed_on[number] = now
                _send(ranks, number)
            elif number != signal.SIGUSR1 and now - passed_on[number] >= SECONDS_OF_ONE_REQUEST:
                _send(ranks, number)
                _let_leave(ranks)
                return 128 + number
        codes = [process.poll() for process in ranks]
        if None not in codes and set(codes) <= {0, INTERRUPTED}:
            return max(code for code in codes if code is not None)
        if INTERRUPTED in codes:
            # They leave together, unless Ctrl-C met this one before it had joined the others.
            left_since = left_since or time.monotonic()
            if time.monotonic() - left_since > SECONDS_TO_FOLLOW:
                return INTERRUPTED
        if any(code not in (None, 0, INTERRUPTED) for code in codes):
            _let_leave(ranks)  # a common failure reaches all ranks, and each shall say its word
            return _report(codes, [process.poll() for process in ranks], set(passed_on), logs, old_lengths)
        time.sleep(0.1)


def _pause(ranks: list[subprocess.Popen]) -> None:
    """Ctrl-Z stops the ranks as well; they go on with the launcher."""
    _send(ranks, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    _send(ranks, signal.SIGCONT)


def _report(
    first: list[int | None], then: list[int | None], passed_on: set[int], logs: list[Path], old_lengths: list[int]
) -> int:
    """Show which rank failed, with what its log got from this attempt; returns the exit code."""
    rank, code = _culprit(first, then)
    if -code in passed_on:
        return 128 - code  # our own signal came before the rank was ready for it
    if rank or code < 0:
        log, tail = logs[rank], []
        if log.exists():
            tail = log.read_bytes()[old_lengths[rank] :].decode(errors="replace").splitlines()[-15:]
        heading = f"rank {rank} ended with {_describe(code)}"
        print(f"{heading}; the last lines of {log}:" if tail else heading, *tail, sep="\n  ", file=sys.stderr)
    return code if code > 0 else 5


def _culprit(first: list[int | None], then: list[int | None]) -> tuple[int, int]:
    """Which rank to show, with its exit code, from what had ended at first and a moment later.

    An error of one rank tears the connections of the others, which end with a traceback (code 1) or an abort: a
    signal, or else a code of cctrain's own, says more; then whoever ended before the others.
    """
    failed = []
    for rank, code in enumerate(then):
        if code in (None, 0, INTERRUPTED):
            continue
        is_consequence = code in (1, -signal.SIGABRT)
        failed.append((is_consequence, code > 0, is_consequence and not first[rank], rank, code))
    *_, rank, code = min(failed)
    return rank, code


def _describe(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _send(ranks: list[subprocess.Popen], number: int) -> None:
    for process in ranks:
        process.send_signal(number)  # nothing, if it has ended


def _let_leave(ranks: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + SECONDS_TO_LEAVE
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(0.05)


def _kill(ranks: list[subprocess.Popen]) -> None:
    alive = [process for process in ranks if process.poll() is None]
    if alive:
        _send(alive, signal.SIGUSR2)  # on which a rank writes the stacks of its threads
        time.sleep(SECONDS_FOR_STACKS)
    for process in alive:
        process.kill()
        process.wait()


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def default_ranks() -> int:
    """One for each GPU of this machine, or one."""
    from cctrain.parallel.mesh import find_device_kind

    if find_device_kind() == "cpu":
        return 1
    import torch

    return torch.cuda.device_count()
