"""A store in either form: what it gives, and what it says of every way in which it can be damaged."""

import pickle
from pathlib import Path

import anndata
import numpy as np
import pytest
import zarr

from cctrain.data import progress
from cctrain.data.store import store as store_module
from cctrain.data.store.manifest import file_entries, read_manifest, write_manifest
from cctrain.data.store.store import TokenStore, open_store, verify_store
from cctrain.errors import DataError
from tests.data.conftest import random_counts
from tests.data.stores import CONTAINERS, flip_a_bit, many_shards, to_dense, write_store
from tools.repack import repack

FIRST_SHARD = {"zarr": "cells.zarr/X/data/c/0", "webdataset": "shards/cells-00000.tar"}
SECOND_SHARD = {"zarr": "cells.zarr/X/data/c/1", "webdataset": "shards/cells-00001.tar"}


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def either(small_store: TokenStore, container: str, tmp_path: Path) -> TokenStore:
    """`small_store` in either form."""
    return repack(small_store, tmp_path / "either", container)


@pytest.fixture
def shards(tmp_path: Path, container: str) -> TokenStore:
    """Cells in several small shards."""
    return many_shards(tmp_path / "shards", container)[0]


@pytest.fixture
def large(tmp_path: Path, container: str) -> TokenStore:
    """One shard that is larger than the end of it that is looked at when a store is opened."""
    sizes = {"compressed": False, "tokens_per_chunk": 1024, "tokens_per_shard": 2**18, "cells_per_block": 16}
    return write_store(tmp_path / "large", random_counts(200, 1_000) + 1, container, **sizes)


def read_everything(path: Path) -> None:
    store = open_store(path)
    store.cells(np.arange(store.num_cells))


# ---- what it gives


def test_anndata_reads_the_store(either):
    data = anndata.read_zarr(either.path / "cells.zarr")
    if either.manifest["container"] == "zarr":
        assert np.array_equal(data.X.toarray(), to_dense(either, np.arange(60)))
    else:
        assert data.X is None
    assert data.shape == (60, len(either.genes.ids))
    assert data.var_names.tolist() == either.genes.ids.tolist()
    assert data.obs["split"].tolist() == ["train"] * either.num_train + ["held_out"] * (60 - either.num_train)
    assert set(data.obs["cell_type"]) == {"rod", "cone"}
    assert np.array_equal(data.varm["measured"].T, either.measured)


def test_either_form_gives_the_same_cells_in_the_same_types(either, small_store):
    rows = np.array([5, 6, 7, 59, 0, 0, 31, 30])
    one, other = either.cells(rows), small_store.cells(rows)
    assert np.array_equal(one.offsets, other.offsets)
    assert np.array_equal(one.genes, other.genes)
    assert np.array_equal(one.counts, other.counts)
    assert (one.genes.dtype, one.counts.dtype) == (other.genes.dtype, other.counts.dtype) == (np.uint8, np.uint8)
    assert either.digest == small_store.digest


@pytest.mark.parametrize("cache_bytes", [1, 2**20])
def test_rows_come_in_the_order_asked_for_across_chunks_and_shards(tmp_path, container, cache_bytes, monkeypatch):
    monkeypatch.setattr(store_module, "CACHE_BYTES", cache_bytes)
    store, counts = many_shards(tmp_path / "store", container)
    draws = np.random.default_rng(0)
    for _ in range(20):
        rows = draws.integers(0, 70, size=draws.integers(1, 20))
        assert np.array_equal(to_dense(store, rows), counts[rows])
        first, last = sorted(draws.integers(0, 71, size=2))
        assert np.array_equal(to_dense(store, np.arange(first, last)), counts[first:last])


def test_no_rows_give_no_tokens(either):
    cells = either.cells(np.zeros(0, dtype=np.int64))
    assert cells.offsets.tolist() == [0]
    assert len(cells.genes) == len(cells.counts) == 0


@pytest.mark.parametrize("row", [60, -1])
def test_a_row_outside_the_store_is_an_error(either, row):
    with pytest.raises(IndexError, match="of 60 cells"):
        either.cells(np.array([0, row]))


