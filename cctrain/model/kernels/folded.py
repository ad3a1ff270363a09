"""Read and write by a stock flash kernel, which neither fills a device by itself.

The read has few queries and many keys, the write many queries and few keys; flash kernels are parallel over heads
and queries in forward, over keys in backward. So the tokens of a context are cut into chunks, and each chunk, with
a copy of its context's latents, becomes a sequence of its own:

    read    each chunk of keys has its own out and lse, joined by `merge`; dQ is summed over the chunks
    write   each chunk of queries stands alone; dK and dV are summed over the chunks

The latents' copies cost M rows beside a chunk's own. Sums over chunks are in a fixed order and at least fp32, so
two runs give the same bits. Nothing is padded.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from cctrain.model.kernels.interface import Kernels
from cctrain.model.merge import NO_KEYS, accumulator, merge


@dataclass(frozen=True)
class Stock:
    """A flash kernel over packed sequences: sequence i has rows bounds[i]:bounds[i + 1], none is empty.

    forward(queries, keys, values, query_bounds, key_bounds) takes (rows, H, D) and returns out, like the queries,
    and lse (rows, H), at least fp32. backward(grad_out, queries, keys, values, out, lse, query_bounds, key_bounds)
    returns the three gradients. chunk_size(latents, total) is how many tokens a chunk has at most, where latents
    (contexts, M, H, D) meet `total` tokens.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int]], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    chunk_size: Callable[[Tensor, int], int]


@dataclass(frozen=True)
class Chunks:
    """Chunk j holds tokens bounds[j]:bounds[j + 1]; context i has counts[i] chunks, the first ones first."""

    bounds: list[int]
    counts: list[int]


def fold(stock: Stock) -> Kernels:
    """The kernels of the interface, by way of a stock kernel."""
    return Kernels(
        partial(read_forward, stock),
        partial(read_backward, stock),
        partial(write_forward, stock),
        partial(write_backward, stock),
        partial(self_forward, stock),
        partial(self_backward, stock),
    )


def read_forward(
    stock: Stock, queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]
) -> tuple[Tensor, Tensor]:
    chunks = cut_into_chunks(offsets, stock.chunk_size(queries, len(keys)))
    latents = _latent_bounds(queries, chunks)
    if len(keys) == 0:
        lse = queries.new_full(queries.shape[:-1], NO_KEYS, dtype=accumulator(queries.dtype))
        return torch.zeros_like(queries), lse
    out, lse = stock.forward(_copy_to_chunks(queries, chunks), keys, values, latents, chunks.bounds)
    shape = (-1, queries.shape[1])
    return _merge_chunks(out.unflatten(0, shape), lse.unflatten(0, shape), chunks)


def read_backward(
    stock: Stock,
    grad_out: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    if len(keys) == 0:
        return torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    chunks = cut_into_chunks(offsets, stock.chunk_size(queries, len(keys)))
    grad_out, copies, out, lse = (_copy_to_chunks(x, chunks) for x in (grad_out, queries, out, lse))
    grad_queries, grad_keys, grad_values = stock.backward(
        grad_out, copies, keys, values, out, lse, _latent_bounds(queries, chunks), chunks.bounds
    )
    return _sum_chunks(grad_queries.unflatten(0, (-1, queries.shape[1])), chunks), grad_keys, grad_values


def write_forward(
    stock: Stock, queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]
) -> tuple[Tensor, Tensor]:
    if len(queries) == 0:
        return torch.zeros_like(queries), queries.new_zeros(queries.shape[:-1], dtype=accumulator(queries.dtype))
    chunks = cut_into_chunks(offsets, stock.chunk_size(keys, len(queries)))
    keys, values, latents = _copy_to_chunks(keys, chunks), _copy_to_chunks(values, chunks), _latent_bounds(keys, chunks)
    return stock.forward(queries, keys, values, chunks.bounds, latents)


