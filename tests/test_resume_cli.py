"""Runs that are asked to save, to stop and to go on, through the command line: nothing is lost, and a word is left.

One run meets every kind of request in turn and is compared at its end with one that met none. Real processes.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from cctrain.config import load_config
from cctrain.data.prepare.quality import QualityControl
from cctrain.model.saved import load_weights
from cctrain.tracking.journal import history, read_journal
from cctrain.tracking.restarts import repeatable
from cctrain.training.checkpoint_files import find_checkpoints, latest_checkpoint, read_weights, run_weights, step_of
from cctrain.training.guards import read_outcome
from tests.commands import cctrain
from tests.data.conftest import prepared, write_h5ad
from tests.trainer import Started, Trainer, rank_processes, wait_until
from tests.training.conftest import unequal_counts

pytestmark = [pytest.mark.slow, pytest.mark.processes]

STEPS, STEPS_OF_TWO = 200, 160
CONFIG = f"""
data: {{global_batch: 10, block: 4, mixed_blocks: 3}}
model: {{width: 16, depth: 2, heads: 2, latents: 4, latent_width: 8}}
training: {{steps: {STEPS}, warmup: 5, learning_rate: 2e-3, precision: fp32}}
evaluation: {{every: 50, cells: 6, draws: 1}}
checkpoint: {{every: 0}}
"""
# What configs/*.yaml train in.
ON_TWO = ("--ranks=2", f"training.steps={STEPS_OF_TWO}", "training.precision=bf16", "parallel.zero_stage=1")


@dataclass(frozen=True)
class Ended:
    """One attempt: exit code, what it said, and what it left. `lines` are its own in the journal."""

    code: int
    out: str
    err: str
    lines: list[dict[str, Any]]
    outcome: str | None
    latest: int | None
    stop_file_is_left: bool

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]


def attempt(
    trainer: Trainer,
    run_dir: Path,
    *arguments: str,
    disturb: Callable[[Started, "Watch"], None] | None = None,
    **options: Any,
) -> Ended:
    """One attempt from its start to its end, disturbed on its way; returns what it left."""
    num_before = len(read_journal(run_dir))
    process = trainer.start(run_dir, *arguments, **options)
    if disturb is not None:
        disturb(process, Watch(process, run_dir, num_before))
    out, err = process.communicate(timeout=240)
    latest = latest_checkpoint(run_dir)
    return Ended(
        process.returncode,
        out,
        err,
        read_journal(run_dir)[num_before:],
        read_outcome(run_dir),
        None if latest is None else step_of(latest),
        (run_dir / "stop").exists() or (run_dir / "save").exists(),
    )


def long_step(number: int, seconds: float) -> str:
    """A disturbance: this step takes so long."""
    return f"before_step(lambda step, rank_step: time.sleep({seconds} if step == {number} else 0))"


@dataclass(frozen=True)
class Watch:
    """What a person sees of an attempt while it trains."""

    process: Started
    run_dir: Path
    num_before: int

    def until(self, holds: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Waits until the lines of this attempt are as wanted."""
        wait_until(lambda: holds(read_journal(self.run_dir)[self.num_before :]), self.process)

    def steps(self, number: int) -> None:
        self.until(lambda lines: sum(line["event"] == "step" for line in lines) >= number)

    def started(self) -> None:
        self.until(lambda lines: any(line["event"] == "start" for line in lines))


def send(number: int) -> Callable[[Started, Watch], None]:
    def disturb(process: Started, watch: Watch) -> None:
        watch.steps(3)
        process.send_signal(number)

    return disturb


def press_ctrl_c(process: Started, watch: Watch) -> None:
    watch.steps(3)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group


def touch_stop(process: Started, watch: Watch) -> None:
    watch.steps(3)
    (watch.run_dir / "stop").touch()


def save_then_ctrl_c(process: Started, watch: Watch) -> None:
    watch.steps(3)
    (watch.run_dir / "save").touch()
    watch.until(lambda lines: any(line["event"] == "checkpoint" for line in lines))
    watch.until(lambda lines: lines[-1]["event"] == "step")
    press_ctrl_c(process, watch)


