from types import SimpleNamespace

import pytest
import torch

from cctrain.config import Config, ModelConfig
from cctrain.errors import UsageError
from cctrain.model.transformer import Transformer
from cctrain.parallel.mesh import Mesh, join_mesh
from cctrain.training.engine import (
    _optimizer,
    build_engine,
    deepspeed_config,
    set_learning_rate,
    sharded_if_wanted,
)

CPU = Mesh(rank=0, num_ranks=1, device=torch.device("cpu"))


SHAPE = ModelConfig(width=8, depth=1, heads=2, latents=2)


def tiny_model() -> Transformer:
    return Transformer(SHAPE, torch.full((5,), 0.2), torch.ones(5))


def test_clipping_is_always_told_because_deepspeed_has_a_default_of_its_own():
    config = Config()
    for clip in (0.0, 0.3):
        config.training.clip = clip
        assert deepspeed_config(config)["gradient_clipping"] == clip


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_stage_and_the_precision_reach_deepspeed(stage, precision):
    config = Config()
    config.parallel.zero_stage, config.training.precision = stage, precision
    derived = deepspeed_config(config)
    assert derived["zero_optimization"]["stage"] == stage
    enabled = {key for key in ("bf16", "fp16") if derived.get(key, {}).get("enabled")}
    assert enabled == {precision} - {"fp32"}


def test_building_a_sharded_model_compiles_no_shared_memory_operation(monkeypatch):
    import deepspeed

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    config = Config()
    config.parallel.zero_stage = 3
    with join_mesh(), sharded_if_wanted(config):
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_a_backend_that_cannot_run_here_is_refused_before_anything_is_written():
    config = Config()
    config.model = ModelConfig(width=8, depth=1, heads=2, latents=2, backend="flash_cuda")
    with pytest.raises(UsageError, match=r"'flash_cuda' cannot run on torch\.float32 on cpu"):
        build_engine(tiny_model(), config, CPU)


def test_keys_of_the_deepspeed_section_win_and_the_others_stay():
    config = Config()
    ours = deepspeed_config(config)["zero_optimization"]
    config.deepspeed = {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}
    derived = deepspeed_config(config)
    assert derived["zero_optimization"] == {**ours, "overlap_comm": True}
    assert derived["wall_clock_breakdown"] is True
    assert ours["stage"] == 1
    assert ours["overlap_comm"] is False


def test_zero_3_keeps_weights_for_the_length_of_a_layer():
    model = tiny_model()
    [numbers] = {sum(parameter.numel() for parameter in layer.parameters()) for layer in model.layers}
    config = Config(model=SHAPE)
    assert deepspeed_config(config)["zero_optimization"]["stage3_max_reuse_distance"] == numbers


def test_matrices_decay_and_vectors_and_tables_do_not():
    model = tiny_model()
    decays = {
        id(p): group["weight_decay"] > 0 for group in _optimizer(model, Config()).param_groups for p in group["params"]
    }
    names = {name: decays.pop(id(parameter)) for name, parameter in model.named_parameters()}
    assert not decays, "the optimizer has parameters that the model has not"
    assert names["layers.0.read.key.weight"]
    assert names["layers.0.token_mlp.up.weight"]
    assert names["latents"]
    assert not names["layers.0.token_mlp.up.bias"]
    assert not names["layers.0.read.norm_tokens.weight"]
    assert not names["embedding.gene.weight"]
    assert not names["embedding.mask"]


def test_a_learning_rate_reaches_every_group():
    optimizer = _optimizer(tiny_model(), Config())
    set_learning_rate(SimpleNamespace(optimizer=optimizer), 0.25)
    assert min(group["lr"] for group in optimizer.param_groups) == 0.25
    set_learning_rate(SimpleNamespace(optimizer=optimizer), 0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}


def test_fp16_is_refused_where_there_is_no_gpu():
    config = Config()
    config.training.precision = "fp16"
    with pytest.raises(UsageError, match="bf16 or fp32"):
        build_engine(tiny_model(), config, CPU)
