"""Start the ranks of a run on this machine, and end them together.

Each rank is a process of `python -m cctrain train` that finds itself in its environment. The first one talks to
the terminal; what the others say is in RUN/logs. When one dies, all are ended.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SECONDS_TO_LEAVE = 20.0


def run_ranks(arguments: list[str], num_ranks: int, run_dir: Path) -> int:
    """Run `python -m cctrain ARGUMENTS` in `num_ranks` processes; returns the exit code of the first that failed."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks: list[subprocess.Popen] = []
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
        # The terminal has sent Ctrl-C to the ranks as well.
        _end(ranks)
        return 130
    finally:
        _end(ranks)


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


def _wait(ranks: list[subprocess.Popen], logs: Path) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            time.sleep(1.0)  # a common failure reaches all ranks: let the first one speak
            codes = [process.poll() for process in ranks]
            rank, code = (0, codes[0]) if codes[0] else failed[0]
            if rank:
                tail = (logs / f"rank-{rank:04d}.log").read_text(errors="replace").splitlines()[-15:]
                print(
                    f"rank {rank} ended with {_describe(code)}; its last lines:",
                    *tail,
                    sep="\n  ",
                    file=sys.stderr,
                )
            return code if code and code > 0 else 5
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _describe(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _end(ranks: list[subprocess.Popen]) -> None:
    alive = [process for process in ranks if process.poll() is None]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_LEAVE
    for process in alive:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
