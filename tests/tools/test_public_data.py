"""Stores for measurements are made where they are missing, and only there."""

from pathlib import Path

import pytest

from cctrain.data.store.store import TokenStore
from tests.data.conftest import random_counts, write_h5ad
from tools.public_data import prepared, whole_cells


def test_a_store_that_is_there_needs_no_source(tiny_store: TokenStore) -> None:
    def source() -> Path:
        pytest.fail("the source was asked for")

    assert prepared(tiny_store.path, source) == tiny_store.path


def test_a_data_set_that_is_there_is_prepared_without_being_fetched(tmp_path: Path) -> None:
    (tmp_path / "retina").mkdir()
    write_h5ad(tmp_path / "retina" / "retina.h5ad", random_counts(30, 1000))
    assert (whole_cells("retina", tmp_path) / "manifest.json").is_file()
