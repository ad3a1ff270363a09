"""The order of samples: a pure function of the store's content, the seed and the global position.

Blocks of consecutive samples are shuffled, then the samples inside each window of `mixed_blocks` blocks; every sample
comes once an epoch. With weights, draw i is a hash of i instead, with replacement, and an epoch is as many draws as
there are samples. There is no state: a run that stops after `position` samples continues at `position`, on any number
of ranks. A global batch never crosses an epoch; a short last one is trained.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from cctrain.data.hashing import hash64, uniform


@dataclass(frozen=True)
class Order:
    """The order of `num_samples` samples, ids 0 … num_samples − 1, under one content digest and seed.

    `kind` names what a sample is. `weights`, float64 (num_samples,) with a sum above 0, makes sample i come with a
    probability in proportion to weights[i].
    """

    num_samples: int
    digest: str
    seed: int
    block: int
    mixed_blocks: int
    kind: str = "cell"
    weights: np.ndarray | None = field(default=None, compare=False)

    def batch(self, position: int, global_batch: int) -> np.ndarray:
        """Sample ids (int64) of the global batch that starts after `position` consumed samples."""
        epoch, start = divmod(position, self.num_samples)
        stop = min(start + global_batch, self.num_samples)
        if self.weights is not None:
            return self._draws(np.arange(position, position + stop - start))
        window_starts = self._window_starts(epoch)
        first = int(np.searchsorted(window_starts, start, side="right")) - 1
        last = int(np.searchsorted(window_starts, stop, side="left"))
        ids = np.concatenate([_window_samples(self, epoch, window) for window in range(first, last)])
        return ids[start - window_starts[first] : stop - window_starts[first]]

    def _window_starts(self, epoch: int) -> np.ndarray:
        """Index within the epoch at which each window starts (int64)."""
        blocks = _block_order(self, epoch)
        sizes = np.minimum(self.block, self.num_samples - blocks * self.block)
        ends = np.cumsum(sizes)
        return np.concatenate(([0], ends[self.mixed_blocks - 1 : len(blocks) - 1 : self.mixed_blocks]))

    def _draws(self, positions: np.ndarray) -> np.ndarray:
        draws = uniform(self.digest, self.seed, "weighted draws", self.kind, positions) * self._cumulative[-1]
        last = np.searchsorted(self._cumulative, self._cumulative[-1])  # by rounding, a draw may equal the sum
        return np.minimum(np.searchsorted(self._cumulative, draws, side="right"), last)

    @cached_property
    def _cumulative(self) -> np.ndarray:
        assert self.weights is not None
        return np.cumsum(self.weights)

    def keys(self, purpose: str, epoch: int) -> tuple:
        return (self.digest, self.seed, purpose, self.kind, self.block, self.mixed_blocks, epoch)


@lru_cache(maxsize=4)
def _block_order(order: Order, epoch: int) -> np.ndarray:
    num_blocks = -(-order.num_samples // order.block)
    return np.argsort(hash64(*order.keys("order of blocks", epoch), np.arange(num_blocks)), kind="stable")


@lru_cache(maxsize=4)
def _window_samples(order: Order, epoch: int, window: int) -> np.ndarray:
    blocks = _block_order(order, epoch)[window * order.mixed_blocks : (window + 1) * order.mixed_blocks]
    ids = (blocks[:, None] * order.block + np.arange(order.block)).ravel()
    ids = ids[ids < order.num_samples]
    return ids[np.argsort(hash64(*order.keys("order of samples", epoch), ids), kind="stable")]
