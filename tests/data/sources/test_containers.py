"""Files that were damaged, or made to harm: each is refused with one line, before anything large is read."""

import json
import pickle
from contextlib import suppress
from pathlib import Path

import h5py
import numcodecs.pickles
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

from cctrain.data.sources.source import open_source
from tests.data.conftest import random_counts, refused, write_h5ad, write_zarr
from tests.data.sources.test_source import Exploit


@pytest.fixture
def h5ad(tmp_path: Path) -> Path:
    return write_h5ad(tmp_path / "a.h5ad", random_counts(9, 4), obs={"age": np.arange(9)})


@pytest.mark.parametrize("kind", [h5py.ExternalLink("other.h5", "/X"), h5py.SoftLink("/layers/counts")])
def test_a_link_is_not_followed(h5ad, kind):
    with h5py.File(h5ad, "r+") as file:
        del file["X"]
        file["X"] = kind
    refused(h5ad, "X is a link")


def test_values_that_lie_in_another_file_are_refused(h5ad, tmp_path):
    (tmp_path / "elsewhere").write_bytes(bytes(4 * 36))
    with h5py.File(h5ad, "r+") as file:
        del file["X"]
        file.create_dataset("X", (9, 4), "f4", external=[(str(tmp_path / "elsewhere"), 0, h5py.h5f.UNLIMITED)])
    refused(h5ad, "X keeps its values in another file")


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_a_lost_chunk_of_a_zarr_matrix_is_not_read_as_zeros(tmp_path, zarr_format, part):
    path = write_zarr(tmp_path / "a.zarr", random_counts(9, 4), zarr_format=zarr_format)
    (path / "X" / part / ("0" if zarr_format == 2 else "c/0")).unlink()
    refused(path, f"X/{part} lacks 1 of its 1 parts")


def test_a_missing_chunk_of_a_dense_matrix_is_said(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", random_counts(9, 4), form=np.asarray)
    assert open_source(path).notes == []
    (path / "X/c/0/0").unlink()
    assert open_source(path).notes == ["1 of 1 chunks of X are not there and were read as zeros (lost, or all zeros)"]


@pytest.mark.parametrize("place", ["X/data", "X/indices", "X/indptr", "obs/_index", "obs/age"])
def test_a_size_that_is_only_claimed_is_refused_without_reading_so_much(h5ad, place):
    with h5py.File(h5ad, "r+") as file:
        attributes, dtype = dict(file[place].attrs), file[place].dtype
        del file[place]
        claimed = file.create_dataset(place, (10**12,), dtype, chunks=(1000,))
        claimed[:9] = b"text" if dtype.kind == "O" else 1
        claimed.attrs.update(attributes)
    refused(h5ad, "damaged")


@pytest.mark.parametrize("shape", [[10**12, 4], [9, 10**12], [-9, 4], [9], [9.5, 4.0], "wide"])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
def test_a_shape_that_the_matrix_cannot_have_is_refused(tmp_path, form, shape):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(9, 4), form=form)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = shape
    refused(path, "X (is|has no shape)")


def test_a_dense_matrix_of_claimed_rows_is_refused(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(9, 4), form=np.asarray)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", (10**9, 10**6), "f4", chunks=(10, 10))
    refused(path, "1,000,000,000 x 1,000,000")


def test_a_shape_that_is_no_list_of_numbers_is_refused(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", random_counts(9, 4))
    metadata = json.loads((path / "X/zarr.json").read_text())
    metadata["attributes"]["shape"] = [9, [4, 4]]
    (path / "X/zarr.json").write_text(json.dumps(metadata))
    refused(path, "the shape of X cannot be read")


def test_a_chunk_too_large_to_decompress_is_refused(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", random_counts(9, 4))
    metadata = json.loads((path / "X/data/zarr.json").read_text())
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [2**40]
    (path / "X/data/zarr.json").write_text(json.dumps(metadata))
    refused(path, "chunks of 4,096.0 GiB")


def write_pickled_column(path: Path, marker: Path) -> None:
    """An obs column of Zarr format 2 with the codec pickle, behind another one at which zarr stops looking."""
    column = path / "obs" / "evil"
    column.mkdir()
    metadata = {
        "zarr_format": 2,
        "shape": [9],
        "chunks": [9],
        "dtype": "|O",
        "compressor": None,
        "fill_value": 0,
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 4}],
        "order": "C",
    }
    (column / ".zarray").write_text(json.dumps(metadata))
    (column / ".zattrs").write_text(json.dumps({"encoding-type": "string-array", "encoding-version": "0.2.0"}))
    (column / "0").write_bytes(pickle.dumps(Exploit(marker)))
    attributes = json.loads((path / "obs" / ".zattrs").read_text())
    attributes["column-order"].append("evil")
    (path / "obs" / ".zattrs").write_text(json.dumps(attributes))


def test_a_zarr_column_that_is_a_pickle_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    path = write_zarr(tmp_path / "a.zarr", random_counts(9, 4), zarr_format=2)
    write_pickled_column(path, tmp_path / "executed")
    refused(path, "obs/evil is encoded with 'pickle'")
    assert not (tmp_path / "executed").exists()


def test_that_pickle_would_be_executed_by_whoever_reads_it(tmp_path, monkeypatch):
    """Else the test above would show nothing. Newer versions of numcodecs refuse unless they are told to trust."""
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    path = write_zarr(tmp_path / "a.zarr", random_counts(9, 4), zarr_format=2)
    write_pickled_column(path, tmp_path / "executed")
    with suppress(Exception):
        zarr.open_group(path, mode="r", use_consolidated=False)["obs/evil"][:]
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"zarr_format": 9}'])
@pytest.mark.parametrize(
    "place", ["zarr.json", "X/zarr.json", "X/data/zarr.json", "obs/zarr.json", "var/_index/zarr.json"]
)
def test_damaged_metadata_of_zarr_are_refused(tmp_path, place, text):
    path = write_zarr(tmp_path / "a.zarr", random_counts(9, 4))
    (path / place).write_text(text)
    refused(path, "damaged|cut short")


def test_a_damaged_chunk_of_a_compressed_h5ad_file_is_refused(tmp_path):
    path = tmp_path / "a.h5ad"
    write_h5ad(path, random_counts(200, 40))
    with h5py.File(path, "r+") as file:
        data = file["X/data"][:]
        del file["X/data"]
        file.create_dataset("X/data", data=data, chunks=(500,), compression="gzip")
        where = file["X/data"].id.get_chunk_info(2).byte_offset
    content = bytearray(path.read_bytes())
    content[where + 10 : where + 60] = bytes(50)
    path.write_bytes(content)
    refused(path, "X/data cannot be read")
