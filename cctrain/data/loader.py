"""From a token store to the batches of one rank, step after step.

A global batch is the same whatever the number of ranks; this rank's part of it follows from `deal`, and from
`slice_of` where several ranks share each context. Nothing is carried from step to step but the position.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cctrain.data.batches import Batch, deal, pack, slice_of
from cctrain.data.contexts import Context, ContextRule, build_context, context_size_bound
from cctrain.data.order import Order
from cctrain.data.store import TokenStore


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
    """One rank's share in batches of a store's samples, at most `micro_batch_tokens` tokens at a time.

    `sizes` (samples,) bounds the tokens of each sample's context that a rank holds; dealing on all ranks agrees by it.
    """

    def __init__(self, store: TokenStore, rule: ContextRule, share: Share, micro_batch_tokens: int):
        self.store = store
        self.rule = rule
        self.share = share
        self.micro_batch_tokens = micro_batch_tokens
        bounds = context_size_bound(rule, store.num_tokens, store.measured, store.source_of_cell)
        self.sizes = -(-bounds // share.num_context_ranks)

    def training_steps(self, order: Order, global_batch: int, position: int, num_steps: int) -> Iterator[RankStep]:
        """The next `num_steps` steps after `position` consumed samples."""
        for _ in range(num_steps):
            samples = order.batch(position, global_batch)
            positions = position + np.arange(len(samples))
            yield RankStep(position, len(samples), self.batches(samples, positions))
            position += len(samples)

    def batches(self, samples: np.ndarray, positions: np.ndarray) -> list[Batch]:
        """This rank's packs of the given samples, each at its position (which draws its targets)."""
        share = self.share
        mine = deal(self.sizes[samples], share.num_data_ranks, self.micro_batch_tokens)[share.data_rank]
        whole = (pack(self.contexts(samples[members], positions[members])) for members in mine)
        if share.num_context_ranks == 1:
            return list(whole)
        return [slice_of(batch, share.context_rank, share.num_context_ranks) for batch in whole]

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
