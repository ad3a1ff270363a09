"""Quality control: which cells and genes are left out, by which rule, and how many each rule cost.

Every rule is a row of the table, also one that is off, so that a store says what was done to its cells and
what was not. Cell rules apply one after the other, in the order of the table: a cell counts for the first
rule that it breaks. The gene rule comes last and looks at training cells alone. Nothing here detects doublets
or ambient RNA.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cctrain.errors import UsageError


@dataclass
class QualityControl:
    """Thresholds; None switches a rule off."""

    min_genes: int = 200  # fewest genes detected in a cell
    min_cells: int = 3  # fewest training cells that express a gene
    max_genes: int | None = None  # most genes detected in a cell
    min_counts: int | None = None  # smallest sum of counts of a cell
    max_counts: int | None = None  # largest sum of counts of a cell
    max_mitochondrial: float | None = None  # largest share of counts in genes named MT-...

    def __post_init__(self) -> None:
        for name in ("min_genes", "min_cells", "max_genes", "min_counts", "max_counts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: it must be 1 or more (a cell without counts is no cell).")
        share = self.max_mitochondrial
        if share is not None and not 0 <= share <= 1:
            raise UsageError(f"max_mitochondrial is {share}: a share of counts lies between 0 and 1.")


@dataclass
class CellProfiles:
    """What the rules, the split and the order look at: one entry a cell, sources one after the other."""

    source: np.ndarray  # int32 number of the source
    row: np.ndarray  # int64 row in the source
    content: np.ndarray  # uint64 hash of the (gene id, count) pairs
    num_genes: np.ndarray  # int32 genes detected
    total: np.ndarray  # int64 sum of counts
    mitochondrial: np.ndarray  # float64 share of counts in genes named MT-...

    def __len__(self) -> int:
        return len(self.source)

    def at(self, cells: np.ndarray) -> "CellProfiles":
        """Of the cells under a mask, or at indices."""
        return CellProfiles(**{name: values[cells] for name, values in vars(self).items()})


Row = dict[str, str | int | float]


def select_cells(cells: CellProfiles, quality: QualityControl) -> tuple[np.ndarray, list[Row]]:
    """Mask of the cells that pass (num_cells,), and the rows of the table."""
    rules: list[tuple[str, float | None, Callable[[float], np.ndarray]]] = [
        ("min_genes", quality.min_genes, lambda limit: cells.num_genes < limit),
        ("max_genes", quality.max_genes, lambda limit: cells.num_genes > limit),
        ("min_counts", quality.min_counts, lambda limit: cells.total < limit),
        ("max_counts", quality.max_counts, lambda limit: cells.total > limit),
        ("max_mitochondrial", quality.max_mitochondrial, lambda limit: cells.mitochondrial > limit),
    ]
    kept = np.ones(len(cells), dtype=bool)
    table: list[Row] = []
    for rule, limit, breaks in rules:
        removed = kept & breaks(limit) if limit is not None else np.zeros(len(cells), dtype=bool)
        kept &= ~removed
        table.append(_row(rule, limit, "cells", int(removed.sum()), int(kept.sum())))
    return kept, table


def select_genes(num_training_cells: np.ndarray, quality: QualityControl) -> tuple[np.ndarray, Row]:
    """Mask of the genes that enough training cells express (num_genes,), and the row of the table."""
    kept = num_training_cells >= quality.min_cells
    return kept, _row("min_cells", quality.min_cells, "genes", int((~kept).sum()), int(kept.sum()))


def copies_row(removed: int, left: int) -> Row:
    """The row for held-out cells that were left out because a training cell is identical."""
    return _row("no_copies", "on", "cells", removed, left)


def given_genes_row(removed: int, left: int) -> Row:
    """The row for a vocabulary that was given: it takes the place of `min_cells`."""
    return _row("vocabulary", "given", "genes", removed, left)


def format_table(table: list[Row]) -> str:
    lines = [f"{'rule':<20}{'value':>10}{'removed':>14}{'left':>14}"]
    for row in table:
        removed, left = f"{row['removed']:,}", f"{row['left']:,} {row['of']}"
        lines.append(f"{row['rule']:<20}{row['value']!s:>10}{removed:>14}{left:>14}")
    return "\n".join(lines)


def _row(rule: str, value: float | str | None, unit: str, removed: int, left: int) -> Row:
    return {
        "rule": rule,
        "value": "off" if value is None else value,
        "of": unit,
        "removed": removed,
        "left": left,
    }
