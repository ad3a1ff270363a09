import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cctrain.data.loading.order import Order

sizes = st.tuples(
    st.integers(1, 90),  # samples
    st.integers(1, 120),  # block
    st.integers(1, 40),  # mixed blocks
    st.integers(1, 110),  # global batch
)


def order_of(num_samples: int, block: int, mixed_blocks: int, seed: int = 3, digest: str = "digest") -> Order:
    return Order(num_samples, digest, seed, block, mixed_blocks)


def epochs(order: Order, num: int) -> np.ndarray:
    """Whole epochs, (num, samples)."""
    return np.stack([order.batch(epoch * order.num_samples, order.num_samples) for epoch in range(num)])


@settings(max_examples=150, deadline=None)
@given(sizes)
def test_every_sample_comes_once_an_epoch_and_no_batch_crosses_its_end(size):
    num_samples, block, mixed_blocks, global_batch = size
    order = order_of(num_samples, block, mixed_blocks)
    position = 0
    for _ in range(2):
        seen = []
        while len(seen) < num_samples:
            batch = order.batch(position, global_batch)
            assert len(batch) == min(global_batch, num_samples - len(seen))
            seen += batch.tolist()
            position += len(batch)
        assert sorted(seen) == list(range(num_samples))


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(0, 300), st.integers(1, 110))
def test_what_follows_a_position_depends_on_nothing_before_it(size, position, other_batch):
    num_samples, block, mixed_blocks, global_batch = size
    whole = epochs(order_of(num_samples, block, mixed_blocks), position // num_samples + 1)
    batch = order_of(num_samples, block, mixed_blocks).batch(position, global_batch)
    epoch, start = divmod(position, num_samples)
    assert batch.tolist() == whole[epoch, start : start + global_batch].tolist()
    longer = order_of(num_samples, block, mixed_blocks).batch(position, other_batch)
    common = min(len(batch), len(longer))
    assert batch[:common].tolist() == longer[:common].tolist()


def test_the_order_is_the_same_in_every_version():
    order = Order(10, "digest", 7, block=3, mixed_blocks=2)
    assert epochs(order, 2).tolist() == [[5, 2, 4, 0, 1, 3, 9, 8, 7, 6], [4, 8, 7, 5, 3, 6, 9, 0, 2, 1]]


def test_epochs_seeds_stores_and_kinds_of_context_have_orders_of_their_own():
    base = order_of(64, 4, 4)
    others = [
        base,
        order_of(64, 4, 4, seed=4),
        order_of(64, 4, 4, digest="another"),
        Order(64, "digest", 3, 4, 4, kind="group"),
        order_of(64, 8, 4),
        order_of(64, 4, 8),
    ]
    orders = [tuple(row) for order in others for row in epochs(order, 3).tolist()]
    assert len(set(orders)) == len(orders)


def test_samples_are_mixed_within_a_window_of_blocks_and_blocks_over_the_whole_store():
    block, mixed_blocks, num_windows = 10, 5, 20
    order = order_of(block * mixed_blocks * num_windows, block, mixed_blocks)
    ids = epochs(order, 1)[0].reshape(num_windows, block * mixed_blocks)
    blocks = ids // block
    for row in blocks:
        # Whole blocks, so that a reader touches few places of the store at a time ...
        assert np.bincount(row)[np.unique(row)].tolist() == [block] * mixed_blocks
        # ... but dealt sample by sample: runs from one block are short.
        assert np.mean(row[1:] == row[:-1]) < 0.5
    # The blocks of a window come from anywhere.
    assert np.mean([np.ptp(row) for row in blocks]) > num_windows * mixed_blocks / 3


def test_every_place_of_an_epoch_is_as_likely_for_every_sample():
    places = np.argsort(epochs(order_of(12, 2, 3), 3_000), axis=1)
    deviation = 5 * np.sqrt((12**2 - 1) / 12 / len(places))
    assert np.all(np.abs(places.mean(axis=0) - 5.5) < deviation)


@pytest.mark.parametrize(("block", "mixed_blocks"), [(1, 1), (1_000, 1), (1, 1_000), (1_000, 1_000), (7, 3)])
def test_blocks_and_windows_need_not_fit_the_store(block, mixed_blocks):
    ids = epochs(order_of(50, block, mixed_blocks), 2)
    assert np.sort(ids, axis=1).tolist() == [list(range(50))] * 2
    assert ids[0].tolist() != ids[1].tolist()


WEIGHTS = np.array([0.0, 1.0, 3.0, 0.0, 6.0, 0.0])


def weighted(seed: int = 3, **fields) -> Order:
    return Order(len(WEIGHTS), "digest", seed, 2, 2, weights=WEIGHTS, **fields)


def test_weighted_samples_come_as_often_as_their_weights_say():
    draws = epochs(weighted(), 10_000).ravel()
    share = np.bincount(draws, minlength=len(WEIGHTS)) / len(draws)
    expected = WEIGHTS / WEIGHTS.sum()
    assert np.all(np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(draws)))


def test_weighted_draws_are_independent_of_each_other():
    draws = epochs(weighted(), 10_000).ravel()
    pairs = np.histogram2d(draws[:-1], draws[1:], bins=np.arange(len(WEIGHTS) + 1))[0] / (len(draws) - 1)
    expected = np.outer(WEIGHTS, WEIGHTS) / WEIGHTS.sum() ** 2
    assert np.all(np.abs(pairs - expected) <= 6 * np.sqrt(expected * (1 - expected) / len(draws)))


def test_a_weighted_draw_depends_on_its_position_alone_and_no_batch_crosses_an_epoch():
    whole = epochs(weighted(), 4).ravel()
    for position in range(18):
        batch = weighted().batch(position, 4)
        assert batch.tolist() == whole[position : min(position + 4, 6 * (position // 6 + 1))].tolist()
    assert epochs(weighted(), 2)[0].tolist() != epochs(weighted(), 2)[1].tolist()
    assert epochs(weighted(seed=4), 4).ravel().tolist() != whole.tolist()
