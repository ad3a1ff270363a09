"""What is timed: a training step on one random context, the attention of one of its layers, and a matrix product.

A step is forward, loss, backward and plain AdamW (no DeepSpeed; in bf16, weights and moments are bf16 too) on one
context of n random tokens, of which 5 % are targets. No token store is needed: the time of a step does not depend on
which genes and counts it sees. Several context ranks share the context as they do in training; the gradients are then
summed over them, parameter by parameter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cctrain.config import MemoryConfig, ModelConfig
from cctrain.model import attention
from cctrain.model.activations import Activations
from cctrain.model.tiles import TILE_TOKENS, cut_into_tiles
from cctrain.model.transformer import Inputs, Transformer, initialize
from cctrain.parallel.exchange import context_exchange
from cctrain.parallel.mesh import Mesh
from cctrain.training.engine import DTYPES
from cctrain.training.objective import negative_log_likelihood

TARGET_SHARE = 0.05
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
PRECISIONS = ("fp32", "bf16")  # fp16 would need its loss scaled


@dataclass(frozen=True)
class Setting:
    """What all points have in common. `device` is `cpu` or `cuda`, `dtype` one of PRECISIONS."""

    device: str
    dtype: str
    num_genes: int
    memory: MemoryConfig


def training_step(
    model_config: ModelConfig, tokens: int, setting: Setting, mesh: Mesh | None = None
) -> Callable[[], None]:
    """A step on one context of `tokens` tokens, of which each rank of the mesh holds a slice."""
    draws = torch.Generator().manual_seed(0)
    num_genes, device = setting.num_genes, setting.device
    share, theta = torch.full((num_genes,), 1 / num_genes), torch.ones(num_genes)
    exchange = context_exchange(mesh) if mesh else None
    num_ranks = mesh.num_ranks if mesh else 1
    model = Transformer(model_config, share, theta, setting.memory, -(-tokens // num_ranks), exchange)
    initialize(model, torch.randn(num_genes, 8, generator=draws), seed=0)
    model.to(device, DTYPES[setting.dtype])
    optimizer = optimizer_with_moments(model)
    inputs, target_counts = random_context(tokens, num_genes, draws, device)
    if mesh:
        inputs, target_counts = slice_of(inputs, target_counts, mesh)

    def step() -> None:
        log_mu, log_theta = model(inputs)
        (negative_log_likelihood(target_counts, log_mu, log_theta).sum() / num_targets(tokens)).backward()
        if mesh:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=mesh.context_group)
        optimizer.step()
        optimizer.zero_grad()

    return step


def optimizer_with_moments(model: Transformer) -> torch.optim.AdamW:
    """AdamW makes its moments at its first step; here they exist before, so that all steps need the same memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def num_targets(tokens: int) -> int:
    return math.ceil(TARGET_SHARE * tokens)


def random_context(tokens: int, num_genes: int, draws: torch.Generator, device: str) -> tuple[Inputs, Tensor]:
    """A context, and the counts of its targets."""
    counts = torch.poisson(torch.full((tokens,), 2.0), generator=draws)
    targets = torch.randperm(tokens, generator=draws)[: num_targets(tokens)].sort().values
    target_counts = counts[targets].to(device)
    counts[targets] = 0
    inputs = Inputs(
        genes=torch.randint(num_genes, (tokens,), generator=draws).to(device),
        counts=counts.to(device),
        log_size_factors=torch.full((tokens,), math.log(2.0 * num_genes), device=device),
        targets=targets.to(device),
        offsets=[0, tokens],
    )
    return inputs, target_counts


def slice_of(inputs: Inputs, target_counts: Tensor, mesh: Mesh) -> tuple[Inputs, Tensor]:
    """This context rank's part of one context, and the counts of the targets in it."""
    first, last = slice_bounds(inputs.offsets[-1], mesh)
    own = (first <= inputs.targets) & (inputs.targets < last)
    part = Inputs(
        genes=inputs.genes[first:last],
        counts=inputs.counts[first:last],
        log_size_factors=inputs.log_size_factors[first:last],
        targets=inputs.targets[own] - first,
        offsets=[0, last - first],
    )
    return part, target_counts[own]


def slice_bounds(tokens: int, mesh: Mesh | None) -> tuple[int, int]:
    if mesh is None:
        return 0, tokens
    return tuple(tokens * rank // mesh.num_ranks for rank in (mesh.rank, mesh.rank + 1))  # type: ignore[return-value]


def attention_of_a_layer(
    model: ModelConfig, tokens: int, setting: Setting, mesh: Mesh | None = None
) -> Callable[[], None]:
    """Read and write, or self-attention, of one layer, forward and backward; to be called once.

    Queries, keys and values are random, of the step's shapes and in its tiles. With several ranks the exchange of the
    read is part of it.
    """
    activations = Activations(setting.memory.checkpointing)
    form: dict[str, Any] = {"dtype": DTYPES[setting.dtype], "device": setting.device}

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, model.heads, model.width // model.heads, **form).requires_grad_()

    first, last = slice_bounds(tokens, mesh)
    own = last - first
    if model.attention == "dense":
        attend = partial(attention.self_attention, backend=model.backend)
        inputs, gradient = [random(own) for _ in range(3)], random(own)
        return lambda: activations.run(attend, *inputs, [0, own]).backward(gradient)

    cuts = cut_into_tiles([0, own], -(-own // (setting.memory.tile_tokens or TILE_TOKENS[setting.device])))
    tile_queries, tile_keys, tile_values, gradients = ([random(c.stop - c.start) for c in cuts] for _ in range(4))
    queries, keys, values, gradient = (random(1, model.latents) for _ in range(4))
    write = partial(attention.write, backend=model.backend)
    exchange = context_exchange(mesh) if mesh else None

    def read_and_write() -> None:
        reading = attention.Reading(exchange, model.backend)
        shown = zip(tile_keys, tile_values, cuts, strict=True)
        links = [activations.run(reading.tile, queries, k, v, c.offsets) for k, v, c in shown]
        found, _ = reading.result(links)
        asked = zip(tile_queries, cuts, strict=True)
        written = [activations.run(write, q, keys, values, c.offsets) for q, c in asked]
        torch.autograd.backward([found, *written], [gradient, *gradients])

    return read_and_write


def matrix_product(setting: Setting) -> tuple[Callable[[], Tensor], float]:
    """A plain square product, and its FLOPs."""
    size = MATRIX_SIZE[setting.device]
    a, b = (torch.randn(size, size, dtype=DTYPES[setting.dtype], device=setting.device) for _ in range(2))
    return lambda: a @ b, 2.0 * size**3
