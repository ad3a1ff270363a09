"""Read, write and self-attention by every backend that can run here, beside float64 by the formula."""

import gc
import logging
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cctrain.errors import UsageError
from cctrain.model import attention
from cctrain.model.kernels import choice
from cctrain.model.kernels.interface import Kernels
from tests.model.attention_reference import KINDS, Case, ThreadedShards, case, expected, largest_error, shard_of
from tests.model.conftest import CUDA

LENGTHS = [
    [6],
    [3, 0, 7, 1],
    [0, 2],
    [4, 0],
    [0],
    [0, 0],
    [1, 1, 1],
    [2, 9, 2, 9, 2, 2],
    [700, 3, 700, 5],
]
LONG = [5001, 2048, 0, 2049]
PACKS = [(kind, lengths) for kind in KINDS for lengths in (LENGTHS if kind == "self" else [*LENGTHS, LONG])]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RUNS = [
    *(pytest.param("reference", dtype, "cpu") for dtype in TOLERANCE),
    *(pytest.param("flash_cpu", dtype, "cpu") for dtype in TOLERANCE),
    *(pytest.param("flash_cuda", dtype, "cuda", marks=CUDA) for dtype in (torch.bfloat16, torch.float16)),
    pytest.param("cutlass_cuda", torch.float32, "cuda", marks=CUDA),
    pytest.param("reference", torch.float32, "cuda", marks=CUDA),
]


