"""Small sets of cells with known structure, and targets drawn from them by gene alone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.sparse as sp

from cctrain.apply.targets import TargetSet, TrainingCells, draw_targets


@dataclass(frozen=True)
class Tissue:
    """Simulated cells of a few types, split in two, with what a token store would know about them."""

    training: TrainingCells
    held_out: TrainingCells
    share: np.ndarray
    theta: np.ndarray
    target_probability: np.ndarray

    def targets(self, seed: int = 5, draws: int = 1) -> TargetSet:
        rows = np.repeat(np.arange(self.held_out.counts.shape[0]), draws)
        return draw_targets(self.held_out, rows, self.share, self.target_probability, seed)


def simulate(num_types: int, num_cells: int = 300, num_genes: int = 120, seed: int = 0) -> Tissue:
    """Poisson counts of cells of several types and depths; types differ fourfold in many genes."""
    rng = np.random.default_rng(seed)
    baseline = rng.gamma(1.0, size=num_genes) + 0.05
    profiles = baseline * np.exp(rng.normal(0.0, 1.4, size=(num_types, num_genes)))
    profiles /= profiles.sum(axis=1, keepdims=True)
    depth = rng.uniform(100, 400, size=num_cells)
    counts = rng.poisson(depth[:, None] * profiles[rng.integers(num_types, size=num_cells)])
    source = np.zeros(num_cells, dtype=np.int64)
    measured = np.ones((1, num_genes), dtype=bool)
    num_held_out = num_cells // 5
    training = counts[num_held_out:]
    share = (training.sum(axis=0) + 0.5) / (training.sum() + 0.5 * num_genes)
    mean = training.sum(axis=1, keepdims=True) * share
    excess = np.maximum(((training - mean) ** 2 - mean).sum(axis=0) / (mean**2).sum(axis=0), 1e-3)
    detection = (training > 0).mean(axis=0)
    return Tissue(
        training=TrainingCells(sp.csr_matrix(training), source[num_held_out:], measured),
        held_out=TrainingCells(sp.csr_matrix(counts[:num_held_out]), source[:num_held_out], measured),
        share=share,
        theta=1.0 / excess,
        target_probability=0.2 * np.minimum(1.0, detection / 0.25),
    )


@pytest.fixture(scope="session")
def typed_tissue() -> Tissue:
    return simulate(num_types=3)


@pytest.fixture(scope="session")
def uniform_tissue() -> Tissue:
    """One type only: neighbours have nothing to tell."""
    return simulate(num_types=1)


@pytest.fixture
def make_targets() -> Callable[..., TargetSet]:
    """A target set from plain lists; what is not given is of no interest to the test."""

    def make(contexts: list[int], genes: list[int], counts: list[int], cells: list[int]) -> TargetSet:
        return TargetSet(
            contexts=np.array(contexts, dtype=np.int64),
            genes=np.array(genes, dtype=np.int64),
            counts=np.array(counts, dtype=np.int64),
            cell_of_context=np.array(cells, dtype=np.int64),
            log_size_factor=np.zeros(len(cells)),
            visible_offsets=np.zeros(len(cells) + 1, dtype=np.int64),
            visible_genes=np.zeros(0, dtype=np.int64),
            visible_counts=np.zeros(0, dtype=np.int64),
            source_of_context=np.zeros(len(cells), dtype=np.int64),
        )

    return make
