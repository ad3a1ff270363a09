"""How packs are cut, folded and batched for a stock kernel."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cctrain.model.kernels import flash_cpu, flash_cuda
from cctrain.model.kernels.folded import Stock, cut_into_chunks, fold
from tests.allocator import allocated
from tests.model.attention_reference import KINDS, Case, case, expected, largest_error


def run(case: Case, chunk_size: int) -> dict[str, torch.Tensor]:
    kernels = fold(Stock(flash_cpu.forward, flash_cpu.backward, lambda latents, total: chunk_size))
    inputs = case.queries, case.keys, case.values
    out, lse = getattr(kernels, f"{case.kind}_forward")(*inputs, case.offsets)
    grads = getattr(kernels, f"{case.kind}_backward")(case.grad_out, *inputs, out, lse, case.offsets)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    num_latents=st.integers(1, 6),
    chunk_size=st.integers(1, 12),
    few_tokens=st.sampled_from([0, 256]),
)
def test_chunks_of_any_size_give_the_formula(kind, lengths, num_latents, chunk_size, few_tokens):
    given_case = case(kind, lengths, num_latents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_cpu, "FEW_TOKENS", few_tokens)
        assert largest_error(run(given_case, chunk_size), expected(given_case)) < 1e-11


@given(lengths=st.lists(st.integers(0, 30), max_size=6), size=st.integers(1, 12))
def test_contexts_are_cut_into_even_chunks_no_larger_than_asked_for(lengths, size):
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    chunks = cut_into_chunks(offsets, size)
    sizes = [stop - start for start, stop in pairwise(chunks.bounds)]
    assert chunks.counts == [-(-length // size) for length in lengths]
    for length, count in zip(lengths, chunks.counts, strict=True):
        own, sizes = sizes[:count], sizes[count:]
        assert sum(own) == length
        assert count == 0 or 0 < max(own) <= min(size, min(own) + 1)


@given(heads=st.integers(1, 12), threads=st.integers(1, 16))
def test_a_long_context_has_the_fewest_chunks_that_give_each_thread_as_many_heads(heads, threads):
    total = 8 * 9 * 5 * 7 * 11 * 13  # as many chunks as threads, without a remainder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(flash_cpu, "SMALLEST_CHUNK", 1)
        patch.setattr(flash_cpu, "LARGEST_CHUNK", total)
        size = flash_cpu.chunk_size(torch.empty(1, 64, heads, 8), total)
    even = [number for number in range(1, threads + 1) if number * heads % threads == 0]
    assert -(-total // size) == even[0]


@pytest.mark.parametrize(("threads", "total", "expected"), [(1, 100_000, 4096), (64, 4096, 512), (2, 3000, 3000)])
def test_a_chunk_is_neither_too_short_nor_too_long(threads, total, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert flash_cpu.chunk_size(torch.empty(1, 64, 4, 8), total) == expected


def calls_of(kind: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often one forward calls PyTorch's operator."""
    calls = []
    real = flash_cpu._forward
    monkeypatch.setattr(flash_cpu, "_forward", lambda *args: calls.append(1) or real(*args))
    given_case = case(kind, lengths).to(torch.float32)
    inputs = given_case.queries, given_case.keys, given_case.values
    getattr(flash_cpu.KERNELS, f"{kind}_forward")(*inputs, given_case.offsets)
    return len(calls)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 100, 600])
def test_equal_contexts_are_attended_in_one_call(kind, length, monkeypatch):
    assert calls_of(kind, [length] * 64, monkeypatch) == 1


@pytest.mark.parametrize("kind", ["read", "write"])
def test_long_contexts_are_attended_in_two_calls_each_at_most(kind, monkeypatch):
    assert calls_of(kind, [4097, 4097, 6500, 10_001], monkeypatch) <= 8


@pytest.mark.parametrize("kind", KINDS)
def test_small_contexts_of_few_lengths_are_attended_in_a_call_for_each_length(kind, monkeypatch):
    assert calls_of(kind, [3, 50, 3, 7, 50, 0, 3, 7, 7, 50], monkeypatch) == 3


def kept_of_lengths(attend: Callable[[torch.Tensor, int], object], lengths: range) -> int:
    """Bytes of the process in the end that it did not hold in the beginning."""
    before = allocated()
    for length in lengths:
        attend(torch.ones(length, 2, 8, dtype=torch.bfloat16), length)
    return allocated() - before


def test_self_attention_in_bf16_keeps_nothing_of_the_lengths_that_contexts_had():
    def operators_own(rows: torch.Tensor, length: int) -> None:
        flash_cpu._forward(*3 * [rows.transpose(0, 1).unsqueeze(0)])

    def ours(rows: torch.Tensor, length: int) -> None:
        flash_cpu.KERNELS.self_forward(rows, rows, rows, [0, length])

    for attend in (operators_own, ours):
        kept_of_lengths(attend, range(1025, 1030))
    if kept_of_lengths(operators_own, range(1030, 1062)) < 4e6:
        pytest.skip("on this CPU the operator itself keeps nothing: only with AMX does it")
    assert kept_of_lengths(ours, range(1062, 1094)) < 4e5


def test_evenly_spaced_sequences_are_not_copied():
    rows = torch.randn(40, 2, 3)
    assert flash_cpu._take(rows, (0, 10, 20), 7).data_ptr() == rows.data_ptr()
    torch.testing.assert_close(flash_cpu._take(rows, (0, 10, 20), 7)[1].transpose(0, 1), rows[10:17])
    torch.testing.assert_close(flash_cpu._take(rows, (0, 10, 21), 7)[2].transpose(0, 1), rows[21:28])


@pytest.mark.parametrize(
    ("forward", "backward", "dtype"),
    [
        (flash_cuda.flash_forward, flash_cuda.flash_backward, torch.bfloat16),
        (flash_cuda.cutlass_forward, flash_cuda.cutlass_backward, torch.float32),
    ],
)
def test_cuda_kernels_are_called_as_pytorch_declares_them(forward, backward, dtype):
    """On the meta device, which computes shapes alone: no GPU is needed."""
    queries, keys = (torch.empty(rows, 4, 64, dtype=dtype, device="meta") for rows in (24, 20))
    bounds = [0, 8, 16, 24], [0, 5, 9, 20]
    out, lse = forward(queries, keys, keys, *bounds)
    assert (out.shape, lse.shape, lse.dtype) == (queries.shape, (24, 4), torch.float32)
    grads = backward(out, queries, keys, keys, out, lse, *bounds)
    assert [grad.shape for grad in grads] == [queries.shape, keys.shape, keys.shape]


def test_deterministic_algorithms_are_asked_for_and_then_left_as_they_were():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with flash_cuda._deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert before == (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
