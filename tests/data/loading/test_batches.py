import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cctrain.data.loading.batches import Batch, deal, pack, packs
from cctrain.data.loading.contexts import Context
from cctrain.errors import UsageError


def a_context(sample: int, length: int, num_targets: int) -> Context:
    """Its arrays say whose they are: genes 100 · sample …, target counts 1000 + sample."""
    draws = np.random.default_rng(sample)
    targets = np.sort(draws.choice(length, num_targets, replace=False))
    counts = draws.integers(1, 9, length).astype(np.float32)
    counts[targets] = 0
    return Context(
        sample=sample,
        position=10 * sample,
        genes=100 * sample + np.arange(length),
        counts=counts,
        cells=np.zeros(length, dtype=np.int64),
        targets=targets,
        target_counts=np.full(num_targets, 1_000 + sample, dtype=np.float32),
        log_size_factors=np.array([0.5 * sample]),
        encodings=np.full((1, 2), sample, dtype=np.float32),
    )


def contexts_of(batch: Batch) -> list[Context]:
    """What was packed, contexts of one cell each, taken apart again."""
    taken = []
    for i, (start, stop) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        inside = (batch.targets >= start) & (batch.targets < stop)
        taken.append(
            Context(
                sample=int(batch.samples[i]),
                position=int(batch.positions[i]),
                genes=batch.genes[start:stop],
                counts=batch.counts[start:stop],
                targets=batch.targets[inside] - start,
                cells=batch.cells[start:stop] - i,
                target_counts=batch.target_counts[inside],
                log_size_factors=batch.log_size_factors[i : i + 1],
                encodings=batch.encodings[i : i + 1],
            )
        )
    return taken


def assert_same(ours: list[Context], theirs: list[Context]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name, value in vars(a).items():
            assert np.array_equal(value, getattr(b, name)), name


# Packing

SOME = [a_context(1, 4, 2), a_context(2, 7, 0), a_context(3, 1, 1), a_context(4, 5, 5)]


def test_a_pack_holds_its_contexts_end_to_end_without_padding():
    batch = pack(SOME)
    assert batch.offsets.tolist() == [0, 4, 11, 12, 17]
    assert len(batch.genes) == len(batch.counts) == len(batch.cells) == 17
    assert batch.cells.tolist() == [0] * 4 + [1] * 7 + [2] + [3] * 5
    assert len(batch.targets) == len(batch.target_counts) == 8
    assert_same(contexts_of(batch), SOME)


def test_the_arrays_of_a_pack_have_the_types_that_the_model_takes():
    batch = pack(SOME)
    for name in ("genes", "cells", "offsets", "targets", "samples", "positions"):
        assert getattr(batch, name).dtype == np.int64, name
    for name in ("counts", "target_counts", "log_size_factors"):
        assert getattr(batch, name).dtype == np.float32, name


def test_a_context_without_tokens_can_be_packed():
    empty = a_context(5, 0, 0)
    batch = pack([SOME[0], empty, SOME[1]])
    assert batch.offsets.tolist() == [0, 4, 4, 11]
    assert_same(contexts_of(batch), [SOME[0], empty, SOME[1]])


def test_an_empty_pack_has_a_token_to_run_and_nothing_to_learn_from():
    batch = pack([])
    assert batch.offsets.tolist() == [0, 1]
    assert len(batch.genes) == len(batch.counts) == len(batch.cells) == 1
    assert len(batch.log_size_factors) == 1
    assert len(batch.targets) == len(batch.target_counts) == len(batch.samples) == len(batch.positions) == 0
    for name, value in vars(pack(SOME)).items():
        assert getattr(batch, name).dtype == value.dtype, name


def test_consecutive_contexts_are_packed_up_to_the_limit():
    assert [len(batch.genes) for batch in packs(SOME, 11)] == [11, 6]
    assert [len(batch.genes) for batch in packs(SOME, 10)] == [4, 8, 5]
    assert_same([context for batch in packs(SOME, 10) for context in contexts_of(batch)], SOME)


def test_a_context_longer_than_the_limit_comes_alone():
    assert [len(batch.genes) for batch in packs(SOME, 2)] == [4, 7, 1, 5]
    assert list(packs([], 2)) == []


# Dealing

deals = st.tuples(
    st.lists(st.integers(0, 50), max_size=40),  # sizes
    st.integers(1, 9),  # ranks
    st.integers(0, 100),  # room for more than the longest
)


@settings(max_examples=200, deadline=None)
@given(deals)
def test_every_context_is_dealt_once_and_no_bin_exceeds_the_limit(drawn):
    sizes, num_ranks, room = np.array(drawn[0], dtype=np.int64), drawn[1], drawn[2]
    limit = int(sizes.max(initial=1)) + room
    ranks = deal(sizes, num_ranks, limit)
    assert len(ranks) == num_ranks
    assert len({len(bins) for bins in ranks}) == 1  # all ranks take as many steps
    bins = [members for rank in ranks for members in rank]
    assert all(members.dtype == np.int64 for members in bins)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(sizes)))
    assert max(sizes[members].sum() for members in bins) <= limit


@settings(max_examples=200, deadline=None)
@given(deals)
def test_bins_are_balanced_to_within_the_longest_context(drawn):
    sizes, num_ranks, room = np.array(drawn[0], dtype=np.int64), drawn[1], drawn[2]
    longest = int(sizes.max(initial=1))
    loads = [sizes[members].sum() for rank in deal(sizes, num_ranks, longest + room) for members in rank]
    assert max(loads) <= np.mean(loads) + longest
    assert max(loads) - min(loads) <= longest


def test_the_longest_contexts_are_dealt_first():
    """In the order given, the long one would come on top of half of the short ones."""
    (long,), (short,) = deal(np.array([1] * 8 + [8]), 2, 100)
    assert sorted([len(long), len(short)]) == [1, 8]


def test_dealing_is_a_pure_function_of_the_sizes():
    sizes = np.random.default_rng(0).integers(1, 100, 50)
    once, again = deal(sizes, 4, 300), deal(sizes.copy(), 4, 300)
    for ours, theirs in zip(once, again, strict=True):
        assert [members.tolist() for members in ours] == [members.tolist() for members in theirs]


def test_as_few_accumulation_steps_are_made_as_the_limit_allows():
    sizes = np.full(16, 10)
    for limit, steps in ((160, 1), (80, 1), (40, 2), (39, 3), (10, 8)):
        assert [len(bins) for bins in deal(sizes, 2, limit)] == [steps, steps]


def test_ranks_without_a_context_get_empty_bins():
    ranks = deal(np.array([5, 3]), 4, 10)
    assert sorted(len(members) for rank in ranks for members in rank) == [0, 0, 1, 1]
    assert [len(members) for rank in deal(np.zeros(0, dtype=np.int64), 3, 10) for members in rank] == [0, 0, 0]


def test_a_context_that_fits_no_micro_batch_is_an_error_that_names_the_keys():
    with pytest.raises(UsageError, match=r"1,001 tokens does not fit data\.micro_batch_tokens=1,000.*data\.max_tokens"):
        deal(np.array([5, 1_001]), 2, 1_000)
