"""Who may train in a run directory: real processes, and files that holders on other machines would have left."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cctrain import run_lock
from cctrain.errors import UsageError
from cctrain.run_lock import LEASE_SECONDS, LOCK, hold_run, myself

# Holds the run when it is told to; says so; lets go when its standard input ends. Arguments: the run, settings.
HOLDER = """
import json, sys
from pathlib import Path
from cctrain import run_lock
from cctrain.errors import UsageError
for name, value in json.loads(sys.argv[2]).items():
    setattr(run_lock, name, value)
print("ready", flush=True)
sys.stdin.readline()
try:
    with run_lock.hold_run(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except UsageError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
QUICK = {"SECONDS_TO_DIE": 0.3, "SECONDS_BETWEEN_TRIES": 0.05}

pytestmark = pytest.mark.processes


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def ready(run_dir: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a process that holds the run once it gets a line."""
    processes: list[subprocess.Popen] = []

    def ready(settings: dict[str, float] = QUICK, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(run_dir), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=os.environ | environment,
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield ready
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def start(ready: Callable[..., subprocess.Popen]) -> Callable[..., subprocess.Popen]:
    """Starts a process that tries to hold the run at once."""

    def start(*arguments: object, **environment: str) -> subprocess.Popen:
        process = ready(*arguments, **environment)
        process.stdin.write("\n")
        return process

    return start


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUICK.items():
        monkeypatch.setattr(run_lock, name, value)


def left_by(run_dir: Path, seconds_ago: float, **fields: object) -> Path:
    """A lock that nobody on this machine holds, renewed the last time so long ago."""
    run_dir.mkdir(exist_ok=True)
    path = run_dir / LOCK
    fields = {"host": "node7", "machine": "another", "pid": 4711, "since": "2026-01-01T00:00:00+00:00"} | fields
    path.write_text(json.dumps(fields))
    set_age(path, seconds_ago)
    return path


def set_age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def assert_taken_within(run_dir: Path, seconds: float) -> None:
    started = time.monotonic()
    with hold_run(run_dir):
        assert time.monotonic() - started < seconds
        assert json.loads((run_dir / LOCK).read_text())["pid"] == os.getpid()
    assert not (run_dir / LOCK).exists()


def test_a_second_training_is_told_who_holds_the_run_and_what_to_do(run_dir, start):
    first = start(SLURM_JOB_ID="815")
    assert first.stdout.readline() == "held\n"
    second = start()
    message = second.communicate(timeout=20)[1]
    assert second.returncode == 2
    assert f"process {first.pid} on {os.uname().nodename} (Slurm job 815), since 20" in message
    assert str(run_dir) in message
    assert f"touch {run_dir / 'stop'}" in message
    assert json.loads((run_dir / LOCK).read_text())["pid"] == first.pid


def test_the_lock_is_gone_when_the_training_has_ended(run_dir, start):
    first = start()
    assert first.stdout.readline() == "held\n"
    first.communicate(timeout=10)
    assert first.returncode == 0
    assert list(run_dir.iterdir()) == []


def test_a_holder_that_was_killed_does_not_delay_the_next_one(run_dir, start):
    first = start()
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    assert (run_dir / LOCK).exists()
    assert_taken_within(run_dir, 1.0)


def test_a_restart_may_begin_before_the_killed_holder_has_quite_ended(run_dir, start, monkeypatch):
    monkeypatch.setattr(run_lock, "SECONDS_BETWEEN_TRIES", 0.05)
    first = start()
    assert first.stdout.readline() == "held\n"
    ending = threading.Timer(1.0, first.kill)
    ending.start()
    assert_taken_within(run_dir, 3.0)
    ending.join()


@pytest.mark.parametrize("before", ["nothing", "a killed holder", "a lease that ran out"])
def test_of_processes_that_start_at_once_exactly_one_wins(run_dir, ready, start, before):
    if before == "a killed holder":
        first = start()
        assert first.stdout.readline() == "held\n"
        first.kill()
        first.wait()
    elif before == "a lease that ran out":
        left_by(run_dir, 2 * LEASE_SECONDS)
    many = [ready() for _ in range(6)]
    for process in many:
        process.stdin.write("\n")
    losers = [process for process in many if process.stdout.readline() != "held\n"]
    assert len(losers) == 5
    assert [process.wait(10) for process in losers] == [2] * 5
    (winner,) = set(many) - set(losers)
    assert json.loads((run_dir / LOCK).read_text())["pid"] == winner.pid
    assert [path.name for path in run_dir.iterdir()] == [LOCK]


def test_a_lease_that_ran_out_on_another_machine_is_taken_over_and_said(run_dir, caplog, monkeypatch):
    monkeypatch.setattr(run_lock, "SECONDS_TO_SETTLE", 0.2)
    left_by(run_dir, LEASE_SECONDS + 1)
    assert_taken_within(run_dir, 2.0)
    assert "process 4711 on node7, since 2026-01-01T00:00:00+00:00 ended without a word" in caplog.text


def test_a_young_lease_of_another_machine_is_waited_out(run_dir, quick, caplog, monkeypatch):
    monkeypatch.setattr(run_lock, "SECONDS_TO_SETTLE", 0.2)
    left_by(run_dir, LEASE_SECONDS - 2)
    started = time.monotonic()
    with hold_run(run_dir):
        assert time.monotonic() - started > 1.5
    assert "waiting until it is released" in caplog.text


def test_a_lock_that_is_released_while_one_waits_is_taken_at_once(run_dir, quick):
    path = left_by(run_dir, 0)
    release = threading.Timer(0.5, path.unlink)
    release.start()
    assert_taken_within(run_dir, 3.0)
    release.join()


def test_a_holder_on_another_machine_that_renews_its_lease_is_alive(run_dir, quick, monkeypatch):
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 1.5)
    path = left_by(run_dir, 0)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.1):
            os.utime(path)

    renewal = threading.Thread(target=renew)
    renewal.start()
    try:
        with pytest.raises(UsageError, match="process 4711 on node7"), hold_run(run_dir):
            pass
    finally:
        ended.set()
        renewal.join()
    assert json.loads(path.read_text())["host"] == "node7"


def test_a_clock_that_is_ahead_does_not_keep_a_dead_lease_alive(run_dir, quick, monkeypatch):
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "SECONDS_TO_SETTLE", 0.2)
    left_by(run_dir, -3600)
    assert_taken_within(run_dir, 3.0)


def test_a_requeued_job_takes_the_lock_of_its_earlier_start_at_once(run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "SECONDS_TO_SETTLE", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "815")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    left_by(run_dir, 0, job="815", restart=1)
    assert_taken_within(run_dir, 2.0)


def test_a_second_step_of_the_same_start_of_a_job_is_not_its_earlier_self(run_dir, quick, monkeypatch):
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "SECONDS_TO_SETTLE", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "815")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    left_by(run_dir, 0, job="815", restart=1)
    started = time.monotonic()
    with hold_run(run_dir):
        assert time.monotonic() - started > 0.9


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", b"[" * 60_000, b'{"pid": "many", "host": null}'])
def test_a_lock_that_says_nothing_is_judged_by_its_age(run_dir, content, quick, monkeypatch):
    monkeypatch.setattr(run_lock, "SECONDS_TO_SETTLE", 0.1)
    run_dir.mkdir()
    (run_dir / LOCK).write_bytes(content)
    set_age(run_dir / LOCK, LEASE_SECONDS + 1)
    assert_taken_within(run_dir, 1.0)


def test_the_lease_is_renewed_while_the_run_is_held(run_dir, monkeypatch):
    monkeypatch.setattr(run_lock, "SECONDS_BETWEEN_RENEWALS", 0.05)
    with hold_run(run_dir):
        set_age(run_dir / LOCK, 1000)
        deadline = time.monotonic() + 5
        while time.time() - (run_dir / LOCK).stat().st_mtime > 100:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_holder_whose_lock_was_taken_over_leaves_at_once(run_dir, start):
    first = start({"SECONDS_BETWEEN_RENEWALS": 0.1})
    assert first.stdout.readline() == "held\n"
    usurper = run_dir / "usurper"
    usurper.write_text(json.dumps({"token": "other", "host": "node8", "pid": 12}))
    usurper.rename(run_dir / LOCK)
    assert first.wait(10) == 2
    assert "now belongs to another training (process 12 on node8" in first.stderr.read()
    assert (run_dir / LOCK).exists()


def test_a_read_only_directory_is_named(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(run_dir)]
    if os.geteuid() != 0:
        run_dir.chmod(0o555)
    elif subprocess.run(mount, capture_output=True).returncode:
        assert "CI" not in os.environ, "CI may mount a file system"
        pytest.skip("this machine mounts nothing")
    try:
        with pytest.raises(UsageError, match=f"cannot write in the run directory {run_dir}: "), hold_run(run_dir):
            pass
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(run_dir)], check=True)
        else:
            run_dir.chmod(0o755)


def test_a_file_in_place_of_the_directory_is_named(run_dir):
    run_dir.write_text("")
    with pytest.raises(UsageError, match=str(run_dir)), hold_run(run_dir):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_suspended_holder_still_holds(run_dir, start, number):
    first = start()
    assert first.stdout.readline() == "held\n"
    os.kill(first.pid, signal.SIGSTOP)
    set_age(run_dir / LOCK, 1)
    second = start()
    assert second.wait(20) == 2
    os.kill(first.pid, number)
    os.kill(first.pid, signal.SIGCONT)
    first.wait(10)


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """A file system without flock cannot be had here: its answer is given for it."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(run_lock, "SECONDS_TO_SETTLE", 0.1)


def test_without_flock_a_living_process_holds_the_run(run_dir, start, no_flock):
    first = start()
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=f"process {first.pid} "), hold_run(run_dir):
        pass


def test_without_flock_a_dead_process_does_not_hold_the_run(run_dir, start, no_flock):
    first = start()
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    assert_taken_within(run_dir, 1.0)


def test_without_flock_another_process_with_the_holders_number_does_not_hold_the_run(run_dir, no_flock):
    me = myself()
    left_by(run_dir, 0, machine=me.machine, pid_space=me.pid_space, pid=os.getppid(), started=me.started - 1e6)
    assert_taken_within(run_dir, 1.0)


def test_without_flock_a_process_of_another_container_is_judged_by_its_lease(run_dir, no_flock, monkeypatch):
    monkeypatch.setattr(run_lock, "LEASE_SECONDS", 1.0)
    left_by(run_dir, 0, machine=myself().machine, pid_space="pid:[1]", pid=2)
    started = time.monotonic()
    with hold_run(run_dir):
        assert time.monotonic() - started > 0.9
