"""What a training step of each variant costs on a store's contexts: FLOPs by the closed form, seconds by the clock.

Seconds are those that `cctrain train` notes, of its own steps, taken in one process where the variants take turns on
the same contexts: a machine that slows down slows all of them. Steps differ in how long their contexts are, so what is
taken from each is its seconds a FLOP; the median of these times the FLOPs of a mean step is the variant's step time.
"""

from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cctrain.apply.processes import LEFT_OUT, in_new_processes
from cctrain.config import Config, ModelConfig
from cctrain.cost.step import step_cost
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import TokenStore, open_store
from cctrain.parallel.mesh import Mesh, join_mesh
from cctrain.training.data import look_at_store, share_of, training_order, training_rule
from cctrain.training.engine import build_engine
from cctrain.training.loop import StepResult, run_steps
from cctrain.training.train import build_model

TURNS = 9  # of each variant, after one that does not count


@dataclass(frozen=True)
class Epoch:
    """The contexts of an epoch: the tokens of each, and the targets and training steps of all."""

    tokens: list[int]
    targets: int
    steps: int


def epoch_of(config: Config, store: TokenStore) -> Epoch:
    """The first one. Every seed has other targets, and nearly the same numbers of them."""
    loader = Loader(store, training_rule(config, store), Share(), 0)
    parts = np.array_split(np.arange(store.num_train), -(-store.num_train // 64))
    contexts = [context for rows in parts for context in loader.contexts(rows, rows)]
    return Epoch(
        tokens=[len(context.genes) for context in contexts],
        targets=sum(len(context.targets) for context in contexts),
        steps=-(-len(contexts) // config.data.global_batch),
    )


def flops_of_a_step(model: ModelConfig, epoch: Epoch) -> float:
    return step_cost(model, epoch.tokens, epoch.targets)["cost/total_flops"] / epoch.steps


def seconds_a_flop(configs: dict[str, Config]) -> dict[str, float]:
    """Of the steps of each configuration, which take turns in a new process. Raises SystemExit if memory is short."""
    answer = in_new_processes(_take_turns, (configs,))
    if LEFT_OUT in answer:
        raise SystemExit(f"the steps could not be measured: {answer[LEFT_OUT]}")
    return answer


def _take_turns(configs: dict[str, Config]) -> dict[str, Any]:
    taken: dict[str, list[float]] = {name: [] for name in configs}
    [precision] = {config.training.precision for config in configs.values()}
    with join_mesh(precision=precision) as mesh, ExitStack() as stack:
        trainings = {name: stack.enter_context(closing(_steps(config, mesh))) for name, config in configs.items()}
        for _ in range(1 + TURNS):
            for name, steps in trainings.items():
                values = next(steps).values
                taken[name].append(values["step_seconds"] / values["cost/total_flops"])
    return {name: median(times[1:]) for name, times in taken.items()}


def _steps(config: Config, mesh: Mesh) -> Generator[StepResult, None, None]:
    config = replace(config, training=replace(config.training, steps=2 + TURNS))
    store = open_store(Path(config.data.store))
    config, _ = look_at_store(config, store)
    loader = Loader(store, training_rule(config, store), share_of(mesh), config.data.micro_batch_tokens or 0)
    engine = build_engine(build_model(config, store.genes, mesh), config, mesh)
    return run_steps(engine, config, mesh, loader, training_order(config, loader))
