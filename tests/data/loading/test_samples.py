from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cctrain.data.loading.contexts import ContextRule
from cctrain.data.loading.samples import Samples, samples_of
from cctrain.data.store.store import Groups
from cctrain.errors import UsageError

SIZES = (7, 1, 16, 5, 9)
RULE = ContextRule(0, "training", np.zeros(1), np.ones(1), 100)


def grouped(window: int | None, sizes=SIZES, num_train: int = 2, seed: int = 0) -> Samples:
    starts = np.cumsum([0, *sizes])
    groups = Groups(np.array([f"g{i}" for i in range(len(sizes))]), starts, num_train)
    store = SimpleNamespace(groups=groups, num_cells=int(starts[-1]), num_train=int(starts[num_train]))
    return samples_of(store, replace(RULE, kind="group", window=window, seed=seed))


def test_in_contexts_of_cells_every_cell_is_a_sample():
    samples = samples_of(SimpleNamespace(num_cells=9, num_train=6), RULE)
    assert (samples.num_train, len(samples)) == (6, 9)
    assert [samples.cells(i, epoch).tolist() for i in range(9) for epoch in (0, 3)] == [
        [i] for i in range(9) for _ in "xx"
    ]


def test_without_a_window_a_sample_is_a_whole_group_in_every_epoch():
    samples = grouped(None)
    assert (samples.num_train, len(samples)) == (2, 5)
    for sample, (start, stop) in enumerate(pairwise(np.cumsum([0, *SIZES]).tolist())):
        for epoch in range(3):
            assert samples.cells(sample, epoch).tolist() == list(range(start, stop))


sizes_and_window = st.tuples(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.integers(1, 45))


@settings(deadline=None)
@given(sizes_and_window, st.integers(0, 5))
def test_every_cell_comes_once_an_epoch_in_a_sample_of_its_own_split(drawn, epoch):
    sizes, window = drawn
    samples = grouped(window, sizes, num_train=1)
    rows = [samples.cells(sample, epoch).tolist() for sample in range(len(samples))]
    training, held_out = rows[: samples.num_train], rows[samples.num_train :]
    assert sorted(row for cells in training for row in cells) == list(range(sizes[0]))
    assert sorted(row for cells in held_out for row in cells) == list(range(sizes[0], sum(sizes)))


@settings(deadline=None)
@given(sizes_and_window, st.integers(0, 5))
def test_windows_of_a_group_differ_by_a_cell_at_most_and_hold_consecutive_cells_of_one_group(drawn, epoch):
    sizes, window = drawn
    samples, starts = grouped(window, sizes), np.cumsum([0, *sizes])
    for group, (start, stop) in enumerate(pairwise(starts.tolist())):
        windows = [samples.cells(sample, epoch) for sample in range(len(samples)) if samples.starts[sample] == start]
        lengths = [len(cells) for cells in windows]
        assert max(lengths) <= window
        assert max(lengths) - min(lengths) <= 1
        assert len(windows) == -(-sizes[group] // window)
        for cells in windows:
            assert start <= cells[0]
            assert cells[-1] < stop
            gaps = np.flatnonzero(np.diff(cells) != 1)
            assert len(gaps) <= 1
            if len(gaps):  # around the end of the group
                assert (cells[0], cells[-1]) == (start, stop - 1)


def test_cells_meet_others_in_another_epoch():
    samples = grouped(4)
    of_epochs = {
        tuple(tuple(samples.cells(sample, epoch)) for sample in range(samples.num_train)) for epoch in range(12)
    }
    assert len(of_epochs) > 3
    assert grouped(4, seed=1).cells(3, 0).tolist() != grouped(4, seed=2).cells(3, 0).tolist()


def test_a_context_does_not_depend_on_where_in_an_epoch_it_comes():
    samples = grouped(4)
    assert [samples.epoch_of(position) for position in (0, samples.num_train - 1, samples.num_train)] == [0, 0, 1]


@settings(deadline=None)
@given(sizes_and_window, st.integers(0, 3))
def test_the_largest_sum_over_a_sample_bounds_every_epoch_and_is_reached(drawn, seed):
    sizes, window = drawn
    values = np.random.default_rng(seed).integers(0, 50, sum(sizes))
    samples = grouped(window, sizes)
    most = samples.most(values)
    sums = [values[samples.cells(sample, epoch)].sum() for sample in range(len(samples)) for epoch in range(8)]
    assert max(sums) <= most
    whole = grouped(None, sizes)
    assert whole.most(values) == max(values[start:stop].sum() for start, stop in pairwise(np.cumsum([0, *sizes])))


@settings(deadline=None)
@given(sizes_and_window, st.integers(0, 3))
def test_sums_are_of_consecutive_cells_if_windows_begin_where_groups_do(drawn, seed):
    sizes, window = drawn
    values = np.random.default_rng(seed).integers(0, 50, sum(sizes))
    samples, cells = grouped(window, sizes), iter(values.tolist())
    of_samples = [sum(next(cells) for _ in range(k)) for k in samples.num_cells(np.arange(len(samples))).tolist()]
    assert samples.sums(values).tolist() == of_samples


def test_the_number_of_cells_is_known_without_listing_them():
    samples = grouped(4)
    every = np.arange(len(samples))
    assert samples.num_cells(every).tolist() == [len(samples.cells(sample, 0)) for sample in every]


def test_a_store_without_groups_is_refused(tiny_store):
    with pytest.raises(UsageError, match="--group-by"):
        samples_of(tiny_store, replace(RULE, kind="group"))
