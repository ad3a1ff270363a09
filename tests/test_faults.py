"""What goes wrong while a run trains or resumes: the exit code, the message, and that nothing is lost by it.

Real processes on real file systems, disturbed from within (see `Trainer.start`) where nothing in the world outside
could make a rank meet the fault at a given step.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cctrain.data.store.store import TokenStore
from cctrain.tracking.journal import history, read_journal
from cctrain.training.checkpoint_files import find_checkpoints, latest_checkpoint
from tests.commands import cctrain
from tests.trainer import Trainer, ended, rank_processes, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.processes]

STEPS, SAVED_EVERY = 8, 2
CONFIG = f"""
data: {{global_batch: 8, block: 4, mixed_blocks: 3}}
model: {{width: 32, depth: 2, heads: 2, latents: 4, latent_width: 8}}
training: {{steps: {STEPS}, warmup: 2, learning_rate: 5e-3, precision: fp32}}
evaluation: {{every: 4, cells: 6}}
checkpoint: {{every: {SAVED_EVERY}, keep: 10}}
"""
MEASURED = ("loss", "grad_norm", "learning_rate", "samples", "tokens", "targets", "contexts", "nll", "difference")


@pytest.fixture(scope="module")
def trainer(tiny_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "small.yaml").write_text(CONFIG)
    with Trainer(folder / "small.yaml", tiny_store, folder) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Path:
    run_dir = trainer.folder / "undisturbed"
    trainer.run(run_dir, 0)
    assert [path.name for path in find_checkpoints(run_dir)] == [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    return run_dir


@pytest.fixture
def stopped_after(undisturbed: Path) -> Callable[[int, Path], Path]:
    """Makes what the undisturbed run would have left, had it been killed when `step` was its newest checkpoint."""

    def make(step: int, run_dir: Path) -> Path:
        shutil.copytree(undisturbed, run_dir, dirs_exist_ok=True)
        for file in ("weights.safetensors", "outcome"):
            (run_dir / file).unlink()
        for path in find_checkpoints(run_dir):
            if path.name > f"step-{step:08d}":
                shutil.rmtree(path)
        (run_dir / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
        return run_dir

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 24 MiB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "-t", "tmpfs", "-o", "size=24m", "none"):
        yield folder


class mounted:
    """A file system at `folder` for a while; only root may do that, and continuous integration is."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options

    def __enter__(self) -> None:
        done = subprocess.run(["mount", *self.options, str(self.folder)], capture_output=True, text=True)
        if done.returncode:
            assert "CI" not in os.environ, done.stderr
            pytest.skip(f"this machine mounts nothing: {done.stderr.strip()}")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - leave))
    return ballast


def events(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in read_journal(run_dir) if line["event"] == event]


def outcome(run_dir: Path) -> str | None:
    path = run_dir / "outcome"
    return path.read_text().strip() if path.exists() else None


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """The history without what depends on the clock."""
    lines = [line for line in history(read_journal(run_dir)) if line["event"] in ("step", "evaluate")]
    return [{key: line[key] for key in ("event", "step", *MEASURED) if key in line} for line in lines]


def assert_same_end(run_dir: Path, undisturbed: Path) -> None:
    assert measured(run_dir) == measured(undisturbed)
    assert (run_dir / "weights.safetensors").read_bytes() == (undisturbed / "weights.safetensors").read_bytes()
    assert outcome(run_dir) == "finished"


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# Steps that are not finite


@pytest.mark.representative
def test_a_batch_with_nan_is_skipped_and_counted_and_training_goes_on(trainer, tmp_path):
    disturbance = """
def deed(number, rank_step):
    if number == 3 and rank == 1:
        poison_count(rank_step)
    if number == 6 and rank == 0:
        poison_gradient()
before_step(deed)
"""
    said = trainer.run(tmp_path, 0, "--ranks=2", disturbance=disturbance)
    assert "step 3 was skipped: its loss is not finite" in said
    assert "step 6 was skipped: its gradient is not finite" in said
    lines = read_journal(tmp_path)
    skips = [index for index, line in enumerate(lines) if line["event"] == "skip"]
    assert [(lines[index]["step"], lines[index]["reason"]) for index in skips] == [(3, "loss"), (6, "gradient")]
    assert all((lines[i - 1]["event"], lines[i - 1]["step"]) == ("step", lines[i]["step"]) for i in skips)
    steps = events(tmp_path, "step")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [len(lines[index]["sample_ids"]) for index in skips] == [steps[2]["contexts"], steps[5]["contexts"]]
    finite = [line["loss"] == line["loss"] for line in steps]
    assert finite == [step != 3 for step in range(1, STEPS + 1)]
    assert all(line["nll"] == line["nll"] for line in events(tmp_path, "evaluate"))
    assert outcome(tmp_path) == "finished"


