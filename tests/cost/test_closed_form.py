from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cctrain.config import MemoryConfig, ModelConfig
from cctrain.cost.closed_form import forward_flops, num_parameters, step_cost
from cctrain.model.transformer import Inputs, Transformer
from tests.model.conftest import randomize

NUM_GENES = 40
MODELS = {
    "criss_cross": ModelConfig(width=32, depth=2, heads=4, latents=8),
    "wide latents": ModelConfig(width=32, depth=3, heads=2, latents=6, latent_width=48),
    "narrow latents": ModelConfig(width=48, depth=1, heads=4, latents=16, latent_width=20),
    "dense": ModelConfig(attention="dense", width=32, depth=2, heads=4, latent_width=48),
}
# PyTorch counts the fused attention kernels of CPUs as nothing; the reference is made of products that it counts.
MODELS = {name: replace(config, backend="reference") for name, config in MODELS.items()}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


def built(config: ModelConfig, num_genes: int = NUM_GENES, checkpointing: bool = False) -> Transformer:
    model = Transformer(
        config, torch.full((num_genes,), 1 / num_genes), torch.ones(num_genes), MemoryConfig(checkpointing)
    )
    randomize(model)
    return model


def inputs_of(lengths: list[int], num_targets: int) -> Inputs:
    total = sum(lengths)
    return Inputs(
        genes=torch.arange(total) % NUM_GENES,
        counts=torch.ones(total),
        log_size_factors=torch.zeros(total),
        targets=torch.arange(num_targets),
        offsets=[0, *np.cumsum(lengths).tolist()],
    )


def counted(model: Transformer, inputs: Inputs, backward: bool = False) -> FlopCounterMode:
    with FlopCounterMode(display=False) as counter:
        log_mu, log_theta = model(inputs)
        if backward:
            (log_mu + log_theta).sum().backward()
    assert counter.get_total_flops() > 0
    return counter


@every_model
def test_parameters_are_counted_exactly(config):
    for num_genes in (NUM_GENES, 77):
        model = built(config, num_genes)
        assert num_parameters(config, num_genes) == sum(parameter.numel() for parameter in model.parameters())


@every_model
@pytest.mark.parametrize("lengths", [[60], [40, 7, 0, 25], [300]])
def test_forward_flops_are_those_that_pytorch_counts(config, lengths):
    num_targets = sum(lengths) // 10
    counter = counted(built(config), inputs_of(lengths, num_targets))
    law = forward_flops(config, lengths, num_targets)
    assert counter.get_total_flops() == pytest.approx(law.total, rel=0.01)


@every_model
def test_the_attention_term_alone_is_what_pytorch_counts_for_scores_and_values(config):
    lengths = [40, 7, 25]
    counter = counted(built(config), inputs_of(lengths, 5))
    batched_products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert batched_products == forward_flops(config, lengths, 5).attention


@every_model
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_costs_what_pytorch_counts_for_forward_backward_and_recomputation(config, checkpointing):
    lengths, num_targets = [90, 30], 12
    counter = counted(built(config, checkpointing=checkpointing), inputs_of(lengths, num_targets), backward=True)
    cost = step_cost(config, lengths, num_targets, checkpointing)
    # Backward needs no gradient of the count features, two numbers a token.
    assert counter.get_total_flops() == pytest.approx(cost["cost/total_flops"], rel=0.01)
    batched_products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert batched_products == cost["cost/attention_flops"]
    assert cost["cost/attention_share"] == pytest.approx(batched_products / counter.get_total_flops(), rel=0.01)


def test_criss_cross_attention_is_exactly_linear_in_tokens_and_in_latents():
    def attention(n: int, num_latents: int) -> float:
        return forward_flops(ModelConfig(latents=num_latents), [n], 0).attention

    assert attention(2_000, 64) == 2 * attention(1_000, 64)
    assert attention(1_000, 128) == 2 * attention(1_000, 64)
    assert attention(3_000, 64) - attention(2_000, 64) == attention(1_000, 64)
    config = ModelConfig()
    assert attention(1_000, 64) == 8 * 1_000 * 64 * config.width * config.depth


def test_dense_attention_is_exactly_quadratic_in_tokens():
    config = ModelConfig(attention="dense")
    assert forward_flops(config, [2_000], 0).attention == 4 * forward_flops(config, [1_000], 0).attention
    assert forward_flops(config, [1_000], 0).attention == 4 * 1_000**2 * config.width * config.depth
    assert forward_flops(config, [1_000, 500], 0).attention == sum(
        forward_flops(config, [n], 0).attention for n in (1_000, 500)
    )


def test_latents_cost_the_same_whatever_the_length_of_the_context():
    config = ModelConfig()
    assert forward_flops(config, [10], 0).latents == forward_flops(config, [10_000], 0).latents
    assert forward_flops(config, [10, 20, 30], 0).latents == 3 * forward_flops(config, [10], 0).latents
    assert forward_flops(ModelConfig(attention="dense"), [10], 0).latents == 0


def test_the_values_of_a_step_name_tokens_and_latents():
    cost = step_cost(ModelConfig(latents=32), [100, 300], 40, checkpointing=False)
    assert cost["cost/n"] == 200
    assert cost["cost/M"] == 32
    assert cost["cost/n_times_M"] == 200 * 32
    dense = step_cost(ModelConfig(attention="dense"), [100, 300], 40, checkpointing=False)
    assert not {"cost/M", "cost/n_times_M"} & dense.keys()
