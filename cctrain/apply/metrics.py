"""How good a prediction of hidden counts is, and whether a difference between two is real.

The loss is the negative log-likelihood of a negative binomial, per target, averaged within a context, then
over the draws of a cell: a deep cell weighs no more than a shallow one, and the cell is the unit of the
bootstrap. Correlations are taken within one gene across cells (the headline) or within one cell across
genes. Nothing is pooled over tokens: pooled, a mere gene mean already correlates at 0.8, because genes
differ in their means.
"""

from typing import Any

import numpy as np
from scipy.special import gammaln

from cctrain.apply.targets import TargetSet
from cctrain.errors import TrainingError

# Fewer points than this make a correlation that says nothing.
MIN_POINTS = 10
# From here on Stirling's series for lgamma is exact to the last bit, and does not cancel.
_STIRLING_FROM = 1e3


def nb_log_likelihood(counts: np.ndarray, log_mu: np.ndarray, log_theta: np.ndarray) -> np.ndarray:
    """log P(count) of a negative binomial with variance mu + mu²/theta, float64 (T,).

    With A(x, theta) = log of the product of (1 + i/theta) over i < x,

        log P = A(x, theta) − (theta + x) · log(1 + mu/theta) + x · log mu − log x!

    which turns into the Poisson as theta grows (log_theta may be +inf). mu = 0 is a sure zero.
    """
    counts, log_mu, log_theta = np.broadcast_arrays(
        np.asarray(counts, dtype=np.float64),
        np.asarray(log_mu, dtype=np.float64),
        # Below, theta is zero for every purpose, and its products would no longer be numbers.
        np.maximum(np.asarray(log_theta, dtype=np.float64), -700.0),
    )
    with np.errstate(over="ignore"):
        theta = np.exp(log_theta)
        mu = np.exp(log_mu)
        over_theta = np.logaddexp(0.0, log_mu - np.where(np.isinf(theta), 0.0, log_theta))
    with np.errstate(invalid="ignore"):
        zero_term = np.where(np.isinf(theta), mu, theta * over_theta)
    result = -zero_term
    # Most counts are zeros, for which everything below vanishes.
    expressed = counts > 0
    x, theta, log_theta = counts[expressed], theta[expressed], log_theta[expressed]
    bounded = np.isfinite(theta)
    rising = np.zeros(len(x))
    rising[bounded] = _log_rising(x[bounded], theta[bounded], log_theta[bounded])
    rising[bounded] -= x[bounded] * over_theta[expressed][bounded]
    result[expressed] += rising + x * log_mu[expressed] - gammaln(x + 1.0)
    return result


def nll_per_cell(targets: TargetSet, log_mu: np.ndarray, log_theta: np.ndarray) -> np.ndarray:
    """Nats per target of each held-out cell, float64 (num_cells,).

    Averaged within a context, then over the draws of a cell. A context without targets carries no weight; a
    cell without any is NaN, which `difference` leaves out and counts. Raises TrainingError if a prediction is
    not a number.
    """
    _check_numbers(targets, log_mu, log_theta)
    nll = -nb_log_likelihood(targets.counts, log_mu, log_theta)
    return _mean_per_cell(targets, _mean_by(targets.contexts, nll, targets.num_contexts))


