"""`cctrain jobs RUN`: what Slurm does with a run's jobs, how far the run is, and how to end or to read them."""

from pathlib import Path
from typing import Any

from cctrain.config import load_config
from cctrain.errors import UsageError
from cctrain.launch.submissions import ask_slurm, is_over, jobs_of, read_submissions, slurm
from cctrain.run_directory import CHECKPOINTS, CONFIG, LATEST
from cctrain.tracking.journal import history, read_journal
from cctrain.training.guards import read_outcome

TAIL_LINES, MOST_RANKS = 15, 8


def describe_jobs(run_dir: Path) -> dict[str, Any]:
    """jobs: those that Slurm remembers, the newest submission's last; and the run's last step, checkpoint, outcome."""
    submissions = _submissions(run_dir)
    jobs = ask_slurm(jobs_of(submissions))
    for job in jobs:
        job["num_nodes"] = int(job["num_nodes"])
        for key, nothing in {"reason": "None", "nodes": "", "left": "INVALID", "start": "N/A"}.items():
            job[key] = None if job[key] == nothing else job[key]
    return {
        "run": str(run_dir),
        "submissions": len(submissions),
        "jobs": jobs,
        "forgotten": [number for number in jobs_of(submissions) if number not in {job["job"] for job in jobs}],
        "step": max((line["step"] for line in history(read_journal(run_dir)) if line["event"] == "step"), default=0),
        "steps": _steps(run_dir, submissions),
        "checkpoint": _latest_name(run_dir),
        "outcome": read_outcome(run_dir),
        "resume": submissions[-1]["command"],
    }


def show_jobs(found: dict[str, Any]) -> str:
    lines = [_job_line(job) for job in found["jobs"]]
    if not lines:
        lines = [f"Slurm no longer knows the jobs of this run ({', '.join(found['forgotten'])})"]
    lines.append(
        f"step {found['step']:,} of {found['steps']:,}, latest checkpoint {found['checkpoint'] or 'none'}, "
        f"outcome {found['outcome'] or 'none (it runs, waits, or was killed)'}"
    )
    if not any(not is_over(job) for job in found["jobs"]) and found["outcome"] != "finished" and found["resume"]:
        lines.append(f"to resume: {found['resume']}")
    return "\n".join(lines)


def cancel_jobs(run_dir: Path) -> tuple[dict[str, Any], str]:
    """Cancel what is not over. The ranks save on SIGTERM, if Slurm's KillWait (often 30 s) leaves them the time."""
    submissions = _submissions(run_dir)
    jobs = [job["job"] for job in ask_slurm(jobs_of(submissions)) if not is_over(job)]
    if not jobs:
        return {"cancelled": []}, "no job of this run waits or runs"
    done = slurm("scancel", *jobs)
    if done.returncode:
        raise UsageError(f"scancel {' '.join(jobs)}: {done.stderr.strip()}")
    text = f"cancelled: {', '.join(jobs)}. The ranks save a checkpoint before they end, if Slurm leaves them the time."
    return {"cancelled": jobs}, f"{text}\nto resume: {submissions[-1]['command']}"


def tail_logs(run_dir: Path) -> tuple[dict[str, Any], str]:
    """The ends of the newest batch log and of the ranks' logs."""
    _submissions(run_dir)
    logs = run_dir / "logs"
    batch = sorted(logs.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime)[-1:]
    ranks = sorted(logs.glob("rank-*.log"))
    tails = {str(path): _tail(path) for path in (*batch, *ranks[:MOST_RANKS])}
    if not tails:
        return {"logs": {}}, f"{logs} is empty: the job has not started"
    parts = [f"==> {path} <==\n{tail}" for path, tail in tails.items()]
    if len(ranks) > MOST_RANKS:
        parts.append(f"({len(ranks) - MOST_RANKS} more ranks in {logs})")
    return {"logs": tails}, "\n\n".join(parts)


def _submissions(run_dir: Path) -> list[dict[str, Any]]:
    found = read_submissions(run_dir)
    if not found:
        raise UsageError(f"nothing was submitted for {run_dir}: `cctrain submit CONFIG run.dir={run_dir}` does that")
    return found


def _job_line(job: dict[str, Any]) -> str:
    line = f"job {job['job']}: {job['state']}"
    if job["state"] == "PENDING":
        line += f" ({job['reason']})" if job["reason"] else ""
        return line + (f", estimated start {job['start']}" if job["start"] else ", no estimate of its start")
    if job["nodes"]:
        line += f" on {job['nodes']}"
    return line + (f", {job['left']} left" if job["state"] == "RUNNING" and job["left"] else "")


def _steps(run_dir: Path, submissions: list[dict[str, Any]]) -> int:
    """From the run's own configuration, or the submitted one before its first start."""
    path = run_dir / CONFIG
    return load_config(path if path.is_file() else Path(submissions[-1]["script"]).with_name(CONFIG)).training.steps


def _latest_name(run_dir: Path) -> str | None:
    try:
        return (run_dir / CHECKPOINTS / LATEST).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 16_384))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
