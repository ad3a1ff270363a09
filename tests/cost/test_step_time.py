"""How long a step takes: what it has to do, over the rates of a device."""

from dataclasses import replace

import pytest

from cctrain.config import Config, ModelConfig
from cctrain.cost.devices import Device
from cctrain.cost.flops import step_flops
from cctrain.cost.memory import rank_memory, state
from cctrain.cost.parameters import num_parameters
from cctrain.cost.step import step_traffic
from cctrain.cost.step_time import (
    SMALL_COLLECTIVES,
    StepSeconds,
    collectives,
    num_stages,
    rank_flops,
    seconds_of,
    step_seconds,
)
from cctrain.cost.traffic import Collective, Gathering, exchange_of_a_layer, zero
from cctrain.cost.work import Contexts, work_of
from tests.cost.conftest import WORK_GENES as GENES
from tests.cost.conftest import WORK_MODEL as MODEL
from tests.cost.conftest import work

NEVER_WAITS = float("inf")
# Everything but products takes no time.
IDLE = Device("idle", 1e9, 1.0, 1.0, NEVER_WAITS, NEVER_WAITS, 0.0, 0.0, 0.0, 8, NEVER_WAITS, NEVER_WAITS, 0.0)


def taken(model: ModelConfig = MODEL, genes: int = GENES, options: dict | None = None, **rates: float) -> StepSeconds:
    """Where everything but these rates takes no time; `options` of `work`."""
    device = replace(IDLE, **({"products": NEVER_WAITS} | rates))
    return step_seconds(model, genes, work(**(options or {})), device)


@pytest.mark.parametrize("micro_batch_tokens", [4000, 1000])
@pytest.mark.parametrize(("checkpointing", "stage"), [(False, 1), (True, 1), (True, 3)])
def test_a_rank_takes_its_share_of_the_flops_of_a_step(micro_batch_tokens, checkpointing, stage):
    law = step_flops(MODEL, [1000] * 8, 8 * 50, checkpointing, stage).by_component()
    rank = work(micro_batch_tokens=micro_batch_tokens, checkpointing=checkpointing, stage=stage)
    assert rank_flops(MODEL, rank).by_component() == pytest.approx({name: flops / 2 for name, flops in law.items()})


@pytest.mark.parametrize("attention", ["criss_cross", "dense"])
@pytest.mark.parametrize("micro_batch_tokens", [4000, 1000])
def test_context_ranks_share_all_but_the_latents(attention, micro_batch_tokens):
    model = replace(MODEL, attention=attention)
    law = step_flops(model, [1000] * 8, 8 * 50).by_component()
    shared = rank_flops(model, work(context_ranks=2, micro_batch_tokens=micro_batch_tokens)).by_component()
    assert shared == pytest.approx({name: flops / (1 if name == "latents" else 2) for name, flops in law.items()})


def test_products_and_attention_take_their_flops_over_their_own_rates():
    flops = rank_flops(MODEL, work())
    seconds = taken(products=10.0, attention=5.0)
    assert seconds.products == pytest.approx((flops.total - flops.attention) / 10)
    assert seconds.attention == pytest.approx(flops.attention / 5)


def moved(model: ModelConfig = MODEL, genes: int = GENES, **options: object) -> float:
    """Bytes, beside the products."""
    return taken(model, genes, options, elementwise=1.0).elementwise


@pytest.mark.parametrize(("precision", "e"), [("fp32", 4), ("bf16", 2)])
def test_checkpointing_moves_again_what_norms_residuals_and_gelu_read_and_write(precision, e):
    norm, residual, gelu = 4 + e, 4 + e + 4, 4 * e + 4 * e
    again = moved(checkpointing=True, precision=precision) - moved(precision=precision)
    assert again == 4000 * MODEL.depth * MODEL.width * (3 * norm + 2 * residual + gelu)


@pytest.mark.parametrize("micro_batch_tokens", [4000, 1000])
@pytest.mark.parametrize(("precision", "e"), [("fp32", 4), ("bf16", 2)])
def test_every_token_is_moved_in_every_layer_and_once_for_its_embedding(micro_batch_tokens, precision, e):
    options = {"micro_batch_tokens": micro_batch_tokens, "precision": precision}
    layer = moved(replace(MODEL, depth=MODEL.depth + 1), **options) - moved(**options)
    assert layer == 4000 * MODEL.width * (28 + 13 * e + 48 + 18 * e)
    assert moved(genes=0, **options) - MODEL.depth * layer == 4000 * MODEL.width * (28 + 14 * e)


@pytest.mark.parametrize(("micro_batch_tokens", "micro_batches"), [(4000, 1), (1000, 4)])
def test_the_gradient_of_all_gene_vectors_is_moved_in_every_micro_batch(micro_batch_tokens, micro_batches):
    of_genes = moved(micro_batch_tokens=micro_batch_tokens) - moved(genes=0, micro_batch_tokens=micro_batch_tokens)
    assert of_genes == micro_batches * 6 * GENES * MODEL.width * 4


