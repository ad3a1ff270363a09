"""The training loop: one optimizer step after another, a journal line for each, a look at held-out cells.

The loss of a step is the sum of the target losses of the whole global batch divided by its number of targets.
ZeRO averages gradients over the W ranks, so a rank's loss for one micro-batch is

    W · (sum of the losses of its own targets) / (targets in the whole global batch)

The denominator is known before the first backward: every rank has laid out its batches by then.
"""

import hashlib
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from cctrain.config import Config
from cctrain.cost.closed_form import step_cost
from cctrain.data.batches import Batch
from cctrain.data.loader import Loader, RankStep
from cctrain.data.order import Order
from cctrain.errors import DataError, TrainingError
from cctrain.model.transformer import Inputs, Transformer
from cctrain.parallel.mesh import Mesh, gather_rows, sum_over_ranks
from cctrain.training.engine import set_learning_rate, take_step
from cctrain.training.objective import negative_log_likelihood
from cctrain.training.schedule import learning_rate


def to_inputs(batch: Batch, device: torch.device) -> Inputs:
    """The part of a batch that the model may see, on its device."""
    log_size_factors = batch.log_size_factors[batch.cells]
    return Inputs(
        genes=torch.from_numpy(batch.genes).to(device),
        counts=torch.from_numpy(batch.counts).to(device),
        log_size_factors=torch.from_numpy(log_size_factors).to(device),
        targets=torch.from_numpy(batch.targets).to(device),
        offsets=batch.offsets.tolist(),
    )


def run_steps(engine: Any, config: Config, mesh: Mesh, loader: Loader, order: Order) -> Iterator[dict[str, Any]]:
    """Train all steps; yield each one's journal values, `step` and `samples` among them, on every rank."""
    steps = loader.training_steps(order, config.data.global_batch, 0, config.training.steps)
    for step in range(1, config.training.steps + 1):
        started = time.perf_counter()
        rank_step = next(steps)
        data_seconds = time.perf_counter() - started
        set_learning_rate(engine, learning_rate(step, config.training))
        values = train_step(engine, config, mesh, rank_step)
        values |= {
            "step": step,
            "learning_rate": learning_rate(step, config.training),
            "step_seconds": time.perf_counter() - started,
            "data_seconds": data_seconds,
        }
        loss = values["loss"]
        yield values
        if not np.isfinite(loss):
            raise TrainingError(
                f"the loss of step {step} is {loss}: lower training.learning_rate "
                f"(now {config.training.learning_rate}) or lengthen training.warmup"
            )


def train_step(engine: Any, config: Config, mesh: Mesh, rank_step: RankStep) -> dict[str, Any]:
    """One optimizer step over this rank's batches; returns what all ranks did together."""
    engine.train()
    counts = gather_rows(_context_table(rank_step.batches, mesh.device))
    step_targets = int(counts[:, 3].sum())
    local_loss = 0.0
    for index, batch in enumerate(rank_step.batches):
        engine.set_gradient_accumulation_boundary(index == len(rank_step.batches) - 1)
        log_mu, log_theta = engine(to_inputs(batch, mesh.device))
        losses = negative_log_likelihood(torch.from_numpy(batch.target_counts).to(mesh.device), log_mu, log_theta)
        engine.backward(losses.sum() * (mesh.num_ranks / max(1, step_targets)), scale_wrt_gas=False)
        norm = take_step(engine)
        local_loss += float(losses.detach().double().sum())
    loss = sum_over_ranks([local_loss], mesh.device)[0] / max(1, step_targets)
    tokens = counts[:, 2].tolist()
    return {
        "loss": loss,
        "grad_norm": float(norm) if norm is not None else None,
        "tokens": sum(tokens),
        "contexts": len(counts),
        "targets": step_targets,
        "accumulation": len(rank_step.batches),
        "samples": samples_digest(counts[:, :2].cpu().numpy()),
        **step_cost(config.model, tokens, step_targets, config.memory.checkpointing),
    }


def samples_digest(pairs: np.ndarray) -> str:
    """SHA-256 over the sorted (position, sample id) pairs, int64 little endian (contexts, 2)."""
    ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return hashlib.sha256(ordered.astype("<i8").tobytes()).hexdigest()


def _context_table(batches: list[Batch], device: torch.device) -> torch.Tensor:
    """int64 (contexts, 4): position, sample, tokens and targets of each context that this rank runs."""
    rows = [torch.zeros(0, 4, dtype=torch.int64)]
    for batch in batches:
        if not len(batch.samples):
            continue
        targets = np.diff(np.searchsorted(batch.targets, batch.offsets))
        table = np.stack((batch.positions, batch.samples, np.diff(batch.offsets), targets), axis=1)
        rows.append(torch.from_numpy(table))
    return torch.cat(rows).to(device)


@torch.no_grad()
def evaluate_held_out(engine: Any, mesh: Mesh, batches: list[Batch]) -> dict[str, float]:
    """Held-out NLL per target, averaged within a cell, then over cells, beside the gene mean's on the same targets.

    Every rank calls this with as many batches.
    """
    engine.eval()
    model: Transformer = engine.module
    sums = np.zeros(3)
    for batch in batches:
        inputs = to_inputs(batch, mesh.device)
        log_mu, log_theta = engine(inputs)
        if not len(batch.samples):
            continue
        counts = torch.from_numpy(batch.target_counts).to(mesh.device).double()
        genes = inputs.genes[inputs.targets]
        expected = inputs.log_size_factors[inputs.targets].double() + model.log_share[genes].double()
        ours = negative_log_likelihood(counts, log_mu.double(), log_theta.double())
        gene_mean = negative_log_likelihood(counts, expected, model.log_theta[genes].double())
        bounds = np.searchsorted(batch.targets, batch.offsets)
        for start, stop in pairwise(bounds):
            if start < stop:
                sums += [float(ours[start:stop].mean()), float(gene_mean[start:stop].mean()), 1.0]
    nll, gene_mean_nll, cells = sum_over_ranks(sums.tolist(), mesh.device)
    if not cells:
        raise DataError("no gene of the held-out cells is a target: raise objective.target_rate or evaluation.cells")
    return {
        "nll": nll / cells,
        "gene_mean_nll": gene_mean_nll / cells,
        "difference": (nll - gene_mean_nll) / cells,
        "cells": int(cells),
    }
