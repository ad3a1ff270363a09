"""Which cells a sample is made of: one cell, a group of cells, or a window of consecutive cells of a group.

Samples 0 … num_train − 1 are for training, the rest are held out. With windows, a group of k cells is cut into
⌈k / window⌉ parts of nearly equal size; where the first one begins is drawn anew in each epoch, so that cells meet
other cells, and every cell comes once an epoch all the same.
"""

from dataclasses import dataclass

import numpy as np

from cctrain.data.hashing import hash64
from cctrain.data.loading.contexts import ContextRule
from cctrain.data.store.store import TokenStore
from cctrain.errors import UsageError


@dataclass(frozen=True)
class Samples:
    """Sample i is part part[i] of num_parts[i] of the cells starts[i] … starts[i] + sizes[i] − 1; int64 (n,) all."""

    seed: int
    num_train: int
    starts: np.ndarray
    sizes: np.ndarray
    part: np.ndarray
    num_parts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def cells(self, sample: int, epoch: int) -> np.ndarray:
        """int64, ascending: the rows of the store that the sample is made of."""
        start, size, part, num_parts = (
            int(values[sample]) for values in (self.starts, self.sizes, self.part, self.num_parts)
        )
        within = np.arange(part * size // num_parts, (part + 1) * size // num_parts)
        if num_parts > 1:
            shift = int(hash64(self.seed, "windows of a group", epoch, start) % np.uint64(size))
            within = np.sort((within + shift) % size)
        return start + within

    def num_cells(self, samples: np.ndarray) -> np.ndarray:
        """int64: of how many cells each is made."""
        part, parts, sizes = self.part[samples], self.num_parts[samples], self.sizes[samples]
        return (part + 1) * sizes // parts - part * sizes // parts

    def epoch_of(self, position: int) -> int:
        return position // self.num_train if self.num_train else 0

    def sums(self, values: np.ndarray) -> np.ndarray:
        """float64 (samples,): of `values`, (all cells,), over the cells of each, if windows begin where groups do."""
        before = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
        first = self.starts + self.part * self.sizes // self.num_parts
        last = self.starts + (self.part + 1) * self.sizes // self.num_parts
        return before[last] - before[first]

    def most(self, values: np.ndarray) -> int:
        """The largest sum of `values`, int64 (all cells,), over the cells of any sample in any epoch."""
        if (self.sizes == 1).all():
            return int(values[self.starts].max())
        largest = 0
        for start, size, parts in np.unique(np.stack((self.starts, self.sizes, self.num_parts)), axis=1).T.tolist():
            width = -(-size // parts)
            around = np.concatenate((values[start : start + size], values[start : start + width]))
            sums = np.concatenate(([0], np.cumsum(around)))
            largest = max(largest, int((sums[width:] - sums[:-width]).max()))
        return largest


def samples_of(store: TokenStore, rule: ContextRule) -> Samples:
    """Raises UsageError if contexts of groups are asked of a store that was prepared without groups."""
    if rule.kind == "cell":
        zero, one = (np.broadcast_to(np.int64(value), store.num_cells) for value in (0, 1))
        return Samples(rule.seed, store.num_train, np.arange(store.num_cells), one, zero, one)
    groups = store.groups
    if groups is None:
        raise UsageError(
            f"data.context=group needs a store whose cells lie in groups, and {store.path} is shuffled cell by cell: "
            "prepare it again with --group-by COLUMN"
        )
    sizes = np.diff(groups.starts)
    parts = np.ones_like(sizes) if rule.window is None else -(-sizes // rule.window)
    first = np.cumsum(parts) - parts
    group = np.repeat(np.arange(len(sizes)), parts)
    return Samples(
        seed=rule.seed,
        num_train=int(parts[: groups.num_train].sum()),
        starts=groups.starts[:-1][group],
        sizes=sizes[group],
        part=np.arange(len(group)) - first[group],
        num_parts=parts[group],
    )
