"""The journal of a run: `metrics.jsonl` in the run directory, append-only, one JSON object a line.

It is the truth of a run. Comparisons, plots and MLflow are made from its *history*: for each step the line
of the latest attempt that reached it. An attempt is one start of the trainer; a run that was interrupted and
resumed has several, and they may overlap in steps.

A line reaches the operating system in one write, so a crash can tear only the last one. A torn line is
closed at the next start and ignored ever after. JSON has no word for the numbers that a diverged training
produces: NaN and the infinities are written as the texts "nan", "inf" and "-inf" and read back as floats
(these three texts are therefore reserved).

Nothing here knows of MLflow, of the trainer, or of what a metric means.
"""

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cctrain.errors import DataError, TrainingError

JOURNAL_NAME = "metrics.jsonl"
EVENTS = ("start", "step", "evaluate", "checkpoint", "skip", "stop")
MEASURED_EVENTS = ("step", "evaluate")

_TORN_MARK = b" <- torn\n"  # never valid JSON, so even a line that lacked only its newline stays ignored
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Journal:
    """Appends lines to the journal of one run, for one attempt.

    `attempt` counts from 1; by default it is one more than the last attempt in the file.
    """

    def __init__(self, run_dir: Path, attempt: int | None = None) -> None:
        self.path = Path(run_dir) / JOURNAL_NAME
        if attempt is None:
            attempt = last_attempt(read_journal(run_dir)) + 1
        self.attempt = attempt
        self.last_step = 0  # of the lines written by this attempt
        self._file = _open_for_appending(self.path)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one line: `event`, `attempt`, `step`, `time` (ISO 8601, UTC), then the values.

        Values are JSON types and numpy scalars; anything else is a TrainingError that names the key. Lines
        other than `step` are also forced to the disk: they mark points that a resumed run relies on.
        """
        assert event in EVENTS, f"unknown journal event {event!r}: one of {', '.join(EVENTS)}"
        assert not {"attempt", "time"} & values.keys(), "attempt and time are written by the journal itself"
        line = {"event": event, "attempt": self.attempt, "step": int(step), "time": _now()}
        for key, value in values.items():
            line[key] = _to_json(value, f"{key} in the {event} line of step {step}")
        content = _ENCODER.encode(line).encode() + b"\n"
        try:
            written = self._file.write(content)
            if event != "step":
                os.fsync(self._file.fileno())
        except OSError as error:
            raise TrainingError(
                f"cannot write the journal {self.path}: {error.strerror}; free or mend the disk, then start again"
            ) from error
        if written != len(content):
            raise TrainingError(f"cannot write the journal {self.path}: the disk is full; free it, then start again")
        self.last_step = int(step)

    def close(self) -> None:
        self._file.close()


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines, in the order they were written; [] if there is no journal. Torn lines are ignored."""
    return read_journal_from(run_dir, 0)[0]


def read_journal_from(run_dir: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from byte `offset` on, and the offset behind the last of them, to go on from."""
    path = Path(run_dir) / JOURNAL_NAME
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return [], offset
    except OSError as error:
        raise DataError(f"cannot read the journal {path}: {error.strerror}; check its permissions") from error
    end = content.rfind(b"\n") + 1  # what follows the last newline is torn, or still being written
    parsed = (_parse(raw) for raw in content[:end].split(b"\n"))
    return [line for line in parsed if line is not None], offset + end


def history(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that count: for each step, and for `step` and `evaluate` apart, the one of the latest attempt
    that reached it, ordered by step. Other events are all kept, in the order they were written; each stands
    behind the measured lines of its own step and before those of later steps.
    """
    latest: dict[tuple[int, int], dict[str, Any]] = {}
    others: list[dict[str, Any]] = []
    for line in lines:
        if line["event"] not in MEASURED_EVENTS:
            others.append(line)
            continue
        place = (line["step"], MEASURED_EVENTS.index(line["event"]))
        if place not in latest or line["attempt"] >= latest[place]["attempt"]:
            latest[place] = line

    merged: list[dict[str, Any]] = []
    waiting = 0
    for place in sorted(latest):
        while waiting < len(others) and others[waiting]["step"] < place[0]:
            merged.append(others[waiting])
            waiting += 1
        merged.append(latest[place])
    return merged + others[waiting:]


def last_attempt(lines: list[dict[str, Any]]) -> int:
    """The number of the latest attempt, 0 if there was none."""
    return max((line["attempt"] for line in lines), default=0)


def _open_for_appending(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: one write() call a line, and nothing in this process that a crash could lose.
        file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by Journal.close)
    except OSError as error:
        raise TrainingError(
            f"cannot write the journal {path}: {error.strerror}; choose a run.dir that can be written"
        ) from error
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.write(_TORN_MARK)
    return file


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:  # also bytes that are not UTF-8
        return None
    if not isinstance(line, dict) or not {"event", "attempt", "step", "time"} <= line.keys():
        return None
    return _from_json(line)


def _to_json(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return [_to_json(item, where) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _to_json(item, where) for key, item in value.items()}
    raise TrainingError(
        f"the journal cannot hold {where}: {type(value).__name__} is no JSON type; pass a number, a text, or "
        "lists and dictionaries of them"
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
