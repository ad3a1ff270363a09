"""Both forms: shards that depend on nothing but the layout and their tokens, whoever writes them and when."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from cctrain.data.store import writer
from cctrain.data.store.layout import Groups
from cctrain.data.store.store import verify_store
from tests.data.conftest import random_counts
from tests.data.stores import CONTAINERS, layout_of, to_dense, tokens_of, write_shards, write_store, write_tables

pytestmark = pytest.mark.parametrize("container", CONTAINERS)


def all_bytes(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_shards_in_another_order_and_written_twice_have_the_same_bytes(tmp_path, container):
    counts = random_counts(70, 20)
    layout = layout_of(counts, container)
    write_shards(tmp_path / "one", counts, layout)
    num_shards = len(writer.shard_edges(layout)) - 1
    assert num_shards > 3
    write_shards(tmp_path / "two", counts, layout, [*reversed(range(num_shards)), 1, 0, num_shards - 1])
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


def test_another_process_writes_the_same_bytes(tmp_path, container):
    counts = random_counts(70, 20)
    layout = layout_of(counts, container)
    write_shards(tmp_path / "one", counts, layout)
    other = multiprocessing.get_context("spawn").Process(target=write_shards, args=(tmp_path / "two", counts, layout))
    other.start()
    other.join(60)
    assert other.exitcode == 0
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


def test_the_integer_type_that_tokens_come_in_changes_nothing(tmp_path, container):
    counts = random_counts(30, 20)
    layout = layout_of(counts, container)
    write_shards(tmp_path / "one", counts, layout)
    edges = writer.create(tmp_path / "two", layout)
    genes, values = (part.astype(np.uint16) for part in tokens_of(counts))
    for shard in range(len(edges) - 1):
        tokens = slice(edges[shard], edges[shard + 1])
        writer.write_shard(tmp_path / "two", layout, shard, genes[tokens], values[tokens])
    writer.close(tmp_path / "two", layout)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")


def test_shards_cover_all_tokens_and_come_near_the_size_that_is_asked_for(tmp_path, container):
    layout = layout_of(random_counts(200, 20), container)
    edges = writer.create(tmp_path, layout)
    assert np.array_equal(edges, writer.shard_edges(layout))
    assert (edges[0], edges[-1]) == (0, layout.num_tokens)
    sizes = np.diff(edges)
    largest_block = layout.cells_per_block * 20
    assert (abs(sizes[:-1] - layout.tokens_per_shard) <= largest_block).all()
    assert 0 < sizes[-1] <= layout.tokens_per_shard + largest_block


def test_a_frame_that_is_made_again_keeps_the_shards_that_are_there(tmp_path, container):
    counts = random_counts(70, 20)
    layout = layout_of(counts, container)
    write_shards(tmp_path, counts, layout)
    before = all_bytes(tmp_path)
    writer.create(tmp_path, layout)
    assert all_bytes(tmp_path) == before


def test_what_killed_writers_left_is_removed(tmp_path, container):
    counts = random_counts(70, 20)
    layout = layout_of(counts, container)
    write_shards(tmp_path, counts, layout)
    write_tables(tmp_path, counts)
    before = all_bytes(tmp_path)
    folders = [tmp_path / "cells.zarr" / "obs", *(path.parent for path in tmp_path.rglob("*.tar"))]
    for folder in folders:
        (folder / "0.123.partial").write_bytes(b"half")
    writer.close(tmp_path, layout)
    write_tables(tmp_path, counts)
    assert all_bytes(tmp_path) == before


def test_a_shard_takes_exactly_its_tokens(tmp_path, container):
    layout = layout_of(random_counts(70, 20), container)
    edges = writer.create(tmp_path, layout)
    too_few = np.ones(edges[1] - 1, dtype=np.int64)
    with pytest.raises(AssertionError, match="between its edges"):
        writer.write_shard(tmp_path, layout, 0, too_few, too_few)


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        (np.ones((50, 1), dtype=np.int64), "every token is of gene 0: chunks of zeros"),
        (np.diag(np.arange(1, 41)), "one token a cell"),
        (np.repeat([[0, 0], [3, 1], [0, 0]], [30, 5, 40], axis=0), "whole blocks without a token"),
        (np.zeros((9, 3), dtype=np.int64), "no token at all"),
        (np.full((3, 300), 70_000), "wide types"),
    ],
)
def test_odd_matrices_come_back_as_they_were(tmp_path, container, counts, why):
    store = write_store(tmp_path, counts, container)
    assert np.array_equal(to_dense(store, np.arange(len(counts))), counts), why
    assert verify_store(tmp_path) == []


def test_groups_come_back_with_their_cells(tmp_path, container):
    written = Groups(np.array(["b", "c", "a"]), np.array([0, 10, 30, 45]), num_train=2)
    groups = write_store(tmp_path, random_counts(45, 10), container, groups=written, num_train=30).groups
    assert groups is not None
    assert groups.names.tolist() == ["b", "c", "a"]
    assert (groups.starts.tolist(), groups.num_train) == ([0, 10, 30, 45], 2)
    assert verify_store(tmp_path) == []


def test_uncompressed_shards_hold_the_same_cells(tmp_path, container):
    counts = random_counts(45, 10)
    whole = write_store(tmp_path / "packed", counts, container)
    raw = write_store(tmp_path / "raw", counts, container, compressed=False)
    assert raw.digest == whole.digest
    assert np.array_equal(to_dense(raw, np.arange(45)), counts)
