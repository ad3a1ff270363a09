"""From a token store to the batches of one rank, step after step.

A global batch is the same whatever the number of ranks; this rank's part of it follows from `deal`, and where several
ranks share each context, from `slices`: a rank reads the cells that its slice touches and no others. Nothing is
carried from step to step but the position.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cctrain.data.loading.batches import Batch, deal, pack
from cctrain.data.loading.contexts import (
    Context,
    ContextRule,
    build_context,
    context_size_bound,
    expected_size,
    join,
    part_of,
)
from cctrain.data.loading.order import Order
from cctrain.data.loading.samples import samples_of
from cctrain.data.loading.slices import slice_size_bound, tokens_of_slice, touched_cells
from cctrain.data.store.store import TokenStore


@dataclass(frozen=True)
class RankStep:
    """What one rank runs in one optimizer step. `batches` has as many entries on every rank."""

    position: int
    num_contexts: int
    batches: list[Batch]


@dataclass(frozen=True)
class Share:
    """Contexts are dealt to data ranks; of each of these, a context rank holds a slice. Alone, a rank has it all."""

    data_rank: int = 0
    num_data_ranks: int = 1
    context_rank: int = 0
    num_context_ranks: int = 1


class Loader:
    """One rank's share in batches of a store's samples, at most `micro_batch_tokens` tokens at a time."""

    def __init__(self, store: TokenStore, rule: ContextRule, share: Share, micro_batch_tokens: int):
        self.store = store
        self.rule = rule
        self.share = share
        self.micro_batch_tokens = micro_batch_tokens
        self.samples = samples_of(store, rule)
        self._expected = expected_size(rule, store.num_tokens, store.measured, store.source_of_cell)
        self._bounds = context_size_bound(rule, store.num_tokens, store.measured, store.source_of_cell)

    def training_steps(self, order: Order, global_batch: int, position: int, num_steps: int) -> Iterator[RankStep]:
        """The next `num_steps` steps after `position` consumed samples."""
        for _ in range(num_steps):
            step = self.step(order, global_batch, position)
            yield step
            position += step.num_contexts

    def step(self, order: Order, global_batch: int, position: int) -> RankStep:
        """The step after `position` consumed samples."""
        samples = order.batch(position, global_batch)
        return RankStep(position, len(samples), self.batches(samples, position + np.arange(len(samples))))

    def batches(self, samples: np.ndarray, positions: np.ndarray) -> list[Batch]:
        """This rank's packs of the given samples, each at its position (which draws its targets)."""
        mine = deal(self.sizes(samples, positions), self.share.num_data_ranks, self.micro_batch_tokens)
        return [
            pack(self.contexts(samples[members], positions[members]), self.rule.cell_encoding)
            for members in mine[self.share.data_rank]
        ]

    def sizes(self, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 (samples,): tokens that the largest slice of each context will not exceed; all ranks agree by it."""
        num_ranks = self.share.num_context_ranks
        cells = (self._cells(sample, position) for sample, position in zip(samples, positions, strict=True))
        return np.array(
            [slice_size_bound(self._expected[rows], self._bounds[rows], num_ranks) for rows in cells], dtype=np.int64
        )

    def largest_size(self) -> int:
        """A size that no sample of the store exceeds in any epoch."""
        num_ranks, whole = self.share.num_context_ranks, self.samples.most(self._bounds)
        if num_ranks == 1 or (self.samples.sizes == 1).all():
            return -(-whole // num_ranks)
        most_per_expected = (self._bounds / self._expected).max()
        return min(whole, int(most_per_expected * self.samples.most(self._expected) / num_ranks) + 4)

    def contexts(self, samples: np.ndarray, positions: np.ndarray) -> list[Context]:
        """This rank's slices of the contexts, each of the given samples at its position."""
        cells_of = [self._cells(sample, position) for sample, position in zip(samples, positions, strict=True)]
        touched = [
            touched_cells(self._expected[rows], self.share.context_rank, self.share.num_context_ranks)
            for rows in cells_of
        ]
        read = self.store.cells(
            np.concatenate([rows[first:last] for rows, (first, last) in zip(cells_of, touched, strict=True)])
            if len(cells_of)
            else np.zeros(0, dtype=np.int64)
        )
        contexts, done = [], 0
        for sample, position, rows, (first, last) in zip(samples, positions, cells_of, touched, strict=True):
            parts, ends = [], np.cumsum(self._expected[rows])
            for cell in range(first, last):
                tokens = slice(read.offsets[done], read.offsets[done + 1])
                parts.append(self._slice(rows, ends, cell, int(position), read.genes[tokens], read.counts[tokens]))
                done += 1
            contexts.append(join(int(sample), parts, len(rows), first))
        return contexts

    def _slice(
        self, rows: np.ndarray, ends: np.ndarray, cell: int, position: int, genes: np.ndarray, counts: np.ndarray
    ) -> Context:
        """What this rank holds of one cell of the context that `rows` make."""
        measured = self.store.measured[self.store.source_of_cell[rows[cell]]]
        whole = build_context(self.rule, position, int(rows[cell]), genes, counts, measured)
        share = self.share
        first, last = tokens_of_slice(ends, cell, len(whole.genes), share.context_rank, share.num_context_ranks)
        return part_of(whole, first, last)

    def _cells(self, sample: int, position: int) -> np.ndarray:
        return self.samples.cells(int(sample), self.samples.epoch_of(int(position)))
