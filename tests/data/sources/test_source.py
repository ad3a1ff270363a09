import hashlib
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cctrain.data.sources import by_cell, raw_blocks, stored_matrix, tenx
from cctrain.data.sources.source import open_source
from cctrain.errors import DataError
from tests.data.conftest import gene_ids, random_counts, read_all, write_10x, write_10x_h5, write_h5ad, write_zarr

CSR, CSC, DENSE = sp.csr_matrix, sp.csc_matrix, np.asarray

FORMS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "h5ad csr": lambda folder, counts: write_h5ad(folder / "a.h5ad", counts, form=CSR),
    "h5ad csc": lambda folder, counts: write_h5ad(folder / "a.h5ad", counts, form=CSC),
    "h5ad dense": lambda folder, counts: write_h5ad(folder / "a.h5ad", counts, form=DENSE),
    "h5ad raw": lambda folder, counts: write_h5ad(folder / "a.h5ad", np.log1p(counts), raw=counts),
    "zarr 3 csr": lambda folder, counts: write_zarr(folder / "a.zarr", counts, form=CSR),
    "zarr 3 csc": lambda folder, counts: write_zarr(folder / "a.zarr", counts, form=CSC),
    "zarr 3 dense": lambda folder, counts: write_zarr(folder / "a.zarr", counts, form=DENSE),
    "zarr 2 csr": lambda folder, counts: write_zarr(folder / "a.zarr", counts, form=CSR, zarr_format=2),
    "zarr 2 csc": lambda folder, counts: write_zarr(folder / "a.zarr", counts, form=CSC, zarr_format=2),
    "zarr 2 dense": lambda folder, counts: write_zarr(folder / "a.zarr", counts, form=DENSE, zarr_format=2),
    "zarr layer": lambda folder, counts: write_zarr(folder / "a.zarr", np.log1p(counts), layers={"umi": counts}),
    "10x h5 v3": lambda folder, counts: write_10x_h5(folder / "a.h5", counts),
    "10x h5 v2": lambda folder, counts: write_10x_h5(folder / "a.h5", counts, version=2),
    "10x folder": lambda folder, counts: write_10x(folder / "run", counts),
    "10x folder gz": lambda folder, counts: write_10x(folder / "run", counts, compressed=True),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Callable[[Path, np.ndarray], Path]:
    return FORMS[request.param]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and several ranges of cells in what is re-ordered."""
    monkeypatch.setattr(raw_blocks, "COUNTS_PER_BLOCK", 40)
    monkeypatch.setattr(raw_blocks, "CELLS_PER_BLOCK", 5)
    monkeypatch.setattr(stored_matrix, "DENSE_PER_READ", 90)
    monkeypatch.setattr(stored_matrix, "_SENT_AT_A_TIME", 30)


def test_the_same_cells_give_the_same_blocks_in_every_form(tmp_path, form, small_blocks):
    counts = random_counts(23, 10)
    source = open_source(form(tmp_path, counts))
    blocks = list(source.blocks())
    assert np.array_equal(np.concatenate([block.counts.toarray() for block in blocks]), counts)
    assert (source.num_cells, source.gene_ids, source.gene_names[3]) == (23, gene_ids(10), "NAME3")
    assert source.cell_ids == [f"cell{i}" for i in range(23)]
    assert source.num_duplicate_genes == 0
    assert source.notes == []


def test_blocks_are_consecutive_small_and_clean_in_every_form(tmp_path, form, small_blocks):
    counts = random_counts(23, 10)
    blocks = [(block.start, block.counts) for block in open_source(form(tmp_path, counts)).blocks()]
    assert [start for start, _ in blocks] == np.cumsum([0, *(part.shape[0] for _, part in blocks)])[:-1].tolist()
    for _, part in blocks:
        assert part.shape[0] <= 5
        assert part.nnz <= 40 or part.shape[0] == 1
        assert part.has_canonical_format
        assert (part.data > 0).all()
        assert part.dtype == np.int64


def test_any_range_of_cells_can_be_read_in_every_form(tmp_path, form, small_blocks):
    counts = random_counts(23, 10)
    path = form(tmp_path, counts)
    source = open_source(path)
    for start, stop in ((0, 1), (4, 17), (13, 14), (22, 23)):
        blocks = list(source.blocks(start, stop))
        assert blocks[0].start == start
        assert np.array_equal(np.concatenate([block.counts.toarray() for block in blocks]), counts[start:stop])
    assert list(source.blocks(9, 9)) == []


def test_pieces_cover_all_cells_evenly_and_are_the_same_for_everybody(tmp_path, form, small_blocks):
    counts = random_counts(60, 10)
    path = form(tmp_path, counts)
    edges = open_source(path, scratch=tmp_path / "one").piece_edges(100)
    assert np.array_equal(edges, open_source(path, scratch=tmp_path / "two").piece_edges(100))
    assert edges.dtype == np.int64
    assert (edges[0], edges[-1]) == (0, 60)
    assert len(edges) >= 3
    assert (np.diff(edges) > 0).all()
    per_piece = np.add.reduceat(np.count_nonzero(counts, axis=1), edges[:-1])
    assert per_piece.max() <= 120


@pytest.mark.parametrize("name", ["h5ad csc", "zarr 3 csc", "10x folder"])
def test_a_matrix_stored_by_gene_is_arranged_once_for_all_who_share_the_scratch_folder(tmp_path, name, small_blocks):
    counts = random_counts(23, 10)
    path = FORMS[name](tmp_path, counts)
    open_source(path, scratch=tmp_path / "scratch").arrange()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "scratch").rglob("*")}
    assert np.array_equal(read_all(path, scratch=tmp_path / "scratch"), counts)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "scratch").rglob("*")} == before


def test_a_matrix_stored_by_gene_is_arranged_again_when_its_file_has_changed(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(9, 4), form=CSC)
    open_source(path, scratch=tmp_path / "scratch").arrange()
    write_h5ad(path, random_counts(9, 4, seed=1), form=CSC)
    assert np.array_equal(read_all(path, scratch=tmp_path / "scratch"), random_counts(9, 4, seed=1))


@pytest.mark.parametrize("name", ["h5ad csr", "zarr 3 dense", "10x h5 v3"])
def test_arranging_a_matrix_that_is_stored_by_cell_copies_nothing(tmp_path, name):
    path = FORMS[name](tmp_path, random_counts(9, 4))
    open_source(path, scratch=tmp_path / "scratch").arrange()
    assert list((tmp_path / "scratch").glob("by-cell-*")) == []


@pytest.mark.parametrize("name", ["h5ad csr", "h5ad csc", "h5ad dense", "10x h5 v3", "10x folder"])
def test_memory_does_not_grow_with_the_number_of_cells(tmp_path, name, monkeypatch):
    monkeypatch.setattr(raw_blocks, "COUNTS_PER_BLOCK", 5_000)
    monkeypatch.setattr(stored_matrix, "DENSE_PER_READ", 10_000)
    monkeypatch.setattr(stored_matrix, "_SENT_AT_A_TIME", 5_000)
    monkeypatch.setattr(tenx, "_TEXT_PER_PIECE", 20_000)
    monkeypatch.setattr(by_cell, "_MAX_OPEN_FILES", 4)

    def peak(num_cells: int) -> int:
        folder = tmp_path / str(num_cells)
        folder.mkdir()
        path = FORMS[name](folder, random_counts(num_cells, 50))
        source = open_source(path, scratch=folder / "scratch")
        tracemalloc.start()
        assert sum(block.counts.shape[0] for block in source.blocks()) == num_cells
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return largest

    few, many = peak(1_000), peak(8_000)
    assert many - few < 250_000  # some 30 bytes a cell; the entries alone would take 12 bytes x 160,000 more


@pytest.mark.parametrize("write", [write_h5ad, write_zarr])
@pytest.mark.parametrize("form", [CSR, CSC, DENSE])
@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf])
def test_a_value_that_is_no_count_is_named_with_its_cell_and_gene(tmp_path, write, form, value):
    counts = random_counts(12, 6).astype(float)
    counts[7, 4] = value
    path = write(tmp_path / "bad", counts, form=form)
    with pytest.raises(DataError) as error:
        list(open_source(path, counts="X").blocks())
    assert all(text in str(error.value) for text in ("bad", "cell7", "row 7", gene_ids(6)[4], str(value)))


@pytest.mark.parametrize("write", [write_h5ad, write_zarr])
def test_counts_are_found_in_raw_or_in_the_one_layer_that_has_them(tmp_path, write):
    counts = random_counts(12, 6)
    logs = np.log1p(counts)
    in_raw = write(tmp_path / "raw", logs, raw=counts, layers={"scaled": logs - 1})
    in_layer = write(tmp_path / "layer", logs, layers={"umi": counts, "scaled": logs - 1})
    assert open_source(in_raw).counts_from == "raw.X"
    assert open_source(in_layer).counts_from == "layers/umi"
    assert np.array_equal(read_all(in_raw), counts)
    assert np.array_equal(read_all(in_layer), counts)


@pytest.mark.parametrize("write", [write_h5ad, write_zarr])
def test_no_counts_or_two_layers_of_counts_are_errors_that_list_what_is_there(tmp_path, write):
    counts = random_counts(12, 6)
    logs = np.log1p(counts)
    with pytest.raises(DataError, match="no raw counts"):
        open_source(write(tmp_path / "a", logs, layers={"scaled": logs}))
    two = write(tmp_path / "b", logs, layers={"one": counts, "two": counts})
    with pytest.raises(DataError, match="layers/one, layers/two look like counts"):
        open_source(two)
    assert open_source(two, counts="layers/two").counts_from == "layers/two"
    with pytest.raises(DataError, match="no layers/three; the file has X, layers/one, layers/two"):
        open_source(two, counts="layers/three")


def test_the_error_about_values_says_which_other_matrix_looks_like_counts(tmp_path):
    counts = random_counts(12, 6)
    path = write_h5ad(tmp_path / "a.h5ad", np.log1p(counts), layers={"umi": counts})
    with pytest.raises(DataError, match="--counts layers/umi"):
        list(open_source(path, counts="X").blocks())


def test_columns_with_the_same_id_are_summed_and_counted(tmp_path):
    counts = random_counts(8, 4)
    genes = gene_ids(4)
    genes[3] = genes[1] + ".7"
    path = write_h5ad(tmp_path / "a.h5ad", counts, genes=genes)
    source = open_source(path)
    assert source.gene_ids == gene_ids(3)
    assert source.num_duplicate_genes == 1
    assert any("version suffixes of 1" in note for note in source.notes)
    assert np.array_equal(read_all(path)[:, 1], counts[:, 1] + counts[:, 3])


def test_ensembl_ids_are_found_in_a_column_when_the_index_holds_names(tmp_path):
    names = ["MT-CO1", "CD3E", "LYZ"]
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(4, 3), genes=names, names=gene_ids(3))
    source = open_source(path)
    assert source.gene_ids == gene_ids(3)
    assert source.gene_names == names


@pytest.mark.parametrize("write", [write_10x, write_10x_h5])
def test_antibodies_are_not_taken_for_genes(tmp_path, write):
    counts = random_counts(6, 3)
    kinds = ["Gene Expression", "Antibody Capture", "Gene Expression"]
    path = write(tmp_path / "run", counts, types=kinds)
    assert open_source(path).gene_ids == [gene_ids(3)[0], gene_ids(3)[2]]
    assert open_source(path).notes == ["1 features that are not gene expression were left out"]
    assert np.array_equal(read_all(path), counts[:, [0, 2]])


def test_a_column_of_biotypes_leaves_no_gene_out(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 3), types=["protein_coding", "lncRNA", "protein_coding"])
    assert open_source(folder).gene_ids == gene_ids(3)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.float16, np.float64, ">f4", ">i8", bool])
@pytest.mark.parametrize("form", [CSR, CSC])
def test_counts_of_every_dtype_are_read(tmp_path, form, dtype):
    counts = random_counts(9, 4) if dtype is not bool else random_counts(9, 4) > 0
    path = write_h5ad(tmp_path / "a.h5ad", counts, form=form)
    with h5py.File(path, "r+") as file:
        data = file["X/data"][:].astype(dtype)
        del file["X/data"]
        file["X/data"] = data
    assert np.array_equal(read_all(path), counts)


def test_a_table_keeps_its_columns_and_the_order_of_its_cells(tmp_path):
    obs = {"kind": pd.Categorical(["a", "b", "a"]), "age": [1.5, np.nan, 3], "batch": ["x", "y", "z"]}
    cells = ["third", "first", "second"]
    for path in (
        write_h5ad(tmp_path / "a.h5ad", random_counts(3, 4), obs=obs, cells=cells),
        write_zarr(tmp_path / "a.zarr", random_counts(3, 4), obs=obs, cells=cells),
        write_zarr(tmp_path / "b.zarr", random_counts(3, 4), obs=obs, cells=cells, zarr_format=2),
    ):
        source = open_source(path)
        assert source.cell_ids == cells
        assert list(source.obs.columns) == ["kind", "age", "batch"]
        assert source.obs["kind"].tolist() == ["a", "b", "a"]


def test_the_digest_of_a_directory_changes_with_any_of_its_files(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", random_counts(9, 4))
    before = open_source(path).digests()
    assert list(before) == ["a.zarr"]
    assert before == open_source(path).digests()
    (path / "obs" / "zarr.json").write_text((path / "obs" / "zarr.json").read_text() + " ")
    assert open_source(path).digests() != before


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    path = write_10x_h5(tmp_path / "a.h5", random_counts(9, 4))
    assert open_source(path).digests() == {"a.h5": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("write", [write_h5ad, write_zarr])
def test_a_cell_or_a_gene_without_an_id_is_refused(tmp_path, write):
    source = open_source(write(tmp_path / "a", random_counts(3, 4), cells=["one", "", "three"]))
    with pytest.raises(DataError, match="row 1 has no id"):
        list(source.cell_ids)
    with pytest.raises(DataError, match="column 2 has no id"):
        open_source(write(tmp_path / "b", random_counts(3, 4), genes=["A", "B", "", "D"]))


def test_two_cells_of_the_same_id_are_both_read(tmp_path):
    counts = random_counts(3, 4)
    path = write_h5ad(tmp_path / "a.h5ad", counts, cells=["one", "two", "one"])
    assert open_source(path).cell_ids == ["one", "two", "one"]
    assert np.array_equal(read_all(path), counts)


def test_what_is_no_source_is_an_error_that_says_what_was_looked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.h5ad").write_text("no cells")
    (tmp_path / "empty.h5").write_bytes(b"")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["something"] = 1
    with pytest.raises(DataError, match="no such file"):
        open_source(tmp_path / "absent.h5ad")
    with pytest.raises(DataError, match=r"no matrix\.mtx"):
        open_source(tmp_path / "folder")
    for name in ("text.h5ad", "empty.h5"):
        with pytest.raises(DataError, match=r"not an \.h5ad file"):
            open_source(tmp_path / name)
    with pytest.raises(DataError, match="none of X, raw/X and layers"):
        open_source(tmp_path / "other.h5ad")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("name", ["h5ad csr", "10x h5 v3"])
def test_a_file_that_was_cut_short_is_refused(tmp_path, name, share):
    path = FORMS[name](tmp_path, random_counts(40, 30))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match="cut short"):
        open_source(path)


class Exploit:
    """What a pickle runs when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_pickle_in_uns_is_not_executed(tmp_path):
    counts = random_counts(9, 4)
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    with h5py.File(path, "r+") as file:
        file["uns/evil"] = np.void(pickle.dumps(Exploit(tmp_path / "executed")))
    assert np.array_equal(read_all(path), counts)
    assert open_source(path).cell_ids[0] == "cell0"
    assert not (tmp_path / "executed").exists()
