"""What ranks send: the formulas beside the collectives that they made."""

import math
from dataclasses import replace
from typing import Any

import pytest

from cctrain.config import Config, ModelConfig
from cctrain.cost.parameters import num_parameters, parameter_tensors
from cctrain.cost.step import step_traffic
from cctrain.cost.traffic import (
    MOST_RANKS_TO_GATHER,
    SENT,
    Collective,
    Gathering,
    exchange_of_a_layer,
    gathering_of,
    ring_of_a_layer,
    sent,
    ulysses_of_a_layer,
    zero,
)
from cctrain.model.merge import MOST_SHARDS_TO_GATHER
from tests.cost.conftest import ZERO_MODEL, ZERO_RANKS, zero_steps


def counted(step: dict[str, Any], operation: str) -> tuple[int, int]:
    """Bytes of all payloads, and calls."""
    payloads = [payload for made, payload in step["collectives"] if made == operation]
    return sum(payloads), len(payloads)


def computed(step: dict[str, Any], num_genes: int, operation: str) -> tuple[float, int]:
    element_bytes = 4 if step["precision"] == "fp32" else 2
    gathering = Gathering(**step["options"])
    law = zero(ZERO_MODEL, num_genes, step["stage"], element_bytes, ZERO_RANKS, step["micro_batches"], gathering)
    of_operation = [one for one in law if one.operation == operation]
    return sum(one.payload * one.times for one in of_operation), sum(one.times * one.calls for one in of_operation)


@pytest.mark.processes
def test_zero_sends_what_the_formulas_say(even_store, zero_trainings):
    num_genes, threshold = len(even_store.genes.ids), Gathering().stage3_param_persistence_threshold
    sizes = {size for _, size, _ in parameter_tensors(ZERO_MODEL, num_genes)}
    assert min(sizes) < threshold < max(sizes)
    assert threshold in sizes
    for step in zero_trainings:
        assert step["micro_batches"] > 1
        assert {operation for operation, _ in step["collectives"]} <= SENT.keys()
        for operation in SENT:
            bytes_of_law, _ = computed(step, num_genes, operation)
            assert counted(step, operation)[0] == bytes_of_law, (step["stage"], step["precision"], operation)


# Eight of the model's matrices have 160,000 numbers each.
FETCHED_AHEAD = [
    {},
    {"stage3_prefetch_bucket_size": 1_000_000},
    {"stage3_prefetch_bucket_size": 100_000},
    {"stage3_param_persistence_threshold": 200_000},
]
NOT_FETCHED_AHEAD = [{"stage3_prefetch_bucket_size": 0}, {"stage3_max_live_parameters": 500_000}]


@pytest.fixture(scope="module")
def gatherings(even_store) -> list[dict[str, Any]]:
    return zero_steps(even_store, [(3, "bf16", options) for options in (*FETCHED_AHEAD, *NOT_FETCHED_AHEAD)])


@pytest.mark.processes
def test_weights_that_are_fetched_ahead_are_gathered_once_a_micro_batch_in_as_many_calls_as_it_takes(
    even_store, gatherings
):
    for step in gatherings[: len(FETCHED_AHEAD)]:
        assert counted(step, "all_gather") == computed(step, len(even_store.genes.ids), "all_gather"), step["options"]


@pytest.mark.processes
def test_weights_that_are_not_fetched_ahead_are_gathered_at_most_twice_a_micro_batch(even_store, gatherings):
    for step in gatherings[len(FETCHED_AHEAD) :]:
        for found, law in zip(
            counted(step, "all_gather"), computed(step, len(even_store.genes.ids), "all_gather"), strict=True
        ):
            assert 0.8 * law <= found <= law, step["options"]


def test_a_step_line_says_what_a_rank_sends_for_its_contexts_and_for_zero():
    config = Config(model=ZERO_MODEL)
    config.parallel.zero_stage, config.parallel.context, config.training.precision = 2, 2, "bf16"
    told = step_traffic(config, 50, contexts=6, micro_batches=3, ranks=4)["cost/sent_bytes"]
    of_layer = exchange_of_a_layer(ZERO_MODEL, 3, 2)  # each of the two rows has three of the six contexts
    expected = [*(of_layer * ZERO_MODEL.depth), *zero(ZERO_MODEL, 50, 2, 2, ranks=4, micro_batches=3)]
    assert told == sum(one.sent for one in expected) > 0