def terminate_rank_1(process: Started, watch: Watch) -> None:
    watch.steps(3)
    rank_processes(process)[1].terminate()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("resume")
    source = write_h5ad(folder / "cells.h5ad", unequal_counts())
    store = prepared(folder / "store", source, quality=QualityControl(min_genes=1, min_cells=1))
    (folder / "mine.yaml").write_text(CONFIG)
    with Trainer(folder / "mine.yaml", store, folder) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def undisturbed(trainer: Trainer) -> Path:
    run_dir = trainer.folder / "undisturbed"
    assert attempt(trainer, run_dir).code == 0
    return run_dir


@pytest.fixture(scope="module")
def disturbed(trainer: Trainer) -> tuple[Path, dict[str, Ended]]:
    """A run that is asked in every way to save or to stop, and started again each time; and what each attempt left.

    Beside it, `requeued` is a copy of the run as it was when it had its first checkpoint.
    """
    run_dir = trainer.folder / "disturbed"
    ended = {"SIGKILL": attempt(trainer, run_dir, disturb=send(signal.SIGKILL))}
    ended["SIGTERM"] = attempt(trainer, run_dir, disturb=send(signal.SIGTERM))
    shutil.copytree(run_dir, trainer.folder / "requeued")
    ended["SIGUSR1"] = attempt(trainer, run_dir, disturb=send(signal.SIGUSR1))
    ended["stop"] = attempt(trainer, run_dir, disturb=touch_stop)
    ended["Ctrl-C"] = attempt(trainer, run_dir, disturb=save_then_ctrl_c)
    ended["end"] = attempt(trainer, run_dir, config=run_dir / "config.yaml")
    ended["again"] = attempt(trainer, run_dir)
    return run_dir, ended


@pytest.fixture(scope="module")
def requeued(trainer: Trainer, disturbed: tuple[Path, dict[str, Ended]]) -> Path:
    """A run that was stopped and has a checkpoint, but no final weights."""
    return trainer.folder / "requeued"


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """The history without what a clock says, bit for bit."""
    lines = [line for line in history(read_journal(run_dir)) if line["event"] in ("step", "evaluate")]
    return [repeatable(line) for line in lines]


def assert_same_history(run_dir: Path, undisturbed: Path) -> None:
    ours, theirs = measured(run_dir), measured(undisturbed)
    assert [(line["event"], line["step"]) for line in ours] == [(line["event"], line["step"]) for line in theirs]
    for line, other in zip(ours, theirs, strict=True):
        assert line == other
    assert (run_dir / "weights.safetensors").read_bytes() == (undisturbed / "weights.safetensors").read_bytes()


def assert_left(ended: Ended, run_dir: Path, code: int, outcome: str, reason: str) -> None:
    """A checkpoint of the last step, a word, a line, an exit code and the command that resumes."""
    assert ended.code == code, ended.err
    assert ended.outcome == outcome
    [stop] = ended.of("stop")
    assert stop == ended.lines[-1]
    assert (stop["status"], stop["reason"]) == (outcome, reason)
    last = ended.of("step")[-1]["step"]
    assert ended.of("checkpoint")[-1]["step"] == stop["step"] == ended.latest == last
    assert last < STEPS
    assert not ended.stop_file_is_left
    assert f"saved. To resume: cctrain train {run_dir / 'config.yaml'}" in ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""


# ---- one rank


ENDINGS = [
    ("SIGTERM", 0, "requeue", "terminated"),
    ("SIGUSR1", 0, "requeue", "time_limit"),
    ("stop", 0, "stopped", "stop_file"),
    ("Ctrl-C", 130, "stopped", "interrupted"),
]


@pytest.mark.representative
@pytest.mark.parametrize(("request_", "code", "outcome", "reason"), ENDINGS, ids=[name for name, *_ in ENDINGS])
def test_a_request_to_stop_leaves_a_checkpoint_and_a_word(disturbed, request_, code, outcome, reason):
    run_dir, ended = disturbed
    assert_left(ended[request_], run_dir, code, outcome, reason)


