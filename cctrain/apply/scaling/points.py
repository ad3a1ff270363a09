"""The points of a sweep, and the file that keeps them: one JSON line a point, appended and forced to the disk.

    DIR/settings.json    what all points have in common: model, precision, memory, machine; and the sweep's identifier
    DIR/points.jsonl     every point that was measured, or left out and why, with the digest of those settings

Points measured under other settings cannot stand in one fit, so they are refused. Of several lines of a point the last
one counts. A torn last line is ignored, and cut off before the next one is written.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cctrain.config import ModelConfig
from cctrain.errors import DataError, UsageError
from cctrain.run_directory import write_atomically

SETTINGS, POINTS = "settings.json", "points.jsonl"
DENSE = {"same_depth": "dense, same depth", "same_parameters": "dense, same parameters"}
CRISS_CROSS = "criss_cross"
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """`kind` is criss_cross or a key of DENSE; `context_ranks` share the context."""

    kind: str
    model: ModelConfig
    tokens: int
    context_ranks: int = 1

    @property
    def curve(self) -> str:
        """What it has in common with points of other lengths."""
        if self.kind != CRISS_CROSS:
            return DENSE[self.kind]
        shared = f", {self.context_ranks} context ranks" if self.context_ranks > 1 else ""
        return f"criss-cross, M = {self.model.latents}{shared}"

    @property
    def key(self) -> str:
        return f"{self.curve}, n = {self.tokens}"


def points_of(
    model: ModelConfig, same_parameters_depth: int, lengths: list[int], latents: list[int], context_ranks: list[int]
) -> Iterator[Point]:
    """Short contexts first, from which the time of longer ones is predicted; the dense controls are on one rank."""
    dense = replace(model, attention="dense")
    controls = {"same_depth": dense, "same_parameters": replace(dense, depth=same_parameters_depth)}
    for tokens in sorted(set(lengths)):
        for num_ranks in sorted(set(context_ranks)):
            for number in sorted(set(latents)):
                yield Point(CRISS_CROSS, replace(model, latents=number), tokens, num_ranks)
        for kind, control in controls.items():
            yield Point(kind, control, tokens)


def digest_of(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def adopt_settings(folder: Path, settings: dict[str, Any], write: bool = True) -> str:
    """Write the settings, or compare them with those that are there; returns the sweep's identifier.

    Raises UsageError that lists what differs, DataError for a damaged file.
    """
    path = folder / SETTINGS
    if not path.is_file():
        identifier = uuid.uuid4().hex
        if write:
            content = json.dumps({"sweep": identifier, "settings": settings}, indent=1) + "\n"
            write_atomically(path, content.encode())
        return identifier
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        identifier, before = str(kept["sweep"]), dict(kept["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}): restore it, or measure into another --out") from error
    differing = list(_differences(before, settings))
    if differing:
        listed = "\n".join(f"  {line}" for line in differing)
        raise UsageError(
            f"{folder} holds points that were measured under other settings, which cannot be fitted together with new "
            f"ones:\n{listed}\nGive back the old settings, or measure into another folder with --out DIR"
        )
    return identifier


def read_points(folder: Path, digest: str) -> dict[str, Row]:
    """The last line of every point, by key. Raises DataError for a line that no sweep under these settings wrote."""
    path = folder / POINTS
    rows: dict[str, Row] = {}
    if not path.is_file():
        return rows
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # torn: only the last one can be
        try:
            row = json.loads(line)
            of_these_settings = row["settings"] == digest
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}, is damaged ({error}): remove that line") from error
        if not of_these_settings:
            raise DataError(
                f"{path}, line {number}, was measured under other settings ({row['settings']}, not {digest}): remove "
                "that line, or measure into another --out"
            )
    return rows


def append_point(folder: Path, row: Row) -> None:
    """On the disk when this returns."""
    with open(folder / POINTS, "a+b") as file:
        file.seek(0)
        kept = file.read()
        whole = kept.rfind(b"\n") + 1
        if whole < len(kept):
            file.truncate(whole)
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {old} → {new}"
