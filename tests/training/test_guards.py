"""Requests to stop, hangs, and steps that are not finite; where signals matter, in processes of their own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cctrain.errors import TrainingError
from cctrain.training import guards
from cctrain.training.guards import (
    ENDINGS,
    REASONS,
    SkippedSteps,
    StopRequests,
    Watchdog,
    clear_outcome,
    read_outcome,
    write_outcome,
)

HEAD = """
import os, signal, sys, threading, time
from pathlib import Path
from cctrain.training.guards import *
from cctrain.training import guards
run_dir = Path(sys.argv[1])
def ready():
    print("ready", flush=True)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen]]:
    """Starts a script in which all of `guards` and `run_dir` are defined; returns when it says ready()."""
    processes: list[subprocess.Popen] = []

    def start(script: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD + script, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def vector(*reasons: str, ranks: int = 1) -> list[float]:
    return [float(ranks) if reason in reasons else 0.0 for reason in REASONS]


# -- requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGTERM, "terminated"), (signal.SIGUSR1, "time_limit"), (signal.SIGINT, "interrupted")],
)
def test_a_signal_is_remembered_until_the_ranks_ask(tmp_path, number, reason):
    before = signal.getsignal(number)
    with StopRequests(tmp_path, is_first=False) as requests:
        assert requests.local() == vector()
        os.kill(os.getpid(), number)
        assert requests.local() == vector(reason)
        assert requests.local() == vector(reason)
    assert signal.getsignal(number) is before


def test_nothing_is_left_of_it_behind_the_training(tmp_path):
    wakeup, threads = signal.set_wakeup_fd(-1), threading.enumerate()
    files = os.listdir("/proc/self/fd")
    with StopRequests(tmp_path, is_first=True):
        assert threading.enumerate() != threads
    assert threading.enumerate() == threads
    assert os.listdir("/proc/self/fd") == files
    assert signal.set_wakeup_fd(-1) == wakeup == -1


@pytest.mark.parametrize(
    ("summed", "stop", "save"),
    [
        (vector(), None, False),
        (vector("save_file"), None, True),
        (vector("stop_file"), "stop_file", True),
        (vector("stop_file", "save_file"), "stop_file", True),
        (vector("time_limit", "stop_file"), "stop_file", True),
        (vector("terminated", "time_limit", ranks=4), "terminated", True),
        (vector("interrupted", "terminated", ranks=2), "interrupted", True),
    ],
)
def test_one_rank_that_asks_is_enough_and_the_first_reason_counts(summed, stop, save):
    decision = StopRequests.agreed(summed)
    assert (decision.stop, decision.save) == (stop, save)


def test_every_reason_to_stop_has_an_ending_that_a_launcher_understands():
    assert {reason: tuple(ending) for reason, ending in ENDINGS.items()} == {
        "interrupted": ("stopped", 130),
        "terminated": ("requeue", 0),
        "time_limit": ("requeue", 0),
        "stop_file": ("stopped", 0),
    }


@pytest.mark.parametrize("name", ["stop", "save"])
def test_a_file_is_seen_by_the_first_rank_and_removed_when_it_was_obeyed(tmp_path, name, monkeypatch):
    monkeypatch.setattr(guards, "SECONDS_BETWEEN_LOOKS", 0.0)
    path = tmp_path / name
    with StopRequests(tmp_path, is_first=True) as first, StopRequests(tmp_path, is_first=False) as second:
        assert first.local() == vector()
        path.touch()
        assert first.local() == vector(f"{name}_file")
        assert second.local() == vector()
        second.obeyed()
        assert path.exists()
        first.obeyed()
        assert not path.exists()
        assert first.local() == vector()


def test_a_file_that_comes_while_another_request_is_obeyed_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "SECONDS_BETWEEN_LOOKS", 0.0)
    with StopRequests(tmp_path, is_first=True) as requests:
        (tmp_path / "save").touch()
        requests.local()
        (tmp_path / "stop").touch()
        requests.obeyed()
        assert requests.local() == vector("stop_file")


def test_the_files_are_not_looked_for_at_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "SECONDS_BETWEEN_LOOKS", 0.5)
    with StopRequests(tmp_path, is_first=True) as requests:
        requests.local()
        (tmp_path / "stop").touch()
        assert requests.local() == vector()
        time.sleep(0.5)
        assert requests.local() == vector("stop_file")


