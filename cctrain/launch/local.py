"""Start the ranks of a run on this machine, and end them together.

Each rank is a process of `python -m cctrain train` that finds itself in its environment. The first one talks to
the terminal; what the others say is in RUN/logs. When one dies, all are ended; so they are on SIGTERM.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

SECONDS_TO_LEAVE = 20.0


def run_ranks(arguments: list[str], num_ranks: int, run_dir: Path) -> int:
    """Run `python -m cctrain ARGUMENTS` in `num_ranks` processes.

    Returns 0, the exit code of the rank that failed (5 if a signal ended it), or 130 after Ctrl-C. Call it from
    the main thread: SIGTERM ends the ranks too.
    """
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks: list[subprocess.Popen] = []
    before = signal.signal(signal.SIGTERM, _leave_on_signal)
    try:
        for rank in range(num_ranks):
            output = None if rank == 0 else open(logs / f"rank-{rank:04d}.log", "ab")  # noqa: SIM115
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "cctrain", *arguments],
                    env=rank_environment(rank, num_ranks, port),
                    stdout=output,
                    stderr=output,
                )
            )
            if output is not None:
                output.close()
        return _wait(ranks, logs)
    except KeyboardInterrupt:
        # The terminal has sent Ctrl-C to the ranks as well: let them close the journal. A second one ends them.
        _let_leave(ranks)
        return 130
    finally:
        _end(ranks)
        signal.signal(signal.SIGTERM, before)


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


def _leave_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _wait(ranks: list[subprocess.Popen], logs: Path) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes):
            time.sleep(1.0)  # a common failure reaches all ranks, and each shall say its word
            rank, code = _culprit(codes, [process.poll() for process in ranks])
            if rank:
                tail = (logs / f"rank-{rank:04d}.log").read_text(errors="replace").splitlines()[-15:]
                heading = f"rank {rank} ended with {_describe(code)}; the last lines of its log in {logs}:"
                print(heading, *tail, sep="\n  ", file=sys.stderr)
            return code if code > 0 else 5
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _culprit(first: list[int | None], then: list[int | None]) -> tuple[int, int]:
    """Which rank to show, with its exit code, from what had ended at first and a moment later.

    An error of one rank tears the connections of the others, which end with a traceback (code 1): a code of
    cctrain's own, or a signal, says more; then whoever ended before the others.
    """
    failed = [(code == 1, code == 1 and not first[rank], rank, code) for rank, code in enumerate(then) if code]
    *_, rank, code = min(failed)
    return rank, code


def _describe(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _let_leave(ranks: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + SECONDS_TO_LEAVE
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(0.1)


def _end(ranks: list[subprocess.Popen]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    _let_leave(ranks)
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()
