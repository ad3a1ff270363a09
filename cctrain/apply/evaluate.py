"""Did it learn? A trained model on held-out cells, beside baselines that are hard to fool, on the same targets.

Every prediction sees the same visible counts and the same visible size factor; everything fitted is fitted on
training cells. Two checks guard the answer: the model with the rest of the context hidden (what it gains from
the cell, and not from knowing genes better), and the targets' counts permuted across cells within each gene
(which must destroy every advantage that comes from the cell). That no hidden count reaches the model is a matter
of tests: changing it leaves every input bit-identical.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from rich.console import Console
from rich.progress import track

from cctrain.apply import metrics
from cctrain.apply.baselines import fit_neighbours, gene_mean, poisson_gene_mean
from cctrain.apply.predict import load_model, predict_targets
from cctrain.apply.targets import Prediction, TargetSet, TrainingCells, permuted_across_cells
from cctrain.config import Config
from cctrain.data.hashing import hash64
from cctrain.data.loading.contexts import Context, by_cell, hide_visible, target_probability
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.loading.samples import Samples
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import DataError
from cctrain.parallel.mesh import find_device_kind
from cctrain.run_directory import open_run, write_atomically
from cctrain.training.data import context_rule

log = logging.getLogger(__name__)

# Beyond these the baselines and the arrays of targets would outgrow a laptop; a fixed subset serves.
MOST_TRAINING_CELLS = 20_000
MOST_HELD_OUT_CELLS = 2_000
DETECTED_IN = 0.05  # a gene counts for the correlation within genes from this detection rate on

MODEL, POISSON, GENE_MEAN, NEIGHBOURS, HIDDEN = (
    "model",
    "gene mean (Poisson)",
    "gene mean (negative binomial)",
    "nearest neighbours",
    "model, context hidden",
)


def evaluate(run_dir: Path) -> dict[str, Any]:
    """Metrics of a finished run on the cells that its store holds out; written to RUN/evaluation and returned.

    Raises UsageError, DataError or CheckpointError.
    """
    run = open_run(run_dir)
    store = open_store(Path(run.config.data.store), run.config.data.digest)
    config = run.config
    targets, num_contexts, contexts = held_out_targets(store, config)
    if not len(targets.genes):
        raise DataError(f"{store.path}: no gene of its held-out cells is a target: there is nothing to evaluate")
    model = load_model(run).to(torch.device(find_device_kind()))

    log.info("predicting %s targets of %s held-out cells", f"{len(targets.genes):,}", f"{targets.num_cells:,}")
    ours = predict_targets(model, _progress(contexts(), num_contexts, "predicting"))
    genes, probability = store.genes, target_probability(store.genes, config.objective)
    cells = training_cells(store)
    neighbours = fit_neighbours(cells, genes.share, genes.theta, probability, config.run.seed)
    predictions: dict[str, Prediction] = {
        MODEL: ours,
        POISSON: poisson_gene_mean(targets, genes.share),
        GENE_MEAN: gene_mean(targets, genes.share, genes.theta),
        NEIGHBOURS: neighbours.predict(targets),
        HIDDEN: predict_targets(
            model, map(hide_visible, _progress(contexts(), num_contexts, "predicting, context hidden"))
        ),
    }
    result = compare(targets, predictions, genes.detection_rate >= DETECTED_IN, config.run.seed)
    result |= {
        "run": run.path.name,
        "store_digest": store.digest,
        "draws": config.evaluation.draws,
        "held_out_cells": store.num_cells - store.num_train,
        "training_cells": store.num_train,
        "neighbours_fitted_on": cells.counts.shape[0],
        "neighbours_settings": vars(neighbours.settings),
    }
    write_report(run.path / "evaluation", result)
    return result


def compare(
    targets: TargetSet, predictions: dict[str, Prediction], considered: np.ndarray, seed: int
) -> dict[str, Any]:
    """The table, the sentence and the check by permutation. `considered` is bool (genes,)."""
    per_cell = {name: metrics.nll_per_cell(targets, *prediction) for name, prediction in predictions.items()}
    rows = []
    for name, (log_mu, _) in predictions.items():
        within_gene = metrics.correlation_within_gene(targets, log_mu, considered)
        difference = None if name == MODEL else metrics.difference(per_cell[MODEL], per_cell[name], seed)
        rows.append(
            {
                "name": name,
                "nll": float(np.nanmean(per_cell[name])),
                "difference": difference,
                "correlation_within_gene": _defined(within_gene["mean"]),
                "genes": within_gene["genes"],
                "correlation_within_cell": _defined(metrics.correlation_within_cell(targets, log_mu)["mean"]),
            }
        )
    permuted = permuted_across_cells(targets, seed)
    on_permuted = metrics.difference(
        metrics.nll_per_cell(permuted, *predictions[MODEL]),
        metrics.nll_per_cell(permuted, *predictions[GENE_MEAN]),
        seed,
    )
    return {
        "cells": targets.num_cells,
        "targets": len(targets.genes),
        "rows": rows,
        "permuted": on_permuted,
        "sentence": sentence(rows),
    }


def _defined(value: float) -> float | None:
    """JSON has no word for a correlation that no gene or cell had enough targets for."""
    return None if np.isnan(value) else value


def sentence(rows: list[dict[str, Any]]) -> str:
    """What the comparison says, in words."""
    parts = []
    for row in rows:
        difference = row["difference"]
        if difference is None:
            continue
        verdict = metrics.verdict(difference)
        link = "from" if verdict == "no different" else "than"
        name = "itself with the context hidden" if row["name"] == HIDDEN else f"the {row['name']}"
        parts.append(
            f"{verdict} {link} {name} ({difference['mean']:+.4f} nats per target, "
            f"95 % interval {difference['low']:+.4f} to {difference['high']:+.4f})"
        )
    cells = next(row["difference"]["cells"] for row in rows if row["difference"])
    return f"On {cells:,} held-out cells the model is {', '.join(parts[:-1])}, and {parts[-1]}."


def held_out_targets(store: TokenStore, config: Config) -> tuple[TargetSet, int, Callable[[], Iterator[Context]]]:
    """All targets of `evaluation.draws` fixed draws on each held-out cell; the number of contexts that hold them, and a
    function that builds these. The targets of a cell are the same whether its context holds other cells or not.
    """
    num_genes = len(store.genes.ids)

    def loader_of(max_tokens: int) -> Loader:
        return Loader(store, context_rule(config, store, "validation", max_tokens), Share(), 0)

    samples, draws = held_out_samples(store, config, loader_of(num_genes).samples)

    def contexts(max_tokens: int) -> Iterator[Context]:
        loader = loader_of(max_tokens)
        for start in range(0, len(samples), 64):
            yield from loader.contexts(samples[start : start + 64], draws[start : start + 64])

    # Baselines see every visible gene, whatever the model's longest context is.
    parts = [part for context in contexts(num_genes) for part in by_cell(context)]
    loader = loader_of(num_genes)
    pairs = zip(samples.tolist(), draws.tolist(), strict=True)
    rows = np.concatenate([loader.samples.cells(sample, loader.samples.epoch_of(draw)) for sample, draw in pairs])
    visible = [np.setdiff1d(np.arange(len(part.genes)), part.targets, assume_unique=True) for part in parts]
    targets = TargetSet(
        contexts=np.repeat(np.arange(len(parts)), [len(part.targets) for part in parts]),
        genes=np.concatenate([part.genes[part.targets] for part in parts]),
        counts=np.concatenate([part.target_counts for part in parts]).astype(np.int64),
        cell_of_context=np.unique(rows, return_inverse=True)[1],
        log_size_factor=np.concatenate([part.log_size_factors for part in parts]),
        visible_offsets=np.concatenate(([0], np.cumsum([len(v) for v in visible]))),
        visible_genes=np.concatenate([part.genes[v] for part, v in zip(parts, visible, strict=True)]),
        visible_counts=np.concatenate([part.counts[v] for part, v in zip(parts, visible, strict=True)]).astype(
            np.int64
        ),
        source_of_context=store.source_of_cell[rows],
    )
    return targets, len(samples), lambda: contexts(config.data.max_tokens or num_genes)


def held_out_samples(store: TokenStore, config: Config, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Each held-out sample (of many: a fixed choice) with each of its draws, int64 both."""
    held_out = np.arange(samples.num_train, len(samples))
    num_cells = samples.num_cells(held_out)
    if num_cells.sum() > MOST_HELD_OUT_CELLS:
        order = np.argsort(hash64(store.digest, config.run.seed, "held-out evaluation", held_out), kind="stable")
        within = np.cumsum(num_cells[order]) <= MOST_HELD_OUT_CELLS
        within[0] = True
        held_out = np.sort(held_out[order[within]])
        log.info("evaluating a fixed subset of %s held-out cells", f"{samples.num_cells(held_out).sum():,}")
    draws = np.arange(config.evaluation.draws)
    return np.repeat(held_out, len(draws)), np.tile(draws, len(held_out))


