"""A store of cells of very unequal sizes, and launches of `ranks_worker.py`: many trainings in one start of ranks."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cctrain.data.prepare.quality import QualityControl
from cctrain.data.store.store import TokenStore
from cctrain.launch.local import free_port, rank_environment
from tests.data.conftest import prepared, write_h5ad

NUM_GENES = 150

TINY = """
data: {global_batch: 10, block: 4, mixed_blocks: 3}
model: {width: 16, depth: 2, heads: 2, latents: 4, latent_width: 8}
training: {steps: 20, warmup: 5, learning_rate: 5e-3, clip: 0.0}
"""


@dataclass(frozen=True)
class Case:
    """One training: what differs from TINY, and under which name its results are kept."""

    name: str
    overrides: tuple[str, ...]
    save: Path | None = None  # a run directory to save to, after step `save_at`
    save_at: int = 0
    verify: bool = False  # compare what was saved with what DeepSpeed's own functions say
    load: Path | None = None  # a run directory to resume from
    poison: tuple[int, ...] = ()  # steps in which the last rank meets a count that is NaN
    omit: tuple[int, ...] = ()  # steps whose batches are passed over
    mistake: str = ""  # one of `ranks_worker.MISTAKES`, made on purpose


@dataclass(frozen=True)
class Result:
    """`lines` are the journal's values of each step as rank 0 saw them; gradient (of step 1, as the optimizer
    met it) and weights are arrays by parameter name; `contexts` is, for each rank and step, how many contexts
    each of its micro-batches held; `look` is the final look at held-out cells; `digests` are of the parameters that
    each rank ends with; `held` is how many elements of the weights each held when the model had been built."""

    lines: list[dict[str, Any]]
    contexts: list[list[list[int]]]
    look: dict[str, float]
    gradient: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    digests: list[str]
    held: list[int]

    @property
    def losses(self) -> np.ndarray:
        return np.array([line["loss"] for line in self.lines])

    def column(self, key: str) -> list[Any]:
        return [line[key] for line in self.lines]


def unequal_counts(num_cells: int = 30, seed: int = 0) -> np.ndarray:
    """int64 (cells, genes): from a handful of expressed genes to nearly all of them."""
    draws = np.random.default_rng(seed)
    depth = np.geomspace(8, 3000, num_cells)
    profile = draws.gamma(0.8, size=NUM_GENES) + 0.02
    types = np.exp(draws.normal(0.0, 1.0, size=(2, NUM_GENES)))
    rates = profile * types[np.arange(num_cells) % 2]
    counts = draws.poisson(depth[:, None] * rates / rates.sum(axis=1, keepdims=True))
    counts[:, 0] += 1
    return counts


@pytest.fixture(scope="session")
def unequal_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("unequal")
    source = write_h5ad(folder / "cells.h5ad", unequal_counts())
    return prepared(folder / "store", source, quality=QualityControl(min_genes=1, min_cells=1))


@pytest.fixture(scope="session")
def tiny_config(unequal_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(f"{TINY}\nrun: {{dir: {path.parent / 'unused'}}}\n")
    return path


def run_cases(
    cases: list[Case], num_ranks: int, config: Path, store: TokenStore, out: Path, timeout: float = 240
) -> dict[str, Result]:
    """All cases, one after the other, in one start of `num_ranks` real processes."""
    from tests.forked import CONTEXT
    from tests.training.ranks_worker import run_rank

    out.mkdir(parents=True)
    entries = [{**asdict(c), "overrides": [f"data.store={store.path}", *c.overrides]} for c in cases]
    port, end = free_port(), time.monotonic() + timeout
    logs = [out / f"rank-{rank}.log" for rank in range(num_ranks)]
    ranks = []
    for rank, log in enumerate(logs):
        environment = rank_environment(rank, num_ranks, port) | {"CUDA_VISIBLE_DEVICES": ""}
        ranks.append(CONTEXT.Process(target=run_rank, args=(environment, str(config), entries, out, log)))
        ranks[-1].start()
    try:
        for rank in ranks:
            rank.join(max(0.0, end - time.monotonic()))
        codes = [rank.exitcode for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    tails = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
    assert codes == [0] * num_ranks, tails
    return {case.name: _result(out, case.name, num_ranks) for case in cases if not errors_of(out, case.name)}


def errors_of(out: Path, name: str) -> list[str]:
    """The TrainingError that ended a case, of each rank."""
    return [path.read_text() for path in sorted(out.glob(f"{name}-error-*.txt"))]


def _result(out: Path, name: str, num_ranks: int) -> Result:
    ranks = [json.loads((out / f"{name}-rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    with np.load(out / f"{name}.npz") as arrays:
        found = {key: arrays[key] for key in arrays.files}
    return Result(
        lines=ranks[0]["lines"],
        contexts=[rank["contexts"] for rank in ranks],
        look=ranks[0]["look"],
        gradient={key[9:]: value for key, value in found.items() if key.startswith("gradient:")},
        weights={key[8:]: value for key, value in found.items() if key.startswith("weights:")},
        digests=[rank["digest"] for rank in ranks],
        held=[rank["held"] for rank in ranks],
    )
