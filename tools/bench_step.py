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
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cctrain.apply.processes import LEFT_OUT, in_new_processes
from cctrain.apply.scaling.measure import (
    depth_of_as_many_parameters,
    describe,
    measure,
    medians,
    predicted_seconds,
    rates,
)
from cctrain.apply.scaling.points import DENSE
from cctrain.apply.scaling.work import PRECISIONS, Setting
from cctrain.config import MemoryConfig, ModelConfig
from cctrain.model.tiles import TILE_TOKENS
from cctrain.parallel.mesh import find_device_kind
from tools.record import add_out, circumstances, keep

EXPONENT_FROM = 8192
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
    parser.add_argument("--dtype", choices=PRECISIONS, default=default["dtype"], help=f"of weights; {default['dtype']}")
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


def measured_rows(entries: list[Entry], setting: Setting, budget: float) -> Iterator[dict[str, Any]]:
    """By length. The row at which a model drops out says why, in `left_out`."""
    latest: dict[str, dict[str, Any]] = {}
    for tokens in sorted({tokens for entry in entries for tokens in entry.lengths}):
        for entry in entries:
            shorter = latest.get(entry.name)
            if tokens not in entry.lengths or (shorter and "left_out" in shorter):
                continue
            row = describe(entry.name, entry.model, tokens, setting)
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


def in_its_own_process(model: ModelConfig, tokens: int, setting: Setting) -> dict[str, Any]:
    measured = in_new_processes(measure, (model, tokens, setting))
    return measured if LEFT_OUT in measured else medians(measured, model.depth)


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
