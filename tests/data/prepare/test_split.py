import numpy as np
import pytest

from cctrain.data.prepare.quality import CellProfiles
from cctrain.data.prepare.split import (
    Labels,
    check_nested,
    copies_of_training_cells,
    destination_rows,
    hold_out_named,
    hold_out_values,
)
from cctrain.errors import DataError, UsageError


def labels(values: list[str], column: str = "donor") -> Labels:
    names, codes = np.unique(np.array(values), return_inverse=True)
    return Labels(column, names, codes)


def cells(content: list[int]) -> CellProfiles:
    num = len(content)
    return CellProfiles(
        source=np.zeros(num, np.int32),
        row=np.arange(num),
        content=np.array(content, dtype=np.uint64),
        num_genes=np.ones(num, np.int32),
        total=np.ones(num, np.int64),
        mitochondrial=np.zeros(num),
    )


def test_a_value_lies_wholly_on_one_side_and_about_a_share_of_the_values_is_held_out():
    donors = labels([f"d{i % 400}" for i in range(2000)])
    held, note = hold_out_values(donors, 0.25, seed=0)
    assert note is None
    per_donor = np.bincount(donors.codes, weights=held) / np.bincount(donors.codes)
    assert set(per_donor) == {0.0, 1.0}
    assert 0.18 < per_donor.mean() < 0.32


def test_new_values_move_no_value_across():
    few, many = labels([f"d{i}" for i in range(50)]), labels([f"d{i}" for i in range(90)])
    held = [
        dict(zip(part.names[part.codes], hold_out_values(part, 0.3, seed=0)[0], strict=True)) for part in (few, many)
    ]
    assert all(held[1][name] == side for name, side in held[0].items())


def test_a_side_without_a_value_gets_one():
    held, note = hold_out_values(labels(["a", "b", "c"]), 1e-9, seed=0)
    assert held.sum() == 1
    assert "3 distinct values of donor" in note


def test_exactly_the_named_values_are_held_out():
    assert hold_out_named(labels(["a", "b", "c", "b"]), ("b",)).tolist() == [False, True, False, True]


def test_a_value_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UsageError, match=r"--hold-out x.*'donor'.*a, b"):
        hold_out_named(labels(["a", "b"]), ("x",))


def test_holding_out_every_value_is_refused():
    with pytest.raises(UsageError, match="no cell is left"):
        hold_out_named(labels(["a", "b"]), ("a", "b"))


def test_a_group_of_two_donors_is_refused_by_name():
    groups = labels(["s1", "s1", "s2", "s2"], "sample")
    check_nested(groups, labels(["a", "a", "b", "b"]))
    with pytest.raises(DataError, match=r"1 groups of 'sample'.*'s2' with 'a' and 'b'"):
        check_nested(groups, labels(["a", "a", "a", "b"]))


def test_copies_are_the_held_out_cells_that_training_has():
    held = np.array([False, True, True, False])
    assert copies_of_training_cells(np.array([5, 5, 6, 7]), held).tolist() == [False, True, False, False]


def test_groups_are_contiguous_training_groups_first_and_shuffled_inside():
    names = [f"g{i % 20:02d}" for i in range(400)]
    groups = labels(names, "sample")
    held = groups.codes % 5 == 0
    rows = destination_rows(cells(list(range(400))), held, seed=0, groups=groups)
    assert sorted(rows) == list(range(400))
    order = np.argsort(rows)
    codes = groups.codes[order]
    assert (np.diff(codes) != 0).sum() == 19
    assert not held[order][: (~held).sum()].any()
    firsts = codes[np.concatenate([[True], np.diff(codes) != 0])]
    assert firsts.tolist() != sorted(firsts.tolist())
    inside = order[codes == codes[0]]
    assert inside.tolist() != sorted(inside.tolist())


def test_without_groups_the_order_does_not_know_the_column():
    held = np.arange(50) % 5 == 0
    profiles = cells(list(range(50)))
    rows = destination_rows(profiles, held, seed=1)
    assert (rows[held] >= 40).all()
    assert (rows[~held] < 40).all()
    assert not np.array_equal(rows, destination_rows(profiles, held, seed=2))
