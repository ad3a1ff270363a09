"""A point of the cost law, measured: how long its step, its attention and a matrix product take, and its memory.

After a tiny step, which imports and makes what is made once, and one step that does not count, step, attention of a
layer and matrix product take turns, so that a machine that slows down slows all three. They do so up to 9 times, as
often as 20 s hold, once at least; a step that takes longer than 20 s is timed once, the first time. Medians are
reported, of one measurement or of several that were made at different times.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from cctrain.apply.scaling.work import Setting, attention_of_a_layer, matrix_product, num_targets, training_step
from cctrain.config import ModelConfig
from cctrain.cost.parameters import num_parameters
from cctrain.cost.step import step_cost
from cctrain.parallel.mesh import Mesh
from cctrain.process_memory import resident

MOST_REPEATS, SECONDS_OF_REPEATS = 9, 20.0
LONGEST_REPEATED = 20.0  # seconds


def depth_of_as_many_parameters(model: ModelConfig, num_genes: int) -> int:
    """Of the dense model whose number of parameters is nearest to that of this one."""
    wanted = num_parameters(model, num_genes)

    def difference(depth: int) -> int:
        return abs(num_parameters(replace(model, attention="dense", depth=depth), num_genes) - wanted)

    return min(range(1, 4 * model.depth + 1), key=difference)


def describe(name: str, model: ModelConfig, tokens: int, setting: Setting) -> dict[str, Any]:
    """What is known of a point before it is measured; FLOPs of the whole step, recomputation included."""
    cost = step_cost(model, [tokens], num_targets(tokens), setting.memory.checkpointing)
    return {
        "name": name,
        "attention": model.attention,
        "latents": model.latents if model.attention == "criss_cross" else None,
        "depth": model.depth,
        "parameters": num_parameters(model, setting.num_genes),
        "tokens": tokens,
        "flops": cost["cost/total_flops"],
        "attention_share_of_flops": cost["cost/attention_share"],
    }


def predicted_seconds(row: dict[str, Any], shorter: dict[str, Any]) -> float:
    """Of one step, and of the attention of one layer."""
    measured = shorter["step_seconds"] + shorter["attention_seconds"] / shorter["depth"]
    return measured * row["flops"] / shorter["flops"]


def times_of_repeats(step_seconds: float, most: int = MOST_REPEATS, seconds: float = SECONDS_OF_REPEATS) -> int:
    """How often a step of that length is repeated; 0: its first time counts."""
    return max(1, min(most, int(seconds / step_seconds))) if step_seconds <= LONGEST_REPEATED else 0


def is_timed_once(timings: dict[str, Any]) -> bool:
    """Whether the first step is all there is, with whatever it takes longer than later ones."""
    return timings["steps"] == [timings["warm_up"]]


def measure(
    model: ModelConfig,
    tokens: int,
    setting: Setting,
    most_repeats: int = MOST_REPEATS,
    seconds: float = SECONDS_OF_REPEATS,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Every time taken, in seconds, and the growth of memory at the first step, in bytes, of the rank with the most.

    `attention_of_a_layer` is of one layer. With several ranks, all call this; a time is the slowest rank's, and the
    matrix products are those of all ranks together.
    """
    device = setting.device
    # What is imported and made at the first step of a process shall count as neither time nor memory.
    training_step(replace(model, width=8 * model.heads, latent_width=None, depth=1), 32, setting, mesh)()
    before = resident("VmHWM") if device == "cpu" else 0
    step = training_step(model, tokens, setting, mesh)
    first = seconds_of(step, device, mesh)
    after = resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    multiply, flops = matrix_product(setting)
    multiply()
    repeats = times_of_repeats(first, most_repeats, seconds)
    steps, attentions, products = [] if repeats else [first], [], []
    for _ in range(max(1, repeats)):
        if repeats:
            steps.append(seconds_of(step, device, mesh))
        attentions.append(seconds_of(attention_of_a_layer(model, tokens, setting, mesh), device, mesh))
        products.append(seconds_of(multiply, device, mesh))
    return {
        "warm_up": first,
        "steps": steps,
        "attention_of_a_layer": attentions,
        "matrix_products": products,
        "flops_of_matrix_products": flops * (mesh.num_ranks if mesh else 1),
        "memory_bytes": int(_largest(after - before, mesh)),
    }


def joined(timings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of a point; the warm-up is the first one's, memory the larger."""
    lists = {key: value + more[key] for key, value in timings.items() if isinstance(value, list)}
    return timings | lists | {"memory_bytes": max(timings["memory_bytes"], more["memory_bytes"])}


def medians(timings: dict[str, Any], depth: int) -> dict[str, Any]:
    """`attention_seconds` are of all layers."""
    return {
        "step_seconds": statistics.median(timings["steps"]),
        "repeats": len(timings["steps"]),
        "memory_bytes": timings["memory_bytes"],
        "attention_seconds": depth * statistics.median(timings["attention_of_a_layer"]),
        "matrix_product_flops_per_second": timings["flops_of_matrix_products"]
        / statistics.median(timings["matrix_products"]),
    }


def rates(row: dict[str, Any]) -> dict[str, float]:
    """`utilisation`: FLOPs a second, as a share of what the matrix product reaches."""
    return {
        "tokens_per_second": row["tokens"] / row["step_seconds"],
        "utilisation": row["flops"] / row["step_seconds"] / row["matrix_product_flops_per_second"],
        "attention_share_of_time": row["attention_seconds"] / row["step_seconds"],
    }


def seconds_of(work: Callable[[], Any], device: str, mesh: Mesh | None = None) -> float:
    """Ranks begin together; the slowest one's time."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    if mesh:
        dist.barrier()
    started = time.perf_counter()
    work()
    synchronize()
    return _largest(time.perf_counter() - started, mesh)


def _largest(value: float, mesh: Mesh | None) -> float:
    """Over all ranks, and the same on each."""
    if mesh is None:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared)
