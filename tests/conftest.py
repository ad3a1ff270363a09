"""What the tests of several folders share: a tiny token store, and empty MLflow databases."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cctrain.data.store.store import TokenStore

# A shell has its background processes ignore it, and whatever they start: tests wait for what it would end.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """70 cells of 50 genes from two sources: the first measured genes 0 to 39, the second genes 10 to 49."""
    from tests.data.conftest import gene_ids, prepared, random_counts, write_h5ad

    folder = tmp_path_factory.mktemp("tiny")
    first = write_h5ad(folder / "first.h5ad", random_counts(40, 40, seed=1))
    second = write_h5ad(folder / "second.h5ad", random_counts(30, 40, seed=2), genes=gene_ids(40, first=10))
    return prepared(folder / "store", first, second, held_out=0.25)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The schema takes MLflow seconds to create, so it is created once and copied."""
    import mlflow

    path = tmp_path_factory.mktemp("schema") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> str:
    """URI of a fresh database beside the runs of this test."""
    path = tmp_path / "runs" / "mlflow.db"
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(empty_database, path)
    return f"sqlite:///{path}"
