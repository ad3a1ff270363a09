"""A cell becomes a context: targets hidden, the rest visible, its size factor from what is visible alone.

Targets are chosen without looking at the cell's counts: gene g, if its source measured it, is a target with
probability  target_rate · min(1, detection_rate_g / detection_cap).  Zeros are targets as often as chance
makes them. Visible tokens are the expressed genes that are not targets, at most `max_tokens` of them, a
seeded sample if there are more. The visible size factor is

    s = Σ counts over measured genes that are not targets / Σ share_g over the same genes

so that s · share_g is what the gene mean expects of gene g. Every choice is a hash of (seed, purpose,
position, cell, gene): no worker or rank carries a generator.
"""

from dataclasses import dataclass, replace

import numpy as np

from cctrain.config import ObjectiveConfig
from cctrain.data.hashing import hash64, uniform
from cctrain.data.store import GeneTable

_RARE = float(np.log(1e9))  # ℓ of `context_size_bound`


@dataclass(frozen=True)
class ContextRule:
    """All that decides a context beside its cell. target_probability and share are float64 (genes,)."""

    seed: int
    purpose: str
    target_probability: np.ndarray
    share: np.ndarray
    max_tokens: int


@dataclass(frozen=True)
class Context:
    """One cell's tokens in the canonical order of gene ids.

    genes int64 (n,); counts float32 (n,), 0 at targets; targets int64, the indices of the targets;
    target_counts float32, what is hidden there; log_size_factor, of the visible counts.
    """

    sample: int
    position: int
    genes: np.ndarray
    counts: np.ndarray
    targets: np.ndarray
    target_counts: np.ndarray
    log_size_factor: float


def target_probability(genes: GeneTable, objective: ObjectiveConfig) -> np.ndarray:
    """float64 (genes,): how often each gene is a target, by its detection rate in the training cells alone."""
    return objective.target_rate * np.minimum(1.0, genes.detection_rate / objective.detection_cap)


def choose_targets(rule: ContextRule, position: int, sample: int, measured: np.ndarray) -> np.ndarray:
    """bool (genes,): the targets of a sample, without a look at its counts."""
    all_genes = np.arange(len(rule.share))
    draws = uniform(rule.seed, f"{rule.purpose}: targets", position, sample, all_genes)
    return measured & (draws < rule.target_probability)


def build_context(
    rule: ContextRule, position: int, sample: int, genes: np.ndarray, counts: np.ndarray, measured: np.ndarray
) -> Context:
    """The context of one cell: expressed `genes` (ascending) with `counts`, and `measured`, bool (all genes,)."""
    hidden = choose_targets(rule, position, sample, measured)
    visible = ~hidden[genes]
    log_size_factor = visible_log_size_factor(rule.share, measured & ~hidden, counts[visible])
    visible_genes, visible_counts = _truncate(rule, position, sample, genes[visible], counts[visible])

    target_genes = np.flatnonzero(hidden)
    truth = np.zeros(len(rule.share), dtype=np.float32)
    truth[genes] = counts
    tokens = np.concatenate((visible_genes, target_genes))
    token_counts = np.concatenate((visible_counts, np.zeros(len(target_genes)))).astype(np.float32)
    canonical = np.argsort(tokens, kind="stable")
    return Context(
        sample=sample,
        position=position,
        genes=tokens[canonical],
        counts=token_counts[canonical],
        targets=np.flatnonzero(canonical >= len(visible_genes)),
        target_counts=truth[target_genes],
        log_size_factor=log_size_factor,
    )


def whole_context(
    sample: int,
    genes: np.ndarray,
    counts: np.ndarray,
    share: np.ndarray,
    measured: np.ndarray,
    max_tokens: int,
) -> Context:
    """A cell with nothing hidden, for its embedding; arguments as in `build_context`."""
    rule = ContextRule(0, "embedding", np.zeros(len(share)), share, max_tokens)
    return build_context(rule, 0, sample, genes, counts, measured)


def hide_visible(context: Context) -> Context:
    """The same targets at the same size factor, with every visible token gone."""
    return replace(
        context,
        genes=context.genes[context.targets],
        counts=context.counts[context.targets],
        targets=np.arange(len(context.targets)),
    )


def visible_log_size_factor(share: np.ndarray, countable: np.ndarray, visible_counts: np.ndarray) -> float:
    """log s; `countable` is bool (genes,): measured and not a target. A cell without visible counts has one half."""
    return float(np.log(max(visible_counts.sum(), 0.5)) - np.log(share[countable].sum()))


def context_size_bound(
    rule: ContextRule, num_tokens: np.ndarray, measured: np.ndarray, source: np.ndarray
) -> np.ndarray:
    """int64 (cells,): tokens that a cell's context will not exceed, known without reading the cell.

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
    rule: ContextRule, position: int, sample: int, genes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    if len(genes) <= rule.max_tokens:
        return genes, counts
    draws = hash64(rule.seed, f"{rule.purpose}: truncation", position, sample, genes)
    kept = np.sort(np.argsort(draws, kind="stable")[: rule.max_tokens])
    return genes[kept], counts[kept]
