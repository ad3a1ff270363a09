"""The hidden counts that every prediction is judged on, and what may be seen when predicting them.

A `TargetSet` packs all targets of several contexts: one held-out cell may be drawn several times, each time
with other targets. Which genes are targets depends on the gene alone (`target_probability`), never on the
cell's counts, so zeros are targets as often as chance makes them. A prediction for a target set is a pair
(log_mu, log_theta), float64 (T,), of a negative binomial with variance mu + mu²/theta; log_theta = +inf is
a Poisson.

`draw_targets` makes such a set from training cells, which is how baselines choose their settings. The
targets of the held-out cells come from the data pipeline, by the same rule.
"""

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from cctrain.data.hashing import uniform

Prediction = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class TargetSet:
    contexts: np.ndarray  # int64 (T,): the context of each target, ascending
    genes: np.ndarray  # int64 (T,): vocabulary index
    counts: np.ndarray  # int64 (T,): the hidden truth
    cell_of_context: np.ndarray  # int64 (num_contexts,): the held-out cell, the unit of the bootstrap
    # float64 (num_contexts,): by the gene mean, gene g is expected exp(log_size_factor) · share[g] times.
    log_size_factor: np.ndarray
    visible_offsets: np.ndarray  # int64 (num_contexts + 1,): where each context starts in the two below
    visible_genes: np.ndarray  # every expressed gene of the context that is not a target
    visible_counts: np.ndarray
    source_of_context: np.ndarray  # int64 (num_contexts,)

    @property
    def num_contexts(self) -> int:
        return len(self.cell_of_context)

    @property
    def num_cells(self) -> int:
        return int(self.cell_of_context.max()) + 1 if self.num_contexts else 0


@dataclass(frozen=True)
class TrainingCells:
    """What baselines are fitted on: cells of the training split alone."""

    counts: sp.csr_matrix  # (num_cells, V)
    source_of_cell: np.ndarray  # int64 (num_cells,)
    measured: np.ndarray  # bool (num_sources, V): the genes that each source measured

    def take(self, rows: np.ndarray) -> "TrainingCells":
        return TrainingCells(self.counts[rows], self.source_of_cell[rows], self.measured)


def draw_targets(
    cells: TrainingCells, rows: np.ndarray, share: np.ndarray, target_probability: np.ndarray, seed: int
) -> TargetSet:
    """One context for each of `rows` (indices into `cells`), its targets drawn by gene alone.

    `share` and `target_probability` are float64 (V,). A cell whose visible genes have no count is given the
    size factor of a single count, so that every prediction stays finite.
    """
    drawn_genes, drawn_counts, seen_genes, seen_counts = [], [], [], []
    size_factor = np.empty(len(rows))
    gene_ids = np.arange(len(share))
    for i, row in enumerate(rows):
        measured = cells.measured[cells.source_of_cell[row]]
        is_target = measured & (uniform(seed, "pseudo-targets", int(row), gene_ids) < target_probability)
        span = slice(cells.counts.indptr[row], cells.counts.indptr[row + 1])
        expressed = cells.counts.indices[span].astype(np.int64)
        values = cells.counts.data[span].astype(np.int64)
        whole = np.zeros(len(share), dtype=np.int64)
        whole[expressed] = values
        visible = ~is_target[expressed] & (values > 0)
        drawn_genes.append(np.flatnonzero(is_target))
        drawn_counts.append(whole[is_target])
        seen_genes.append(expressed[visible])
        seen_counts.append(values[visible])
        size_factor[i] = max(values[visible].sum(), 0.5) / (share[measured & ~is_target].sum() or 1.0)
    return TargetSet(
        contexts=np.repeat(np.arange(len(rows)), [len(genes) for genes in drawn_genes]),
        genes=_join(drawn_genes),
        counts=_join(drawn_counts),
        cell_of_context=np.arange(len(rows)),
        log_size_factor=np.log(size_factor),
        visible_offsets=np.cumsum([0, *(len(genes) for genes in seen_genes)]).astype(np.int64),
        visible_genes=_join(seen_genes),
        visible_counts=_join(seen_counts),
        source_of_context=cells.source_of_cell[rows].astype(np.int64),
    )


def permuted_across_cells(targets: TargetSet, seed: int) -> TargetSet:
    """The same targets with the counts of each gene dealt anew among the contexts that hide it.

    Each gene keeps its distribution, no cell keeps its own counts: whatever a prediction knew about a cell
    is worth nothing now. A prediction that still beats the gene mean has learned something else.
    """
    shuffled = np.random.default_rng(seed).random(len(targets.genes))
    slots = np.argsort(targets.genes, kind="stable")
    dealt = np.lexsort((shuffled, targets.genes))
    counts = np.empty_like(targets.counts)
    counts[slots] = targets.counts[dealt]
    return replace(targets, counts=counts)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
