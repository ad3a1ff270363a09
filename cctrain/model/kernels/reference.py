"""The executable specification of every backend: one context after the other, whole score matrices, plain formulas.

    S = Q Kᵀ / √D          lse = log Σ_k exp(S)        P = exp(S − lse)        O = P V
    dV = Pᵀ dO             dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O))
    dQ = dS K / √D         dK = dSᵀ Q / √D

(the backward of Dao et al. 2022, "FlashAttention", appendix B). With O and lse over more keys than are given, P and
so all three gradients are those of the keys given. Any device, any floating dtype; arithmetic in fp32, or fp64 for
fp64. Memory is that of one context's scores.
"""

from itertools import pairwise

import torch
from torch import Tensor

from cctrain.model.kernels.interface import Kernels
from cctrain.model.merge import NO_KEYS, accumulator


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(q, H, D) against (k, H, D): out (q, H, D) and lse (q, H)."""
    if len(keys) == 0:
        return torch.zeros_like(queries), torch.full_like(queries[..., 0], NO_KEYS)
    scores = torch.einsum("qhd,khd->qhk", queries, keys) * queries.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, dim=-1)
    return torch.einsum("qhk,khd->qhd", torch.exp(scores - lse.unsqueeze(-1)), values), lse


def _attend_backward(
    grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scale = queries.shape[-1] ** -0.5
    scores = torch.einsum("qhd,khd->qhk", queries, keys) * scale
    weights = torch.exp(scores - lse.unsqueeze(-1))
    grad_values = torch.einsum("qhk,qhd->khd", weights, grad_out)
    grad_weights = torch.einsum("qhd,khd->qhk", grad_out, values)
    grad_scores = weights * (grad_weights - (grad_out * out).sum(dim=-1, keepdim=True)) * scale
    grad_queries = torch.einsum("qhk,khd->qhd", grad_scores, keys)
    return grad_queries, torch.einsum("qhk,qhd->khd", grad_scores, queries), grad_values


def read_forward(queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor]:
    dtype, (queries, keys, values) = queries.dtype, _accurate(queries, keys, values)
    out, lse = torch.zeros_like(queries), torch.zeros_like(queries[..., 0])
    for i, (start, stop) in enumerate(pairwise(offsets)):
        out[i], lse[i] = _attend(queries[i], keys[start:stop], values[start:stop])
    return out.to(dtype), lse


def read_backward(
    grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, offsets: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (grad_out, queries, keys, values, out) = queries.dtype, _accurate(grad_out, queries, keys, values, out)
    grads = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for i, (start, stop) in enumerate(pairwise(offsets)):
        own = slice(start, stop)
        result = _attend_backward(grad_out[i], queries[i], keys[own], values[own], out[i], lse[i])
        grads[0][i], grads[1][own], grads[2][own] = result
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)


def write_forward(queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor]:
    dtype, (queries, keys, values) = queries.dtype, _accurate(queries, keys, values)
    out, lse = torch.zeros_like(queries), torch.zeros_like(queries[..., 0])
    for i, (start, stop) in enumerate(pairwise(offsets)):
        out[start:stop], lse[start:stop] = _attend(queries[start:stop], keys[i], values[i])
    return out.to(dtype), lse


def write_backward(
    grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, offsets: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (grad_out, queries, keys, values, out) = queries.dtype, _accurate(grad_out, queries, keys, values, out)
    grads = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for i, (start, stop) in enumerate(pairwise(offsets)):
        own = slice(start, stop)
        result = _attend_backward(grad_out[own], queries[own], keys[i], values[i], out[own], lse[own])
        grads[0][own], grads[1][i], grads[2][i] = result
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)


def self_forward(queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor]:
    dtype, (queries, keys, values) = queries.dtype, _accurate(queries, keys, values)
    out, lse = torch.zeros_like(queries), torch.zeros_like(queries[..., 0])
    for start, stop in pairwise(offsets):
        own = slice(start, stop)
        out[own], lse[own] = _attend(queries[own], keys[own], values[own])
    return out.to(dtype), lse


def self_backward(
    grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor, offsets: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (grad_out, queries, keys, values, out) = queries.dtype, _accurate(grad_out, queries, keys, values, out)
    grads = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for start, stop in pairwise(offsets):
        own = slice(start, stop)
        result = _attend_backward(grad_out[own], queries[own], keys[own], values[own], out[own], lse[own])
        grads[0][own], grads[1][own], grads[2][own] = result
    return grads[0].to(dtype), grads[1].to(dtype), grads[2].to(dtype)


def _accurate(*tensors: Tensor) -> list[Tensor]:
    return [x.to(accumulator(x.dtype)) for x in tensors]


KERNELS = Kernels(read_forward, read_backward, write_forward, write_backward, self_forward, self_backward)
