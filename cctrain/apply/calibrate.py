"""What this machine reaches in the parts of a training step, for `cctrain estimate`: about 15 seconds.

The ranks that the training would have run side by side, as in training, where they share caches, memory and cores. Each
part is run forward and backward, in the shapes that the model gives it; medians of several rounds, in which the parts
take turns.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cctrain.apply.processes import LEFT_OUT, in_new_processes
from cctrain.config import MemoryConfig, ModelConfig
from cctrain.cost.devices import Device, Measured
from cctrain.cost.flops import step_flops
from cctrain.cost.step_time import num_stages
from cctrain.errors import TrainingError
from cctrain.model import attention
from cctrain.model.layer import Norm
from cctrain.model.tiles import TILE_TOKENS
from cctrain.model.transformer import Inputs, Transformer, initialize
from cctrain.parallel.mesh import Mesh
from cctrain.training.engine import DTYPES
from cctrain.training.objective import negative_log_likelihood
from cctrain.words import model_in_words

ROUNDS, SECONDS_A_ROUND = 5, 0.15  # of each part
TOKENS_OF_DENSE, TARGETS, PARAMETERS = 2048, 20_000, 4_000_000
LARGE_PAYLOAD, SMALL_PAYLOAD = 2**18, 8  # numbers


def calibrate(model: ModelConfig, precision: str, num_ranks: int) -> Device:
    """Measure with `num_ranks` local processes. Raises TrainingError where their memory does not suffice."""
    found = Device(**on_local_ranks(measure, (model, precision), num_ranks, 1, precision))
    today = datetime.now(UTC).date().isoformat()
    return replace(found, measured=Measured(today, model_in_words(model), precision, num_ranks))


def on_local_ranks(
    task: Callable[..., dict[str, Any]],
    arguments: tuple[Any, ...],
    num_ranks: int,
    num_context_ranks: int,
    precision: str,
) -> dict[str, Any]:
    """What the first of so many ranks answers; `task` also gets the mesh. Raises TrainingError where their memory does
    not suffice."""
    answer = in_new_processes(task, arguments, num_ranks, num_context_ranks, precision)
    if LEFT_OUT in answer:
        raise TrainingError(f"this machine could not be measured: {answer[LEFT_OUT]}")
    return answer


def measure(model: ModelConfig, precision: str, mesh: Mesh) -> dict[str, Any]:
    """The fields of a device, as one of the ranks finds it."""
    device, dtype = mesh.device, DTYPES[precision]
    parts = {
        "peak": product(model, dtype, device, backward=False),
        "products": product(model, dtype, device, backward=True),
        "attention": attention_of_a_tile(model, dtype, device),
        "elementwise": elementwise(model, dtype, device),
        "parameter": optimizer(device),
        "target": loss_of_targets(device),
        "call": calls(model, dtype, device),
    }
    if mesh.num_ranks > 1:
        parts |= {"network": all_reduce(LARGE_PAYLOAD, device), "latency": all_reduce(SMALL_PAYLOAD, device)}
    seconds = timed({name: run for name, (run, _) in parts.items()}, device)
    rate = {name: amount / seconds[name] for name, (_, amount) in parts.items()}
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else psutil.virtual_memory().total
    found = Device(
        name=torch.cuda.get_device_name(device) if on_gpu else f"{processor()}, {torch.get_num_threads()} thread(s)",
        memory=memory if on_gpu else memory / mesh.num_ranks,
        peak=max(rate["peak"], rate["products"]),
        products=rate["products"],
        attention=rate["attention"],
        elementwise=rate["elementwise"],
        parameter_seconds=1 / rate["parameter"],
        target_seconds=1 / rate["target"],
        call=1 / rate["call"],
        per_node=mesh.num_ranks,
        inside=rate.get("network", rate["elementwise"]),  # a rank alone sends nothing
        between=rate.get("network", rate["elementwise"]),
        latency=seconds.get("latency", 0.0),
        kind=device.type,
    )
    return asdict(found)


def processor() -> str:
    """The CPU's name, where Linux tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, f"a CPU ({platform.machine()})")


