"""Which cells are held out, and the order of all: pure functions of (seed, content of the cells).

A cell is held out when uniform(seed, "split", content) < held_out. So cells of identical content lie on one
side, wherever they come from, and adding cells to a data set moves no other cell across. The share of held-
out cells is `held_out` on average, not exactly.
"""

import numpy as np

from cctrain.data.hashing import hash64, uniform
from cctrain.data.quality import CellProfiles


def hold_out(content: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, str | None]:
    """Mask of the held-out cells from their content hashes, and a note if a side would have been empty.

    With two distinct cells or more no side is empty: the cell with the smallest hash is held out, or the one
    with the largest is trained on. A single distinct cell is trained on.
    """
    draws = uniform(seed, "split", content)
    mask = draws < held_out
    distinct = len(np.unique(content))
    if distinct < 2:
        return np.zeros_like(mask), "there is one distinct cell: it is trained on, none is held out"
    if not mask.any():
        return (
            draws == draws.min(),
            f"none of {distinct} distinct cells fell under held_out: one was held out",
        )
    if mask.all():
        return (
            draws != draws.max(),
            f"all of {distinct} distinct cells fell under held_out: one is trained on",
        )
    return mask, None


def destination_rows(cells: CellProfiles, held_out: np.ndarray, seed: int) -> np.ndarray:
    """int64 row of every cell in the store: training cells first, each side in the order of hash(seed,
    content).

    Identical cells follow each other by source and row.
    """
    order = np.lexsort((cells.row, cells.source, hash64(seed, "order", cells.content), held_out))
    rows = np.empty(len(order), dtype=np.int64)
    rows[order] = np.arange(len(order))
    return rows
