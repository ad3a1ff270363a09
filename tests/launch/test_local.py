"""The launcher itself, with ranks that are small programs in place of a training: `python -m cctrain` finds them
first, because a folder with a module of that name is the current one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cctrain.launch.local import rank_environment, run_ranks

LAUNCHER = """
import json, sys
from pathlib import Path
sys.path.append(sys.argv[2])
from cctrain.launch import local
for name, value in json.loads(sys.argv[3]).items():
    setattr(local, name, value)
sys.exit(local.run_ranks([], 2, Path(sys.argv[1])))
"""
REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.processes


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a script what the ranks run; `rank`, `here` (a folder) and `wait()` are defined in it."""

    def write(script: str) -> None:
        folder = tmp_path / "ranks" / "cctrain"
        folder.mkdir(parents=True)
        head = (
            "import os, signal, sys, time\nfrom pathlib import Path\n"
            f"rank, here = int(os.environ['RANK']), Path({str(tmp_path)!r})\n"
            "def wait():\n    (here / f'waiting-{rank}').write_text(str(os.getpid()))\n    time.sleep(60)\n"
        )
        (folder / "__main__.py").write_text(head + script)
        monkeypatch.chdir(folder.parent)

    return write


def start_in_own_group(run_dir: Path, **settings: float) -> subprocess.Popen:
    """The launcher as a terminal starts it; returns when both ranks wait."""
    launcher = subprocess.Popen(
        [sys.executable, "-P", "-c", LAUNCHER, str(run_dir), str(REPOSITORY), json.dumps(settings)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: all((run_dir.parent / f"waiting-{rank}").exists() for rank in (0, 1)))
    time.sleep(0.1)
    return launcher


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pids_of_ranks(folder: Path) -> list[int]:
    return [int((folder / f"waiting-{rank}").read_text()) for rank in (0, 1)]


def assert_no_ranks_are_left(folder: Path) -> None:
    wait_until(lambda: not any(alive(pid) for pid in pids_of_ranks(folder)))


def alive(pid: int) -> bool:
    """A zombie, whose parent has not asked yet how it ended, is not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ranks_find_themselves_and_their_share_of_the_cores(program, run_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program("import json\n(here / f'{rank}.json').write_text(json.dumps([sys.argv[1:], dict(os.environ)]))")
    assert run_ranks(["train", "a.yaml"], 2, run_dir) == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank, (arguments, environment) in enumerate(found):
        assert arguments == ["train", "a.yaml"]
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["OMP_NUM_THREADS"] == str(threads)
    assert found[0][1]["MASTER_PORT"] == found[1][1]["MASTER_PORT"]


def test_a_choice_of_threads_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert rank_environment(0, 2, 1234)["OMP_NUM_THREADS"] == "3"


def test_a_rank_that_fails_ends_the_others_and_shows_its_last_lines(program, run_dir, tmp_path, capfd):
    program("if rank == 1:\n    print('no such gene', file=sys.stderr)\n    sys.exit(3)\nwait()")
    started = time.monotonic()
    assert run_ranks([], 2, run_dir) == 3
    assert time.monotonic() - started < 10
    shown = capfd.readouterr().err
    assert "rank 1 ended with exit code 3" in shown
    assert "no such gene" in shown
    assert (run_dir / "logs" / "rank-0001.log").read_text() == "no such gene\n"
    assert not (run_dir / "logs" / "rank-0000.log").exists()
    assert not alive(int((tmp_path / "waiting-0").read_text()))


def test_a_rank_that_is_killed_is_a_failed_training(program, run_dir, capfd):
    program("if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\nwait()")
    assert run_ranks([], 2, run_dir) == 5
    assert "rank 1 ended with signal SIGKILL" in capfd.readouterr().err


def test_the_rank_with_the_cause_is_shown_and_not_the_one_that_lost_its_connection(program, run_dir, capfd):
    program("if rank == 1:\n    print('the store is damaged', file=sys.stderr)\nsys.exit(3 if rank else 1)")
    assert run_ranks([], 2, run_dir) == 3
    assert "the store is damaged" in capfd.readouterr().err


def test_a_common_error_is_told_once_by_the_first_rank(program, run_dir, capfd):
    program("print('a misspelt key', file=sys.stderr)\ntime.sleep(0 if rank else 0.5)\nsys.exit(2)")
    assert run_ranks([], 2, run_dir) == 2
    assert capfd.readouterr().err.count("a misspelt key") == 1


def test_a_rank_that_does_not_end_with_the_others_is_killed_within_seconds(program, run_dir, tmp_path):
    program(
        "if rank == 0:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    wait()\n"
        "while not (here / 'waiting-0').exists():\n    time.sleep(0.05)\nsys.exit(4)"
    )
    started = time.monotonic()
    assert run_ranks([], 2, run_dir) == 4
    assert time.monotonic() - started < 6
    assert not alive(int((tmp_path / "waiting-0").read_text()))


def test_a_rank_that_is_killed_first_writes_the_stacks_of_its_threads(program, run_dir, capfd):
    program(
        "import faulthandler\nfaulthandler.register(signal.SIGUSR2)\n"
        "if rank == 1:\n    wait()\n"
        "while not (here / 'waiting-1').exists():\n    time.sleep(0.05)\nsys.exit(4)"
    )
    assert run_ranks([], 2, run_dir) == 4
    assert "in wait" in (run_dir / "logs" / "rank-0001.log").read_text()


def test_a_killed_rank_is_the_cause_and_the_errors_of_the_others_are_not(program, run_dir, capfd):
    program("if rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.5)\nsys.exit(5)")
    assert run_ranks([], 2, run_dir) == 5
    assert "rank 1 ended with signal SIGKILL" in capfd.readouterr().err


def test_the_death_of_the_first_rank_is_told_too(program, run_dir, capfd):
    program("if rank == 0:\n    os.kill(os.getpid(), signal.SIGKILL)\nwait()")
    assert run_ranks([], 2, run_dir) == 5
    assert "rank 0 ended with signal SIGKILL" in capfd.readouterr().err


def test_logs_are_appended_and_only_the_new_lines_are_shown(program, run_dir, capfd):
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "logs" / "rank-0001.log").write_text("of the attempt before\n")
    program("if rank == 1:\n    print('of this one', file=sys.stderr)\n    sys.exit(3)\nwait()")
    assert run_ranks([], 2, run_dir) == 3
    assert (run_dir / "logs" / "rank-0001.log").read_text() == "of the attempt before\nof this one\n"
    shown = capfd.readouterr().err
    assert "of this one" in shown
    assert "of the attempt before" not in shown


# Notes each signal, and leaves in order a second after the first one.
SAVES = """
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))
(here / f'waiting-{rank}').write_text(str(os.getpid()))
while not got:
    time.sleep(0.05)
