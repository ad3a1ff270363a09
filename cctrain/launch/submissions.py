"""What has been submitted for a run, in RUN/submission.json, and what Slurm says of its jobs."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from cctrain.errors import UsageError
from cctrain.run_directory import write_atomically

RECORD = "submission.json"
# In any other state a job will run, runs, or still holds its nodes.
_OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
# What squeue is asked for, by our own names. `start` of a pending job is an estimate.
_COLUMNS = {"job": "%i", "state": "%T", "reason": "%r", "nodes": "%N", "num_nodes": "%D", "left": "%L", "start": "%S"}


def read_submissions(run_dir: Path) -> list[dict[str, Any]]:
    """All of them, the newest last; [] where nothing was submitted."""
    path = run_dir / RECORD
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["submissions"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}): move it away; the jobs' numbers are in RUN/logs") from error


def record_submission(run_dir: Path, submission: dict[str, Any]) -> None:
    content = {"submissions": [*read_submissions(run_dir), submission]}
    write_atomically(run_dir / RECORD, json.dumps(content, indent=2).encode() + b"\n")


def jobs_of(submissions: list[dict[str, Any]]) -> list[str]:
    return [job for submission in submissions for job in submission["jobs"]]


def ask_slurm(jobs: list[str]) -> list[dict[str, Any]]:
    """The jobs that Slurm remembers, which it does for some minutes after their end."""
    if not jobs:
        return []
    words = "|".join(_COLUMNS.values())
    # squeue refuses the whole list where one number is unknown to it, if it is the only one.
    done = slurm("squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", f"--format={words}")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UsageError(f"Slurm does not answer: {done.stderr.strip() or f'squeue ended with {done.returncode}'}")
    rows = [line.strip().split("|") for line in done.stdout.splitlines()]
    return [dict(zip(_COLUMNS, row, strict=True)) for row in rows if len(row) == len(_COLUMNS)]


def is_over(job: dict[str, Any]) -> bool:
    return job["state"] in _OVER


def require(command: str) -> None:
    if shutil.which(command) is None:
        raise UsageError(f"{command} is not here: call this where Slurm is, on a login node")


def slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; UsageError where there are none."""
    require(command[0])
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{command[0]} gave no answer within 120 s: is Slurm's controller up?") from error