def test_stages_are_those_of_every_tile_in_every_layer_and_two_of_the_latents():
    embedding_and_head, read_and_write = 2 * 3, 2 * 3
    assert num_stages(MODEL, 3) == MODEL.depth * (read_and_write + 2) + embedding_and_head
    assert num_stages(replace(MODEL, attention="dense"), 3) == MODEL.depth * 3 + embedding_and_head


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_stage_is_called_in_every_micro_batch_and_half_as_often_again_with_checkpointing(checkpointing):
    tiles = 4  # of 256 tokens, for 1,000
    seconds = taken(options={"micro_batch_tokens": 1000, "checkpointing": checkpointing}, call=2.0)
    assert seconds.calls == 2 * 4 * num_stages(MODEL, tiles) * (1.5 if checkpointing else 1)


@pytest.mark.parametrize("micro_batch_tokens", [4000, 1000])
def test_every_target_takes_its_time(micro_batch_tokens):
    assert taken(options={"micro_batch_tokens": micro_batch_tokens}, target_seconds=2.0).targets == 2 * 4 * 50


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (1, 2), (3, 2)])
def test_from_stage_1_on_the_optimizer_takes_its_share_of_the_parameters(stage, ranks):
    seconds = taken(options={"stage": stage}, parameter_seconds=2.0).optimizer
    assert seconds == 2 * num_parameters(MODEL, GENES) / ranks


def test_ranks_wait_for_their_small_collectives_too():
    assert taken(options={"stage": 0}, latency=2.0).zero == 2 * (SMALL_COLLECTIVES + 1)
    assert taken(options={"ranks": 1}, latency=2.0).zero == 0


def test_every_rate_slows_its_own_part():
    slower = {
        "attention": {"attention": 1.0},
        "elementwise": {"elementwise": 1.0},
        "targets": {"target_seconds": 1.0},
        "optimizer": {"parameter_seconds": 1.0},
        "calls": {"call": 1.0},
        "exchange": {"inside": 1.0},
        "zero": {"inside": 1.0},
    }
    shared = {"context_ranks": 2}
    assert taken(options=shared).total == 0
    for part, rate in slower.items():
        seconds = taken(options=shared, **rate)
        assert getattr(seconds, part) > 0
        if part not in ("exchange", "zero"):
            assert seconds.total == getattr(seconds, part)


def test_every_part_takes_as_many_times_as_long_as_a_rehearsal_did():
    once, beyond = (taken(products=10.0, call=2.0, rehearsed_over_parts=factor) for factor in (1.0, 1.5))
    assert beyond == once.scaled(1.5)
    assert beyond.total == 1.5 * once.total > 0


def test_context_ranks_exchange_in_every_layer_of_every_micro_batch():
    shared = work(ranks=4, context_ranks=2, micro_batch_tokens=1000)
    assert (shared.micro_batches, shared.load.contexts) == (2, 2)
    exchanged, _ = collectives(MODEL, GENES, shared)
    assert exchanged == [replace(one, times=2 * MODEL.depth) for one in exchange_of_a_layer(MODEL, 2, 2)]


@pytest.mark.parametrize("attention", ["dense", "criss_cross"])
def test_contexts_of_unequal_lengths_take_what_their_squares_take(attention):
    """Two of 500 and 1,500 tokens, on one rank."""
    config = Config(model=replace(MODEL, attention=attention))
    config.data.global_batch, config.data.micro_batch_tokens = 2, 4000
    mean_ones = work_of(config, Contexts(1000, 50, GENES, unevenness=1.25), ranks=1, tile_tokens=256)
    exactly = step_flops(config.model, [500, 1500], 100).by_component()
    assert rank_flops(config.model, mean_ones).by_component() == pytest.approx(exactly)


def test_zero_is_among_all_ranks():
    _, of_zero = collectives(
        MODEL, GENES, work(ranks=4, context_ranks=2, micro_batch_tokens=1000, stage=2, precision="bf16")
    )
    assert of_zero == zero(MODEL, GENES, stage=2, element_bytes=2, ranks=4, micro_batches=2)


def test_zero_gathers_as_the_configuration_says():
    config = Config(model=MODEL, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 100}})
    config.data.micro_batch_tokens, config.parallel.zero_stage = 1000, 3
    rank = work_of(config, Contexts(1000, 50, GENES), ranks=2, tile_tokens=256)
    gathering = Gathering(stage3_param_persistence_threshold=100)
    _, of_zero = collectives(MODEL, GENES, rank)
    assert of_zero == zero(MODEL, GENES, 3, 4, 2, rank.micro_batches, gathering)
    held, _ = rank_memory(config, GENES, rank)
    assert held.weights == state(MODEL, GENES, 3, 4, 2, 0, gathering).weights
    told = step_traffic(config, GENES, contexts=16, micro_batches=rank.micro_batches, ranks=2)
    assert told["cost/sent_bytes"] == sum(one.sent for one in of_zero)


def test_a_group_larger_than_a_node_sends_at_the_rate_between_nodes():
    device = replace(IDLE, inside=100.0, between=10.0, latency=3.0)
    assert seconds_of(Collective("", "all_gather", 800, 8, times=2), device) == pytest.approx(2 * 700 / 100 + 6)
    assert seconds_of(Collective("", "all_gather", 1600, 16), device) == pytest.approx(1500 / 10 + 3)


def test_every_call_of_a_collective_waits():
    device = replace(IDLE, inside=100.0, latency=3.0)
    assert seconds_of(Collective("", "all_gather", 800, 8, times=2, calls=5), device) == 2 * 700 / 100 + 2 * 5 * 3
