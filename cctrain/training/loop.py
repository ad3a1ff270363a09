"""The training loop: one optimizer step after another, a journal line for each, a look at held-out cells.

The loss of a step is the sum of the target losses of the whole global batch divided by its number of targets.
ZeRO is told nothing of context ranks and averages gradients over all W ranks, so a rank's loss for one micro-batch is

    W · (sum of the losses of its own targets) / (targets in the whole global batch)

The denominator is known before the first backward: every rank has laid out its batches by then.

A step whose loss or gradient is not finite is not taken: its samples count as consumed, and training goes on.
"""

import hashlib
import math
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cctrain.config import Config
from cctrain.cost.step import step_cost, step_traffic
from cctrain.data.loading.batches import Batch
from cctrain.data.loading.loader import Loader, RankStep
from cctrain.data.loading.order import Order
from cctrain.data.loading.prefetch import prefetched
from cctrain.errors import DataError, TrainingError
from cctrain.model.transformer import Inputs, Transformer
from cctrain.parallel.mesh import Mesh, gather_rows, sum_over_context, sum_over_ranks
from cctrain.parallel.waiting import seconds_waited
from cctrain.training.engine import set_learning_rate, take_step
from cctrain.training.objective import negative_log_likelihood
from cctrain.training.observations import Observer
from cctrain.training.rank_checks import same_on_all_ranks
from cctrain.training.schedule import learning_rate


def to_inputs(batch: Batch, device: torch.device) -> Inputs:
    """The part of a batch that the model may see, on its device."""
    return Inputs(
        genes=on_device(batch.genes, device),
        counts=on_device(batch.counts, device),
        log_size_factors=on_device(batch.log_size_factors[batch.cells], device),
        targets=on_device(batch.targets, device),
        offsets=batch.offsets.tolist(),
        cells=torch.from_numpy(batch.cells).to(device),
        encodings=torch.from_numpy(batch.encodings).to(device),
    )


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A GPU copies from pinned memory by itself, while this process goes on to queue the work on what is copied."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass(frozen=True)
class StepResult:
    """What all ranks did together in one step; the same on every rank.

    values are the journal's; position counts the samples consumed by now; samples are the ids of this step;
    applied is whether a step was taken (not where the loss or the gradient was not finite); requests are the ranks'
    requests to stop or to save, summed.
    """

    step: int
    position: int
    samples: list[int]
    applied: bool
    requests: list[float]
    values: dict[str, Any]


def run_steps(
    engine: Any,
    config: Config,
    mesh: Mesh,
    loader: Loader,
    order: Order,
    after: int = 0,
    position: int = 0,
    requests: Callable[[], list[float]] = list,
) -> Generator[StepResult, None, None]:
    """Train the steps after step `after`, at which `position` samples had been consumed; yield each one.

    Close it to end its background processes before the last step.
    """
    observer = Observer(mesh.device)
    num_steps, workers = config.training.steps - after, data_workers(config, mesh.device)
    with closing(prefetched(loader, order, config.data.global_batch, position, num_steps, workers)) as steps:
        for step in range(after + 1, config.training.steps + 1):
            started, waited_before = time.perf_counter(), seconds_waited()
            rank_step = next(steps)
            data_seconds = time.perf_counter() - started
            rate = learning_rate(step, config.training)
            set_learning_rate(engine, rate)
            checks = same_on_all_ranks(engine, mesh, rank_step, step) if config.parallel.check_ranks else nullcontext()
            with checks:
                result = train_step(engine, config, mesh, rank_step, step, requests)
            step_seconds = time.perf_counter() - started
            seen = observer.observe(data_seconds, seconds_waited() - waited_before)
            result.values.update(learning_rate=rate, step_seconds=step_seconds, **seen)
            yield result


def data_workers(config: Config, device: torch.device) -> int:
    """Of each rank: what the configuration says, or its default for this device."""
    if config.data.workers is not None:
        return config.data.workers
    return 2 if device.type == "cuda" else 0


def train_step(
    engine: Any, config: Config, mesh: Mesh, rank_step: RankStep, step: int, requests: Callable[[], list[float]]
) -> StepResult:
    """One optimizer step over this rank's batches."""
    engine.train()
    slices = gather_rows(_slice_table(rank_step.batches, mesh))
    counts = whole_contexts(slices[:, :4], mesh.num_context_ranks)
    step_targets = int(counts[:, 3].sum())
    scale = mesh.num_ranks / max(1, step_targets)
    local_loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
    norm, applied = None, False
    for index, batch in enumerate(rank_step.batches):
        engine.set_gradient_accumulation_boundary(index == len(rank_step.batches) - 1)
        log_mu, log_theta = engine(to_inputs(batch, mesh.device))
        losses = negative_log_likelihood(on_device(batch.target_counts, mesh.device), log_mu, log_theta)
        batch_loss = losses.sum()
        # A loss that is not finite makes the whole gradient so: the engine decides by the gradient, on all ranks alike.
        engine.backward(batch_loss * torch.where(batch_loss.detach().isfinite(), scale, math.nan), scale_wrt_gas=False)
        norm, applied = take_step(engine)
        local_loss += losses.detach().double().sum()
    # One collective for both: whether to stop is agreed by all ranks at every step, and costs nothing.
    total, *agreed = sum_over_ranks([float(local_loss), *requests()], mesh.device)
    values = {
        "loss": total / max(1, step_targets),
        "grad_norm": norm,
        **load_of_step(config, slices, counts, len(engine.module.log_share), len(rank_step.batches), mesh.num_ranks),
    }
    position = rank_step.position + rank_step.num_contexts
    return StepResult(step, position, counts[:, 1].tolist(), applied, agreed, values)


