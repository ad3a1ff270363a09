import gzip
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from cctrain.data import h5ad
from cctrain.data.sources import open_source
from cctrain.errors import DataError
from tests.data.conftest import gene_ids, random_counts, write_10x, write_h5ad


def read_all(path: Path, **options) -> np.ndarray:
    return np.concatenate([block.counts.toarray() for block in open_source(path, **options).blocks()])


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_every_form_of_x_gives_the_same_counts(tmp_path, form, monkeypatch):
    monkeypatch.setattr(h5ad, "COUNTS_PER_BLOCK", 40)  # several blocks, several buckets
    monkeypatch.setattr(h5ad, "_DENSE_PER_BLOCK", 40)
    counts = random_counts(23, 10)
    assert np.array_equal(read_all(write_h5ad(tmp_path / "a.h5ad", counts, form=form)), counts)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_10x_folder_is_read_whatever_the_order_of_its_lines(tmp_path, compressed):
    counts = random_counts(17, 10)
    shuffled = np.random.default_rng(1).permutation(np.count_nonzero(counts))
    folder = write_10x(tmp_path / "run", counts, order=shuffled, compressed=compressed)
    source = open_source(folder)
    assert source.counts_from == "matrix.mtx"
    assert source.cell_ids[3] == "cell3"
    assert source.gene_names[3] == "NAME3"
    assert np.array_equal(read_all(folder), counts)
    assert np.array_equal(np.concatenate([b.counts.toarray() for b in source.blocks()]), counts)


def test_blocks_are_consecutive_and_small(tmp_path, monkeypatch):
    monkeypatch.setattr(h5ad, "CELLS_PER_BLOCK", 5)
    counts = random_counts(23, 10)
    blocks = list(open_source(write_h5ad(tmp_path / "a.h5ad", counts)).blocks())
    assert [block.start for block in blocks] == [0, 5, 10, 15, 20]
    assert all(block.counts.has_sorted_indices and (block.counts.data > 0).all() for block in blocks)
    assert blocks[0].counts.dtype == np.int64


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf])
def test_a_value_that_is_no_count_is_named_with_its_cell_and_gene(tmp_path, form, value):
    counts = random_counts(12, 6).astype(float)
    counts[7, 4] = value
    path = write_h5ad(tmp_path / "bad.h5ad", counts, form=form)
    with pytest.raises(DataError) as error:
        list(open_source(path, counts="X").blocks())
    assert all(text in str(error.value) for text in ("bad.h5ad", "cell7", "row 7", gene_ids(6)[4], str(value)))


def test_a_fraction_in_a_matrix_market_file_is_named_with_its_cell_and_gene(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(5, 4))
    matrix = folder / "matrix.mtx"
    lines = matrix.read_text().replace("integer", "real").splitlines()
    lines[3] = lines[3].rsplit(" ", 1)[0] + " 1.5"
    matrix.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"1\.5 for gene 'ENSG00000000000' in cell 'cell0' \(row 0\)"):
        list(open_source(folder).blocks())


def test_counts_are_found_in_raw_or_in_the_one_layer_that_has_them(tmp_path):
    counts = random_counts(12, 6)
    logs = np.log1p(counts)
    in_raw = write_h5ad(tmp_path / "raw.h5ad", logs, raw=counts, layers={"scaled": logs - 1})
    in_layer = write_h5ad(tmp_path / "layer.h5ad", logs, layers={"umi": counts, "scaled": logs - 1})
    assert open_source(in_raw).counts_from == "raw.X"
    assert open_source(in_layer).counts_from == "layers/umi"
    assert np.array_equal(read_all(in_raw), counts)
    assert np.array_equal(read_all(in_layer), counts)


def test_no_counts_or_two_layers_of_counts_are_errors_that_list_what_is_there(tmp_path):
    counts = random_counts(12, 6)
    logs = np.log1p(counts)
    with pytest.raises(DataError, match="no raw counts"):
        open_source(write_h5ad(tmp_path / "a.h5ad", logs, layers={"scaled": logs}))
    two = write_h5ad(tmp_path / "b.h5ad", logs, layers={"one": counts, "two": counts})
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


def test_antibodies_are_not_taken_for_genes(tmp_path):
    counts = random_counts(6, 3)
    kinds = ["Gene Expression", "Antibody Capture", "Gene Expression"]
    folder = write_10x(tmp_path / "run", counts, types=kinds)
    assert open_source(folder).gene_ids == [gene_ids(3)[0], gene_ids(3)[2]]
    assert np.array_equal(read_all(folder), counts[:, [0, 2]])


def test_a_column_of_biotypes_leaves_no_gene_out(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 3), types=["protein_coding", "lncRNA", "protein_coding"])
    assert open_source(folder).gene_ids == gene_ids(3)


def test_a_matrix_market_file_that_was_cut_short_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    lines = (folder / "matrix.mtx").read_text().splitlines()
    (folder / "matrix.mtx").write_text("\n".join(lines[:-2]) + "\n")
    with pytest.raises(DataError, match="its header says"):
        list(open_source(folder).blocks())


def test_a_compressed_matrix_that_was_cut_short_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(60, 40), compressed=True)
    whole = (folder / "matrix.mtx.gz").read_bytes()
    (folder / "matrix.mtx.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut short"):
        list(open_source(folder).blocks())


def test_a_matrix_market_index_out_of_range_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    lines = (folder / "matrix.mtx").read_text().splitlines()
    lines[5] = "9 1 3"
    (folder / "matrix.mtx").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="gene 9 of 4"):
        list(open_source(folder).blocks())


def test_lists_that_do_not_fit_the_matrix_are_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    (folder / "barcodes.tsv").write_text("a\nb\n")
    with pytest.raises(DataError, match="do not belong together"):
        list(open_source(folder).blocks())


def test_what_is_no_source_is_an_error_that_says_what_was_looked_for(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.h5ad").write_text("no cells")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["something"] = 1
    with pytest.raises(DataError, match="no such file"):
        open_source(tmp_path / "absent.h5ad")
    with pytest.raises(DataError, match=r"no matrix\.mtx"):
        open_source(tmp_path / "folder")
    with pytest.raises(DataError, match=r"not an \.h5ad file"):
        open_source(tmp_path / "text.h5ad")
    with pytest.raises(DataError, match="none of X, raw/X and layers"):
        open_source(tmp_path / "other.h5ad")


def test_a_damaged_index_in_an_h5ad_file_is_refused(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(6, 4))
    with h5py.File(path, "r+") as file:
        file["X/indices"][2] = 77
    with pytest.raises(DataError, match=r"gene index outside 0\.\.3"):
        list(open_source(path).blocks())


def test_a_plain_text_table_with_a_gzip_name_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4), compressed=True)
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"cell0\n")[:-4])
    with pytest.raises(DataError, match=r"barcodes\.tsv\.gz"):
        open_source(folder)
