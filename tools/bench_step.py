"""How long a training step takes as the context grows: criss-cross beside dense, at equal depth and equal parameters.

    python -m tools.bench_step [--lengths 1024 4096 16384 65536] [--latents 64 128 256] [--out FILE]

A step is forward, loss, backward and plain AdamW (no DeepSpeed; in bf16, weights and moments are bf16 too) on one
context of n random tokens, of which 5 % are targets. A criss-cross layer has about twice the parameters of a dense
one of the same width, so dense is measured twice: with as many layers, and with the number of layers that comes
nearest to the criss-cross model's number of parameters. The first of --latents is measured at every length, the
others at every second one, the longest among them.

Every row is measured in a process of its own, which has made a tiny step before. After one step that does not count,
step, attention and matrix product take turns, up to 9 times, as often as 20 s hold, and medians are reported. A step
that takes longer than that is timed once, the first time.

    memory          of the first step. GPU: the most that PyTorch had allocated. CPU: by how much the process's peak of
                    resident memory grew. Weights, gradients and AdamW's moments are part of it
    utilisation     FLOPs of the step by the closed form, recomputation included, a second, as a share of what a plain
                    matrix product of the same dtype reaches
    attention       its share of the step's FLOPs by the closed form, and of its time: the attention of one layer is
                    run alone, on random queries, keys and values of the same shapes and in the same tiles, forward
                    and backward, and its time multiplied by the number of layers. What the rest of a step does to
                    the caches is not seen that way

On a GPU n doubles from 4,096 until memory or time runs out; on a CPU it goes from 1,024 to 65,536.

A row is left out, and so are the longer ones of its model, if its model ran out of memory or would take longer than
--budget. That is predicted from the model's longest row so far, by FLOPs, for one step and its attention; nothing that
was not measured is reported. The end shows how many times as long dense takes, and the exponent of n in
each model's time, least squares on a log-log scale over n of 8,192 and more.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cctrain.config import MemoryConfig, ModelConfig
from cctrain.cost.parameters import num_parameters
from cctrain.cost.step import step_cost
from cctrain.model import attention
from cctrain.model.activations import Activations
from cctrain.model.tiles import TILE_TOKENS, cut_into_tiles
from cctrain.model.transformer import Inputs, Transformer, initialize
from cctrain.parallel.mesh import find_device_kind
from cctrain.training.objective import negative_log_likelihood
from tools.record import add_out, circumstances, keep

MOST_REPEATS, SECONDS_OF_REPEATS = 9, 20.0
TARGET_SHARE = 0.05
EXPONENT_FROM = 8192
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULTS = {
    "cpu": {
        "width": 256,
        "heads": 4,
        "depth": 2,
        "dtype": "fp32",
        "budget": 900.0,
        "lengths": [2**k for k in range(10, 17, 2)],
    },
    "cuda": {
        "width": 512,
        "heads": 8,
        "depth": 24,
        "dtype": "bf16",
        "budget": 120.0,
        "lengths": [2**k for k in range(12, 25)],
    },
}
DENSE = {"same_depth": "dense, same depth", "same_parameters": "dense, same parameters"}


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    device: str
    dtype: str
    num_genes: int
    memory: MemoryConfig


@dataclass(frozen=True)
class Entry:
    """A model in the comparison, and the lengths at which it is measured."""

    name: str
    model: ModelConfig
    lengths: list[int]


def main() -> None:
    device = find_device_kind()
    arguments = parse(device)
    setting = Setting(
        device,
        arguments.dtype,
        arguments.genes,
        MemoryConfig(arguments.checkpointing, tile_tokens=arguments.tile_tokens),
    )
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    result = {
        "settings": {name: value for name, value in vars(arguments).items() if name != "out"},
        **circumstances("torch", threads=torch.get_num_threads(), **gpu),
    }
    rows: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for row in measured_rows(entries(arguments), setting, arguments.budget):
        print(line(row), flush=True)
        rows.append(row)
        result |= {"rows": rows, "speed_ups": speed_ups(rows), "exponents": exponents(rows)}
        keep(result, arguments.out)
    for found in speed_ups(rows):
        ratios = [f"{found[key]:.2f} times at {key.replace('_', ' ')}" for key in DENSE if found[key] is not None]
        print(f"n = {found['tokens']:,}, M = {found['latents']}: dense takes {', '.join(ratios)} as long")
    for name, found in exponents(rows).items():
        print(f"{name}: time grows as n^{found['exponent']:.2f} ({found['points']} lengths from {EXPONENT_FROM:,})")


def parse(device: str) -> argparse.Namespace:
    default = DEFAULTS[device]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=default["lengths"], help=f"n; {default['lengths']}")
    parser.add_argument("--latents", type=int, nargs="+", default=[64, 128, 256], help="M; 64 128 256")
    parser.add_argument("--width", type=int, default=default["width"], help=f"d; {default['width']}")
    parser.add_argument("--heads", type=int, default=default["heads"], help=f"of attention; {default['heads']}")
    parser.add_argument(
        "--depth", type=int, default=default["depth"], help=f"layers of the criss-cross model; {default['depth']}"
    )
    parser.add_argument("--genes", type=int, default=2000, help="rows of the gene table; 2000, so that it costs little")
    parser.add_argument("--dtype", choices=DTYPES, default=default["dtype"], help=f"of weights; {default['dtype']}")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--tile-tokens", type=int, metavar="N", help=f"in a tile; {TILE_TOKENS[device]}")
    parser.add_argument(
        "--budget", type=float, default=default["budget"], help=f"seconds that a row may take; {default['budget']:.0f}"
    )
    add_out(parser, "a JSON file for the result, written after every row")
    arguments = parser.parse_args()
    arguments.lengths = sorted(set(arguments.lengths))
    return arguments


def entries(arguments: argparse.Namespace) -> list[Entry]:
    lengths, (first, *others) = arguments.lengths, arguments.latents
    model = ModelConfig(width=arguments.width, heads=arguments.heads, depth=arguments.depth, latents=first)
    dense = replace(model, attention="dense")
    as_many_parameters = replace(dense, depth=depth_of_as_many_parameters(model, arguments.genes))
    return [
        Entry(f"criss-cross, M = {first}", model, lengths),
        Entry(DENSE["same_depth"], dense, lengths),
        Entry(DENSE["same_parameters"], as_many_parameters, lengths),
        *(Entry(f"criss-cross, M = {more}", replace(model, latents=more), lengths[::-2]) for more in others),
    ]


def depth_of_as_many_parameters(model: ModelConfig, num_genes: int) -> int:
    """Of the dense model whose number of parameters is nearest to that of this one."""
    wanted = num_parameters(model, num_genes)

    def difference(depth: int) -> int:
        return abs(num_parameters(replace(model, attention="dense", depth=depth), num_genes) - wanted)

    return min(range(1, 4 * model.depth + 1), key=difference)


def measured_rows(entries: list[Entry], setting: Setting, budget: float) -> Iterator[dict[str, Any]]:
    """By length. The row at which a model drops out says why, in `left_out`."""
    latest: dict[str, dict[str, Any]] = {}
    for tokens in sorted({tokens for entry in entries for tokens in entry.lengths}):
        for entry in entries:
            shorter = latest.get(entry.name)
            if tokens not in entry.lengths or (shorter and "left_out" in shorter):
                continue
            row = describe(entry, tokens, setting)
            predicted = predicted_seconds(row, shorter) if shorter else 0.0
            if predicted > budget:
                row["left_out"] = f"it would take about {predicted:,.0f} s; --budget is {budget:,.0f}"
            else:
                print(f"measuring {entry.name}, n = {tokens:,}", file=sys.stderr, flush=True)
                row |= in_its_own_process(entry.model, tokens, setting)
            if "left_out" not in row:
                row |= rates(row)
            latest[entry.name] = row
            yield row


def describe(entry: Entry, tokens: int, setting: Setting) -> dict[str, Any]:
    cost = step_cost(entry.model, [tokens], num_targets(tokens), setting.memory.checkpointing)
    return {
        "name": entry.name,
        "attention": entry.model.attention,
        "latents": entry.model.latents if entry.model.attention == "criss_cross" else None,
        "depth": entry.model.depth,
        "parameters": num_parameters(entry.model, setting.num_genes),
        "tokens": tokens,
        "flops": cost["cost/total_flops"],
        "attention_share_of_flops": cost["cost/attention_share"],
    }


def predicted_seconds(row: dict[str, Any], shorter: dict[str, Any]) -> float:
    """Of one step, and of the attention of one layer."""
    measured = shorter["step_seconds"] + shorter["attention_seconds"] / shorter["depth"]
    return measured * row["flops"] / shorter["flops"]


def rates(row: dict[str, Any]) -> dict[str, float]:
    return {
        "tokens_per_second": row["tokens"] / row["step_seconds"],
        "utilisation": row["flops"] / row["step_seconds"] / row["matrix_product_flops_per_second"],
        "attention_share_of_time": row["attention_seconds"] / row["step_seconds"],
    }


def in_its_own_process(model: ModelConfig, tokens: int, setting: Setting) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure, model, tokens, setting).result()
        except torch.OutOfMemoryError:
            return {"left_out": "out of memory"}
        except BrokenProcessPool:
            return {"left_out": "its process was killed: out of memory, most likely"}


def measure(model: ModelConfig, tokens: int, setting: Setting) -> dict[str, Any]:
    """`attention_seconds` are of all layers."""
    device = setting.device
    # What is imported and made at the first step of a process shall count as neither time nor memory.
    training_step(replace(model, width=8 * model.heads, depth=1), 32, setting)()
    before = resident_peak() if device == "cpu" else 0
    step = training_step(model, tokens, setting)
    first = seconds_of(step, device)
    after = resident_peak() if device == "cpu" else torch.cuda.max_memory_allocated()
    multiply, flops = matrix_product(setting)
    multiply()
    repeats = min(MOST_REPEATS, int(SECONDS_OF_REPEATS / first))
    steps, attentions, products = [] if repeats else [first], [], []
    for _ in range(max(1, repeats)):
        if repeats:
            steps.append(seconds_of(step, device))
        attentions.append(seconds_of(attention_of_a_layer(model, tokens, setting), device))
        products.append(seconds_of(multiply, device))
    return {
        "step_seconds": statistics.median(steps),
        "repeats": len(steps),
        "memory_bytes": after - before,
        "attention_seconds": model.depth * statistics.median(attentions),
        "matrix_product_flops_per_second": flops / statistics.median(products),
    }


def seconds_of(work: Callable[[], Any], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def resident_peak() -> int:
    """Bytes. Linux; what `getrusage` says would begin with the peak of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def training_step(model_config: ModelConfig, tokens: int, setting: Setting) -> Callable[[], None]:
    draws = torch.Generator().manual_seed(0)
    num_genes, device = setting.num_genes, setting.device
    share, theta = torch.full((num_genes,), 1 / num_genes), torch.ones(num_genes)
    model = Transformer(model_config, share, theta, setting.memory)
    initialize(model, torch.randn(num_genes, 8, generator=draws), seed=0)
    model.to(device, DTYPES[setting.dtype])
    optimizer = optimizer_with_moments(model)
    inputs, target_counts = random_context(tokens, num_genes, draws, device)

    def step() -> None:
        log_mu, log_theta = model(inputs)
        negative_log_likelihood(target_counts, log_mu, log_theta).mean().backward()
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