COUNTS_STEPS = """
with StopRequests(run_dir, is_first=True) as requests:
    ready()
    while requests.agreed(requests.local()).stop is None:
        time.sleep(0.01)
    print(requests.agreed(requests.local()).stop, flush=True)
    {then}
"""


@pytest.mark.processes
def test_the_first_ctrl_c_lets_the_step_end_and_says_so(start):
    process = start(COUNTS_STEPS.format(then=""))
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "interrupted\n")
    assert error == "cctrain: saving a checkpoint at the end of this step; Ctrl-C again leaves at once\n"


@pytest.mark.processes
def test_the_second_ctrl_c_raises_keyboard_interrupt_at_once(start):
    script = """
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)  # the journal's last lines, not to be interrupted in turn
        print("closed", flush=True)
        raise SystemExit(130)
"""
    process = start(COUNTS_STEPS.format(then=script))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=3)
    assert (process.returncode, out) == (130, "closed\n")
    assert "Traceback" not in error


@pytest.mark.processes
def test_ctrl_c_that_arrives_twice_at_once_is_one(start):
    process = start(COUNTS_STEPS.format(then="time.sleep(1)"))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


@pytest.mark.processes
def test_ctrl_c_is_answered_and_leaves_even_when_the_main_thread_is_stuck(start):
    script = """
import ctypes
guards.SECONDS_TO_LEAVE = 0.5
library = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)
library.pthread_mutex_lock(mutex)
with StopRequests(run_dir, is_first=True):
    ready()
    library.pthread_mutex_lock(mutex)  # never returns, whatever signals come
"""
    process = start(script)
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again leaves at once" in process.stderr.readline()
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130


@pytest.mark.processes
def test_a_signal_while_the_store_is_loaded_is_obeyed_at_the_first_step(start):
    script = """
with StopRequests(run_dir, is_first=False) as requests:
    ready()
    time.sleep(0.5)
    print(requests.agreed(requests.local()).stop, flush=True)
"""
    process = start(script)
    process.terminate()
    out, error = process.communicate(timeout=10)
    assert (process.returncode, out, error) == (0, "terminated\n", "")


# -- hangs --------------------------------------------------------------------------------------------------------

ASLEEP = """
def a_collective_that_never_ends():
    time.sleep(60)
log = run_dir / "logs" / "rank-0003.log"
log.parent.mkdir()
log.write_text("of the attempt before\\n")
with Watchdog(0.5, [log], rank=3) as watchdog:
    watchdog.last_words = LAST_WORDS
    for step in range(1, 4):
        time.sleep(0.3)
        watchdog.beat(f"step {step}")
    for part in range(3):
        time.sleep(0.3)
        watchdog.beat()
    ready()
    a_collective_that_never_ends()
"""


@pytest.mark.processes
def test_a_rank_that_hangs_ends_with_5_and_its_stacks_on_stderr_and_in_its_log(start, tmp_path):
    process = start(ASLEEP.replace("LAST_WORDS", "None"))
    began = time.monotonic()
    error = process.communicate(timeout=10)[1]
    assert process.returncode == 5
    assert time.monotonic() - began < 3
    log = (tmp_path / "logs" / "rank-0003.log").read_text()
    assert log == "of the attempt before\n" + error
    assert "rank 3 made no progress for 0.5 s (training.hang_seconds), the last was: step 3;" in error
    assert "The same command resumes from the newest checkpoint" in error
    assert "in a_collective_that_never_ends" in error
    assert "in _watch" in error  # the stacks of all threads


@pytest.mark.processes
@pytest.mark.parametrize("words", ["lambda reason: (run_dir / 'words').write_text(reason)", "lambda _: time.sleep(60)"])
def test_the_last_words_of_a_hung_rank_are_written_but_not_waited_for_for_ever(start, tmp_path, words):
    process = start("guards.SECONDS_FOR_LAST_WORDS = 1.0\n" + ASLEEP.replace("LAST_WORDS", words))
    assert process.wait(10) == 5
    if "words" in words:
        assert (tmp_path / "words").read_text().startswith("rank 3 made no progress")


