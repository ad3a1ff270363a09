"""The plan for larger machines: what it says follows from the formulas, and the page says what it says."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from cctrain.cost.devices import load_device
from cctrain.cost.parameters import num_parameters
from cctrain.cost.plan import (
    DENSE,
    GENES,
    KINDS,
    LENGTHS,
    dense_traffic,
    memory_of,
    row,
    rows,
    subject,
    table,
    work_of_a_step,
)
from cctrain.cost.plan import MODEL as CRISS_CROSS
from cctrain.cost.step_time import collectives, step_seconds
from cctrain.cost.traffic import ring_of_a_layer, ulysses_of_a_layer
from cctrain.cost.work import Load

DEVICE = load_device("h100", "bf16")


def test_the_page_shows_the_table_that_the_command_prints():
    page = (Path(__file__).parents[2] / "cctrain" / "cost" / "README.md").read_text()
    assert f"{subject()}\n\n" in page
    assert table(rows(DEVICE)) in page


def test_it_says_how_many_parameters_its_models_have():
    for model in (CRISS_CROSS, DENSE):
        assert f"width 1024, 16 heads{', 256 latents' if model is CRISS_CROSS else ''}: " in subject()
        assert f": {num_parameters(model, GENES):,} parameters" in subject()
    assert "100,000,000 tokens a step, 5% of them targets, 60,000 genes" in subject()


def test_all_contexts_of_a_step_are_dealt_to_gpus_of_which_several_share_one():
    work = work_of_a_step(tokens=10_000_000, contexts=10, gpus=64, context_ranks=16)
    assert work.micro_batches == 3  # ten contexts on four groups of GPUs
    assert work.load == Load(625_000, 1, 0.05 * 625_000)
    assert (work.ranks, work.context_ranks, work.zero_stage, work.element_bytes) == (64, 16, 3, 2)


def test_a_context_is_shared_by_the_fewest_gpus_that_hold_it():
    found = row("criss-cross", 10_000_000, 64, DEVICE)
    assert found.context_ranks == 32
    fewer = work_of_a_step(10_000_000, 10, 64, 16)
    assert memory_of(CRISS_CROSS, fewer) <= 0.9 * DEVICE.memory < DEVICE.process + memory_of(CRISS_CROSS, fewer)


def test_a_context_is_shared_by_fewer_gpus_where_a_process_holds_nothing_beside_the_model():
    assert row("criss-cross", 10_000_000, 64, replace(DEVICE, process=0.0)).context_ranks == 16


def test_no_gpu_is_left_without_a_context():
    assert row("criss-cross", 100_000_000, 512, DEVICE).context_ranks == 512


def test_ulysses_ends_at_the_number_of_heads_and_nothing_is_made_up_beyond():
    assert row("dense, Ulysses", 10_000_000, 512, DEVICE).context_ranks is None


@pytest.mark.parametrize("tokens", LENGTHS[1:])
def test_long_contexts_take_a_hundredth_of_the_time_of_dense_attention_and_less(tokens):
    ours, ring = (row(kind, tokens, 512, DEVICE) for kind in KINDS[:2])
    assert ring.seconds > 100 * ours.seconds
    assert ring.sent > 100 * ours.sent


def test_what_context_ranks_send_does_not_grow_with_the_context():
    shorter, longer = (row("criss-cross", tokens, 512, DEVICE) for tokens in (10_000_000, 100_000_000))
    assert longer.sent < shorter.sent  # the same exchange a context, and fewer contexts


def test_a_gpu_sends_what_zero_and_its_context_need():
    exchanged, of_zero = collectives(CRISS_CROSS, GENES, work_of_a_step(10_000_000, 10, 64, 32))
    assert row("criss-cross", 10_000_000, 64, DEVICE).sent == sum(one.sent for one in (*exchanged, *of_zero))


@pytest.mark.parametrize(("kind", "law"), [(KINDS[1], ring_of_a_layer), (KINDS[2], ulysses_of_a_layer)])
def test_dense_attention_sends_forward_recomputed_and_backward_in_every_layer_and_micro_batch(kind, law):
    work = work_of_a_step(1_000_000, 100, 64, 8)
    sent, _ = dense_traffic(kind, CRISS_CROSS, work, 1_000_000, DEVICE, attention_seconds=0)
    forward, backward = law(1_000_000, CRISS_CROSS.width, 8, element_bytes=2)
    assert sent == 13 * CRISS_CROSS.depth * (forward + forward + backward)


@pytest.mark.parametrize(("context_ranks", "rate"), [(8, DEVICE.inside), (16, DEVICE.between)])
@pytest.mark.parametrize(("kind", "hops"), [(KINDS[1], lambda ranks: ranks - 1), (KINDS[2], lambda _: 4)])
def test_dense_attention_waits_for_what_it_sends_and_for_every_hop(kind, hops, context_ranks, rate):
    work = work_of_a_step(1_000_000, 100, 64, context_ranks)
    sent, waits = dense_traffic(kind, CRISS_CROSS, work, 1_000_000, DEVICE, attention_seconds=0)
    passes = 3 * CRISS_CROSS.depth * work.micro_batches
    assert waits == pytest.approx(sent / rate + hops(context_ranks) * passes * DEVICE.latency)


@pytest.mark.parametrize(("kind", "hides"), [(KINDS[1], True), (KINDS[2], False)])
def test_ring_attention_hides_what_it_sends_behind_attention_and_ulysses_does_not(kind, hides):
    work = work_of_a_step(1_000_000, 100, 64, 8)
    (_, waits), (_, waits_behind) = (
        dense_traffic(kind, CRISS_CROSS, work, 1_000_000, DEVICE, seconds) for seconds in (0.0, math.inf)
    )
    assert waits > 0
    assert waits_behind == (0 if hides else waits)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_dense_attention_waits_on_top_of_its_step(kind):
    found = row(kind, 1_000_000, 64, DEVICE)
    work = work_of_a_step(1_000_000, 100, 64, found.context_ranks)
    taken = step_seconds(DENSE, GENES, work, DEVICE)
    _, waits = dense_traffic(kind, DENSE, work, 1_000_000, DEVICE, taken.attention)
    assert found.seconds == taken.total + waits


def test_at_equal_parameters_dense_has_twice_the_layers():
    assert replace(CRISS_CROSS, attention="dense", depth=2 * CRISS_CROSS.depth) == DENSE
    seconds = step_seconds(DENSE, GENES, work_of_a_step(100_000, 1000, 8, 1), DEVICE).total
    assert row("dense, ring", 100_000, 8, DEVICE).seconds == seconds


def test_efficiency_of_gpus_that_share_no_context_is_what_zero_leaves_of_the_time():
    taken = step_seconds(CRISS_CROSS, GENES, work_of_a_step(100_000, 1000, 64, 1), DEVICE)
    found = row("criss-cross", 100_000, 64, DEVICE)
    assert found.context_ranks == 1
    assert found.efficiency == pytest.approx(1 - taken.zero / taken.total)


def test_where_sending_takes_no_time_dense_attention_loses_nothing_by_sharing_a_context():
    network = replace(DEVICE, inside=math.inf, between=math.inf, latency=0.0)
    found = row("dense, ring", 10_000_000, 64, network)
    assert found.context_ranks == 64
    assert found.efficiency == pytest.approx(1, abs=0.01)
