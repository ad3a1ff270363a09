"""Killed with SIGKILL at random moments and resumed by the same command, a run ends as an undisturbed one, bit for bit.

`tools/chaos.sh --kills 100` is the long version. A failure prints its seed and every kill.
"""

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cctrain.tracking.journal import Journal
from cctrain.tracking.projection import project
from tools.chaos import ALL, KINDS, Kind, chaos, into_save, plan_kills
from tools.chaos_attempt import BEFORE_FIRST, EVERY, IN_SAVE


def check(result: dict[str, Any], kills: int) -> None:
    assert result["faults"] == []
    assert result["verdict"] == f"{kills} of {kills}"
    assert result["by_phase"][IN_SAVE]["kills"] >= 1
    assert result["by_phase"][BEFORE_FIRST]["kills"] >= 1


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.representative
def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    check(chaos(tmp_path, [Kind(3, "bf16")], kills=3, steps=20), 3)


@pytest.mark.slow
@pytest.mark.processes
def test_runs_of_every_kind_killed_at_random_moments_end_as_the_undisturbed_ones(tmp_path: Path) -> None:
    check(chaos(tmp_path, KINDS, kills=12, steps=40), 12)


def test_every_plan_has_a_kill_before_the_first_checkpoint_and_one_inside_a_save() -> None:
    for seed in range(200):
        kills = 2 + seed % 30
        plan = plan_kills(kills, 60, random.Random(seed))
        assert len(plan) == kills
        assert plan[0].moment == "step"
        assert plan[0].step < EVERY - 2
        assert any(kill == into_save(kill) and kill.victim == ALL for kill in plan[1:])
        assert all(0 <= kill.share < 1 and kill.step <= 60 for kill in plan)
        assert plan == plan_kills(kills, 60, random.Random(seed))


def test_a_kill_while_mlflow_makes_its_database_leaves_no_half_made_one(tmp_path: Path) -> None:
    run_dir, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    journal = Journal(run_dir)
    journal.write("start", 0, run="a run")
    journal.close()
    script = (
        "from pathlib import Path\nfrom cctrain.tracking.projection import project\n"
        f"project(Path({str(run_dir)!r}), {uri!r}, 'cctrain')"
    )
    training = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    # Of its 900 kB, whose tables MLflow makes one after the other.
    while training.poll() is None and not any(file.stat().st_size > 300_000 for file in tmp_path.rglob("*.db")):
        time.sleep(0.002)
    training.kill()
    assert training.wait() != 0
    assert not (tmp_path / "mlflow.db").exists()
    assert project(run_dir, uri, "cctrain")["run_id"]
