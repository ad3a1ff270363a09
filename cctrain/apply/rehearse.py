"""A training's own steps on this machine, before there is a run: `cctrain estimate` goes by them.

What a step takes beyond its parts (starting operations, DeepSpeed's hooks, caches that are cold) no closed form knows,
nor what a process comes to hold beyond its tensors: contexts have ever other lengths, and a CPU's heap keeps room for
them in pieces. So the training's own loop runs for some seconds, on as many ranks, and is compared with what the
closed form says of it. It takes the contexts of the store; where there is none yet, made-up ones. Where a step would
take long, or the model is large, the rehearsal is smaller: fewer contexts, shorter ones, fewer layers; the closed form
leads from there to the whole.
"""

import copy
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cctrain.apply.calibrate import on_local_ranks
from cctrain.config import Config
from cctrain.cost.devices import Device
from cctrain.cost.estimate import estimate, needs_of
from cctrain.cost.parameters import num_parameters
from cctrain.cost.step import step_cost
from cctrain.cost.work import Contexts
from cctrain.data.loading.batches import Batch
from cctrain.data.loading.loader import Loader, RankStep
from cctrain.data.loading.order import Order
from cctrain.data.store.store import GeneTable, open_store
from cctrain.parallel.mesh import Mesh, sum_over_ranks
from cctrain.process_memory import resident
from cctrain.tracking.client import connect
from cctrain.training.data import share_of, training_order, training_rule
from cctrain.training.engine import build_engine
from cctrain.training.loop import run_steps, train_step
from cctrain.training.train import build_model

# By steps of 2 seconds at most, what a training of longer ones holds beside its tensors was foretold too low or too
# high: some of it grows with the tensors, some does not.
LONGEST_STEP, SECONDS_OF_STEPS, FEWEST_STEPS, MOST_STEPS = 6.0, 12.0, 3, 150
STEPS_OF_FEW_TOKENS, FEW_TOKENS = 3, 64  # of a context
SHORTEST, MOST_PARAMETERS = 4096, 50_000_000
SECONDS_BETWEEN_LOOKS = 0.005


@dataclass(frozen=True)
class Rehearsal:
    """Its steps, without the first half of them: the seconds of each, and what its contexts were like. And the most
    bytes of memory that a rank held, libraries and all. `memory_of_few_tokens`: the same in steps of so few tokens that
    little of it is theirs. `growth`: what more it will come to hold."""

    steps: list[tuple[float, Contexts]]
    memory: float
    memory_of_few_tokens: float
    growth: float


