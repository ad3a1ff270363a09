"""A training's own steps on this machine, on made-up contexts, before there is a run: `cctrain estimate` goes by them.

What a step takes beyond its parts (starting operations, DeepSpeed's hooks, caches that are cold) no closed form knows.
So the real step is taken for some seconds, by as many ranks, in the training's own shape, and compared with what the
closed form says of it. Where a step would take long, or the model is large, the rehearsal is smaller: fewer
micro-batches, fewer contexts in each, shorter ones, fewer layers; the closed form leads from there to the whole.
"""

import copy
import ctypes
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from cctrain.apply.calibrate import on_local_ranks
from cctrain.config import Config, load_config, to_yaml
from cctrain.cost.devices import Device
from cctrain.cost.estimate import estimate
from cctrain.cost.parameters import num_parameters
from cctrain.cost.work import Contexts
from cctrain.data.loading.batches import Batch
from cctrain.data.loading.loader import RankStep
from cctrain.data.store.store import GeneTable
from cctrain.parallel.mesh import Mesh, join_mesh
from cctrain.process_memory import resident
from cctrain.training.engine import build_engine
from cctrain.training.loop import train_step
from cctrain.training.train import build_model

LONGEST_STEP, SECONDS_OF_STEPS, MOST_STEPS, STEPS_FOR_MEMORY = 2.0, 6.0, 40, 2
SHORTEST, MOST_PARAMETERS = 4096, 50_000_000
SECONDS_BETWEEN_LOOKS = 0.005
# glibc's mallopt: bytes of free memory at the heap's end, and of a block, that are given back. At once, so that what is
# resident is what is used; and what glibc comes to by itself, when the largest block that it may keep has been freed.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
AT_ONCE = {M_TRIM_THRESHOLD: 2**16, M_MMAP_THRESHOLD: 2**16}
LATE = {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25}


@dataclass(frozen=True)
class Rehearsal:
    """Of a step: its seconds, and the most bytes of memory that a rank held, libraries and all."""

    seconds: float
    memory: float


def smaller(config: Config, contexts: Contexts, ranks: int, device: Device) -> tuple[Config, Contexts]:
    """The same training with a step of `LONGEST_STEP` seconds at most, by the closed form, where that can be had."""
    config = copy.deepcopy(config)
    model, data = config.model, config.data
    rows = ranks // config.parallel.context
    while num_parameters(model, contexts.genes) > MOST_PARAMETERS and model.depth > 1:
        model.depth //= 2
    while estimate(config, contexts, device, ranks).seconds.total > LONGEST_STEP:
        if data.global_batch > rows:
            data.global_batch = max(rows, data.global_batch // 2)
        elif contexts.tokens > SHORTEST * config.parallel.context:
            contexts = replace(contexts, tokens=contexts.tokens / 2, targets=contexts.targets / 2)
        elif model.depth > 1:
            model.depth //= 2
        else:
            break
    return config, contexts


def rehearse(config: Config, contexts: Contexts, ranks: int) -> Rehearsal:
    """Take steps on so many local ranks. Raises TrainingError if one of them fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(to_yaml(config))
        file.flush()
        plan = json.dumps({"config": file.name, "contexts": asdict(contexts)})
        return Rehearsal(**on_local_ranks("cctrain.apply.rehearse", plan, ranks))


def take_steps(config: Config, contexts: Contexts, mesh: Mesh) -> Rehearsal:
    """What one of the ranks does."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 (which the first rank of a training holds, too)

    give_memory_back(AT_ONCE)  # from the start: in what a heap once kept, later blocks find room
    engine = build_engine(build_model(config, made_up_genes(contexts.genes), mesh), config, mesh)
    step = RankStep(0, config.data.global_batch, made_up_batches(config, contexts, mesh))

    def seconds_of_a_step() -> float:
        """The slowest rank's; the same on all."""
        dist.barrier()
        started = time.perf_counter()
        train_step(engine, config, mesh, step, 1, list)
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=mesh.device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return float(taken)

    with most_memory(mesh.device) as most:
        for _ in range(STEPS_FOR_MEMORY):
            seconds_of_a_step()
    give_memory_back(LATE)
    first = min(seconds_of_a_step() for _ in range(2))
    seconds = median(seconds_of_a_step() for _ in range(max(3, min(MOST_STEPS, int(SECONDS_OF_STEPS / first)))))
    memory = torch.tensor(most[0], dtype=torch.float64, device=mesh.device)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    return Rehearsal(seconds, float(memory))


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
    targets = min(tokens, max(1, round(contexts.targets / sharing)))
    first, form = mesh.data_rank * of_row, (tokens, targets, contexts.genes, config.model.cell_encoding or 0)
    return [made_up_batch(first + some, *form) for some in numbers]


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
def most_memory(device: torch.device) -> Iterator[list[float]]:
    """Afterwards the list holds the most bytes that there were within it."""
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(float(torch.cuda.max_memory_allocated(device)))
        return
    seen, ended = [resident("RssAnon")], threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            seen.append(resident("RssAnon"))

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield found
    finally:
        ended.set()
        looking.join()
    found.append(float(max(seen)))


def give_memory_back(thresholds: dict[int, int]) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        for option, value in thresholds.items():
            libc.mallopt(option, value)


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    settings = load_config(Path(told["config"]))
    with join_mesh(num_context_ranks=settings.parallel.context) as place:
        rehearsed = take_steps(settings, Contexts(**told["contexts"]), place)
        if place.is_first:
            print(json.dumps(asdict(rehearsed)), flush=True)
