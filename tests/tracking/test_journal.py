"""The journal: what is written comes back, whatever a crash leaves behind."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cctrain.errors import TrainingError
from cctrain.tracking.journal import JOURNAL_NAME, Journal, history, read_journal


def _steps(lines: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(line["step"], line["attempt"]) for line in lines if line["event"] == "step"]


def test_a_line_comes_back_with_event_attempt_step_time_and_values(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("start", 0, run="abc", nested={"list": [1, True, None, "µ"]})
    journal.close()
    (line,) = read_journal(tmp_path)
    assert line["time"].endswith("+00:00")
    del line["time"]
    nested = {"list": [1, True, None, "µ"]}
    assert line == {"event": "start", "attempt": 1, "step": 0, "run": "abc", "nested": nested}


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-308, math.nextafter(2.35, 3), float(np.float32(1 / 3)), -0.0])
def test_floats_keep_all_their_digits(tmp_path: Path, value: float) -> None:
    journal = Journal(tmp_path)
    journal.write("step", 1, loss=value)
    assert read_journal(tmp_path)[0]["loss"].hex() == value.hex()


def test_values_that_are_not_finite_are_valid_json_and_come_back_as_floats(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("step", 1, loss=math.nan, grad_norm=math.inf, low=[-math.inf], scalar=np.float32("inf"))

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / JOURNAL_NAME).read_text(), parse_constant=refuse)
    (line,) = read_journal(tmp_path)
    assert math.isnan(line["loss"])
    assert (line["grad_norm"], line["low"], line["scalar"]) == (math.inf, [-math.inf], math.inf)


def test_numpy_scalars_are_numbers_and_other_types_are_refused_by_name(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("step", np.int64(3), targets=np.int64(7), flag=np.bool_(True))
    assert read_journal(tmp_path)[0]["targets"] == 7
    with pytest.raises(TrainingError, match="grad_norm in the step line of step 4: ndarray"):
        journal.write("step", 4, grad_norm=np.ones(2))
    assert len(read_journal(tmp_path)) == 1


def test_an_unknown_event_is_an_assertion_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="stpe"):
        Journal(tmp_path).write("stpe", 1)


def test_every_line_is_on_the_file_when_write_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(5):
        journal.write("step", step, loss=1.0)
        assert len((tmp_path / JOURNAL_NAME).read_bytes().splitlines()) == step + 1


def test_a_killed_process_loses_no_line(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path; from cctrain.tracking.journal import Journal\n"
        f"journal = Journal(Path({str(tmp_path)!r}))\n"
        "for step in range(200): journal.write('step', step, loss=0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert [line["step"] for line in read_journal(tmp_path)] == list(range(200))


def test_attempts_count_up_from_one_unless_given(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        journal = Journal(tmp_path)
        assert journal.attempt == expected
        journal.write("start", 0)
        journal.close()
    assert Journal(tmp_path, attempt=9).attempt == 9


@pytest.mark.parametrize("missing", [1, 2, 30])
def test_a_torn_last_line_is_ignored_before_and_after_the_next_start(tmp_path: Path, missing: int) -> None:
    journal = Journal(tmp_path)
    for step in (1, 2):
        journal.write("step", step, loss=0.25)
    journal.close()
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-missing])  # 1: a whole object that lacks only its newline
    assert _steps(read_journal(tmp_path)) == [(1, 1)]
    resumed = Journal(tmp_path)
    resumed.write("step", 2, loss=0.5)
    assert _steps(read_journal(tmp_path)) == [(1, 1), (2, 2)]
    Journal(tmp_path).close()
    assert _steps(read_journal(tmp_path)) == [(1, 1), (2, 2)]


@pytest.mark.parametrize("garbage", [b'{"event": "st\n', b"\xff\xfe\n", b"[1]\n", b'{"step": 1}\n', b"\n"])
def test_a_line_in_the_middle_that_is_no_journal_line_is_ignored(tmp_path: Path, garbage: bytes) -> None:
    journal = Journal(tmp_path)
    journal.write("step", 1, loss=1.0)
    with open(tmp_path / JOURNAL_NAME, "ab") as file:
        file.write(garbage)
    journal.write("step", 2, loss=1.0)
    assert _steps(read_journal(tmp_path)) == [(1, 1), (2, 1)]


def test_no_journal_reads_as_no_lines(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "nowhere") == []


def test_the_history_takes_each_step_from_the_latest_attempt_that_reached_it(
    tmp_path: Path, write_attempt: Callable[..., None]
) -> None:
    write_attempt(tmp_path, 1, 8, None)
    write_attempt(tmp_path, 5, 7, None)
    write_attempt(tmp_path, 6, 6, "killed")
    expected = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 3), (7, 2), (8, 1)]
    assert _steps(history(read_journal(tmp_path))) == expected


def test_the_history_tells_evaluations_from_steps_and_keeps_other_events_in_order(
    tmp_path: Path, write_attempt: Callable[..., None]
) -> None:
    write_attempt(tmp_path, 1, 60, None)
    write_attempt(tmp_path, 51, 75, "finished")
    counted = history(read_journal(tmp_path))
    looks = [(line["step"], line["attempt"]) for line in counted if line["event"] == "evaluate"]
    assert looks == [(25, 1), (50, 1), (75, 2)]
    assert len(_steps(counted)) == 75
    others = [(line["event"], line["step"]) for line in counted if line["event"] not in ("step", "evaluate")]
    assert others == [("start", 0), ("checkpoint", 50), ("start", 50), ("stop", 75)]
    places = [line["step"] for line in counted if line["event"] in ("step", "evaluate")]
    assert places == sorted(places)
    around = counted.index(next(line for line in counted if line["event"] == "checkpoint"))
    assert [line["event"] for line in counted[around - 1 : around + 3]] == [
        "evaluate",
        "checkpoint",
        "start",
        "step",
    ]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"file.*run\.dir"):
        Journal(tmp_path / "file")
