"""From a token store to the batches of one rank, step after step.

A global batch is the same whatever the number of ranks; this rank's part of it follows from `deal`. Nothing
is carried from step to step but the position.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cctrain.data.batches import Batch, deal, pack
from cctrain.data.contexts import Context, ContextRule, build_context, context_size_bound
from cctrain.data.order import Order
from cctrain.data.store import TokenStore


@dataclass(frozen=True)
class RankStep:
    """What one rank runs in one optimizer step. `batches` has as many entries on every rank."""

    position: int
    num_contexts: int
    batches: list[Batch]


class Loader:
    """The share of rank `rank` of `num_ranks` in batches of a store's samples.

    `sizes` (samples,) bounds the tokens of each sample's context; dealing on all ranks agrees by it.
    """

    def __init__(self, store: TokenStore, rule: ContextRule, rank: int, num_ranks: int, micro_batch_tokens: int):
        self.store = store
        self.rule = rule
        self.rank = rank
        self.num_ranks = num_ranks
        self.micro_batch_tokens = micro_batch_tokens
        self.sizes = context_size_bound(rule, store.num_tokens, store.measured, store.source_of_cell)

    def training_steps(self, order: Order, global_batch: int, position: int, num_steps: int) -> Iterator[RankStep]:
        """The next `num_steps` steps after `position` consumed samples."""
        for _ in range(num_steps):
            samples = order.batch(position, global_batch)
            positions = position + np.arange(len(samples))
            yield RankStep(position, len(samples), self.batches(samples, positions))
            position += len(samples)

    def batches(self, samples: np.ndarray, positions: np.ndarray) -> list[Batch]:
        """This rank's packs of the given samples, each at its position (which draws its targets)."""
        mine = deal(self.sizes[samples], self.num_ranks, self.micro_batch_tokens)[self.rank]
        return [pack(self.contexts(samples[members], positions[members])) for members in mine]

    def contexts(self, samples: np.ndarray, positions: np.ndarray) -> list[Context]:
        cells = self.store.cells(samples)
        contexts = []
        for index, (sample, position) in enumerate(zip(samples, positions, strict=True)):
            tokens = slice(cells.offsets[index], cells.offsets[index + 1])
            measured = self.store.measured[self.store.source_of_cell[sample]]
            contexts.append(
                build_context(
                    self.rule, int(position), int(sample), cells.genes[tokens], cells.counts[tokens], measured
                )
            )
        return contexts
