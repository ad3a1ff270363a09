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
    assert long["predicted_seconds"] == pytest.approx(8 + turn * (1 + plan.most_repeats))
    assert not short["missing"]
    missing = [row["predicted_seconds"] for row in found.values() if row["missing"]]
    assert seconds_to_go(list(found.values()), plan.budget) == pytest.approx(sum(missing))
