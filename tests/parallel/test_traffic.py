"""What the ranks of a context send each other, counted as PyTorch dispatches it."""

import pytest
import torch
import torch.distributed as dist

from cctrain.config import ModelConfig
from cctrain.parallel.mesh import join_mesh
from tools.bench_parallel import Traffic, TrafficCounter, count_traffic, criss_cross

WIDTH, HEADS, LATENTS = 8, 1, 4
MODEL = ModelConfig(width=WIDTH, heads=HEADS, latents=LATENTS)
LENGTHS = [4096, 262_144]


@pytest.fixture(scope="module")
def counted() -> list[list[Traffic]]:
    """By length, of each of two ranks."""
    return count_traffic(MODEL, LENGTHS, num_ranks=2)


@pytest.mark.processes
def test_what_a_layer_sends_does_not_depend_on_the_number_of_tokens(counted):
    short, long = counted
    assert long == short


@pytest.mark.processes
def test_two_ranks_send_what_the_latents_read_and_its_gradient_once_each(counted):
    forward = LATENTS * (WIDTH + HEADS) * 4  # out and log-sum-exp, fp32, to the other rank
    backward = LATENTS * WIDTH * 4  # half of the gradient, and half of the sum
    for by_rank in counted:
        assert by_rank == [Traffic(forward, backward)] * 2
    assert criss_cross(MODEL, 2) == Traffic(forward, backward)


def test_a_collective_that_cannot_be_counted_is_an_error():
    with join_mesh(), TrafficCounter(2), pytest.raises(NotImplementedError, match="broadcast"):
        dist.broadcast(torch.zeros(3), 0)


def test_collectives_are_counted_by_what_the_best_algorithms_send():
    with join_mesh(), TrafficCounter(8) as counter:
        dist.all_reduce(torch.zeros(100, dtype=torch.float64))
        assert counter.sent == 2 * 800 * 7 / 8
        dist.all_gather([torch.zeros(10)], torch.zeros(10))
        assert counter.sent == 2 * 800 * 7 / 8 + 40 * 7
