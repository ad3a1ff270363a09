import math

import pytest

from cctrain.apply.scaling.measure import depth_of_as_many_parameters, joined, medians, rates, times_of_repeats
from cctrain.config import ModelConfig
from cctrain.cost.parameters import num_parameters


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_no_other_depth_of_the_dense_model_comes_nearer_to_as_many_parameters(depth):
    model, genes = ModelConfig(width=64, depth=depth), 500
    wanted = num_parameters(model, genes)

    def difference(layers: int) -> int:
        return abs(num_parameters(ModelConfig(attention="dense", width=64, depth=layers), genes) - wanted)

    found = depth_of_as_many_parameters(model, genes)
    assert difference(found) <= min(difference(found - 1) if found > 1 else math.inf, difference(found + 1))
    assert found > depth


def test_a_step_is_repeated_9_times_or_as_often_as_20_seconds_hold():
    assert times_of_repeats(0.01) == 9
    assert times_of_repeats(6.0) == 3
    assert times_of_repeats(0.01, most=4) == 4
    assert times_of_repeats(2.0, seconds=7.0) == 3


def test_a_step_of_up_to_20_seconds_is_repeated_once_at_least_and_a_longer_one_is_not():
    assert times_of_repeats(19.0, seconds=7.0) == 1
    assert times_of_repeats(21.0) == 0


def test_measurements_of_a_point_are_joined():
    first = {"warm_up": 5.0, "steps": [1.0, 2.0], "attention_of_a_layer": [0.1], "memory_bytes": 7, "flops": 3.0}
    second = {"warm_up": 4.0, "steps": [9.0], "attention_of_a_layer": [0.3], "memory_bytes": 8, "flops": 3.0}
    assert joined(first, second) == {
        "warm_up": 5.0,
        "steps": [1.0, 2.0, 9.0],
        "attention_of_a_layer": [0.1, 0.3],
        "memory_bytes": 8,
        "flops": 3.0,
    }


def test_medians_are_of_the_turns_and_attention_is_of_all_layers():
    timings = {
        "warm_up": 100.0,
        "steps": [1.0, 9.0, 2.0],
        "attention_of_a_layer": [0.1, 0.3, 0.2],
        "matrix_products": [0.5, 0.25, 0.1],
        "flops_of_matrix_products": 50.0,
        "memory_bytes": 7,
    }
    row = medians(timings, depth=4) | {"tokens": 30, "flops": 80.0}
    assert row["step_seconds"] == 2.0
    assert row["attention_seconds"] == pytest.approx(0.8)
    assert row["matrix_product_flops_per_second"] == pytest.approx(200)
    assert rates(row) == pytest.approx({"tokens_per_second": 15, "utilisation": 0.2, "attention_share_of_time": 0.4})
