"""A training step on one context of a million tokens, on one context rank and on two: time, memory, equal gradients.

    python -m tools.million_tokens [--tokens N] [--ranks 1 2] [--work data] [--out FILE]

The context is whole retina nuclei, laid end to end in the order of their token store: each with its own targets,
hidden by the trainer's rule, and its own size factor; the last one is cut so that the number of tokens is exact. The
store is made if it is missing (13 MB are fetched). For each number of ranks, that many new processes on CPUs share
the context and take one step through the trainer's own functions: fp32, ZeRO 1, checkpointing, no clipping. The model
is a new one with all its parameters disturbed, so that each has a gradient. The ranks save a checkpoint, whose first
moment of AdamW is (1 − β₁) times the gradient; a factor common to two gradients does not change how far they are apart.

Printed first is what to expect. Time: not less than the FLOPs of the closed form at the rate of a large matrix product,
measured now, on the same threads. Memory, of all processes together: the tokens at the start of each layer and after
the last one, and their gradient, 4 bytes · n · d · (depth + 2); weights and gradients on every rank, and master
weights, gradients and two moments once, 4 bytes a number; the libraries in every process, as much as they take in this
one before it starts the others. On top come DeepSpeed's libraries and what a tile needs for a moment.

Measured are seconds, and for every process its highest resident memory. The exit code is 1 if a bound is broken:

    gradients   ‖a − b‖₂ / max(‖b‖₂, 1e-6 · ‖all of b‖₂) < 1e-5 for each parameter, b being those of the first number
                of ranks; and none is zero, or its comparison would say nothing
    loss        relative difference < 1e-5
    memory      20 GiB, the sum of the peaks of all processes, this one among them

The default size is 8.6e13 FLOPs for each number of ranks, a quarter of an hour at 100 GFLOP/s. A small one:

    python -m tools.million_tokens --tokens 8192 --depth 2 --width 32 --latents 8
"""

import argparse
import json
import os
import signal
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

from cctrain.config import Config, check_config
from cctrain.cost.parameters import num_parameters
from cctrain.cost.step import step_cost
from cctrain.data.loading.batches import pack
from cctrain.data.loading.contexts import Context, ContextRule, join, part_of
from cctrain.data.loading.loader import Loader, RankStep, Share
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import CctrainError, DataError, TrainingError
from cctrain.launch.local import free_port, rank_environment
from cctrain.model.tiles import TILE_TOKENS
from cctrain.model.transformer import Transformer
from cctrain.parallel.mesh import join_mesh
from cctrain.process_memory import resident
from cctrain.training.checkpoint import save_checkpoint
from cctrain.training.checkpoint_files import FragmentReader, latest_checkpoint, read_manifest
from cctrain.training.data import training_rule
from cctrain.training.engine import build_engine
from cctrain.training.loop import train_step
from cctrain.training.train import build_model
from tools.public_data import whole_cells
from tools.record import add_out, circumstances, keep

GRADIENT_BOUND, LOSS_BOUND, MEMORY_BOUND = 1e-5, 1e-5, 20 * 2**30
DISTURBANCE, DISTURBANCE_OF_LATENTS = 0.02, 1.0
PATIENCE = 7200.0  # seconds that a rank waits for another in a collective
MATMUL_SIZE, MATMUL_REPEATS = 2048, 5
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20, help="of the one context (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of context ranks (default: 1 2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all ranks together")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--latents", type=int, default=128)
    parser.add_argument("--tile-tokens", type=int, default=TILE_TOKENS["cpu"], help="that go through a layer at a time")
    parser.add_argument("--work", type=Path, default=Path("data"), help="folder of retina-store (default: data)")
    add_out(parser)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # this process is a rank, and writes there
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.threads, *arguments.ranks) < 1:
        parser.error("--tokens, --threads and --ranks are at least 1")
    try:
        if arguments.run is not None:
            run_rank(arguments)
            return
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end the ranks, as ever
        result = run_all(arguments)
    except CctrainError as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    print(table(result))
    keep(result, arguments.out)
    raise SystemExit(1 if result["failures"] else 0)


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    store = open_store(whole_cells("retina", arguments.work))
    config = configuration(arguments, store, num_ranks=1)
    context = one_context(store, training_rule(config, store), arguments.tokens)
    parameters = num_parameters(config.model, len(store.genes.ids))
    result = {
        "question": "does a training step on so long a context fit, and is it the same on any number of context ranks?",
        "tokens": arguments.tokens,
        "cells": len(context.log_size_factors),
        "targets": len(context.targets),
        "store": store.digest,
        "model": {key: getattr(config.model, key) for key in ("depth", "width", "heads", "latents")},
        "parameters": parameters,
        "tile_tokens": arguments.tile_tokens,
        "threads": arguments.threads,
        "predicted": predict(config, context, parameters, arguments),
        "bounds": {"gradient": GRADIENT_BOUND, "loss": LOSS_BOUND, "bytes": MEMORY_BOUND},
        **circumstances("torch", "deepspeed"),
    }
    print(expectation(result), flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix=".million-tokens-") as folder:
        folders = [Path(folder) / f"run-{index}" for index in range(len(arguments.ranks))]
        runs = [start_ranks(num, run, arguments.threads) for num, run in zip(arguments.ranks, folders, strict=True)]
        comparisons = [compare(run, runs[0], path, folders[0]) for run, path in zip(runs[1:], folders[1:], strict=True)]
    return result | {"runs": runs, "comparisons": comparisons, "failures": failures(runs, comparisons)}