@pytest.mark.representative
def test_every_attempt_begins_where_the_one_before_had_saved(disturbed):
    _, ended = disturbed
    attempts = [ended[name] for name in ("SIGTERM", "SIGUSR1", "stop", "Ctrl-C", "end")]
    for before, after in pairwise(attempts):
        [start] = after.of("start")
        assert start["step"] == before.latest
        assert start["attempt"] == before.lines[0]["attempt"] + 1
        assert after.of("step")[0]["step"] == before.latest + 1
        assert "changes" not in start
    assert len({attempt.lines[0]["run"] for attempt in attempts}) == 1


@pytest.mark.representative
def test_a_run_killed_before_its_first_checkpoint_starts_again_at_step_0(disturbed):
    _, ended = disturbed
    killed, then = ended["SIGKILL"], ended["SIGTERM"]
    assert (killed.code, killed.outcome, killed.latest) == (-signal.SIGKILL, None, None)
    [first], [second] = killed.of("start"), then.of("start")
    assert (second["step"], second["attempt"], second["run"]) == (0, 2, first["run"])


@pytest.mark.representative
def test_a_save_file_leads_to_a_checkpoint_and_training_goes_on(disturbed):
    _, ended = disturbed
    saved, last = (line["step"] for line in ended["Ctrl-C"].of("checkpoint"))
    assert saved + 1 in [line["step"] for line in ended["Ctrl-C"].of("step")]
    assert saved < last


@pytest.mark.representative
def test_the_step_after_a_checkpoint_says_how_long_training_stood_still_for_it(disturbed):
    _, ended = disturbed
    saved, _ = ended["Ctrl-C"].of("checkpoint")
    [waited] = [line for line in ended["Ctrl-C"].of("step") if "checkpoint_seconds" in line]
    assert waited["step"] == saved["step"] + 1
    assert waited["checkpoint_seconds"] >= saved["seconds"]


@pytest.mark.representative
def test_a_run_that_was_disturbed_has_the_history_and_the_weights_of_one_that_was_not(disturbed, undisturbed):
    run_dir, ended = disturbed
    assert (ended["end"].code, ended["end"].outcome) == (0, "finished")
    assert ended["end"].out == f"next: cctrain evaluate {run_dir}\n"
    assert_same_history(run_dir, undisturbed)


@pytest.mark.representative
def test_a_run_that_has_finished_is_left_as_it_is(disturbed, undisturbed):
    run_dir, ended = disturbed
    again = ended["again"]
    assert (again.code, again.outcome, again.lines) == (0, "finished", [])
    assert f"{run_dir} has finished: all {STEPS} steps are done" in again.err
    assert again.out == f"next: cctrain evaluate {run_dir}\n"
    assert (run_dir / "weights.safetensors").read_bytes() == (undisturbed / "weights.safetensors").read_bytes()


def test_a_second_ctrl_c_leaves_at_once_and_a_stop_before_the_first_step_saves_it(trainer):
    run_dir = trainer.folder / "long"

    def terminate(process: Started, watch: Watch) -> None:
        watch.started()
        process.terminate()

    def press_ctrl_c_twice(process: Started, watch: Watch) -> None:
        watch.started()
        for _ in range(2):
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)
        process.wait(30)  # the step lasts longer

    first = attempt(trainer, run_dir, disturb=terminate, disturbance=long_step(1, 5))
    assert_left(first, run_dir, 0, "requeue", "terminated")
    assert first.latest == 1

    second = attempt(trainer, run_dir, disturb=press_ctrl_c_twice, disturbance=long_step(2, 100))
    assert (second.code, second.outcome, second.latest) == (130, "stopped", 1)
    assert [line["event"] for line in second.lines] == ["start", "stop"]
    assert second.lines[-1]["status"] == "stopped"
    assert "Ctrl-C again leaves at once" in second.err
    assert "Traceback" not in second.err


# ---- what may change


