"""Joining attention over parts of the keys into attention over all of them, exactly.

A part s returns its own softmax-weighted mean out_s and lse_s = log Σ exp(scores), of its keys alone. Over all
parts, with the usual shift by the largest lse for safety,

    lse* = log Σ_s exp(lse_s)          out* = Σ_s out_s · exp(lse_s − lse*)

(Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; for shards of a context, Tree
Attention, Shyam et al. 2024). The same formula joins chunks inside a device, tiles that come one after the other,
and shards on many ranks. What the shards use to talk is given as an `Exchange`: nothing here knows of ranks.

Arithmetic is fp32, or fp64 for fp64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The lse of a part without keys, whose out is 0. Not −inf: −inf − −inf is not a number.
NO_KEYS = -1e30
# One gather costs one latency but memory per shard; beyond this many, two reductions are less.
MOST_SHARDS_TO_GATHER = 8


@dataclass(frozen=True)
class Exchange:
    """The collectives among the shards of a context. All shards call each with the same shapes.

    gather takes x to (num_shards, *x.shape), in shard order. sum and max reduce x over the shards, elementwise, and
    return a new tensor, or x itself changed. Tensors given to them are contiguous.
    """

    num_shards: int
    gather: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of `dtype` are kept in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Parts (S, ..., D) and (S, ...) to the whole: (..., D) and (...), at least fp32.

    Where no part has keys the result is exactly 0.
    """
    lses = lses.to(accumulator(lses.dtype))
    largest = lses.amax(dim=0)
    weights = torch.exp(lses - largest)
    total = weights.sum(dim=0)
    out = (outs.to(lses.dtype) * weights.unsqueeze(-1)).sum(dim=0) / total.unsqueeze(-1)
    return out, largest + torch.log(total)


def merge_shards(out: Tensor, lse: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """This shard's out (..., D) and lse (...) to those over all shards, at least fp32, the same on every shard.

    Up to 8 shards make one gather of out and lse together, merged in shard order. More make a maximum and a sum.
    """
    lse = lse.to(accumulator(lse.dtype))
    out = out.to(lse.dtype)
    if exchange.num_shards <= MOST_SHARDS_TO_GATHER:
        parts = exchange.gather(torch.cat([out, lse.unsqueeze(-1)], dim=-1))
        return merge(parts[..., :-1], parts[..., -1])
    largest = exchange.max(lse.clone(memory_format=torch.contiguous_format))
    weight = torch.exp(lse - largest).unsqueeze(-1)
    sums = exchange.sum(torch.cat([out * weight, weight], dim=-1))
    total = sums[..., -1]
    return sums[..., :-1] / total.unsqueeze(-1), largest + torch.log(total)
