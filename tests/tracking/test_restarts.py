"""Which repeated lines are the same training, and what is said of a restart."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cctrain.tracking.content import tags_of
from cctrain.tracking.description import description_of
from cctrain.tracking.journal import Journal, history, read_journal
from cctrain.tracking.restarts import attempt_curve, is_same_training, restarts, signature

MakeRun = Callable[..., Path]

STEP = {"event": "step", "attempt": 1, "step": 7, "loss": 0.8, "learning_rate": 1e-3, "samples": "ab"}
LOOK = {"event": "evaluate", "attempt": 1, "step": 7, "nll": 0.8, "difference": 1e-9, "seconds": 1.0}


def _curve(run_dir: Path) -> list[tuple[int, int]]:
    return [(line["step"], line["attempt"]) for line in attempt_curve(read_journal(run_dir))]


@pytest.mark.parametrize(
    ("line", "changed", "same"),
    [
        (STEP, {"attempt": 2, "grad_norm": 3.0}, True),
        (STEP, {"loss": 0.807}, True),  # bf16 on another number of ranks
        (STEP, {"loss": 0.82}, False),
        (STEP, {"loss": math.nan}, False),
        (STEP, {"samples": "cd"}, False),
        (STEP, {"learning_rate": 1.0001e-3}, False),
        (LOOK, {"difference": -1e-9, "seconds": 9.0}, True),
        (LOOK, {"nll": 0.85}, False),
    ],
)
def test_a_repeated_line_is_the_same_training_by_samples_rate_and_result(
    line: dict[str, Any], changed: dict[str, Any], same: bool
) -> None:
    one, other = signature(line), signature(line | changed)
    assert is_same_training(one, other) is same
    assert is_same_training(other, one) is same
    assert is_same_training(other, other), "a line repeats itself, whatever it holds"


def test_a_run_that_was_never_restarted_has_no_restarts_and_no_curve(make_run: MakeRun) -> None:
    lines = read_journal(make_run((1, 60, "finished")))
    assert restarts(lines) == []
    assert attempt_curve(lines) == []
    assert "cctrain.restarts" not in tags_of(lines, history(lines))
    assert "Restart" not in description_of(lines, history(lines), {})


def test_a_restart_tells_where_when_on_how_many_ranks_and_why(make_run: MakeRun) -> None:
    run_dir = make_run((1, 60, None), (51, 70, "requeue"), (71, 80, "finished"))
    lines = read_journal(run_dir)
    starts = [line for line in lines if line["event"] == "start"]
    when = [line["time"][:16].replace("T", " ") for line in starts]
    expected = [
        f"attempt 3 from step 70, {when[2]} UTC, 6 ranks; attempt 2 ended after step 70: requeue (time_limit)",
        f"attempt 2 from step 50, {when[1]} UTC, 4 ranks; attempt 1 was killed after step 60",
    ]
    assert tags_of(lines, history(lines))["cctrain.restarts"] == "\n".join(expected)
    description = description_of(lines, history(lines), {})
    assert f"Restarts, the latest first:\n\n- {expected[0]}\n- {expected[1]}\n" in description
    assert "when it is started again" not in description


def test_the_description_of_a_run_that_waits_says_so(make_run: MakeRun) -> None:
    lines = read_journal(make_run((1, 60, "requeue")))
    expected = "Attempt 1 ended after step 60: requeue (time_limit). The run goes on when it is started again."
    assert expected in description_of(lines, history(lines), {})


def test_of_many_restarts_the_latest_are_described(make_run: MakeRun) -> None:
    lines = read_journal(make_run(*[(step, step, "requeue") for step in range(1, 15)]))
    description = description_of(lines, history(lines), {})
    assert description.count("\n- attempt") == 10
    assert "- attempt 14 from step 13" in description
    assert "- and 3 before" in description


def test_an_attempt_that_died_before_its_first_step_is_told(make_run: MakeRun) -> None:
    run_dir = make_run((1, 0, None), (1, 5, None))
    assert restarts(read_journal(run_dir))[0].before == "attempt 1 was killed before its first step"


def test_a_long_reason_is_cut_and_shows_no_password(make_run: MakeRun) -> None:
    run_dir = make_run((1, 5, None))
    journal = Journal(run_dir, attempt=1)
    journal.write("stop", 5, status="failed", reason=f"no http://ann:s3cret@host {'x' * 900}\nsecond line")
    make_run((1, 5, None))
    (restart,) = restarts(read_journal(run_dir))
    assert restart.before.startswith("attempt 1 ended after step 5: failed (no http://host xxx")
    assert len(restart.before) < 260
    assert "second line" not in restart.before


def test_the_curve_steps_up_where_an_attempt_begins(make_run: MakeRun) -> None:
    run_dir = make_run((1, 60, None), (51, 70, "requeue"), (71, 80, None))
    assert _curve(run_dir) == [(1, 1), (50, 1), (51, 2), (70, 2), (71, 3)]
    Journal(run_dir, attempt=3).write("stop", 80, status="finished")
    assert _curve(run_dir)[-2:] == [(71, 3), (80, 3)]
    make_run((81, 90, None))  # more steps for a finished run: no point of the curve moves
    assert _curve(run_dir)[-3:] == [(71, 3), (80, 3), (81, 4)]


def test_two_restarts_over_the_same_steps_are_two_points(make_run: MakeRun) -> None:
    run_dir = make_run((1, 60, None), (51, 53, None), (51, 70, None))
    assert _curve(run_dir) == [(1, 1), (50, 1), (51, 2), (51, 3)]


def test_a_run_that_began_again_at_its_first_step_is_a_restart(make_run: MakeRun) -> None:
    assert _curve(make_run((1, 30, None), (1, 40, None))) == [(1, 1), (1, 2)]


def test_a_skipped_step_that_a_later_attempt_took_is_not_listed(make_run: MakeRun) -> None:
    run_dir = make_run((1, 9, None))
    journal = Journal(run_dir, attempt=1)
    for step in (3, 8):
        journal.write("skip", step, reason="loss", sample_ids=[4, 5], consecutive=1)
    make_run((6, 9, None))
    lines = read_journal(run_dir)
    assert tags_of(lines, history(lines))["cctrain.skipped_steps"] == "3"
