"""PyTorch's CUDA attention kernels over packed sequences: FlashAttention-2 for bf16 and fp16, cutlass for fp32.

Both take cumulative lengths, so chunks of a context are just more sequences and a pack is one call. Backward asks
for the kernels' deterministic form: without it FlashAttention adds into dQ in the order in which blocks happen to
finish (https://github.com/Dao-AILab/flash-attention, `deterministic`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cctrain.model.kernels.folded import Stock, fold

# Rows of queries, or of keys in backward, that one block of a flash kernel works on.
BLOCK = 128
# Below this, a chunk's latents and its partial result outweigh its own tokens.
SMALLEST_CHUNK = 512
# cutlass stores lse of each sequence in rows of a multiple of this.
LSE_ALIGNMENT = 32

NO_DROPOUT = 0.0
NOT_CAUSAL = False
NO_MASK = 0


def chunk_size(latents: Tensor, total: int) -> int:
    """Tokens in a chunk such that all of them make two waves of blocks over the multiprocessors."""
    _, num_latents, heads, _ = latents.shape
    multiprocessors = torch.cuda.get_device_properties(latents.device).multi_processor_count
    blocks_per_chunk = heads * -(-num_latents // BLOCK)
    num_chunks = -(-2 * multiprocessors // blocks_per_chunk)
    return max(SMALLEST_CHUNK, -(-total // num_chunks))


def flash_forward(
    queries: Tensor, keys: Tensor, values: Tensor, query_bounds: Sequence[int], key_bounds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _dense_rows(queries),
        _dense_rows(keys),
        _dense_rows(values),
        _on_device(query_bounds, queries),
        _on_device(key_bounds, queries),
        _longest(query_bounds),
        _longest(key_bounds),
        NO_DROPOUT,
        NOT_CAUSAL,
        False,
    )
    return out, lse.transpose(0, 1)


def flash_backward(
    grad_out: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    query_bounds: Sequence[int],
    key_bounds: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    no_random_state = torch.empty(2, dtype=torch.uint64, device=queries.device)
    with _deterministic():
        return torch.ops.aten._flash_attention_backward(
            grad_out.contiguous(),
            _dense_rows(queries),
            _dense_rows(keys),
            _dense_rows(values),
            out.contiguous(),
            lse.transpose(0, 1).contiguous(),
            _on_device(query_bounds, queries),
            _on_device(key_bounds, queries),
            _longest(query_bounds),
            _longest(key_bounds),
            NO_DROPOUT,
            NOT_CAUSAL,
            no_random_state,
            no_random_state,
        )


def cutlass_forward(
    queries: Tensor, keys: Tensor, values: Tensor, query_bounds: Sequence[int], key_bounds: Sequence[int]
) -> tuple[Tensor, Tensor]:
    out, padded_lse, *_ = torch.ops.aten._efficient_attention_forward(
        _dense_rows(queries).unsqueeze(0),
        _dense_rows(keys).unsqueeze(0),
        _dense_rows(values).unsqueeze(0),
        None,
        _on_device(query_bounds, queries),
        _on_device(key_bounds, queries),
        _longest(query_bounds),
        _longest(key_bounds),
        NO_DROPOUT,
        NO_MASK,
        True,
    )
    sequence, place = _sequence_and_place(query_bounds, queries)
    return out.squeeze(0), padded_lse[sequence, :, place]


def cutlass_backward(
    grad_out: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    lse: Tensor,
    query_bounds: Sequence[int],
    key_bounds: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    sequence, place = _sequence_and_place(query_bounds, queries)
    padded_length = -(-_longest(query_bounds) // LSE_ALIGNMENT) * LSE_ALIGNMENT
    # exp(score − ∞) is 0: what lies beyond a sequence weighs nothing.
    padded_lse = lse.new_full((len(query_bounds) - 1, queries.shape[1], padded_length), float("inf"))
    padded_lse[sequence, :, place] = lse
    no_random_state = torch.empty((), dtype=torch.int64, device=queries.device)
    with _deterministic():
        grad_queries, grad_keys, grad_values, _ = torch.ops.aten._efficient_attention_backward(
            grad_out.contiguous().unsqueeze(0),
            _dense_rows(queries).unsqueeze(0),
            _dense_rows(keys).unsqueeze(0),
            _dense_rows(values).unsqueeze(0),
            None,
            out.contiguous().unsqueeze(0),
            _on_device(query_bounds, queries),
            _on_device(key_bounds, queries),
            _longest(query_bounds),
            _longest(key_bounds),
            padded_lse,
            NO_DROPOUT,
            no_random_state,
            no_random_state,
            NO_MASK,
            False,
        )
    return grad_queries.squeeze(0), grad_keys.squeeze(0), grad_values.squeeze(0)


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms, without the filling of new memory that it adds for debugging."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = filled


def _sequence_and_place(bounds: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """For each row, the sequence that it is in and its place there."""
    starts = torch.tensor(bounds[:-1], device=like.device)
    lengths = torch.tensor([stop - start for start, stop in pairwise(bounds)], device=like.device)
    rows = torch.arange(bounds[-1], device=like.device)
    sequence = torch.repeat_interleave(lengths, output_size=bounds[-1])
    return sequence, rows - starts[sequence]


def _on_device(bounds: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=like.device)


def _longest(bounds: Sequence[int]) -> int:
    return max(stop - start for start, stop in pairwise(bounds))


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def why_not_flash(queries: Tensor) -> str | None:
    """Why FlashAttention cannot run on such a tensor, or None."""
    if queries.device.type != "cuda":
        return "it is for CUDA devices"
    if queries.dtype not in (torch.bfloat16, torch.float16):
        return "it knows bf16 and fp16 only"
    if queries.shape[-1] % 8 != 0 or queries.shape[-1] > 256:
        return "a head must be a multiple of 8 wide, 256 at most"
    if torch.cuda.get_device_capability(queries.device) < (8, 0):
        return "the device is older than Ampere"
    return None


def why_not_cutlass(queries: Tensor) -> str | None:
    """Why the cutlass kernels cannot run on such a tensor, or None."""
    if queries.device.type != "cuda":
        return "it is for CUDA devices"
    if queries.dtype != torch.float32:
        return "it knows fp32 only"
    if queries.shape[-1] % 4 != 0:
        return "a head must be a multiple of 4 wide"
    return None


FLASH = fold(Stock(flash_forward, flash_backward, chunk_size))
CUTLASS = fold(Stock(cutlass_forward, cutlass_backward, chunk_size))
