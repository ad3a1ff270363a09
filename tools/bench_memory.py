"""What the activations of one forward and backward need at most, beside the formula: against depth, and against n.

    python -m tools.bench_memory [--width 128] [--out FILE]

With checkpointing and tiles of t tokens, one context of n tokens needs, in bytes,

    4 · n · d · (depth + 2)    the tokens before every layer and after the last, and their gradient
    4 · n · d · r              the gene vectors of the targets, where r is their share
    60 · n                     the pack itself: genes, counts, size factors, and what is looked up for each token
    a constant                 one tile's inner activations, and what does not grow with n

With memory.offload=host the tokens before every layer wait on the host, and the device needs 4 · n · d · 2 in place of
the first line, whatever the depth: the tokens before and after one layer, or one of them and their gradient.

On a GPU the peak is PyTorch's own count. On a CPU, host and device are one memory: it is the growth of the process's
peak resident set, from which what waits on the host is taken off. Each row is measured in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cctrain.config import MemoryConfig, ModelConfig
from cctrain.model.transformer import Inputs, Transformer
from cctrain.process_memory import resident
from tools.record import add_out, circumstances, keep

NUM_GENES, TILE = 1000, 4096
DEPTHS, LENGTHS = (4, 8, 16), (65_536, 131_072, 262_144)
PACK_BYTES, TARGETS = 60, 1 / 20  # a token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_out(parser)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(**json.loads(arguments.row))))
        return
    shape = {"width": arguments.width, "latents": arguments.latents, "device": arguments.device}
    depths, lengths = arguments.depths, arguments.lengths
    tables = {
        "on the host, against depth": [(lengths[0], depth, "host") for depth in depths],
        "on the host, against n": [(tokens, depths[0], "host") for tokens in lengths],
        "on the device, against depth": [(lengths[0], depth, "device") for depth in depths],
        "on the device, against n": [(tokens, depths[0], "device") for tokens in lengths],
    }
    result: dict[str, Any] = {**shape, "tile_tokens": TILE, "tables": {}}
    for title, rows in tables.items():
        print(f"\ncheckpoints {title}")
        print(f"{'tokens':>9} {'depth':>5} {'peak':>10} {'formula':>10} {'growth / formula':>17}")
        measured: list[dict[str, Any]] = []
        for tokens, depth, offload in rows:
            row = in_a_process(tokens=tokens, depth=depth, offload=offload, **shape)
            growth = growth_against_formula(measured[0], row) if measured else None
            measured.append({**row, "growth_against_formula": growth})
            print(
                f"{tokens:>9,} {depth:>5} {row['peak'] / 2**20:>6,.0f} MiB {row['formula'] / 2**20:>6,.0f} MiB "
                f"{'' if growth is None else f'{growth:>17.3f}'}",
                flush=True,
            )
        result["tables"][title] = measured
    gpu = {"gpu": torch.cuda.get_device_name()} if arguments.device == "cuda" else {}
    result |= circumstances("torch", **gpu)
    keep(result, arguments.out)


def growth_against_formula(first: dict[str, Any], row: dict[str, Any]) -> float:
    """How much more than the first row this one needs, beside what the formula says it should: 1 is exact.

    Where the formula says nothing grows it is this row's peak beside the first one's.
    """
    expected = row["formula"] - first["formula"]
    return (row["peak"] - first["peak"]) / expected if expected else row["peak"] / first["peak"]


def formula(tokens: int, depth: int, width: int, offload: str) -> int:
    """Bytes on the device that grow with n."""
    streams = 2 if offload == "host" else depth + 2
    return round(tokens * (4 * width * (streams + TARGETS) + PACK_BYTES))


def in_a_process(**row: Any) -> dict[str, Any]:
    # Freed memory goes back at once, so that what is in use is what the process holds.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tools.bench_memory", "--row", json.dumps(row)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def measure(tokens: int, depth: int, width: int, latents: int, offload: str, device: str) -> dict[str, Any]:
    """`peak` and `formula`, bytes on the device; `on_host`, bytes that waited on the host."""
    config = ModelConfig(width=width, depth=depth, heads=2, latents=latents)
    memory = MemoryConfig(checkpointing=True, offload=offload, tile_tokens=TILE)
    model = Transformer(config, torch.full((NUM_GENES,), 1 / NUM_GENES), torch.ones(NUM_GENES), memory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    model.to(device)
    run(model, TILE, device)  # what is made once is there
    before = reset_peak(device)
    run(model, tokens, device)
    on_host = 4 * tokens * width * depth if offload == "host" else 0
    peak = peak_bytes(device) - before - (on_host if device == "cpu" else 0)
    facts = {"tokens": tokens, "depth": depth, "offload": offload}
    return {**facts, "peak": peak, "formula": formula(tokens, depth, width, offload), "on_host": on_host}


def run(model: Transformer, tokens: int, device: str) -> None:
    """Forward and backward of one context, of whose tokens one in twenty is a target."""
    draws = torch.Generator().manual_seed(0)
    inputs = Inputs(
        genes=torch.randint(NUM_GENES, (tokens,), generator=draws).to(device),
        counts=torch.ones(tokens, device=device),
        log_size_factors=torch.zeros(tokens, device=device),
        targets=torch.arange(0, tokens, round(1 / TARGETS), device=device),
        offsets=[0, tokens],
    )
    log_mu, log_theta = model(inputs)
    (log_mu.sum() + log_theta.sum()).backward()


def reset_peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return resident("VmHWM")


def peak_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


if __name__ == "__main__":
    main()
