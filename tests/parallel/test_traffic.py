"""What the ranks of a context send each other, counted as PyTorch dispatches it."""

import pytest
import torch
import torch.distributed as dist

from cctrain.config import ModelConfig
from cctrain.cost.traffic import READ, Collective, exchange_of_a_layer
from cctrain.parallel.mesh import join_mesh
from tools.bench_parallel import CollectiveCounter, Traffic, count_collectives, traffic_of

WIDTH, HEADS, LATENTS = 8, 2, 4
MODEL = ModelConfig(width=WIDTH, heads=HEADS, latents=LATENTS)
LENGTHS = [4096, 262_144]
RANKS = 2


@pytest.fixture(scope="module")
def counted() -> list[list[list[Collective]]]:
    """By length, of each rank."""
    return count_collectives(MODEL, LENGTHS, RANKS)


@pytest.mark.processes
def test_the_ranks_of_a_context_make_the_collectives_of_the_formula_and_no_others_however_many_its_tokens(counted):
    for by_rank in counted:
        assert by_rank == [exchange_of_a_layer(MODEL, 1, RANKS)] * RANKS


@pytest.mark.processes
def test_two_ranks_send_what_the_latents_read_and_its_gradient_once_each(counted):
    forward = LATENTS * (WIDTH + HEADS) * 4  # out and log-sum-exp, fp32, to the other rank
    backward = LATENTS * WIDTH * 4  # half of the gradient, and half of the sum
    for by_rank in counted:
        assert [traffic_of(made) for made in by_rank] == [Traffic(forward, backward)] * RANKS


def test_a_collective_that_cannot_be_counted_is_an_error():
    with join_mesh(), CollectiveCounter(READ, 2), pytest.raises(ValueError, match="broadcast"):
        dist.broadcast(torch.zeros(3), 0)


def test_a_collective_is_counted_with_the_bytes_that_its_ranks_have_in_the_end():
    with join_mesh(), CollectiveCounter(READ, 8) as counter:
        dist.all_reduce(torch.zeros(100, dtype=torch.float64))
        dist.all_gather([torch.zeros(10)], torch.zeros(10))
    assert counter.made == [Collective(READ, "all_reduce", 800, 8), Collective(READ, "all_gather", 8 * 40, 8)]
