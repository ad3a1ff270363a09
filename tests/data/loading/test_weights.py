from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cctrain.data.loading.contexts import ContextRule
from cctrain.data.loading.samples import Samples, samples_of
from cctrain.data.loading.weights import sample_weights
from cctrain.data.store.store import Groups
from cctrain.errors import DataError, UsageError

OBS = pd.DataFrame(
    {
        "cell_type": pd.Categorical(["rod", "rod", "rod", "cone", "rod", "cone", "rod", "amacrine"]),
        "weight": [1.0, 0.0, 2.5, 1.0, 1.0, 1.0, -1.0, np.nan],
        "is_doublet": [True, False, False, False, True, True, True, True],
        "zero": 0,
        "gap": ["a", None, "b", "b", "a", "a", "a", "a"],
        "donor": ["A", "A", "A", "A", "B", "B", "C", "C"],
        "half": ["A", "A", "A", "B", "B", "B", "C", "C"],
    },
    index=[f"cell{i}" for i in range(8)],
)
NUM_TRAIN = 6


def a_store(kind: str = "cell") -> tuple[SimpleNamespace, Samples]:
    """Six training cells, in groups of 4 and 2; two held out."""
    store = SimpleNamespace(
        path="store",
        num_cells=8,
        num_train=NUM_TRAIN,
        groups=Groups(np.array(["g0", "g1", "g2"]), np.array([0, 4, 6, 8]), 2),
        obs=lambda: OBS,
    )
    return store, samples_of(store, ContextRule(0, "training", np.zeros(1), np.ones(1), 9, kind=kind))


def weights_by(column: str, kind: str = "cell") -> list[float]:
    return sample_weights(*a_store(kind), column).tolist()


def test_numbers_are_weights_and_values_of_held_out_cells_do_not_matter():
    assert weights_by("weight") == [1.0, 0.0, 2.5, 1.0, 1.0, 1.0]


def test_each_name_comes_equally_often():
    weights = np.array(weights_by("cell_type"))
    names = OBS["cell_type"].iloc[:NUM_TRAIN].astype(str).to_numpy()
    assert {name: weights[names == name].sum() for name in ("rod", "cone")} == {"rod": 1.0, "cone": 1.0}


def test_true_and_false_are_names():
    assert weights_by("is_doublet") == pytest.approx([1 / 3] * 6)


def test_a_group_has_the_value_of_its_cells_and_counts_once():
    assert weights_by("donor", kind="group") == [1.0, 1.0]


def test_a_group_of_several_values_is_refused():
    with pytest.raises(DataError, match=r"'half' differs within the group of rows 0 to 3"):
        weights_by("half", kind="group")


@pytest.mark.parametrize(
    ("column", "message"), [("gap", "no value for 1 training cells, 'cell1'"), ("zero", "only zeros")]
)
def test_what_cannot_be_a_weight_is_refused(column, message):
    with pytest.raises(DataError, match=message):
        weights_by(column)


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UsageError, match=r"data\.weights=celltype: .* it has cell_type, weight"):
        weights_by("celltype")
