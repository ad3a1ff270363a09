from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.sparse as sp

from cctrain.apply.baselines import (
    Neighbours,
    fit_neighbours,
    gene_mean,
    poisson_gene_mean,
    refitted_share,
)
from cctrain.apply.metrics import correlation_within_gene, difference, nll_per_cell, verdict
from cctrain.apply.targets import TargetSet, TrainingCells, draw_targets, permuted_across_cells
from cctrain.errors import DataError

if TYPE_CHECKING:
    from conftest import Tissue

MakeTargets = Callable[..., TargetSet]


def _fit(tissue: Tissue, cells: TrainingCells | None = None) -> Neighbours:
    return fit_neighbours(cells or tissue.training, tissue.share, tissue.theta, tissue.target_probability, seed=0)


@pytest.fixture(scope="module")
def neighbours(typed_tissue: Tissue) -> Neighbours:
    return _fit(typed_tissue)


def _against_gene_mean(tissue: Tissue, fitted: Neighbours, targets: TargetSet) -> dict:
    return difference(
        nll_per_cell(targets, *fitted.predict(targets)),
        nll_per_cell(targets, *gene_mean(targets, tissue.share, tissue.theta)),
        seed=0,
    )


def test_gene_mean_is_the_size_factor_times_the_share(make_targets: MakeTargets):
    targets = replace(make_targets([0, 1, 1], [1, 0, 1], [0, 0, 0], cells=[0, 1]), log_size_factor=np.log([10.0, 50.0]))
    log_mu, log_theta = gene_mean(targets, np.array([0.8, 0.2]), np.array([4.0, 9.0]))
    assert np.exp(log_mu) == pytest.approx([2.0, 40.0, 10.0])
    assert np.exp(log_theta) == pytest.approx([9.0, 4.0, 9.0])
    poisson_mu, poisson_theta = poisson_gene_mean(targets, np.array([0.8, 0.2]))
    assert np.array_equal(poisson_mu, log_mu)
    assert np.all(poisson_theta == np.inf)


def test_neighbours_beat_the_gene_mean_where_there_are_cell_types(typed_tissue: Tissue, neighbours: Neighbours):
    targets = typed_tissue.targets(draws=3)
    assert verdict(_against_gene_mean(typed_tissue, neighbours, targets)) == "better"
    considered = np.ones(len(typed_tissue.share), dtype=bool)
    by_neighbours = correlation_within_gene(targets, neighbours.predict(targets)[0], considered)
    by_mean = correlation_within_gene(
        targets, gene_mean(targets, typed_tissue.share, typed_tissue.theta)[0], considered
    )
    assert by_neighbours["mean"] > by_mean["mean"] + 0.2


def test_neighbours_lose_little_where_there_is_nothing_to_learn(uniform_tissue: Tissue):
    result = _against_gene_mean(uniform_tissue, _fit(uniform_tissue), uniform_tissue.targets(draws=3))
    assert abs(result["mean"]) < 0.01


def test_neighbours_lose_all_advantage_when_counts_change_hands(typed_tissue: Tissue, neighbours: Neighbours):
    targets = permuted_across_cells(typed_tissue.targets(draws=3), seed=0)
    assert verdict(_against_gene_mean(typed_tissue, neighbours, targets)) != "better"


def test_endless_shrinkage_is_the_gene_mean_and_none_is_the_neighbours(typed_tissue: Tissue, neighbours: Neighbours):
    targets = typed_tissue.targets()
    mean_mu, _ = gene_mean(targets, typed_tissue.share, typed_tissue.theta)
    shrunk, free = (
        replace(neighbours, settings=replace(neighbours.settings, k=10, strength=strength)).predict(targets)[0]
        for strength in (1e15, 1e-15)
    )
    assert shrunk == pytest.approx(mean_mu)
    # What none of ten neighbours expresses is as good as impossible without shrinkage.
    assert free.min() < mean_mu.min() - 20


