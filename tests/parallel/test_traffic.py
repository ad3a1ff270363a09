"""What the ranks of a context send each other, counted as PyTorch dispatches it."""

import pytest
import torch
import torch.distributed as dist

from cctrain.parallel.mesh import join_mesh
from tools.bench_parallel import Shape, Traffic, TrafficCounter, count_traffic, ring, ulysses

WIDTH, HEADS, LATENTS = 8, 1, 4
LENGTHS = [4096, 262_144]


@pytest.fixture(scope="module")
def counted() -> list[list[Traffic]]:
    """By length, of each of two ranks."""
    return count_traffic(Shape(WIDTH, HEADS, LATENTS), LENGTHS, num_ranks=2)


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


def test_a_collective_that_cannot_be_counted_is_an_error():
    with join_mesh(), TrafficCounter(2), pytest.raises(NotImplementedError, match="broadcast"):
        dist.broadcast(torch.zeros(3), 0)


def test_collectives_are_counted_by_what_the_best_algorithms_send():
    with join_mesh(), TrafficCounter(8) as counter:
        dist.all_reduce(torch.zeros(100, dtype=torch.float64))
        assert counter.sent == 2 * 800 * 7 / 8
        dist.all_gather([torch.zeros(10)], torch.zeros(10))
        assert counter.sent == 2 * 800 * 7 / 8 + 40 * 7


def test_ring_attention_and_ulysses_move_what_their_authors_say():
    tokens, width, ranks = 12, 5, 3  # each holds 4 tokens: 20 numbers of Q, K, V or the result
    assert ring(tokens, width, ranks, element_bytes=2) == Traffic(forward=2 * 20 * 2 * 2, backward=4 * 20 * 2 * 2)
    # Of the numbers it holds, a rank keeps a third and sends the rest.
    assert ulysses(tokens, width, ranks, element_bytes=2).forward == pytest.approx(4 * 20 * 2 * 2 / 3)
    assert ulysses(tokens, width, ranks, element_bytes=2).backward == pytest.approx(4 * 20 * 2 * 2 / 3)
