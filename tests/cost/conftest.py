"""Trainings under every ZeRO stage on two ranks, whose traffic and memory the tests look at."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cctrain.config import ModelConfig
from cctrain.data.store.store import TokenStore
from cctrain.launch.local import free_port, rank_environment
from tests.data.conftest import prepared, random_counts, write_h5ad

ZERO_RANKS = 2
ZERO_KINDS = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
# Some of its matrices are large enough to be gathered for every micro-batch under ZeRO 3.
ZERO_MODEL = ModelConfig(width=160, depth=3, heads=2, latents=4)


@pytest.fixture(scope="session")
def even_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Of 48 genes, so that no tensor is filled up to a multiple of the ranks."""
    folder = tmp_path_factory.mktemp("even")
    return prepared(folder / "store", write_h5ad(folder / "cells.h5ad", random_counts(40, 48)))


@pytest.fixture(scope="session")
def zero_trainings(even_store: TokenStore) -> list[dict[str, Any]]:
    return zero_steps(even_store, ZERO_KINDS)


def zero_steps(store: TokenStore, kinds: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """What `zero_worker` says of trainings with these stages and precisions."""
    port = free_port()
    plan = json.dumps({"store": str(store.path), "model": asdict(ZERO_MODEL), "kinds": kinds})
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.cost.zero_worker", plan],
            cwd=Path(__file__).parents[2],
            env=rank_environment(rank, ZERO_RANKS, port) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ZERO_RANKS)
    ]
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * ZERO_RANKS
    return json.loads(outputs[0].splitlines()[-1])
