import pytest

from cctrain.apply.scaling.points import DENSE
from tools.bench_step import exponents, speed_ups


def a_row(name: str, tokens: int, seconds: float | None) -> dict:
    row = {
        "name": name,
        "tokens": tokens,
        "latents": 64,
        "attention": "dense" if name in DENSE.values() else "criss_cross",
    }
    return row if seconds is None else row | {"step_seconds": seconds}


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
