"""Files of cells, as laboratories keep them, read as validated raw counts in blocks of bounded memory.

Two kinds: an AnnData file (`.h5ad`: X, raw.X or a layer; CSR, CSC or dense) and a 10x Genomics folder
(matrix.mtx, features.tsv or genes.tsv, barcodes.tsv; each also as .gz). Whatever the form, the same cells
give the same blocks. Genes go by Ensembl id wherever the file has one, without the version suffix; columns
with the same id are summed; features that are not gene expression (antibodies, guides) are left out.
Everything that was done is in `Source.notes`. Nothing here filters, normalises or guesses a count: a value
that cannot be a count is an error that names its cell and its gene.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cctrain.data import h5ad, tenx
from cctrain.errors import DataError

_ENSEMBL = re.compile(r"(ENS[A-Z]{0,6}G\d{11})(\.\d+)?")
_NAME_COLUMNS = ("gene_name", "gene_names", "gene_symbol", "gene_symbols", "feature_name", "symbol", "name")
_TYPE_COLUMNS = ("feature_types", "feature_type")


@dataclass
class CellBlock:
    """Consecutive cells of a source, from cell number `start` on."""

    start: int
    counts: sp.csr_matrix  # (cells, genes of the source) int64, sorted indices, no explicit zeros


@dataclass
class Source:
    path: Path
    gene_ids: list[str]  # unique, in the order of the file
    gene_names: list[str]
    cell_ids: list[str]
    obs: pd.DataFrame  # (cells, columns of the file), indexed by cell id
    counts_from: str  # "X", "raw.X", "layers/NAME" or "matrix.mtx"
    num_duplicate_genes: int  # columns that were added to another of the same id
    files: list[Path]
    notes: list[str]  # what was done to genes and columns, for people
    _columns: list[str] = field(repr=False)  # gene ids as written in the file
    _column_gene: np.ndarray = field(repr=False)  # gene of each column, -1 for one that was left out
    _read: Callable[[], Iterator[h5ad.RawBlock]] = field(repr=False)

    @property
    def num_cells(self) -> int:
        return len(self.cell_ids)

    def blocks(self) -> Iterator[CellBlock]:
        """All cells in the file's order, at most about 4 million counts or 2,048 cells at a time.

        Raises DataError at the first value that is not a count (negative, fractional, not finite).
        """
        for start, raw in self._read():
            self._check(start, raw)
            yield CellBlock(start, self._to_genes(raw))

    def _check(self, start: int, raw: sp.csr_matrix) -> None:
        if len(raw.indices) and (raw.indices.min() < 0 or raw.indices.max() >= raw.shape[1]):
            raise DataError(
                f"{self.path}: {self.counts_from} has a gene index outside 0..{raw.shape[1] - 1} in the "
                f"cells from row {start} on: the file is damaged; write it again from its origin."
            )
        bad = h5ad.first_not_a_count(raw.data)
        if bad is None:
            return
        row = int(np.searchsorted(raw.indptr, bad, side="right")) - 1
        raise DataError(
            f"{self.path}: {self.counts_from} holds {raw.data[bad]!s} for gene "
            f"'{self._columns[raw.indices[bad]]}' in cell '{self.cell_ids[start + row]}' "
            f"(row {start + row}): not a count (a whole number from 0 to {h5ad.LARGEST_COUNT:,}). "
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        if self.counts_from == "matrix.mtx":
            return "Raw counts are needed: give the folder as the counting program wrote it."
        others = [name for name in h5ad.count_like(self.path) if name != self.counts_from]
        hint = "Log-normalised or corrected data? Raw counts are needed. "
        if others:
            return hint + f"These look like counts: {', '.join(others)}; choose one with --counts {others[0]}."
        return hint + "Nothing in this file (X, raw.X, layers) looks like counts."

    def _to_genes(self, raw: sp.csr_matrix) -> sp.csr_matrix:
        genes = self._column_gene[raw.indices]
        kept = (genes >= 0) & (raw.data != 0)
        rows = np.repeat(np.arange(raw.shape[0]), np.diff(raw.indptr))
        values = raw.data[kept].astype(np.int64)
        return sp.csr_matrix((values, (rows[kept], genes[kept])), shape=(raw.shape[0], len(self.gene_ids)))


def open_source(path: Path, counts: str | None = None, scratch: Path | None = None) -> Source:
    """Open an .h5ad file or a 10x folder. `counts` chooses the matrix of an .h5ad file: "X", "raw.X",
    "layers/NAME".

    Without it: X if its first values are counts, else raw.X, else the one layer that is. `scratch` is where a
    matrix that is stored by gene is re-ordered (as large as the matrix; default: the system's temporary
    directory). Raises DataError for what cannot be read, with what was looked for.
    """
    path = Path(path)
    if path.is_dir():
        if counts not in (None, "matrix.mtx"):
            raise DataError(f"{path}: --counts {counts} needs an .h5ad file; a 10x folder has matrix.mtx alone.")
        content = tenx.open_folder(path, scratch)
    elif path.is_file():
        content = h5ad.open_file(path, counts, scratch)
    else:
        raise DataError(f"{path}: no such file or folder. A source is an .h5ad file or a 10x folder.")
    return _source(path, content)


def _source(path: Path, content: h5ad.Content) -> Source:
    notes: list[str] = []
    columns, names = _ids_and_names(content.var)
    expression = _is_expression(content.var)
    if not expression.all():
        notes.append(f"{int((~expression).sum()):,} features that are not gene expression were left out")
    stripped = [_without_version(column) for column in columns]
    versions = sum(a != b for a, b in zip(stripped, columns, strict=True))
    if versions:
        notes.append(f"version suffixes of {versions:,} Ensembl ids were removed")

    gene_of_id: dict[str, int] = {}
    gene_names: list[str] = []
    column_gene = np.full(len(columns), -1, dtype=np.int64)
    for i in np.flatnonzero(expression):
        gene = gene_of_id.setdefault(stripped[i], len(gene_of_id))
        if gene == len(gene_names):
            gene_names.append(names[i])
        column_gene[i] = gene
    duplicates = int(expression.sum()) - len(gene_of_id)
    if duplicates:
        notes.append(f"{duplicates:,} columns with the id of another gene were added to it")
    cell_ids = [str(cell) for cell in content.obs.index]
    if not cell_ids or not gene_of_id:
        raise DataError(f"{path}: {len(cell_ids)} cells and {len(gene_of_id)} genes: there is nothing to prepare.")
    return Source(
        path=path,
        gene_ids=list(gene_of_id),
        gene_names=gene_names,
        cell_ids=cell_ids,
        obs=content.obs,
        counts_from=content.counts_from,
        num_duplicate_genes=duplicates,
        files=content.files,
        notes=notes,
        _column_gene=column_gene,
        _read=content.read,
        _columns=columns,
    )


def _ids_and_names(var: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Ensembl ids from the index, or the first column that holds them; else the index is id and name."""
    index = [str(value) for value in var.index]
    if _looks_ensembl(index):
        for column in _NAME_COLUMNS:
            if column in var:
                return index, _texts(var[column], index)
        return index, index
    for column in var.columns:
        if var[column].dtype.kind in "OSU" or isinstance(var[column].dtype, pd.CategoricalDtype | pd.StringDtype):
            values = _texts(var[column], index)
            if _looks_ensembl(values):
                return values, index
    return index, index


def _texts(column: pd.Series, instead: list[str]) -> list[str]:
    return [
        str(value) if isinstance(value, str) and value else other for value, other in zip(column, instead, strict=True)
    ]


def _looks_ensembl(values: list[str]) -> bool:
    return sum(_ENSEMBL.match(value) is not None for value in values) > len(values) / 2


def _without_version(gene: str) -> str:
    match = _ENSEMBL.fullmatch(gene)
    return match.group(1) if match else gene


def _is_expression(var: pd.DataFrame) -> np.ndarray:
    """10x files mark antibodies and guides so; in other files a column of this name holds biotypes."""
    for column in _TYPE_COLUMNS:
        if column in var and (var[column].astype(str) == "Gene Expression").any():
            return (var[column].astype(str) == "Gene Expression").to_numpy()
    return np.ones(len(var), dtype=bool)