@pytest.mark.representative
def test_nan_for_ever_ends_with_5_the_samples_and_advice(trainer, tmp_path):
    disturbance = """
def deed(number, rank_step):
    if number >= 3:
        poison_count(rank_step)
before_step(deed)
"""
    said = trainer.run(tmp_path, 5, "training.max_skipped=2", disturbance=disturbance)
    message = next(line for line in said.splitlines() if line.startswith("cctrain: "))
    skips = events(tmp_path, "skip")
    assert [line["step"] for line in skips] == [3, 4, 5]
    samples = [sample for line in skips for sample in line["sample_ids"]]
    assert "of 3 steps in a row, the last of them step 5, was not finite; training.max_skipped is 2" in message
    assert f"Their samples: {', '.join(map(str, samples[:20]))} and {len(samples) - 20} more" in message
    assert "Lower training.learning_rate or lengthen training.warmup" in message
    assert "the same command resumes" in message
    stop = read_journal(tmp_path)[-1]
    assert (stop["event"], stop["status"], f"cctrain: {stop['reason']}") == ("stop", "failed", message)
    assert outcome(tmp_path) == "failed"
    assert not (tmp_path / "weights.safetensors").exists()


# Ranks that hang or die


@pytest.mark.representative
def test_a_rank_asleep_ends_the_run_in_time_with_the_stacks_of_every_rank(trainer, tmp_path):
    seconds = 15
    # What DeepSpeed imports when it makes an engine is imported beforehand: the seconds are not for that.
    disturbance = """
import deepspeed.runtime.zero.muon.muon_optimizer
def fall_asleep(number, rank_step):
    if number == 5 and rank == 1:
        time.sleep(1000)
before_step(fall_asleep)
"""
    process = trainer.start(tmp_path, f"training.hang_seconds={seconds}", "--ranks=2", disturbance=disturbance)
    wait_until(lambda: [line["step"] for line in events(tmp_path, "checkpoint")] == [2, 4], process)
    started = time.monotonic()
    ranks = rank_processes(process)
    said = ended(process, 5)
    took = time.monotonic() - started
    assert seconds - 5 < took < seconds + 15, said
    assert f"made no progress for {seconds} s (training.hang_seconds), the last was: after" in said
    logs = [(tmp_path / "logs" / f"rank-{rank:04d}.log").read_text() for rank in (0, 1)]
    assert all(re.search(r"^(Current thread|Thread) 0x.*\(most recent call first\):", log, re.M) for log in logs)
    assert "in train_step" in logs[0]  # where it waits for the other
    assert "in fall_asleep" in logs[1]
    assert not any(rank.is_running() for rank in ranks.values())
    [stop] = events(tmp_path, "stop")
    assert (stop["status"], stop["step"]) == ("failed", 4)
    assert "made no progress" in stop["reason"]
    assert outcome(tmp_path) == "failed"


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.representative)])
def test_a_rank_that_is_killed_ends_all_within_seconds(trainer, tmp_path, victim):
    process = trainer.start(tmp_path, "training.steps=1000000", "checkpoint.every=0", "--ranks=2")
    wait_until(lambda: len(events(tmp_path, "step")) > 5, process)
    ranks = rank_processes(process)
    assert ranks.keys() == {0, 1}
    started = time.monotonic()
    ranks[victim].kill()
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - started < 15
    assert process.returncode == 5
    assert f"rank {victim} ended with signal SIGKILL" in said
    assert not any(rank.is_running() for rank in ranks.values())


# A full disk


