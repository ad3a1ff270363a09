"""Processes forked from one that has imported what a training needs, and has not trained: imports take it seconds."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["cctrain.training.train", "deepspeed"])


class ForkedCommand:
    """`cctrain ARGUMENTS` in a new session, as far as tests need a `Popen`; what it says is in files, `said`.out and
    `said`.err. `first` is Python that it runs before all."""

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: Path, said: Path, first: str = ""):
        self._said = [Path(f"{said}.{end}") for end in ("out", "err")]
        self._process = CONTEXT.Process(target=_run, args=(arguments, environment, folder, self._said, first))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("cctrain", timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (path.read_text() for path in self._said)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _run(arguments: list[str], environment: dict[str, str], folder: Path, said: list[Path], first: str) -> None:
    os.setsid()
    os.chdir(folder)
    begin(environment, *said)
    sys.argv = ["cctrain", *arguments]
    exec(first, {})
    runpy.run_module("cctrain", run_name="__main__", alter_sys=True)


def begin(environment: dict[str, str], out: Path, err: Path) -> None:
    """What a process that is not forked has from its start: one thread, this environment, its outputs."""
    for number, path in ((1, out), (2, err)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
