import math

import pytest

from cctrain.config import TrainingConfig
from cctrain.training.schedule import learning_rate


def rates(**training) -> list[float]:
    config = TrainingConfig(**training)
    return [learning_rate(step, config) for step in range(1, config.steps + 1)]


def test_warm_up_is_linear_from_the_first_step_and_ends_at_the_peak():
    assert rates(steps=100, warmup=4, learning_rate=0.8)[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_the_cosine_falls_from_the_peak_to_its_final_share():
    values = rates(steps=12, warmup=4, learning_rate=1.0, final_learning_rate=0.1)
    for step, progress in ((6, 0.25), (8, 0.5), (10, 0.75)):
        assert values[step - 1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
    assert values[7] == pytest.approx(0.55)
    assert values[3] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1)
    assert values[3:] == sorted(values[3:], reverse=True)


def test_wsd_stays_at_the_peak_and_falls_linearly_at_the_end():
    values = rates(steps=10, warmup=2, schedule="wsd", decay=0.4, learning_rate=2.0, final_learning_rate=0.1)
    assert values == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.55, 1.1, 0.65, 0.2])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_without_warm_up_the_first_step_is_already_on_the_curve(schedule):
    values = rates(steps=5, warmup=0, schedule=schedule, learning_rate=1.0)
    assert 0.9 <= values[0] <= 1.0
    assert values[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_shorter_than_its_warm_up_reaches_the_peak_at_its_last_step(schedule):
    values = rates(steps=4, warmup=100, schedule=schedule, learning_rate=1.0)
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("warmup", [0, 1, 3, 49, 50])
@pytest.mark.parametrize("decay", [0.01, 0.5, 1.0])
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak(schedule, steps, warmup, decay):
    values = rates(steps=steps, warmup=warmup, schedule=schedule, decay=decay, learning_rate=1.0)
    assert all(0 < value <= 1 for value in values)
    if steps > warmup:
        assert values[-1] == pytest.approx(0.05)
        falling = values[max(0, warmup - 1) :]
        assert falling == sorted(falling, reverse=True)


def test_a_final_share_of_zero_ends_at_zero():
    assert rates(steps=8, warmup=2, final_learning_rate=0.0)[-1] == pytest.approx(0, abs=1e-12)