def smaller(
    config: Config, contexts_of: Callable[[Config], Contexts], ranks: int, device: Device
) -> tuple[Config, Contexts]:
    """The same training with a step of `LONGEST_STEP` seconds at most, by the closed form, where that can be had."""
    config = copy.deepcopy(config)
    model, data, contexts = config.model, config.data, contexts_of(config)
    rows = ranks // config.parallel.context
    while num_parameters(model, contexts.genes) > MOST_PARAMETERS and model.depth > 1:
        model.depth //= 2
    while estimate(config, contexts, device, ranks).seconds.total > LONGEST_STEP:
        if data.global_batch > rows:
            data.global_batch = max(rows, data.global_batch // 2)
        elif contexts.tokens > SHORTEST * config.parallel.context and shorten(config, contexts_of):
            contexts = contexts_of(config)
        elif model.depth > 1:
            model.depth //= 2
        else:
            break
    return config, contexts


def shorten(config: Config, contexts_of: Callable[[Config], Contexts]) -> bool:
    """Half the cells of a context, which keeps the share of targets; of a single cell half the visible tokens. False
    where there is nothing to halve."""
    data = config.data
    if data.context == "group" and data.window != 1:
        of_a_cell = replace(config, data=replace(data, window=1))
        cells = data.window or round(contexts_of(config).tokens / contexts_of(of_a_cell).tokens)
        data.window = max(1, cells // 2)
        return True
    data.max_tokens = (data.max_tokens or 0) // 2
    return data.max_tokens > 0


def expected_seconds(step_seconds: float) -> float:
    """Of a rehearsal of such steps, by their parts."""
    return max(SECONDS_OF_STEPS, (FEWEST_STEPS + 1) * step_seconds)


def rehearse(config: Config, contexts: Contexts, ranks: int) -> Rehearsal:
    """Take steps on so many local ranks. Raises TrainingError where their memory does not suffice."""
    sharing, precision = config.parallel.context, config.training.precision
    return Rehearsal(**on_local_ranks(take_steps, (config, contexts), ranks, sharing, precision))


def take_steps(config: Config, contexts: Contexts, mesh: Mesh) -> dict[str, Any]:
    """The fields of a rehearsal: what one of the ranks does."""
    with tempfile.TemporaryDirectory() as folder:
        connect(f"sqlite:///{folder}/mlflow.db")  # the first rank of a training holds all that this loads
    config.training.steps, taken = MOST_STEPS, []
    genes, loader, order = from_store(config, mesh) if has_store(config) else made_up(config, contexts, mesh)
    engine = build_engine(build_model(config, genes, mesh), config, mesh)
    peaks = []
    with watched_memory(mesh.device) as most:
        few = RankStep(0, config.data.global_batch, made_up_batches(config, few_tokens(contexts), mesh))
        for _ in range(STEPS_OF_FEW_TOKENS):
            train_step(engine, config, mesh, few, 1, list)
        most_of_few_tokens = most()
    with watched_memory(mesh.device) as most, closing(run_steps(engine, config, mesh, loader, order)) as steps:
        train_step(engine, config, mesh, fullest_step(config, contexts, mesh), 1, list)
        for step in steps:
            peaks.append(most())
            computing = step.values["step_seconds"] - step.values["data_seconds"]
            taken.append((computing, contexts_of_step(config, step.values, contexts.genes)))
            seconds = sum_over_ranks([sum(one for one, _ in taken)], mesh.device)[0] / mesh.num_ranks
            if step.step >= FEWEST_STEPS and seconds > SECONDS_OF_STEPS:
                break
    memory = torch.tensor([peaks[-1], most_of_few_tokens, growth_after(peaks)], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    return vars(Rehearsal(taken[len(taken) // 2 :], *memory.tolist()))


def contexts_of_step(config: Config, values: dict[str, Any], genes: int) -> Contexts:
    """Of what a step's line says. How unequal they were is in the FLOPs of self-attention."""
    k, tokens, targets = values["contexts"], values["tokens"], values["targets"]
    memory, stage = config.memory, config.parallel.zero_stage
    if_equal = step_cost(config.model, [tokens / k] * k, targets, memory.checkpointing, stage)
    unevenness = values["cost/attention_flops"] / if_equal["cost/attention_flops"]
    return Contexts(tokens / k, targets / k, genes, unevenness=unevenness)


def growth_after(peaks: Sequence[float]) -> float:
    """Bytes, from the most until each step. A heap in pieces grows by about as much each time that the steps double,
    until some hundred are taken. One such time is foreseen."""
    return peaks[-1] - peaks[max(0, len(peaks) // 2 - 1)]


def few_tokens(contexts: Contexts) -> Contexts:
    return Contexts(FEW_TOKENS, 0.1 * FEW_TOKENS, contexts.genes)


def fullest_step(config: Config, contexts: Contexts, mesh: Mesh) -> RankStep:
    """Of made-up contexts, with the fullest micro-batch that is to be expected of a training, which few of its steps
    come near. Where a step has several, it comes after another, of which there are gradients then. It is taken first:
    what the heap comes to hold in pieces beside it is growth."""
    work = needs_of(config, contexts, mesh.num_ranks, mesh.device.type).work
    together = max(1, round(work.most.contexts))
    each = Contexts(work.most.tokens / together, work.most.targets / together, contexts.genes)
    samples = mesh.num_data_ranks + mesh.data_rank * together + np.arange(together)
    batches = [made_up_batch(samples, *of_context(config, each))]
    if work.micro_batches > 1:
        batches.insert(0, made_up_batch(np.array([mesh.data_rank]), *of_context(config, few_tokens(each))))
    return RankStep(0, config.data.global_batch, batches)


def has_store(config: Config) -> bool:
    """A configuration that was looked at without a store has no digest of one."""
    return config.data.digest is not None


def from_store(config: Config, mesh: Mesh) -> tuple[GeneTable, Loader, Order]:
    store = open_store(Path(config.data.store), config.data.digest)
    loader = Loader(store, training_rule(config, store), share_of(mesh), config.data.micro_batch_tokens or 0)
    return store.genes, loader, training_order(config, loader)


def made_up(config: Config, contexts: Contexts, mesh: Mesh) -> tuple[GeneTable, Any, Any]:
    config.data.workers = 0
    return made_up_genes(contexts.genes), MadeUpLoader(config, contexts, mesh), None


@dataclass(frozen=True)
class MadeUpLoader:
    """In place of a store's: every step has the same contexts, all of them mean ones."""

    config: Config
    contexts: Contexts
    mesh: Mesh

    def training_steps(self, order: None, global_batch: int, position: int, num_steps: int) -> Iterator[RankStep]:
        batches = made_up_batches(self.config, self.contexts, self.mesh)
        yield from repeat(RankStep(position, global_batch, batches), num_steps)


def made_up_genes(number: int) -> GeneTable:
    names = np.arange(number).astype(str)
    even = np.full(number, 1 / number)
    loadings = np.random.default_rng(0).standard_normal((number, 8)).astype(np.float32)
    return GeneTable(names, names, even, np.ones(number), np.ones(number), loadings)


def made_up_batches(config: Config, contexts: Contexts, mesh: Mesh) -> list[Batch]:
    """What this rank holds of a step: as many contexts as the rank with most to do, each its slice of the mean context,
    as many together as its micro-batches hold."""
    sharing, most = mesh.num_context_ranks, config.data.micro_batch_tokens or 0
    tokens = max(1, round(contexts.tokens / sharing))
    of_row = -(-config.data.global_batch // mesh.num_data_ranks)
    together = min(of_row, max(1, most // tokens))
    numbers = np.array_split(np.arange(of_row), -(-of_row // together))
    first, form = mesh.data_rank * of_row, of_context(config, contexts, sharing)
    return [made_up_batch(first + some, *form) for some in numbers]


def of_context(config: Config, contexts: Contexts, sharing: int = 1) -> tuple[int, int, int, int]:
    """Tokens of a rank's slice of the mean context, targets among them, genes of the vocabulary, encoding of a cell."""
    tokens = max(1, round(contexts.tokens / sharing))
    targets = min(tokens, max(1, round(contexts.targets / sharing)))
    return tokens, targets, contexts.genes, config.model.cell_encoding or 0


def made_up_batch(samples: np.ndarray, tokens: int, targets: int, num_genes: int, cell_encoding: int) -> Batch:
    """Contexts of one cell each, of so many random tokens and targets."""
    draws = np.random.default_rng(samples)
    num_contexts = len(samples)
    places = np.concatenate([np.sort(draws.choice(tokens, targets, replace=False)) for _ in samples])
    places += np.repeat(np.arange(num_contexts) * tokens, targets)
    counts = draws.poisson(2.0, num_contexts * tokens).astype(np.float32)
    target_counts = counts[places]
    counts[places] = 0
    return Batch(
        genes=draws.integers(num_genes, size=num_contexts * tokens),
        counts=counts,
        cells=np.repeat(np.arange(num_contexts), tokens),
        offsets=np.arange(num_contexts + 1) * tokens,
        targets=places,
        target_counts=target_counts,
        log_size_factors=np.full(num_contexts, np.log(2.0 * tokens), dtype=np.float32),
        encodings=draws.choice(np.array([-1, 1], dtype=np.float32), (num_contexts, cell_encoding)),
        samples=samples,
        positions=samples,
    )


@contextmanager
def watched_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """What it yields says the most bytes that there were so far; ask it before the end."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device))
        return
    most, ended = resident("RssAnon"), threading.Event()

    def look() -> float:
        nonlocal most
        most = max(most, resident("RssAnon"))
        return float(most)

    def keep_looking() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            look()

    looking = threading.Thread(target=keep_looking, daemon=True)
    looking.start()
    try:
        yield look
    finally:
        ended.set()
        looking.join()