def run(case: Case, backend: str = "auto") -> dict[str, Tensor]:
    """Out, the gradients and, of a read, lse, by the public functions."""
    inputs = [x.detach().requires_grad_() for x in (case.queries, case.keys, case.values)]
    if case.kind == "read":
        out, lse = attention.read(*inputs, case.offsets, backend=backend)
        result = {"out": out, "lse": lse}
    else:
        function = attention.write if case.kind == "write" else attention.self_attention
        result = {"out": function(*inputs, case.offsets, backend=backend)}
    grads = torch.autograd.grad(result["out"], inputs, case.grad_out)
    return {**result, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@pytest.mark.parametrize(("kind", "lengths"), PACKS, ids=str)
@pytest.mark.parametrize(("backend", "dtype", "device"), RUNS)
def test_attention_and_its_gradients_follow_the_formula_context_by_context(kind, backend, dtype, device, lengths):
    given_case = case(kind, lengths).to(dtype, device)
    result = run(given_case, backend)
    assert result["out"].dtype == dtype
    if kind == "read":
        assert result["lse"].dtype == torch.promote_types(dtype, torch.float32)
    assert largest_error(result, expected(given_case)) < TOLERANCE[dtype]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    num_latents=st.integers(1, 50),
    heads=st.integers(1, 3),
    width=st.integers(1, 9),
    backend=st.sampled_from(["flash_cpu", "reference"]),
    seed=st.integers(0, 10),
)
def test_no_shape_is_special(kind, lengths, num_latents, heads, width, backend, seed):
    given_case = case(kind, lengths, num_latents, heads, width, seed)
    assert largest_error(run(given_case, backend), expected(given_case)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_two_runs_give_the_same_bits(kind, dtype, device):
    given_case = case(kind, [5001, 3, 300, 3], num_latents=7).to(dtype, device)
    one, other = run(given_case), run(given_case)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_may_be_slices_of_one_projection(kind):
    given_case = case(kind, [30, 2, 5])
    strided = [torch.stack([x, x], dim=-2).unbind(dim=-2)[0] for x in (given_case.keys, given_case.values)]
    assert not strided[0].is_contiguous()
    given_case = replace(given_case, keys=strided[0], values=strided[1])
    assert largest_error(run(given_case), expected(given_case)) < 1e-11


@pytest.mark.parametrize("backend", ["reference", "flash_cpu"])
def test_a_context_without_tokens_reads_exactly_zero_and_gives_no_gradient(backend):
    given_case = case("read", [3, 0, 2])
    result = run(given_case, backend)
    assert torch.count_nonzero(result["out"][1]) == torch.count_nonzero(result["dq"][1]) == 0
    assert torch.count_nonzero(result["out"][[0, 2]]) == result["out"][[0, 2]].numel()


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_do_not_see_each_other(kind):
    one = case(kind, [4, 600, 3])
    other = replace(one, keys=one.keys.clone(), values=one.values.clone())
    own = slice(1, 2) if kind == "write" else slice(4, 604)
    other.keys[own] += 1
    other.values[own] -= 1
    rest = [0, 2] if kind == "read" else [*range(4), *range(604, 607)]
    assert torch.equal(run(one)["out"][rest], run(other)["out"][rest])


def test_offsets_that_do_not_fit_the_pack_are_refused():
    given_case = case("read", [3, 2])
    with pytest.raises(ValueError, match="Offsets of 2 contexts with 5 tokens"):
        attention.read(given_case.queries, given_case.keys, given_case.values, [0, 3])
    with pytest.raises(ValueError, match="not 3 from 0 to 4"):
        attention.read(given_case.queries, given_case.keys, given_case.values, [0, 3, 4])


# Tiles


def cuts_of(offsets: list[int], cuts: list[int]) -> Iterator[tuple[slice, list[int]]]:
    """The tiles between these places in the pack, each with its own offsets for all contexts."""
    bounds = [0, *sorted(min(cut, offsets[-1]) for cut in cuts), offsets[-1]]
    for first, last in pairwise(bounds):
        yield slice(first, last), [min(max(offset, first), last) - first for offset in offsets]


def read_in_tiles(case: Case, cuts: list[int], checkpointed: bool = False, backend: str = "auto") -> dict[str, Tensor]:
    queries, keys, values = (x.detach().requires_grad_() for x in (case.queries, case.keys, case.values))
    reading = attention.Reading(backend=backend)

    def tile(queries: Tensor, tokens: slice, offsets: list[int]) -> Tensor:
        # Products, so that there is something to recompute.
        return reading.tile(queries, keys[tokens] * 1, values[tokens] * 1, offsets)

    links = []
    for tokens, offsets in cuts_of(case.offsets, cuts):
        if checkpointed:
            links.append(checkpoint(tile, queries, tokens, offsets, use_reentrant=False, preserve_rng_state=False))
        else:
            links.append(tile(queries, tokens, offsets))
    out, lse = reading.result(links)
    grads = torch.autograd.grad(out, (queries, keys, values), case.grad_out)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    checkpointed=st.booleans(),
    backend=st.sampled_from(["flash_cpu", "reference"]),
)
def test_tiles_may_be_cut_anywhere(lengths, cuts, checkpointed, backend):
    given_case = case("read", lengths)
    result = read_in_tiles(given_case, cuts, checkpointed, backend)
    assert largest_error(result, expected(given_case)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_tiles_are_as_accurate_as_one(dtype):
    given_case = case("read", [1600, 480]).to(dtype)
    result = read_in_tiles(given_case, [130 * i for i in range(1, 16)])
    assert largest_error(result, expected(given_case)) < TOLERANCE[dtype]


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often the read's kernels run, from now on."""
    calls = {"forward": 0, "backward": 0}
    real = choice.BACKENDS["reference"][0]

    def forward(*args):
        calls["forward"] += 1
        return real.read_forward(*args)

    def backward(*args):
        calls["backward"] += 1
        return real.read_backward(*args)

    kernels: Kernels = replace(real, read_forward=forward, read_backward=backward)
    monkeypatch.setattr(attention, "choose", lambda backend, queries: kernels)
    return calls


def test_recomputing_checkpointed_tiles_attends_to_nothing_again(monkeypatch):
    calls = counted(monkeypatch)
    given_case = case("read", [7, 0, 5])
    result = read_in_tiles(given_case, [2, 8], checkpointed=True)
    assert calls == {"forward": 3, "backward": 3}
    assert largest_error(result, expected(given_case)) < 1e-11


def test_recomputing_checkpointed_tiles_exchanges_nothing_again():
    given_case = case("read", [7, 0, 5])
    shards = ThreadedShards(3)

    def on(shard, exchange):
        keys, values, offsets, _ = shard_of(given_case, shard, 3)
        queries, keys = given_case.queries.clone().requires_grad_(), keys.requires_grad_()
        reading = attention.Reading(exchange)
        links = [
            checkpoint(
                lambda own, part: reading.tile(queries, keys[own] * 1, values[own], part),
                own,
                part,
                use_reentrant=False,
            )
            for own, part in cuts_of(offsets, [2])
        ]
        out, _ = reading.result(links)
        return torch.autograd.grad(out, queries, given_case.grad_out)[0]

    grads = shards.run(on)
    assert shards.calls == ["gather", "sum"]
    # Each shard brings its own loss, of which it has this gradient; what is summed is then num_shards as large.
    torch.testing.assert_close(sum(grads), 3 * expected(given_case)["dq"], rtol=0, atol=1e-11)


def test_a_retained_graph_can_be_run_backward_twice():
    given_case = case("read", [7, 5])
    queries, keys = given_case.queries.clone().requires_grad_(), given_case.keys.clone().requires_grad_()
    out, _ = attention.read(queries, keys, given_case.values, given_case.offsets)
    one = torch.autograd.grad(out, (queries, keys), given_case.grad_out, retain_graph=True)
    other = torch.autograd.grad(out, (queries, keys), given_case.grad_out)
    assert all(map(torch.equal, one, other))


@torch.no_grad()
def test_tiles_can_be_read_without_a_graph():
    given_case = case("read", [7, 0, 5])
    reading = attention.Reading()
    tiles = [
        reading.tile(given_case.queries, given_case.keys[own], given_case.values[own], offsets)
        for own, offsets in cuts_of(given_case.offsets, [3, 9])
    ]
    out, lse = reading.result(tiles)
    assert not out.requires_grad
    assert largest_error({"out": out, "lse": lse}, expected(given_case)) < 1e-11


def test_a_link_is_zero_and_the_log_of_sums_has_no_gradient():
    given_case = case("read", [7, 0, 5])
    reading = attention.Reading()
    link = reading.tile(given_case.queries.requires_grad_(), given_case.keys, given_case.values, given_case.offsets)
    out, lse = reading.result([link])
    assert link.shape == given_case.queries.shape
    assert torch.count_nonzero(link) == 0
    assert out.requires_grad
    assert not lse.requires_grad


def storage_of(x: Tensor) -> weakref.ref:
    """Alive as long as anything, in Python or not, holds the tensor's memory."""
    return weakref.ref(x.untyped_storage())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_outlives_the_backward_even_while_the_loss_is_kept(checkpointed):
    given_case = case("read", [7, 5])
    leaves = [x.clone().requires_grad_() for x in (given_case.queries, given_case.keys, given_case.values)]
    held = []

    def tile(*leaves: Tensor) -> Tensor:
        projected = [x * 1 for x in leaves]
        held.extend(storage_of(x) for x in projected)
        return reading.tile(*projected, given_case.offsets)

    gc.collect()
    gc.disable()
    try:
        reading = attention.Reading()
        link = checkpoint(tile, *leaves, use_reentrant=False) if checkpointed else tile(*leaves)
        out, lse = reading.result([link])
        held += [storage_of(out), storage_of(lse)]
        loss = out.square().sum()
        loss.backward()
        del link, out, lse
        assert loss.grad_fn is not None
        assert [ref() for ref in held] == [None] * (8 if checkpointed else 5)
    finally:
        gc.enable()


def test_a_graph_that_is_never_run_backward_leaves_no_cycle():
    given_case = case("read", [7, 5])
    gc.collect()
    gc.disable()
    try:
        reading = attention.Reading()
        queries = given_case.queries.clone().requires_grad_()
        out, lse = reading.result([reading.tile(queries, given_case.keys, given_case.values, given_case.offsets)])
        held = [weakref.ref(reading), *map(storage_of, (queries, out, lse))]
        del reading, queries, out, lse
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


# Shards


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), *(("flash_cpu", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16))],
)
@pytest.mark.parametrize("num_shards", range(1, 10))
def test_shards_of_the_tokens_read_and_give_gradients_as_one_device_does(num_shards, backend, dtype):
    given_case = case("read", [11, 0, 2, 5, 1]).to(dtype)
    right = expected(given_case)
    share = given_case.grad_out / num_shards

    def on(shard, exchange):
        keys, values, offsets, rows = shard_of(given_case, shard, num_shards)
        inputs = [x.clone().requires_grad_() for x in (given_case.queries, keys, values)]
        out, lse = attention.read(*inputs, offsets, backend=backend, exchange=exchange)
        return out, lse, rows, torch.autograd.grad(out, inputs, share)

    grad_queries = torch.zeros_like(given_case.queries, dtype=torch.float64)
    grad_keys, grad_values = torch.zeros_like(given_case.keys), torch.zeros_like(given_case.values)
    shards = ThreadedShards(num_shards)
    for out, lse, rows, grads in shards.run(on):
        assert largest_error({"out": out, "lse": lse}, right) < TOLERANCE[dtype]
        assert torch.count_nonzero(out[1]) == torch.count_nonzero(grads[0][1]) == 0
        grad_queries += grads[0]
        grad_keys[rows], grad_values[rows] = grads[1], grads[2]
    assert largest_error({"dq": grad_queries, "dk": grad_keys, "dv": grad_values}, right) < TOLERANCE[dtype]
    assert shards.calls == (["gather", "sum"] if num_shards <= 8 else ["max", "sum", "sum"])