def test_hidden_counts_have_no_influence_on_a_prediction(typed_tissue: Tissue, neighbours: Neighbours):
    targets = typed_tissue.targets()
    counts = typed_tissue.held_out.counts.toarray()
    counts[targets.cell_of_context[targets.contexts], targets.genes] += 1000
    changed = TrainingCells(sp.csr_matrix(counts), typed_tissue.held_out.source_of_cell, typed_tissue.held_out.measured)
    rows = np.arange(len(counts))
    others = draw_targets(changed, rows, typed_tissue.share, typed_tissue.target_probability, seed=5)
    assert others.counts.sum() > targets.counts.sum()
    for before, after in zip(neighbours.predict(targets), neighbours.predict(others), strict=True):
        assert np.array_equal(before, after)


def test_a_gene_that_no_neighbour_measured_gets_the_gene_mean(typed_tissue: Tissue):
    cells = typed_tissue.training
    measured = cells.measured.copy()
    measured[0, 7] = False
    counts = cells.counts.toarray()
    counts[:, 7] = 0
    fitted = _fit(typed_tissue, TrainingCells(sp.csr_matrix(counts), cells.source_of_cell, measured))
    targets = typed_tissue.targets()
    of_gene = targets.genes == 7
    assert of_gene.any()
    expected = gene_mean(targets, typed_tissue.share, typed_tissue.theta)[0][of_gene]
    assert fitted.predict(targets)[0][of_gene] == pytest.approx(expected)


def test_neighbours_that_did_not_measure_a_gene_do_not_vote_zero(typed_tissue: Tissue):
    counts, share = typed_tissue.training.counts.toarray(), typed_tissue.share
    source = np.arange(len(counts)) % 2
    measured = np.ones((2, len(share)), dtype=bool)
    measured[1, ::3] = False
    counts[(source == 1)[:, None] & ~measured[1]] = 0
    fitted = _fit(typed_tissue, TrainingCells(sp.csr_matrix(counts), source, measured))
    targets = typed_tissue.targets(draws=3)
    log_mu, _ = fitted.predict(targets)
    partly = np.isin(targets.genes, np.arange(0, len(share), 3))
    assert np.exp(log_mu[partly]).sum() == pytest.approx(targets.counts[partly].sum(), rel=0.1)


def test_fitting_is_repeatable(typed_tissue: Tissue, neighbours: Neighbours):
    assert _fit(typed_tissue).settings == neighbours.settings


def test_ten_training_cells_are_needed(typed_tissue: Tissue):
    with pytest.raises(DataError, match="got 9"):
        _fit(typed_tissue, typed_tissue.training.take(np.arange(9)))
    few = _fit(typed_tissue, typed_tissue.training.take(np.arange(10)))
    assert np.isfinite(few.predict(typed_tissue.targets())[0]).all()


def test_refitted_share_gains_nothing_when_targets_are_chosen_by_gene(typed_tissue: Tissue):
    assert verdict(_refitted_against_gene_mean(typed_tissue, expressed_only=False)) != "better"


def test_refitted_share_reveals_targets_that_were_chosen_by_count(typed_tissue: Tissue):
    result = _refitted_against_gene_mean(typed_tissue, expressed_only=True)
    assert verdict(result) == "better"
    assert result["mean"] < -0.1


def _refitted_against_gene_mean(tissue: Tissue, expressed_only: bool) -> dict:
    rows = np.arange(tissue.training.counts.shape[0])
    training = draw_targets(tissue.training, rows, tissue.share, tissue.target_probability, seed=1)
    targets = tissue.targets(draws=3)
    if expressed_only:
        training, targets = _mostly_expressed(training), _mostly_expressed(targets)
    share = refitted_share(training, tissue.share)
    return difference(
        nll_per_cell(targets, *gene_mean(targets, share, tissue.theta)),
        nll_per_cell(targets, *gene_mean(targets, tissue.share, tissue.theta)),
        seed=0,
    )


def _mostly_expressed(targets: TargetSet) -> TargetSet:
    """The targets as a careless rule would choose them: the expressed genes and a few zeros."""
    kept = (targets.counts > 0) | (np.random.default_rng(0).random(len(targets.counts)) < 0.1)
    return replace(targets, contexts=targets.contexts[kept], genes=targets.genes[kept], counts=targets.counts[kept])