def attention_of_a_layer(model: ModelConfig, tokens: int, setting: Setting) -> Callable[[], None]:
    """Read and write, or self-attention, of one layer, forward and backward; to be called once."""
    activations = Activations(setting.memory.checkpointing)
    form = {"dtype": DTYPES[setting.dtype], "device": setting.device}

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, model.heads, model.width // model.heads, **form).requires_grad_()

    if model.attention == "dense":
        attend = partial(attention.self_attention, backend=model.backend)
        inputs, gradient = [random(tokens) for _ in range(3)], random(tokens)
        return lambda: activations.run(attend, *inputs, [0, tokens]).backward(gradient)

    cuts = cut_into_tiles([0, tokens], -(-tokens // (setting.memory.tile_tokens or TILE_TOKENS[setting.device])))
    tile_queries, tile_keys, tile_values, gradients = ([random(c.stop - c.start) for c in cuts] for _ in range(4))
    queries, keys, values, gradient = (random(1, model.latents) for _ in range(4))
    write = partial(attention.write, backend=model.backend)

    def read_and_write() -> None:
        reading = attention.Reading(None, model.backend)
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


def speed_ups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense time / criss-cross time, where one was measured; the other is None."""
    seconds = {(row["name"], row["tokens"]): row["step_seconds"] for row in rows if "step_seconds" in row}
    found = []
    for row in rows:
        own = seconds.get((row["name"], row["tokens"]))
        dense = {key: seconds.get((name, row["tokens"])) for key, name in DENSE.items()}
        if row["attention"] == "criss_cross" and own and any(dense.values()):
            ratios = {key: other / own if other else None for key, other in dense.items()}
            found.append({"tokens": row["tokens"], "latents": row["latents"], **ratios})
    return found


def exponents(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By model, of those measured at two long lengths or more."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "step_seconds" in row and row["tokens"] >= EXPONENT_FROM:
            points.setdefault(row["name"], []).append((math.log(row["tokens"]), math.log(row["step_seconds"])))
    return {
        name: {"exponent": float(np.polyfit(*zip(*pairs, strict=True), 1)[0]), "points": len(pairs)}
        for name, pairs in points.items()
        if len(pairs) > 1
    }


HEADER = (
    f"{'model':<24} {'layers':>6} {'parameters':>13} {'n':>10} {'step s':>9} {'tokens/s':>11} {'memory MiB':>10} "
    f"{'utilised':>8} {'attention: FLOPs':>16} {'time':>6}"
)


def line(row: dict[str, Any]) -> str:
    model = f"{row['name']:<24} {row['depth']:>6} {row['parameters']:>13,} {row['tokens']:>10,}"
    if "left_out" in row:
        return f"{model}  left out, and all longer: {row['left_out']}"
    return (
        f"{model} {row['step_seconds']:>9.3f} {row['tokens_per_second']:>11,.0f} {row['memory_bytes'] / 2**20:>10,.0f} "
        f"{row['utilisation']:>8.1%} {row['attention_share_of_flops']:>16.1%} {row['attention_share_of_time']:>6.1%}"
    )


if __name__ == "__main__":
    main()
