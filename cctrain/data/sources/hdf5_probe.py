"""Lets a process that may die look at an HDF5 file first.

On some damaged files the HDF5 library never returns, or takes its process with it (a zeroed block in the heap of
strings is enough for HDF5 2.0.0 to loop for ever), and nothing inside of a process can prevent that. So a child
goes through what the readers will go through: groups, attributes, indices of chunks, all strings, and the ends of
other arrays. What it raises does not matter, the readers will say it better; whether it comes back does. It is
given up by the processor time that it spends without progress, so a slow disk is no reason.

This file is also the child's program: it imports little, and nothing of cctrain.
"""

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import psutil

CPU_SECONDS = 3.0  # without progress; the slowest step, some 100,000 strings, takes under one
_IDLE_SECONDS = 10.0
_STRINGS_PER_READ = 2**17
_NOT_READ = ("uns", "obsm", "obsp", "varm", "varp")
_DONE = b"done"

_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None


def why_unreadable(path: Path) -> str | None:
    """What happens to a process that reads the file ("HDF5 hangs at obs/_index"), or None if it may be read."""
    global _child
    with _lock:
        while True:
            if _child is None or _child.poll() is not None:
                command = [sys.executable, "-P", __file__]  # -P: no module beside this one is imported
                _child = subprocess.Popen(
                    command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
            with contextlib.suppress(BrokenPipeError):  # it was idle for long and just ended
                return _ask(_child, path)


def _ask(child: subprocess.Popen[bytes], path: Path) -> str | None:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(str(path.absolute())).encode() + b"\n")
    place, spent, unfinished = "its start", _cpu_seconds(child), b""
    while True:
        if select.select([child.stdout], [], [], 0.5)[0]:
            read = os.read(child.stdout.fileno(), 2**16)
            if not read:
                if child.wait() == 0 and place == "its start":
                    raise BrokenPipeError
                return f"HDF5 crashes at {place}"
            *lines, unfinished = (unfinished + read).split(b"\n")
            if lines and lines[-1] == _DONE:
                return None
            place, spent = json.loads(lines[-1]) if lines else place, _cpu_seconds(child)
        elif _cpu_seconds(child) - spent > CPU_SECONDS:
            child.kill()
            child.wait()
            return f"HDF5 hangs at {place}"


def _cpu_seconds(child: subprocess.Popen[bytes]) -> float:
    try:
        times = psutil.Process(child.pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def _serve() -> None:
    """The child: a path a line comes in; the key that is looked at next goes out, and at last `_DONE`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while select.select([sys.stdin.buffer], [], [], _IDLE_SECONDS)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            return
        path = json.loads(line)
        with contextlib.suppress(Exception), h5py.File(path, "r") as file:
            _look_at(file, "", os.path.getsize(path), set())
        _say(_DONE)


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _look_at(node: h5py.Group | h5py.Dataset, key: str, file_size: int, seen: set[int]) -> None:
    """Depth first; an object that two links lead to is looked at once."""
    address = h5py.h5o.get_info(node.id).addr
    if address in seen:
        return
    seen.add(address)
    _say(json.dumps(key or "the root").encode())
    with contextlib.suppress(Exception):
        for name in node.attrs:
            with contextlib.suppress(Exception):
                node.attrs[name]
    if isinstance(node, h5py.Dataset):
        _look_at_values(node, key, file_size)
    elif key not in _NOT_READ:
        for name in node:
            if node.id.links.get_info(name.encode()).type == h5py.h5l.TYPE_HARD:
                with contextlib.suppress(Exception):
                    _look_at(node[name], f"{key}/{name}".strip("/"), file_size, seen)


def _look_at_values(array: h5py.Dataset, key: str, file_size: int) -> None:
    with contextlib.suppress(Exception):
        if array.chunks:
            array.id.get_num_chunks()
        if array.is_virtual or array.external or not array.shape:
            return
        num_rows, row = array.shape[0], array.size // max(1, array.shape[0])
        if array.dtype.kind == "O" and array.size <= file_size:
            step = max(1, _STRINGS_PER_READ // max(1, row))
            for start in range(0, num_rows, step):
                _say(json.dumps(key).encode())
                array[start : start + step]
        elif row * array.dtype.itemsize <= 2**20:
            array[:1], array[-1:]


if __name__ == "__main__":
    _serve()