@pytest.mark.representative
def test_a_full_disk_ends_the_run_with_4_and_the_checkpoint_before_is_used(
    trainer, undisturbed, stopped_after, small_disk
):
    run_dir = stopped_after(4, small_disk / "run")
    kept = checkpoint_content(run_dir)

    ballast = fill(small_disk, leave=8 * 2**20)
    said = trainer.run(run_dir, 4)
    assert re.search(r"the checkpoint of step 6 could not be written in \S+: it needs 1[67] MiB, and [78] MiB", said)
    assert "make room, then resume with the same command" in said
    assert checkpoint_content(run_dir) == kept
    assert outcome(run_dir) == "failed"
    assert (read_journal(run_dir)[-1]["status"], read_journal(run_dir)[-1]["step"]) == ("failed", 6)

    # The room is there when it looks, and gone when it writes.
    ballast.unlink()
    size = sum(file.stat().st_size for file in (run_dir / "checkpoints" / "step-00000004").iterdir())
    ballast = fill(small_disk, leave=size * 3 // 4)
    disturbance = "checkpoint.ROOM_TO_SPARE = -(2**30)"
    said = trainer.run(run_dir, 4, "--ranks=2", disturbance=disturbance)
    assert "the checkpoint of step 6 could not be written" in said
    assert "No space left on device" in said
    assert re.search(r"\(rank [01]\)", said)
    assert checkpoint_content(run_dir) == kept
    assert outcome(run_dir) == "failed"

    ballast.unlink()
    said = trainer.run(run_dir, 0)
    assert "resuming after step 4" in said
    assert_same_end(run_dir, undisturbed)

    # The last file of all.
    (run_dir / "weights.safetensors").unlink()
    ballast = fill(small_disk, leave=64 * 2**10)
    said = trainer.run(run_dir, 4)
    assert "weights.safetensors could not be written" in said
    assert "No space left on device" in said
    assert not list(run_dir.glob("*.partial*")) + list(run_dir.glob(".*.partial*"))
    ballast.unlink()
    trainer.run(run_dir, 0)
    assert_same_end(run_dir, undisturbed)


def checkpoint_content(run_dir: Path) -> dict[str, bytes]:
    files = sorted(path for path in (run_dir / "checkpoints").rglob("*") if path.is_file())
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


# Damaged and missing checkpoints


@pytest.mark.representative
def test_damaged_checkpoints_are_refused_and_the_one_before_them_is_used(trainer, undisturbed, stopped_after, tmp_path):
    run_dir = stopped_after(8, tmp_path / "run")
    manifest = run_dir / "checkpoints" / "step-00000008" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"position": ', '"position": 1', 1))
    flip_a_byte(run_dir / "checkpoints" / "step-00000006" / "rank-00000.safetensors")
    said = trainer.run(run_dir, 0)
    assert "step-00000008 is damaged: manifest.json is damaged: its digest does not match; trying the one" in said
    assert "step-00000006 is damaged: rank-00000.safetensors is not what was written (SHA-256); trying" in said
    assert "resuming after step 4" in said
    assert events(run_dir, "start")[-1]["step"] == 4
    assert_same_end(run_dir, undisturbed)
    assert "every checkpoint verified" in cctrain("inspect", run_dir, "--verify").stdout


@pytest.mark.representative
def test_a_run_whose_checkpoints_are_all_damaged_or_gone_ends_with_4_and_does_not_begin_anew(
    trainer, stopped_after, tmp_path
):
    run_dir = stopped_after(4, tmp_path / "run")
    flip_a_byte(run_dir / "checkpoints" / "step-00000002" / "rank-00000.safetensors")
    (run_dir / "checkpoints" / "step-00000004" / "rank-00000.safetensors").unlink()
    num_lines = len(events(run_dir, "step"))

    said = cctrain("inspect", run_dir, "--verify", code=4).stderr
    assert "step-00000002 is damaged: rank-00000.safetensors is not what was written (SHA-256)" in said
    assert "step-00000004 is damaged: rank-00000.safetensors: No such file or directory" in said
    said = trainer.run(run_dir, 4)
    assert "no checkpoint of this run is whole; restore one from a copy, or train anew in another run.dir" in said
    assert "step-00000002 is damaged: rank-00000.safetensors" in said
    assert "step-00000004 is damaged: rank-00000.safetensors" in said
    assert outcome(run_dir) == "failed"

    shutil.rmtree(run_dir / "checkpoints")
    said = trainer.run(run_dir, 4)
    assert f"{run_dir} has saved step 8, but {run_dir / 'checkpoints'} holds no checkpoint any more" in said
    assert "restore it from a copy, or train anew in another run directory" in said
    assert len(events(run_dir, "step")) == num_lines


# Run directories that are taken or cannot be written


@pytest.mark.representative
def test_a_read_only_run_directory_ends_with_2_and_can_still_be_inspected(trainer, stopped_after, tmp_path):
    run_dir = stopped_after(4, tmp_path / "run")
    before = (run_dir / "metrics.jsonl").read_bytes()
    (tmp_path / "frozen").mkdir()
    with mounted(tmp_path / "frozen", "--bind", "-o", "ro", str(tmp_path)):
        frozen = tmp_path / "frozen" / "run"
        for folder, *ranks in ((frozen,), (frozen, "--ranks=2"), (tmp_path / "frozen" / "new",)):
            said = trainer.run(folder, 2, *ranks)
            assert f"{folder} cannot be written (Read-only file system): choose another run.dir=DIR" in said
        assert f"run {frozen}, every checkpoint verified" in cctrain("inspect", frozen, "--verify").stdout
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.representative
def test_a_second_job_on_one_run_ends_with_2_and_the_first_is_undisturbed(trainer, undisturbed, tmp_path):
    run_dir, go_on = tmp_path / "run", tmp_path / "go-on"
    disturbance = f"""
def wait(number, rank_step):
    while number == 5 and not Path({str(go_on)!r}).exists():
        time.sleep(0.05)
before_step(wait)
"""
    first = trainer.start(run_dir, disturbance=disturbance)
    wait_until(lambda: len(events(run_dir, "checkpoint")) == 2, first)
    before = checkpoint_content(run_dir)
    said = trainer.run(run_dir, 2, "--ranks=2")
    assert f"another training holds {run_dir}: process {first.pid} on " in said
    assert (
        f"Wait for its end, make it save and leave with `touch {run_dir / 'stop'}`, or choose another run.dir" in said
    )
    assert checkpoint_content(run_dir) == before
    assert outcome(run_dir) is None
    assert json.loads((run_dir / "lock").read_text())["pid"] == first.pid
    go_on.touch()
    ended(first, 0)
    assert {line["attempt"] for line in read_journal(run_dir)} == {1}
    assert_same_end(run_dir, undisturbed)
    assert latest_checkpoint(run_dir).name == "step-00000008"
