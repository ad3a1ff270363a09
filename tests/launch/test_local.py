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

import pytest

from cctrain.launch.local import rank_environment, run_ranks

LAUNCHER = """
import sys
from pathlib import Path
sys.path.append(sys.argv[2])
from cctrain.launch.local import run_ranks
sys.exit(run_ranks([], 2, Path(sys.argv[1])))
"""
REPOSITORY = Path(__file__).parents[2]


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


def start_in_own_group(run_dir: Path) -> subprocess.Popen:
    """The launcher as a terminal starts it; returns when both ranks wait."""
    launcher = subprocess.Popen(
        [sys.executable, "-P", "-c", LAUNCHER, str(run_dir), str(REPOSITORY)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 20
    while not all((run_dir.parent / f"waiting-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    time.sleep(0.1)
    return launcher


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


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


def test_a_rank_that_ignores_the_end_is_killed(program, run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("cctrain.launch.local.SECONDS_TO_LEAVE", 1.0)
    program(
        "if rank == 0:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    wait()\n"
        "while not (here / 'waiting-0').exists():\n    time.sleep(0.05)\nsys.exit(4)"
    )
    assert run_ranks([], 2, run_dir) == 4
    assert not alive(int((tmp_path / "waiting-0").read_text()))


def test_ctrl_c_lets_the_ranks_finish_their_last_words_and_ends_with_130(program, run_dir, tmp_path):
    program(
        "try:\n    wait()\nexcept KeyboardInterrupt:\n    time.sleep(1)\n"
        "    (here / f'left-{rank}').touch()\n    sys.exit(130)"
    )
    launcher = start_in_own_group(run_dir)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(15) == 130
    assert (tmp_path / "left-0").exists()
    assert (tmp_path / "left-1").exists()


def test_a_terminated_launcher_leaves_no_ranks_behind(program, run_dir, tmp_path):
    program("wait()")
    launcher = start_in_own_group(run_dir)
    launcher.terminate()
    assert launcher.wait(15) == 128 + signal.SIGTERM
    for rank in (0, 1):
        assert not alive(int((tmp_path / f"waiting-{rank}").read_text()))