time.sleep(1)
(here / f'got-{rank}').write_text(' '.join(got))
sys.exit(130 if 'SIGINT' in got else 0)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_to_stop_is_passed_on_once_and_the_ranks_may_save(program, run_dir, tmp_path, number):
    program(SAVES)
    launcher = start_in_own_group(run_dir)
    launcher.send_signal(number)
    assert launcher.wait(15) == 0
    assert [(tmp_path / f"got-{rank}").read_text() for rank in (0, 1)] == [number.name] * 2


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the launcher", "as a terminal does"])
def test_ctrl_c_reaches_each_rank_exactly_once_and_ends_with_130(program, run_dir, tmp_path, send):
    program(SAVES)
    launcher = start_in_own_group(run_dir)
    send(launcher.pid, signal.SIGINT)
    assert launcher.wait(15) == 130
    assert [(tmp_path / f"got-{rank}").read_text() for rank in (0, 1)] == ["SIGINT"] * 2


def test_the_warning_of_a_time_limit_and_its_end_are_both_passed_on(program, run_dir, tmp_path):
    program(SAVES)
    launcher = start_in_own_group(run_dir)
    launcher.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    launcher.terminate()
    assert launcher.wait(15) == 0
    assert (tmp_path / "got-1").read_text() == "SIGUSR1 SIGTERM"


def test_the_ranks_have_as_long_as_they_need_to_save(program, run_dir, tmp_path):
    program(SAVES.replace("time.sleep(1)", "time.sleep(4 if rank else 0.5)"))
    launcher = start_in_own_group(run_dir)
    launcher.terminate()
    assert launcher.wait(15) == 0
    assert (tmp_path / "got-1").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_request_ends_ranks_that_do_not_leave(program, run_dir, tmp_path, number):
    program("for number in (2, 15):\n    signal.signal(number, lambda *_: None)\nwait()")
    launcher = start_in_own_group(run_dir)
    launcher.send_signal(number)
    time.sleep(0.7)
    assert launcher.poll() is None
    launcher.send_signal(number)
    assert launcher.wait(15) == 128 + number
    assert_no_ranks_are_left(tmp_path)


def test_ctrl_c_that_a_wrapper_passes_on_as_well_is_one_ctrl_c(program, run_dir, tmp_path):
    program(SAVES)
    launcher = start_in_own_group(run_dir)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.15)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(15) == 130
    assert (tmp_path / "got-0").read_text() == "SIGINT"


def test_ranks_that_are_not_ready_for_a_signal_end_by_it(program, run_dir, tmp_path):
    program("if rank == 0:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwait()")
    launcher = start_in_own_group(run_dir)
    launcher.terminate()
    assert launcher.wait(15) == 128 + signal.SIGTERM
    assert launcher.stderr.read() == ""
    assert_no_ranks_are_left(tmp_path)


def test_a_rank_that_ctrl_c_met_alone_does_not_keep_the_others(program, run_dir, tmp_path):
    program("signal.signal(2, (lambda *_: None) if rank == 0 else (lambda *_: sys.exit(130)))\nwait()")
    launcher = start_in_own_group(run_dir, SECONDS_TO_FOLLOW=1.0)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(15) == 130
    assert_no_ranks_are_left(tmp_path)


def test_ranks_end_with_a_launcher_that_is_killed(program, run_dir, tmp_path):
    program("for number in (2, 15):\n    signal.signal(number, signal.SIG_IGN)\nwait()")
    launcher = start_in_own_group(run_dir)
    launcher.kill()
    launcher.wait()
    assert_no_ranks_are_left(tmp_path)


def test_ctrl_z_stops_the_ranks_with_the_launcher(program, run_dir, tmp_path):
    program(SAVES)
    launcher = start_in_own_group(run_dir)
    pids = [launcher.pid, *pids_of_ranks(tmp_path)]
    launcher.send_signal(signal.SIGTSTP)
    wait_until(lambda: all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in pids))
    launcher.send_signal(signal.SIGCONT)
    wait_until(lambda: all(psutil.Process(pid).status() != psutil.STATUS_STOPPED for pid in pids))
    launcher.terminate()
    assert launcher.wait(15) == 0
