"""A real Slurm of two nodes on this machine, and a tiny training to submit to it; and commands in place of Slurm's."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cctrain.data.prepare.quality import QualityControl
from cctrain.tracking.journal import history, read_journal
from cctrain.tracking.restarts import repeatable
from tests.data.conftest import prepared, write_h5ad
from tests.training.conftest import TINY, unequal_counts

ROOT = Path(__file__).parents[2]
# Four ranks on two cores take some 50 ms for a step: long enough to be met in the middle.
CONFIG = f"""{TINY}
evaluation: {{every: 50, cells: 4}}
checkpoint: {{every: 100}}
"""
PATIENCE = 300.0


@dataclass(frozen=True)
class Lab:
    """A folder with a store, a configuration and a profile, and the cluster to submit to."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )

    def slurm(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return done.stdout

    def cctrain(self, *arguments: str) -> Any:
        """What a command prints as JSON."""
        done = self.run(sys.executable, "-m", "cctrain", *arguments, "--json")
        assert done.returncode == 0, f"cctrain {' '.join(arguments)}\n{done.stderr}"
        return json.loads(done.stdout)

    def submit(self, name: str, *arguments: str) -> tuple[Path, list[str]]:
        """The run directory and the numbers of its jobs."""
        words = ["submit", "tiny.yaml", f"run.dir=runs/{name}", "--profile=test.yaml", *arguments]
        return self.folder / "runs" / name, self.cctrain(*words)["jobs"]

    def show(self, job: str, key: str) -> str:
        """One of the facts of `scontrol show job`."""
        words = self.slurm("scontrol", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))

    def wait(self, what: str, is_so: Callable[[], bool], run_dir: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            assert time.monotonic() < deadline, f"not so after {PATIENCE:.0f} s: {what}\n{logs_of(run_dir)}"
            time.sleep(0.2)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        self.wait(f"step {step}", lambda: last_step(run_dir) >= step, run_dir)

    def wait_for_state(self, job: str, state: str, run_dir: Path) -> None:
        self.wait(f"job {job} {state}", lambda: self.show(job, "JobState") == state, run_dir)

    def wait_for_end(self, job: str, run_dir: Path) -> str:
        """Returns Slurm's exit code, `code:signal`."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait(f"the end of job {job}", lambda: self.show(job, "JobState") in over, run_dir)
        return self.show(job, "ExitCode")

    def start_requeued(self, job: str, run_dir: Path) -> None:
        """Slurm lets a requeued job wait for two minutes; an administrator need not."""
        self.wait_for_state(job, "PENDING", run_dir)
        time.sleep(3)  # until the nodes' credential of the former start is older than the new one
        update = ("scontrol", "update", f"JobId={job}", "StartTime=now")
        self.wait(f"a new start of job {job}", lambda: self.run(*update).returncode == 0, run_dir)


def last_step(run_dir: Path) -> int:
    return max((line["step"] for line in read_journal(run_dir) if line["event"] == "step"), default=0)


def attempts_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_journal(run_dir) if line["event"] == "start"]


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """The history's step and evaluate lines, without what no two runs share."""
    return [repeatable(line) for line in history(read_journal(run_dir)) if line["event"] in ("step", "evaluate")]


def logs_of(run_dir: Path) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted((run_dir / "logs").glob("*.log")))


def batch_log(run_dir: Path, job: str) -> str:
    return (run_dir / "logs" / f"slurm-{job}.log").read_text()


@pytest.fixture
def fake_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a bash script in the place of a command; returns a file that gets a line for each call, its arguments.

    In the script `$call` is the number of the call, from 1.
    """
    folder = tmp_path / "fakes"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, script: str) -> Path:
        calls, command = folder / f"{name}.calls", folder / name
        calls.touch()
        command.write_text(f'#!/bin/bash\necho "$*" >>{calls}\ncall=$(wc -l <{calls})\n{script}\n')
        command.chmod(0o755)
        return calls

    return make


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands speak to a cluster of this session's own."""
    if os.geteuid() != 0 or not all(Path("/usr/sbin", name).exists() for name in ("slurmctld", "munged")):
        assert "CI" not in os.environ, "CI runs as root on Debian, where tools/test.sh installs slurm-wlm and munge"
        pytest.skip("a Slurm of our own needs root, and Debian's slurm-wlm and munge")
    # Not in pytest's own folder, which later sessions tidy away, and with it what is needed to end the daemons.
    folder = Path(tempfile.mkdtemp(prefix="cctrain-slurm-"))
    script = ROOT / "tools" / "slurm_cluster.sh"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        inherited.pop(name, None)
    done = subprocess.run([script, "start", folder], env=inherited, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, "the cluster did not start: see above"
    assert done.stdout == f"export SLURM_CONF={folder}/slurm.conf\n"
    try:
        yield inherited | {"SLURM_CONF": f"{folder}/slurm.conf"}
    finally:
        subprocess.run([script, "stop", folder], env=inherited, check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def lab(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("jobs")
    cells = write_h5ad(folder / "cells.h5ad", unequal_counts())
    prepared(folder / "store", cells, quality=QualityControl(min_genes=1, min_cells=1))
    (folder / "tiny.yaml").write_text(f"{CONFIG}\nrun: {{seed: 3}}\n")
    (folder / "tiny.yaml").write_text((folder / "tiny.yaml").read_text().replace("data: {", "data: {store: store, "))
    write_profile(folder / "test.yaml")
    return Lab(folder, cluster)


def write_profile(path: Path, signal: str = "B:USR1@60", **more: str) -> None:
    lines = ["sbatch:", f"  signal: {signal}", "setup:", "  - export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="]
    path.write_text("\n".join([*lines, *(f"{key}: {value}" for key, value in more.items())]) + "\n")
