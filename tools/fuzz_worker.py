"""A process in which `fuzz` runs the real commands one after the other, each under a limit of time and of memory.

Starting Python and importing cctrain would take longer than the command. What a command prints goes to files, at the
level of the file descriptors, so that libraries written in C are heard too. A process that hangs or dies is replaced.
"""

import hashlib
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

SECONDS = 60.0  # of a command that takes less than one
BYTES = 3 * 2**30  # of address space, beyond what Python and the libraries take once they are loaded
PATIENCE = 5.0  # seconds in which a process without work ends by itself
COMMANDS_PER_PROCESS = 100  # so that what one leaves behind does not add up


@dataclass(frozen=True)
class Ran:
    """`code` is the exit code, or minus the number of the signal that ended the process, or None after a hang."""

    code: int | None
    output: str
    errors: str
    seconds: float


class Worker:
    """Runs commands in `folder`. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: Any = None
        self._connection: Connection | None = None
        self._commands = 0
        self._is_busy = False  # it does not look at the connection, and would not notice its end

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def run(self, *arguments: str, seconds: float = SECONDS) -> Ran:
        """A command with its arguments, as on the command line after `cctrain`; or one of two that users do not have:
        `read STORE` as training does, and `compare SOURCE STORE` by other code, which prints what is wrong."""
        if self._connection is None or self._commands >= COMMANDS_PER_PROCESS:
            self._end()
            self._start()
        assert self._connection is not None
        started = time.monotonic()
        self._commands += 1
        self._connection.send(arguments)
        self._is_busy = True
        code = self._answer(seconds)
        output, errors = ((self.folder / name).read_text(errors="replace") for name in ("output", "errors"))
        return Ran(code, output, errors, time.monotonic() - started)

    def _answer(self, seconds: float) -> int | None:
        assert self._connection is not None
        try:
            if self._connection.poll(seconds):
                code = int(self._connection.recv())
                self._is_busy = False
                return code
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = int(self._process.exitcode)
            self._end()
            return code
        self._end()
        return None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.folder), daemon=True)
        self._process.start()
        theirs.close()
        self._commands, self._is_busy = 0, False
        if not self._connection.poll(10 * SECONDS) or self._connection.recv() != "ready":
            raise RuntimeError("the process that runs the commands does not start")

    def _end(self) -> None:
        if self._connection is None:
            return
        self._connection.close()
        self._process.join(0 if self._is_busy else PATIENCE)
        self._process.kill()
        self._process.join()
        self._connection = None


def _serve(connection: Connection, folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the fuzzer, which ends this process
    os.chdir(folder)
    import cctrain.apply.inspect
    import cctrain.data.prepare.prepare  # noqa: F401

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, mapped + BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        connection.send(_captured(arguments))


def _captured(arguments: tuple[str, ...]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        for descriptor, name in ((1, "output"), (2, "errors")):
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, descriptor)
            os.close(file)
        return _exit_code(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


def _exit_code(arguments: tuple[str, ...]) -> int:
    """What the process `cctrain ARGUMENTS` would end with, and print."""
    from cctrain.cli import main
    from cctrain.errors import CctrainError

    try:
        if arguments[0] == "read":
            print(read_as_training(Path(arguments[1])))
        elif arguments[0] == "compare":
            from tools.fuzz_oracle import compare

            print(compare(Path(arguments[1]), Path(arguments[2])) or "", end="")
        else:
            sys.argv = ["cctrain", *arguments]
            main()
    except CctrainError as error:
        print(f"cctrain: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def read_as_training(path: Path) -> str:
    """Two lines: SHA-256 of what the content digest covers, and of all else that training reads of a store.

    Every cell is made into a context, as training makes it.
    """
    from cctrain.config import ObjectiveConfig
    from cctrain.data.loading.contexts import ContextRule, build_context, target_probability
    from cctrain.data.store.store import open_store

    store = open_store(path)
    genes, groups = store.genes, store.groups
    rule = ContextRule(0, "training", target_probability(genes, ObjectiveConfig()), genes.share, len(genes.ids))
    content = _digest(store.num_train, genes.ids, store.measured, store.source_of_cell, store.num_tokens)
    others = _digest(store.manifest["tokens_per_cell"], *(getattr(genes, name) for name in _STATISTICS))
    if groups is not None:
        content.update(_digest(groups.num_train, groups.starts).digest())
        others.update(_digest(groups.names).digest())
    for first in range(0, store.num_cells, 64):
        rows = np.arange(first, min(first + 64, store.num_cells))
        cells = store.cells(rows)
        content.update(_digest(cells.genes, cells.counts).digest())
        for row, start, stop in zip(rows.tolist(), cells.offsets[:-1], cells.offsets[1:], strict=True):
            of_cell = (cells.genes[start:stop], cells.counts[start:stop])
            context = build_context(rule, row, row, *of_cell, store.measured[store.source_of_cell[row]])
            others.update(_digest(context.genes, context.counts, context.targets, context.target_counts).digest())
    return f"{content.hexdigest()}\n{others.hexdigest()}"


_STATISTICS = ("names", "share", "detection_rate", "theta", "loadings")


def _digest(*values: Any) -> Any:
    """SHA-256 of arrays, by their values and not their types, and of what can be shown."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = value.astype(np.float64 if value.dtype.kind == "f" else np.int64)
            found.update(f"{value.shape}".encode() + value.tobytes())
        else:
            found.update(repr(value.tolist() if isinstance(value, np.ndarray) else value).encode())
    return found
