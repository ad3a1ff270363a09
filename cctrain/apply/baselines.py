"""Predictions without a network, which a model has to beat: gene means and neighbours.

All are fitted on training cells alone and predict the same targets from the same visible size factor s:

    gene mean     mu = s · share_g
    neighbours    mu = s · (Σ w x + kappa_g · share_g) / (Σ w s + kappa_g)       over k training cells

The second is the posterior mean of a gamma-Poisson. Its weights w fall linearly with the distance, and

    kappa_g = strength · S^(1 − power) · (theta_g / share_g)^power,     S the median size factor,

lies between one strength for every gene (power 0) and the strength that the gene's own dispersion theta_g
asks for (power 1): genes that vary much trust the neighbours more. Cells explained by their neighbours
vary less than the population, so theta has one more factor. k, strength, power and the factor of theta are
chosen on training cells held out from the other training cells. Without shrinkage, a gene that no
neighbour expresses would be impossible.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import scipy.sparse as sp
from rich.console import Console
from rich.progress import track
from scipy.optimize import minimize

from cctrain.apply.metrics import nll_per_cell
from cctrain.apply.neighbours import (
    Embedding,
    embed_cells,
    embed_contexts,
    fit_embedding,
    nearest,
    size_factors,
)
from cctrain.apply.targets import Prediction, TargetSet, TrainingCells, draw_targets
from cctrain.data.hashing import uniform
from cctrain.errors import DataError

T = TypeVar("T")
_log = logging.getLogger(__name__)

_NUM_COMPONENTS = 50
_NEIGHBOURS = (5, 10, 25, 50, 100, 200)
# The cells that settings are chosen on: a fifth of the training cells, and no more than this.
_MAX_TUNING_CELLS = 400
_MIN_TRAINING_CELLS = 10
# Contexts whose neighbours are summed at once; a sum is as wide as the vocabulary.
_CHUNK = 128


@dataclass(frozen=True)
class NeighbourSettings:
    k: int
    strength: float
    power: float
    theta_factor: float


# Where the search starts; k is not taken from it.
_STARTING_POINT = NeighbourSettings(k=50, strength=3.0, power=0.5, theta_factor=1.5)


@dataclass(frozen=True)
class Neighbours:
    """Fitted by `fit_neighbours`."""

    settings: NeighbourSettings
    cells: TrainingCells
    size: np.ndarray  # float64 (num_cells,)
    embedding: Embedding
    places: np.ndarray  # float64 (num_cells, K)
    share: np.ndarray
    theta: np.ndarray

    def predict(self, targets: TargetSet) -> Prediction:
        """log_mu and log_theta, float64 (T,)."""
        distances, indices = self._nearest(targets, self.settings.k)
        counts, sizes = self._sums(targets, distances, indices, "predicting from neighbours")
        return self._shrunk(targets, counts, sizes, self.settings)

    def _nearest(self, targets: TargetSet, k: int) -> tuple[np.ndarray, np.ndarray]:
        k = min(k, len(self.places))
        return nearest(_directions(embed_contexts(self.embedding, targets)), self.places, k)

    def _sums(
        self, targets: TargetSet, distances: np.ndarray, indices: np.ndarray, label: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weighted counts and size factors of the neighbours that measured the gene, both float64 (T,)."""
        num_contexts, k = indices.shape
        farthest = np.maximum(distances[:, -1:], 1e-300)
        # Half a step beyond the last neighbour, so that it too has a weight.
        weights = 1.0 - distances / (farthest * (1.0 + 0.5 / k))
        counts, sizes = np.empty(len(targets.genes)), np.zeros(len(targets.genes))
        for start in _with_progress(range(0, num_contexts, _CHUNK), label):
            stop = min(start + _CHUNK, num_contexts)
            rows = slice(*np.searchsorted(targets.contexts, [start, stop]))
            mix = sp.csr_matrix(
                (
                    weights[start:stop].ravel(),
                    indices[start:stop].ravel(),
                    np.arange(0, (stop - start) * k + 1, k),
                ),
                shape=(stop - start, len(self.size)),
            )
            summed = (mix @ self.cells.counts).toarray()
            counts[rows] = summed[targets.contexts[rows] - start, targets.genes[rows]]
        source_of_neighbour = self.cells.source_of_cell[indices]
        for source, measured in enumerate(self.cells.measured):
            from_source = (weights * self.size[indices] * (source_of_neighbour == source)).sum(axis=1)
            sizes += from_source[targets.contexts] * measured[targets.genes]
        return counts, sizes

    def _shrunk(
        self, targets: TargetSet, counts: np.ndarray, sizes: np.ndarray, settings: NeighbourSettings
    ) -> Prediction:
        share, theta = self.share[targets.genes], self.theta[targets.genes]
        own = np.minimum(theta, 1e6) / np.maximum(share, 1e-30)
        kappa = settings.strength * np.median(self.size) ** (1.0 - settings.power) * own**settings.power
        with np.errstate(divide="ignore"):
            log_share = np.log((counts + kappa * share) / (sizes + kappa))
        log_theta = np.log(theta * settings.theta_factor)
        return targets.log_size_factor[targets.contexts] + log_share, log_theta


def poisson_gene_mean(targets: TargetSet, share: np.ndarray) -> Prediction:
    """The gene mean without dispersion: what ignoring the spread of counts costs. `share` is float64 (V,)."""
    log_mu, _ = gene_mean(targets, share, np.ones_like(share))
    return log_mu, np.full(len(log_mu), np.inf)


