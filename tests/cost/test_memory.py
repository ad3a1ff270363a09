"""The formulas of memory beside what PyTorch's allocator gave out."""

import math
from dataclasses import replace

import pytest
import torch

from cctrain.config import MemoryConfig, ModelConfig
from cctrain.cost.memory import LARGEST_BUCKET, activations, peak, reduce_bucket, state
from cctrain.cost.parameters import num_parameters
from cctrain.cost.work import Load
from cctrain.training.objective import negative_log_likelihood
from tests.cost.conftest import ZERO_KINDS, ZERO_MODEL, ZERO_RANKS, zero_steps
from tests.cost.counting import NUM_GENES, allocated, built, inputs_of

TOLERANCE = 0.15
TILE = 512
SHAPES = {
    "criss_cross": ModelConfig(width=48, depth=2, heads=2, latents=16),
    "deep": ModelConfig(width=32, depth=5, heads=4, latents=8),
    "wide latents": ModelConfig(width=32, depth=3, heads=2, latents=64, latent_width=96),
    "dense": ModelConfig(attention="dense", width=48, depth=2, heads=2),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("lengths", [[3000], [150] * 16, [700, 2300]])
def test_a_forward_and_backward_need_what_the_formula_says(config, checkpointing, element_bytes, lengths):
    num_targets = sum(lengths) // 20
    model = built(config, checkpointing=checkpointing, backend="auto", tile_tokens=TILE)
    model.to(torch.float32 if element_bytes == 4 else torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        log_mu, log_theta = model(inputs_of(lengths, num_targets))
        negative_log_likelihood(torch.ones(num_targets), log_mu, log_theta).sum().backward()

    step()
    law = activations(
        config,
        NUM_GENES,
        Load(sum(lengths), len(lengths), num_targets),
        MemoryConfig(checkpointing),
        TILE,
        element_bytes,
    )
    assert law.total == pytest.approx(allocated(step)[1], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("stage", "precision"), [kind for kind in ZERO_KINDS if kind[0] < 2])
def test_zero_keeps_from_step_to_step_what_the_formula_says(even_store, stage, precision):
    num_genes, element_bytes = len(even_store.genes.ids), 4 if precision == "fp32" else 2
    [step] = zero_steps(even_store, [(stage, precision)])
    bucket = num_parameters(ZERO_MODEL, num_genes)
    law = state(ZERO_MODEL, num_genes, stage, element_bytes, ZERO_RANKS, bucket)
    # After some steps a bucket of the last one has not been collected yet.
    assert min(step["kept"]) == pytest.approx(law.kept, rel=TOLERANCE)


@pytest.mark.processes
def test_deepspeed_allocates_no_more_for_reducing_gradients_than_there_are(even_store, zero_trainings):
    total = num_parameters(ZERO_MODEL, len(even_store.genes.ids))
    buckets = {(step["stage"], step["precision"]): step["reduce_bucket"] for step in zero_trainings}
    without = {(0, "fp32"), (0, "bf16"), (1, "bf16")}  # these have none
    assert buckets == {kind: None if kind in without else total for kind in buckets}
    assert reduce_bucket(total) == total
    assert reduce_bucket(10**10) == LARGEST_BUCKET


def test_more_ranks_share_more_at_every_stage_and_the_last_shares_all():
    model, num_genes = ModelConfig(width=1024, depth=48, heads=16), 20_000
    whole = 16 * num_parameters(model, num_genes)
    for element_bytes in (2, 4):
        kept = [state(model, num_genes, stage, element_bytes, 1000, bucket=0).kept for stage in range(4)]
        assert kept[0] > kept[1] >= kept[2] > kept[3]
        assert kept[3] < 0.05 * whole


def test_checkpoints_off_the_device_leave_two_streams_of_tokens_on_it():
    model, load = ModelConfig(depth=30), Load(1_000_000, 1, 0)
    here = activations(model, 0, load, MemoryConfig(True), 4096, 2)
    away = activations(model, 0, load, MemoryConfig(True, offload="host"), 4096, 2)
    stream = 4 * 1_000_000 * model.width
    assert here.streams + here.working == 32 * stream
    assert away.streams == 2 * stream
    assert away.offloaded == 31 * stream
    assert away.total == away.streams + away.working + away.latents + away.pack


def test_in_the_first_backward_of_a_step_gradients_take_the_place_of_activations():
    held = state(ModelConfig(), 1000, 1, 4, 4, 1000)
    made = activations(ModelConfig(), 1000, Load(5000, 1, 250), MemoryConfig(), 4096, 4)
    assert peak(held, made, 2) == held.kept + max(made.total + held.backward, held.step)
    assert peak(held, made, 1) == held.kept + max(made.total, held.backward, held.step)
    assert math.isfinite(peak(held, replace(made, layers=0.0), 1))
