"""The memory of a program that runs, and of the processes that it starts, as the kernel counts it."""

import sys
import time
from pathlib import Path

import psutil

from cctrain.process_memory import resident

SECONDS_BETWEEN_SAMPLES, SECONDS_BETWEEN_LINES = 0.1, 30.0
GIB = 2**30


def watch(process: psutil.Popen, files: Path | None = None) -> tuple[dict[int, int], int]:
    """The highest RssAnon in bytes of the process and of those that it started, and the largest sum of what they map of
    the files in a folder, until it has ended. What is mapped is a long list: read when a file has come."""
    started = told = time.monotonic()
    peaks: dict[int, int] = {}
    most, seen = 0, None
    try:
        while process.poll() is None:
            held = {child.pid: resident("RssAnon", child.pid) for child in [process, *process.children(recursive=True)]}
            peaks = {pid: max(peaks.get(pid, 0), held.get(pid, 0)) for pid in peaks | held}
            if files and (changed := files.stat().st_mtime_ns) != seen:
                most, seen = max(most, sum(mapped_bytes(pid, files) for pid in held)), changed
            if time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                sizes = f"{sum(held.values()) / GIB:.2f} GiB in memory, at most {most / GIB:.2f} GiB in files"
                print(f"{told - started:,.0f} s: {sizes}", file=sys.stderr, flush=True)
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return peaks, most


def mapped_bytes(pid: int, folder: Path) -> int:
    """Bytes of the files below `folder` that a process maps; they have lost their names already."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return 0
    ranges = [line.split()[0].split("-") for line in maps if f" {folder.resolve()}/" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)
