import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest

from cctrain.data import store as store_module
from cctrain.data.store import TokenStore, open_store, verify_store
from cctrain.errors import DataError


@pytest.fixture
def copied(small_store: TokenStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_store.path, tmp_path / "store"))


def dense(store: TokenStore, rows: np.ndarray) -> np.ndarray:
    cells = store.cells(rows)
    matrix = np.zeros((len(rows), len(store.genes.ids)), dtype=np.int64)
    matrix[np.repeat(np.arange(len(rows)), np.diff(cells.offsets)), cells.genes] = cells.counts
    return matrix


def test_anndata_reads_the_store(small_store):
    data = anndata.read_zarr(small_store.path / "cells.zarr")
    assert np.array_equal(data.X.toarray(), dense(small_store, np.arange(60)))
    assert data.var_names.tolist() == small_store.genes.ids.tolist()
    assert data.obs["split"].tolist() == ["train"] * small_store.num_train + ["held_out"] * (60 - small_store.num_train)
    assert set(data.obs["cell_type"]) == {"rod", "cone"}
    assert np.array_equal(data.varm["measured"].T, small_store.measured)


def test_rows_come_in_the_order_asked_for_even_across_chunks_and_out_of_the_cache(copied, monkeypatch):
    monkeypatch.setattr(store_module, "CACHE_BYTES", 1)
    store = open_store(copied)
    whole = dense(store, np.arange(60))
    rows = np.array([5, 6, 7, 59, 0, 0, 31, 30])
    assert np.array_equal(dense(store, rows), whole[rows])


def test_no_rows_give_no_tokens(small_store):
    cells = small_store.cells(np.zeros(0, dtype=np.int64))
    assert cells.offsets.tolist() == [0]
    assert len(cells.genes) == len(cells.counts) == 0


def test_a_row_outside_the_store_is_an_error(small_store):
    with pytest.raises(IndexError, match="of 60 cells"):
        small_store.cells(np.array([60]))


def test_token_numbers_and_sources_are_known_without_reading_cells(small_store):
    cells = small_store.cells(np.arange(60))
    assert np.array_equal(small_store.num_tokens, np.diff(cells.offsets))
    assert small_store.source_of_cell.tolist() == [0] * 60
    assert small_store.num_tokens.dtype == small_store.source_of_cell.dtype == np.int64


def test_genes_of_a_cell_ascend_and_counts_are_positive(small_store):
    cells = small_store.cells(np.arange(60))
    steps = np.diff(cells.genes)
    inside = np.ones(len(steps), dtype=bool)
    inside[cells.offsets[1:-1] - 1] = False
    assert (steps[inside] > 0).all()
    assert (cells.counts > 0).all()


def test_a_store_that_was_cut_short_names_the_file(copied):
    shard = copied / "cells.zarr" / "X" / "indices" / "c" / "0"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"X/indices/c/0: .*cut short"):
        open_store(copied)
    assert any("X/indices/c/0" in message for message in verify_store(copied))


def test_a_missing_file_is_named(copied):
    (copied / "cells.zarr" / "X" / "data" / "c" / "0").unlink()
    with pytest.raises(DataError, match="X/data/c/0: missing"):
        open_store(copied)


def test_a_flipped_byte_is_found_by_verify_and_by_reading(copied):
    shard = copied / "cells.zarr" / "X" / "data" / "c" / "0"
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    assert [message for message in verify_store(copied) if "X/data/c/0" in message]
    with pytest.raises(DataError, match="cannot be decoded"):
        open_store(copied).cells(np.arange(60))


def test_a_whole_store_verifies(small_store):
    assert verify_store(small_store.path) == []


def test_a_manifest_with_another_content_digest_is_found(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["digest"] = "0" * 64
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert any("content" in message for message in verify_store(copied))


def test_another_digest_than_asked_for_is_refused(small_store):
    assert open_store(small_store.path, small_store.digest).num_cells == 60
    with pytest.raises(DataError, match="another store"):
        open_store(small_store.path, "0" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "not the manifest"),
        ('{"format": "cctrain-token-store", "version": 99}', "99"),
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        open_store(tmp_path)


def test_a_folder_without_manifest_is_no_store(tmp_path):
    with pytest.raises(DataError, match="not a token store"):
        open_store(tmp_path)
