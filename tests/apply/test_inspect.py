"""What `cctrain inspect` says of a store, a run and a checkpoint, and what it finds damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cctrain.apply.inspect import inspect
from cctrain.config import load_config, to_yaml
from cctrain.data.store.store import TokenStore
from cctrain.errors import CheckpointError, DataError, UsageError
from cctrain.run_directory import CHECKPOINTS, CONFIG, LATEST, WEIGHTS
from cctrain.tracking.journal import Journal
from cctrain.training.checkpoint_files import MANIFEST, partial_folder, publish, read_manifest
from cctrain.training.checkpoint_files import write_manifest as rewrite_manifest
from cctrain.training.guards import write_outcome
from tests.training.test_checkpoint_files import flip_a_byte, write_fragments


def save(run_dir: Path, step: int, nll: float | None = None) -> None:
    """A checkpoint of two parameters with 10 elements in two files."""
    partial = partial_folder(run_dir, step)
    values = {name: {"master": torch.arange(float(n))} for name, n in (("v", 4), ("w", 6))}
    write_fragments(partial, values, {"v": [4], "w": [3, 2]}, {"v": [(0, 4, 0)], "w": [(0, 1, 0), (1, 5, 1)]})
    state = {"step": step, "position": 10 * step, "attempt": 2, "num_ranks": 2, "zero_stage": 3, "precision": "bf16"}
    facts = {"applied_steps": step - 1, "held_out_nll": nll, "store_digest": "feed"}
    rewrite_manifest(partial, {**read_manifest(partial), **state, **facts})
    publish(run_dir, step)


def write_attempt(run_dir: Path, attempt: int, start: int, *events: tuple[str, int, dict[str, Any]]) -> None:
    journal = Journal(run_dir, attempt)
    journal.write("start", start, run="r", world_size=2, zero_stage=3)
    for event, step, values in events:
        journal.write(event, step, **values)
    journal.close()


def step(number: int, loss: float = 1.5) -> tuple[str, int, dict[str, Any]]:
    return "step", number, {"loss": loss}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Killed in its first attempt, preempted in its second, which had repeated a step."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / "mine.yaml").write_text("data: {store: mine}\ntraining: {steps: 9}\n")
    (run_dir / CONFIG).write_text(to_yaml(load_config(tmp_path / "mine.yaml")))
    look = {"nll": 2.25, "difference": -0.125, "cells": 6}
    write_attempt(run_dir, 1, 0, step(1), step(2), ("evaluate", 2, look), ("checkpoint", 2, {}), step(3, 7.0))
    stop = ("stop", 4, {"status": "requeue", "reason": "time_limit"})
    write_attempt(run_dir, 2, 2, step(3, 1.25), step(4, 1.0), ("checkpoint", 4, {}), stop)
    save(run_dir, 2, nll=2.25)
    save(run_dir, 4)
    write_outcome(run_dir, "requeue")
    return run_dir


# ---- a run


def test_a_run_tells_where_it_stands_and_how_its_attempts_ended(run_dir):
    facts, text = inspect(run_dir, verify=False)
    assert (facts["steps"], facts["last_step"], facts["loss"], facts["outcome"]) == (9, 4, 1.0, "requeue")
    assert facts["held_out"] == {"step": 2, "nll": 2.25, "difference": -0.125}
    killed, preempted = facts["attempts"]
    assert (killed["from_step"], killed["last_step"], killed["status"]) == (0, 3, "killed, or still training")
    assert (preempted["from_step"], preempted["last_step"], preempted["ranks"]) == (2, 4, 2)
    assert (preempted["status"], preempted["reason"]) == ("requeue", "time_limit")
    assert [entry["step"] for entry in facts["checkpoints"]] == [2, 4]
    assert (facts["latest"], facts["has_weights"], facts["damaged"]) == ("step-00000004", False, [])
    assert text.splitlines() == [
        f"run {run_dir}",
        "step        4 of 9, loss 1.0000; requeue",
        "held out    NLL 2.2500 at step 2, -0.1250 against the gene mean",
        "attempt 1   from step 0 to 3 on 2 rank(s), ZeRO 3: killed, or still training",
        "attempt 2   from step 2 to 4 on 2 rank(s), ZeRO 3: requeue (time_limit)",
        "checkpoint  step 2, 0.0 MiB, held-out NLL 2.2500",
        "checkpoint  step 4, 0.0 MiB (latest)",
        "weights     none yet: it has not finished",
    ]


def test_the_checkpoint_that_latest_names_is_shown_as_such(run_dir):
    (run_dir / CHECKPOINTS / LATEST).write_text("step-00000002\n")
    assert "checkpoint  step 2, 0.0 MiB, held-out NLL 2.2500 (latest)" in inspect(run_dir, verify=False)[1]


def test_a_run_that_has_finished_has_weights(run_dir):
    (run_dir / WEIGHTS).write_bytes(b"")
    write_outcome(run_dir, "finished")
    facts, text = inspect(run_dir, verify=False)
    assert facts["has_weights"]
    assert text.splitlines()[-1] == f"weights     {WEIGHTS}"


def test_a_run_that_has_not_begun_has_only_its_configuration(run_dir, tmp_path):
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / CONFIG).write_bytes((run_dir / CONFIG).read_bytes())
    facts, text = inspect(fresh, verify=True)
    assert (facts["last_step"], facts["loss"], facts["attempts"], facts["checkpoints"]) == (0, None, [], [])
    assert "step        0 of 9" in text


def test_a_journal_alone_is_a_run_too(run_dir):
    (run_dir / CONFIG).unlink()
    facts, text = inspect(run_dir, verify=False)
    assert facts["steps"] is None
    assert "step        4, loss 1.0000" in text


def test_what_is_not_finite_stays_json(run_dir):
    look = ("evaluate", 5, {"nll": float("inf"), "difference": float("inf"), "cells": 6})
    write_attempt(run_dir, 3, 4, step(5, float("nan")), look)
    facts, text = inspect(run_dir, verify=False)
    assert json.loads(json.dumps(facts, allow_nan=False))["loss"] == "nan"
    assert facts["held_out"]["nll"] == "inf"
    assert "loss nan" in text
    assert "NLL inf at step 5, +inf against" in text


def test_a_checkpoint_whose_manifest_is_damaged_is_named_and_the_others_shown(run_dir):
    flip_a_byte(run_dir / CHECKPOINTS / "step-00000002" / MANIFEST)
    facts, text = inspect(run_dir, verify=False)
    [message] = facts["damaged"]
    assert "step-00000002/manifest.json is damaged" in message
    assert [entry["step"] for entry in facts["checkpoints"]] == [4]
    assert f"damaged     {message}" in text


def test_verifying_a_run_names_every_damaged_file_of_every_checkpoint(run_dir):
    inspect(run_dir, verify=True)
    flip_a_byte(run_dir / CHECKPOINTS / "step-00000002" / "rank-00001.safetensors")
    (run_dir / CHECKPOINTS / "step-00000004" / "rank-00000.safetensors").write_bytes(b"")
    inspect(run_dir, verify=False)
    with pytest.raises(CheckpointError) as found:
        inspect(run_dir, verify=True)
    first, second = str(found.value).splitlines()
    assert "step-00000002 is damaged: rank-00001.safetensors is not what was written" in first
    assert "step-00000004 is damaged: rank-00000.safetensors has 0 bytes instead of" in second


# ---- a checkpoint


def test_a_checkpoint_tells_what_it_holds_and_who_wrote_it(run_dir):
    path = run_dir / CHECKPOINTS / "step-00000002"
    facts, text = inspect(path, verify=True)
    assert (facts["step"], facts["position"], facts["parameters"], facts["files"]) == (2, 20, 10, 2)
    assert facts["bytes"] == sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert facts["verified"]
    assert "step        2, 20 samples consumed, attempt 2, held-out NLL 2.2500" in text
    assert "weights     10 parameters, AdamW's state after 1 steps" in text
    assert "written by  2 rank(s), ZeRO 3, bf16" in text


def test_a_checkpoint_is_known_by_its_content_under_another_name(run_dir, tmp_path):
    (run_dir / CHECKPOINTS / "step-00000002").rename(tmp_path / "kept")
    assert inspect(tmp_path / "kept", verify=True)[0]["step"] == 2


def test_a_damaged_checkpoint_names_the_file_when_it_is_verified(run_dir):
    path = run_dir / CHECKPOINTS / "step-00000004"
    flip_a_byte(path / "rank-00000.safetensors")
    assert not inspect(path, verify=False)[0]["verified"]
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is not what was written .* the one before it"):
        inspect(path, verify=True)


def test_a_checkpoint_without_a_manifest_is_damaged(run_dir):
    path = run_dir / CHECKPOINTS / "step-00000004"
    (path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        inspect(path, verify=False)


# ---- a store, and what is nothing


def test_a_store_tells_its_cells_and_verifies(tiny_store: TokenStore):
    facts, text = inspect(tiny_store.path, verify=True)
    assert facts["num_cells"] == 70
    assert text.startswith(f"token store {tiny_store.path}, every file verified\n")


@pytest.mark.parametrize("name", ["nowhere", "step-00000001", "a-file"])
def test_a_path_that_is_no_folder_is_refused(tmp_path, name):
    (tmp_path / "a-file").write_text("")
    with pytest.raises(UsageError, match=f"there is no folder .*{name}: pass a token store, a run directory or"):
        inspect(tmp_path / name, verify=False)


@pytest.mark.parametrize("manifest", [None, b"3", b"[]", b"null", b"\x80\x04N.", b'{"format": "another"}'])
def test_a_folder_of_something_else_is_refused(tmp_path, manifest):
    if manifest is not None:
        (tmp_path / MANIFEST).write_bytes(manifest)
    with pytest.raises(DataError, match=r"manifest"):
        inspect(tmp_path, verify=False)