def test_a_step_line_of_one_rank_says_nothing_of_sending():
    assert step_traffic(Config(model=ZERO_MODEL), 50, contexts=6, micro_batches=3, ranks=1) == {}


def test_one_rank_sends_nothing():
    assert zero(ZERO_MODEL, 50, 3, 4, ranks=1, micro_batches=2) == exchange_of_a_layer(ZERO_MODEL, 5, ranks=1) == []
    assert sent("all_reduce", 100, ranks=1) == 0


def test_dense_attention_has_no_latents_to_exchange():
    assert exchange_of_a_layer(ModelConfig(attention="dense"), 5, ranks=8) == []


def large_and_small(model: ModelConfig, **options: int) -> tuple[Collective, list[Collective]]:
    _, large, *small = zero(model, 20_000, 3, 2, ranks=8, micro_batches=3, gathering=Gathering(**options))
    return large, small


def test_a_model_that_has_no_room_whole_is_gathered_for_forward_and_for_backward_tensor_by_tensor():
    model = ModelConfig(width=1024, depth=3)
    whole, _ = large_and_small(model)
    assert (whole.times, whole.calls) == (3, math.ceil(whole.payload / 2 / 50_000_000))
    assert whole.calls > 1
    exact, _ = large_and_small(model, stage3_max_live_parameters=int(whole.payload) // 2)
    assert exact == whole
    not_whole, _ = large_and_small(model, stage3_max_live_parameters=int(whole.payload) // 2 - 1)
    matrices = [one.number for one in parameter_tensors(model, 20_000) if one.size > 100_000]
    assert not_whole == replace(whole, times=6, calls=sum(matrices))


def test_small_tensors_are_gathered_one_by_one():
    model = ModelConfig(width=512, depth=3)
    large, small = large_and_small(model)
    assert large.payload + sum(one.payload * one.times for one in small) == 2 * num_parameters(model, 20_000)
    assert all(one.payload <= 2 * 100_000 and one.calls == 1 for one in small)


def test_the_configuration_says_how_weights_are_gathered():
    options = {"stage3_prefetch_bucket_size": 5e6, "stage3_param_persistence_threshold": 1000, "reduce_scatter": True}
    config = Config(deepspeed={"zero_optimization": options})
    assert gathering_of(config) == Gathering(1000, 5_000_000, 1_000_000_000)
    assert gathering_of(Config()) == Gathering()


def test_up_to_eight_ranks_gather_what_latents_read_and_more_of_them_reduce_it():
    assert MOST_RANKS_TO_GATHER == MOST_SHARDS_TO_GATHER
    model = ModelConfig(width=8, heads=2, latents=3)
    out, logs = 4 * 5 * 3 * 8, 4 * 5 * 3 * 2  # bytes, of 5 contexts
    backward = Collective("gradient of the read", "all_reduce", out, 8)
    assert exchange_of_a_layer(model, 5, 8) == [Collective("read", "all_gather", 8 * (out + logs), 8), backward]
    maximum, sums, _ = exchange_of_a_layer(model, 5, 9)
    assert (maximum.operation, maximum.payload) == ("all_reduce", logs)
    assert (sums.operation, sums.payload) == ("all_reduce", out + logs)


def test_collectives_send_what_the_best_algorithms_send():
    assert sent("all_reduce", 800, 8) == 2 * 800 * 7 / 8
    assert sent("all_gather", 8 * 40, 8) == 40 * 7
    assert sent("reduce_scatter", 800, 8) == 800 * 7 / 8
    assert Collective("", "all_gather", 320, 8, times=3).sent == 3 * 40 * 7


def test_ring_attention_and_ulysses_move_what_their_authors_say():
    tokens, width, ranks = 12, 5, 3  # each holds 4 tokens: 20 numbers of Q, K, V or the result
    assert ring_of_a_layer(tokens, width, ranks, element_bytes=2) == (2 * 20 * 2 * 2, 4 * 20 * 2 * 2)
    # Of the numbers it holds, a rank keeps a third and sends the rest.
    assert ulysses_of_a_layer(tokens, width, ranks, element_bytes=2) == pytest.approx((4 * 20 * 2 * 2 / 3,) * 2)
