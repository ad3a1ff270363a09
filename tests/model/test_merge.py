import pytest
import torch
from torch import Tensor

from cctrain.model.merge import NO_KEYS, merge, merge_shards
from tests.model.attention_reference import ThreadedShards


def parts(num_parts: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The outs (S, 2, 3, 4) and lses (S, 2, 3) of parts whose scores lie far apart."""
    draws = torch.Generator().manual_seed(seed)
    outs = torch.randn(num_parts, 2, 3, 4, generator=draws, dtype=torch.float64)
    lses = 10 * torch.randn(num_parts, 2, 3, generator=draws, dtype=torch.float64)
    return outs.to(dtype), lses.to(dtype)


def test_parts_are_weighted_by_the_sums_of_their_exponentials():
    outs, lses = parts(5)
    weights = lses.exp()
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out, (outs * weights[..., None]).sum(0) / weights.sum(0)[..., None], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, weights.sum(0).log(), rtol=0, atol=1e-12)


def test_merging_keys_apart_is_attending_to_them_together():
    draws = torch.Generator().manual_seed(0)
    scores, values = (torch.randn(40, generator=draws, dtype=torch.float64) for _ in range(2))
    outs = torch.stack([(torch.softmax(scores[i::4], 0) * values[i::4]).sum() for i in range(4)])
    lses = torch.stack([scores[i::4].logsumexp(0) for i in range(4)])
    out, lse = merge(outs[:, None], lses)
    torch.testing.assert_close(out[0], (torch.softmax(scores, 0) * values).sum(), rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, scores.logsumexp(0), rtol=0, atol=1e-14)


def test_scores_too_large_for_an_exponential_are_merged():
    outs, lses = parts(3, dtype=torch.float32)
    out, lse = merge(outs, lses + 1e4)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, merge(outs, (lses + 1e4) - 1e4)[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, merge(outs, lses)[1] + 1e4, rtol=1e-6, atol=0)


def test_a_part_alone_comes_out_bit_for_bit():
    outs, lses = parts(1, dtype=torch.float32)
    out, lse = merge(outs, lses)
    assert torch.equal(out, outs[0])
    assert torch.equal(lse, lses[0])


def test_a_part_without_keys_changes_no_bit():
    outs, lses = parts(2, dtype=torch.float32)
    nothing, no_keys = torch.zeros_like(outs[:1]), torch.full_like(lses[:1], NO_KEYS)
    out, lse = merge(torch.cat([outs[:1], nothing, outs[1:]]), torch.cat([lses[:1], no_keys, lses[1:]]))
    assert torch.equal(out, merge(outs, lses)[0])
    assert torch.equal(lse, merge(outs, lses)[1])


def test_no_keys_anywhere_is_exactly_zero():
    out, lse = merge(torch.zeros(4, 2, 3), torch.full((4, 2), NO_KEYS))
    assert torch.equal(out, torch.zeros(2, 3))
    assert torch.equal(lse, torch.full((2,), NO_KEYS))


def test_bf16_parts_are_merged_in_fp32():
    outs, lses = parts(3, dtype=torch.bfloat16)
    out, lse = merge(outs, lses)
    assert out.dtype == lse.dtype == torch.float32
    assert torch.equal(out, merge(outs.float(), lses.float())[0])


@pytest.mark.parametrize("num_shards", range(1, 11))
def test_every_shard_receives_the_bits_of_the_whole(num_shards):
    outs, lses = parts(num_shards, dtype=torch.float32)
    lses[num_shards // 2, 0] = NO_KEYS
    outs[num_shards // 2, 0] = 0
    right = merge(outs.double(), lses.double())
    results = ThreadedShards(num_shards).run(lambda shard, exchange: merge_shards(outs[shard], lses[shard], exchange))
    for out, lse in results:
        torch.testing.assert_close(out.double(), right[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), right[1], rtol=1e-6, atol=1e-6)
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize(("num_shards", "collectives"), [(8, ["gather"]), (9, ["max", "sum"])])
def test_up_to_eight_shards_make_one_gather_and_more_a_maximum_and_a_sum(num_shards, collectives):
    outs, lses = parts(num_shards)
    shards = ThreadedShards(num_shards)
    shards.run(lambda shard, exchange: merge_shards(outs[shard], lses[shard], exchange))
    assert shards.calls == collectives


@pytest.mark.parametrize("num_shards", [3, 9])
def test_what_a_shard_gives_is_left_as_it_was(num_shards):
    outs, lses = parts(num_shards)
    before = outs.clone(), lses.clone()
    ThreadedShards(num_shards).run(lambda shard, exchange: merge_shards(outs[shard], lses[shard], exchange))
    assert torch.equal(outs, before[0])
    assert torch.equal(lses, before[1])


@pytest.mark.parametrize("num_shards", [2, 9])
def test_a_context_without_keys_on_any_shard_is_exactly_zero(num_shards):
    out, lse = torch.zeros(2, 3), torch.full((2,), NO_KEYS)
    for merged, _ in ThreadedShards(num_shards).run(lambda _, exchange: merge_shards(out, lse, exchange)):
        assert torch.equal(merged, out)
