"""All nuclei of `retina` as one context, nothing left out: one training step, as a user would take it.

    python -m tools.whole_retina [--ranks 2] [--cells N] [--work data] [--out FILE]

The nuclei of the one donor are prepared as one group and trained on with `cctrain train configs/tissue.yaml`: 12
layers of width 256, 128 latents, in fp32, shared by two context ranks on CPUs. memory.checkpointing keeps one vector
a token and layer, 4 bytes · n · d · (depth + 1), more than a small machine has memory; memory.offload=disk keeps them
in temporary files in DIR/tissue, as many bytes.

Measured are the time of the step, for every process its highest resident memory without the pages of those files,
which are the kernel's to keep (RssAnon of /proc, ten times a second), and the largest sum of the files. The exit code
is 1 unless the context held every token of every nucleus that was kept, and loss and gradient are finite.

A step is 2.6e14 FLOPs, half an hour at 200 GFLOP/s. With --cells, a few nuclei are drawn, and the model is small.
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import psutil

from cctrain.config import Config, load_config
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import TokenStore, open_store
from cctrain.tracking.journal import history, read_journal
from cctrain.training.data import training_rule
from tools.peak_memory import watch
from tools.public_data import fetched, prepared
from tools.record import add_out, circumstances, keep

CONFIG = "configs/tissue.yaml"
GROUP = "donor_id"
SHAPE = {"depth": 12, "width": 256, "heads": 4, "latents": 128}
SMALL_SHAPE = {"depth": 2, "width": 128, "heads": 4, "latents": 8}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="that share the context (default: %(default)s)")
    parser.add_argument("--cells", type=int, help="only so many of the nuclei, and a small model")
    parser.add_argument("--work", type=Path, default=Path("data"), help="folder of all files (default: data)")
    add_out(parser)
    arguments = parser.parse_args()
    store = whole_store(arguments.work, arguments.cells)
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="tissue-") as folder:
        result = one_step(store, arguments, Path(folder))
    print(summary(result))
    keep(result, arguments.out)
    raise SystemExit(1 if result["failures"] else 0)


def whole_store(work: Path, num_cells: int | None) -> TokenStore:
    """The nuclei as one group; made if it is missing."""

    def source() -> Path:
        retina = fetched("retina", work)
        if num_cells is None:
            return retina
        part = work / f"retina-{num_cells}.h5ad"
        anndata.read_h5ad(retina)[:num_cells].write_h5ad(part)
        return part

    store = work / ("retina-whole" if num_cells is None else f"retina-whole-{num_cells}")
    return open_store(prepared(store, source, "--group-by", GROUP))


def one_step(store: TokenStore, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    files = folder / "activations"
    files.mkdir()
    shape = SHAPE if arguments.cells is None else SMALL_SHAPE
    overrides = {
        "data.store": store.path,
        "data.window": "null",
        "data.global_batch": 1,
        "data.max_tokens": int(store.num_tokens.max()),  # no nucleus is cut
        **{f"model.{key}": value for key, value in shape.items()},
        "training.steps": 1,
        "training.precision": "fp32",
        "evaluation.every": 0,
        "checkpoint.every": 0,
        "parallel.context": arguments.ranks,
        "memory.offload": "disk",
        "memory.offload_dir": files,
        "run.dir": folder / "run",
        "tracking.uri": f"sqlite:///{folder.resolve()}/mlflow.db",
    }
    words = [f"{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "cctrain", "train", CONFIG, *words, "--ranks", str(arguments.ranks)]
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.ranks)
    process = psutil.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""})
    peaks, most_files = watch(process, files)
    if process.returncode != 0:
        raise SystemExit(f"cctrain train ended with exit code {process.returncode}")
    [step] = [line for line in history(read_journal(folder / "run")) if line["event"] == "step"]
    expressed, tokens, targets = whole_context(store, load_config(folder / "run" / "config.yaml"))
    failures = [
        f"{key} is {step[key]:,}, not {wanted:,}"
        for key, wanted in (("tokens", tokens), ("targets", targets), ("contexts", 1))
        if step[key] != wanted
    ]
    if expressed != int(store.num_tokens.sum()):
        failures.append(f"{expressed:,} of {int(store.num_tokens.sum()):,} expressed genes are in the context")
    failures += [f"{key} is {step[key]}" for key in ("loss", "grad_norm") if not math.isfinite(step[key] or math.nan)]
    return {
        "question": "does a step fit on all nuclei of retina as one context, and with which memory option?",
        "memory_option": "memory.checkpointing=true memory.offload=disk",
        "cells": store.num_cells,
        "expressed": expressed,
        "tokens": tokens,
        "targets": targets,
        "model": shape,
        "ranks": arguments.ranks,
        "threads_each": threads,
        "loss": step["loss"],
        "grad_norm": step["grad_norm"],
        "step_seconds": step["step_seconds"],
        "data_seconds": step["data_seconds"],
        "peak_bytes_of_each_process": sorted(peaks.values(), reverse=True),
        "peak_bytes_of_files": most_files,
        "failures": failures,
        "store": store.digest,
        **circumstances("torch", "deepspeed"),
    }


def whole_context(store: TokenStore, config: Config) -> tuple[int, int, int]:
    """How many expressed genes, tokens and targets the one context has, built here by a single rank."""
    loader = Loader(store, training_rule(config, store), Share(), 0)
    [context] = loader.contexts(np.array([0]), np.array([0]))
    hidden = np.count_nonzero(context.target_counts)
    return int(np.count_nonzero(context.counts) + hidden), len(context.genes), len(context.targets)


def summary(result: dict[str, Any]) -> str:
    in_memory = ", ".join(f"{size / GIB:.2f}" for size in result["peak_bytes_of_each_process"][: result["ranks"]])
    lines = [
        f"one context of {result['tokens']:,} tokens: all {result['expressed']:,} expressed genes of "
        f"{result['cells']:,} nuclei, {result['targets']:,} targets; {result['memory_option']}",
        f"one step on {result['ranks']} context ranks: {result['step_seconds']:,.0f} s, {in_memory} GiB of memory in "
        f"the ranks, {result['peak_bytes_of_files'] / GIB:.1f} GiB in files; loss {result['loss']:.4f}, "
        f"gradient norm {result['grad_norm']:.4f}",
    ]
    return "\n".join([*lines, *(f"FAILED: {failure}" for failure in result["failures"])])


if __name__ == "__main__":
    main()
