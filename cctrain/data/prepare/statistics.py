"""What is estimated from training cells: each gene's share of the counts, detection rate,
dispersion and loadings.

Cell c of source S has counts x_cg over the vocabulary genes that S measures, with mean mu_cg = s_c pi_g:

    share pi        Poisson maximum likelihood, sum 1: the fixed point of
                        T_S = (counts of S) / (sum of pi_g over the genes that S measures)
                        pi_g = (counts of g in all sources) / (sum of T_S over the sources that measure g)
    size s_c        (counts of the cell) / (sum of pi_g over the genes that its source measures)
    dispersion      theta_g of a negative binomial, variance mu + mu^2 / theta, by maximum likelihood given mu,
                    within 1e-3 .. 1e4
    loadings        principal components of log counts, one vector per gene: which genes vary together

A gene that a source does not measure says nothing there: it is neither a zero nor an absence. Nothing here
shrinks or smooths over genes, but for one floor: a gene that no training cell expresses (it is in the vocabulary
because that was given) has half a count in place of none, so that the log of its share is a number. Its detection
rate is 0, so it is never a target, its dispersion the lower limit and its loadings zero.
"""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, svds
from scipy.special import digamma, polygamma

SMALLEST_THETA, LARGEST_THETA = 1e-3, 1e4
HALF_A_COUNT = 0.5
MAX_EXACT_SIZES = 2_048
NUM_LOADINGS = 50
SIZE_BIN = 0.01  # width of a bin of size factors, in log s
_STRIDE = 4.0  # in log theta
_ENTRIES = 1_000_000  # expressed (cell, gene) pairs at once: about 0.1 GB
_CHUNK = 100_000  # (gene, size) pairs at once: they stay in the cache, twice as fast as a million


