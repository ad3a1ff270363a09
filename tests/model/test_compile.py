"""torch.compile of what follows attention: the same numbers, and no compilation for each layer or tile."""

import os
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from cctrain.config import MemoryConfig
from tests.model.conftest import ATTENTIONS, in_fp32, random_inputs, random_model, relative_error, small_config


@pytest.fixture(autouse=True)
def whichever_distutils_is_there(monkeypatch):
    """setuptools, which the compiler imports, refuses a process in which something has imported Python's own."""
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None and "CI" not in os.environ, reason="on CPUs torch.compile needs a C++ compiler"
)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_compiled_model_computes_what_it_computed_before_and_not_once_a_layer(attention):
    memory = MemoryConfig(checkpointing=True, tile_tokens=16)
    models = [random_model(small_config(attention), memory=memory).float() for _ in range(2)]
    torch._dynamo.reset()
    counters.clear()
    models[1].compile_token_local()
    for lengths in ([30, 7], [25, 30, 20]):
        inputs = in_fp32(random_inputs(lengths))
        plain, compiled = (torch.cat(model(inputs)) for model in models)
        assert relative_error(compiled.detach(), plain.detach()) < 1e-5
        for outcome in (plain, compiled):
            outcome.sum().backward()
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-4, name
    assert counters["stats"]["unique_graphs"] <= 2, "for three layers, and tiles of three lengths"
