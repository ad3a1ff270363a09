"""Processes that measure this machine, and what is made of how they end."""

from pathlib import Path

import pytest

from cctrain.apply import calibrate
from cctrain.apply.calibrate import on_local_ranks
from cctrain.errors import TrainingError

RANK = "import json, os, sys\n"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "measuring.py"


@pytest.mark.processes
def test_the_first_rank_answers_and_may_abort_when_it_has(module: Path):
    answer = "print('words')\nprint(json.dumps({'rank': os.environ['RANK'], 'given': sys.argv[1]}), flush=True)\n"
    module.write_text(RANK + answer + "os.abort()\n")
    assert on_local_ranks("measuring", "this", 2) == {"rank": "0", "given": "this"}


@pytest.mark.processes
@pytest.mark.parametrize("rank", [0, 1])
def test_without_an_answer_the_rank_that_failed_is_quoted(module: Path, rank: int):
    module.write_text(RANK + f"print('no answer')\nif os.environ['RANK'] == '{rank}':\n    sys.exit('out of paper')\n")
    with pytest.raises(TrainingError, match=r"^this machine could not be measured:\nout of paper$"):
        on_local_ranks("measuring", "this", 2)


@pytest.mark.processes
def test_ranks_that_wait_for_one_that_was_killed_are_ended_and_the_likely_reason_is_told(module: Path, monkeypatch):
    monkeypatch.setattr(calibrate, "SECONDS_FOR_THE_OTHERS", 0.2)
    killed = "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    module.write_text(f"{RANK}import signal, time\n{killed}time.sleep(1000)\n")
    with pytest.raises(TrainingError, match="a rank was killed: out of memory, most likely"):
        on_local_ranks("measuring", "this", 2)


@pytest.mark.processes
def test_a_rank_that_has_much_to_say_is_not_held_up(module: Path):
    """Of a pipe that nobody reads 65,536 bytes would be too many."""
    module.write_text(RANK + "sys.stderr.write('words ' * 100_000)\nprint(json.dumps({'rank': os.environ['RANK']}))\n")
    assert on_local_ranks("measuring", "this", 2) == {"rank": "0"}