def test_more_steps_are_refused_unless_accepted_and_then_trained(trainer, undisturbed):
    run_dir = trainer.folder / "longer"
    shutil.copytree(undisturbed, run_dir)
    more = f"training.steps={STEPS + 5}"
    refused = attempt(trainer, run_dir, more)
    assert (refused.code, refused.outcome, refused.lines) == (2, "finished", [])
    assert f"training.steps: {STEPS} → {STEPS + 5}" in refused.err
    assert "--accept-changes" in refused.err
    assert (run_dir / "weights.safetensors").is_file()

    accepted = attempt(trainer, run_dir, more, "--accept-changes")
    assert (accepted.code, accepted.outcome) == (0, "finished"), accepted.err
    assert [line["step"] for line in accepted.of("step")] == list(range(STEPS + 1, STEPS + 6))
    assert accepted.of("start")[0]["changes"] == [
        *(f"run.dir: {undisturbed} → {run_dir}", f"training.steps: {STEPS} → {STEPS + 5}")
    ]
    assert load_config(run_dir / "config.yaml").training.steps == STEPS + 5
    theirs = load_weights(undisturbed / "weights.safetensors")
    ours = load_weights(run_dir / "weights.safetensors")
    assert any(not np.array_equal(ours[name], theirs[name]) for name in theirs)


# ---- several ranks


@pytest.fixture(scope="module")
def undisturbed_two(trainer: Trainer) -> Path:
    run_dir = trainer.folder / "undisturbed-two"
    assert attempt(trainer, run_dir, *ON_TWO).code == 0
    return run_dir


@pytest.fixture(scope="module")
def disturbed_two(trainer: Trainer) -> tuple[Path, dict[str, Ended]]:
    run_dir = trainer.folder / "disturbed-two"
    ended = {"SIGTERM": attempt(trainer, run_dir, *ON_TWO, disturb=send(signal.SIGTERM))}
    shutil.copytree(run_dir, trainer.folder / "requeued-two")
    ended["one rank"] = attempt(trainer, run_dir, *ON_TWO, disturb=terminate_rank_1)
    ended["Ctrl-C"] = attempt(trainer, run_dir, *ON_TWO, disturb=press_ctrl_c)
    ended["end"] = attempt(trainer, run_dir, *ON_TWO)
    return run_dir, ended


TWO_ENDINGS = [
    ("SIGTERM", 0, "requeue", "terminated"),
    ("one rank", 0, "requeue", "terminated"),
    ("Ctrl-C", 130, "stopped", "interrupted"),
]


@pytest.mark.parametrize(("request_", "code", "outcome", "reason"), TWO_ENDINGS, ids=[name for name, *_ in TWO_ENDINGS])
def test_all_ranks_stop_at_the_same_step_whoever_was_asked(disturbed_two, request_, code, outcome, reason):
    run_dir, ended = disturbed_two
    assert_left(ended[request_], run_dir, code, outcome, reason)


def test_two_ranks_that_were_disturbed_have_the_history_of_two_that_were_not(disturbed_two, undisturbed_two):
    run_dir, ended = disturbed_two
    assert (ended["end"].code, ended["end"].outcome) == (0, "finished")
    assert_same_history(run_dir, undisturbed_two)


def stop_after_22(process: Started, watch: Watch) -> None:
    watch.steps(22)
    process.terminate()


def assert_next_steps_agree(ended: Ended, undisturbed: Path, num_ranks: int, zero_stage: int, tolerance: float) -> None:
    assert ended.code == 0, ended.err
    [start] = ended.of("start")
    assert (start["world_size"], start["zero_stage"]) == (num_ranks, zero_stage)
    steps = ended.of("step")
    assert len(steps) >= 22
    theirs = {line["step"]: line for line in measured(undisturbed) if line["event"] == "step"}
    assert [line["samples"] for line in steps] == [theirs[line["step"]]["samples"] for line in steps]
    losses = np.array([(line["loss"], theirs[line["step"]]["loss"]) for line in steps[:20]])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=tolerance)


