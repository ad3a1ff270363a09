"""Do other cells in the context help? Contexts of one cell beside windows of 16 and 64, on the same held-out targets.

    python -m tools.compare_contexts [--cells-seen N] [--seeds 0] [--work data] [--out FILE]

`retina` has one donor and no positions, so there is no group whose members know something of each other that the
weights do not learn anyway, and its cell types would tell the answer. Nuclei are therefore put into pools of 64 at
random, as if each pool were a well; two pools are held out. The models have one shape, but for the vector that tells
cells apart, and see the same number of cells, 64 in every step: 64 contexts of a cell, 4 of 16 or 1 of 64. Nothing is
cut.

Printed is the negative log-likelihood per target of the held-out cells (the fixed targets of `cctrain evaluate`, which
are the same whatever the context), what it is beside contexts of one cell and the gene mean, with a paired bootstrap
over cells, and the correlation within a gene. Ten minutes a model on two cores.
"""

import argparse
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from cctrain.apply import metrics
from cctrain.apply.baselines import gene_mean
from cctrain.apply.evaluate import DETECTED_IN, held_out_targets
from cctrain.apply.predict import load_model, predict_targets
from cctrain.data.store.store import open_store
from cctrain.run_directory import open_run
from cctrain.tracking.journal import history, read_journal
from tools.public_data import cctrain, fetched, prepared
from tools.record import add_out, circumstances, keep

CONFIG = "configs/quickstart.yaml"
POOL, POOL_COLUMN, HELD_OUT = 64, "pool", ("pool-00", "pool-01")
WINDOWS = (None, 16, 64)  # None: contexts of one cell
CELLS_A_STEP = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells-seen", type=int, default=8 * 872, help="by each model (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("data"), help="folder of all files (default: data)")
    parser.add_argument("--runs", type=Path, default=Path("runs/contexts"), help="where the runs go")
    add_out(parser)
    arguments = parser.parse_args()
    store = pooled_store(arguments.work)
    result = {
        "question": "does a model predict a cell's hidden genes better when it sees other cells beside it?",
        "pools": f"{POOL} nuclei of retina each, at random; {len(HELD_OUT)} pools held out",
        "store": open_store(store).digest,
        "cells_seen": arguments.cells_seen,
        "cells_a_step": CELLS_A_STEP,
        **circumstances("torch", "deepspeed"),
        "models": [],
    }
    for seed in arguments.seeds:
        alone = None
        for window in WINDOWS:
            run = arguments.runs / f"seed-{seed}-{'cell' if window is None else f'window-{window}'}"
            train(run, store, window, seed, arguments)
            row, per_cell = judged(run, window, seed, alone)
            alone = per_cell if window is None else alone
            result["models"].append(row)
            keep(result, arguments.out)
    print(table(result))


def pooled_store(work: Path) -> Path:
    """The nuclei in random pools; made if it is missing."""

    def source() -> Path:
        pooled, cells = work / "retina-pooled.h5ad", anndata.read_h5ad(fetched("retina", work))
        places = np.random.default_rng(0).permutation(cells.n_obs)
        cells.obs[POOL_COLUMN] = [f"pool-{place // POOL:02d}" for place in places]
        cells.write_h5ad(pooled)
        return pooled

    held_out = [word for name in HELD_OUT for word in ("--hold-out", name)]
    groups = ["--group-by", POOL_COLUMN, "--split-by", POOL_COLUMN, *held_out]
    return prepared(work / "retina-pooled", source, *groups)


def train(run: Path, store: Path, window: int | None, seed: int, arguments: argparse.Namespace) -> None:
    steps = max(1, arguments.cells_seen // CELLS_A_STEP)
    settings = {
        "run.dir": run,
        "run.seed": seed,
        "data.store": store,
        "data.context": "cell" if window is None else "group",
        "data.window": "null" if window is None else window,
        "data.global_batch": CELLS_A_STEP // (window or 1),
        "data.max_tokens": int(open_store(store).num_tokens.max()),
        "model.width": arguments.width,
        "training.steps": steps,
        "evaluation.every": max(1, steps // 4),
        "checkpoint.every": max(1, steps // 4),
    }
    cctrain("train", CONFIG, *(f"{key}={value}" for key, value in settings.items()))


def judged(run: Path, window: int | None, seed: int, alone: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray]:
    """A row of the result, and the negative log-likelihood of each held-out cell; `alone`: of cells alone."""
    trained = open_run(run)
    store = open_store(Path(trained.config.data.store))
    targets, _, contexts = held_out_targets(store, trained.config)
    log_mu, log_theta = predict_targets(load_model(trained), contexts())
    per_cell = metrics.nll_per_cell(targets, log_mu, log_theta)
    baseline = metrics.nll_per_cell(targets, *gene_mean(targets, store.genes.share, store.genes.theta))
    considered = store.genes.detection_rate >= DETECTED_IN
    steps = [line for line in history(read_journal(run)) if line["event"] == "step"]
    return {
        "window": window,
        "seed": seed,
        "nll": float(np.nanmean(per_cell)),
        "minus_gene_mean": metrics.difference(per_cell, baseline, seed),
        "minus_cell": None if alone is None else metrics.difference(per_cell, alone, seed),
        "correlation_within_gene": metrics.correlation_within_gene(targets, log_mu, considered)["mean"],
        "held_out_cells": targets.num_cells,
        "targets": len(targets.genes),
        "steps": len(steps),
        "tokens_a_context": sum(line["tokens"] for line in steps) / sum(line["contexts"] for line in steps),
        "seconds": sum(line["step_seconds"] for line in steps),
    }, per_cell


def table(result: dict[str, Any]) -> str:
    lines = [
        "| context | tokens | NLL per target | minus contexts of one cell (95 % interval) | minus gene mean "
        "| correlation within a gene |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["models"]:
        context = "one cell" if row["window"] is None else f"{row['window']} cells"
        lines.append(
            f"| {context}, seed {row['seed']} | {row['tokens_a_context']:,.0f} | {row['nll']:.4f} "
            f"| {interval(row['minus_cell'])} | {interval(row['minus_gene_mean'])} "
            f"| {row['correlation_within_gene']:.3f} |"
        )
    return "\n".join(lines)


def interval(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    return f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"


if __name__ == "__main__":
    main()
