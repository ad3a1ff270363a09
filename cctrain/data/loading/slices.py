"""Which tokens of a context each context rank holds, known before any cell is read.

A context of n tokens in the canonical order is cut at the tokens ⌊c·n/C⌋. For a context of many cells n is known only
when all of them are read, which no rank should do. So the cuts are made by the sizes m_i that the cells are expected
to have: with N = Σ m_i and b_i the sum of those before cell i, rank c begins at

    (c·N − C·b_i) / (C·m_i)    of the cell i for which that lies between 0 and 1,

rounded down to a token. For a context of one cell that is ⌊c·n/C⌋; for many the slices are as equal as the sizes are
well guessed. Whatever the cuts, the result of attention over all slices is the same.
"""

from itertools import pairwise

import numpy as np


def touched_cells(expected: np.ndarray, context_rank: int, num_context_ranks: int) -> tuple[int, int]:
    """The cells first .. last − 1 that the rank's slice touches; expected int64 (cells,), 1 or more each."""
    ends = np.cumsum(expected)
    low, high = (int(ends[-1]) * (context_rank + offset) for offset in (0, 1))
    first = np.searchsorted(ends * num_context_ranks, low, side="right")
    last = np.searchsorted(ends * num_context_ranks, high, side="left")
    return int(first), int(last) + 1


def tokens_of_slice(
    ends: np.ndarray, cell: int, num_tokens: int, context_rank: int, num_context_ranks: int
) -> tuple[int, int]:
    """The tokens first .. last − 1, of the `num_tokens` that the cell turned out to have, that are in the slice.

    `ends` is the cumulative sum of the expected sizes.
    """
    total, before = int(ends[-1]), int(ends[cell - 1]) if cell else 0
    size = int(ends[cell]) - before
    first, last = (
        (rank * total - num_context_ranks * before) * num_tokens // (num_context_ranks * size)
        for rank in (context_rank, context_rank + 1)
    )
    return min(max(first, 0), num_tokens), min(max(last, 0), num_tokens)


def slice_size_bound(expected: np.ndarray, bounds: np.ndarray, num_context_ranks: int) -> int:
    """Tokens that no rank's slice exceeds, where `bounds` are those that no cell exceeds; int64 (cells,) both."""
    total = int(bounds.sum())
    if num_context_ranks == 1:
        return total
    if len(expected) == 1:
        return -(-total // num_context_ranks)
    cuts = np.linspace(0, expected.sum(), num_context_ranks + 1)
    at_cuts = np.interp(cuts, np.cumsum([0, *expected]), np.cumsum([0, *bounds]))
    # A cell that is cut gives each side its share, and up to a token by rounding.
    return min(total, max(int(after - before) + 3 for before, after in pairwise(at_cuts)))
