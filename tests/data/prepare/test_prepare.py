from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cctrain.data.prepare import assemble, scan
from cctrain.data.prepare.prepare import prepare
from cctrain.data.prepare.quality import QualityControl
from cctrain.data.sources import raw_blocks
from cctrain.data.sources.source import CellBlock, Source
from cctrain.data.store.layout import Layout
from cctrain.data.store.store import TokenStore, verify_store
from cctrain.errors import DataError, UsageError
from tests.data.conftest import ANY_CELL, gene_ids, prepared, random_counts, write_10x, write_h5ad


def dense(store: TokenStore) -> np.ndarray:
    cells = store.cells(np.arange(store.num_cells))
    matrix = np.zeros((store.num_cells, len(store.genes.ids)), dtype=np.int64)
    matrix[np.repeat(np.arange(store.num_cells), np.diff(cells.offsets)), cells.genes] = cells.counts
    return matrix


def sorted_rows(matrix: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(map(tuple, matrix.tolist()))


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, pieces, chunks and shards of a few cells, in this process."""
    monkeypatch.setattr(raw_blocks, "COUNTS_PER_BLOCK", 100)
    monkeypatch.setattr(raw_blocks, "CELLS_PER_BLOCK", 7)
    monkeypatch.setattr(scan, "TOKENS_PER_PIECE", 90)
    monkeypatch.setattr(assemble, "TOKENS_PER_PIECE", 90)
    monkeypatch.setattr(assemble, "Layout", partial(Layout, tokens_per_chunk=32, tokens_per_shard=128))


def same_files(one: Path, other: Path) -> bool:
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_every_form_of_the_same_cells_gives_the_same_digest(tmp_path):
    counts = random_counts(40, 12)
    forms = {
        "csr": write_h5ad(tmp_path / "csr.h5ad", counts),
        "csc": write_h5ad(tmp_path / "csc.h5ad", counts, form=sp.csc_matrix),
        "dense": write_h5ad(tmp_path / "dense.h5ad", counts, form=np.asarray),
        "layer": write_h5ad(tmp_path / "layer.h5ad", np.log1p(counts), layers={"umi": counts}),
        "mtx": write_10x(tmp_path / "mtx", counts),
    }
    stores = [prepared(tmp_path / f"store-{name}", path) for name, path in forms.items()]
    assert len({store.digest for store in stores}) == 1
    assert sorted_rows(dense(stores[0])) == sorted_rows(counts)


def test_many_blocks_buckets_chunks_and_shards_give_the_same_store(tmp_path, monkeypatch):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(70, 20), form=sp.csc_matrix)
    whole = prepared(tmp_path / "whole", source)
    small_parts(monkeypatch)
    pieces = prepared(tmp_path / "pieces", source)
    assert pieces.manifest["num_shards"] > 3
    assert pieces.digest == whole.digest
    assert np.array_equal(dense(pieces), dense(whole))
    assert np.allclose(pieces.genes.theta, whole.genes.theta)
    assert verify_store(pieces.path) == []


def test_preparing_twice_gives_the_same_bytes(tmp_path):
    obs = {"type": pd.Categorical(["a", "b"] * 20)}
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(40, 12), obs=obs)
    first, second = prepared(tmp_path / "one", source), prepared(tmp_path / "two", source)
    assert same_files(first.path, second.path)
    assert str(tmp_path) not in (first.path / "manifest.json").read_text()


def test_the_order_of_the_input_changes_nothing(tmp_path):
    counts = random_counts(40, 12)
    order = np.random.default_rng(3).permutation(40)
    genes = np.random.default_rng(4).permutation(12)
    ids = gene_ids(12)
    one = prepared(tmp_path / "one", write_h5ad(tmp_path / "a.h5ad", counts))
    other = write_h5ad(tmp_path / "b.h5ad", counts[order][:, genes], genes=[ids[i] for i in genes])
    assert prepared(tmp_path / "two", other).digest == one.digest


def test_the_seed_changes_the_order_and_the_split(tmp_path):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(60, 12))
    stores = [prepared(tmp_path / f"{seed}", source, seed=seed, held_out=0.4) for seed in (0, 1)]
    assert not np.array_equal(dense(stores[0]), dense(stores[1]))
    held = [sorted_rows(dense(store)[store.num_train :]) for store in stores]
    assert held[0] != held[1]


def test_the_split_takes_about_its_share_and_shuffles_both_sides(tmp_path):
    counts = random_counts(600, 5)  # the count of gene 0 is the cell's number
    store = prepared(tmp_path / "store", write_h5ad(tmp_path / "a.h5ad", counts), held_out=0.25)
    number = dense(store)[:, 0]
    assert 0.7 < store.num_train / 600 < 0.8
    for side in (number[: store.num_train], number[store.num_train :]):
        assert abs(np.corrcoef(side, np.arange(len(side)))[0, 1]) < 0.25


def test_cells_of_identical_content_lie_on_one_side(tmp_path):
    counts = np.repeat(random_counts(30, 12), 4, axis=0)
    other = write_h5ad(tmp_path / "b.h5ad", counts[::2], cells=[f"again{i}" for i in range(60)])
    store = prepared(tmp_path / "store", write_h5ad(tmp_path / "a.h5ad", counts), other, held_out=0.5)
    matrix = dense(store)
    sides = [set(map(tuple, side.tolist())) for side in (matrix[: store.num_train], matrix[store.num_train :])]
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 5


def test_adding_cells_moves_no_cell_to_the_other_side(tmp_path):
    counts = random_counts(80, 12)
    few = prepared(tmp_path / "few", write_h5ad(tmp_path / "a.h5ad", counts[:40]), held_out=0.3)
    many = prepared(tmp_path / "many", write_h5ad(tmp_path / "b.h5ad", counts), held_out=0.3)
    held = set(map(tuple, dense(many)[many.num_train :].tolist()))
    assert all(tuple(cell) in held for cell in dense(few)[few.num_train :].tolist())


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_no_side_is_empty_when_two_cells_differ(tmp_path, held_out):
    messages: list[str] = []
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(8, 6))
    manifest = prepare([source], tmp_path / "store", quality=ANY_CELL, held_out=held_out, report=messages.append)
    assert manifest["num_train"] == (7 if held_out < 0.5 else 1)
    assert any("distinct cells fell under held_out" in message for message in messages)


def test_statistics_are_those_of_the_training_cells(tmp_path):
    store = prepared(tmp_path / "store", write_h5ad(tmp_path / "a.h5ad", random_counts(100, 10)), held_out=0.3)
    train = dense(store)[: store.num_train]
    assert np.allclose(store.genes.share, train.sum(axis=0) / train.sum())
    assert np.allclose(store.genes.detection_rate, (train > 0).mean(axis=0))


def test_a_gene_that_held_out_cells_alone_express_is_not_in_the_vocabulary(tmp_path):
    counts = np.column_stack([np.arange(1, 41), np.eye(40, dtype=int)])  # every cell has a gene of its own
    store = prepared(tmp_path / "store", write_h5ad(tmp_path / "a.h5ad", counts), held_out=0.3)
    number = dense(store)[:, 0]
    ids = gene_ids(41)
    assert store.num_train < 40
    assert store.genes.ids.tolist() == [ids[0]] + [ids[n] for n in sorted(number[: store.num_train])]
    assert store.num_tokens.tolist() == [2] * store.num_train + [1] * (40 - store.num_train)


def test_sources_that_measure_different_genes_have_their_bitmap(tmp_path):
    one = write_h5ad(tmp_path / "a.h5ad", random_counts(30, 8), genes=gene_ids(8))
    two = write_h5ad(tmp_path / "b.h5ad", random_counts(30, 8, seed=9), genes=gene_ids(8, first=4))
    store = prepared(tmp_path / "store", one, two)
    assert store.genes.ids.tolist() == gene_ids(12)
    assert store.measured.tolist() == [[True] * 8 + [False] * 4, [False] * 4 + [True] * 8]
    matrix = dense(store)
    assert np.bincount(store.source_of_cell).tolist() == [30, 30]
    assert matrix[~store.measured[store.source_of_cell]].sum() == 0
    assert store.genes.share.sum() == pytest.approx(1)
    train = slice(0, store.num_train)
    seen = store.measured[store.source_of_cell[train]]
    assert np.allclose(store.genes.detection_rate, (matrix[train] > 0).sum(axis=0) / seen.sum(axis=0))


def test_sources_without_a_common_gene_are_refused(tmp_path):
    one = write_h5ad(tmp_path / "a.h5ad", random_counts(5, 4))
    two = write_h5ad(tmp_path / "b.h5ad", random_counts(5, 4), genes=["A", "B", "C", "D"])
    with pytest.raises(DataError, match="Genes are matched by id"):
        prepared(tmp_path / "store", one, two)


def test_metadata_follow_their_cells(tmp_path):
    counts = random_counts(30, 6)
    obs = {"number": np.arange(30), "source": ["lab"] * 30, "a/b": ["x"] * 30}
    one = write_h5ad(tmp_path / "a.h5ad", counts, obs=obs)
    two = write_h5ad(tmp_path / "b.h5ad", random_counts(5, 6, seed=8), obs={"number": list("abcde")})
    store = prepared(tmp_path / "store", one, two)
    table, matrix = store.obs(), dense(store)
    assert table.index.is_unique
    first = store.source_of_cell == 0
    assert (table["number"][first].astype(str).astype(int) == matrix[first, 0] - 1).all()
    assert table.index[first].tolist() == [f"0:cell{n - 1}" for n in matrix[first, 0]]
    assert set(table["number"][~first]) == set("abcde")
    assert set(table["input_source"][first]) == {"lab"}
    assert table["input_source"][~first].isna().all()
    assert set(table["a_b"][first]) == {"x"}


def test_counts_beyond_sixteen_bits_are_clipped_and_counted(tmp_path):
    counts = random_counts(10, 4)
    counts[3, 2] = 70_000
    store = prepared(tmp_path / "store", write_h5ad(tmp_path / "a.h5ad", counts))
    assert dense(store).max() == 65_535
    assert store.manifest["num_clipped_counts"] == 1
    assert store.manifest["dtypes"] == {"genes": "uint8", "counts": "uint16"}


def test_every_rule_is_in_the_table_and_removes_what_it_says(tmp_path):
    counts = random_counts(40, 12)
    counts[:5, 1:] = 0
    names = ["MT-CO1"] + [f"NAME{i}" for i in range(1, 12)]
    source = write_h5ad(tmp_path / "a.h5ad", counts, names=names)
    quality = QualityControl(min_genes=2, min_cells=1, max_mitochondrial=0.6)
    store = prepared(tmp_path / "store", source, quality=quality)
    table = {row["rule"]: row for row in store.manifest["quality"]}
    high = (counts[5:, 0] / counts[5:].sum(axis=1) > 0.6).sum()
    assert table["min_genes"]["removed"] == 5
    assert table["max_mitochondrial"]["removed"] == high > 0
    assert table["max_counts"]["value"] == "off"
    assert store.num_cells == 35 - high


def test_a_mitochondrial_rule_that_sees_no_gene_is_refused(tmp_path):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(10, 4))
    with pytest.raises(DataError, match="MT-"):
        prepared(tmp_path / "store", source, quality=QualityControl(min_genes=1, max_mitochondrial=0.1))


def test_no_cell_left_is_an_error_with_the_table(tmp_path):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(10, 4))
    with pytest.raises(DataError, match=r"min_genes +200 +10"):
        prepared(tmp_path / "store", source, quality=QualityControl())
    assert list(tmp_path.iterdir()) == [source]


def test_duplicate_genes_are_reported(tmp_path):
    genes = [*gene_ids(3), gene_ids(3)[0] + ".2"]
    store = prepared(tmp_path / "store", write_h5ad(tmp_path / "a.h5ad", random_counts(10, 4), genes=genes))
    described = store.manifest["sources"][0]
    assert described["num_duplicate_genes"] == 1
    assert any("added" in note for note in described["notes"])
    assert described["counts_from"] == "X"
    assert described["name"] == "a.h5ad"


def test_a_dry_run_writes_nothing_and_tells_what_would_come(tmp_path):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(40, 12))
    plan = prepare([source], tmp_path / "store", quality=ANY_CELL, dry_run=True, report=lambda message: None)
    assert list(tmp_path.iterdir()) == [source]
    manifest = prepared(tmp_path / "store", source).manifest
    for key in ("num_cells", "num_train", "num_genes", "num_tokens", "quality"):
        assert plan[key] == manifest[key]


@pytest.mark.parametrize(
    "options", [{"held_out": 1e-9}, {"split_by": "donor", "hold_out": ["a"]}, {"group_by": "donor"}]
)
def test_a_dry_run_tells_it_for_every_kind_of_split(tmp_path, options):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(40, 12), obs={"donor": list("abcd") * 10})
    plan = prepare([source], tmp_path / "store", quality=ANY_CELL, dry_run=True, report=lambda message: None, **options)
    manifest = prepared(tmp_path / "store", source, **options).manifest
    for key in ("num_cells", "num_train", "num_genes", "num_tokens", "quality", "unit", "num_groups", "notes"):
        assert plan[key] == manifest[key]


def test_a_dry_run_reads_a_source_once(tmp_path, monkeypatch):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(40, 12))
    read, blocks = [], Source.blocks

    def counted(self: Source, *arguments: int) -> Iterator[CellBlock]:
        read.append(self.path)
        return blocks(self, *arguments)

    monkeypatch.setattr(Source, "blocks", counted)
    prepare([source], tmp_path / "store", quality=ANY_CELL, dry_run=True, report=lambda message: None)
    assert read == [source]


def test_an_existing_store_is_replaced_only_when_asked_and_nothing_else_ever(tmp_path):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 6))
    first = prepared(tmp_path / "store", source)
    with pytest.raises(DataError, match="--overwrite"):
        prepared(tmp_path / "store", source)
    second = prepared(tmp_path / "store", source, seed=5, overwrite=True)
    assert second.digest != first.digest
    (tmp_path / "thesis").mkdir()
    with pytest.raises(DataError, match="not a token store"):
        prepared(tmp_path / "thesis", source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "store", "thesis"]


def test_a_failure_leaves_neither_a_store_nor_a_part_of_one(tmp_path):
    counts = random_counts(20, 6).astype(float)
    counts[19, 3] = 0.5
    source = write_h5ad(tmp_path / "a.h5ad", counts)
    with pytest.raises(DataError, match="cell19"):
        prepared(tmp_path / "store", source, counts="X")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1])
def test_a_split_without_two_sides_is_refused(tmp_path, held_out):
    with pytest.raises(UsageError, match="held_out"):
        prepare([Path("a.h5ad")], tmp_path / "store", quality=ANY_CELL, held_out=held_out)


def test_a_source_given_twice_is_refused(tmp_path):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(5, 4))
    with pytest.raises(UsageError, match="twice"):
        prepared(tmp_path / "store", source, source)


def test_the_manifest_says_how_much_of_a_source_the_vocabulary_holds(tmp_path):
    counts = random_counts(40, 6)
    counts[:, 5] = 0
    counts[0, 5] = 7
    store = prepared(
        tmp_path / "store", write_h5ad(tmp_path / "a.h5ad", counts), quality=QualityControl(1, min_cells=2)
    )
    described = store.manifest["sources"][0]
    assert (described["num_genes"], described["num_genes_in_vocabulary"]) == (6, 5)
    assert described["share_of_counts_in_vocabulary"] == pytest.approx(1 - 7 / counts.sum(), abs=1e-6)


def test_two_workers_write_the_bytes_of_one(tmp_path):
    sources = [
        write_h5ad(tmp_path / "a.h5ad", random_counts(40, 12), obs={"type": ["a", "b"] * 20}),
        write_h5ad(tmp_path / "b.h5ad", random_counts(30, 12, seed=1), form=sp.csc_matrix, genes=gene_ids(12, first=4)),
        write_10x(tmp_path / "c", random_counts(20, 12, seed=2)),
    ]
    stores = [prepared(tmp_path / f"store{n}", *sources, workers=n) for n in (1, 2)]
    assert same_files(stores[0].path, stores[1].path)
    assert verify_store(stores[0].path) == []


def test_the_tar_form_holds_the_same_cells(tmp_path):
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(70, 20))
    stores = [prepared(tmp_path / form, source, container=form) for form in ("zarr", "webdataset")]
    assert stores[0].digest == stores[1].digest
    assert np.array_equal(dense(stores[0]), dense(stores[1]))


def test_a_source_that_fails_is_listed_and_the_others_are_as_without_it(tmp_path):
    bad = random_counts(20, 6).astype(float)
    bad[19, 3] = 0.5
    sources = [
        write_h5ad(tmp_path / "a.h5ad", random_counts(20, 6)),
        write_h5ad(tmp_path / "bad.h5ad", bad),
        tmp_path / "missing.h5ad",
        write_h5ad(tmp_path / "c.h5ad", random_counts(20, 6, seed=5)),
    ]
    store = prepared(tmp_path / "store", *sources, keep_going=True)
    failed = store.manifest["failed"]
    assert [entry["name"] for entry in failed] == ["bad.h5ad", "missing.h5ad"]
    assert "no raw counts" in failed[0]["error"]
    assert str(tmp_path) not in str(failed)
    good = prepared(tmp_path / "good", sources[0], sources[3])
    assert good.digest == store.digest
    assert good.manifest["sources"] == store.manifest["sources"]


def test_a_source_that_fails_half_way_is_left_out_whole(tmp_path, monkeypatch):
    small_parts(monkeypatch)
    bad = random_counts(60, 6).astype(float)
    bad[59, 3] = 0.5
    sources = [write_h5ad(tmp_path / "bad.h5ad", bad), write_h5ad(tmp_path / "a.h5ad", random_counts(20, 6))]
    store = prepared(tmp_path / "store", *sources, counts="X", keep_going=True)
    assert "cell59" in store.manifest["failed"][0]["error"]
    assert store.digest == prepared(tmp_path / "good", sources[1]).digest


def test_no_source_left_is_an_error_even_with_keep_going(tmp_path):
    with pytest.raises(DataError, match=r"(?s)No source can be read.*a\.h5ad.*b\.h5ad"):
        prepared(tmp_path / "store", tmp_path / "a.h5ad", tmp_path / "b.h5ad", keep_going=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"container": "tar"}, {"min_matched": 0}, {"workers": 0}, {"hold_out": ["x"]}])
def test_options_without_meaning_are_refused(tmp_path, options):
    with pytest.raises(UsageError, match=next(iter(options)).replace("container", "format").replace("_", ".")):
        prepare([Path("a.h5ad")], tmp_path / "store", quality=ANY_CELL, **options)