def timed(parts: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of a call of each. Every rank makes as many calls of each as the others."""
    repeats = {}
    for name, run in parts.items():
        run()
        once = torch.tensor(seconds_of(run, 1, device), dtype=torch.float64, device=device)
        dist.all_reduce(once, dist.ReduceOp.MAX)
        repeats[name] = max(1, min(1000, int(SECONDS_A_ROUND / float(once))))
    rounds = [{name: seconds_of(run, repeats[name], device) for name, run in parts.items()} for _ in range(ROUNDS)]
    return {name: median(one[name] for one in rounds) for name in parts}


def seconds_of(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize()
    return (time.perf_counter() - started) / repeats


Part = tuple[Callable[[], object], float]  # what to run, and how much of its unit it is


def product(model: ModelConfig, dtype: torch.dtype, device: torch.device, backward: bool) -> Part:
    """FLOPs of the product that dominates a layer."""
    tokens, width = TILE_TOKENS[device.type], model.width
    layer = nn.Linear(width, 4 * width, bias=False, device=device, dtype=dtype)
    rows = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, 4 * width, device=device, dtype=dtype)
    flops = 8.0 * tokens * width**2
    if not backward:
        return lambda: rows.detach() @ layer.weight.detach().T, flops
    return lambda: torch.autograd.grad(layer(rows), (rows, layer.weight), gradient), 3 * flops


def attention_of_a_tile(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Part:
    """FLOPs of read and write of a tile, or of self-attention."""
    dense = model.attention == "dense"
    tokens = TOKENS_OF_DENSE if dense else TILE_TOKENS[device.type]

    def random(*shape: int) -> Tensor:
        shape = *shape, model.heads, model.width // model.heads
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    law = step_flops(model, [tokens], 0)
    flops = law.attention / model.depth
    query, key, value = (random(tokens) for _ in range(3))
    asking, shown, values = (random(1, model.latents) for _ in range(3))
    offsets, backend = [0, tokens], model.backend

    def read_and_write() -> None:
        read, _ = attention.read(asking, key, value, offsets, backend=backend)
        written = attention.write(query, shown, values, offsets, backend=backend)
        torch.autograd.grad((read.sum(), written.sum()), (query, key, value, asking, shown, values))

    def self_attention() -> None:
        attended = attention.self_attention(query, key, value, offsets, backend=backend)
        torch.autograd.grad(attended.sum(), (query, key, value))

    return self_attention if dense else read_and_write, flops


def elementwise(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Part:
    """Bytes of one norm, one GELU and one residual, as `cost.step_time` counts them."""
    tokens, width = TILE_TOKENS[device.type], model.width
    norm = Norm(width).to(device, dtype)
    stream = torch.randn(tokens, width, device=device, requires_grad=True)
    hidden = torch.randn(tokens, 4 * width, device=device, dtype=dtype, requires_grad=True)
    one, four = torch.ones_like(stream), torch.ones_like(hidden)

    def run() -> None:
        made = stream + norm(stream)
        torch.autograd.grad((made, nn.functional.gelu(hidden)), (stream, hidden), (one, four))

    element_bytes = stream.new_empty((), dtype=dtype).element_size()
    return run, float(tokens * width * (32 + 24 * element_bytes))


def optimizer(device: torch.device) -> Part:
    """Parameters, in as many tensors as a small model has."""
    parameters = [nn.Parameter(torch.randn(PARAMETERS // 8, device=device)) for _ in range(8)]
    adamw = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)

    def run() -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch.nn.utils.get_total_norm(gradients)
        adamw.step()
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()  # as ZeRO copies weights and gradients

    return run, float(PARAMETERS)


def loss_of_targets(device: torch.device) -> Part:
    """Targets."""
    counts = torch.poisson(torch.ones(TARGETS, device=device))
    log_mu, log_theta = (torch.zeros(TARGETS, device=device, requires_grad=True) for _ in range(2))

    def run() -> None:
        torch.autograd.grad(negative_log_likelihood(counts, log_mu, log_theta).sum(), (log_mu, log_theta))

    return run, float(TARGETS)


def calls(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Part:
    """Stages of a model with next to nothing to do."""
    transformer, inputs = tiny_model(model.attention, model.heads, 2, device)
    transformer.to(device, dtype)

    def run() -> None:
        log_mu, log_theta = transformer(inputs)
        (log_mu.sum() + log_theta.sum()).backward()

    return run, num_stages(replace(model, depth=2), 1)


def tiny_model(kind: str, heads: int, depth: int, device: torch.device) -> tuple[Transformer, Inputs]:
    """On the host still, with a context of one token, a target, on the device."""
    config = ModelConfig(attention=kind, width=8 * heads, depth=depth, heads=heads, latents=1)
    model = Transformer(config, torch.full((2,), 0.5), torch.ones(2), MemoryConfig())
    initialize(model, torch.zeros(2, 1), seed=0)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    return model, Inputs(one, one.float(), one.float(), one, [0, 1])


def all_reduce(numbers: int, device: torch.device) -> Part:
    """Bytes that a rank sends."""
    payload, ranks = torch.zeros(numbers, device=device), dist.get_world_size()
    return lambda: dist.all_reduce(payload), 2 * payload.nbytes * (ranks - 1) / ranks