def test_token_numbers_and_sources_are_known_without_reading_cells(either, monkeypatch):
    offsets = either.cells(np.arange(60)).offsets
    fresh = open_store(either.path)
    monkeypatch.setattr(TokenStore, "cells", None)
    assert np.array_equal(fresh.num_tokens, np.diff(offsets))
    assert fresh.source_of_cell.tolist() == [0] * 60
    assert fresh.num_tokens.dtype == fresh.source_of_cell.dtype == np.int64


def test_genes_of_a_cell_ascend_and_counts_are_positive(either):
    cells = either.cells(np.arange(60))
    steps = np.diff(cells.genes.astype(np.int64))
    inside = np.ones(len(steps), dtype=bool)
    inside[cells.offsets[1:-1] - 1] = False
    assert (steps[inside] > 0).all()
    assert (cells.counts > 0).all()


def test_a_store_pickles_as_its_path(either):
    either.cells(np.arange(60))
    pickled = pickle.dumps(either)
    assert len(pickled) < 2 * len((either.path / "manifest.json").read_bytes())
    assert np.array_equal(to_dense(pickle.loads(pickled), np.arange(60)), to_dense(either, np.arange(60)))


def test_a_store_of_cells_has_no_groups(either):
    assert (either.unit, either.groups) == ("cell", None)


def test_another_digest_than_asked_for_is_refused(either):
    assert open_store(either.path, either.digest).num_cells == 60
    with pytest.raises(DataError, match="another store"):
        open_store(either.path, "0" * 64)


# ---- damage


def test_a_whole_store_verifies(either, shards, large):
    assert verify_store(either.path) == verify_store(shards.path) == verify_store(large.path) == []


def test_a_missing_shard_is_named(shards, container):
    (shards.path / SECOND_SHARD[container]).unlink()
    with pytest.raises(DataError, match=f"{SECOND_SHARD[container]}: missing"):
        open_store(shards.path)
    [message] = verify_store(shards.path)
    assert message.endswith(f"{SECOND_SHARD[container]}: missing")


def test_a_shard_that_vanishes_from_an_open_store_is_named_and_not_read_as_zeros(shards, container):
    (shards.path / SECOND_SHARD[container]).unlink()
    with pytest.raises(DataError, match=SECOND_SHARD[container]):
        shards.cells(np.arange(70))


@pytest.mark.parametrize("change", [-1, +1])
def test_a_shard_that_was_cut_short_or_grew_is_named(shards, container, change):
    shard = shards.path / SECOND_SHARD[container]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] if change < 0 else content + b"0")
    what = "cut short" if change < 0 else "altered"
    with pytest.raises(DataError, match=f"{SECOND_SHARD[container]}: .* bytes, but its manifest says .*: {what}"):
        open_store(shards.path)
    [message] = verify_store(shards.path)
    assert SECOND_SHARD[container] in message
    assert what in message


def test_two_swapped_shards_of_equal_size_stop_at_opening_and_verify_tells_which(tmp_path, container):
    counts = random_counts(32, 20) + 1  # as many tokens in every cell
    shards = write_store(tmp_path / "store", counts, container, compressed=False, tokens_per_shard=160)
    first, second = (shards.path / name for name in (FIRST_SHARD[container], SECOND_SHARD[container]))
    assert first.stat().st_size == second.stat().st_size
    aside = first.rename(tmp_path / "aside")
    second.rename(first)
    aside.rename(second)
    with pytest.raises(DataError, match=f"{FIRST_SHARD[container]}: another file than the one that was written"):
        open_store(shards.path)
    said = verify_store(shards.path)
    assert [FIRST_SHARD[container] in said[0], f"belongs into {SECOND_SHARD[container]}" in said[0]] == [True, True]
    assert [SECOND_SHARD[container] in said[1], f"belongs into {FIRST_SHARD[container]}" in said[1]] == [True, True]
    assert len(said) == 2


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_a_flipped_bit_of_a_large_shard_stops_reading_with_its_name(large, container, place):
    shard = large.path / FIRST_SHARD[container]
    flip_a_bit(shard, int(place * shard.stat().st_size))
    with pytest.raises(DataError, match=f"{FIRST_SHARD[container]}: "):
        read_everything(large.path)
    [message] = verify_store(large.path)
    assert f"{FIRST_SHARD[container]}: its bytes have changed" in message


def test_a_bit_that_flips_under_an_open_store_stops_reading_with_the_name_of_the_shard(shards, container):
    flip_a_bit(shards.path / SECOND_SHARD[container], 40)
    with pytest.raises(DataError, match=f"{SECOND_SHARD[container]}: .*--verify"):
        shards.cells(np.arange(70))


