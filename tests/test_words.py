"""Durations in the unit in which a person would tell them."""

import pytest

from cctrain.words import duration


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0 s"),
        (0.463, "0.46 s"),
        (4.0, "4 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (7199, "120 min"),
        (7500, "2.1 h"),
        (1_000_000, "12 days"),
    ],
)
def test_a_duration_has_two_digits_or_whole_units(seconds: float, told: str) -> None:
    assert duration(seconds) == told
