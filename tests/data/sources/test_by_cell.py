import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from cctrain.data.sources import by_cell, raw_blocks
from cctrain.data.sources.by_cell import arranged
from cctrain.errors import DataError
from tests.data.conftest import random_counts


def entries_of(counts: np.ndarray, pieces: int = 4, seed: int = 0):
    """The entries of a matrix in random order, in pieces."""
    cells, columns = np.nonzero(counts)
    order = np.random.default_rng(seed).permutation(len(cells))
    for part in np.array_split(order, pieces):
        yield cells[part], columns[part], counts[cells[part], columns[part]].astype(np.float64)


def arrange(scratch: Path | None, counts: np.ndarray, num_entries: int | None = None):
    claimed = np.count_nonzero(counts) if num_entries is None else num_entries
    return arranged(
        scratch, Path(__file__), "a matrix", counts.shape, claimed, np.dtype(np.float64), lambda: entries_of(counts)
    )


def dense(matrix) -> np.ndarray:
    return sp.vstack([block for _, block in matrix.blocks(0, matrix.shape[0])]).toarray()


@pytest.mark.parametrize("claimed", [0, 30, 10**6])
def test_entries_in_any_order_come_back_by_cell_whatever_their_number_was_thought_to_be(tmp_path, monkeypatch, claimed):
    monkeypatch.setattr(raw_blocks, "COUNTS_PER_BLOCK", 20)
    counts = random_counts(37, 9)
    counts[5] = 0
    matrix = arrange(tmp_path, counts, claimed)
    assert np.array_equal(dense(matrix), counts)
    assert all(block.has_sorted_indices for _, block in matrix.blocks(0, 37))


def test_a_range_too_large_for_memory_is_divided_again(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_blocks, "COUNTS_PER_BLOCK", 20)
    monkeypatch.setattr(by_cell, "_MAX_OPEN_FILES", 2)
    largest = []
    original = np.lexsort
    monkeypatch.setattr(np, "lexsort", lambda keys: largest.append(len(keys[0])) or original(keys))
    counts = random_counts(64, 9)
    assert np.array_equal(dense(arrange(tmp_path, counts)), counts)
    assert len(largest) > 2
    assert max(largest) <= 40


def test_a_cell_with_more_entries_than_memory_or_genes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_blocks, "COUNTS_PER_BLOCK", 20)
    many = np.full(200, 3), np.arange(200) % 9, np.ones(200)
    with pytest.raises(DataError, match="a matrix has 200 values for 9 genes in the cell of row 3"):
        arranged(tmp_path, Path(__file__), "a matrix", (30, 9), 200, np.dtype(np.float64), lambda: [many])


def test_a_failure_leaves_nothing_that_looks_complete_and_the_next_start_succeeds(tmp_path):
    counts = random_counts(20, 9)

    def broken():
        yield next(entries_of(counts))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arranged(tmp_path, Path(__file__), "a matrix", counts.shape, 100, np.dtype(np.float64), broken)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert np.array_equal(dense(arrange(tmp_path, counts)), counts)


def test_what_a_killed_process_left_is_removed(tmp_path):
    counts = random_counts(20, 9)
    directory = arrange(tmp_path, counts)._directory
    directory.rename(directory.with_suffix(".partial"))
    (directory.with_suffix(".partial") / "indptr").write_bytes(b"half")
    assert np.array_equal(dense(arrange(tmp_path, counts)), counts)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [directory]


def test_without_a_scratch_folder_the_files_go_with_the_matrix():
    counts = random_counts(20, 9)
    matrix = arrange(None, counts)
    directory = matrix._directory
    assert np.array_equal(dense(matrix), counts)
    del matrix
    assert not directory.parent.exists()


def _arrange_in_process(scratch: Path, times: "multiprocessing.Queue[int]") -> None:
    arrange(scratch, random_counts(200, 30))
    times.put(sum(file.stat().st_ino for file in scratch.rglob("*") if file.is_file()))


@pytest.mark.processes
def test_two_processes_that_need_the_same_matrix_share_it(tmp_path):
    context = multiprocessing.get_context("spawn")
    times = context.Queue()
    workers = [context.Process(target=_arrange_in_process, args=(tmp_path, times)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [times.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert found[0] == found[1]
    assert np.array_equal(dense(arrange(tmp_path, random_counts(200, 30))), random_counts(200, 30))
