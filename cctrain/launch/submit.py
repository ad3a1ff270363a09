"""`cctrain submit`: freeze what is to run, write the batch script, hand it to Slurm, remember its number.

    RUN/slurm/submission-1/job.sbatch       the script, complete
    RUN/slurm/submission-1/config.yaml      the configuration, resolved, with absolute paths
    RUN/slurm/submission-1/submitted.diff   what the working tree changed in the commit
    RUN/submission.json                     all submissions of the run: time, commit, script, numbers of jobs

The trainer writes RUN/config.yaml itself when it first starts, and compares the submitted one with it ever after.
"""

import copy
import logging
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cctrain.code_version import code_commit, code_difference, code_digest
from cctrain.config import Config, load_config, to_yaml
from cctrain.cost.devices import load_device
from cctrain.cost.estimate import needs_of, summary
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import UsageError
from cctrain.launch.passwords import check_no_secrets, without_secrets
from cctrain.launch.profile import Profile, device_of, gpus_of, load_profile
from cctrain.launch.script import Request, render, resources
from cctrain.launch.submissions import ask_slurm, is_over, jobs_of, read_submissions, record_submission, require, slurm
from cctrain.run_directory import write_atomically
from cctrain.tracking.address import resolve_uri
from cctrain.tracking.journal import JOURNAL_NAME

log = logging.getLogger(__name__)


def submit(
    config_path: Path,
    overrides: list[str],
    profile_name: str,
    request: Request,
    *,
    accept_changes: bool = False,
    dry_run: bool = False,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Submit a run, or show what would be with `dry_run`, which writes nothing.

    Returns the run, the script's path and text, and the numbers of the jobs ([] for a dry run). `command` is what
    the user typed.
    """
    profile = load_profile(profile_name)
    config = freeze(load_config(config_path, overrides))
    run_dir = Path(config.run.dir or "")
    store = open_store(Path(config.data.store), config.data.digest)
    config.data.digest = store.digest  # the store may be prepared anew while the job waits
    frozen = to_yaml(config)
    check_no_secrets(frozen, f"the configuration ({config_path}, with the overrides)")
    check_run(run_dir, config, store, accept_changes)
    check_rows(config, profile, request)

    former = read_submissions(run_dir)
    folder = run_dir / "slurm" / f"submission-{len(former) + 1}"
    options = ["--accept-changes"] if accept_changes else []
    script = render(run_dir, folder / "config.yaml", profile, request, sys.executable, code_digest(), options)
    check_no_secrets(script, f"the script made with the profile {profile.name}")
    log.info("%s", estimate_in_words(config, store, profile, request))
    result = {"run": str(run_dir), "script": str(folder / "job.sbatch"), "jobs": [], "text": script}
    if dry_run:
        return result

    require("sbatch")
    refuse_if_submitted(run_dir, former)
    _write(run_dir, folder, {"config.yaml": frozen, "job.sbatch": script, "submitted.diff": _difference()})
    jobs: list[str] = []
    try:
        for _ in range(max(1, request.chain)):
            jobs.append(hand_to_slurm(folder / "job.sbatch", jobs))
    finally:
        if jobs:
            record_submission(
                run_dir,
                {
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    "jobs": jobs,
                    "command": without_secrets(shlex.join(command)) if command else None,
                    "profile": profile_name,
                    "script": str(folder / "job.sbatch"),
                    "commit": code_commit(),
                    "code": code_digest(),
                },
            )
    return result | {"jobs": jobs}


def freeze(config: Config) -> Config:
    """The same configuration, whatever folder the job works in."""
    config.run.dir = os.path.abspath(config.run.dir or "")
    config.data.store = os.path.abspath(config.data.store)
    if config.model.init_from is not None:
        config.model.init_from = os.path.abspath(config.model.init_from)
    if config.tracking.uri is not None:
        config.tracking.uri = resolve_uri(config.tracking.uri)
    return config


def check_run(run_dir: Path, config: Config, store: TokenStore, accept_changes: bool) -> None:
    """What a resumed run would refuse is refused now, and not after a night in the queue."""
    if (run_dir / JOURNAL_NAME).is_file():
        from cctrain.training.data import resolve
        from cctrain.training.resume import check_changes

        check_changes(run_dir, resolve(config, store), accept_changes)


def check_rows(config: Config, profile: Profile, request: Request) -> None:
    """Each context is shared by parallel.context ranks, on any number of nodes that Slurm may give."""
    if config.parallel.context == 1:
        return
    sbatch, ranks_per_node = resources(profile, request)
    fewest, _, most = str(sbatch["nodes"]).partition("-")
    for nodes in range(int(fewest), int(most or fewest) + 1):
        if nodes * ranks_per_node % config.parallel.context:
            raise UsageError(
                f"parallel.context={config.parallel.context} does not divide the {nodes * ranks_per_node} rank(s) of "
                f"{nodes} node(s): ask for other --nodes, or for other ranks on each (--ranks-per-node)"
            )


def estimate_in_words(config: Config, store: TokenStore, profile: Profile, request: Request) -> str:
    """What the training needs on the fewest nodes that it may get."""
    from cctrain.training.data import look_at_store

    sbatch, ranks_per_node = resources(profile, request)
    ranks = ranks_per_node * int(sbatch["nodes"].partition("-")[0])
    name = device_of(profile, sbatch)
    resolved, contexts = look_at_store(copy.deepcopy(config), store)
    needs = needs_of(resolved, contexts, ranks, "cuda" if gpus_of(sbatch) else "cpu")
    return summary(needs, load_device(name, config.training.precision) if name else None)


def refuse_if_submitted(run_dir: Path, former: list[dict[str, Any]]) -> None:
    for job in ask_slurm(jobs_of(former)):
        if not is_over(job):
            raise UsageError(
                f"job {job['job']} of {run_dir} is {job['state']}, and two jobs cannot train one run: wait, or cancel "
                f"it (cctrain jobs {run_dir} --cancel); --chain N submits several that follow each other"
            )


def hand_to_slurm(script: Path, queued: list[str]) -> str:
    """The number of the job; `queued` are those of the same chain before it."""
    done = slurm("sbatch", "--parsable", str(script))
    if done.returncode:
        advice = "Mend the profile or the options, and submit again"
        if queued:
            advice = (
                f"The {len(queued)} jobs before it are queued and recorded ({', '.join(queued)}); they go on without it"
            )
        raise UsageError(f"sbatch refuses {script}: {done.stderr.strip()}\n{advice}")
    return done.stdout.strip().split(";")[0]


def _write(run_dir: Path, folder: Path, files: dict[str, str]) -> None:
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        # With this file there the jobs of a chain leave at once; to submit means: go on.
        (run_dir / "slurm" / "ended").unlink(missing_ok=True)
        for name, content in files.items():
            write_atomically(folder / name, content.encode())
    except OSError as error:
        raise UsageError(f"{run_dir} cannot be written ({error.strerror}): choose another run.dir=DIR") from error


def _difference() -> str:
    return without_secrets(code_difference())