def write_backward(
    stock: Stock,
    grad_out: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    if len(queries) == 0:
        return torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    chunks = cut_into_chunks(offsets, stock.chunk_size(keys, len(queries)))
    grad_queries, grad_keys, grad_values = stock.backward(
        grad_out,
        queries,
        _copy_to_chunks(keys, chunks),
        _copy_to_chunks(values, chunks),
        out,
        lse,
        chunks.bounds,
        _latent_bounds(keys, chunks),
    )
    shape = (-1, keys.shape[1])
    return (
        grad_queries,
        _sum_chunks(grad_keys.unflatten(0, shape), chunks),
        _sum_chunks(grad_values.unflatten(0, shape), chunks),
    )


def self_forward(
    stock: Stock, queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]
) -> tuple[Tensor, Tensor]:
    if len(queries) == 0:
        return torch.zeros_like(queries), queries.new_zeros(queries.shape[:-1], dtype=accumulator(queries.dtype))
    bounds = sorted(set(offsets))
    return stock.forward(queries, keys, values, bounds, bounds)


def self_backward(
    stock: Stock,
    grad_out: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    if len(queries) == 0:
        return torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    bounds = sorted(set(offsets))
    return stock.backward(grad_out, queries, keys, values, out, lse, bounds, bounds)


def cut_into_chunks(offsets: list[int], size: int) -> Chunks:
    """Each context in as few chunks of at most `size` tokens as can be, their lengths one apart at most."""
    bounds, counts = [0], []
    for start, stop in pairwise(offsets):
        count = -(-(stop - start) // size)
        counts.append(count)
        for chunk in range(count):
            length = (stop - start) // count + (chunk < (stop - start) % count)
            bounds.append(bounds[-1] + length)
    return Chunks(bounds, counts)


def _latent_bounds(latents: Tensor, chunks: Chunks) -> range:
    num_latents = latents.shape[1]
    return range(0, sum(chunks.counts) * num_latents + 1, num_latents)


def _copy_to_chunks(latents: Tensor, chunks: Chunks) -> Tensor:
    """(contexts, M, ...) to (chunks · M, ...): each chunk's context."""
    if all(count == 1 for count in chunks.counts):
        return latents.flatten(0, 1)
    contexts = [context for context, count in enumerate(chunks.counts) for _ in range(count)]
    return latents[torch.tensor(contexts, device=latents.device)].flatten(0, 1)


def _merge_chunks(outs: Tensor, lses: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """(chunks, M, H, D) and (chunks, M, H) to (contexts, M, H, D) and (contexts, M, H)."""
    if all(count == 1 for count in chunks.counts):
        return outs, lses
    out = outs.new_zeros((len(chunks.counts), *outs.shape[1:]))
    lse = lses.new_full((len(chunks.counts), *lses.shape[1:]), NO_KEYS)
    for contexts, members in _contexts_of_equal_count(chunks, outs.device):
        merged_out, merged_lse = merge(outs[members], lses[members])
        out[contexts], lse[contexts] = merged_out.to(out.dtype), merged_lse
    return out, lse


def _sum_chunks(parts: Tensor, chunks: Chunks) -> Tensor:
    """(chunks, M, H, D) to (contexts, M, H, D)."""
    if all(count == 1 for count in chunks.counts):
        return parts
    total = parts.new_zeros((len(chunks.counts), *parts.shape[1:]))
    for contexts, members in _contexts_of_equal_count(chunks, parts.device):
        total[contexts] = parts[members].sum(dim=0, dtype=accumulator(parts.dtype)).to(parts.dtype)
    return total


def _contexts_of_equal_count(chunks: Chunks, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of contexts (g,) and their chunks (count, g), for every count but 0."""
    firsts: dict[int, list[tuple[int, int]]] = {}
    first = 0
    for context, count in enumerate(chunks.counts):
        firsts.setdefault(count, []).append((context, first))
        first += count
    for count, pairs in firsts.items():
        if count > 0:
            contexts, members = torch.tensor(pairs, device=device).unbind(dim=1)
            yield contexts, members + torch.arange(count, device=device).unsqueeze(1)
