"""What ranks send: the formulas beside the collectives that they made."""

import pytest

from cctrain.config import Config, ModelConfig
from cctrain.cost.parameters import num_parameters, parameter_tensors
from cctrain.cost.step import step_traffic
from cctrain.cost.traffic import (
    FETCHED_AHEAD,
    MOST_RANKS_TO_GATHER,
    PERSISTENT_UP_TO,
    SENT,
    Collective,
    exchange_of_a_layer,
    ring_of_a_layer,
    sent,
    ulysses_of_a_layer,
    zero,
)
from cctrain.model.merge import MOST_SHARDS_TO_GATHER
from tests.cost.conftest import ZERO_MODEL, ZERO_RANKS


@pytest.mark.processes
def test_zero_sends_what_the_formulas_say(even_store, zero_trainings):
    num_genes = len(even_store.genes.ids)
    sizes = {size for _, size, _ in parameter_tensors(ZERO_MODEL, num_genes)}
    assert min(sizes) < PERSISTENT_UP_TO < max(sizes)
    assert PERSISTENT_UP_TO in sizes
    for step in zero_trainings:
        assert step["micro_batches"] > 1
        element_bytes = 4 if step["precision"] == "fp32" else 2
        law = zero(ZERO_MODEL, num_genes, step["stage"], element_bytes, ZERO_RANKS, step["micro_batches"])
        assert {operation for operation, _ in step["collectives"]} <= SENT.keys()
        for operation in SENT:
            counted = sum(payload for made, payload in step["collectives"] if made == operation)
            computed = sum(one.payload * one.times for one in law if one.operation == operation)
            assert counted == computed, (step["stage"], step["precision"], operation)


def test_a_step_line_says_what_a_rank_sends_for_its_contexts_and_for_zero():
    config = Config(model=ZERO_MODEL)
    config.parallel.zero_stage, config.parallel.context, config.training.precision = 2, 2, "bf16"
    told = step_traffic(config, 50, contexts=6, micro_batches=3, ranks=4)["cost/sent_bytes"]
    of_layer = exchange_of_a_layer(ZERO_MODEL, 3, 2)  # each of the two rows has three of the six contexts
    expected = [*(of_layer * ZERO_MODEL.depth), *zero(ZERO_MODEL, 50, 2, 2, ranks=4, micro_batches=3)]
    assert told == sum(one.sent for one in expected) > 0


def test_one_rank_sends_nothing():
    assert zero(ZERO_MODEL, 50, 3, 4, ranks=1, micro_batches=2) == exchange_of_a_layer(ZERO_MODEL, 5, ranks=1) == []
    assert sent("all_reduce", 100, ranks=1) == 0


def test_dense_attention_has_no_latents_to_exchange():
    assert exchange_of_a_layer(ModelConfig(attention="dense"), 5, ranks=8) == []


def test_a_model_that_does_not_stay_whole_is_gathered_for_forward_and_for_backward():
    large = ModelConfig(width=1024, depth=3)
    assert num_parameters(large, 20_000) > FETCHED_AHEAD
    _, gathered, _ = zero(large, 20_000, 3, 2, ranks=8, micro_batches=3)
    assert gathered.times == 6


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_a_model_that_stays_whole_is_gathered_once_for_each_micro_batch(element_bytes):
    small = ModelConfig(width=512, depth=3)
    assert FETCHED_AHEAD / 2 < num_parameters(small, 20_000) < FETCHED_AHEAD
    _, gathered, _ = zero(small, 20_000, 3, element_bytes, ranks=8, micro_batches=3)
    assert gathered.times == 3


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
