"""What all readers of cells share: blocks of raw values, how large they may be, and what can be a count.

A reader returns values as they are stored; `sources` checks them and matches genes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp

RawBlock = tuple[int, sp.csr_matrix]  # first cell; (cells, columns of the file) values as stored

COUNTS_PER_BLOCK = 2_000_000
CELLS_PER_BLOCK = 2_048
LARGEST_COUNT = 2**32 - 1


class RawMatrix(Protocol):
    """A matrix of cells x columns, in whatever file it lies."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def arrange(self) -> None:
        """Re-order a matrix that is stored by column, if that was not done yet; else nothing."""

    def blocks(self, start: int, stop: int) -> Iterator[RawBlock]:
        """The cells start .. stop - 1 in order, within the bounds of `block_edges`; indices are valid, int32."""

    def piece_edges(self, counts_per_piece: int) -> np.ndarray:
        """int64, ascending, 0 .. number of cells: pieces of about so many stored values."""


@dataclass
class Content:
    """What a file or folder of cells holds, before genes are matched."""

    kind: str  # ".h5ad", "AnnData Zarr", "10x .h5" or "10x folder"
    var: pd.DataFrame  # one row a column of the matrix
    read_obs: Callable[[], pd.DataFrame]  # one row a cell
    counts_from: str
    matrix: RawMatrix
    inputs: list[Path]  # files, or a directory all of whose files belong to it
    others: Callable[[], list[str]]  # names of the file's other matrices that look like counts
    notes: list[str]


def first_not_a_count(values: np.ndarray) -> int | None:
    """Position of the first value that is negative, fractional, not finite or too large, or None."""
    if values.dtype.kind in "bu":
        good = values <= LARGEST_COUNT
    else:
        good = (values >= 0) & (values <= LARGEST_COUNT)
        if values.dtype.kind == "f":
            good &= values == np.floor(values)
    return None if good.all() else int(np.argmin(good))


def block_edges(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of cells of at most COUNTS_PER_BLOCK entries (or one cell) and CELLS_PER_BLOCK cells."""
    start, num_cells = 0, len(indptr) - 1
    while start < num_cells:
        fits = int(np.searchsorted(indptr, indptr[start] + COUNTS_PER_BLOCK, side="right")) - 1
        stop = min(max(fits, start + 1), start + CELLS_PER_BLOCK, num_cells)
        yield start, stop
        start = stop


def even_pieces(indptr: np.ndarray, counts_per_piece: int) -> np.ndarray:
    """Edges of pieces of consecutive cells with about `counts_per_piece` entries each. int64, from 0 on."""
    num_cells, total = len(indptr) - 1, int(indptr[-1]) - int(indptr[0])
    num_pieces = max(1, -(-total // counts_per_piece))
    inner = np.searchsorted(indptr, int(indptr[0]) + total * np.arange(1, num_pieces) // num_pieces)
    return np.unique(np.concatenate([[0], inner, [num_cells]]).astype(np.int64))
