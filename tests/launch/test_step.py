"""From Slurm's numbers of a task to those of a rank."""

import json
import subprocess
import sys

import pytest

from cctrain.errors import UsageError
from cctrain.launch.step import adopt_step, tasks_per_node

STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "a[1-2]",
}
SHOW = """
import json, os
from cctrain.launch.step import adopt_step
adopt_step()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
print(json.dumps([os.environ[name] for name in names]))
"""


def test_tasks_per_node_in_slurms_short_form():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]
    with pytest.raises(UsageError, match="set RANK"):
        tasks_per_node("some")


def test_what_the_batch_script_has_set_is_kept():
    environment = STEP | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    adopt_step(environment)
    found = {name: environment[name] for name in environment.keys() - STEP.keys()}
    assert found == {
        "RANK": "2",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "29500",
    }


@pytest.mark.parametrize("change", [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_ranks_of_another_launcher_and_lone_processes_are_left_alone(change):
    environment = STEP | change
    before = dict(environment)
    adopt_step(environment)
    assert environment == before


def test_outside_of_a_step_nothing_is_adopted():
    batch_shell = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    before = dict(batch_shell)
    adopt_step(batch_shell)
    assert batch_shell == before


def test_without_scontrol_the_name_of_a_single_node_serves_and_of_several_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = STEP | {"SLURM_STEP_NODELIST": "a1", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0"}
    adopt_step(environment)
    assert environment["MASTER_ADDR"] == "a1"
    with pytest.raises(UsageError, match="set MASTER_ADDR"):
        adopt_step(dict(STEP))


@pytest.mark.slurm
def test_under_plain_srun_every_task_finds_its_rank_and_all_the_same_address(cluster):
    command = ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", sys.executable, "-c", SHOW]
    done = subprocess.run(command, env=cluster, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert [rank[:5] for rank in found] == [[str(rank), "4", str(rank % 2), "2", "127.0.0.1"] for rank in range(4)]
    assert len({rank[5] for rank in found}) == 1