def gene_mean(targets: TargetSet, share: np.ndarray, theta: np.ndarray) -> Prediction:
    """What an untrained model predicts. `share` and `theta` (maximum likelihood) are float64 (V,)."""
    with np.errstate(divide="ignore"):
        log_mu = targets.log_size_factor[targets.contexts] + np.log(share)[targets.genes]
    return log_mu, np.log(theta)[targets.genes]


def refitted_share(training_targets: TargetSet, share: np.ndarray) -> np.ndarray:
    """The gene mean learned from hidden counts alone: Poisson maximum likelihood, float64 (V,).

    Fitted on targets of training cells, it beats the gene mean of all counts only if the choice of targets
    itself tells about their counts, which is the artefact that this baseline exists to reveal. One median
    cell of the old share keeps genes that were hardly drawn from becoming impossible.
    """
    size = np.exp(training_targets.log_size_factor)
    prior = float(np.median(size))
    exposure = np.bincount(training_targets.genes, size[training_targets.contexts], minlength=len(share))
    counts = np.bincount(training_targets.genes, training_targets.counts, minlength=len(share))
    return (counts + prior * share) / (exposure + prior)


def fit_neighbours(
    cells: TrainingCells, share: np.ndarray, theta: np.ndarray, target_probability: np.ndarray, seed: int
) -> Neighbours:
    """Choose the settings on a fifth of the training cells, then fit on all of them.

    `share`, `theta` and `target_probability` are float64 (V,). Raises DataError for fewer than ten cells.
    """
    num_cells = cells.counts.shape[0]
    if num_cells < _MIN_TRAINING_CELLS:
        raise DataError(
            f"the neighbour baseline needs {_MIN_TRAINING_CELLS} training cells and got {num_cells}: "
            "prepare a store with more cells"
        )
    _log.info("fitting the neighbour baseline on %d training cells", num_cells)
    # Once, because a product with weights would convert them again each time.
    cells = replace(cells, counts=cells.counts.astype(np.float64))
    order = np.argsort(uniform(seed, "neighbour-tuning", np.arange(num_cells)), kind="stable")
    num_tuning = min(num_cells // 5, _MAX_TUNING_CELLS)
    tuning = draw_targets(cells, np.sort(order[:num_tuning]), share, target_probability, seed)
    inner = _fit(cells.take(np.sort(order[num_tuning:])), share, theta, _STARTING_POINT, seed)
    return _fit(cells, share, theta, _choose_settings(inner, tuning), seed)


def _fit(
    cells: TrainingCells, share: np.ndarray, theta: np.ndarray, settings: NeighbourSettings, seed: int
) -> Neighbours:
    size = size_factors(cells, share)
    embedding = fit_embedding(cells, size, _NUM_COMPONENTS, seed)
    places = _directions(embed_cells(embedding, cells, size))
    return Neighbours(settings, cells, size, embedding, places, share, theta)


def _choose_settings(inner: Neighbours, tuning: TargetSet) -> NeighbourSettings:
    """The settings of the smallest loss per cell; the three continuous ones are optimised for each k."""
    farthest = min(max(_NEIGHBOURS), len(inner.places))
    distances, indices = inner._nearest(tuning, farthest)
    candidates = []
    for k in sorted({min(k, farthest) for k in _NEIGHBOURS}):
        counts, sizes = inner._sums(tuning, distances[:, :k], indices[:, :k], f"choosing neighbours: {k}")

        def loss(point: np.ndarray, k: int = k, counts: np.ndarray = counts, sizes: np.ndarray = sizes) -> float:
            prediction = inner._shrunk(tuning, counts, sizes, _settings_at(point, k))
            return float(np.nanmean(nll_per_cell(tuning, *prediction)))

        start = _STARTING_POINT
        point = np.array([np.log(start.strength), start.power, np.log(start.theta_factor)])
        candidates.append((loss(point), k, loss, point))
    # A poor k stays poor: only the three best starts are worth optimising.
    candidates.sort(key=lambda candidate: candidate[:2])
    best: tuple[float, NeighbourSettings] | None = None
    for _, k, loss, point in _with_progress(candidates[:3], "choosing shrinkage"):
        found = minimize(loss, point, method="Nelder-Mead", options={"maxfev": 50, "xatol": 0.05, "fatol": 1e-5})
        if best is None or found.fun < best[0]:
            best = (float(found.fun), _settings_at(found.x, k))
    assert best is not None
    return best[1]


def _settings_at(point: np.ndarray, k: int) -> NeighbourSettings:
    strength, power, theta_factor = np.clip(point, [-12.0, 0.0, -3.0], [20.0, 1.0, 6.0])
    return NeighbourSettings(k, float(np.exp(strength)), float(power), float(np.exp(theta_factor)))


def _directions(places: np.ndarray) -> np.ndarray:
    """Unit vectors: what kind of cell it is, not how far from the mean, which depth decides too."""
    return places / np.maximum(np.linalg.norm(places, axis=1, keepdims=True), 1e-12)


def _with_progress(items: Iterable[T], label: str) -> Iterable[T]:
    console = Console(stderr=True)
    return track(items, description=label, console=console, transient=True, disable=not console.is_terminal)
