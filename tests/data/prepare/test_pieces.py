from pathlib import Path

import numpy as np
import pytest

from cctrain.data.files import publish_array
from cctrain.data.prepare.pieces import (
    ABSENT,
    Cut,
    Piece,
    Shuffled,
    count_tokens,
    index_cells,
    ranges_of_rows,
    read_found,
    read_piece,
    sort_piece,
    write_piece,
)

NUM_GENES = 30


def no_news(amount: int) -> None:
    pass


def cells_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, genes = np.nonzero(matrix)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(matrix)))])
    return offsets, genes.astype(np.uint8), matrix[rows, genes]


def shuffled(folder: Path, matrix: np.ndarray, destination: np.ndarray, num_train: int, kept: np.ndarray) -> Shuffled:
    """The cells of the matrix in three pieces of two sources, sorted; `kept` masks the vocabulary."""
    publish_array(folder / "destination.npy", destination)
    result = Shuffled([], folder)
    for source in (0, 1):
        place = np.where(kept, np.cumsum(kept) - 1, ABSENT).astype(np.int32)
        publish_array(result.vocabulary_place(source), place)
    for source, start, stop in ((0, 0, 12), (0, 12, 20), (1, 20, len(matrix))):
        cut = Cut(f"{start}", source, start, stop, folder)
        offsets, genes, counts = cells_of(matrix[start:stop])
        write_piece(cut.scanned, Piece(np.arange(start, stop), offsets, genes, counts))
        sort_piece(cut, folder / "destination.npy", start, num_train, NUM_GENES, no_news)
        count_tokens(cut, result.vocabulary_place(source), no_news)
        result.cuts.append(cut)
    return result


@pytest.fixture
def matrix() -> np.ndarray:
    """40 cells, some without a gene, some counts over one byte and over two."""
    draws = np.random.default_rng(0)
    matrix = draws.negative_binomial(0.3, 0.1, size=(40, NUM_GENES))
    matrix[[3, 17]] = 0
    matrix[5, 2], matrix[6, 2] = 300, 70_000
    return matrix


@pytest.fixture
def destination() -> np.ndarray:
    """Where 40 cells go; every seventh goes nowhere."""
    rows = np.full(40, -1)
    kept = np.arange(40) % 7 != 0
    rows[kept] = np.random.default_rng(1).permutation(int(kept.sum()))
    return rows


@pytest.mark.parametrize("rows", [np.arange(34), np.arange(5, 9), np.array([0, 7, 8, 30]), np.array([], dtype=int)])
@pytest.mark.parametrize("missing", [[], [0, 2, 29], list(range(29))])
def test_collected_cells_are_those_of_the_rows(tmp_path, matrix, destination, rows, missing):
    kept = ~np.isin(np.arange(NUM_GENES), missing)
    store = shuffled(tmp_path, matrix, destination, 20, kept)
    num_tokens = index_cells(store, 34)
    cells = store.collect(rows)
    origin = [int(np.flatnonzero(destination == row)[0]) for row in rows]
    expected = np.minimum(matrix[origin][:, kept], 65_535)
    offsets, genes, counts = cells_of(expected)
    assert cells.offsets.tolist() == offsets.tolist()
    assert cells.genes.tolist() == genes.tolist()
    assert cells.counts.tolist() == counts.tolist()
    assert num_tokens[rows].tolist() == (expected > 0).sum(axis=1).tolist()
    assert store.source_of(rows).tolist() == [int(cell >= 20) for cell in origin]


def test_genes_are_counted_over_the_cells_that_go_somewhere(tmp_path, matrix, destination):
    store = shuffled(tmp_path, matrix, destination, 20, np.ones(NUM_GENES, dtype=bool))
    found = [read_found(cut) for cut in store.cuts]
    total = {name: sum(getattr(part, name) for part in found) for name in vars(found[0])}
    train, everything = matrix[(destination >= 0) & (destination < 20)], matrix[destination >= 0]
    assert total["train_detected"].tolist() == (train > 0).sum(axis=0).tolist()
    assert total["train_total"].tolist() == np.minimum(train, 65_535).sum(axis=0).tolist()
    assert total["detected"].tolist() == (everything > 0).sum(axis=0).tolist()
    assert total["beyond_byte"].tolist() == (everything > 255).sum(axis=0).tolist()
    assert total["clipped"].tolist() == (everything > 65_535).sum(axis=0).tolist()


def test_a_sorted_piece_replaces_the_scanned_one_in_few_bytes(tmp_path, matrix, destination):
    store = shuffled(tmp_path, matrix, destination, 20, np.ones(NUM_GENES, dtype=bool))
    assert not list((tmp_path / "scanned").iterdir())
    last = read_piece(store.cuts[2].sorted)
    assert (np.diff(last.rows) > 0).all()
    assert last.genes.dtype == np.uint8
    assert last.counts.dtype == np.uint8  # no count over 255 in these cells


def test_ranges_take_whole_cells_and_at_least_one():
    indptr = np.array([0, 3, 3, 9, 10, 11])
    assert [part.tolist() for part in ranges_of_rows(indptr, 0, 5, 4)] == [[0, 1], [2], [3, 4]]
    assert [part.tolist() for part in ranges_of_rows(indptr, 1, 2, 4)] == [[1]]
