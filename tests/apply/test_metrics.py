import itertools
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from scipy import stats

from cctrain.apply.metrics import (
    correlation_within_cell,
    correlation_within_gene,
    difference,
    nb_log_likelihood,
    nll_per_cell,
    verdict,
)
from cctrain.apply.targets import TargetSet
from cctrain.errors import TrainingError

MakeTargets = Callable[..., TargetSet]


def _exact(count: int, log_mu: float, log_theta: float) -> float:
    with mpmath.workdps(400):
        mu, theta = mpmath.exp(log_mu), mpmath.exp(log_theta)
        ways = mpmath.loggamma(count + theta) - mpmath.loggamma(theta) - mpmath.loggamma(count + 1)
        return float(ways + theta * mpmath.log(theta / (theta + mu)) + count * mpmath.log(mu / (theta + mu)))


def test_likelihood_agrees_with_scipy():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, size=500)
    mu, theta = rng.gamma(1.0, 5.0, size=500), rng.gamma(1.0, 3.0, size=500) + 1e-2
    expected = stats.nbinom.logpmf(counts, theta, theta / (theta + mu))
    assert nb_log_likelihood(counts, np.log(mu), np.log(theta)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("log_theta", [-600.0, -20.0, -1.0, 3.0, 6.89, 6.93, 12.0, 20.0, 40.0, 300.0])
def test_likelihood_is_exact_over_the_whole_range(log_theta: float):
    points = list(itertools.product([0, 1, 7, 300, 70_000], [-60.0, -3.0, 0.0, 4.0, 30.0]))
    counts, log_mu = np.array(points).T
    expected = [_exact(int(count), mean, log_theta) for count, mean in points]
    values = nb_log_likelihood(counts, log_mu, np.full(len(points), log_theta))
    assert values == pytest.approx(expected, rel=2e-11, abs=1e-300)


def test_infinite_theta_is_the_poisson():
    counts, mu = np.array([0, 1, 5, 1000]), np.array([1e-9, 0.3, 5.0, 900.0])
    poisson = nb_log_likelihood(counts, np.log(mu), np.full(4, np.inf))
    assert poisson == pytest.approx(stats.poisson.logpmf(counts, mu), rel=1e-12)
    assert nb_log_likelihood(counts, np.log(mu), np.full(4, 60.0)) == pytest.approx(poisson, rel=1e-12)


def test_probabilities_sum_to_one():
    counts = np.arange(5000)
    log_p = nb_log_likelihood(counts, np.full(5000, np.log(20.0)), np.full(5000, np.log(0.7)))
    assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("log_theta", [-np.inf, 0.0, np.inf])
def test_a_gene_that_cannot_occur_is_a_sure_zero(log_theta: float):
    values = nb_log_likelihood(np.array([0, 2]), np.full(2, -np.inf), np.full(2, log_theta))
    assert values.tolist() == [0.0, -np.inf]


def test_loss_averages_within_contexts_then_over_draws(make_targets: MakeTargets):
    # Cell 0 is drawn twice, with one and with three targets; cell 1 once.
    targets = make_targets([0, 1, 1, 1, 2], [0, 1, 2, 3, 0], [2, 0, 0, 0, 5], cells=[0, 0, 1])
    log_mu, log_theta = np.zeros(5), np.full(5, np.inf)
    # A Poisson of mean 1 gives a zero 1 nat, a count x 1 + log x!.
    expected = [((1 + np.log(2)) + 1) / 2, 1 + np.log(120)]
    assert nll_per_cell(targets, log_mu, log_theta) == pytest.approx(expected)


def test_a_cell_without_targets_is_left_out_and_counted(make_targets: MakeTargets):
    targets = make_targets([0, 2], [0, 0], [0, 0], cells=[0, 1, 2])
    losses = nll_per_cell(targets, np.zeros(2), np.full(2, np.inf))
    assert np.isnan(losses).tolist() == [False, True, False]
    assert difference(losses, np.zeros(3), seed=0)["cells"] == 2


def test_a_prediction_that_is_not_a_number_is_an_error(make_targets: MakeTargets):
    targets = make_targets([0, 0], [3, 4], [0, 0], cells=[0])
    with pytest.raises(TrainingError, match="context 0, gene 4"):
        nll_per_cell(targets, np.array([0.0, np.nan]), np.zeros(2))


def test_interval_covers_the_true_difference_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        shared = rng.normal(size=60) * 10.0
        result = difference(shared + rng.normal(0.3, 1.0, 60), shared, seed=trial, samples=400)
        covered += result["low"] <= 0.3 <= result["high"]
    assert 0.89 <= covered / 200 <= 0.99


def test_difference_is_paired_and_repeatable():
    cells = np.random.default_rng(2).normal(size=100) * 50.0
    result = difference(cells - 0.01, cells, seed=3)
    assert result["mean"] == pytest.approx(-0.01)
    assert result["high"] - result["low"] < 1e-9
    noisy = cells + np.random.default_rng(4).normal(size=100)
    assert difference(noisy, cells, seed=3) == difference(noisy, cells, seed=3)
    assert difference(noisy, cells, seed=3) != difference(noisy, cells, seed=4)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(-0.2, -0.1, "better"), (-0.1, 0.1, "no different"), (0.1, 0.2, "worse")],
)
def test_verdict_follows_the_interval(low: float, high: float, expected: str):
    result = {"mean": (low + high) / 2, "low": low, "high": high, "cells": 9}
    assert verdict(result) == expected


