"""Trainings under every ZeRO stage on two ranks, whose traffic and memory the tests look at; and a step on paper."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cctrain.config import Config, MemoryConfig, ModelConfig
from cctrain.cost.work import Contexts, Work, work_of
from cctrain.data.store.store import TokenStore
from cctrain.launch.local import free_port, rank_environment
from tests.data.conftest import prepared, random_counts, write_h5ad

ZERO_RANKS = 2
ZERO_KINDS = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
# Under ZeRO 3 some of its matrices are large enough to be gathered for every micro-batch, and the gene vectors are the
# largest parameter that is not.
ZERO_MODEL, ZERO_GENES = ModelConfig(width=200, depth=2, heads=2, latents=4), 500
WORK_MODEL, WORK_GENES = ModelConfig(width=32, depth=2, heads=2, latents=8), 500


@pytest.fixture(scope="session")
def even_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Of so many genes that no tensor is filled up to a multiple of the ranks."""
    folder = tmp_path_factory.mktemp("even")
    return prepared(folder / "store", write_h5ad(folder / "cells.h5ad", random_counts(40, ZERO_GENES)))


@pytest.fixture(scope="session")
def zero_trainings(even_store: TokenStore) -> list[dict[str, Any]]:
    return zero_steps(even_store, [(*kind, {}) for kind in ZERO_KINDS])


def zero_steps(store: TokenStore, kinds: list[tuple[int, str, dict[str, int]]]) -> list[dict[str, Any]]:
    """What `zero_worker` says of trainings with these stages, precisions and options."""
    return said_by_ranks("zero_worker", {"store": str(store.path), "model": asdict(ZERO_MODEL), "kinds": kinds})


def said_by_ranks(module: str, plan: dict[str, Any], **environment: str) -> Any:
    """What the first of ZERO_RANKS processes prints, which run this module of this folder and are given `plan`."""
    port = free_port()
    fixed = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", f"tests.cost.{module}", json.dumps(plan)],
            cwd=Path(__file__).parents[2],
            env=rank_environment(rank, ZERO_RANKS, port) | fixed | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ZERO_RANKS)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * ZERO_RANKS
    return json.loads(outputs[0].splitlines()[-1])


def work(
    ranks: int = 2,
    context_ranks: int = 1,
    micro_batch_tokens: int = 4000,
    stage: int = 1,
    precision: str = "fp32",
    longest: float | None = None,
    **memory: Any,
) -> Work:
    """Of one rank in a step over 8 contexts of 1,000 tokens, 50 of them targets."""
    config = Config(model=WORK_MODEL, memory=MemoryConfig(**memory))
    config.data.global_batch, config.data.micro_batch_tokens = 8, micro_batch_tokens
    config.parallel.context, config.parallel.zero_stage, config.training.precision = context_ranks, stage, precision
    return work_of(config, Contexts(1000, 50, WORK_GENES, longest), ranks, tile_tokens=256)
