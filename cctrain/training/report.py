"""What a person sees of a training run: the plan before it, one line while it goes on."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cctrain.config import Config
from cctrain.cost.devices import known_device, load_device
from cctrain.cost.memory import peak, rank_memory
from cctrain.cost.parameters import num_parameters
from cctrain.cost.step import step_cost
from cctrain.cost.work import work_of
from cctrain.data.loading.loader import Loader
from cctrain.data.store.store import TokenStore
from cctrain.model.tiles import TILE_TOKENS
from cctrain.parallel.mesh import Mesh
from cctrain.training.data import contexts_of_store
from cctrain.training.engine import DTYPES
from cctrain.words import duration, model_in_words

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class Report:
    """Only the first rank shows anything. On a terminal one line is redrawn; elsewhere a line comes now and then."""

    def __init__(self, config: Config, mesh: Mesh, store: TokenStore, loader: Loader, after: int = 0):
        self.after = after
        self.shown = mesh.is_first
        self.num_steps = config.training.steps
        self.difference: float | None = None
        self.started = self.last_line = time.monotonic()
        self.tokens = 0
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.peak = 0.0
        if self.shown:
            rate = matrix_product_rate(config.model.width, config.training.precision, mesh.device)
            self.peak = mesh.num_ranks * (peak_of_data_sheet(config.training.precision, mesh.device) or rate)
            for line in plan(config, mesh, store, loader, rate):
                log.info(line)

    @contextmanager
    def progress(self) -> Iterator[None]:
        self.started = self.last_line = time.monotonic()
        if not (self.shown and sys.stderr.isatty()):
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as self.bar:
            self.task = self.bar.add_task("first step", total=self.num_steps, completed=self.after)
            yield

    def step(self, step: int, values: dict[str, Any]) -> None:
        if not self.shown:
            return
        self.tokens += values["tokens"]
        elapsed = time.monotonic() - self.started
        line = f"step {step}/{self.num_steps} · loss {values['loss']:.4f}"
        if self.difference is not None:
            line += f" · held-out {self.difference:+.4f} against the gene mean"
        line += f" · {self.tokens / elapsed:,.0f} tokens/s"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, description=line)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES or step == self.num_steps:
            self.last_line = time.monotonic()
            log.info("%s · %s left", line, duration(elapsed / (step - self.after) * (self.num_steps - step)))

    def utilisation(self, values: dict[str, Any]) -> float | None:
        """The share of what all devices could do that a step has done; the first rank's to say."""
        return values["cost/total_flops"] / values["step_seconds"] / self.peak if self.shown else None

    def look(self, values: dict[str, float]) -> None:
        self.difference = values["difference"]


def plan(config: Config, mesh: Mesh, store: TokenStore, loader: Loader, rate: float) -> list[str]:
    """What is about to be trained, on what, with how much memory, and for how long at least; `rate` is in FLOP/s."""
    contexts = contexts_of_store(loader)
    work = work_of(config, contexts, mesh.num_ranks, TILE_TOKENS[mesh.device.type])
    held, made = rank_memory(config, contexts.genes, work)
    samples, cells_each = loader.samples, store.num_train / loader.samples.num_train
    trained = config.training.steps * config.data.global_batch
    stage = config.parallel.zero_stage
    cost = step_cost(
        config.model, [round(contexts.tokens)], round(contexts.targets), config.memory.checkpointing, stage
    )
    seconds = trained * cost["cost/total_flops"] / (rate * mesh.num_ranks)
    return [
        f"data: {store.num_train:,} training cells, {store.num_cells - store.num_train:,} held out, "
        f"{contexts.genes:,} genes; contexts of about {contexts.tokens:,.0f} tokens, "
        f"{contexts.targets:,.0f} of them targets" + (f", of {cells_each:,.1f} cells" if cells_each > 1 else ""),
        f"model: {model_in_words(config.model)}: {num_parameters(config.model, contexts.genes):,} parameters",
        f"training: {config.training.steps:,} steps of {config.data.global_batch} contexts "
        f"({trained / samples.num_train:.1f} epochs), {config.training.precision}, "
        f"ZeRO {stage} on {mesh.num_ranks} {'GPU' if mesh.device.type == 'cuda' else 'CPU'} rank(s)"
        + (f", {mesh.num_context_ranks} for each context" if mesh.num_context_ranks > 1 else ""),
        f"memory: about {peak(held, made, work.micro_batches) / 2**20:,.0f} MiB a rank beside the process itself: "
        f"{held.kept / 2**20:,.0f} for weights and optimizer, {made.total / 2**20:,.0f} for the activations of "
        f"{work.most.tokens:,.0f} tokens, and what each step needs for a while",
        f"time: {duration(seconds)} at least, at the speed of a plain matrix product here ({rate / 1e9:,.0f} GFLOP/s); "
        f"attention is {100 * cost['cost/attention_share']:.0f} % of the arithmetic",
    ]


def peak_of_data_sheet(precision: str, device: torch.device) -> float | None:
    """FLOP/s of a GPU that `cctrain/cost/devices` knows, which is measured against that; None of any other device."""
    if device.type != "cuda":
        return None
    name = known_device(torch.cuda.get_device_name(device))
    return load_device(name, precision).peak if name else None


def matrix_product_rate(width: int, precision: str, device: torch.device) -> float:
    """FLOP/s of a product of the shape that dominates a layer: of the fastest in a fifth of a second, because what else
    runs on a machine can slow most of them down."""
    rows = torch.ones(4096, width, dtype=DTYPES[precision], device=device)
    weight = torch.ones(width, 4 * width, dtype=DTYPES[precision], device=device)
    out = rows @ weight  # made once: fresh memory costs more than the product
    repeats = 50 if device.type == "cuda" else 1  # to start one takes a GPU's host longer than the product the GPU

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(rows, weight, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / repeats

    fastest, end = seconds(), time.perf_counter() + 0.2
    while time.perf_counter() < end:
        fastest = min(fastest, seconds())
    return 2 * 4096 * width * 4 * width / fastest
