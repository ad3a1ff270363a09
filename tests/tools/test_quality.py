"""The comparison as a whole: it goes on where it was stopped, and refuses to mix what was not made alike."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cctrain.config import ModelConfig
from tests.data.conftest import gene_ids, random_counts
from tools import quality
from tools.quality_plan import BUDGETS, CUT_TO, DENSE, FLOPS, FLOPS_OF_DENSE, REFERENCE, STEPS, variants_of

ROOT = Path(__file__).parents[2]
VARIANTS = variants_of(ModelConfig(width=16, depth=1, heads=2), num_genes=100, longest=700)
FACTS = {
    "steps": 10,
    "draws": 1,
    "held_out_cells": 20,
    "training_cells": 80,
    "steps_an_epoch": 10,
    "labels": None,
    "variants": {
        variant.name: {"flops_a_step": 1e9 * (1 + place), "max_tokens": variant.max_tokens}
        for place, variant in enumerate(VARIANTS)
    },
}


def a_dataset(**changes: Any) -> Any:
    return SimpleNamespace(name="pbmc3k", variants=VARIANTS, facts=FACTS | changes)


@pytest.fixture
def result() -> dict[str, Any]:
    seconds = {name: 0.1 * (1 + place) for place, name in enumerate(FACTS["variants"])}
    known = {"facts": json.loads(json.dumps(FACTS)), "seconds_a_step": seconds, "baselines": {}}
    return quality.begun() | {"datasets": {"pbmc3k": known}}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were asked for; the fourth, at its first time, is interrupted."""
    runs: list[str] = []

    def train(training: Any, dataset: Any, folder: Path) -> Path:
        runs.append(training.folder)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return folder / training.folder

    def judged(run: Path, training: Any, cost: Any, dataset: Any, max_tokens: int | None) -> dict[str, Any]:
        return {"run": training.folder, "judged_on": max_tokens, "trained_on": training.variant.max_tokens, "nll": 0.5}

    monkeypatch.setattr(quality, "train", train)
    monkeypatch.setattr(quality, "judged", judged)
    return runs


def test_a_second_call_makes_the_rows_that_are_missing_and_no_other(
    result: dict[str, Any], trained: list[str], tmp_path: Path
) -> None:
    file, datasets = tmp_path / "quality.json", {"pbmc3k": a_dataset()}
    trainings = quality.planned(result, datasets, [0, 1])
    with pytest.raises(KeyboardInterrupt):
        quality.follow(result, trainings, datasets, file, tmp_path)
    kept = json.loads(file.read_text())
    assert [row["run"] for row in kept["rows"]] == trained[:3]

    first = list(trained)
    quality.follow(kept, quality.planned(kept, datasets, [0, 1]), datasets, file, tmp_path)

    assert trained[len(first) :] == [training.folder for training in trainings[3:]]
    runs = [row["run"] for row in json.loads(file.read_text())["rows"]]
    assert list(dict.fromkeys(runs)) == [training.folder for training in trainings]


def test_a_model_of_cut_contexts_is_judged_on_such_and_on_whole_ones(
    result: dict[str, Any], trained: list[str], tmp_path: Path
) -> None:
    datasets = {"pbmc3k": a_dataset()}
    cut = [one for one in quality.planned(result, datasets, [0]) if one.variant.max_tokens is not None]
    quality.follow(result, cut, datasets, tmp_path / "quality.json", tmp_path)
    assert [row["judged_on"] for row in result["rows"]] == [500, None]


def test_results_of_another_store_or_number_of_steps_are_not_mixed(result: dict[str, Any], tmp_path: Path) -> None:
    quality.adopt(result, a_dataset(), tmp_path / "quality.json")
    with pytest.raises(SystemExit, match=r"quality\.json holds results on pbmc3k with other steps: .* another --out"):
        quality.adopt(result, a_dataset(steps=11), tmp_path / "quality.json")


def test_a_training_saves_what_it_has_when_the_comparison_is_stopped(tmp_path: Path) -> None:
    began, saved = tmp_path / "began", tmp_path / "saved"
    training = f"""
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(saved)!r}).touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(began)!r}).touch()
time.sleep(60)
"""

    def stop_when_it_began() -> None:
        while not began.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    threading.Thread(target=stop_when_it_began).start()
    try:
        with pytest.raises(SystemExit):
            quality.ended([sys.executable, "-c", training])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved.exists()


def made_up_retina(work: Path) -> None:
    """120 cells of two types, which express about as many of 700 genes, each another half of them more strongly."""
    counts = random_counts(120, 700)
    types = np.arange(120) % 2
    counts[types == 0, :350] *= 3
    counts[types == 1, 350:] *= 3
    obs = pd.DataFrame({"cell_type": np.array(["rod", "cone"])[types]}, index=[f"cell{i}" for i in range(120)])
    (work / "retina").mkdir(parents=True)
    cells = anndata.AnnData(sp.csr_matrix(counts), obs, pd.DataFrame(index=gene_ids(700)))
    cells.write_h5ad(work / "retina" / "retina.h5ad")


@pytest.mark.slow
@pytest.mark.processes
def test_from_cells_to_tables_with_every_model_trained_as_planned(tmp_path: Path) -> None:
    made_up_retina(tmp_path / "data")
    config = tmp_path / "tiny.yaml"
    config.write_text("model: {width: 16, depth: 1, heads: 2}\ntraining: {warmup: 2}\ndata: {global_batch: 4}\n")
    words = ["--datasets", "retina", "--seeds", "0", "--steps", "6", "--config", config, "--work", tmp_path / "data"]
    words += ["--as-long-as-dense", "--runs", tmp_path / "runs", "--out", tmp_path / "out" / "quality"]

    def run(*more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tools.quality", *map(str, words), *more],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    planned = run("--dry-run")
    assert "trainings, about" in planned
    assert not (tmp_path / "runs").exists()
    run()

    result = json.loads((tmp_path / "out" / "quality.json").read_text())
    rows, facts = result["rows"], result["datasets"]["retina"]["facts"]
    assert {row["model"] for row in rows} == facts["variants"].keys()
    assert {row["targets"] for row in rows} == {facts["targets_digest"]}
    assert all(0.0 <= row["label_transfer"] <= 1.0 for row in rows)
    cuts = {(row["trained_on"], row["judged_on"]) for row in rows}
    assert cuts == {(None, None), (CUT_TO[0], CUT_TO[0]), (CUT_TO[0], None)}
    reference, longer = [row for row in rows if row["model"] == REFERENCE]
    assert (reference["equal"], longer["equal"]) == (list(BUDGETS), [FLOPS_OF_DENSE])
    for row in rows:
        flops = facts["variants"][row["model"]]["flops_a_step"]
        assert row["flops"] == pytest.approx(row["steps"] * flops, rel=0.1), "as predicted from an epoch"
        if FLOPS in row["equal"]:
            assert row["flops"] == pytest.approx(reference["flops"], abs=flops / 2 + 0.1 * reference["flops"])
        if STEPS in row["equal"]:
            assert row["steps"] == 6
    dense = {budget for row in rows if row["model"] == DENSE for budget in row["equal"]}
    assert dense == {*BUDGETS, FLOPS_OF_DENSE}
    assert (tmp_path / "out" / "quality.png").is_file()

    before = (tmp_path / "out" / "quality.json").stat().st_mtime_ns, (tmp_path / "out" / "quality.md").read_text()
    assert "| retina" not in before[1]
    assert run().endswith(before[1] + "\n")
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["rows"] == rows
