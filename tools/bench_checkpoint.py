"""How long a checkpoint takes to save and to load, beside the floor, and what share of training time saving costs.

    python -m tools.bench_checkpoint [--parameters 100e6] [--ranks 2] [--zero-stage 1] [--out FILE]

The floor of saving is to write the bytes once, to the disk, and to hash them once; of loading, to read and to hash
them once. Both are measured in the same run, on the same files' size, by all ranks at the same time.
"""

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cctrain.config import Config
from cctrain.cost.parameters import num_parameters
from cctrain.launch.local import free_port, rank_environment
from cctrain.model.transformer import Transformer
from cctrain.parallel.mesh import Mesh, join_mesh
from cctrain.training.checkpoint import load_checkpoint, save_checkpoint
from cctrain.training.engine import build_engine
from cctrain.training.sharded_state import held_fragments, owned_fragments
from tools.record import add_out, circumstances, keep

REPEATS = 3
NUM_GENES, WIDTH = 20_000, 1024
MINUTES_BETWEEN_SAVES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=100e6, help="of the model, about")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=1, choices=range(4))
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder here")
    add_out(parser)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder or Path.cwd(), prefix=".bench-checkpoint-") as folder:
        port = free_port()
        command = [sys.executable, "-m", "tools.bench_checkpoint", *sys.argv[1:], "--folder", folder]
        ranks = [
            subprocess.Popen(command, env=rank_environment(rank, arguments.ranks, port))
            for rank in range(arguments.ranks)
        ]
        raise SystemExit(max(rank.wait() for rank in ranks))


def measure(arguments: argparse.Namespace) -> None:
    config = Config()
    config.parallel.zero_stage = arguments.zero_stage
    config.model.width, config.model.depth = WIDTH, 1
    while num_parameters(config.model, NUM_GENES) < arguments.parameters:
        config.model.depth += 1
    with join_mesh() as mesh:
        share = torch.full((NUM_GENES,), 1 / NUM_GENES)
        model = Transformer(config.model, share, torch.ones(NUM_GENES))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        engine = build_engine(model, config, mesh)
        for fragment in owned_fragments(engine, mesh):
            for tensor in fragment.tensors.values():
                tensor.normal_()  # pages of zeros would cost nothing to read
        result = timed(engine, mesh, arguments.folder)
    if mesh.is_first:
        share_of_training = result["save_seconds"] / (60 * MINUTES_BETWEEN_SAVES)
        result = {
            "parameters": num_parameters(config.model, NUM_GENES),
            "ranks": mesh.num_ranks,
            "zero_stage": arguments.zero_stage,
            **result,
            "minutes_between_saves": MINUTES_BETWEEN_SAVES,
            "share_of_training": share_of_training,
            **circumstances("torch", "deepspeed"),
        }
        print(
            f"{result['parameters']:,} parameters, {result['bytes'] / 2**20:,.0f} MiB, {mesh.num_ranks} rank(s), "
            f"ZeRO {arguments.zero_stage}\n"
            f"save {result['save_seconds']:.2f} s (floor: write {result['write_seconds']:.2f} s, "
            f"hash {result['hash_seconds']:.2f} s)\n"
            f"load {result['load_seconds']:.2f} s (floor: read and hash {result['read_and_hash_seconds']:.2f} s)\n"
            f"saving every {MINUTES_BETWEEN_SAVES} minutes takes {100 * share_of_training:.2f} % of the time"
        )
        keep(result, arguments.out)


def timed(engine: Any, mesh: Mesh, folder: Path) -> dict[str, float]:
    sizes, seconds = [], {key: [] for key in ("save", "write", "hash", "load", "read_and_hash")}
    for repeat in range(REPEATS):
        run_dir = folder / f"run-{repeat}"
        seconds["save"].append(together(lambda run_dir=run_dir: sizes.append(save(engine, run_dir, mesh))))
        content = np.random.default_rng(mesh.rank).bytes(sizes[-1] // mesh.num_ranks)
        plain = folder / f"plain-{mesh.rank}"
        seconds["write"].append(together(lambda content=content, plain=plain: write(plain, content)))
        seconds["hash"].append(together(lambda content=content: hashlib.sha256(content).digest()))
        seconds["read_and_hash"].append(together(lambda plain=plain: hashlib.sha256(plain.read_bytes()).digest()))
        for fragment in held_fragments(engine, mesh):
            fragment.tensors["master"].zero_()
        seconds["load"].append(together(lambda run_dir=run_dir: load_checkpoint(engine, run_dir, mesh)))
    medians = {f"{key}_seconds": statistics.median(values) for key, values in seconds.items()}
    return {"bytes": sizes[-1], "repeats": REPEATS, **medians}


def save(engine: Any, run_dir: Path, mesh: Mesh) -> int:
    return save_checkpoint(engine, run_dir, mesh, 1, {"position": 0})["bytes"]


def write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def together(work: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