@pytest.mark.processes
def test_a_rank_that_was_stopped_for_a_while_has_not_hung(start, tmp_path):
    script = """
guards.SECONDS_STOOD_STILL = 0.5
with Watchdog(2.0, [run_dir / "rank.log"]) as watchdog:
    ready()
    for step in range(20):
        time.sleep(0.1)
        watchdog.beat(f"step {step}")
"""
    process = start(script)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3.0)
    process.send_signal(signal.SIGCONT)
    assert process.wait(10) == 0
    assert (tmp_path / "rank.log").read_text() == ""


def test_a_rank_that_makes_progress_is_left_alone(tmp_path):
    with Watchdog(0.3, [tmp_path / "rank.log"]) as watchdog:
        for step in range(8):
            time.sleep(0.1)
            watchdog.beat(f"step {step}")
    time.sleep(0.5)
    assert (tmp_path / "rank.log").read_text() == ""


# -- steps that are not finite ------------------------------------------------------------------------------------


def test_skipped_steps_are_only_counted_while_finite_ones_come_between():
    skipped = SkippedSteps(max_in_a_row=2)
    for step in range(1, 31):
        skipped.check(step, finite=step % 3 == 0, samples=[step])
    assert skipped.in_a_row == 0


def test_too_many_skipped_steps_in_a_row_name_the_step_and_the_samples():
    skipped = SkippedSteps(max_in_a_row=2)
    skipped.check(6, finite=False, samples=[1, 2])
    skipped.check(7, finite=True, samples=[3, 4])
    skipped.check(8, finite=False, samples=[50, 60])
    skipped.check(9, finite=False, samples=[70])
    with pytest.raises(TrainingError) as caught:
        skipped.check(10, finite=False, samples=[80])
    assert "3 steps in a row, the last of them step 10," in str(caught.value)
    assert "Their samples: 50, 60, 70, 80. " in str(caught.value)
    assert "training.max_skipped is 2" in str(caught.value)
    assert caught.value.exit_code == 5


def test_no_more_samples_are_named_than_one_reads():
    skipped = SkippedSteps(max_in_a_row=0)
    with pytest.raises(TrainingError, match=r"samples: 0, 1, 2, .*, 19 and 980 more, in the skip lines of the journal"):
        skipped.check(1, finite=False, samples=list(range(1000)))


# -- what is left behind ------------------------------------------------------------------------------------------


def test_the_outcome_is_one_word_until_the_next_attempt(tmp_path):
    assert read_outcome(tmp_path) is None
    write_outcome(tmp_path, "requeue")
    write_outcome(tmp_path, "finished")
    assert (tmp_path / "outcome").read_text() == "finished\n"
    assert read_outcome(tmp_path) == "finished"
    clear_outcome(tmp_path)
    clear_outcome(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("def reads_a_store():\n    raise RuntimeError('no such shard')\nreads_a_store()", 1, "no such shard"),
        ("def reads_a_store():\n    os.kill(os.getpid(), 11)\nreads_a_store()", -11, "Segmentation fault"),
    ],
)
def test_what_ends_a_rank_without_a_word_of_its_own_is_in_its_log(start, tmp_path, end, code, words):
    process = start(f"record_crashes(run_dir / 'logs' / 'rank-0000.log')\nready()\n{end}")
    error = process.communicate(timeout=10)[1]
    assert process.returncode == code
    log = (tmp_path / "logs" / "rank-0000.log").read_text()
    assert words in log
    assert "in reads_a_store" in log
    if code == 1:
        assert error == log


@pytest.mark.processes
def test_a_log_that_is_standard_error_already_says_everything_once(start, tmp_path):
    script = """
log = run_dir / "rank-0001.log"
os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
record_crashes(log)
with Watchdog(0.3, [log]):
    ready()
    time.sleep(60)
"""
    assert start(script).wait(10) == 5
    assert (tmp_path / "rank-0001.log").read_text().count("made no progress") == 1


@pytest.mark.processes
def test_sigusr2_shows_what_a_rank_is_doing_and_ends_nothing(start, tmp_path):
    process = start("record_crashes(run_dir / 'rank.log')\ndef waits():\n    time.sleep(60)\nready()\nwaits()")
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    deadline = time.monotonic() + 5
    while "in waits" not in (tmp_path / "rank.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.poll() is None
