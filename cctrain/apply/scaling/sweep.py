"""Measure every point that is not measured yet, the short contexts first, each kept before the next begins.

A point is left out, and recorded with the reason, if it would take longer than the budget, if it or a shorter context
of its curve ran out of memory, or if by the two longest shorter ones it would need more memory than is free. Only a
larger budget makes it a point to measure again; a lack of memory stays, until its line is removed.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from cctrain.apply.processes import LEFT_OUT, in_new_processes
from cctrain.apply.scaling.measure import measure, medians, rates
from cctrain.apply.scaling.points import Point, Row, append_point
from cctrain.apply.scaling.predict import (
    bytes_of_point,
    describe_point,
    extrapolated_bytes,
    seconds_of_point,
    seconds_of_turn,
)
from cctrain.apply.scaling.work import Setting
from cctrain.code_version import code_commit
from cctrain.words import duration

log = logging.getLogger(__name__)

BUDGET, MEMORY = "budget", "memory"
GIB = 2**30
MeasurePoint = Callable[[Point, Setting, int], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """`points` to have in the end; `product_rate`, FLOPs a second of a matrix product on this machine; `command`, that
    asks for them."""

    points: list[Point]
    setting: Setting
    budget: float
    most_repeats: int
    product_rate: float
    digest: str
    command: str


def measure_point(point: Point, setting: Setting, most_repeats: int) -> dict[str, Any]:
    """Every time taken, or {left_out: why}."""
    arguments = point.model, point.tokens, setting, most_repeats
    several = point.context_ranks if point.context_ranks > 1 else None
    return in_new_processes(measure, arguments, point.context_ranks, several, setting.dtype)


def to_measure(plan: Plan, rows: dict[str, Row]) -> list[Point]:
    return [point for point in plan.points if not _is_settled(rows.get(point.key), plan.budget)]


def forecast(plan: Plan, rows: dict[str, Row]) -> list[Row]:
    """What is known of every point before it is measured: predicted seconds and bytes, and whether it is there."""
    found, missing = [], {point.key for point in to_measure(plan, rows)}
    for point in plan.points:
        row = describe_point(point, plan.setting)
        extrapolated = extrapolated_bytes(row, rows)
        found.append(
            row
            | {
                "missing": point.key in missing,
                "predicted_seconds": _predicted(row, rows, plan),
                "predicted_bytes": extrapolated or bytes_of_point(point, plan.setting),
            }
        )
    return found


def sweep(folder: Path, plan: Plan, rows: dict[str, Row], measure_point: MeasurePoint = measure_point) -> None:
    """Add to `rows`, by key, and to the folder's file what the plan's points lack."""
    missing, commit = to_measure(plan, rows), code_commit()
    for number, point in enumerate(missing, start=1):
        row = describe_point(point, plan.setting) | {"settings": plan.digest, "commit": commit, "began": _now()}
        row["command"] = plan.command
        predicted = _predicted(row, rows, plan)
        reason = _reason_to_leave_out(point, row, rows, predicted, plan)
        if reason is None:
            log.info("%d/%d: %s: about %.0f s, %s", number, len(missing), point.key, predicted, _rest(plan, rows))
            row |= _measured(measure_point(point, plan.setting, plan.most_repeats), point)
        else:
            row |= reason
        row |= {"time": _now(), "predicted_seconds": predicted}
        if "step_seconds" in row:
            row |= rates(row)
            log.info(
                "  step %.4g s, attention %.4g s: %.1f %% of the time, %.1f %% of the FLOPs",
                *(row["step_seconds"], row["attention_seconds"]),
                *(100 * row["attention_share_of_time"], 100 * row["attention_share_of_flops"]),
            )
        else:
            log.info("%d/%d: %s left out: %s", number, len(missing), point.key, row[LEFT_OUT])
        append_point(folder, row)
        rows[point.key] = row


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _measured(timings: dict[str, Any], point: Point) -> Row:
    if LEFT_OUT in timings:
        return {LEFT_OUT: timings[LEFT_OUT], "for_want_of": MEMORY}
    return medians(timings, point.model.depth) | {"timings": timings}


def _reason_to_leave_out(point: Point, row: Row, rows: dict[str, Row], predicted: float, plan: Plan) -> Row | None:
    for other in rows.values():
        if other["name"] == row["name"] and other["tokens"] < row["tokens"] and other.get("for_want_of") == MEMORY:
            return {LEFT_OUT: f"n = {other['tokens']:,} did not fit: {other[LEFT_OUT]}", "for_want_of": MEMORY}
    if predicted > plan.budget:
        text = f"it would take about {predicted:,.0f} s; --budget is {plan.budget:,.0f}"
        return {LEFT_OUT: text, "for_want_of": BUDGET}
    needed = extrapolated_bytes(row, rows)
    if plan.setting.device == "cpu" and needed is not None:  # a GPU says by itself, and at once, what does not fit
        needed, free = needed * point.context_ranks, psutil.virtual_memory().available
        if needed > free:
            text = f"it would need about {needed / GIB:,.1f} GiB; {free / GIB:,.1f} GiB were free"
            return {LEFT_OUT: text, "for_want_of": MEMORY}
    return None


def _is_settled(row: Row | None, budget: float) -> bool:
    if row is None:
        return False
    return row.get("for_want_of") != BUDGET or row["predicted_seconds"] > budget


def _predicted(row: Row, rows: dict[str, Row], plan: Plan) -> float:
    return seconds_of_point(seconds_of_turn(row, rows, plan.product_rate), plan.most_repeats)


def _rest(plan: Plan, rows: dict[str, Row]) -> str:
    return f"{duration(seconds_to_go(forecast(plan, rows), plan.budget))} to go"


def seconds_to_go(found: list[Row], budget: float) -> float:
    """Of a forecast: of the points that are missing and within the budget."""
    seconds = (row["predicted_seconds"] for row in found if row["missing"])
    return sum(second for second in seconds if second <= budget)
