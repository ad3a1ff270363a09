"""The comparison as a whole: it goes on where it was stopped, and refuses to mix what was not made alike."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cctrain.config import Config, ModelConfig, TrainingConfig
from cctrain.run_directory import WEIGHTS
from tests.data.conftest import gene_ids, random_counts
from tools import quality
from tools.quality_data import peak_learning_rate, variants_in
from tools.quality_plan import (
    BUDGETS,
    CUT_TO,
    DENSE,
    FLOPS,
    REFERENCE,
    STEPS,
    TIME,
    Training,
    variants_of,
)

ROOT = Path(__file__).parents[2]
VARIANTS = variants_of(ModelConfig(width=16, depth=1, heads=2), num_genes=100, longest=700)
FACTS = {
    "config": "training: {learning_rate: 2e-3}",
    "steps": 10,
    "draws": 1,
    "held_out_cells": 20,
    "training_cells": 80,
    "steps_an_epoch": 10,
    "labels": None,
    "variants": {
        variant.name: asdict(variant) | {"flops_a_step": 1e9 * (1 + place)} for place, variant in enumerate(VARIANTS)
    },
}


def a_dataset(**changes: Any) -> Any:
    return SimpleNamespace(name="pbmc3k", variants=VARIANTS, facts=FACTS | changes)


@pytest.fixture
def result() -> dict[str, Any]:
    seconds = {name: 0.1 * (1 + place) for place, name in enumerate(FACTS["variants"])}
    known = {"facts": json.loads(json.dumps(FACTS)), "seconds_a_step": seconds, "baselines": {}}
    return quality.begun() | {"datasets": {"pbmc3k": known}}


def a_row_of(training: Training) -> dict[str, Any]:
    model = training.variant.name
    return {"run": training.folder, "dataset": training.dataset, "model": model, "steps": training.steps}


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


def test_no_time_is_to_go_after_the_last_training(
    result: dict[str, Any], trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = {"pbmc3k": a_dataset()}
    three = quality.planned(result, datasets, [0])[:3]
    quality.follow(result, three, datasets, tmp_path / "quality.json", tmp_path)
    assert capsys.readouterr().err.splitlines()[-1].endswith("about 0 s to go")


def test_a_model_of_cut_contexts_is_judged_on_such_and_on_whole_ones(
    result: dict[str, Any], trained: list[str], tmp_path: Path
) -> None:
    datasets = {"pbmc3k": a_dataset()}
    [cut] = [one for one in quality.planned(result, datasets, [0]) if one.variant.max_tokens and STEPS in one.equal]
    quality.follow(result, [cut], datasets, tmp_path / "quality.json", tmp_path)
    assert [row["judged_on"] for row in result["rows"]] == [500, None]


def test_a_result_that_is_older_than_a_baseline_is_given_it(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    result["datasets"]["pbmc3k"]["baselines"] = {"gene mean": {"nll": 0.6}}
    monkeypatch.setattr(quality, "baselines", lambda held_out, shape, known: {"untrained": {"nll": 0.7}})
    dataset = a_dataset()
    dataset.held_out = SimpleNamespace(config=Config())
    quality.judge_baselines(result, dataset)
    assert result["datasets"]["pbmc3k"]["baselines"] == {"gene mean": {"nll": 0.6}, "untrained": {"nll": 0.7}}


def test_results_of_another_store_or_number_of_steps_are_not_mixed(result: dict[str, Any], tmp_path: Path) -> None:
    quality.adopt(result, a_dataset(), tmp_path / "quality.json")
    with pytest.raises(SystemExit, match=r"quality\.json holds results on pbmc3k with other steps: .* another --out"):
        quality.adopt(result, a_dataset(steps=11), tmp_path / "quality.json")


def test_learning_rates_are_tried_for_the_first_seed_and_not_the_configurations_again(result: dict[str, Any]) -> None:
    datasets, rates = {"pbmc3k": a_dataset()}, [4e-3, 2e-3, 4e-3]
    without = quality.planned(result, datasets, [1, 0])
    tried = [one for one in quality.planned(result, datasets, [1, 0], rates) if one not in without]
    assert [(one.seed, one.variant.name, one.learning_rate, one.steps) for one in tried] == [
        (1, REFERENCE, 4e-3, FACTS["steps"]),
        (1, DENSE, 4e-3, FACTS["steps"]),
    ]


def test_learning_rates_may_be_added_to_results_that_were_kept_without_them(
    result: dict[str, Any], trained: list[str], tmp_path: Path
) -> None:
    file, datasets = tmp_path / "quality.json", {"pbmc3k": a_dataset()}
    without = quality.planned(result, datasets, [0])
    old = [a_row_of(training) for training in without]
    file.write_text(json.dumps(result | {"rows": old}))

    kept = quality.kept(file)
    quality.adopt(kept, a_dataset(), file)
    quality.follow(kept, quality.planned(kept, datasets, [0], [5e-4]), datasets, file, tmp_path)

    assert [(row["run"], row["learning_rate"]) for row in kept["rows"][: len(old)]] == [
        (row["run"], 2e-3) for row in old
    ], "as the configuration says"
    assert [run.rpartition("/")[2] for run in trained] == [
        "criss-cross-M-64-steps-10-seed-0-learning-rate-0.0005",
        "dense-steps-10-seed-0-learning-rate-0.0005",
    ]


def test_rows_that_are_older_than_a_budget_serve_it_too(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    planned = quality.planned(result, {"pbmc3k": a_dataset()}, [0])
    file.write_text(json.dumps(result | {"rows": [a_row_of(one) | {"equal": ["steps"]} for one in planned]}))
    kept = quality.kept(file)
    assert [row["equal"] for row in kept["rows"]] == [list(training.equal) for training in planned]
    assert not quality.without_rows(kept, planned)


def test_every_row_of_the_committed_result_is_in_the_plan_of_its_seed() -> None:
    kept = quality.kept(ROOT / "tools" / "results" / "quality.json")
    datasets = {
        name: SimpleNamespace(name=name, variants=variants_in(known["facts"]))
        for name, known in kept["datasets"].items()
    }
    planned = quality.planned(kept, datasets, [0, 1, 2], [row["learning_rate"] for row in kept["rows"]])
    assert {row["run"] for row in kept["rows"]} <= {training.folder for training in planned}
    for row in kept["rows"]:
        configured = peak_learning_rate(kept["datasets"][row["dataset"]]["facts"])
        assert bool(row["equal"]) == (row["learning_rate"] == configured)


def test_the_hours_that_older_results_counted_are_dropped(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    file.write_text(json.dumps(result | {"seconds": 3900.0}))
    assert quality.kept(file) == result


def test_a_row_that_says_its_learning_rate_keeps_it(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    file.write_text(json.dumps(result | {"rows": [{"dataset": "pbmc3k", "learning_rate": 5e-4}]}))
    assert quality.kept(file)["rows"] == [{"dataset": "pbmc3k", "learning_rate": 5e-4}]


def test_a_configuration_that_does_not_say_its_learning_rate_has_the_default() -> None:
    assert peak_learning_rate({"config": "model: {width: 16}"}) == TrainingConfig().learning_rate


@pytest.mark.parametrize(("learning_rate", "said"), [(None, []), (5e-4, ["training.learning_rate=0.0005"])])
def test_a_training_is_told_its_learning_rate_where_it_is_not_the_configurations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, learning_rate: float | None, said: list[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(quality, "ended", lambda command: commands.append(command) or 0)
    training = Training("pbmc3k", VARIANTS[0], 10, (), 0, learning_rate)
    (tmp_path / training.folder / WEIGHTS).parent.mkdir(parents=True)
    (tmp_path / training.folder / WEIGHTS).touch()
    dataset = SimpleNamespace(
        held_out=SimpleNamespace(config=Config()), settings=lambda variant: [], config_file="config.yaml"
    )
    quality.train(training, dataset, tmp_path)
    assert [word for word in commands[0] if "learning_rate" in word] == said


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], [100, 200]),
        (["--datasets", "retina"], [200]),
        (["--steps", "300"], [300, 300]),
        (["--datasets", "retina", "pbmc3k", "--steps", "300", "50"], [300, 50]),
    ],
)
def test_every_data_set_has_steps_of_its_own_unless_others_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], steps: list[int]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", *words, "--out", str(tmp_path / "quality")])
    assert quality.parsed().steps == steps


def test_without_arguments_it_goes_on_from_the_result_in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quality"])
    arguments = quality.parsed()
    committed = json.loads((ROOT / arguments.out.with_suffix(".json")).read_text())["datasets"]
    asked = dict(zip(arguments.datasets, arguments.steps, strict=True))
    assert asked == {name: known["facts"]["steps"] for name, known in committed.items()}
    assert {known["facts"]["config"] for known in committed.values()} == {(ROOT / arguments.config).read_text()}


def test_a_learning_rate_of_zero_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quality", "--learning-rates", "1e-3", "0"])
    with pytest.raises(SystemExit):
        quality.parsed()
    assert "--learning-rates takes numbers above 0" in capsys.readouterr().err


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
    words += ["--learning-rates", "5e-3"]
    words += ["--runs", tmp_path / "runs", "--out", tmp_path / "out" / "quality"]

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
    reference, *longer, other = [row for row in rows if row["model"] == REFERENCE]
    assert reference["equal"][:3] == [STEPS, FLOPS, TIME]
    assert {budget for row in (reference, *longer) for budget in row["equal"]} == set(BUDGETS), "some steps serve two"
    assert other["equal"] == []
    assert (reference["learning_rate"], other["learning_rate"]) == (1e-3, 5e-3)
    assert other["nll"] != reference["nll"]
    for row in rows:
        flops = facts["variants"][row["model"]]["flops_a_step"]
        assert row["flops"] == pytest.approx(row["steps"] * flops, rel=0.1), "as predicted from an epoch"
        if FLOPS in row["equal"]:
            assert row["flops"] == pytest.approx(reference["flops"], abs=flops / 2 + 0.1 * reference["flops"])
        if STEPS in row["equal"]:
            assert row["steps"] == 6
    dense = {budget for row in rows if row["model"] == DENSE for budget in row["equal"]}
    assert dense == set(BUDGETS)
    assert (tmp_path / "out" / "quality.png").is_file()

    before = (tmp_path / "out" / "quality.json").stat().st_mtime_ns, (tmp_path / "out" / "quality.md").read_text()
    assert "| retina" not in before[1]
    assert "### Learning rate, seed 0" in before[1]
    assert run().endswith(before[1] + "\n")
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["rows"] == rows