def test_a_shard_without_tokens_gives_gradients_of_no_row_and_of_exactly_zero():
    given_case = case("read", [1, 1])

    def on(shard, exchange):
        keys, values, offsets, _ = shard_of(given_case, shard, 2)
        inputs = [x.clone().requires_grad_() for x in (given_case.queries, keys, values)]
        out, _ = attention.read(*inputs, offsets, exchange=exchange)
        return torch.autograd.grad(out, inputs, given_case.grad_out)

    without, _ = ThreadedShards(2).run(on)
    assert [len(grad) for grad in without] == [2, 0, 0]
    assert torch.count_nonzero(without[0]) == 0


def test_the_gradient_that_autograd_hands_over_is_not_changed_by_the_exchange():
    given_case = case("read", [4])
    grad_out = given_case.grad_out.clone()

    def on(shard, exchange):
        keys, values, offsets, _ = shard_of(given_case, shard, 2)
        queries = given_case.queries.clone().requires_grad_()
        out, _ = attention.read(queries, keys, values, offsets, exchange=exchange)
        torch.autograd.grad(out, queries, grad_out)

    ThreadedShards(2).run(on)
    assert torch.equal(grad_out, given_case.grad_out)


# The choice


def test_an_unknown_backend_is_named_beside_the_known_ones():
    with pytest.raises(UsageError, match=r"no attention backend 'flesh': it is auto, .*reference"):
        choice.choose("flesh", torch.zeros(1, 2, 3))


@pytest.mark.parametrize("backend", ["flash_cuda", "cutlass_cuda"])
def test_a_backend_that_cannot_run_here_says_why(backend):
    with pytest.raises(UsageError, match=rf"'{backend}' cannot run .* on cpu .*: it is for CUDA devices"):
        choice.choose(backend, torch.zeros(1, 2, 3))


def test_the_choice_is_logged_once_for_each_dtype(monkeypatch, caplog):
    monkeypatch.setattr(choice, "_logged", set())
    with caplog.at_level(logging.INFO, logger="cctrain"):
        for dtype in (torch.float32, torch.float32, torch.bfloat16):
            assert choice.choose("auto", torch.zeros(1, 2, 3, dtype=dtype)) is choice.BACKENDS["flash_cpu"][0]
    assert [record.getMessage() for record in caplog.records] == [
        "Attention in torch.float32 on cpu runs on the backend flash_cpu.",
        "Attention in torch.bfloat16 on cpu runs on the backend flash_cpu.",
    ]