def load_of_step(
    config: Config, slices: torch.Tensor, counts: torch.Tensor, num_genes: int, accumulation: int, num_ranks: int
) -> dict[str, Any]:
    """What the journal says of the contexts of a step: how many and which, how they were packed, what they cost.

    slices int64 (contexts · C, 6) of all ranks, counts int64 (contexts, 4) as `whole_contexts` gives them.
    """
    of_slices, of_contexts = slices.cpu().numpy(), counts.cpu().numpy()
    tokens, targets = of_contexts[:, 2].tolist(), int(of_contexts[:, 3].sum())
    return {
        "tokens": sum(tokens),
        "contexts": len(counts),
        "targets": targets,
        "accumulation": accumulation,
        "packing_efficiency": packing_efficiency(of_slices[:, 2], of_slices[:, 4], of_slices[:, 5], num_ranks),
        "samples": samples_digest(of_contexts[:, :2]),
        **step_cost(config.model, tokens, targets, config.memory.checkpointing, config.parallel.zero_stage),
        **step_traffic(config, num_genes, len(counts), accumulation, num_ranks),
    }


def samples_digest(pairs: np.ndarray) -> str:
    """SHA-256 over the sorted (position, sample id) pairs, int64 little endian (contexts, 2)."""
    ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return hashlib.sha256(ordered.astype("<i8").tobytes()).hexdigest()


def packing_efficiency(tokens: np.ndarray, micro_batch: np.ndarray, rank: np.ndarray, num_ranks: int) -> float:
    """The share of the ranks' time that has tokens to work on, if a micro-batch takes as long as its fullest rank.

    int64 (slices,) each. Nothing is padded, so what is missing to 1 is imbalance alone. In NumPy, because PyTorch
    starts all its threads for a maximum over a dimension (3 ms beside other work on two cores, where this takes 0.3).
    """
    if not len(tokens):
        return 1.0
    loads = np.zeros((micro_batch.max() + 1, num_ranks), dtype=np.int64)
    np.add.at(loads, (micro_batch, rank), tokens)
    return float(loads.sum() / max(1, num_ranks * loads.max(axis=1).sum()))


def whole_contexts(slices: torch.Tensor, num_context_ranks: int) -> torch.Tensor:
    """int64 (contexts, 4): position, sample, tokens and targets of each context, from those of its slices.

    slices int64 (contexts · C, 4), by rank. Raises TrainingError unless the C ranks of a row ran the same contexts.
    """
    contexts, index, times = slices[:, :2].unique(dim=0, return_inverse=True, return_counts=True)
    if not bool((times == num_context_ranks).all()):
        odd = contexts[times != num_context_ranks].tolist()
        raise TrainingError(f"not every slice of these contexts was run, (position, sample): {odd[:8]}")
    sums = torch.zeros_like(contexts).index_add_(0, index, slices[:, 2:])
    return torch.cat((contexts, sums), dim=1)


def _slice_table(batches: list[Batch], mesh: Mesh) -> torch.Tensor:
    """int64 (contexts, 6): position, sample; tokens and targets of what this rank holds; micro-batch and rank."""
    rows = [torch.zeros(0, 6, dtype=torch.int64)]
    for index, batch in enumerate(batches):
        if not len(batch.samples):
            continue
        targets = np.diff(np.searchsorted(batch.targets, batch.offsets))
        place = np.full(len(targets), index), np.full(len(targets), mesh.rank)
        table = np.stack((batch.positions, batch.samples, np.diff(batch.offsets), targets, *place), axis=1)
        rows.append(torch.from_numpy(table))
    return torch.cat(rows).to(mesh.device)


@torch.no_grad()
def evaluate_held_out(
    engine: Any, mesh: Mesh, batches: list[Batch], beat: Callable[[str], None] = lambda doing: None
) -> dict[str, float]:
    """Held-out NLL per target, averaged within a cell, then over cells, beside the gene mean's on the same targets.

    Every rank calls this with as many batches; `beat` is called before each.
    """
    engine.eval()
    model: Transformer = engine.module
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    for batch in batches:
        beat("looking at the held-out cells")
        inputs = to_inputs(batch, mesh.device)
        log_mu, log_theta = engine(inputs)
        if not len(batch.samples):
            continue
        counts = on_device(batch.target_counts, mesh.device).double()
        genes = inputs.genes[inputs.targets]
        expected = inputs.log_size_factors[inputs.targets].double() + model.log_share[genes].double()
        ours = negative_log_likelihood(counts, log_mu.double(), log_theta.double())
        gene_mean = negative_log_likelihood(counts, expected, model.log_theta[genes].double())
        cells = torch.from_numpy(batch.cells[batch.targets]).to(mesh.device)
        losses = torch.stack((ours, gene_mean, torch.ones_like(ours)), dim=1)
        by_cell = torch.zeros(len(batch.log_size_factors), 3, dtype=torch.float64, device=mesh.device)
        # The cells that this rank shares with others of its row are whole only now.
        by_cell = sum_over_context(by_cell.index_add_(0, cells, losses), mesh)
        by_cell = by_cell[by_cell[:, 2] > 0]
        sums += (by_cell / by_cell[:, 2:]).sum(dim=0)
    totals = sum_over_ranks(sums.tolist(), mesh.device)
    nll, gene_mean_nll, num_cells = (total / mesh.num_context_ranks for total in totals)
    if not num_cells:
        raise DataError("no gene of the held-out cells is a target: raise objective.target_rate or evaluation.cells")
    return {
        "nll": nll / num_cells,
        "gene_mean_nll": gene_mean_nll / num_cells,
        "difference": (nll - gene_mean_nll) / num_cells,
        "cells": round(num_cells),
    }
