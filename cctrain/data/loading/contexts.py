"""Cells become a context: targets hidden, the rest visible, size factors from what is visible alone.

A context is a cell, or several cells of a group. What happens to a cell's tokens is the same in both, so a cell has
the same targets alone and among others.

Targets are chosen without looking at the cell's counts: gene g, if its source measured it, is a target with
probability  target_rate · min(1, detection_rate_g / detection_cap).  Zeros are targets as often as chance
makes them. Visible tokens are the expressed genes that are not targets, at most `max_tokens` of them, a
seeded sample if there are more. The visible size factor is

    s = Σ counts over measured genes that are not targets / Σ share_g over the same genes

so that s · share_g is what the gene mean expects of gene g. In a context of several cells each token carries its
cell: a vector of random signs, drawn for the cell anew in every context. Every choice is a hash of (seed, purpose,
position, cell, gene): no worker or rank carries a generator, and the order of the cells means nothing.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from cctrain.config import ObjectiveConfig
from cctrain.data.hashing import bound_of, hash64, hash_after, is_below, key_of_hash
from cctrain.data.store.store import GeneTable

_RARE = float(np.log(1e9))  # ℓ of `context_size_bound`


@dataclass(frozen=True)
class ContextRule:
    """All that decides a context beside its cells.

    target_probability and share are float64 (genes,); max_tokens bounds a cell's visible tokens; kind is `cell` or
    `group`, and a window the most cells of a group that one context holds; cell_encoding is the number of signs that
    tell cells apart.
    """

    seed: int
    purpose: str
    target_probability: np.ndarray
    share: np.ndarray
    max_tokens: int
    kind: str = "cell"
    window: int | None = None
    cell_encoding: int = 0

    @cached_property
    def keys_of_genes(self) -> np.ndarray:
        """What hashes take of each gene; most of the cost of a context, were it not kept."""
        return key_of_hash(np.arange(len(self.share)))

    @cached_property
    def target_bounds(self) -> np.ndarray:
        return bound_of(self.target_probability)


@dataclass(frozen=True)
class Context:
    """Tokens in the canonical order, by cell and gene id, of which a context rank may hold but a slice.

    genes int64 (n,); counts float32 (n,), 0 at targets; cells int64 (n,), the index of each token's cell among all
    cells of the context; targets int64, the indices of the targets; target_counts float32, what is hidden there;
    log_size_factors float64 (cells,), of the visible counts; encodings float32 (cells, cell_encoding), signs. The
    last two are 0 for cells that the holder has no token of.
    """

    sample: int
    position: int
    genes: np.ndarray
    counts: np.ndarray
    cells: np.ndarray
    targets: np.ndarray
    target_counts: np.ndarray
    log_size_factors: np.ndarray
    encodings: np.ndarray


def target_probability(genes: GeneTable, objective: ObjectiveConfig) -> np.ndarray:
    """float64 (genes,): how often each gene is a target, by its detection rate in the training cells alone."""
    return objective.target_rate * np.minimum(1.0, genes.detection_rate / objective.detection_cap)


def choose_targets(rule: ContextRule, position: int, cell: int, measured: np.ndarray) -> np.ndarray:
    """bool (genes,): the targets of a cell, without a look at its counts."""
    drawn = hash_after(hash64(rule.seed, f"{rule.purpose}: targets", position, cell), rule.keys_of_genes)
    return measured & is_below(drawn, rule.target_bounds)


def build_context(
    rule: ContextRule, position: int, cell: int, genes: np.ndarray, counts: np.ndarray, measured: np.ndarray
) -> Context:
    """The context of one cell: expressed `genes` (ascending) with `counts`, and `measured`, bool (all genes,)."""
    hidden = choose_targets(rule, position, cell, measured)
    visible = ~hidden[genes]
    log_size_factor = visible_log_size_factor(rule.share, measured & ~hidden, counts[visible])
    visible_genes, visible_counts = _truncate(rule, position, cell, genes[visible], counts[visible])

    truth, shown = np.zeros((2, len(rule.share)), dtype=np.float32)
    truth[genes], shown[visible_genes] = counts, visible_counts
    is_token = hidden.copy()
    is_token[visible_genes] = True
    tokens = np.flatnonzero(is_token)
    targets = np.flatnonzero(hidden[tokens])
    return Context(
        sample=cell,
        position=position,
        genes=tokens,
        counts=shown[tokens],
        cells=np.zeros(len(tokens), dtype=np.int64),
        targets=targets,
        target_counts=truth[tokens[targets]],
        log_size_factors=np.array([log_size_factor]),
        encodings=_signs(rule, position, cell)[None],
    )


def part_of(context: Context, first: int, last: int) -> Context:
    """Its tokens first .. last - 1."""
    low, high = np.searchsorted(context.targets, (first, last))
    return replace(
        context,
        genes=context.genes[first:last],
        counts=context.counts[first:last],
        cells=context.cells[first:last],
        targets=context.targets[low:high] - first,
        target_counts=context.target_counts[low:high],
    )


def join(sample: int, contexts: list[Context], num_cells: int, first_cell: int = 0) -> Context:
    """One context of the tokens of one cell or more, which are the cells from `first_cell` on of `num_cells`."""
    lengths = [len(context.genes) for context in contexts]
    starts = np.cumsum([0, *lengths[:-1]])
    held = slice(first_cell, first_cell + len(contexts))
    log_size_factors = np.zeros(num_cells)
    log_size_factors[held] = np.concatenate([context.log_size_factors for context in contexts])
    encodings = np.zeros((num_cells, contexts[0].encodings.shape[1]), dtype=np.float32)
    encodings[held] = np.concatenate([context.encodings for context in contexts])
    return Context(
        sample=sample,
        position=contexts[0].position,
        genes=np.concatenate([context.genes for context in contexts]),
        counts=np.concatenate([context.counts for context in contexts]),
        cells=np.repeat(np.arange(held.start, held.stop), lengths),
        targets=np.concatenate([context.targets + start for context, start in zip(contexts, starts, strict=True)]),
        target_counts=np.concatenate([context.target_counts for context in contexts]),
        log_size_factors=log_size_factors,
        encodings=encodings,
    )


def by_cell(context: Context) -> list[Context]:
    """Each of its cells alone."""
    bounds = np.searchsorted(context.cells, np.arange(len(context.log_size_factors) + 1)).tolist()
    return [
        replace(
            part_of(context, first, last),
            cells=np.zeros(last - first, dtype=np.int64),
            log_size_factors=context.log_size_factors[cell : cell + 1],
            encodings=context.encodings[cell : cell + 1],
        )
        for cell, (first, last) in enumerate(pairwise(bounds))
    ]


def nothing_hidden(share: np.ndarray, max_tokens: int, cell_encoding: int = 0) -> ContextRule:
    """The rule of a cell's embedding; fields as in ContextRule."""
    return ContextRule(0, "embedding", np.zeros(len(share)), share, max_tokens, cell_encoding=cell_encoding)


