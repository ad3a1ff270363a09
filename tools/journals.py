"""Journals of any length whose lines a real training wrote, so that what is measured and shown of tracking is what a
training tracks: benchmarks and pictures need more steps and restarts than there is time to train.
"""

import shutil
import subprocess
import sys
import uuid
from itertools import groupby
from pathlib import Path
from typing import Any

from cctrain.run_directory import CONFIG
from cctrain.tracking.journal import Journal, read_journal

Line = dict[str, Any]

_OWN_KEYS = ("event", "attempt", "step", "time")


def train(run_dir: Path, config: Path, *overrides: str) -> list[Line]:
    """The journal of a training in a process of its own, from its first step to its last; what that says, is shown."""
    command = [sys.executable, "-m", "cctrain", "train", str(config), f"run.dir={run_dir}", *overrides]
    subprocess.run(command, check=True)
    return read_journal(run_dir)


def prolong(run_dir: Path, trained: Path, *attempts: tuple[int, int, str | None]) -> None:
    """A run with the configuration of `trained` and these attempts: first step, last step, and the stop line's status
    or None for a crash.

    Its steps repeat those of `trained` in turn, each with all that was written behind it: a step that two attempts
    take is the same in both.
    """
    run_dir.mkdir(parents=True)
    shutil.copyfile(trained / CONFIG, run_dir / CONFIG)
    start, *lines = read_journal(trained)
    measured = [line for line in lines if line["event"] in ("step", "evaluate", "checkpoint")]
    taken = [list(group) for _, group in groupby(measured, key=lambda line: line["step"])]
    identity = {"run": uuid.uuid5(uuid.NAMESPACE_OID, str(run_dir)).hex}
    for first, last, status in attempts:
        journal = Journal(run_dir)
        journal.write("start", first - 1, **values(start) | identity)
        for step in range(first, last + 1):
            for line in taken[(step - 1) % len(taken)]:
                journal.write(line["event"], step, **values(line))
        if status is not None:
            journal.write("stop", last, status=status, reason="time_limit" if status == "requeue" else None)
        journal.close()


def values(line: Line) -> Line:
    """Of a line, without what the journal itself writes."""
    return {key: value for key, value in line.items() if key not in _OWN_KEYS}
