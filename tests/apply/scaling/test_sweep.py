"""What is measured, what is left out, and what a second call does; with a machine that obeys a known law."""

from dataclasses import replace
from typing import Any

import pytest

from cctrain.apply.processes import LEFT_OUT, OUT_OF_MEMORY
from cctrain.apply.scaling import sweep as module
from cctrain.apply.scaling.points import Point, read_points
from cctrain.apply.scaling.sweep import Plan, forecast, seconds_to_go, sweep, to_measure
from cctrain.apply.scaling.work import Setting
from tests.apply.scaling.sweeps import DIGEST, a_plan, timings


class Machine:
    """Notes what it was asked to measure; stops at one point as Ctrl-C does, and has no memory for others."""

    def __init__(self, stops_at: str | None = None, does_not_fit: tuple[str, ...] = ()) -> None:
        self.asked: list[str] = []
        self.stops_at, self.does_not_fit = stops_at, does_not_fit

    def __call__(self, point: Point, setting: Setting, most_repeats: int) -> dict[str, Any]:
        if point.key == self.stops_at:
            raise KeyboardInterrupt
        self.asked.append(point.key)
        return {LEFT_OUT: OUT_OF_MEMORY} if point.key in self.does_not_fit else timings(point)


def run(folder, plan: Plan, machine: Machine) -> dict:
    rows = read_points(folder, DIGEST)
    sweep(folder, plan, rows, machine)
    return rows


def test_every_point_is_measured_once_and_kept(tmp_path):
    machine, plan = Machine(), a_plan()
    rows = run(tmp_path, plan, machine)
    assert machine.asked == [point.key for point in plan.points]
    assert read_points(tmp_path, DIGEST) == rows
    assert all(row["attention_share_of_time"] < 1 for row in rows.values())


def test_after_an_interruption_only_what_is_missing_is_measured(tmp_path):
    plan = a_plan()
    stop = plan.points[4].key
    first, second = Machine(stops_at=stop), Machine()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan, first)
    run(tmp_path, plan, second)
    assert first.asked + second.asked == [point.key for point in plan.points]


def test_points_are_measured_in_rounds_each_of_which_has_them_all(tmp_path):
    machine, plan = Machine(), a_plan(rounds=3)
    rows = run(tmp_path, plan, machine)
    assert machine.asked == 3 * [point.key for point in plan.points]
    assert {row["repeats"] for row in rows.values()} == {9}
    assert read_points(tmp_path, DIGEST) == rows


def test_a_point_has_the_median_of_all_its_rounds(tmp_path):
    plan = a_plan([4096], [32], rounds=3)
    slow = iter([1.0, 3.0, 1.0] * len(plan.points))

    def machine(point: Point, *_: object) -> dict[str, Any]:
        return timings(point, next(slow))

    rows: dict[str, Any] = {}
    sweep(tmp_path, replace(plan, points=plan.points[:1]), rows, machine)
    [row] = rows.values()
    seconds = 1e-8 * 4096 * 32
    assert row["attention_seconds"] == pytest.approx(seconds)
    assert row["attention_by_round"] == pytest.approx([seconds, 3 * seconds, seconds])


def test_after_an_interruption_in_a_later_round_only_what_is_missing_is_measured(tmp_path):
    plan = a_plan(rounds=2)
    first, second = Machine(), Machine()
    run(tmp_path, replace(plan, rounds=1), Machine())
    first.stops_at = stop = plan.points[4].key
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, plan, first)
    run(tmp_path, plan, second)
    assert second.asked[0] == stop
    assert first.asked + second.asked == [point.key for point in plan.points]


def test_more_rounds_are_added_to_what_was_measured(tmp_path):
    run(tmp_path, a_plan(rounds=1), Machine())
    machine, plan = Machine(), a_plan(rounds=3)
    rows = run(tmp_path, plan, machine)
    assert len(machine.asked) == 2 * len(plan.points)
    assert {row["repeats"] for row in rows.values()} == {9}