def test_a_run_of_one_rank_goes_on_with_two_and_at_another_stage(trainer, requeued, undisturbed):
    run_dir = trainer.folder / "on-two"
    shutil.copytree(requeued, run_dir)
    ended = attempt(trainer, run_dir, "--ranks=2", "parallel.zero_stage=3", disturb=stop_after_22)
    assert_next_steps_agree(ended, undisturbed, num_ranks=2, zero_stage=3, tolerance=1e-5)


def test_a_run_of_two_ranks_goes_on_with_one_and_at_another_stage(trainer, disturbed_two, undisturbed_two):
    run_dir = trainer.folder / "on-one"
    shutil.copytree(trainer.folder / "requeued-two", run_dir)
    ended = attempt(trainer, run_dir, *ON_TWO[1:-1], "parallel.zero_stage=0", disturb=stop_after_22)
    assert_next_steps_agree(ended, undisturbed_two, num_ranks=1, zero_stage=0, tolerance=1e-2)


# ---- what others do with a run that has only a checkpoint


@pytest.mark.representative
def test_a_run_that_has_only_a_checkpoint_is_evaluated_and_embeds(requeued, trainer, tmp_path, caplog):
    assert not (requeued / "weights.safetensors").exists()
    shutil.copytree(requeued, tmp_path / "run")
    result = json.loads(cctrain("evaluate", tmp_path / "run", "--json").stdout)
    assert {row["name"] for row in result["rows"]} >= {"model"}
    out = tmp_path / "out.h5ad"
    cctrain("embed", tmp_path / "run", trainer.folder / "cells.h5ad", f"--out={out}", "--json")
    assert f"has not ended: taking the weights of {latest_checkpoint(requeued).name}" in caplog.text
    assert np.isfinite(anndata.read_h5ad(out).obsm["X_cctrain"]).all()


@pytest.mark.representative
def test_inspect_tells_how_each_attempt_ended_and_verifies_all_checkpoints(disturbed):
    run_dir, _ = disturbed
    facts = json.loads(cctrain("inspect", run_dir, "--verify", "--json").stdout)
    assert facts["verified"]
    assert (facts["last_step"], facts["steps"], facts["outcome"]) == (STEPS, STEPS, "finished")
    assert [entry["status"] for entry in facts["attempts"]] == [
        *("killed, or still training", "requeue", "requeue", "stopped", "stopped", "finished")
    ]
    assert [entry["step"] for entry in facts["checkpoints"]] == [step_of(path) for path in find_checkpoints(run_dir)]
    shown = cctrain("inspect", run_dir).stdout
    assert "attempt 1   from step 0 to" in shown
    assert "requeue (time_limit)" in shown
    assert f"step {STEPS}, " in shown.split("checkpoint ")[-1]

    checkpoint = latest_checkpoint(run_dir)
    facts = json.loads(cctrain("inspect", checkpoint, "--verify", "--json").stdout)
    whole = sum(tensor.numel() for name, tensor in run_weights(run_dir).items() if not name.startswith("log_"))
    assert (facts["step"], facts["parameters"], facts["num_ranks"]) == (STEPS, whole, 1)


def test_a_run_that_started_from_another_resumes_without_it(trainer, requeued):
    source, run_dir = trainer.folder / "source", trainer.folder / "from-source"
    shutil.copytree(requeued, source)
    still = ("training.learning_rate=1e-12", "training.weight_decay=0", "evaluation.every=0")
    first = attempt(trainer, run_dir, f"model.init_from={source}", *still, "training.steps=2")
    assert first.code == 0, first.err
    [start] = first.of("start")
    num_genes = len(trainer.store.genes.ids)
    assert (start["init_from"], start["init_genes_matched"]) == (str(source), num_genes)
    assert f"{num_genes} of {num_genes} genes found by id" in first.err
    theirs = run_weights(source)
    for name, tensor in read_weights(latest_checkpoint(run_dir)).items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=1e-9)

    shutil.rmtree(source)
    second = attempt(trainer, run_dir, f"model.init_from={source}", *still, "training.steps=3", "--accept-changes")
    assert second.code == 0, second.err
    [start] = second.of("start")
    assert start["step"] == 2
    assert "init_genes_matched" not in start
