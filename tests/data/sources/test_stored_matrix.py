import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from cctrain.data.sources import raw_blocks, stored_matrix
from cctrain.data.sources.source import open_source
from tests.data.conftest import random_counts, refused, write_h5ad


def change(path, name, values):
    with h5py.File(path, "r+") as file:
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = values
        file[name].attrs.update(attributes)


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize(
    ("change_indptr", "match"),
    [
        (lambda indptr: indptr[::-1], "does not ascend"),
        (lambda indptr: indptr + 1, "does not ascend"),
        (lambda indptr: np.append(indptr[:-1], indptr[-1] - 1), r"indptr ends at \d+ of \d+ values"),
        (lambda indptr: np.where(np.arange(len(indptr)) == 2, 2**40, indptr.astype(np.int64)), "does not ascend"),
        (lambda indptr: indptr[:-1], "entries where"),
        (lambda indptr: indptr.astype(np.float64), "holds float64 where whole numbers belong"),
        (lambda indptr: indptr.astype("S"), "where whole numbers belong"),
        (lambda indptr: indptr[None], "has 2 axes, not 1"),
    ],
)
def test_an_indptr_that_does_not_fit_is_refused(tmp_path, form, change_indptr, match):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(6, 4), form=form)
    with h5py.File(path) as file:
        indptr = file["X/indptr"][:]
    change(path, "X/indptr", change_indptr(indptr))
    refused(path, match, counts="X")


@pytest.mark.parametrize(
    ("form", "axis"), [(sp.csr_matrix, r"gene index outside 0\.\.3"), (sp.csc_matrix, "cell index")]
)
@pytest.mark.parametrize("bad", [77, -1])
def test_an_index_out_of_range_is_refused(tmp_path, form, axis, bad):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(6, 4), form=form)
    with h5py.File(path, "r+") as file:
        file["X/indices"][2] = bad
    refused(path, axis, counts="X")


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
def test_swapped_data_and_indices_are_refused(tmp_path, form):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(6, 4), form=form)
    with h5py.File(path, "r+") as file:
        file.move("X/data", "X/other")
        file.move("X/indices", "X/data")
        file.move("X/other", "X/indices")
    refused(path, "X/indices holds float32 where whole numbers belong", counts="X")


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
def test_values_and_indices_of_unequal_number_are_refused(tmp_path, form):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(6, 4), form=form)
    with h5py.File(path) as file:
        values = file["X/data"][:-2]
    change(path, "X/data", values)
    refused(path, "values and .* indices", counts="X")


@pytest.mark.parametrize("values", [lambda data: data.astype("S"), lambda data: data.astype(complex)])
def test_values_that_are_no_numbers_are_refused(tmp_path, values):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(6, 4))
    with h5py.File(path) as file:
        data = file["X/data"][:]
    change(path, "X/data", values(data))
    refused(path, "where numbers belong", counts="X")


def test_values_that_are_objects_are_refused(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(6, 4))
    with h5py.File(path) as file:
        data = [str(value) for value in file["X/data"][:]]
    change(path, "X/data", data)
    refused(path, "X/data holds object where numbers belong", counts="X")


@pytest.mark.parametrize("missing", ["data", "indices", "indptr"])
def test_a_matrix_that_lacks_a_part_is_refused(tmp_path, missing):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(6, 4))
    with h5py.File(path, "r+") as file:
        del file[f"X/{missing}"]
    refused(path, f"has no X/{missing}", counts="X")


@pytest.mark.parametrize("encoding", ["csc_matrix", "coo_matrix", "array", ""])
def test_a_wrong_encoding_is_refused(tmp_path, encoding):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(6, 4))
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-type"] = encoding
    refused(path, "X", counts="X")


def test_entries_listed_twice_are_summed_as_scipy_does(tmp_path):
    counts = random_counts(6, 4)
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    expected = counts.copy()
    with h5py.File(path, "r+") as file:
        second = file["X/indices"][1]
        expected[0, second] += expected[0, file["X/indices"][0]]
        expected[0, file["X/indices"][0]] = 0
        file["X/indices"][0] = second
    found = np.concatenate([block.counts.toarray() for block in open_source(path).blocks()])
    assert np.array_equal(found, expected)


def test_pieces_of_a_chunked_dense_matrix_end_where_chunks_end(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_blocks, "COUNTS_PER_BLOCK", 30)
    monkeypatch.setattr(stored_matrix, "DENSE_PER_READ", 45)
    counts = random_counts(23, 4)
    path = write_h5ad(tmp_path / "a.h5ad", counts, form=np.asarray)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=counts, chunks=(5, 2), compression="gzip")
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    source = open_source(path)
    assert source.piece_edges(30).tolist() == [0, 5, 10, 15, 20, 23]
    assert np.array_equal(np.concatenate([block.counts.toarray() for block in source.blocks()]), counts)
    assert np.array_equal(np.concatenate([block.counts.toarray() for block in source.blocks(3, 19)]), counts[3:19])