def test_a_point_whose_step_was_too_long_to_repeat_has_one_round(tmp_path):
    def machine(point: Point, *_: object) -> dict[str, Any]:
        machine.asked += 1
        return timings(point) | {"warm_up": 30.0, "steps": [30.0]}

    machine.asked = 0
    plan = a_plan([4096], [32], rounds=3)
    sweep(tmp_path, plan, {}, machine)
    assert machine.asked == len(plan.points)


def test_what_earlier_rounds_measured_stays_if_memory_is_short_in_a_later_one(tmp_path):
    plan = a_plan(rounds=2)
    before = run(tmp_path, replace(plan, rounds=1), Machine())
    full = plan.points[4].key
    rows = run(tmp_path, plan, Machine(does_not_fit=(full,)))
    assert LEFT_OUT not in rows[full]
    assert rows[full]["timings"] == before[full]["timings"]
    assert rows[full]["attention_by_round"] == [before[full]["attention_seconds"], None]
    assert not to_measure(plan, rows)


def test_further_lengths_and_latents_are_added_to_a_sweep(tmp_path):
    run(tmp_path, a_plan([1024], [32]), Machine())
    machine = Machine()
    rows = run(tmp_path, a_plan([1024, 4096], [32, 64]), machine)
    assert "criss-cross, M = 32, n = 1024" not in machine.asked
    assert len(machine.asked) == 5
    assert len(rows) == 8


def test_a_point_over_the_budget_is_recorded_as_such_and_not_measured(tmp_path):
    plan, machine = a_plan([4096, 32768], [32], budget=11.0), Machine()
    rows = run(tmp_path, plan, machine)
    row = rows["dense, same parameters, n = 32768"]
    assert row["key"] not in machine.asked
    assert "--budget is 11" in row[LEFT_OUT]
    assert "step_seconds" not in row
    assert row["predicted_seconds"] > 11


def test_only_a_larger_budget_makes_such_a_point_one_to_measure(tmp_path):
    plan = a_plan([4096, 32768], [32], budget=11.0)
    rows = run(tmp_path, plan, Machine())
    assert not to_measure(plan, rows)
    missing = to_measure(replace(plan, budget=1000.0), rows)
    assert missing
    assert all("n = 32768" in point.key for point in missing)


def test_a_point_without_memory_is_recorded_and_so_are_the_longer_ones_of_its_curve(tmp_path):
    full = "dense, same depth, n = 8192"
    machine = Machine(does_not_fit=(full,))
    rows = run(tmp_path, a_plan(), machine)
    assert rows[full][LEFT_OUT] == OUT_OF_MEMORY
    assert rows["dense, same depth, n = 16384"][LEFT_OUT] == f"n = 8,192 did not fit: {OUT_OF_MEMORY}"
    assert "dense, same depth, n = 16384" not in machine.asked
    assert "step_seconds" in rows["dense, same parameters, n = 16384"]
    assert not to_measure(a_plan(), rows)


def test_a_point_that_by_the_shorter_ones_needs_more_than_is_free_is_not_tried(tmp_path, monkeypatch):
    class Memory:
        available = 1000 * 10_000 * 2  # of ours: bytes a token, tokens, layers

    monkeypatch.setattr(module.psutil, "virtual_memory", Memory)
    rows = run(tmp_path, a_plan(), Machine())
    assert "step_seconds" in rows["criss-cross, M = 32, n = 8192"]
    assert "would need about" in rows["criss-cross, M = 32, n = 16384"][LEFT_OUT]


def test_a_prediction_follows_the_flops_from_the_longest_shorter_point(tmp_path):
    plan = a_plan([8192, 16384], [32])
    rows = run(tmp_path, a_plan([8192], [32]), Machine())
    found = {row["key"]: row for row in forecast(plan, rows)}
    short, long = (found[f"criss-cross, M = 32, n = {n}"] for n in (8192, 16384))
    measured = rows[short["key"]]
    turn = (measured["step_seconds"] + measured["attention_seconds"] / 2) * long["flops"] / short["flops"]
    assert long["predicted_seconds"] == pytest.approx(5 + turn * (1 + plan.most_repeats))
    assert not short["missing"]
    missing = [row["predicted_seconds"] for row in found.values() if row["missing"]]
    assert seconds_to_go(list(found.values()), plan.budget) == pytest.approx(sum(missing))
