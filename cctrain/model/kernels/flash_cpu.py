"""PyTorch's CPU flash attention over packed sequences: fp64, fp32, bf16 and fp16.

Its operator wants a batch of sequences of one shape. Sequences of equal shape are therefore called together:
those whose starts are evenly spaced as a view of the pack, without a copy. Shapes of few tokens, of which a pack
can have many at any place, are copied together instead, because there a call costs more than a copy; for long ones
a copy would cost as much as a forward pass (67 MB of keys and values: 33 ms to copy, 38 ms to attend from 64
queries, one core of a shared machine).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from cctrain.model.kernels.folded import Stock, fold

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Long enough that a chunk's own work hides its latents' copies, short enough to stay in the cache.
SMALLEST_CHUNK, LARGEST_CHUNK = 512, 4096
# The longest sequences that are worth copying into one call.
FEW_TOKENS = 256

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Starts = tuple[int, ...]


def forward(
    queries: Tensor, keys: Tensor, values: Tensor, query_bounds: Sequence[int], key_bounds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for asking, answering in _batches(query_bounds, key_bounds):
        out, lse = _forward(_take(queries, *asking), _take(keys, *answering), _take(values, *answering))
        outs.append((asking, out))
        lses.append((asking, lse.unsqueeze(-1)))
    return _packed(outs, len(queries)), _packed(lses, len(queries)).squeeze(-1)


def backward(
    grad_out: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    query_bounds: Sequence[int],
    key_bounds: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_queries, grad_keys, grad_values = [], [], []
    for asking, answering in _batches(query_bounds, key_bounds):
        grads = _backward(
            _take(grad_out, *asking),
            _take(queries, *asking),
            _take(keys, *answering),
            _take(values, *answering),
            _take(out, *asking),
            _take(lse.unsqueeze(-1), *asking).squeeze(-1),
            0.0,
            False,
        )
        grad_queries.append((asking, grads[0]))
        grad_keys.append((answering, grads[1]))
        grad_values.append((answering, grads[2]))
    return _packed(grad_queries, len(queries)), _packed(grad_keys, len(keys)), _packed(grad_values, len(values))


def _batches(
    query_bounds: Sequence[int], key_bounds: Sequence[int]
) -> Iterator[tuple[tuple[Starts, int], tuple[Starts, int]]]:
    """Sequences to call together: (starts, length) of their queries and of their keys."""
    by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (query_start, query_stop), (key_start, key_stop) in zip(
        pairwise(query_bounds), pairwise(key_bounds), strict=True
    ):
        shape = query_stop - query_start, key_stop - key_start
        by_shape.setdefault(shape, []).append((query_start, key_start))
    for (num_queries, num_keys), starts in by_shape.items():
        for run in [starts] if max(num_queries, num_keys) <= FEW_TOKENS else _evenly_spaced(starts):
            query_starts, key_starts = zip(*run, strict=True)
            yield (query_starts, num_queries), (key_starts, num_keys)


def _evenly_spaced(starts: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The list cut into runs with one step each for queries and for keys."""
    runs = [starts[:1]]
    for start in starts[1:]:
        run = runs[-1]
        if len(run) == 1 or _step(run[-1], start) == _step(run[0], run[1]):
            run.append(start)
        else:
            runs.append([start])
    return runs


def _step(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return other[0] - one[0], other[1] - one[1]


def _take(rows: Tensor, starts: Starts, length: int) -> Tensor:
    """Sequences (rows, H, D) at these starts as a batch (g, H, length, D): a view if they are evenly spaced."""
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    steps = {other - one for one, other in pairwise(starts)}
    if len(steps) > 1:
        return torch.stack([rows[start : start + length] for start in starts]).transpose(1, 2)
    row, head, _ = rows.stride()
    shape = (len(starts), rows.shape[1], length, rows.shape[2])
    first = rows.storage_offset() + starts[0] * row
    return rows.as_strided(shape, (sum(steps) * row, head, row, 1), first)


def _packed(batches: list[tuple[tuple[Starts, int], Tensor]], num_rows: int) -> Tensor:
    """The inverse of `_take`: batches (g, H, length, D) that hold every sequence, to rows (num_rows, H, D)."""
    if len(batches) == 1:
        return batches[0][1].transpose(1, 2).flatten(0, 1)
    _, heads, _, width = batches[0][1].shape
    rows = batches[0][1].new_empty(num_rows, heads, width)
    for (starts, length), batch in batches:
        for start, sequence in zip(starts, batch.transpose(1, 2), strict=True):
            rows[start : start + length] = sequence
    return rows


def chunk_size(latents: Tensor, total: int) -> int:
    """Tokens in a chunk such that all of them give each thread as much to do: the operator's backward is parallel over
    the heads of a chunk."""
    heads, threads = latents.shape[2], torch.get_num_threads()
    num_chunks = math.lcm(heads, threads) // heads
    return min(LARGEST_CHUNK, max(SMALLEST_CHUNK, -(-total // num_chunks)))


def why_not(queries: Tensor) -> str | None:
    """Why this backend cannot run on such a tensor, or None."""
    if queries.device.type != "cpu":
        return "it is for the CPU"
    if queries.dtype not in DTYPES:
        return "it knows fp64, fp32, bf16 and fp16 only"
    return None


_FOLDED = fold(Stock(forward, backward, chunk_size))


def self_forward(queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor]:
    """Without oneDNN, which makes a difference in bf16 on CPUs with AMX alone. There the operator has oneDNN compile
    products for the last block of a sequence, and each thread keeps them for ever: 0.3 MB for each length that a
    context had, and the heap stays in pieces around them. A training held a third more by it after 24 steps. Without
    it this forward takes a fifth to a third longer, a twentieth of forward and backward. Reads and writes keep a fifth
    as much, since latents are as many in all contexts, and stay as fast as they are."""
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        return _FOLDED.self_forward(queries, keys, values, offsets)


KERNELS = replace(_FOLDED, self_forward=self_forward)
