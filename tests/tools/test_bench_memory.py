"""Peak memory of activations: flat against depth with checkpoints on the host, and else as the formula says."""

from typing import Any

import pytest

from tools.bench_memory import growth_against_formula, in_a_process

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def row(tokens: int, depth: int, offload: str) -> dict[str, Any]:
    measured = in_a_process(tokens=tokens, depth=depth, offload=offload, width=128, latents=16, device="cpu")
    assert measured["peak"] > measured["formula"] / 2  # and is no figure of the process that started this one
    return measured


def test_with_checkpoints_on_the_host_the_peak_does_not_grow_with_depth():
    shallow, deep = row(65_536, 3, "host"), row(65_536, 9, "host")
    assert deep["on_host"] == 3 * shallow["on_host"]
    assert deep["peak"] / shallow["peak"] == pytest.approx(1, abs=0.1)


def test_with_checkpoints_on_the_device_each_layer_adds_its_tokens():
    assert growth_against_formula(row(65_536, 3, "device"), row(65_536, 9, "device")) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("offload", ["host", "device"])
def test_with_tiles_a_longer_context_adds_its_tokens_and_nothing_else(offload):
    assert growth_against_formula(row(65_536, 3, offload), row(262_144, 3, offload)) == pytest.approx(1, abs=0.1)
