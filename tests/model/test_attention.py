from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cctrain.model import attention

HEADS, HEAD_WIDTH, NUM_LATENTS = 3, 4, 5
LENGTHS = [[6], [3, 0, 7, 1], [0, 2], [4, 0], [0], [0, 0]]


def rows(*shape: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, HEADS, HEAD_WIDTH, generator=draws, dtype=torch.float64)


def offsets_of(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def softmax_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(q, H, D) against (k, H, D), by the formula; nothing is attended where there is no key."""
    if len(keys) == 0:
        return torch.zeros_like(queries)
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", queries, keys) / HEAD_WIDTH**0.5, dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_latents_read_the_tokens_of_their_own_context_by_the_formula(lengths):
    offsets, total = offsets_of(lengths), sum(lengths)
    queries = rows(len(lengths), NUM_LATENTS, seed=0)
    keys, values = rows(total, seed=1), rows(total, seed=2)
    result = attention.read(queries, keys, values, offsets)
    assert result.shape == queries.shape
    for i, (start, stop) in enumerate(pairwise(offsets)):
        expected = softmax_attention(queries[i], keys[start:stop], values[start:stop])
        torch.testing.assert_close(result[i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_tokens_read_the_latents_of_their_own_context_by_the_formula(lengths):
    offsets, total = offsets_of(lengths), sum(lengths)
    queries = rows(total, seed=0)
    keys, values = rows(len(lengths), NUM_LATENTS, seed=1), rows(len(lengths), NUM_LATENTS, seed=2)
    result = attention.write(queries, keys, values, offsets)
    assert result.shape == queries.shape
    for i, (start, stop) in enumerate(pairwise(offsets)):
        expected = softmax_attention(queries[start:stop], keys[i], values[i])
        torch.testing.assert_close(result[start:stop], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_tokens_read_each_other_within_their_context_by_the_formula(lengths):
    offsets, total = offsets_of(lengths), sum(lengths)
    queries, keys, values = (rows(total, seed=seed) for seed in range(3))
    result = attention.self_attention(queries, keys, values, offsets)
    assert result.shape == queries.shape
    for start, stop in pairwise(offsets):
        expected = softmax_attention(queries[start:stop], keys[start:stop], values[start:stop])
        torch.testing.assert_close(result[start:stop], expected, rtol=0, atol=1e-12)


def test_a_context_without_tokens_reads_exactly_zero():
    queries = rows(2, NUM_LATENTS, seed=0)
    result = attention.read(queries, rows(3, seed=1), rows(3, seed=2), [0, 3, 3])
    assert torch.count_nonzero(result[1]) == 0
    assert torch.count_nonzero(result[0]) == result[0].numel()
