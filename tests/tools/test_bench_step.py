import math

import pytest

from cctrain.config import ModelConfig
from cctrain.cost.parameters import num_parameters
from tools.bench_step import DENSE, depth_of_as_many_parameters, exponents, speed_ups


def a_row(name: str, tokens: int, seconds: float | None) -> dict:
    row = {
        "name": name,
        "tokens": tokens,
        "latents": 64,
        "attention": "dense" if name in DENSE.values() else "criss_cross",
    }
    return row if seconds is None else row | {"step_seconds": seconds}


@pytest.mark.parametrize("depth", [1, 2, 6])
def test_no_other_depth_of_the_dense_model_comes_nearer_to_as_many_parameters(depth):
    model, genes = ModelConfig(width=64, depth=depth), 500
    wanted = num_parameters(model, genes)

    def difference(layers: int) -> int:
        return abs(num_parameters(ModelConfig(attention="dense", width=64, depth=layers), genes) - wanted)

    found = depth_of_as_many_parameters(model, genes)
    assert difference(found) <= min(difference(found - 1) if found > 1 else math.inf, difference(found + 1))
    assert found > depth


def test_a_speed_up_is_dense_time_over_criss_cross_time_where_both_were_measured():
    rows = [
        a_row("criss-cross, M = 64", 1024, 2.0),
        a_row(DENSE["same_depth"], 1024, 3.0),
        a_row(DENSE["same_parameters"], 1024, None),
        a_row("criss-cross, M = 64", 4096, 5.0),
    ]
    assert speed_ups(rows) == [{"tokens": 1024, "latents": 64, "same_depth": 1.5, "same_parameters": None}]


def test_the_exponent_is_the_slope_over_long_contexts_alone():
    rows = [a_row("model", tokens, 1e-9 * tokens**2) for tokens in (8192, 16_384, 65_536)]
    rows += [a_row("model", 1024, 7.0), a_row("other", 16_384, 1.0)]
    found = exponents(rows)
    assert found.keys() == {"model"}
    assert found["model"]["exponent"] == pytest.approx(2)
    assert found["model"]["points"] == 3
