"""Which cells are held out, and the order of all: pure functions of the seed and of what the cells are.

    by content   a cell is held out when uniform(seed, "split", content) < held_out
    by a column  all cells with one value (a group, a donor) are, when the hash of the value falls under it; or
                 those with the values that were named

So cells of identical content lie on one side, wherever they come from, and adding cells to a data set moves no
other cell across. The share of held-out cells, or values, is `held_out` on average, not exactly. Where whole
values are held out, a cell that is identical to a training cell is left out instead.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from cctrain.data.hashing import hash64, uniform
from cctrain.data.prepare.quality import CellProfiles
from cctrain.errors import DataError, UsageError

_SHOWN = 10


@dataclass(frozen=True)
class Labels:
    """A column of obs as numbers: cell i has the value names[codes[i]]."""

    column: str
    names: np.ndarray  # (values,) str, ascending
    codes: np.ndarray  # int64 (cells,)

    def at(self, cells: np.ndarray) -> "Labels":
        """Of the cells under a mask, or at indices."""
        return Labels(self.column, self.names, self.codes[cells])

    def keys(self) -> np.ndarray:
        """uint64 (values,): hashes of the values' texts."""
        digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in self.names.tolist()]
        return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


def hold_out(keys: np.ndarray, held_out: float, seed: int, of: str = "cells") -> tuple[np.ndarray, str | None]:
    """Mask of the keys that are held out, and a note if a side would have been empty.

    With two distinct keys or more no side is empty: the key with the smallest hash is held out, or the one
    with the largest is trained on. A single distinct key is trained on. `of` names in the note what the keys are.
    """
    draws = _draws(keys, seed)
    mask = draws < held_out
    distinct = len(np.unique(keys))
    if distinct < 2:
        return np.zeros_like(mask), f"there is one of the distinct {of}: it is trained on, none is held out"
    if not mask.any():
        return draws == draws.min(), f"none of {distinct} distinct {of} fell under held_out: one was held out"
    if mask.all():
        return draws != draws.max(), f"all of {distinct} distinct {of} fell under held_out: one is trained on"
    return mask, None


def under_share(keys: np.ndarray, held_out: float, seed: int) -> np.ndarray:
    """Mask of the keys that `hold_out` holds out where no side is empty."""
    return _draws(keys, seed) < held_out


def _draws(keys: np.ndarray, seed: int) -> np.ndarray:
    return uniform(seed, "split", keys)


def hold_out_values(labels: Labels, held_out: float, seed: int) -> tuple[np.ndarray, str | None]:
    """Mask (cells,) that holds whole values of a column out, and a note as `hold_out` gives."""
    present = np.unique(labels.codes)
    mask = np.zeros(len(labels.names), dtype=bool)
    mask[present], note = hold_out(labels.keys()[present], held_out, seed, f"values of {labels.column}")
    return mask[labels.codes], note


def hold_out_named(labels: Labels, values: tuple[str, ...]) -> np.ndarray:
    """Mask (cells,) of the cells with one of the `values`. UsageError for a value that no cell has, or if all have."""
    present = labels.names[np.unique(labels.codes)].tolist()
    missing = [value for value in values if value not in present]
    if missing:
        shown = ", ".join(present[:_SHOWN]) + (f" and {len(present) - _SHOWN:,} more" if len(present) > _SHOWN else "")
        raise UsageError(
            f"--hold-out {missing[0]}: no cell that passes quality control has this value of '{labels.column}'. "
            f"There are {shown}."
        )
    mask = np.isin(labels.names, values)[labels.codes]
    if mask.all():
        raise UsageError(f"--hold-out names every value of '{labels.column}': no cell is left to train on.")
    return mask


def check_nested(groups: Labels, values: Labels) -> None:
    """DataError if the cells of a group have several of the values: it could not lie on one side."""
    low = np.full(len(groups.names), len(values.names))
    high = np.full(len(groups.names), -1)
    np.minimum.at(low, groups.codes, values.codes)
    np.maximum.at(high, groups.codes, values.codes)
    torn = np.flatnonzero(low < high)
    if len(torn):
        first = torn[0]
        raise DataError(
            f"{len(torn):,} groups of '{groups.column}' have cells of several values of '{values.column}', such as "
            f"'{groups.names[first]}' with '{values.names[low[first]]}' and '{values.names[high[first]]}': a group "
            "lies wholly on one side. Choose another --split-by, or a finer --group-by."
        )


def copies_of_training_cells(content: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Mask of the held-out cells whose content a training cell has, too."""
    return held_out & np.isin(content, content[~held_out])


def destination_rows(cells: CellProfiles, held_out: np.ndarray, seed: int, groups: Labels | None = None) -> np.ndarray:
    """int64 row of every cell in the store: training cells first, each side in the order of hash(seed, content).

    With groups: training groups first, each side in the order of hash(seed, name), and within a group cells
    in the order of hash(seed, content). Identical cells follow each other by source and row.
    """
    keys = [cells.row, cells.source, hash64(seed, "order", cells.content)]
    if groups is not None:
        keys += [groups.codes, hash64(seed, "order of groups", groups.keys())[groups.codes]]
    order = np.lexsort((*keys, held_out))
    rows = np.empty(len(order), dtype=np.int64)
    rows[order] = np.arange(len(order))
    return rows