def difference(a_per_cell: np.ndarray, b_per_cell: np.ndarray, seed: int, samples: int = 2000) -> dict[str, Any]:
    """Mean of a − b over cells with its 95 % interval: a paired bootstrap over cells, by percentiles.

    Returns mean, low, high and cells, the number of cells that have both values. For a loss, below zero
    means that a is better.
    """
    delta = np.asarray(a_per_cell, dtype=np.float64) - np.asarray(b_per_cell, dtype=np.float64)
    delta = delta[~np.isnan(delta)]
    if not len(delta):
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "cells": 0}
    rng = np.random.default_rng(seed)
    means = np.array([delta[rng.integers(len(delta), size=len(delta))].mean() for _ in range(samples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(delta.mean()), "low": float(low), "high": float(high), "cells": len(delta)}


def verdict(difference: dict[str, Any]) -> str:
    """`better`, `no different` or `worse`: what the interval of a difference of losses allows to say of a."""
    if difference["high"] < 0:
        return "better"
    if difference["low"] > 0:
        return "worse"
    return "no different"


def correlation_within_gene(targets: TargetSet, log_mu: np.ndarray, genes_considered: np.ndarray) -> dict[str, Any]:
    """Pearson correlation of log1p(prediction) and log1p(count) across cells within a gene, then averaged.

    `genes_considered` is bool (V,). A gene counts if it has at least ten targets and its truth is not
    constant; a constant prediction correlates by 0. Returns mean, genes (how many counted) and per_gene,
    float64 (V,), NaN where a gene did not count.
    """
    _check_numbers(targets, log_mu)
    considered = np.asarray(genes_considered, dtype=bool)
    chosen = considered[targets.genes]
    per_gene = _correlation_by(
        targets.genes[chosen], targets.counts[chosen], np.asarray(log_mu)[chosen], len(considered)
    )
    return {"mean": _mean(per_gene), "genes": int(np.isfinite(per_gene).sum()), "per_gene": per_gene}


def correlation_within_cell(targets: TargetSet, log_mu: np.ndarray) -> dict[str, Any]:
    """The same across the genes of a context, averaged over the draws of a cell, then over cells.

    Mostly the gene mean's own merit: highly expressed genes are highly expressed everywhere. Returns mean,
    cells (how many counted) and per_cell, float64 (num_cells,), NaN where a cell did not count.
    """
    _check_numbers(targets, log_mu)
    per_context = _correlation_by(targets.contexts, targets.counts, np.asarray(log_mu), targets.num_contexts)
    per_cell = _mean_per_cell(targets, per_context)
    return {"mean": _mean(per_cell), "cells": int(np.isfinite(per_cell).sum()), "per_cell": per_cell}


def _check_numbers(targets: TargetSet, *predictions: np.ndarray) -> None:
    for values in predictions:
        wrong = np.flatnonzero(np.isnan(values))
        if len(wrong):
            first = wrong[0]
            raise TrainingError(
                f"{len(wrong)} of {len(values)} predictions are not a number (first: context "
                f"{targets.contexts[first]}, gene {targets.genes[first]}): the model that made them has "
                "diverged; train again with a lower training.learning_rate"
            )


def _log_rising(x: np.ndarray, theta: np.ndarray, log_theta: np.ndarray) -> np.ndarray:
    """A(x, theta) = lgamma(theta + x) − lgamma(theta) − x · log theta."""
    result = np.empty(len(x))
    large = theta > _STIRLING_FROM
    a, t = x[large], theta[large]
    series = 1.0 / (12.0 * (t + a)) - 1.0 / (12.0 * t) - (t + a) ** -3.0 / 360.0 + t**-3.0 / 360.0
    result[large] = (t + a - 0.5) * np.log1p(a / t) - a + series
    a, t = x[~large], theta[~large]
    # lgamma(theta) = lgamma(theta + 1) − log theta keeps its meaning when theta underflows to zero.
    result[~large] = gammaln(t + a) - gammaln(t + 1.0) - (a - 1.0) * log_theta[~large]
    return result


def _correlation_by(labels: np.ndarray, counts: np.ndarray, log_mu: np.ndarray, num: int) -> np.ndarray:
    """Pearson correlation of the logarithms within each label, (num,); NaN where it is not defined."""
    truth = np.log1p(counts.astype(np.float64))
    prediction = np.logaddexp(0.0, log_mu)  # log1p(mu)
    points = np.bincount(labels, minlength=num)
    # Centred first: the difference of raw moments would drown a small variance in rounding.
    truth_centred = truth - _mean_by(labels, truth, num)[labels]
    prediction_mean = _mean_by(labels, prediction, num)
    prediction_centred = prediction - prediction_mean[labels]
    truth_square = np.bincount(labels, truth_centred**2, minlength=num)
    prediction_square = np.bincount(labels, prediction_centred**2, minlength=num)
    product = np.bincount(labels, truth_centred * prediction_centred, minlength=num)
    with np.errstate(invalid="ignore", divide="ignore"):
        result = product / np.sqrt(truth_square * prediction_square)
        rounding = points * (1e-12 * prediction_mean) ** 2
        result[prediction_square <= rounding] = 0.0
    result[(points < MIN_POINTS) | (truth_square <= 1e-20 * points)] = np.nan
    return result


def _mean_by(labels: np.ndarray, values: np.ndarray, num: int) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.bincount(labels, values, minlength=num) / np.bincount(labels, minlength=num)


def _mean_per_cell(targets: TargetSet, per_context: np.ndarray) -> np.ndarray:
    counted = ~np.isnan(per_context)
    return _mean_by(targets.cell_of_context[counted], per_context[counted], targets.num_cells)


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