def training_cells(store: TokenStore) -> TrainingCells:
    """The training split, or a fixed sample of it, as one matrix."""
    rows = np.arange(store.num_train)
    if len(rows) > MOST_TRAINING_CELLS:
        # A store is shuffled by cell or by group, and the first cells of one with groups are those of few groups.
        if store.groups is not None:
            rows = np.argsort(hash64(store.digest, "baseline cells", rows), kind="stable")
        rows = np.sort(rows[:MOST_TRAINING_CELLS])
        log.info("fitting baselines on %s of %s training cells", f"{len(rows):,}", f"{store.num_train:,}")
    cells = store.cells(rows)
    shape = (len(rows), len(store.genes.ids))
    matrix = sp.csr_matrix((cells.counts.astype(np.int64), cells.genes, cells.offsets), shape=shape)
    return TrainingCells(matrix, store.source_of_cell[rows], store.measured)


def table(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| prediction | NLL per target | model minus it (95 % interval) | correlation within a gene | within a cell |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        d = row["difference"]
        difference = f"{d['mean']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})" if d else ""
        lines.append(
            f"| {row['name']} | {row['nll']:.4f} | {difference} | {_shown(row['correlation_within_gene'])} "
            f"| {_shown(row['correlation_within_cell'])} |"
        )
    d = result["permuted"]
    lines += [
        "",
        f"{result['cells']:,} of {result['held_out_cells']:,} held-out cells, {result['targets']:,} targets in "
        f"{result['draws']} draws; neighbours among {result['neighbours_fitted_on']:,} of "
        f"{result['training_cells']:,} training cells. "
        "A hidden context is nothing the model was trained on: that row says what it takes from the cell, the "
        "gene mean is the harder rival. Correlations are of log1p counts; within a gene: across cells, mean over "
        f"{result['rows'][0]['genes']:,} genes detected in over 5 % of training cells. "
        "With the counts of each gene permuted across cells, model minus gene mean is "
        f"{d['mean']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f}): below zero, that part of the advantage would be "
        "knowledge of genes, not of cells.",
    ]
    return "\n".join(lines)


def _shown(correlation: float | None) -> str:
    return "too few targets" if correlation is None else f"{correlation:.3f}"


def write_report(folder: Path, result: dict[str, Any]) -> None:
    from cctrain.apply.figures import evaluation_figure

    folder.mkdir(exist_ok=True)
    write_atomically(folder / "metrics.json", json.dumps(result, indent=1, allow_nan=False).encode())
    write_atomically(folder / "table.md", f"{result['sentence']}\n\n{table(result)}\n".encode())
    evaluation_figure(folder.parent, result, folder / "figure.png")


def _progress(contexts: Iterator[Context], total: int, what: str) -> Iterable[Context]:
    return track(contexts, description=what, total=total, console=Console(stderr=True))
