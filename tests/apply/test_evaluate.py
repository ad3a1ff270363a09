"""What `evaluate` says of models trained on cells of which we know what there is to learn."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cctrain.apply import evaluate as evaluate_module
from cctrain.apply.evaluate import GENE_MEAN, HIDDEN, MODEL, NEIGHBOURS, compare, evaluate, held_out_targets, table
from cctrain.apply.targets import TargetSet
from cctrain.config import load_config
from cctrain.data.store.store import TokenStore
from tests.data.conftest import prepared, write_h5ad
from tests.trainer import Trainer

NUM_CELLS, NUM_GENES = 300, 60
TINY = """
data: {global_batch: 16}
model: {width: 16, depth: 1, heads: 2, latents: 4}
training: {steps: 120, warmup: 10, learning_rate: 5e-3}
evaluation: {every: 60, cells: 16, draws: 4}
"""


def poisson_cells(types: float, seed: int = 0, first_gene: int = 0) -> np.ndarray:
    """Poisson counts around gene means at unequal depths; two types of cells differ by e^±types in each gene."""
    draws = np.random.default_rng(seed)
    rates = draws.gamma(1.0, size=NUM_GENES) + 0.1
    rates = rates * np.exp(types * draws.choice([-1.0, 1.0], size=NUM_GENES) * np.array([[1.0], [-1.0]]))
    rates /= rates.sum(axis=1, keepdims=True)
    depth = draws.uniform(60, 240, size=(NUM_CELLS, 1))
    return draws.poisson(depth * rates[draws.integers(2, size=NUM_CELLS)])


def train_on(folder: Path, counts: np.ndarray) -> Path:
    """A run trained by the command line."""
    store = prepared(folder / "store", write_h5ad(folder / "cells.h5ad", counts), held_out=0.25)
    (folder / "tiny.yaml").write_text(TINY)
    with Trainer(folder / "tiny.yaml", store, folder) as trainer:
        trainer.run(folder / "run", 0)
    return folder / "run"


@pytest.fixture(scope="module")
def typed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on(tmp_path_factory.mktemp("typed"), poisson_cells(types=0.8))


@pytest.fixture(scope="module")
def typed_result(typed_run: Path) -> dict[str, Any]:
    return evaluate(typed_run)


def row(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in result["rows"] if entry["name"] == name)


@pytest.mark.slow
@pytest.mark.representative
def test_two_planted_types_are_learned_from_the_context(typed_result):
    for name in (GENE_MEAN, HIDDEN):
        assert row(typed_result, name)["difference"]["high"] < -0.02, name
    assert typed_result["sentence"].count("better than") >= 3
    assert row(typed_result, MODEL)["correlation_within_gene"] > row(typed_result, GENE_MEAN)["correlation_within_gene"]


@pytest.mark.slow
@pytest.mark.representative
def test_counts_permuted_across_cells_destroy_what_was_learned(typed_result):
    assert typed_result["permuted"]["high"] > 0
    assert typed_result["permuted"]["mean"] > row(typed_result, GENE_MEAN)["difference"]["mean"]


@pytest.mark.slow
@pytest.mark.representative
def test_the_report_is_written_beside_the_run(typed_run, typed_result):
    folder = typed_run / "evaluation"
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(typed_result))
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    written = (folder / "table.md").read_text()
    assert written.startswith(typed_result["sentence"])
    assert table(typed_result) in written


@pytest.mark.slow
@pytest.mark.representative
def test_evaluating_again_gives_the_same_numbers(typed_run, typed_result):
    assert json.dumps(evaluate(typed_run)) == json.dumps(typed_result)


@pytest.mark.slow
def test_pure_noise_around_the_gene_mean_is_not_called_better(tmp_path):
    result = evaluate(train_on(tmp_path, poisson_cells(types=0.0)))
    assert row(result, GENE_MEAN)["difference"]["high"] >= 0
    for name in (GENE_MEAN, NEIGHBOURS, HIDDEN):
        assert row(result, name)["difference"]["mean"] > -0.02, name
    gene_mean = "the gene mean (negative binomial)"
    assert f"better than {gene_mean}" not in result["sentence"]
    assert f"no different from {gene_mean}" in result["sentence"] or f"worse than {gene_mean}" in result["sentence"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("evaluated")
    return prepared(folder / "store", write_h5ad(folder / "cells.h5ad", poisson_cells(0.8)[:60]), held_out=0.25)


@pytest.fixture(scope="module")
def targets(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> TargetSet:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return held_out_targets(store, load_config(path, [f"data.store={store.path}"]))[0]


def test_targets_and_visible_genes_of_a_held_out_cell_divide_its_counts(store, targets):
    num_held_out = store.num_cells - store.num_train
    assert targets.num_cells == num_held_out
    assert targets.num_contexts == 4 * num_held_out
    whole = store.cells(np.arange(store.num_train, store.num_cells))
    for context, cell in enumerate(targets.cell_of_context):
        tokens = slice(whole.offsets[cell], whole.offsets[cell + 1])
        given = dict(zip(whole.genes[tokens].tolist(), whole.counts[tokens].tolist(), strict=True))
        seen = slice(targets.visible_offsets[context], targets.visible_offsets[context + 1])
        visible = dict(zip(targets.visible_genes[seen].tolist(), targets.visible_counts[seen].tolist(), strict=True))
        mine = targets.contexts == context
        hidden = dict(zip(targets.genes[mine].tolist(), targets.counts[mine].tolist(), strict=True))
        assert not visible.keys() & hidden.keys()
        assert visible | {gene: count for gene, count in hidden.items() if count} == given


def test_no_training_cell_is_evaluated_and_the_draws_of_a_cell_differ(store, targets):
    assert store.num_train > 0
    first = {tuple(targets.genes[targets.contexts == context]) for context in range(4)}
    assert len(first) == 4


@pytest.mark.parametrize("window", ["null", "3"])
def test_a_held_out_cell_has_the_same_targets_alone_and_in_its_group(tmp_path, window):
    donors = [f"donor {i % 7}" for i in range(60)]
    source = write_h5ad(tmp_path / "cells.h5ad", poisson_cells(0.8)[:60], obs={"donor": donors})
    store = prepared(tmp_path / "store", source, group_by="donor", held_out=0.4)
    (tmp_path / "tiny.yaml").write_text(TINY)
    described, num_contexts = [], []
    for kind in (("data.context=cell",), ("data.context=group", f"data.window={window}")):
        config = load_config(tmp_path / "tiny.yaml", [f"data.store={store.path}", *kind])
        targets, num, contexts = held_out_targets(store, config)
        num_contexts.append(num)
        assert sum(len(context.targets) for context in contexts()) == len(targets.genes)
        predicted = np.concatenate([context.genes[context.targets] for context in contexts()])
        assert np.array_equal(predicted, targets.genes)
        described.append(
            sorted(
                (
                    int(targets.cell_of_context[context]),
                    float(targets.log_size_factor[context]),
                    targets.genes[targets.contexts == context].tolist(),
                    targets.counts[targets.contexts == context].tolist(),
                    targets.visible_genes[slice(*targets.visible_offsets[context : context + 2])].tolist(),
                )
                for context in range(targets.num_contexts)
            )
        )
    assert described[0] == described[1]
    assert num_contexts[1] < num_contexts[0] == 4 * (store.num_cells - store.num_train)


def test_baselines_of_a_store_with_groups_are_fitted_on_cells_of_all_of_them(tmp_path, monkeypatch):
    donors = [f"donor {i % 7}" for i in range(280)]
    source = write_h5ad(tmp_path / "cells.h5ad", poisson_cells(0.8)[:280], obs={"donor": donors})
    store = prepared(tmp_path / "store", source, group_by="donor", held_out=0.3)
    monkeypatch.setattr(evaluate_module, "MOST_TRAINING_CELLS", 60)
    cells = evaluate_module.training_cells(store)
    assert cells.counts.shape[0] == 60

    def described(genes: np.ndarray, counts: np.ndarray) -> tuple:
        return tuple(genes.tolist()), tuple(counts.tolist())

    train, matrix = store.cells(np.arange(store.num_train)), cells.counts
    rows = {described(train.genes[a:b], train.counts[a:b]): row for row, (a, b) in enumerate(pairwise(train.offsets))}
    chosen = [rows[described(matrix.indices[a:b], matrix.data[a:b])] for a, b in pairwise(matrix.indptr)]
    group = np.searchsorted(store.groups.starts, chosen, side="right") - 1
    assert set(group.tolist()) == set(range(store.groups.num_train))


def test_the_sentence_follows_the_intervals_and_not_the_means(targets):
    flat = np.zeros(len(targets.genes))
    expected = np.log(np.maximum(targets.counts, 0.3))
    better, same = (expected, flat + 5), (flat, flat + 5)
    result = compare(targets, {MODEL: better, GENE_MEAN: same, HIDDEN: better}, np.ones(NUM_GENES, dtype=bool), 0)
    assert "better than the gene mean" in result["sentence"]
    assert "no different from itself with the context hidden" in result["sentence"]
    result = compare(targets, {MODEL: same, GENE_MEAN: better, HIDDEN: same}, np.ones(NUM_GENES, dtype=bool), 0)
    assert "worse than the gene mean" in result["sentence"]


def test_a_correlation_that_no_gene_has_targets_for_is_null_and_not_a_number(targets):
    flat = (np.zeros(len(targets.genes)), np.full(len(targets.genes), 5.0))
    names = {MODEL: flat, GENE_MEAN: flat, NEIGHBOURS: flat}
    result = compare(targets, names, np.zeros(NUM_GENES, dtype=bool), 0)
    assert result["rows"][0]["correlation_within_gene"] is None
    assert json.dumps(result, allow_nan=False)
    facts = {"draws": 4, "held_out_cells": 4, "training_cells": 9, "neighbours_fitted_on": 9}
    assert "too few targets" in table(result | facts)