def test_correlation_within_a_gene_is_pearson_of_logarithms(make_targets: MakeTargets):
    rng = np.random.default_rng(5)
    contexts, genes = np.repeat(np.arange(40), 3), np.tile(np.arange(3), 40)
    counts, log_mu = rng.poisson(3.0, size=120), rng.normal(size=120)
    targets = make_targets(contexts, genes, counts, cells=np.arange(40))
    result = correlation_within_gene(targets, log_mu, np.array([True, False, True]))
    expected = [stats.pearsonr(np.log1p(np.exp(log_mu[genes == g])), np.log1p(counts[genes == g]))[0] for g in (0, 2)]
    assert result["per_gene"][[0, 2]] == pytest.approx(expected)
    assert np.isnan(result["per_gene"][1])
    assert result["mean"] == pytest.approx(np.mean(expected))
    assert result["genes"] == 2


def test_differences_between_genes_earn_no_correlation_within_them(make_targets: MakeTargets):
    rng = np.random.default_rng(6)
    contexts, genes = np.repeat(np.arange(50), 20), np.tile(np.arange(20), 50)
    log_mu = np.linspace(-2, 4, 20)[genes]
    counts = rng.poisson(np.exp(log_mu))
    targets = make_targets(contexts, genes, counts, cells=np.arange(50))
    pooled = np.corrcoef(np.log1p(np.exp(log_mu)), np.log1p(counts))[0, 1]
    assert pooled > 0.8
    assert correlation_within_gene(targets, log_mu, np.ones(20, dtype=bool))["mean"] == 0.0
    assert correlation_within_cell(targets, log_mu)["mean"] > 0.8


def test_genes_with_few_targets_or_constant_truth_do_not_count(make_targets: MakeTargets):
    contexts = [*range(9), *range(10), *range(10)]
    genes = [0] * 9 + [1] * 10 + [2] * 10
    order = np.argsort(contexts, kind="stable")
    counts = np.array([*range(9), *[4] * 10, *range(10)])[order]
    targets = make_targets(np.array(contexts)[order], np.array(genes)[order], counts, cells=np.arange(10))
    result = correlation_within_gene(targets, counts.astype(float), np.ones(3, dtype=bool))
    assert np.isfinite(result["per_gene"]).tolist() == [False, False, True]
    assert result["genes"] == 1


def test_correlation_within_cell_averages_draws_before_cells(make_targets: MakeTargets):
    counts = np.tile(np.arange(12), 3)
    log_mu = np.log(np.concatenate([np.arange(12) + 1e-9, 12.0 - np.arange(12), np.arange(12) + 1e-9]))
    targets = make_targets(np.repeat(np.arange(3), 12), np.tile(np.arange(12), 3), counts, cells=[0, 0, 1])
    result = correlation_within_cell(targets, log_mu)
    opposite = np.corrcoef(np.log1p(12.0 - np.arange(12)), np.log1p(np.arange(12)))[0, 1]
    assert result["per_cell"] == pytest.approx([(1 + opposite) / 2, 1.0], abs=1e-6)
    assert result["mean"] == pytest.approx(((1 + opposite) / 2 + 1) / 2, abs=1e-6)
