import numpy as np
import pytest

from cctrain.data.hashing import bound_of, hash64, hash_after, is_below, key_of_hash, uniform


def test_the_same_keys_give_the_same_numbers_in_every_version():
    """Otherwise a run that is resumed with a newer cctrain would see other targets."""
    assert hash64(0) == 0x0397AB29740681D9
    assert hash64(1) == 0xDDC1ED05282D1D64
    assert hash64(-1) == 0x42D30092DCD06D20
    assert hash64("order of samples") == 0xFE20E6147BD35A08
    assert hash64(0, "targets", 12345, 7) == 0x6DFBDBDEE89B8AE7
    assert hash64(2**63 + 5, "x") == 0xD51EA529741CC00F
    genes = hash64(42, "truncation", np.array([0, 1, 2**40]))
    assert genes.tolist() == [0xE1C10214E75471A0, 0x294B33FC03BB13B4, 0xC55C5B21BFF15CC4]
    assert uniform(3, "p", np.arange(3)).tolist() == [0.6500380804607326, 0.7394381848887535, 0.6517804618681604]


def test_the_order_of_the_keys_and_every_one_of_them_matters():
    hashes = [hash64(*keys) for keys in ((1, 2), (2, 1), (1,), (2,), (1, 2, 0), (0, 1, 2), ("1", 2), ("a", "b"))]
    hashes.append(hash64("ab"))
    assert len({int(value) for value in hashes}) == len(hashes)


def test_arrays_of_keys_are_broadcast_against_each_other():
    rows, columns = np.arange(4)[:, None], np.arange(100, 103)
    table = hash64(7, rows, "purpose", columns)
    assert table.shape == (4, 3)
    assert table.dtype == np.uint64
    for i in range(4):
        for j in range(3):
            assert table[i, j] == hash64(7, i, "purpose", 100 + j)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.uint64])
def test_a_number_hashes_alike_in_every_integer_type(dtype):
    numbers = np.array([0, 1, 500], dtype=dtype)
    assert hash64("p", numbers).tolist() == [int(hash64("p", int(number))) for number in numbers]


def test_numbers_are_uniform_over_every_kind_of_key():
    num = 200_000
    counter = np.arange(num)
    for draws in (uniform(0, counter), uniform(counter), uniform(counter, "p", 3), uniform(0, "p", counter << 32)):
        assert draws.min() >= 0
        assert draws.max() < 1
        assert abs(draws.mean() - 0.5) < 5 * np.sqrt(1 / 12 / num)
        observed = np.bincount((draws * 100).astype(int), minlength=100)
        chi2 = ((observed - num / 100) ** 2 / (num / 100)).sum()
        assert abs(chi2 - 99) < 5 * np.sqrt(2 * 99)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_neighbouring_keys_give_independent_numbers(place):
    num = 100_000
    keys, neighbours = [[11, 22, 33] for _ in range(2)]
    keys[place], neighbours[place] = np.arange(num), np.arange(1, num + 1)
    correlation = np.corrcoef(uniform(*keys), uniform(*neighbours))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(num)


def test_one_bit_of_a_key_changes_half_of_the_bits_of_the_hash():
    keys = np.arange(2_000)
    for bit in (0, 1, 17, 40):
        changed = np.bitwise_count(hash64("p", keys) ^ hash64("p", keys ^ (1 << bit)))
        assert abs(changed.mean() - 32) < 5 * 4 / np.sqrt(len(keys))


def test_a_hash_that_goes_on_from_another_is_that_of_all_keys():
    genes = np.arange(-3, 1000)
    assert np.array_equal(hash_after(hash64(5, "targets", 7), key_of_hash(genes)), hash64(5, "targets", 7, genes))


def test_a_hash_is_below_a_bound_just_where_its_number_is_below_the_probability():
    keys = np.arange(20_000)
    numbers = uniform(1, keys)
    for probability in (numbers, np.nextafter(numbers, 0), np.nextafter(numbers, 1), 0.0, 0.3, 1.0):
        assert np.array_equal(is_below(hash64(1, keys), bound_of(probability)), numbers < probability)
