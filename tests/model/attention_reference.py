"""Attention in float64 by the formula and by autograd, packs to try it on, and shards that are threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from cctrain.model.merge import NO_KEYS, Exchange

Result = TypeVar("Result")
KINDS = ("read", "write", "self")


@dataclass
class Case:
    """One attention to compute: its inputs and the gradient of its result."""

    kind: str
    queries: Tensor
    keys: Tensor
    values: Tensor
    grad_out: Tensor
    offsets: list[int]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        tensors = (self.queries, self.keys, self.values, self.grad_out)
        return Case(self.kind, *(x.to(device, dtype) for x in tensors), self.offsets)


def case(kind: str, lengths: list[int], num_latents: int = 5, heads: int = 3, width: int = 8, seed: int = 0) -> Case:
    """A random float64 case of contexts of these lengths."""
    draws = torch.Generator().manual_seed(seed)
    latents, tokens = (len(lengths), num_latents), (sum(lengths),)
    asking, answering = {"read": (latents, tokens), "write": (tokens, latents), "self": (tokens, tokens)}[kind]
    shapes = (asking, answering, answering, asking)
    tensors = [torch.randn(*shape, heads, width, generator=draws, dtype=torch.float64) for shape in shapes]
    return Case(kind, *tensors, [0, *accumulate(lengths)])


def expected(case: Case) -> dict[str, Tensor]:
    """out, lse and the three gradients, float64: each context's softmax written out, differentiated by autograd."""
    queries, keys, values = (x.detach().cpu().double().requires_grad_() for x in (case.queries, case.keys, case.values))
    out, lse = torch.zeros_like(queries), torch.full(queries.shape[:-1], NO_KEYS, dtype=torch.float64)
    for i, (start, stop) in enumerate(pairwise(case.offsets)):
        asking = i if case.kind == "read" else slice(start, stop)
        answering = i if case.kind == "write" else slice(start, stop)
        if start < stop:
            scores = torch.einsum("qhd,khd->qhk", queries[asking], keys[answering]) / queries.shape[-1] ** 0.5
            out[asking] = torch.einsum("qhk,khd->qhd", torch.softmax(scores, dim=-1), values[answering])
            lse[asking] = torch.logsumexp(scores, dim=-1).detach()
    inputs = (queries, keys, values)
    grads = torch.autograd.grad(out, inputs, case.grad_out.cpu().double()) if out.requires_grad else map(zeros, inputs)
    return {"out": out.detach(), "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, requires_grad=False)


def largest_error(actual: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest ‖a − b‖ / ‖b‖ over out, lse and the gradients.

    Of a gradient that is nothing but rounding beside the others (‖b‖ < 1e-6 ‖all gradients‖: in theory it is zero
    where every softmax has one key), the difference is measured against all of them.
    """
    errors = [0.0]
    for family in (["out"], ["lse"], ["dq", "dk", "dv"]):
        names = [name for name in family if name in actual]
        everything = sum(float(right[name].norm()) ** 2 for name in names) ** 0.5
        for name in names:
            assert actual[name].shape == right[name].shape, name
            difference = float((actual[name].detach().cpu().double() - right[name]).norm())
            own = float(right[name].norm())
            size = own if own > 1e-6 * everything else everything
            errors.append(difference / size if size else difference)
    return max(errors)


@dataclass
class ThreadedShards:
    """Shards that are threads of this process, and the collectives among them, counted.

    sum and max change what they are given, as they may.
    """

    num_shards: int
    calls: list[str] = field(default_factory=list)

    def run(self, function: Callable[[int, Exchange], Result]) -> list[Result]:
        """function(shard, exchange) on every shard at once; their results in shard order."""
        self._barrier = threading.Barrier(self.num_shards, timeout=60)
        self._slots: list[Tensor] = [torch.empty(0)] * self.num_shards

        def one(shard: int) -> Result:
            try:
                return function(shard, self._exchange(shard))
            except Exception:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.num_shards) as threads:
            return list(threads.map(one, range(self.num_shards)))

    def _exchange(self, shard: int) -> Exchange:
        def gather(x: Tensor, name: str = "gather") -> Tensor:
            assert x.is_contiguous()
            if shard == 0:
                self.calls.append(name)
            self._slots[shard] = x
            self._barrier.wait()
            everything = torch.stack(self._slots)
            self._barrier.wait()
            return everything

        return Exchange(
            self.num_shards,
            gather,
            sum=lambda x: x.copy_(gather(x, "sum").sum(dim=0)),
            max=lambda x: x.copy_(gather(x, "max").amax(dim=0)),
        )


def shard_of(case: Case, shard: int, num_shards: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """A shard's keys and values of a read, its offsets, and which tokens of the pack it has."""
    rows, offsets = [], [0]
    for start, stop in pairwise(case.offsets):
        length = stop - start
        rows += range(start + shard * length // num_shards, start + (shard + 1) * length // num_shards)
        offsets.append(len(rows))
    return case.keys[rows], case.values[rows], offsets, rows
