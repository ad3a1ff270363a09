"""Packed attention: many contexts of any length in one flat array, none of which sees another.

    read   latents read the tokens    Q = latents (M per context)   K, V = tokens (n of the context)
    write  tokens read the latents    Q = tokens                    K, V = latents
    self   tokens read each other     the dense control

Each is softmax(Q Kᵀ / √D) V within one context. The cost of read and write is n·M, of self n². Nothing is padded,
and no FLOP is spent on another context's tokens. `kernels/` does the arithmetic.

A read may see its keys in parts: in tiles, one after the other, and in shards, one on each of several ranks. The
parts' results are merged exactly (`merge`). The backward needs no second merge: a part's own backward, given the
out and lse of the *whole*, yields that part's share of every gradient.

Shapes: H heads of D dimensions; `total` is the number of tokens of the whole pack; context i holds the tokens
`offsets[i]:offsets[i + 1]`. Offsets are a list of Python integers: they shape the computation, so they live on
the host.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cctrain.model.kernels.choice import choose
from cctrain.model.kernels.interface import Backward, Forward
from cctrain.model.merge import Exchange, accumulator, merge, merge_shards


def read(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: list[int],
    *,
    backend: str = "auto",
    exchange: Exchange | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents (contexts, M, H, D) read keys and values (total, H, D): out (contexts, M, H, D), lse (contexts, M, H).

    Out has the dtype of the queries; lse, which has no gradient, is fp32 (fp64 for fp64). A context without tokens
    reads exactly 0 and gives no gradient. With an exchange, keys are this shard's part of every context, out and
    lse are over all shards, and the gradient of the queries is this shard's summand.
    """
    reading = Reading(exchange, backend)
    return reading.result([reading.tile(queries, keys, values, offsets)])


def write(queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int], *, backend: str = "auto") -> Tensor:
    """Tokens (total, H, D) read the latents (contexts, M, H, D) of their context; returns (total, H, D)."""
    _check(offsets, contexts=keys, tokens=queries)
    kernels = choose(backend, queries)
    return _Attention.apply(queries, keys, values, offsets, kernels.write_forward, kernels.write_backward)


def self_attention(
    queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int], *, backend: str = "auto"
) -> Tensor:
    """Tokens (total, H, D) read all tokens of their context; returns (total, H, D)."""
    _check(offsets, contexts=offsets[1:], tokens=queries)
    kernels = choose(backend, queries)
    return _Attention.apply(queries, keys, values, offsets, kernels.self_forward, kernels.self_backward)


class Reading:
    """One read whose keys come in tiles, so that keys and values of all tokens are never held together.

        reading = Reading(exchange)
        links = [reading.tile(queries, keys, values, offsets) for keys, values, offsets in tiles]
        out, lse = reading.result(links)

    Each tile may be computed, projections and all, under `torch.utils.checkpoint(use_reentrant=False)`. What is
    recomputed then is the projections: a call of `tile` after `result` attends to nothing and exchanges nothing,
    because the backward asks only for the tile's queries, keys and values and for the out and lse of the whole.

    A link is a zero shaped like the queries. It carries no number: through it, autograd takes the gradient of out to
    every tile. A Reading serves one forward; its backward may be repeated if the graph is retained.
    """

    def __init__(self, exchange: Exchange | None = None, backend: str = "auto"):
        self._exchange = exchange
        self._backend = backend
        self._so_far: tuple[Tensor, Tensor] | None = None
        self._has_result = False
        # Only during a backward, so that a graph that outlives it holds no activations.
        self._whole: tuple[Tensor, Tensor] | None = None
        self._tiles_to_go = 0

    def tile(self, queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> Tensor:
        """Attend from queries (contexts, M, H, D) to a tile's keys and values (t, H, D), and return its link.

        Offsets are those of the tile, for all contexts, of which many may have no token in it. Every tile is given
        the same queries.
        """
        _check(offsets, contexts=queries, tokens=keys)
        return _Tile.apply(queries, keys, values, offsets, self)

    def result(self, links: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Out (contexts, M, H, D) and lse (contexts, M, H) over all tiles, and over all shards."""
        return _Result.apply(self, *links)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> None:
        if self._has_result:
            return
        part = choose(self._backend, queries).read_forward(queries, keys, values, offsets)
        if self._so_far is None:
            self._so_far = part
        else:
            outs, lses = zip(self._so_far, part, strict=True)
            self._so_far = merge(torch.stack([x.to(accumulator(x.dtype)) for x in outs]), torch.stack(lses))

    def _finish(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self._so_far is not None, "a Reading has one tile at least, and one result"
        out, lse = self._so_far
        if self._exchange is not None:
            out, lse = merge_shards(out, lse, self._exchange)
        self._so_far, self._has_result = None, True
        return out.to(dtype), lse

    def _begin_backward(self, grad_out: Tensor, out: Tensor, lse: Tensor, num_tiles: int) -> Tensor:
        self._whole, self._tiles_to_go = (out, lse), num_tiles
        if self._exchange is None:
            return grad_out
        # A copy, because the sum may be made in place, and not in bf16, because it is one.
        total = grad_out.to(accumulator(grad_out.dtype), memory_format=torch.contiguous_format, copy=True)
        return self._exchange.sum(total).to(grad_out.dtype)

    def _tile_backward(
        self, grad_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert self._whole is not None, "a tile's gradient comes through the result"
        out, lse = self._whole
        self._tiles_to_go -= 1
        if self._tiles_to_go == 0:
            self._whole = None
        backward = choose(self._backend, queries).read_backward
        return backward(grad_out, queries, keys, values, out, lse, offsets)


class _Tile(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int], reading: Reading
    ) -> Tensor:
        ctx.save_for_backward(queries, keys, values)
        ctx.offsets, ctx.reading = offsets, reading
        reading._attend(queries, keys, values, offsets)
        return queries.new_zeros(()).expand(queries.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *ctx.reading._tile_backward(grad_out, *ctx.saved_tensors, ctx.offsets), None, None


class _Result(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reading: Reading, *links: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, lse = reading._finish(links[0].dtype)
        ctx.reading, ctx.num_tiles = reading, len(links)
        ctx.save_for_backward(out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_out = ctx.reading._begin_backward(grad_out, *ctx.saved_tensors, ctx.num_tiles)
        return None, *[grad_out] * ctx.num_tiles


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        offsets: list[int],
        forward: Forward,
        backward: Backward,
    ) -> Tensor:
        out, lse = forward(queries, keys, values, offsets)
        ctx.save_for_backward(queries, keys, values, out, lse)
        ctx.offsets, ctx.kernel = offsets, backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, keys, values, out, lse = ctx.saved_tensors
        return *ctx.kernel(grad_out, queries, keys, values, out, lse, ctx.offsets), None, None, None


def _check(offsets: list[int], contexts: Tensor | list[int], tokens: Tensor) -> None:
    if len(offsets) != len(contexts) + 1 or offsets[0] != 0 or offsets[-1] != len(tokens):
        raise ValueError(
            f"Offsets of {len(contexts)} contexts with {len(tokens)} tokens are {len(contexts) + 1} integers from 0 "
            f"to {len(tokens)}, not {len(offsets)} from {offsets[0]} to {offsets[-1]}."
        )
