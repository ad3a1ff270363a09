import h5py
import numpy as np
import pytest

from cctrain.data.sources.source import open_source
from cctrain.errors import DataError
from tests.data.conftest import random_counts, read_all, refused, write_10x_h5, write_h5ad


def change(path, name, values):
    with h5py.File(path, "r+") as file:
        del file[name]
        if values is not None:
            file[name] = values


def test_anndata_is_recognised_whatever_its_name(tmp_path):
    counts = random_counts(6, 4)
    path = write_h5ad(tmp_path / "a.h5", counts)
    assert open_source(path).kind == ".h5ad"
    assert np.array_equal(read_all(path), counts)


def test_a_10x_file_is_recognised_whatever_its_name(tmp_path):
    path = write_10x_h5(tmp_path / "a.h5ad", random_counts(6, 4))
    assert open_source(path).kind == "10x .h5"


def test_of_several_genomes_one_has_to_be_chosen(tmp_path):
    counts = random_counts(6, 4)
    path = write_10x_h5(tmp_path / "a.h5", counts, version=2, genomes=["hg19", "mm10"])
    refused(path, r"2 genomes \(hg19, mm10\).* --counts hg19")
    assert open_source(path, counts="mm10").counts_from == "mm10"
    assert np.array_equal(read_all(path, counts="mm10"), counts)
    with pytest.raises(DataError, match="no dm6; this 10x file has hg19, mm10"):
        open_source(path, counts="dm6")


def test_genes_of_several_genomes_in_one_matrix_are_all_read_and_said(tmp_path):
    counts = random_counts(6, 4)
    path = write_10x_h5(tmp_path / "a.h5", counts, genomes=["hg19", "mm10", "hg19", ""])
    assert open_source(path).notes == ["genes of 2 genomes: hg19, mm10"]
    assert np.array_equal(read_all(path), counts)


@pytest.mark.parametrize(
    "name", ["data", "indices", "indptr", "barcodes", "shape", "features/id", "features/name", "features/feature_type"]
)
@pytest.mark.parametrize("damage", ["missing", "short", "texts", "numbers", "two axes", "scalar"])
def test_a_damaged_part_is_refused(tmp_path, name, damage):
    path = write_10x_h5(tmp_path / "a.h5", random_counts(6, 4))
    with h5py.File(path) as file:
        values = file[f"matrix/{name}"][:]
    is_text = values.dtype.kind == "S"
    changed = {
        "missing": None,
        "short": values[:-1],
        "texts": values if is_text else values.astype("S"),
        "numbers": np.arange(len(values)) * 1.0 if is_text or name in ("indices", "indptr", "shape") else values * 0.5,
        "two axes": values[None],
        "scalar": values[0],
    }[damage]
    if is_text and damage == "texts":
        changed = values[[0] * (len(values) + 1)]
    change(path, f"matrix/{name}", changed)
    refused(path, "matrix")


def test_a_gene_index_out_of_range_is_refused(tmp_path):
    path = write_10x_h5(tmp_path / "a.h5", random_counts(6, 4))
    with h5py.File(path, "r+") as file:
        file["matrix/indices"][2] = 4
    refused(path, r"gene index outside 0\.\.3")


@pytest.mark.parametrize("shape", [[10**9, 6], [4, 2**31 - 1], [-4, 6], [6, 4]])
def test_a_shape_that_the_parts_do_not_have_is_refused(tmp_path, shape):
    path = write_10x_h5(tmp_path / "a.h5", random_counts(6, 4))
    change(path, "matrix/shape", np.array(shape, dtype=np.int32))
    refused(path, "where .* belong")


def test_an_empty_barcode_is_refused(tmp_path):
    path = write_10x_h5(tmp_path / "a.h5", random_counts(6, 4))
    with h5py.File(path, "r+") as file:
        file["matrix/barcodes"][4] = b""
    refused(path, "row 4 has no id")


def test_a_barcode_that_is_no_text_is_refused(tmp_path):
    path = write_10x_h5(tmp_path / "a.h5", random_counts(6, 4))
    with h5py.File(path, "r+") as file:
        file["matrix/barcodes"][4] = b"\xff\xfe"
    refused(path, "matrix/barcodes cannot be read")
