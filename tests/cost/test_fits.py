"""Fits against data that were made by known laws, with and without noise."""

import numpy as np
import pytest

from cctrain.cost.fits import Crossover, crossover, power_law, sum_of_terms

N, M = (grid.ravel() for grid in np.meshgrid(2.0 ** np.arange(12, 17), [32.0, 64.0, 128.0, 256.0]))
SEEDS = 400


def noisy(times, seed: int, share: float = 0.05) -> np.ndarray:
    return times * np.exp(share * np.random.default_rng(seed).standard_normal(len(times)))


def terms(n=N, m=M) -> dict[str, np.ndarray]:
    return {"n·M": n * m, "n": n, "M": m, "1": np.ones_like(n)}


TRUE = {"n·M": 2e-8, "n": 4e-5, "M": 1e-4, "1": 5e-3}


def law(n=N, m=M) -> np.ndarray:
    return sum(TRUE[name] * term for name, term in terms(n, m).items())


def test_a_power_law_without_noise_is_found_exactly():
    found = power_law(N, 3e-7 * N**1.9)
    assert found.exponent == pytest.approx(1.9)
    assert found.scale == pytest.approx(3e-7)
    assert found.r_squared == pytest.approx(1)
    assert found.high - found.low == pytest.approx(0, abs=1e-6)


def test_the_interval_of_an_exponent_covers_the_truth_for_about_95_of_100_seeds():
    found = [power_law(N * M, noisy(1e-9 * N * M, seed)) for seed in range(SEEDS)]
    share = np.mean([law.low <= 1 <= law.high for law in found])
    assert 0.92 <= share <= 0.98


def test_the_interval_covers_as_often_where_each_group_has_a_factor_of_its_own():
    times = 1e-6 * N * M**1.3
    found = [power_law(N, noisy(times, seed), list(M)) for seed in range(SEEDS)]
    share = np.mean([law.low <= 1 <= law.high for law in found])
    assert 0.92 <= share <= 0.98
    assert found[0].scale is None


def test_groups_keep_what_another_quantity_does_out_of_the_exponent():
    short_many, long_few = np.array([1.0, 2, 4]), np.array([8.0, 16, 32])
    x, times = np.concatenate([short_many, long_few]), np.concatenate([100 * short_many, long_few])
    assert power_law(x, times, [0, 0, 0, 1, 1, 1]).exponent == pytest.approx(1)
    assert power_law(x, times).exponent < 0.5


def test_two_points_give_an_exponent_without_an_interval():
    found = power_law([1.0, 4.0], [1.0, 2.0])
    assert found.exponent == pytest.approx(0.5)
    assert found.low is None
    assert found.high is None


def test_a_quantity_that_does_not_vary_has_no_exponent():
    assert power_law([4.0, 4.0], [1.0, 2.0]) is None
    assert power_law([1.0, 4.0], [1.0, 2.0], [0, 1]) is None


def test_a_sum_of_terms_without_noise_is_found_exactly():
    found = sum_of_terms(terms(), law())
    assert {name: c.value for name, c in found.coefficients.items()} == pytest.approx(TRUE)
    assert found.r_squared == pytest.approx(1)
    assert found.largest_error == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(found.predict(terms()), law())


def test_the_interval_of_a_coefficient_covers_the_truth_for_about_95_of_100_seeds():
    found = [sum_of_terms(terms(), noisy(law(), seed, 0.02)).coefficients["n·M"] for seed in range(SEEDS)]
    share = np.mean([c.low <= TRUE["n·M"] <= c.high for c in found])
    assert 0.92 <= share <= 0.98


def test_short_contexts_count_as_much_as_long_ones():
    n = 2.0 ** np.arange(6, 17)
    found = sum_of_terms({"n": n, "1": np.ones_like(n)}, noisy(1e-5 * n + 0.1, 1))
    assert found.coefficients["1"].value == pytest.approx(0.1, rel=0.1)


def test_no_term_takes_negative_time_and_one_held_at_0_has_no_interval():
    n = 2.0 ** np.arange(10, 17)
    found = sum_of_terms({"n": n, "1": np.ones_like(n)}, 1e-5 * n - 1e-3)
    assert found.coefficients["1"].value == 0
    assert found.coefficients["1"].low is None
    assert found.coefficients["n"].low is not None


def test_fewer_points_than_terms_are_not_fitted():
    assert sum_of_terms(terms(N[:3], M[:3]), law()[:3]) is None


# ---- crossover: criss-cross takes 3·n, dense n²/1000, alike at n = 3,000

LINEAR, QUADRATIC = [3.0, 0.0], [1e-3, 0.0, 0.0]


def curves(*lengths: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = np.array(lengths)
    return n, np.polyval(LINEAR, n), np.polyval(QUADRATIC, n)


def test_a_crossover_between_measured_lengths_is_interpolated_on_logarithms():
    found = crossover(*curves(1000, 2000, 4000, 8000))
    assert found.verdict == "measured"
    assert found.tokens == pytest.approx(3000)  # power laws are straight lines there


def test_a_crossover_below_all_measured_lengths_is_extrapolated_by_the_laws_and_marked_so():
    found = crossover(*curves(4000, 8000), (LINEAR, QUADRATIC))
    assert found.verdict == "extrapolated"
    assert found.tokens == pytest.approx(3000)


def test_a_crossover_above_all_measured_lengths_is_extrapolated_too():
    found = crossover(*curves(500, 1000), (LINEAR, QUADRATIC))
    assert found.verdict == "extrapolated"
    assert found.tokens == pytest.approx(3000)


def test_laws_that_meet_between_measured_lengths_where_the_curves_do_not_cross_are_no_extrapolation():
    n, first, second = curves(2500, 8000)
    for found in (
        crossover(n, first, first * 1.1, (LINEAR, QUADRATIC)),
        crossover(n, second * 1.1, second, (LINEAR, QUADRATIC)),
    ):
        assert found.verdict == "fitted"
        assert found.tokens == pytest.approx(3000)


def test_curves_that_never_meet_have_no_crossover():
    n = np.array([1000.0, 2000.0])
    assert crossover(n, n, 2 * n) == Crossover(None, "always")
    assert crossover(n, n, 2 * n, ([1.0, 0.0], [2.0, 0.0])) == Crossover(None, "always", by_laws=True)
    assert crossover(n, 2 * n, n, ([2.0, 0.0], [1.0, 0.0])) == Crossover(None, "never", by_laws=True)


def test_laws_that_meet_where_they_contradict_what_was_measured_make_no_crossover():
    """The laws meet at 3,000: dense would be faster below, and slower above."""
    assert crossover([1000, 2000], [1, 1], [1.1, 1.1], (LINEAR, QUADRATIC)) == Crossover(None, "always")
    assert crossover([4000, 8000], [1.1, 1.1], [1, 1], (LINEAR, QUADRATIC)) == Crossover(None, "never")


def test_of_several_crossings_by_noise_the_last_one_counts():
    found = crossover([1000, 2000, 4000, 8000], [1, 1, 1, 1], [0.5, 1.1, 0.9, 1.6])
    assert 4000 < found.tokens < 8000
