from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cctrain.data.loading.slices import slice_size_bound, tokens_of_slice, touched_cells

contexts = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=12)  # expected, real sizes
ranks = st.integers(1, 9)


def slices_of(expected: np.ndarray, sizes: list[int], num_ranks: int) -> list[list[tuple[int, int]]]:
    """(cell, token) of every token of each rank, of the cells that it touches."""
    held = []
    for rank in range(num_ranks):
        tokens = []
        for cell in range(*touched_cells(expected, rank, num_ranks)):
            tokens += [
                (cell, i) for i in range(*tokens_of_slice(np.cumsum(expected), cell, sizes[cell], rank, num_ranks))
            ]
        held.append(tokens)
    return held


@settings(deadline=None)
@given(contexts, ranks)
def test_the_slices_of_all_ranks_are_the_tokens_in_their_order(cells, num_ranks):
    expected, sizes = np.array([cell[0] for cell in cells]), [cell[1] for cell in cells]
    held = slices_of(expected, sizes, num_ranks)
    everything = [(cell, i) for cell, size in enumerate(sizes) for i in range(size)]
    assert [token for tokens in held for token in tokens] == everything


@settings(deadline=None)
@given(contexts, ranks)
def test_a_slice_begins_at_its_share_of_the_expected_sizes_rounded_down_to_a_token(cells, num_ranks):
    expected, sizes = np.array([cell[0] for cell in cells]), [cell[1] for cell in cells]
    first_of = np.cumsum([0, *(len(tokens) for tokens in slices_of(expected, sizes, num_ranks))])
    for rank in range(1, num_ranks):
        cut, before, tokens = Fraction(rank * int(expected.sum()), num_ranks), 0, 0
        for size, num_tokens in zip(expected.tolist(), sizes, strict=True):
            if cut <= before + size:
                tokens += floor((cut - before) * num_tokens / size)
                break
            before, tokens = before + size, tokens + num_tokens
        assert first_of[rank] == tokens


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 7, 100])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("expected", [1, 3, 100])
def test_a_context_of_one_cell_is_cut_into_equal_parts_whatever_was_expected(num_tokens, num_ranks, expected):
    for rank in range(num_ranks):
        found = tokens_of_slice(np.array([expected]), 0, num_tokens, rank, num_ranks)
        assert found == (num_tokens * rank // num_ranks, num_tokens * (rank + 1) // num_ranks)


@settings(deadline=None)
@given(contexts, ranks)
def test_a_rank_touches_no_cell_outside_its_share(cells, num_ranks):
    expected = np.array([cell[0] for cell in cells])
    ends = np.cumsum(expected)
    for rank in range(num_ranks):
        first, last = touched_cells(expected, rank, num_ranks)
        low, high = (Fraction(int(ends[-1]) * (rank + offset), num_ranks) for offset in (0, 1))
        inside = [cell for cell in range(len(cells)) if ends[cell] > low and ends[cell] - expected[cell] < high]
        assert list(range(first, last)) == inside


@settings(deadline=None)
@given(contexts, st.lists(st.integers(0, 30), min_size=12, max_size=12), ranks)
def test_no_slice_exceeds_the_size_that_ranks_agree_by(cells, slack, num_ranks):
    expected, sizes = np.array([cell[0] for cell in cells]), [cell[1] for cell in cells]
    bounds = np.array(sizes) + slack[: len(sizes)]
    largest = max(len(tokens) for tokens in slices_of(expected, sizes, num_ranks))
    assert largest <= slice_size_bound(expected, bounds, num_ranks) <= bounds.sum()
