import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import minimize_scalar
from scipy.stats import nbinom

from cctrain.data.prepare import statistics
from cctrain.data.prepare.statistics import detection_rates, dispersions, gene_shares, size_factors

LIMITS = (np.log(statistics.SMALLEST_THETA), np.log(statistics.LARGEST_THETA))


def simulate(num_cells: int, num_genes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and the dispersions they were drawn with, over four orders of magnitude of both."""
    draws = np.random.default_rng(seed)
    shares = draws.dirichlet(np.full(num_genes, 0.3))
    theta = 10 ** draws.uniform(-1.5, 2.5, num_genes)
    means = draws.lognormal(np.log(1500), 0.6, (num_cells, 1)) * shares
    return draws.poisson(draws.gamma(theta, 1 / theta, (num_cells, num_genes)) * means), theta


def log_likelihood(log_theta: float, counts: np.ndarray, means: np.ndarray) -> float:
    theta = np.exp(log_theta)
    return float(nbinom.logpmf(counts, theta, theta / (theta + means)).sum())


def best_likelihood(counts: np.ndarray, means: np.ndarray) -> float:
    """The best of three searches, so that a second maximum would be found."""
    middle = sum(LIMITS) / 2
    return max(
        -minimize_scalar(
            lambda t: -log_likelihood(t, counts, means),
            bounds=bounds,
            method="bounded",
            options={"xatol": 1e-8},
        ).fun
        for bounds in (LIMITS, (LIMITS[0], middle), (middle, LIMITS[1]))
    )


def largest_gap(counts: np.ndarray, source: np.ndarray, measured: np.ndarray) -> float:
    """Likelihood that dispersions() leaves on the table, for the worst gene."""
    totals = np.array([counts[source == i].sum(axis=0) for i in range(len(measured))])
    shares = gene_shares(totals, measured)
    theta = dispersions(sp.csr_matrix(counts), source, shares, measured)
    sizes = size_factors(counts.sum(axis=1), source, shares, measured)
    gaps = []
    for gene in range(counts.shape[1]):
        seen = measured[source, gene] & (sizes > 0)
        means = sizes[seen] * shares[gene]
        observed = counts[seen, gene]
        gaps.append(best_likelihood(observed, means) - log_likelihood(np.log(theta[gene]), observed, means))
    return max(gaps)


def vocabulary(counts: np.ndarray) -> np.ndarray:
    return counts[:, (counts > 0).sum(axis=0) >= 3]


def test_dispersions_reach_the_likelihood_of_a_search_gene_by_gene():
    counts = vocabulary(simulate(300, 60, seed=1)[0])
    one = np.ones((1, counts.shape[1]), dtype=bool)
    assert largest_gap(counts, np.zeros(len(counts), int), one) < 1e-4


def test_binned_size_factors_reach_it_too(monkeypatch):
    monkeypatch.setattr(statistics, "MAX_EXACT_SIZES", 100)
    counts = vocabulary(simulate(3000, 30, seed=2)[0])
    one = np.ones((1, counts.shape[1]), dtype=bool)
    assert largest_gap(counts, np.zeros(len(counts), int), one) < 1e-4


def test_bins_change_the_zeros_term_by_less_than_their_bound():
    sizes = np.random.default_rng(0).lognormal(0, 1, 5000)
    node, weight = statistics._size_nodes(sizes)
    assert len(node) < 1000
    for theta in (1e-2, 1.0, 1e3):
        for share in (1e-4, 1.0, 1e3):
            exact = np.log1p(sizes * share / theta).sum()
            assert abs((weight * np.log1p(node * share / theta)).sum() - exact) <= 4e-6 * exact


def test_dispersions_of_sources_with_different_genes_use_measured_cells_alone():
    counts = vocabulary(simulate(300, 40, seed=3)[0])
    source = np.arange(len(counts)) % 2
    measured = np.ones((2, counts.shape[1]), dtype=bool)
    measured[0, ::3] = False
    counts[~measured[source]] = 0
    assert largest_gap(counts, source, measured) < 1e-4


def test_a_gene_without_overdispersion_gets_the_upper_limit():
    counts = np.tile([[4, 1, 2]], (50, 1))
    measured = np.ones((1, 3), dtype=bool)
    shares = gene_shares(counts.sum(axis=0, keepdims=True), measured)
    theta = dispersions(sp.csr_matrix(counts), np.zeros(50, int), shares, measured)
    assert theta == pytest.approx(np.full(3, statistics.LARGEST_THETA))


def test_the_dispersion_that_counts_were_drawn_with_is_found():
    draws = np.random.default_rng(4)
    theta = np.array([0.1, 1.0, 10.0])
    counts = draws.poisson(draws.gamma(theta, 1 / theta, (4000, 3)) * [2.0, 5.0, 20.0])
    sizes = counts.sum(axis=1)
    measured = np.ones((1, 4), dtype=bool)
    # A gene that carries the rest of a constant depth makes every size factor the same.
    counts = np.column_stack([counts, sizes.max() + 1000 - sizes])
    shares = gene_shares(counts.sum(axis=0, keepdims=True), measured)
    found = dispersions(sp.csr_matrix(counts), np.zeros(4000, int), shares, measured)
    assert found[:3] == pytest.approx(theta, rel=0.1)


def test_the_share_of_one_source_is_the_pooled_share():
    assert gene_shares(np.array([[6, 3, 1]]), np.ones((1, 3), bool)) == pytest.approx([0.6, 0.3, 0.1])


def test_shares_of_sources_with_different_genes_are_those_that_made_the_counts():
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    measured = np.array([[True, True, True, False], [False, True, True, True]])
    totals = np.where(measured, np.array([[1e6], [1e3]]) * shares, 0)
    assert gene_shares(totals, measured) == pytest.approx(shares, rel=1e-6)


def test_shares_satisfy_the_poisson_likelihood_equations():
    draws = np.random.default_rng(5)
    measured = draws.random((3, 12)) < 0.7
    measured[:, 0] = True
    measured[0] = True
    totals = np.where(measured, draws.integers(1, 1000, (3, 12)), 0)
    shares = gene_shares(totals, measured)
    sizes = totals.sum(axis=1) / (measured @ shares)
    assert shares == pytest.approx(totals.sum(axis=0) / (sizes @ measured), rel=1e-7)


def test_a_gene_without_a_count_has_half_of_one_and_the_others_keep_their_proportions():
    measured = np.array([[True, True, True, False], [True, True, False, False]])
    shares = gene_shares(np.array([[6, 3, 0, 0], [2, 1, 0, 0]]), measured)
    assert shares[0] == pytest.approx(2 * shares[1])
    assert (shares[2:] > 0).all()
    assert (shares[2:] < shares[1]).all()
    assert shares.sum() == pytest.approx(1)
    assert gene_shares(np.array([[6, 3, 0]]), np.ones((1, 3), bool)) == pytest.approx(np.array([6, 3, 0.5]) / 9.5)


def test_detection_is_relative_to_the_cells_whose_source_measures_the_gene():
    measured = np.array([[True, True], [False, True]])
    rates = detection_rates(np.array([[5, 2], [0, 6]]), np.array([10, 30]), measured)
    assert rates == pytest.approx([0.5, 0.2])
