"""The Zarr form: what we read directly is what zarr-python reads, and nothing that it does not."""

import json
import multiprocessing

import numpy as np
import pytest
import zarr

from cctrain.data.store.shards_zarr import ZarrShards
from cctrain.data.store.store import TokenStore
from cctrain.errors import DataError
from tests.data.conftest import random_counts
from tests.data.stores import flip_a_bit, many_shards, write_store


def reader(store: TokenStore) -> ZarrShards:
    return ZarrShards(store.path, np.concatenate([[0], np.cumsum(store.num_tokens)]))


def decode(shards: ZarrShards, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    length = int(shards.edges[last] - shards.edges[first])
    genes, counts = np.empty(length, dtype=shards.genes_dtype), np.empty(length, dtype=shards.counts_dtype)
    shards.decode(first, last, genes, counts)
    return genes, counts


@pytest.mark.parametrize("compressed", [True, False])
def test_any_chunks_are_what_zarr_python_reads(tmp_path, compressed):
    store, _ = many_shards(tmp_path / "store", "zarr", compressed=compressed)
    shards, matrix = reader(store), zarr.open_group(store.path / "cells.zarr" / "X", mode="r")
    whole_genes, whole_counts = matrix["indices"][:], matrix["data"][:]  # type: ignore[index]
    num_chunks = len(shards.edges) - 1
    assert len(whole_genes) % 32, "the last chunk is not full"
    for first, last in [(0, 1), (3, 20), (7, 9), (8, 16), (num_chunks - 1, num_chunks), (0, num_chunks)]:
        tokens = slice(shards.edges[first], shards.edges[last])
        genes, counts = decode(shards, first, last)
        assert np.array_equal(genes, whole_genes[tokens])
        assert np.array_equal(counts, whole_counts[tokens])
        assert (genes.dtype, counts.dtype) == (whole_genes.dtype, whole_counts.dtype)


def test_chunks_end_with_the_tokens(tmp_path):
    store, counts = many_shards(tmp_path / "store", "zarr")
    edges = reader(store).edges
    assert (edges[0], edges[-1]) == (0, np.count_nonzero(counts))
    assert (np.diff(edges)[:-1] == 32).all()


@pytest.mark.parametrize("name", ["data", "indices"])
@pytest.mark.parametrize("place", [0, -1, -5, -100])
def test_a_flipped_bit_of_a_chunk_or_of_the_index_is_named(tmp_path, name, place):
    store = many_shards(tmp_path / "store", "zarr")[0]
    shards = reader(store)
    flip_a_bit(store.path / "cells.zarr" / "X" / name / "c" / "1", place)
    decode(shards, 0, 8)
    with pytest.raises(DataError, match=f"X/{name}/c/1: cannot be decoded .its CRC-32C does not match"):
        decode(shards, 0, 16)


def test_a_process_forked_from_one_that_has_read_reads_too(tmp_path):
    shards = reader(many_shards(tmp_path / "store", "zarr")[0])
    decode(shards, 0, 20)  # by a thread that no fork takes along
    child = multiprocessing.get_context("fork").Process(target=decode, args=(shards, 0, 20))
    child.start()
    child.join(60)
    came_to_an_end = child.exitcode
    child.kill()
    assert came_to_an_end == 0


def test_a_shard_of_no_bytes_is_named(tmp_path):
    store = many_shards(tmp_path / "store", "zarr")[0]
    shards = reader(store)
    (store.path / "cells.zarr" / "X" / "data" / "c" / "0").write_bytes(b"")
    with pytest.raises(DataError, match="X/data/c/0: cannot be decoded"):
        decode(shards, 0, 1)


def test_codecs_that_are_not_ours_are_refused(tmp_path):
    store = write_store(tmp_path / "store", random_counts(9, 5), "zarr")
    file = store.path / "cells.zarr" / "X" / "data" / "zarr.json"
    metadata = json.loads(file.read_text())
    metadata["codecs"][0]["configuration"]["codecs"][1] = {"name": "gzip", "configuration": {"level": 1}}
    file.write_text(json.dumps(metadata))
    with pytest.raises(DataError, match=r"X/data: coded by .*gzip.*prepare the store again"):
        reader(store)