@pytest.mark.parametrize("table", ["indptr", "obs/source", "varm/measured", "varm/loadings", "var/share", "zarr.json"])
def test_a_flipped_bit_in_any_table_is_named_at_opening_and_by_verify(either, container, table):
    if table == "indptr":
        table = "X/indptr" if container == "zarr" else "uns/shards/indptr"
    path = either.path / "cells.zarr" / table
    file = path if path.is_file() else next((file for file in path.rglob("0") if file.is_file()), path / "zarr.json")
    flip_a_bit(file, file.stat().st_size // 2)
    name = file.relative_to(either.path).as_posix()
    with pytest.raises(DataError, match=f"{name}: another file"):
        open_store(either.path)
    [message] = verify_store(either.path)
    assert f"{name}: its bytes have changed" in message


def test_a_bit_of_a_table_that_flips_under_an_open_store_is_found_before_it_is_read(either):
    fresh = open_store(either.path)
    flip_a_bit(either.path / "cells.zarr" / "varm" / "measured" / "zarr.json", 5)
    with pytest.raises(DataError, match=r"varm/measured/zarr.json: its bytes have changed"):
        _ = fresh.measured


def test_verify_reports_what_it_reads_and_how_fast(shards, capfd, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_TO_SHOW", 0.0)
    verify_store(shards.path)
    said = capfd.readouterr().err
    assert "hashing files" in said
    assert "cells/s" in said


def test_every_damaged_file_is_named(shards, container):
    for name in (FIRST_SHARD[container], SECOND_SHARD[container]):
        flip_a_bit(shards.path / name, 40)
    (shards.path / "cells.zarr" / "zarr.json").unlink()
    said = "\n".join(verify_store(shards.path))
    assert all(name in said for name in (FIRST_SHARD[container], SECOND_SHARD[container], "cells.zarr/zarr.json"))


def test_a_manifest_with_another_content_digest_is_found(either):
    write_manifest(either.path, read_manifest(either.path) | {"digest": "0" * 64})
    assert any("content" in message for message in verify_store(either.path))


# ---- stores that were changed together with their manifest


def rewrite_array(store: TokenStore, name: str, values: np.ndarray) -> None:
    """Another array of the same name, and a manifest that is right about it."""
    group = zarr.open_group(store.path / "cells.zarr", mode="a")
    del group[name]
    group.create_array(name, data=values)
    write_manifest(store.path, read_manifest(store.path) | {"files": file_entries(store.path)})


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("obs/source", np.full(60, 7), "obs/source: it names source 7 of 1"),
        ("obs/source", np.zeros(59, dtype=int), r"obs/source: its shape is \(59,\)"),
        ("obs/source", np.zeros(60), "obs/source: it holds float64"),
        ("varm/measured", np.ones((30, 2), dtype=bool), r"varm/measured: its shape is \(30, 2\)"),
    ],
)
def test_tables_that_do_not_fit_the_store_are_refused(either, name, values, message):
    rewrite_array(either, name, values)
    changed = open_store(either.path)
    with pytest.raises(DataError, match=message):
        _ = changed.source_of_cell if name == "obs/source" else changed.measured


def test_tokens_that_do_not_fit_the_cells_are_refused(either, container):
    name = "X/indptr" if container == "zarr" else "uns/shards/indptr"
    rewrite_array(either, name, np.arange(61))
    with pytest.raises(DataError, match=f"{name}: its cells are not consecutive tokens"):
        _ = open_store(either.path).num_tokens


def test_a_gene_beyond_the_vocabulary_is_refused(shards):
    write_manifest(shards.path, read_manifest(shards.path) | {"num_genes": 10})
    with pytest.raises(DataError, match="a cell has gene 19 of a vocabulary of 10"):
        open_store(shards.path).cells(np.arange(70))


@pytest.mark.parametrize("change", [{"num_cells": "60"}, {"num_train": 99}, {"files": {"../a": {}}}, {"dtypes": None}])
def test_a_manifest_with_a_field_of_another_kind_is_refused(either, change):
    write_manifest(either.path, read_manifest(either.path) | change)
    with pytest.raises(DataError, match=f"{next(iter(change))} is not what cctrain writes there"):
        open_store(either.path)
