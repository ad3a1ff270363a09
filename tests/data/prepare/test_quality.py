import numpy as np
import pytest

from cctrain.data.prepare.quality import CellProfiles, QualityControl, format_table, select_cells, select_genes
from cctrain.errors import UsageError


def profiles() -> CellProfiles:
    return CellProfiles(
        source=np.zeros(5, np.int32),
        row=np.arange(5),
        content=np.arange(5, dtype=np.uint64),
        num_genes=np.array([10, 200, 300, 400, 5000]),
        total=np.array([20, 400, 100, 900, 60000]),
        mitochondrial=np.array([0.9, 0.01, 0.02, 0.5, 0.03]),
    )


def test_a_cell_counts_for_the_first_rule_that_it_breaks():
    quality = QualityControl(min_genes=200, max_genes=4000, min_counts=200, max_mitochondrial=0.2)
    kept, table = select_cells(profiles(), quality)
    assert kept.tolist() == [False, True, False, False, False]
    removed = {row["rule"]: row["removed"] for row in table}
    assert removed == {
        "min_genes": 1,
        "max_genes": 1,
        "min_counts": 1,
        "max_counts": 0,
        "max_mitochondrial": 1,
    }


def test_a_threshold_itself_passes():
    kept, _ = select_cells(profiles(), QualityControl(min_genes=10, max_genes=5000, max_mitochondrial=0.9))
    assert kept.all()


def test_rules_that_are_off_are_in_the_table():
    _, table = select_cells(profiles(), QualityControl())
    assert [row["value"] for row in table] == [200, "off", "off", "off", "off"]
    assert "max_mitochondrial" in format_table(table)


def test_a_gene_stays_when_enough_training_cells_express_it():
    kept, row = select_genes(np.array([0, 2, 3, 9]), QualityControl(min_cells=3))
    assert kept.tolist() == [False, False, True, True]
    assert (row["removed"], row["left"], row["of"]) == (2, 2, "genes")


@pytest.mark.parametrize("options", [{"min_genes": 0}, {"min_cells": 0}, {"max_mitochondrial": 5.0}])
def test_thresholds_without_meaning_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        QualityControl(**options)