def configuration(arguments: argparse.Namespace, store: TokenStore, num_ranks: int) -> Config:
    config = Config()
    config.data.store = str(store.path)
    config.data.max_tokens = len(store.genes.ids)  # cells are whole
    config.data.micro_batch_tokens = -(-arguments.tokens // num_ranks)
    for key in ("depth", "width", "heads", "latents"):
        setattr(config.model, key, getattr(arguments, key))
    config.training.clip = 0.0
    config.parallel.zero_stage, config.parallel.context = 1, num_ranks
    config.memory.checkpointing, config.memory.tile_tokens = True, arguments.tile_tokens
    check_config(config)
    return config


def one_context(store: TokenStore, rule: ContextRule, num_tokens: int) -> Context:
    """The first `num_tokens` tokens of the training cells, in the store's order, as one context of many cells.

    Raises DataError if the store has fewer.
    """
    loader = Loader(store, rule, Share(), num_tokens)
    cells: list[Context] = []
    missing = num_tokens
    for row in range(store.num_train):
        if not missing:
            break
        [cell] = loader.contexts(np.array([row]), np.array([row]))
        cells.append(part_of(cell, 0, missing))
        missing -= len(cells[-1].genes)
    if missing:
        raise DataError(f"the training cells of {store.path} have {num_tokens - missing:,} tokens: lower --tokens")
    return join(0, cells, len(cells))


def predict(config: Config, context: Context, parameters: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The floor of a step's time, and its memory on each number of ranks."""
    cost = step_cost(
        config.model, [arguments.tokens], len(context.targets), config.memory.checkpointing, config.parallel.zero_stage
    )
    flops, rate = cost["cost/total_flops"], matmul_rate(arguments.threads)
    streams = 4 * arguments.tokens * config.model.width * (config.model.depth + 2)
    process = resident("VmRSS")
    memory = {
        num: {"streams": streams, "state": 4 * parameters * (2 * num + 4), "libraries": (num + 1) * process}
        for num in arguments.ranks
    }
    return {"flops": flops, "matmul_flops_per_second": rate, "seconds": flops / rate, "bytes": memory}


def matmul_rate(threads: int) -> float:
    """FLOPs a second of the best of some large matrix products in fp32."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    seconds = []
    for _ in range(MATMUL_REPEATS):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * MATMUL_SIZE**3 / min(seconds)


def start_ranks(num_ranks: int, folder: Path, threads: int) -> dict[str, Any]:
    """One step in `num_ranks` new processes, which leave their checkpoint in `folder`. All end if one fails."""
    folder.mkdir()
    threads_each, port = max(1, threads // num_ranks), free_port()
    command = [sys.executable, "-m", "tools.million_tokens", *sys.argv[1:], "--run", str(folder)]
    own = {"OMP_NUM_THREADS": str(threads_each), "CUDA_VISIBLE_DEVICES": ""}
    ranks = [subprocess.Popen(command, env=rank_environment(rank, num_ranks, port) | own) for rank in range(num_ranks)]
    try:
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(codes):
        raise SystemExit(f"a rank of {num_ranks} failed: exit codes {codes}, None for those that were ended then")
    told = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    peaks = [rank["peak_bytes"] for rank in told]
    return {
        "ranks": num_ranks,
        "threads_each": threads_each,
        "loss": told[0]["loss"],
        "gradient_norm": told[0]["gradient_norm"],
        "seconds": {phase: max(rank["seconds"][phase] for rank in told) for phase in told[0]["seconds"]},
        "before_step_bytes": [rank["before_step_bytes"] for rank in told],
        "peak_bytes": peaks,
        "all_processes_bytes": sum(peaks) + resident("VmHWM"),
    }


def run_rank(arguments: argparse.Namespace) -> None:
    num_ranks = int(os.environ["WORLD_SIZE"])
    with join_mesh(PATIENCE, num_ranks) as mesh:
        store = open_store(whole_cells("retina", arguments.work))
        config = configuration(arguments, store, num_ranks)
        context = one_context(store, training_rule(config, store), arguments.tokens)
        first, last = (len(context.genes) * rank // num_ranks for rank in (mesh.context_rank, mesh.context_rank + 1))
        batch = pack([part_of(context, first, last)])
        model = build_model(config, store.genes, mesh)
        disturb(model)
        engine = build_engine(model, config, mesh)
        seconds = time_phases(engine)
        if mesh.is_first:
            tell_progress(model, f"{num_ranks} rank(s)")
        dist.barrier()
        before, started = resident("VmHWM"), time.perf_counter()
        result = train_step(engine, config, mesh, RankStep(0, 1, [batch]), 1, list)
        seconds["step"] = time.perf_counter() - started
        if not result.applied:
            raise TrainingError(f"no step was taken: loss {result.values['loss']}, or its gradient, is not finite")
        told = {
            "loss": result.values["loss"],
            "gradient_norm": result.values["grad_norm"],
            "seconds": seconds,
            "before_step_bytes": before,
            "peak_bytes": resident("VmHWM"),
        }
        (arguments.run / f"rank-{mesh.rank}.json").write_text(json.dumps(told))
        save_checkpoint(engine, arguments.run, mesh, 1, {"position": 1})


@torch.no_grad()
def disturb(model: Transformer) -> None:
    """A new model's head is zero, and so are the gradients of all below it; here every parameter shall have one.

    Its latents are small, and thus nearly alike once they have read: the gradients of the write's queries and keys are
    differences of nearly equal numbers, and rounding shows in them. Here the latents are far apart.
    """
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        scale = DISTURBANCE_OF_LATENTS if parameter is model.latents else DISTURBANCE
        parameter += scale * torch.randn(parameter.shape, generator=generator)


def time_phases(engine: Any) -> dict[str, float]:
    """Seconds that the engine's three calls will have taken, by name."""
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            seconds[name] = time.perf_counter() - started
            return result

        return run

    for method, name in (("forward", "forward"), ("backward", "backward"), ("step", "optimizer")):
        setattr(engine, method, timed(name, getattr(engine, method)))
    return seconds


def tell_progress(model: Transformer, label: str) -> None:
    """A line on standard error whenever forward or backward is through with a layer."""
    depth, started = len(model.layers), time.perf_counter()

    def tell(phase: str, layers: int) -> None:
        seconds, memory = time.perf_counter() - started, resident("VmRSS") / GIB
        line = f"{label}: {phase} {layers}/{depth}, {seconds:,.0f} s, {memory:.2f} GiB on the first rank"
        print(line, file=sys.stderr, flush=True)

    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, done=index + 1: tell("forward", done))
        # Of a layer, this is what receives its gradient last.
        layer.read.query.weight.register_hook(lambda _, done=depth - index: tell("backward", done))


def compare(run: dict[str, Any], reference: dict[str, Any], folder: Path, reference_folder: Path) -> dict[str, Any]:
    """How far a run is from the reference, and the parameters that have no gradient there."""
    errors, zero = gradient_errors(folder, reference_folder)
    return {
        "ranks": run["ranks"],
        "against": reference["ranks"],
        "loss": abs(run["loss"] - reference["loss"]) / abs(reference["loss"]),
        "gradients": errors,
        "without_gradient": zero,
    }


def gradient_errors(folder: Path, reference: Path) -> tuple[dict[str, float], list[str]]:
    """‖a − b‖₂ / max(‖b‖₂, 1e-6 · ‖all of b‖₂) of each parameter, b being the reference's, and those whose b is zero.

    Both are read from the run directories, one parameter at a time, and compared in fp64.
    """
    found, wanted = saved(folder), saved(reference)
    shapes = {parameter["name"]: parameter["shape"] for parameter in wanted.manifest["parameters"]}

    def moment(reader: FragmentReader, name: str) -> torch.Tensor:
        return reader.read_whole("exp_avg", name, shapes[name]).double()

    norms = {name: float(moment(wanted, name).norm()) for name in shapes}
    smallest = 1e-6 * float(np.linalg.norm(list(norms.values())))
    errors = {
        name: float((moment(found, name) - moment(wanted, name)).norm()) / max(norm, smallest)
        for name, norm in norms.items()
    }
    return errors, [name for name, norm in norms.items() if norm == 0]


def saved(run: Path) -> FragmentReader:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None, run
    return FragmentReader(checkpoint, read_manifest(checkpoint))


def failures(runs: list[dict[str, Any]], comparisons: list[dict[str, Any]]) -> list[str]:
    """What breaks a bound, a sentence each; NaN breaks any."""
    found = [
        f"{run['ranks']} rank(s): all processes together took {run['all_processes_bytes'] / GIB:.2f} GiB"
        for run in runs
        if not run["all_processes_bytes"] < MEMORY_BOUND
    ]
    for comparison in comparisons:
        pair = f"{comparison['ranks']} rank(s) against {comparison['against']}"
        if not comparison["loss"] < LOSS_BOUND:
            found.append(f"{pair}: the loss differs by {comparison['loss']:.2g}")
        found += [f"{pair}: {name} has no gradient" for name in comparison["without_gradient"]]
        found += [
            f"{pair}: the gradient of {name} differs by {error:.2g}"
            for name, error in comparison["gradients"].items()
            if not error < GRADIENT_BOUND
        ]
    return found


def expectation(result: dict[str, Any]) -> str:
    model, predicted = result["model"], result["predicted"]
    lines = [
        f"one context of {result['tokens']:,} tokens, {result['cells']:,} cells, {result['targets']:,} targets; "
        f"{model['depth']} layers of width {model['width']}, {model['latents']} latents, "
        f"{result['parameters']:,} parameters",
        f"expected: not less than {predicted['seconds']:,.1f} s, for {predicted['flops']:.3g} FLOPs at "
        f"{predicted['matmul_flops_per_second'] / 1e9:,.1f} GFLOP/s on {result['threads']} thread(s)",
    ]
    for ranks, memory in predicted["bytes"].items():
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())
        lines.append(f"expected on {ranks} rank(s): about {sum(memory.values()) / GIB:.2f} GiB ({parts})")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    floor = result["predicted"]["seconds"]
    lines = ["", "ranks × threads   step s  forward  backward  optimizer  × floor    peak GiB of each  all, GiB  loss"]
    for run in result["runs"]:
        seconds = run["seconds"]
        shape = f"{run['ranks']} × {run['threads_each']}"
        peaks = " ".join(f"{peak / GIB:.2f}" for peak in run["peak_bytes"])
        lines.append(
            f"{shape:>15} {seconds['step']:8.1f} {seconds['forward']:8.1f} {seconds['backward']:9.1f} "
            f"{seconds['optimizer']:10.1f} {seconds['step'] / floor:8.1f} {peaks:>19} "
            f"{run['all_processes_bytes'] / GIB:9.2f}  {run['loss']:.9f}"
        )
    for comparison in result["comparisons"]:
        errors = comparison["gradients"]
        worst = max(errors, key=errors.__getitem__)
        lines.append(
            f"{comparison['ranks']} rank(s) against {comparison['against']}: loss {comparison['loss']:.2g} apart; "
            f"{len(errors)} gradients, the worst {errors[worst]:.2g} apart ({worst})"
        )
    verdict = [f"FAILED: {failure}" for failure in result["failures"]] or ["every bound holds"]
    return "\n".join([*lines, *verdict])


if __name__ == "__main__":
    main()
