"""What the tests of several folders share: a tiny token store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cctrain.data.store.store import TokenStore


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """70 cells of 50 genes from two sources: the first measured genes 0 to 39, the second genes 10 to 49."""
    from tests.data.conftest import gene_ids, prepared, random_counts, write_h5ad

    folder = tmp_path_factory.mktemp("tiny")
    first = write_h5ad(folder / "first.h5ad", random_counts(40, 40, seed=1))
    second = write_h5ad(folder / "second.h5ad", random_counts(30, 40, seed=2), genes=gene_ids(40, first=10))
    return prepared(folder / "store", first, second, held_out=0.25)
