"""Which cells a store gets, on which side of the split, and where: quality control, split and order together."""

from dataclasses import dataclass

import numpy as np

from cctrain.data.prepare.metadata import label_cells
from cctrain.data.prepare.quality import CellProfiles, QualityControl, Row, copies_row, format_table, select_cells
from cctrain.data.prepare.split import (
    Labels,
    check_nested,
    copies_of_training_cells,
    destination_rows,
    hold_out,
    hold_out_named,
    hold_out_values,
)
from cctrain.data.sources.source import Source
from cctrain.data.store.layout import Groups
from cctrain.errors import DataError, UsageError


@dataclass(frozen=True)
class Division:
    """How cells are split and put in order."""

    held_out: float = 0.1  # share of the cells, groups or values that are held out
    seed: int = 0
    group_by: str | None = None  # obs column: its values stay together, in the split and in the store
    split_by: str | None = None  # obs column: its values stay together in the split
    hold_out: tuple[str, ...] = ()  # with split_by: exactly these values are held out

    def check(self) -> None:
        if not 0 < self.held_out < 1:
            raise UsageError(
                f"held_out is {self.held_out}: the share of held-out cells lies between 0 and 1, such as 0.1."
            )
        if self.hold_out and self.split_by is None:
            raise UsageError("--hold-out names values of a column: say which with --split-by COLUMN.")

    def columns(self) -> dict[str, str]:
        """The obs columns that it needs, each with the option that does."""
        wanted = {"--group-by": self.group_by, "--split-by": self.split_by}
        return {column: option for option, column in wanted.items() if column is not None}


@dataclass(frozen=True)
class Selection:
    """Cells that passed, and where they go. Arrays are over these cells, in the order of the sources."""

    cells: CellProfiles
    rows: np.ndarray  # int64 destination row
    num_train: int
    destination: np.ndarray  # int64 (all cells of all sources,) destination row, -1 for a cell left out
    groups: Groups | None
    table: list[Row]
    notes: list[str]

    @property
    def num_cells(self) -> int:
        return len(self.cells)

    def in_store_order(self, values: np.ndarray) -> np.ndarray:
        ordered = np.empty_like(values)
        ordered[self.rows] = values
        return ordered


def select(sources: list[Source], everything: CellProfiles, quality: QualityControl, division: Division) -> Selection:
    """DataError if no cell passes, or if a cell lacks a value that the division needs; UsageError for its options."""
    kept, table = select_cells(everything, quality)
    if not kept.any():
        raise DataError(f"No cell passes quality control. Relax the rule that removed them:\n{format_table(table)}")
    cells = everything.at(kept)
    groups, values = (
        None if column is None else label_cells(sources, column, cells.source, cells.row)
        for column in (division.group_by, division.split_by)
    )
    held, note = _hold_out(cells, division, groups, values)
    if groups is not None or values is not None:
        copies = copies_of_training_cells(cells.content, held)
        if held.any() and copies[held].all():
            raise DataError("Every held-out cell is identical to a training cell: hold out other values.")
        table = [*table, copies_row(int(copies.sum()), int((~copies).sum()))]
        kept[kept] = ~copies
        cells, held = cells.at(~copies), held[~copies]
        groups = None if groups is None else groups.at(~copies)
    rows = destination_rows(cells, held, division.seed, groups)
    destination = np.full(len(everything), -1, dtype=np.int64)
    destination[kept] = rows
    num_train = int((~held).sum())
    stored = None if groups is None else _groups_in_order(groups, rows, num_train)
    return Selection(cells, rows, num_train, destination, stored, table, [note] if note else [])


def _hold_out(
    cells: CellProfiles, division: Division, groups: Labels | None, values: Labels | None
) -> tuple[np.ndarray, str | None]:
    """Mask (cells,) of the held-out cells, and a note."""
    if groups is not None and values is not None:
        check_nested(groups, values)
    if values is not None and division.hold_out:
        return hold_out_named(values, division.hold_out), None
    whole = values if values is not None else groups
    if whole is not None:
        return hold_out_values(whole, division.held_out, division.seed)
    return hold_out(cells.content, division.held_out, division.seed)


def _groups_in_order(groups: Labels, rows: np.ndarray, num_train: int) -> Groups:
    codes = np.empty_like(groups.codes)
    codes[rows] = groups.codes
    firsts = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1])
    starts = np.concatenate([firsts, [len(codes)]]).astype(np.int64)
    return Groups(groups.names[codes[firsts]], starts, int(np.searchsorted(firsts, num_train)))
