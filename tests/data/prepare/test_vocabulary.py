import numpy as np
import pytest

from cctrain.data.prepare.vocabulary import read_vocabulary
from cctrain.errors import DataError
from tests.data.conftest import gene_ids, prepared, random_counts, write_h5ad
from tests.data.prepare.test_prepare import dense


def vocabulary(tmp_path, lines: list[str]):
    path = tmp_path / "genes.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_ids_are_sorted_single_and_without_versions(tmp_path):
    one, two = gene_ids(2)
    assert read_vocabulary(vocabulary(tmp_path, [two + ".3", "", one, two])).tolist() == [one, two]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"ENSG1\tTP53\n", b"a,b\n", b"\xff\xfe\x00", b"\x89HDF\r\n\x1a\0\n"])
def test_what_is_no_list_of_ids_is_refused(tmp_path, content):
    (tmp_path / "genes.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"genes\.txt"):
        read_vocabulary(tmp_path / "genes.txt")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_vocabulary(tmp_path / "genes.txt")


def test_the_store_has_exactly_the_given_genes(tmp_path):
    counts = random_counts(40, 8)
    source = write_h5ad(tmp_path / "a.h5ad", counts)
    given = [*gene_ids(3, first=2), *gene_ids(2, first=100)]
    store = prepared(tmp_path / "store", source, vocabulary=vocabulary(tmp_path, given), min_matched=0.1)
    assert store.genes.ids.tolist() == given
    assert sorted(map(tuple, dense(store)[:, :3].tolist())) == sorted(map(tuple, counts[:, 2:5].tolist()))
    assert store.measured.tolist() == [[True] * 3 + [False] * 2]
    assert store.manifest["vocabulary"] == "given"
    assert store.manifest["quality"][-1] == {
        "rule": "vocabulary", "value": "given", "of": "genes", "removed": 5, "left": 5,
    }  # fmt: skip


def test_a_gene_that_no_training_cell_expresses_has_a_share_and_is_never_a_target(tmp_path):
    counts = random_counts(40, 8)
    counts[:, 7] = 0
    given = [*gene_ids(8), "UNKNOWN"]
    source = write_h5ad(tmp_path / "a.h5ad", counts)
    genes = prepared(tmp_path / "store", source, vocabulary=vocabulary(tmp_path, given)).genes
    assert np.isfinite(np.log(genes.share)).all()
    assert genes.share[7] == genes.share[8] < genes.share[:7].min()
    assert genes.detection_rate[7:].tolist() == [0, 0]
    assert np.isfinite(genes.theta).all()
    assert np.isfinite(genes.loadings).all()


def test_a_cell_without_a_gene_of_the_vocabulary_has_no_token(tmp_path):
    counts = random_counts(40, 8)
    counts[3, :4] = 0
    source = write_h5ad(tmp_path / "a.h5ad", counts)
    store = prepared(tmp_path / "store", source, vocabulary=vocabulary(tmp_path, gene_ids(4)), min_matched=0.01)
    assert store.num_cells == 40
    assert store.manifest["num_cells_without_tokens"] == (store.num_tokens == 0).sum() == 1


def test_another_store_gives_its_genes(tmp_path):
    one = prepared(tmp_path / "one", write_h5ad(tmp_path / "a.h5ad", random_counts(40, 8)))
    other = write_h5ad(tmp_path / "b.h5ad", random_counts(40, 8, seed=3), genes=gene_ids(8, first=4))
    store = prepared(tmp_path / "two", other, vocabulary=one.path)
    assert store.genes.ids.tolist() == one.genes.ids.tolist()
    assert store.manifest["vocabulary_digest"] == one.manifest["vocabulary_digest"]


def test_names_against_ids_are_refused_with_one_of_each(tmp_path):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(40, 8), genes=[f"GENE{i}" for i in range(8)])
    with pytest.raises(DataError, match=r"0 of the 8 genes .*0\.0%.*--min-matched.*'GENE0'.*'ENSG00000000000'"):
        prepared(tmp_path / "store", source, vocabulary=vocabulary(tmp_path, gene_ids(8)))


def test_too_few_matched_counts_are_refused_with_both_shares(tmp_path):
    counts = np.ones((40, 10), dtype=int)
    counts[:, 9] = 1000 + np.arange(40)
    source = write_h5ad(tmp_path / "a.h5ad", counts)
    with pytest.raises(DataError, match=r"9 of the 9 genes .*100\.0%\), on which 0\.9% of its counts fall"):
        prepared(tmp_path / "store", source, vocabulary=vocabulary(tmp_path, gene_ids(9)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "genes.txt"]


def test_with_keep_going_a_source_under_the_floor_is_left_out(tmp_path):
    good = write_h5ad(tmp_path / "a.h5ad", random_counts(40, 8))
    bad = write_h5ad(tmp_path / "b.h5ad", random_counts(40, 8), genes=[f"GENE{i}" for i in range(8)])
    store = prepared(tmp_path / "store", bad, good, vocabulary=vocabulary(tmp_path, gene_ids(8)), keep_going=True)
    assert [source["name"] for source in store.manifest["sources"]] == ["a.h5ad"]
    assert [entry["name"] for entry in store.manifest["failed"]] == ["b.h5ad"]
