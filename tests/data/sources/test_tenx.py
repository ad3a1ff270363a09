import gzip

import numpy as np
import pytest

from cctrain.data.sources import tenx
from cctrain.data.sources.source import open_source
from tests.data.conftest import gene_ids, random_counts, read_all, refused, write_10x


def change_line(folder, number, line):
    lines = (folder / "matrix.mtx").read_text().splitlines()
    lines[number] = line
    (folder / "matrix.mtx").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_folder_is_read_whatever_the_order_of_its_lines(tmp_path, compressed):
    counts = random_counts(17, 10)
    shuffled = np.random.default_rng(1).permutation(np.count_nonzero(counts))
    folder = write_10x(tmp_path / "run", counts, order=shuffled, compressed=compressed)
    source = open_source(folder)
    assert source.counts_from == "matrix.mtx"
    assert source.cell_ids[3] == "cell3"
    assert source.gene_names[3] == "NAME3"
    assert np.array_equal(read_all(folder), counts)
    assert np.array_equal(np.concatenate([block.counts.toarray() for block in source.blocks()]), counts)


@pytest.mark.parametrize("compressed", [False, True])
def test_text_is_parsed_in_pieces_of_whole_lines(tmp_path, compressed, monkeypatch):
    monkeypatch.setattr(tenx, "_TEXT_PER_PIECE", 11)
    counts = random_counts(17, 10)
    assert np.array_equal(read_all(write_10x(tmp_path / "run", counts, compressed=compressed)), counts)


def test_the_matrix_of_files_with_a_prefix_names_the_others(tmp_path):
    counts = random_counts(6, 4)
    folder = write_10x(tmp_path / "run", counts, compressed=True)
    for file in list(folder.iterdir()):
        file.rename(folder / f"GSM1_{file.name}")
    source = open_source(folder / "GSM1_matrix.mtx.gz")
    assert source.gene_ids == gene_ids(4)
    assert np.array_equal(read_all(folder / "GSM1_matrix.mtx.gz"), counts)


def test_compression_is_seen_in_the_file_not_in_its_name(tmp_path):
    counts = random_counts(6, 4)
    folder = write_10x(tmp_path / "run", counts, compressed=True)
    (folder / "barcodes.tsv.gz").write_bytes(gzip.decompress((folder / "barcodes.tsv.gz").read_bytes()))
    (folder / "matrix.mtx.gz").rename(folder / "matrix.mtx")
    assert open_source(folder).cell_ids[5] == "cell5"
    assert np.array_equal(read_all(folder), counts)


def test_lines_that_end_as_windows_ends_them_are_read(tmp_path):
    counts = random_counts(6, 4)
    folder = write_10x(tmp_path / "run", counts)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert np.array_equal(read_all(folder), counts)
    assert open_source(folder).cell_ids[5] == "cell5"


def test_a_fraction_is_named_with_its_cell_and_gene(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(5, 4))
    change_line(folder, 3, "1 1 1.5")
    refused(folder, r"1\.5 for gene 'ENSG00000000000' in cell 'cell0' \(row 0\)")


def test_a_matrix_that_was_cut_short_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    lines = (folder / "matrix.mtx").read_text().splitlines()
    (folder / "matrix.mtx").write_text("\n".join(lines[:-2]) + "\n")
    refused(folder, "its header says")


def test_a_compressed_matrix_that_was_cut_short_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(60, 40), compressed=True)
    whole = (folder / "matrix.mtx.gz").read_bytes()
    (folder / "matrix.mtx.gz").write_bytes(whole[: len(whole) // 2])
    refused(folder, "cut short")


def test_an_index_out_of_range_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    change_line(folder, 5, "9 1 3")
    refused(folder, "gene 9 of 4")


@pytest.mark.parametrize(
    "line", ["1 1", "1 1 1 1", "1 one 1", "1 1 many", "1.5 1 1", "1 1 ", '1 "1 1', "99999999999999999999 1 1"]
)
def test_a_line_that_is_not_gene_cell_and_count_is_refused(tmp_path, line):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    change_line(folder, 5, line)
    refused(folder, r"matrix\.mtx")


@pytest.mark.parametrize("line", ["4 6", "4 6 -3", "4 6 many", "4 6 99999999999999999999", "4.0 6 3"])
def test_a_damaged_line_of_sizes_is_refused(tmp_path, line):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    change_line(folder, 2, line)
    refused(folder, r"matrix\.mtx")


@pytest.mark.parametrize("sizes", ["", "4 1000000000000 3", "1000000000000 6 3", "4 5 3", "6 4 3"])
def test_sizes_that_the_lists_do_not_have_are_refused(tmp_path, sizes):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    change_line(folder, 2, sizes)
    refused(folder, "do not belong together")


@pytest.mark.parametrize(
    "banner",
    ["", "%%MatrixMarket matrix array real general", "%%MatrixMarket matrix coordinate pattern general", "nonsense"],
)
def test_text_of_another_kind_is_refused(tmp_path, banner):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    change_line(folder, 0, banner)
    refused(folder, r"matrix\.mtx")


@pytest.mark.parametrize("content", [b"", b"\x00" * 200_000, b"\xff\xfe\x00\x01\n" * 50, b"x" * 200_000])
@pytest.mark.parametrize("name", ["matrix.mtx", "genes.tsv", "barcodes.tsv"])
def test_what_is_no_text_is_refused(tmp_path, name, content):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    (folder / name).write_bytes(content)
    refused(folder, name)


def test_lists_that_do_not_fit_the_matrix_are_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    (folder / "barcodes.tsv").write_text("a\nb\n")
    refused(folder, "has 6 cells, and this file lists 2: the files do not belong together")


def test_a_compressed_list_that_was_cut_short_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4), compressed=True)
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"cell0\n")[:-4])
    refused(folder, r"barcodes\.tsv\.gz")


def test_a_missing_barcode_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4))
    (folder / "barcodes.tsv").write_text("a\nb\n\nd\ne\nf\n")
    refused(folder, "lists 5")


def test_a_line_of_features_that_is_shorter_than_others_is_refused(tmp_path):
    folder = write_10x(tmp_path / "run", random_counts(6, 4), types=["Gene Expression"] * 4)
    lines = (folder / "features.tsv").read_text().splitlines()
    lines[2] = lines[2].rsplit("\t", 1)[0]
    (folder / "features.tsv").write_text("\n".join(lines))
    refused(folder, "line 3 has no feature_types")
