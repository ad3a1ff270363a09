"""Contexts are dealt to ranks and packed into batches: flat arrays with offsets, never padded.

Dealing comes after the global batch is decided: contexts go to num_ranks × A bins, balanced by tokens, where A
(the accumulation steps) is the smallest number for which no bin exceeds `micro_batch_tokens`. It uses bounds
of the sizes that every rank knows, so all ranks agree without talking. A bin may be empty.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cctrain.data.loading.contexts import Context
from cctrain.errors import UsageError


@dataclass(frozen=True)
class Batch:
    """A pack of contexts.

    genes int64 (total,); counts float32 (total,), 0 at targets; cells int64 (total,), index of each token's cell
    among the cells of the pack; offsets int64 (contexts + 1,); targets int64 (T,), indices among the tokens;
    target_counts float32 (T,); log_size_factors float32 (cells,); encodings float32 (cells, signs of a cell);
    samples and positions int64 (contexts,).
    """

    genes: np.ndarray
    counts: np.ndarray
    cells: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray
    target_counts: np.ndarray
    log_size_factors: np.ndarray
    encodings: np.ndarray
    samples: np.ndarray
    positions: np.ndarray


def pack(contexts: list[Context], cell_encoding: int = 0) -> Batch:
    """Lay contexts end to end. An empty list gives a batch of one token, no target and no sample: a rank without
    work still takes part in every collective, with weight zero. Its cell has `cell_encoding` signs, all 0."""
    if not contexts:
        none = np.zeros(0, dtype=np.int64)
        filler = Context(
            sample=-1,
            position=-1,
            genes=np.zeros(1, dtype=np.int64),
            counts=np.ones(1, dtype=np.float32),
            cells=np.zeros(1, dtype=np.int64),
            targets=none,
            target_counts=none.astype(np.float32),
            log_size_factors=np.zeros(1),
            encodings=np.zeros((1, cell_encoding), dtype=np.float32),
        )
        return _lay([filler], samples=none, positions=none)
    return _lay(
        contexts,
        samples=np.array([context.sample for context in contexts], dtype=np.int64),
        positions=np.array([context.position for context in contexts], dtype=np.int64),
    )


def _lay(contexts: list[Context], samples: np.ndarray, positions: np.ndarray) -> Batch:
    lengths = np.array([len(context.genes) for context in contexts], dtype=np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    num_cells = [len(context.log_size_factors) for context in contexts]
    first_cells = np.cumsum([0, *num_cells[:-1]])
    return Batch(
        genes=np.concatenate([context.genes for context in contexts]).astype(np.int64),
        counts=np.concatenate([context.counts for context in contexts]).astype(np.float32),
        cells=np.concatenate(
            [context.cells + first for context, first in zip(contexts, first_cells, strict=True)]
        ).astype(np.int64),
        offsets=offsets,
        targets=np.concatenate(
            [context.targets + start for context, start in zip(contexts, offsets[:-1], strict=True)]
        ).astype(np.int64),
        target_counts=np.concatenate([context.target_counts for context in contexts]).astype(np.float32),
        log_size_factors=np.concatenate([context.log_size_factors for context in contexts]).astype(np.float32),
        encodings=np.concatenate([context.encodings for context in contexts]),
        samples=samples,
        positions=positions,
    )


def packs(contexts: Iterable[Context], most_tokens: int) -> Iterator[Batch]:
    """Consecutive contexts packed in their order, about `most_tokens` at a time; a longer one comes alone."""
    held: list[Context] = []
    for context in contexts:
        if held and sum(len(other.genes) for other in held) + len(context.genes) > most_tokens:
            yield pack(held)
            held = []
        held.append(context)
    if held:
        yield pack(held)


def deal(sizes: np.ndarray, num_ranks: int, micro_batch_tokens: int) -> list[list[np.ndarray]]:
    """Indices of the contexts for each [rank][accumulation step], balanced by `sizes` (tokens, int64).

    Raises UsageError if a single context is larger than a micro-batch may be.
    """
    if len(sizes) and sizes.max() > micro_batch_tokens:
        raise UsageError(
            f"a context of up to {int(sizes.max()):,} tokens does not fit data.micro_batch_tokens="
            f"{micro_batch_tokens:,}: raise it, or lower data.max_tokens"
        )
    accumulation = max(1, -(-int(sizes.sum()) // (num_ranks * micro_batch_tokens)))
    while True:
        bins, largest = _longest_first(sizes, num_ranks * accumulation)
        if largest <= micro_batch_tokens:
            return [bins[rank * accumulation : (rank + 1) * accumulation] for rank in range(num_ranks)]
        accumulation += 1


def _longest_first(sizes: np.ndarray, num_bins: int) -> tuple[list[np.ndarray], int]:
    """Greedy balancing: the longest context next, into the emptiest bin (Graham 1969)."""
    heap = [(0, index) for index in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for item in np.argsort(-sizes, kind="stable"):
        load, index = heapq.heappop(heap)
        bins[index].append(int(item))
        heapq.heappush(heap, (load + int(sizes[item]), index))
    return [np.array(sorted(members), dtype=np.int64) for members in bins], max(load for load, _ in heap)
