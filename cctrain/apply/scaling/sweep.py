"""Measure every point as often as it is to be and was not yet, each kept before the next begins.

They are measured in rounds, in each of which every point has its turn, the short contexts first: so a machine that is
slow for some minutes, as shared ones are, makes neither one length nor one number of latents seem dear.

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
from cctrain.apply.scaling.measure import is_timed_once, joined, measure, medians, rates
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
ROUNDS, REPEATS_OF_A_ROUND, SECONDS_OF_A_ROUND = 3, 3, 7.0
MeasurePoint = Callable[[Point, Setting, int], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """`points` to have in the end, each measured in so many `rounds`; `most_repeats` in one of them; `product_rate`,
    FLOPs a second of a matrix product on this machine; `command`, that asks for them."""

    points: list[Point]
    setting: Setting
    budget: float
    rounds: int
    most_repeats: int
    product_rate: float
    digest: str
    command: str


def measure_point(point: Point, setting: Setting, most_repeats: int) -> dict[str, Any]:
    """Every time taken in a round, or {left_out: why}."""
    arguments = point.model, point.tokens, setting, most_repeats, SECONDS_OF_A_ROUND
    several = point.context_ranks if point.context_ranks > 1 else None
    return in_new_processes(measure, arguments, point.context_ranks, several, setting.dtype)


def to_measure(plan: Plan, rows: dict[str, Row], rounds: int | None = None) -> list[Point]:
    """Points that were measured in fewer rounds than that, or than the plan's."""
    return [point for point in plan.points if _rounds_to_go(rows.get(point.key), rounds or plan.rounds, plan.budget)]


def forecast(plan: Plan, rows: dict[str, Row]) -> list[Row]:
    """What is known of every point before it is measured: predicted seconds and bytes, and whether rounds of it are
    missing."""
    found = []
    for point in plan.points:
        row = describe_point(point, plan.setting)
        extrapolated = extrapolated_bytes(row, rows)
        rounds = _rounds_to_go(rows.get(point.key), plan.rounds, plan.budget)
        found.append(
            row
            | {
                "missing": rounds > 0,
                "predicted_seconds": _predicted(row, rows, plan, rounds or plan.rounds),
                "predicted_bytes": extrapolated or bytes_of_point(point, plan.setting),
            }
        )
    return found


def sweep(folder: Path, plan: Plan, rows: dict[str, Row], measure_point: MeasurePoint = measure_point) -> None:
    """Add to `rows`, by key, and to the folder's file what the plan's points lack."""
    commit = code_commit()
    for number in range(1, plan.rounds + 1):
        missing = to_measure(plan, rows, number)
        for place, point in enumerate(missing, start=1):
            where = f"round {number} of {plan.rounds}, {place}/{len(missing)}: {point.key}"
            row = _measured(point, rows, plan, measure_point, where) | {"commit": commit, "time": _now()}
            append_point(folder, row)
            rows[point.key] = row


def _measured(point: Point, rows: dict[str, Row], plan: Plan, measure_point: MeasurePoint, where: str) -> Row:
    """The point's row with one more round in it, or with the reason why it has none."""
    row = rows.get(point.key, {})
    if "timings" not in row:
        row = describe_point(point, plan.setting) | {"settings": plan.digest, "command": plan.command, "began": _now()}
        row["predicted_seconds"] = _predicted(row, rows, plan, plan.rounds)
        if reason := _reason_to_leave_out(point, row, rows, plan):
            log.info("%s left out: %s", where, reason[LEFT_OUT])
            return row | reason
    log.info("%s: about %.0f s, %s", where, _predicted(row, rows, plan, 1), _rest(plan, rows))
    found = measure_point(point, plan.setting, plan.most_repeats)
    if LEFT_OUT in found:
        if "timings" in row:
            log.warning("%s: %s in this round; what was measured before stays", where, found[LEFT_OUT])
            return row | {"attention_by_round": [*_by_round(row), None]}
        log.info("%s left out: %s", where, found[LEFT_OUT])
        return row | found | {"for_want_of": MEMORY}
    timings = joined(row["timings"], found) if "timings" in row else found
    of_this_round = medians(found, point.model.depth)["attention_seconds"]
    rounds = {"attention_by_round": [*_by_round(row), of_this_round]}
    row = row | medians(timings, point.model.depth) | {"timings": timings} | rounds
    row |= rates(row)
    log.info(
        "  step %.4g s, attention %.4g s: %.1f %% of the time, %.1f %% of the FLOPs",
        *(row["step_seconds"], row["attention_seconds"]),
        *(100 * row["attention_share_of_time"], 100 * row["attention_share_of_flops"]),
    )
    return row


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _reason_to_leave_out(point: Point, row: Row, rows: dict[str, Row], plan: Plan) -> Row | None:
    for other in rows.values():
        if other["name"] == row["name"] and other["tokens"] < row["tokens"] and other.get("for_want_of") == MEMORY:
            return {LEFT_OUT: f"n = {other['tokens']:,} did not fit: {other[LEFT_OUT]}", "for_want_of": MEMORY}
    if (seconds := row["predicted_seconds"]) > plan.budget:
        text = f"it would take about {seconds:,.0f} s; --budget is {plan.budget:,.0f}"
        return {LEFT_OUT: text, "for_want_of": BUDGET}
    needed = extrapolated_bytes(row, rows)
    if plan.setting.device == "cpu" and needed is not None:  # a GPU says by itself, and at once, what does not fit
        needed, free = needed * point.context_ranks, psutil.virtual_memory().available
        if needed > free:
            text = f"it would need about {needed / GIB:,.1f} GiB; {free / GIB:,.1f} GiB were free"
            return {LEFT_OUT: text, "for_want_of": MEMORY}
    return None


def _rounds_to_go(row: Row | None, rounds: int, budget: float) -> int:
    if row is None:
        return rounds
    if LEFT_OUT in row:
        return rounds if row["for_want_of"] == BUDGET and row["predicted_seconds"] <= budget else 0
    return 0 if is_timed_once(row["timings"]) else max(0, rounds - len(_by_round(row)))


def _by_round(row: Row) -> list[float | None]:
    """Seconds of attention in each round of the point so far, None where there was no memory; one round that is not
    known of a point that a version without this list measured."""
    known: list[float | None] = row.get("attention_by_round", [None])
    return known if "timings" in row else []


def _predicted(row: Row, rows: dict[str, Row], plan: Plan, rounds: int) -> float:
    seconds = seconds_of_turn(row, rows, plan.product_rate)
    return seconds_of_point(seconds, plan.most_repeats, SECONDS_OF_A_ROUND, rounds)


def _rest(plan: Plan, rows: dict[str, Row]) -> str:
    return f"{duration(seconds_to_go(forecast(plan, rows), plan.budget))} to go"


def seconds_to_go(found: list[Row], budget: float) -> float:
    """Of a forecast: of the points that are missing and within the budget."""
    seconds = (row["predicted_seconds"] for row in found if row["missing"])
    return sum(second for second in seconds if second <= budget)
