"""Which training cells resemble a context, judged from what the context shows.

Cells are embedded by PCA of log1p(count / size factor · median size factor). A context shows only part of
its cell: the counts of targets and of genes that its source did not measure are missing, not zero, while a
measured gene that is neither expressed nor a target is a known zero. So a context is projected by least
squares over its known genes, with the ridge of probabilistic PCA (Tipping and Bishop, 1999):

    z = (Wₖᵀ Wₖ + diag(noise / variance))⁻¹ Wₖᵀ (y − mean)ₖ          k = the known genes

Training cells are projected the same way, with all their measured genes known.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from cctrain.apply.targets import TargetSet, TrainingCells

# The most variable genes carry the structure; the rest is noise and time.
_MAX_GENES = 3000
_FILLING_ROUNDS = 10


@dataclass(frozen=True)
class Embedding:
    num_genes: int  # V
    genes: np.ndarray  # int64 (G,): vocabulary indices, ascending
    mean: np.ndarray  # float64 (G,)
    loadings: np.ndarray  # float64 (G, K), orthonormal, the largest variance first
    ridge: np.ndarray  # float64 (K,): noise / variance of each component
    scale: float  # the size factor that counts are brought to
    measured: np.ndarray  # bool (num_sources, G)


def size_factors(cells: TrainingCells, share: np.ndarray) -> np.ndarray:
    """float64 (num_cells,): counts over the summed share of the genes that the cell's source measured."""
    totals = np.asarray(cells.counts.sum(axis=1), dtype=np.float64).ravel()
    return np.maximum(totals, 1.0) / (cells.measured @ share)[cells.source_of_cell]


def fit_embedding(cells: TrainingCells, size: np.ndarray, max_components: int, seed: int) -> Embedding:
    """PCA of the training cells, at most `max_components` of their most variable genes.

    Where sources measured different genes, what is missing is filled in from the embedding, and the PCA
    repeated: filled with the mean alone, these genes would have too small loadings, and place the cells of
    one source apart from those of another.
    """
    scale = float(np.median(size))
    logs = _log_normalised(cells.counts, size, scale)
    measuring = cells.measured.T @ np.bincount(cells.source_of_cell, minlength=len(cells.measured))
    measuring = np.maximum(measuring, 1)
    mean = np.asarray(logs.sum(axis=0)).ravel() / measuring
    variance = np.asarray(logs.multiply(logs).sum(axis=0)).ravel() / measuring - mean**2
    genes = np.sort(np.argsort(-variance, kind="stable")[:_MAX_GENES])
    logs, mean, measured = logs[:, genes], mean[genes], cells.measured[:, genes]

    centred = logs.toarray().astype(np.float32) - mean.astype(np.float32)
    centred[~measured[cells.source_of_cell]] = 0.0
    num_components = max(1, min(max_components, len(centred) - 1, len(genes) - 1))

    def embedding() -> Embedding:
        shift, loadings, ridge = _principal_components(centred, num_components, seed)
        return Embedding(cells.counts.shape[1], genes, mean + shift, loadings, ridge, scale, measured)

    fitted = embedding()
    incomplete = np.flatnonzero(~measured.all(axis=1))
    for _ in range(_FILLING_ROUNDS if len(incomplete) else 0):
        places = embed_cells(fitted, cells, size)
        for source in incomplete:
            rows, missing = np.flatnonzero(cells.source_of_cell == source), np.flatnonzero(~measured[source])
            expected = places[rows] @ fitted.loadings[missing].T + (fitted.mean - mean)[missing]
            centred[np.ix_(rows, missing)] = expected
        fitted = embedding()
    return fitted


def embed_cells(embedding: Embedding, cells: TrainingCells, size: np.ndarray) -> np.ndarray:
    """float64 (num_cells, K) of whole cells: every measured gene is known."""
    logs = _log_normalised(cells.counts[:, embedding.genes], size, embedding.scale)
    weighted = logs @ embedding.loadings
    for source, measured in enumerate(embedding.measured):
        rows = cells.source_of_cell == source
        weighted[rows] = _project(embedding, weighted[rows], ~measured)
    return weighted


def embed_contexts(embedding: Embedding, targets: TargetSet) -> np.ndarray:
    """float64 (num_contexts, K), from the visible counts alone."""
    counts = sp.csr_matrix(
        (targets.visible_counts, targets.visible_genes, targets.visible_offsets),
        shape=(targets.num_contexts, embedding.num_genes),
    )
    size = np.exp(targets.log_size_factor)
    weighted = _log_normalised(counts[:, embedding.genes], size, embedding.scale) @ embedding.loadings
    starts = np.searchsorted(targets.contexts, np.arange(targets.num_contexts + 1))
    position = np.full(embedding.num_genes, -1)
    position[embedding.genes] = np.arange(len(embedding.genes))
    for i, source in enumerate(targets.source_of_context):
        missing = ~embedding.measured[source]
        hidden = position[targets.genes[starts[i] : starts[i + 1]]]
        missing[hidden[hidden >= 0]] = True
        weighted[i] = _project(embedding, weighted[i : i + 1], missing)[0]
    return weighted


def nearest(places: np.ndarray, training_places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances, ascending, and indices of the k nearest training cells, both (num_contexts, k)."""
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(training_places)
    return search.kneighbors(places)


def _log_normalised(counts: sp.csr_matrix, size: np.ndarray, scale: float) -> sp.csr_matrix:
    logs = sp.csr_matrix(counts, dtype=np.float64, copy=True)
    logs.data = np.log1p(logs.data * np.repeat(scale / size, np.diff(logs.indptr)))
    return logs


def _principal_components(
    centred: np.ndarray, num_components: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (G,), loadings (G, K) and ridge (K,), float64; the noise is what K components leave over."""
    pca = PCA(num_components, svd_solver="randomized", random_state=seed).fit(centred)
    variance = np.maximum(pca.explained_variance_.astype(np.float64), 1e-12)
    left_over = float(centred.var(axis=0, dtype=np.float64).sum()) - variance.sum()
    noise = max(left_over, 1e-12) / (centred.shape[1] - num_components)
    ridge = noise / np.maximum(variance - noise, 1e-3 * noise)
    return pca.mean_.astype(np.float64), pca.components_.T.astype(np.float64), ridge


def _project(embedding: Embedding, weighted: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Places (rows, K) from logs @ loadings (rows, K), where all rows miss the same genes (G,)."""
    loadings, mean = embedding.loadings, embedding.mean
    lost = loadings[missing]
    known_gram = np.diag(1.0 + embedding.ridge) - lost.T @ lost  # loadings are orthonormal
    known_mean = loadings.T @ mean - lost.T @ mean[missing]
    return np.linalg.solve(known_gram, (weighted - known_mean).T).T
