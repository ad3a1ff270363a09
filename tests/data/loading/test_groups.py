"""Stores whose unit is the group, and splits by a column, through `prepare`."""

import numpy as np
import pandas as pd
import pytest

from cctrain.data.store.store import TokenStore, verify_store
from cctrain.errors import DataError, UsageError
from tests.data.conftest import prepared, random_counts, write_h5ad
from tests.data.prepare.test_prepare import dense


def atlas(tmp_path, **columns):
    """120 cells of 12 samples of 4 donors; gene 0 counts the cells."""
    obs = {"sample": [f"s{i % 12:02d}" for i in range(120)], "donor": [f"d{i % 4}" for i in range(120)], **columns}
    return write_h5ad(tmp_path / "a.h5ad", random_counts(120, 8), obs=obs)


def column(store: TokenStore, name: str) -> np.ndarray:
    return store.obs()[name].astype(str).to_numpy()


def test_the_cells_of_a_group_follow_each_other_in_random_order(tmp_path):
    store = prepared(tmp_path / "store", atlas(tmp_path), group_by="sample", held_out=0.3)
    assert store.unit == "group"
    groups, names = store.groups, column(store, "sample")
    assert sorted(groups.names.tolist()) == [f"s{i:02d}" for i in range(12)] != groups.names.tolist()
    for name, start, stop in zip(groups.names, groups.starts[:-1], groups.starts[1:], strict=True):
        assert set(names[start:stop]) == {name}
        assert stop - start == 10
    inside = dense(store)[: groups.starts[1], 0]
    assert inside.tolist() != sorted(inside.tolist())
    assert verify_store(store.path) == []


def test_training_groups_come_first_and_no_group_is_on_both_sides(tmp_path):
    store = prepared(tmp_path / "store", atlas(tmp_path), group_by="sample", held_out=0.3)
    names = column(store, "sample")
    assert 0 < store.groups.num_train < 12
    assert store.groups.starts[store.groups.num_train] == store.num_train
    assert not set(names[: store.num_train]) & set(names[store.num_train :])
    assert store.manifest["group_by"] == "sample"


def test_groups_are_part_of_what_the_digest_says(tmp_path):
    counts = random_counts(2, 8)
    one = write_h5ad(tmp_path / "a.h5ad", counts, obs={"sample": ["x", "y"]})
    two = write_h5ad(tmp_path / "b.h5ad", counts, obs={"sample": ["x", "x"]})
    plain = prepared(tmp_path / "plain", one)
    stores = [prepared(tmp_path / f"{path.stem}-store", path, group_by="sample") for path in (one, two)]
    assert len({store.digest for store in (plain, *stores)}) == 3


def test_a_number_is_the_same_value_where_a_missing_one_has_made_it_a_float(tmp_path):
    one = write_h5ad(tmp_path / "a.h5ad", random_counts(8, 8), obs={"donor": [1, 2, 3, 4] * 2})
    gap = random_counts(9, 8, seed=1)
    gap[8] = 0  # does not pass quality control
    two = write_h5ad(tmp_path / "b.h5ad", gap, obs={"donor": [1.0, 2.0, 3.0, 4.0] * 2 + [np.nan]})
    store = prepared(tmp_path / "store", one, two, group_by="donor", held_out=0.4)
    assert sorted(store.groups.names.tolist()) == ["1", "2", "3", "4"]


def test_the_same_text_in_two_sources_is_the_same_group(tmp_path):
    one = write_h5ad(tmp_path / "a.h5ad", random_counts(10, 8), obs={"batch": pd.Categorical([1, 2] * 5)})
    two = write_h5ad(tmp_path / "b.h5ad", random_counts(10, 8, seed=1), obs={"batch": ["1", "3"] * 5})
    store = prepared(tmp_path / "store", one, two, group_by="batch")
    assert sorted(store.groups.names.tolist()) == ["1", "2", "3"]


def test_a_missing_group_is_an_error_that_names_the_cell(tmp_path):
    sample = [None if i in (3, 7) else "x" for i in range(20)]
    source = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8), obs={"sample": sample})
    with pytest.raises(DataError, match=r"2 cells .* no 'sample', the first is 'cell3' \(row 3\)"):
        prepared(tmp_path / "store", source, group_by="sample")
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_a_column_that_a_source_lacks_is_an_error_with_those_it_has(tmp_path):
    with pytest.raises(DataError, match=r"no column 'tissue'.*--split-by.*sample, donor"):
        prepared(tmp_path / "store", atlas(tmp_path), split_by="tissue")


def test_whole_donors_are_held_out(tmp_path):
    store = prepared(tmp_path / "store", atlas(tmp_path), split_by="donor", held_out=0.4)
    donors = column(store, "donor")
    sides = set(donors[: store.num_train]), set(donors[store.num_train :])
    assert not sides[0] & sides[1]
    assert all(sides)
    assert store.unit == "cell"
    assert store.groups is None
    assert store.manifest["split_by"] == "donor"


def test_exactly_the_named_donors_are_held_out(tmp_path):
    store = prepared(tmp_path / "store", atlas(tmp_path), split_by="donor", hold_out=["d1", "d2"], group_by="sample")
    assert set(column(store, "donor")[store.num_train :]) == {"d1", "d2"}
    assert store.num_train == 60
    assert store.groups.num_train == 6
    assert store.manifest["hold_out"] == ["d1", "d2"]


def test_a_donor_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--hold-out d9"):
        prepared(tmp_path / "store", atlas(tmp_path), split_by="donor", hold_out=["d9"])


def test_a_group_of_several_donors_cannot_be_split_by_donor(tmp_path):
    source = atlas(tmp_path, tissue=["t0"] * 119 + ["t1"])
    with pytest.raises(DataError, match="'t0' with 'd0' and 'd3'"):
        prepared(tmp_path / "store", source, group_by="tissue", split_by="donor")


def test_a_held_out_copy_of_a_training_cell_is_left_out_and_counted(tmp_path):
    counts = random_counts(40, 8)
    counts[20:30] = counts[:10]
    obs = {"donor": ["a"] * 20 + ["b"] * 20}
    source = write_h5ad(tmp_path / "a.h5ad", counts, obs=obs)
    store = prepared(tmp_path / "store", source, split_by="donor", hold_out=["b"])
    table = {row["rule"]: row for row in store.manifest["quality"]}
    assert (table["no_copies"]["removed"], table["no_copies"]["left"]) == (10, 30)
    matrix = dense(store)
    assert (store.num_cells, store.num_train) == (30, 20)
    assert not set(map(tuple, matrix[:20].tolist())) & set(map(tuple, matrix[20:].tolist()))


def test_held_out_cells_that_are_all_copies_are_an_error(tmp_path):
    counts = np.tile(random_counts(10, 8), (2, 1))
    source = write_h5ad(tmp_path / "a.h5ad", counts, obs={"donor": ["a"] * 10 + ["b"] * 10})
    with pytest.raises(DataError, match="identical to a training cell"):
        prepared(tmp_path / "store", source, split_by="donor", hold_out=["b"])


def test_copies_of_a_cell_in_a_group_stay_together(tmp_path):
    counts = np.repeat(random_counts(10, 8), 3, axis=0)
    source = write_h5ad(tmp_path / "a.h5ad", counts, obs={"sample": np.repeat([f"s{i}" for i in range(10)], 3)})
    store = prepared(tmp_path / "store", source, group_by="sample", held_out=0.4)
    assert store.num_cells == 30