def gene_shares(totals: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """pi (V,) float64, sum 1, from the counts of each source and gene and the bitmap (num_sources, V).

    A gene without a count gets HALF_A_COUNT, and one that no source measures as if all did.
    """
    totals = np.where(measured, totals, 0).astype(np.float64)
    of_source, of_gene = totals.sum(axis=1), totals.sum(axis=0)
    of_gene = np.where(of_gene > 0, of_gene, HALF_A_COUNT)
    measured = measured | ~measured.any(axis=0)
    shares = of_gene / of_gene.sum()
    if measured.all():
        return shares
    for _ in range(10_000):
        seen = measured @ shares
        sizes = np.divide(of_source, seen, out=np.zeros_like(seen), where=seen > 0)
        updated = of_gene / np.maximum(sizes @ measured, np.finfo(np.float64).tiny)
        updated /= updated.sum()
        change = np.max(np.abs(updated - shares) / np.maximum(updated, np.finfo(np.float64).tiny))
        shares = updated
        if change < 1e-10:
            break
    return shares


def detection_rates(detected: np.ndarray, num_cells: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Share (V,) of the training cells whose source measures the gene that express it.

    `detected` (num_sources, V): expressing cells. `num_cells` (num_sources,): training cells of each source.
    """
    return np.where(measured, detected, 0).sum(axis=0) / np.maximum(num_cells @ measured, 1)


def size_factors(
    totals: np.ndarray, source_of_cell: np.ndarray, shares: np.ndarray, measured: np.ndarray
) -> np.ndarray:
    """s (num_cells,) float64 from the sum of counts of each cell over the vocabulary."""
    return totals / (measured @ shares)[source_of_cell]


def dispersions(
    counts: sp.csr_matrix,
    source_of_cell: np.ndarray,
    shares: np.ndarray,
    measured: np.ndarray,
    advance: Callable[[int], None] = lambda genes: None,
) -> np.ndarray:
    """theta (V,) float64 of every gene from counts (num_cells, V), by safeguarded Newton steps on log theta.

    Terms of expressed genes are exact. The others depend on a cell through its size factor alone; over 2,048
    cells these are put in bins of width 0.01 in log s, each at its mean s. Since |s^2 f''(s)| <= 0.3 |f(s)|
    for f(s) = theta log(1 + s pi / theta), that moves their sum by less than 0.3 / 2 (0.01 / 2)^2 = 4e-6 of
    itself.
    """
    totals = np.asarray(counts.sum(axis=1)).ravel()
    sizes = size_factors(totals, source_of_cell, shares, measured)
    panels, panel_of_source = np.unique(measured, axis=0, return_inverse=True)  # sources that measure the same genes
    panel = panel_of_source.ravel()[source_of_cell]
    nodes = [_size_nodes(sizes[(panel == i) & (sizes > 0)]) for i in range(len(panels))]
    node_size = np.concatenate([size for size, _ in nodes])
    node_weight = np.concatenate([weight for _, weight in nodes])
    node_panel = np.repeat(np.arange(len(panels)), [len(size) for size, _ in nodes])

    by_gene = counts.tocsc()
    theta = np.empty(len(shares))
    step = max(1, _CHUNK // max(1, len(node_size)))
    first = 0
    while first < len(shares):
        fits = int(np.searchsorted(by_gene.indptr, by_gene.indptr[first] + _ENTRIES, side="right")) - 1
        genes = slice(first, min(first + step, max(fits, first + 1), len(shares)))
        seen = panels[:, genes].T[:, node_panel]  # (genes, nodes)
        weight = None if seen.all() else seen * node_weight
        likelihood = _Likelihood(by_gene[:, genes], shares[genes], sizes, node_size, node_weight, weight)
        theta[genes] = _maximize(likelihood)
        advance(genes.stop - genes.start)
        first = genes.stop
    return theta


def _size_nodes(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Size factors and how many cells have each."""
    if len(sizes) <= MAX_EXACT_SIZES:
        return sizes, np.ones(len(sizes))
    _, bin_of_cell = np.unique(np.floor(np.log(sizes) / SIZE_BIN), return_inverse=True)
    weight = np.bincount(bin_of_cell).astype(np.float64)
    return np.bincount(bin_of_cell, weights=sizes) / weight, weight


class _Likelihood:
    """First and second derivative of the log-likelihood of some genes with respect to theta.

    With u = mu / theta and w = u / (1 + u), up to terms without theta:

        L   = sum_x [lgamma(x + theta) - lgamma(theta)] - N log theta - sum_c (theta + x_c) log(1 + u_c)
        L'  = sum_x [psi(x + theta) - psi(theta)] - N / theta + sum_c [w - log(1 + u)] + sum_c x w / theta
        L'' = sum_x [psi'(x + theta) - psi'(theta)] + N / theta^2 + sum_c w^2 / theta
              - sum_c x w (2 - w) / theta^2
    """

    def __init__(
        self,
        by_gene: sp.csc_matrix,
        shares: np.ndarray,
        sizes: np.ndarray,
        node_size: np.ndarray,
        node_weight: np.ndarray,
        weight: np.ndarray | None,
    ) -> None:
        num_genes = len(shares)
        self.shares = shares
        self.node_size, self.node_weight, self.weight = node_size, node_weight, weight
        self.gene = np.repeat(np.arange(num_genes), np.diff(by_gene.indptr))
        self.x = by_gene.data.astype(np.float64)
        self.size = sizes[by_gene.indices]
        self.total = np.bincount(self.gene, weights=self.x, minlength=num_genes)
        # lgamma depends on x alone: each distinct (gene, x) is evaluated once.
        base = int(self.x.max(initial=0)) + 1
        pair, repeats = np.unique(self.gene * base + self.x.astype(np.int64), return_counts=True)
        self.pair_gene, self.pair_x, self.pair_repeats = (
            pair // base,
            (pair % base).astype(np.float64),
            repeats,
        )

    def start(self) -> np.ndarray:
        """theta by moments: sum of mu^2 over the sum of (x - mu)^2 - x."""
        squares = self.node_weight * self.node_size**2
        mu2 = self.shares**2 * (squares.sum() if self.weight is None else self.weight @ self.node_size**2)
        genes = len(self.shares)
        cross = self.shares * np.bincount(self.gene, weights=self.x * self.size, minlength=genes)
        excess = np.bincount(self.gene, weights=self.x**2, minlength=genes) - 2 * cross + mu2 - self.total
        return np.clip(mu2 / np.maximum(excess, 1e-12), 1e-2, 1e2)

    def derivatives(self, theta: np.ndarray, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(L', L'') of the genes with the given numbers (ascending), at their theta."""
        place = np.full(len(self.shares), -1)
        place[genes] = np.arange(len(genes))

        pair = place[self.pair_gene] >= 0
        owner, x, repeats = place[self.pair_gene[pair]], self.pair_x[pair], self.pair_repeats[pair]
        at = theta[owner]
        first = _sum(owner, repeats * (digamma(x + at) - digamma(at)), len(genes)) - self.total[genes] / theta
        second = _sum(owner, repeats * (polygamma(1, x + at) - polygamma(1, at)), len(genes))
        second += self.total[genes] / theta**2

        entry = place[self.gene] >= 0
        owner, x = place[self.gene[entry]], self.x[entry]
        w = 1 / (1 + theta[owner] / (self.size[entry] * self.shares[self.gene[entry]]))
        first += _sum(owner, x * w, len(genes)) / theta
        second -= _sum(owner, x * w * (2 - w), len(genes)) / theta**2

        u = (self.shares[genes] / theta)[:, None] * self.node_size
        w = u / (1 + u)
        slope, square = w - np.log(1 + u), w * w
        if self.weight is None:
            return first + slope @ self.node_weight, second + square @ self.node_weight / theta
        weight = self.weight[genes]
        return first + (slope * weight).sum(axis=1), second + (square * weight).sum(axis=1) / theta


def _sum(owner: np.ndarray, values: np.ndarray, num: int) -> np.ndarray:
    return np.bincount(owner, weights=values, minlength=num)


def _maximize(likelihood: _Likelihood) -> np.ndarray:
    """Root of dL/dt in t = log theta: Newton steps inside a bracket that every look at the slope narrows.

    A gene whose likelihood still rises at a limit (no overdispersion at all, at the upper one) gets that
    limit.
    """
    least, most = np.log(SMALLEST_THETA), np.log(LARGEST_THETA)
    t = np.log(likelihood.start())
    low, high = np.full(len(t), least), np.full(len(t), most)
    active = np.arange(len(t))
    while len(active):
        at, below, above = t[active], low[active], high[active]
        theta = np.exp(at)
        first, second = likelihood.derivatives(theta, active)
        slope, curvature = theta * first, theta**2 * second + theta * first
        rises = slope > 0
        below, above = np.where(rises, at, below), np.where(rises, above, at)
        # Where Newton does not help: halve the bracket, or walk towards a limit that was not looked at yet.
        walk = np.where(rises, np.minimum(at + _STRIDE, most), np.maximum(at - _STRIDE, least))
        open_ended = np.where(rises, above == most, below == least)
        step = np.where(open_ended, walk, (below + above) / 2)
        concave = curvature < 0
        newton = at - slope / np.where(concave, curvature, -1)
        inside = concave & (newton > below) & (newton < above)
        gain = np.abs(slope * (newton - at)) / 2  # what the likelihood can still gain
        at_limit = (rises & (at >= most)) | (~rises & (at <= least))
        done = at_limit | (inside & (gain < 1e-9)) | (above - below < 1e-7)
        low[active], high[active] = below, above
        t[active] = np.where(at_limit, at, np.where(inside, newton, step))
        active = active[~done]
    return np.exp(t)


def gene_loadings(
    counts: sp.csr_matrix, source_of_cell: np.ndarray, shares: np.ndarray, measured: np.ndarray
) -> np.ndarray:
    """Principal loadings (V, K) float32 of log1p(counts at median depth), K at most 50, mean square norm 1 a gene.

    Each source is centred by its own mean, so that genes it does not measure, and what sets sources apart, carry
    nothing. A column is a component times its standard deviation over the cells.
    """
    num_components = min(NUM_LOADINGS, *(size - 1 for size in counts.shape))
    if num_components < 1:
        return np.zeros((counts.shape[1], 1), dtype=np.float32)
    sizes = size_factors(np.asarray(counts.sum(axis=1)).ravel(), source_of_cell, shares, measured)
    per_count = np.divide(np.median(sizes), sizes, out=np.zeros_like(sizes), where=sizes > 0)
    values = np.repeat(per_count, np.diff(counts.indptr))
    values *= counts.data
    logs = sp.csr_matrix((np.log1p(values, out=values), counts.indices, counts.indptr), shape=counts.shape)
    cells_of_source = sp.csr_matrix(
        (np.ones(len(source_of_cell)), (source_of_cell, np.arange(len(source_of_cell)))),
        shape=(len(measured), len(source_of_cell)),
    )
    num_cells = np.maximum(np.asarray(cells_of_source.sum(axis=1)), 1)
    means = (cells_of_source @ logs).toarray() / num_cells
    centred = LinearOperator(
        counts.shape,
        matvec=lambda v: logs @ v.ravel() - (means @ v.ravel())[source_of_cell],
        rmatvec=lambda u: logs.T @ u.ravel() - means.T @ (cells_of_source @ u.ravel()),
        dtype=np.float64,
    )
    start = np.random.default_rng(0).standard_normal(min(counts.shape))
    _, strengths, components = svds(centred, k=num_components, v0=start, random_state=0)
    loadings = (components * strengths[:, None])[::-1].T
    # Singular vectors are known up to their sign: the largest loading of each is positive.
    loadings *= np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(num_components)])
    return (loadings / np.sqrt(max((loadings**2).sum(axis=1).mean(), 1e-30))).astype(np.float32)