def hide_visible(context: Context) -> Context:
    """The same targets at the same size factor, with every visible token gone."""
    return replace(
        context,
        genes=context.genes[context.targets],
        counts=context.counts[context.targets],
        cells=context.cells[context.targets],
        targets=np.arange(len(context.targets)),
    )


def visible_log_size_factor(share: np.ndarray, countable: np.ndarray, visible_counts: np.ndarray) -> float:
    """log s; `countable` is bool (genes,): measured and not a target. A cell without visible counts has one half, and
    one whose measured genes all are targets counts as if it had all genes."""
    return float(np.log(max(visible_counts.sum(), 0.5)) - np.log(share[countable].sum() or 1.0))


def expected_size(rule: ContextRule, num_tokens: np.ndarray, measured: np.ndarray, source: np.ndarray) -> np.ndarray:
    """int64 (cells,): about as many tokens as each cell will have, known without reading it; at least 1."""
    targets = np.rint((measured * rule.target_probability).sum(axis=1)).astype(np.int64)
    return np.maximum(1, np.minimum(num_tokens, rule.max_tokens) + targets[source])


def context_size_bound(
    rule: ContextRule, num_tokens: np.ndarray, measured: np.ndarray, source: np.ndarray
) -> np.ndarray:
    """int64 (cells,): tokens that a cell will not exceed, known without reading it.

    num_tokens (cells,) expressed genes; measured bool (sources, genes); source (cells,). The number of targets
    is a sum of independent draws, of variance v. By Bernstein's inequality it exceeds its mean by
    ℓ/3 + √(ℓ²/9 + 2·ℓ·v) less often than exp(−ℓ): once in a billion here.
    """
    probability = measured * rule.target_probability
    mean, variance = probability.sum(axis=1), (probability * (1 - probability)).sum(axis=1)
    excess = _RARE / 3 + np.sqrt(_RARE**2 / 9 + 2 * _RARE * variance)
    bound = np.ceil(mean + excess).astype(np.int64)
    return np.minimum(num_tokens, rule.max_tokens) + np.minimum(bound, measured.sum(axis=1))[source]


def _truncate(
    rule: ContextRule, position: int, cell: int, genes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if len(genes) <= rule.max_tokens:
        return genes, counts
    draws = hash64(rule.seed, f"{rule.purpose}: truncation", position, cell, genes)
    kept = np.sort(np.argsort(draws, kind="stable")[: rule.max_tokens])
    return genes[kept], counts[kept]


def _signs(rule: ContextRule, position: int, cell: int) -> np.ndarray:
    """float32 (cell_encoding,): the bits of hashes, as -1 and +1."""
    if not rule.cell_encoding:
        return np.zeros(0, dtype=np.float32)
    words = hash64(rule.seed, f"{rule.purpose}: cell", position, cell, np.arange(-(-rule.cell_encoding // 64)))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8))[: rule.cell_encoding]
    return 2 * bits.astype(np.float32) - 1
