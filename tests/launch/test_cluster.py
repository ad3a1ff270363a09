"""Whole lives of jobs on a real Slurm of two nodes, started by `cctrain submit`, each compared with a run that
nobody disturbed."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.launch.conftest import (
    Lab,
    attempts_of,
    batch_log,
    last_step,
    logs_of,
    measured,
    write_profile,
)

STEPS = 200
TWO_BY_TWO = ("--nodes=2", "--ranks-per-node=2")
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> Path:
    """The same training on as many ranks of this machine, without Slurm."""
    run_dir = lab.folder / "runs" / "undisturbed"
    words = ("-m", "cctrain", "train", "tiny.yaml", f"run.dir={run_dir}", f"training.steps={STEPS}", "--ranks=4")
    environment = lab.environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": "0"}
    done = Lab(lab.folder, environment).run(sys.executable, *words)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.representative
def test_two_nodes_of_two_ranks_train_to_the_end(lab):
    run_dir, [job] = lab.submit("whole", "training.steps=20", "evaluation.every=10", *TWO_BY_TWO)
    assert lab.wait_for_end(job, run_dir) == "0:0", logs_of(run_dir)
    found = lab.cctrain("jobs", str(run_dir))
    assert (found["jobs"][0]["state"], found["jobs"][0]["num_nodes"]) == ("COMPLETED", 2)
    assert (found["step"], found["steps"], found["checkpoint"]) == (20, 20, "step-00000020")
    assert found["outcome"] == "finished"
    assert [line["world_size"] for line in attempts_of(run_dir)] == [4]
    said = batch_log(run_dir, job)
    assert "preflight: 4 ranks on n1, n2" in said
    assert "preflight: an all-reduce over 4 ranks was right" in said
    assert "other code" not in said
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [
        *(f"rank-000{rank}.log" for rank in range(4)),
        f"slurm-{job}.log",
    ]
    assert (run_dir / "logs" / "rank-0000.log").read_text().count("weights: ") == 1


def test_at_the_time_limit_a_run_saves_requeues_itself_and_resumes_to_the_same_end(lab, undisturbed):
    run_dir, [job] = lab.submit("limit", f"training.steps={STEPS}", "--time=30", *TWO_BY_TWO)
    lab.wait_for_step(run_dir, 20)
    # Slurm itself now finds that little is left, and signals; but it looks only every half minute, so time stops.
    lab.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    rank = process_of_rank_1(run_dir)
    os.kill(rank, signal.SIGSTOP)
    lab.wait("the signal", lambda: "the time limit is near" in batch_log(run_dir, job), run_dir)
    os.kill(rank, signal.SIGCONT)
    lab.start_requeued(job, run_dir)
    lab.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    saved = last_step(run_dir)
    assert 20 <= saved < STEPS, "the run was not met in its middle"
    assert lab.wait_for_end(job, run_dir) == "0:0", logs_of(run_dir)
    assert [line["step"] for line in attempts_of(run_dir)] == [0, saved]
    assert measured(run_dir) == measured(undisturbed)
    said = batch_log(run_dir, job)
    assert "the time limit is near" in said
    assert f"requeued to go on from step-{saved:08d}" in said
    assert "start 2, on n[1-2]" in said


def test_a_preempted_run_saves_within_the_grace_time_and_resumes_to_the_same_end(lab, undisturbed):
    run_dir, [job] = lab.submit("preempted", f"training.steps={STEPS}", *TWO_BY_TWO)
    lab.wait_for_step(run_dir, 20)
    urgent = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    lab.slurm("sbatch", *urgent)
    lab.start_requeued(job, run_dir)
    saved = last_step(run_dir)
    assert 20 <= saved < STEPS, "the run was not met in its middle"
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{saved:08d}\n"
    assert lab.wait_for_end(job, run_dir) == "0:0", logs_of(run_dir)
    assert [line["step"] for line in attempts_of(run_dir)] == [0, saved]
    assert measured(run_dir) == measured(undisturbed)


def test_a_run_resumes_on_one_node_when_the_other_is_drained(lab, undisturbed):
    run_dir, [job] = lab.submit("drained", f"training.steps={STEPS}", "--nodes=1-2", "--ranks-per-node=2")
    lab.wait_for_step(run_dir, 20)
    lab.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        lab.slurm("scancel", "--batch", "--signal=USR1", job)
        lab.start_requeued(job, run_dir)
        saved = last_step(run_dir)
        assert 20 <= saved < STEPS - 20, "the run was not met in its middle"
        assert lab.wait_for_end(job, run_dir) == "0:0", logs_of(run_dir)
    finally:
        lab.slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert [(line["step"], line["world_size"]) for line in attempts_of(run_dir)] == [(0, 4), (saved, 2)]
    ours, theirs = ([line for line in measured(path) if line["event"] == "step"] for path in (run_dir, undisturbed))
    assert ours[:saved] == theirs[:saved]
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    next_losses = [[line["loss"] for line in lines[saved : saved + 20]] for lines in (ours, theirs)]
    np.testing.assert_allclose(*next_losses, rtol=1e-5)


def test_a_preflight_that_fails_on_one_node_names_it_and_nothing_is_trained(lab):
    """Two faults of node n2: it sees another folder in place of the run directory, and runs other code."""
    other = lab.folder / "other"
    wrapper = lab.folder / "only_on_n2.sh"
    wrapper.write_text(
        '[[ $SLURMD_NODENAME == n2 ]] || exec "$@"\n'
        f"export PYTHONPATH={other}\n"
        'exec unshare --mount bash -c \'mount -t tmpfs none "$0" && mkdir "$0/slurm" && exec "$@"\' '
        f'{lab.folder}/runs/bad "$@"\n'
    )
    write_profile(lab.folder / "bad.yaml", prefix=f"bash {wrapper}")
    package = Path(__file__).parents[2] / "cctrain"
    lab.slurm("mkdir", str(other))
    lab.slurm("cp", "-r", str(package), str(other))
    with open(other / "cctrain" / "config.py", "a") as file:
        file.write("# changed\n")
    run_dir, [job] = lab.submit("bad", "training.steps=20", *TWO_BY_TWO, "--profile=bad.yaml")
    assert lab.wait_for_end(job, run_dir) == "5:0", logs_of(run_dir)
    said = batch_log(run_dir, job)
    assert "nothing is trained, because of node n2:" in said
    assert "n2: has other code of cctrain than was submitted" in said
    assert f"n2: {run_dir}/slurm is not the folder that the first node sees" in said
    assert "  n1: " not in said
    assert "--exclude=n2" in said
    assert "the preflight has failed, so nothing was trained" in said
    assert not (run_dir / "metrics.jsonl").exists()


def test_the_jobs_of_a_chain_follow_each_other_and_leave_at_once_when_all_is_done(lab, undisturbed):
    run_dir, jobs = lab.submit("chain", f"training.steps={STEPS}", *TWO_BY_TWO, "--chain=3")
    first, second, third = jobs
    again = lab.run(sys.executable, "-m", "cctrain", "submit", "tiny.yaml", f"run.dir={run_dir}", "--profile=test.yaml")
    assert again.returncode == 2
    assert "two jobs cannot train one run" in again.stderr
    lab.wait_for_step(run_dir, 20)
    assert lab.show(second, "Reason") == "Dependency"
    lab.slurm("scancel", "--batch", "--signal=USR1", first)
    assert lab.wait_for_end(first, run_dir) == "0:0", logs_of(run_dir)
    saved = last_step(run_dir)
    assert saved < STEPS, "the run was not met in its middle"
    for job in (second, third):
        assert lab.wait_for_end(job, run_dir) == "0:0", logs_of(run_dir)
    assert [line["step"] for line in attempts_of(run_dir)] == [0, saved]
    assert measured(run_dir) == measured(undisturbed)
    assert "the next job of the chain goes on" in batch_log(run_dir, first)
    assert "the run has ended before this job began: finished" in batch_log(run_dir, third)


def test_a_killed_rank_fails_the_job_without_progress_and_requeues_it_with_some(lab, undisturbed):
    run_dir, [job] = lab.submit("killed", f"training.steps={STEPS}", "checkpoint.every=40", *TWO_BY_TWO)
    lab.wait_for_step(run_dir, 10)
    os.kill(process_of_rank_1(run_dir), signal.SIGKILL)  # as the kernel does when memory runs out
    assert lab.wait_for_end(job, run_dir) == "5:0", logs_of(run_dir)
    said = batch_log(run_dir, job)
    assert "not requeued: no checkpoint was written since this job started" in said
    assert "the end of" in said, "the last words of the ranks are missing"

    run_dir, [job] = lab.submit("killed", f"training.steps={STEPS}", "checkpoint.every=40", *TWO_BY_TWO)
    lab.wait("a checkpoint", lambda: (run_dir / "checkpoints" / "latest").exists(), run_dir)
    os.kill(process_of_rank_1(run_dir), signal.SIGKILL)  # as the kernel does when memory runs out
    lab.start_requeued(job, run_dir)
    assert lab.wait_for_end(job, run_dir) == "0:0", logs_of(run_dir)
    assert measured(run_dir) == measured(undisturbed)
    submissions = json.loads((run_dir / "submission.json").read_text())["submissions"]
    assert [Path(one["script"]).parent.name for one in submissions] == ["submission-1", "submission-2"]


def test_requeues_have_a_cap(lab):
    capped = Lab(lab.folder, lab.environment | {"CCTRAIN_MAX_REQUEUES": "0"})
    run_dir, [job] = capped.submit("capped", f"training.steps={STEPS}", *TWO_BY_TWO)
    lab.wait_for_step(run_dir, 5)
    lab.slurm("scancel", "--batch", "--signal=USR1", job)
    assert lab.wait_for_end(job, run_dir) == "1:0", logs_of(run_dir)
    assert "started again 0 times already, and CCTRAIN_MAX_REQUEUES is 0" in batch_log(run_dir, job)
    assert (run_dir / "outcome").read_text() == "requeue\n"


def test_a_cancelled_job_saves_is_not_requeued_and_resumes_when_submitted_again(lab, undisturbed):
    run_dir, [job] = lab.submit("cancelled", f"training.steps={STEPS}", *TWO_BY_TWO)
    lab.wait_for_step(run_dir, 20)
    assert lab.cctrain("jobs", str(run_dir), "--cancel")["cancelled"] == [job]
    lab.wait_for_end(job, run_dir)
    assert lab.show(job, "JobState") == "CANCELLED"
    assert "Slurm ends the job" in batch_log(run_dir, job)
    assert (run_dir / "outcome").read_text() == "requeue\n"
    saved = last_step(run_dir)
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{saved:08d}\n"
    _, [job] = lab.submit("cancelled", f"training.steps={STEPS}", *TWO_BY_TWO)
    assert lab.wait_for_end(job, run_dir) == "0:0", logs_of(run_dir)
    assert measured(run_dir) == measured(undisturbed)


def process_of_rank_1(run_dir: Path) -> int:
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
            words = (path.parent / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"SLURM_PROCID=1" in environment and b"train" in words and str(run_dir).encode() in b" ".join(words):
            return int(path.parent.name)
    raise AssertionError("rank 1 was not found")
