"""Files of cells, as laboratories keep them, read as validated raw counts in blocks of bounded memory.

AnnData (an `.h5ad` file or a Zarr directory: X, raw.X or a layer; CSR, CSC or dense) and 10x Genomics (an `.h5`
file, or a folder with matrix.mtx, features.tsv or genes.tsv, and barcodes.tsv), recognised by what is in them.
Whatever the form, the same cells give the same blocks. Genes go by Ensembl id wherever the file has one, without
the version suffix; columns with the same id are summed; features that are not gene expression (antibodies,
guides) are left out. Everything that was done is in `Source.notes`. Nothing here filters, normalises or guesses
a count: a value that cannot be a count is an error that names its cell and its gene.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cctrain.data.files import file_sha256
from cctrain.data.sources.anndata_source import open_anndata
from cctrain.data.sources.by_cell import file_identity
from cctrain.data.sources.containers import open_container
from cctrain.data.sources.hdf5_probe import why_unreadable
from cctrain.data.sources.raw_blocks import LARGEST_COUNT, Content, first_not_a_count
from cctrain.data.sources.tenx import open_folder
from cctrain.data.sources.tenx_h5 import is_tenx, open_tenx
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
    kind: str  # ".h5ad", "AnnData Zarr", "10x .h5" or "10x folder"
    gene_ids: list[str]  # unique, in the order of the file
    gene_names: list[str]
    num_cells: int
    counts_from: str  # "X", "raw.X", "layers/NAME", "matrix.mtx", or the group of a 10x .h5 file
    num_duplicate_genes: int  # columns that were added to another of the same id
    notes: list[str]  # what was done to genes and columns, for people
    _columns: list[str] = field(repr=False)  # gene ids as written in the file
    _column_gene: np.ndarray = field(repr=False)  # gene of each column, -1 for one that was left out
    _content: Content = field(repr=False)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """(cells, columns of the file), indexed by cell id. Read at first use, because workers do without."""
        obs = self._content.read_obs()
        missing = obs.index.isna() | (obs.index == "")
        if missing.any():
            raise DataError(f"{self.path}: the cell of row {int(np.argmax(missing)):,} has no id (barcode).")
        obs.index = obs.index.astype(str)
        return obs

    @cached_property
    def cell_ids(self) -> list[str]:
        return self.obs.index.tolist()

    @cached_property
    def files(self) -> list[Path]:
        """Every file that the source consists of."""
        return [
            file
            for path in self._content.inputs
            for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
            if file.is_file()
        ]

    def digests(self) -> dict[str, str]:
        """SHA-256 of each input by its name; that of a directory is over the digests of its files, by path."""
        return {path.resolve().name: _sha256(path, self.files) for path in self._content.inputs}

    def arrange(self) -> None:
        """Make reading by cell possible: a matrix that is stored by gene is re-ordered in `scratch`, once."""
        self._content.matrix.arrange()

    def piece_edges(self, counts_per_piece: int) -> np.ndarray:
        """int64, ascending, 0 .. num_cells: ranges of cells with about so many stored values, for `blocks`."""
        return self._content.matrix.piece_edges(counts_per_piece)

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[CellBlock]:
        """The cells start .. stop - 1 in the file's order, at most about 2 million counts or 2,048 cells at a time.

        Raises DataError at the first value that is not a count (negative, fractional, not finite).
        """
        for first, raw in self._content.matrix.blocks(start, self.num_cells if stop is None else stop):
            self._check(first, raw)
            yield CellBlock(first, self._to_genes(raw))

    def _check(self, start: int, raw: sp.csr_matrix) -> None:
        bad = first_not_a_count(raw.data)
        if bad is None:
            return
        row = int(np.searchsorted(raw.indptr, bad, side="right")) - 1
        raise DataError(
            f"{self.path}: {self.counts_from} holds {raw.data[bad]!s} for gene "
            f"'{self._columns[raw.indices[bad]]}' in cell '{self.cell_ids[start + row]}' "
            f"(row {start + row}): not a count (a whole number from 0 to {LARGEST_COUNT:,}). "
            f"{self._advice()}"
        )

    def _advice(self) -> str:
        if self.kind.startswith("10x"):
            return "Raw counts are needed: give the file as the counting program wrote it."
        others = self._content.others()
        hint = "Log-normalised or corrected data? Raw counts are needed. "
        if others:
            return hint + f"These look like counts: {', '.join(others)}; choose one with --counts {others[0]}."
        return hint + "Nothing in this file (X, raw.X, layers) looks like counts."

    def _to_genes(self, raw: sp.csr_matrix) -> sp.csr_matrix:
        genes = self._column_gene[raw.indices]
        values = raw.data.astype(np.int64)
        kept = (genes >= 0) & (values != 0)
        indptr = raw.indptr
        if not kept.all():
            before = np.concatenate([[0], np.cumsum(kept, dtype=np.int32)])
            genes, values, indptr = genes[kept], values[kept], before[indptr].astype(np.int32)
        counts = sp.csr_matrix((values, genes, indptr), shape=(raw.shape[0], len(self.gene_ids)))
        counts.sum_duplicates()  # sorts as well
        return counts


def open_source(path: Path, counts: str | None = None, scratch: Path | None = None) -> Source:
    """Open an .h5ad file, an AnnData Zarr directory, a 10x .h5 file or a 10x folder.

    `counts` chooses the matrix of AnnData: "X", "raw.X", "layers/NAME"; without it: X if its first values are
    counts, else raw.X, else the one layer that is. `scratch` is where a matrix that is stored by gene is
    re-ordered (as large as the matrix), and found again by whoever opens the same source with the same scratch;
    without it that is done in the system's temporary directory. Nothing but the genes is read here. Raises
    DataError for what cannot be read, with what was looked for.
    """
    path = Path(path)
    is_zarr = any((path / name).is_file() for name in ("zarr.json", ".zgroup"))
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. {_LOOKED_FOR}")
    is_matrix = path.is_file() and path.name.endswith(("matrix.mtx", "matrix.mtx.gz"))
    if is_matrix or (path.is_dir() and not is_zarr):
        if counts not in (None, "matrix.mtx"):
            raise DataError(f"{path}: --counts {counts} needs an AnnData file; a 10x folder has matrix.mtx alone.")
        return _source(path, open_folder(path, scratch))
    if not is_zarr and not path.is_file():
        raise DataError(f"{path}: neither a file nor a folder. {_LOOKED_FOR}")
    if not is_zarr:
        _check_survivable(path, scratch)
    with open_container(path) as container:
        if "obs" not in container and is_tenx(container):
            return _source(path, open_tenx(container, counts, scratch))
        return _source(path, open_anndata(container, counts, scratch))


_LOOKED_FOR = "A source is an .h5ad file, an AnnData Zarr directory, a 10x .h5 file or a 10x folder."


def _check_survivable(path: Path, scratch: Path | None) -> None:
    """DataError for a file on which HDF5 hangs or crashes; a note in `scratch` spares the next process the test."""
    note = scratch and scratch / f"opened-{hashlib.sha256(file_identity([path]).encode()).hexdigest()[:24]}"
    if note and note.exists():
        return
    reason = why_unreadable(path)
    if reason:
        raise DataError(f"{path}: {reason}: the file is damaged; copy it again from its origin.")
    if note:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _source(path: Path, content: Content) -> Source:
    notes = list(content.notes)
    columns, names = _ids_and_names(content.var)
    expression = _is_expression(content.var)
    if not expression.all():
        notes.append(f"{int((~expression).sum()):,} features that are not gene expression were left out")
    stripped = [without_version(column) for column in columns]
    versions = sum(a != b for a, b in zip(stripped, columns, strict=True))
    if versions:
        notes.append(f"version suffixes of {versions:,} Ensembl ids were removed")

    gene_of_id: dict[str, int] = {}
    gene_names: list[str] = []
    column_gene = np.full(len(columns), -1, dtype=np.int32)
    for i in np.flatnonzero(expression):
        if not stripped[i]:
            raise DataError(f"{path}: the gene of column {i:,} has no id: name it, or leave it out of the file.")
        gene = gene_of_id.setdefault(stripped[i], len(gene_of_id))
        if gene == len(gene_names):
            gene_names.append(names[i])
        column_gene[i] = gene
    duplicates = int(expression.sum()) - len(gene_of_id)
    if duplicates:
        notes.append(f"{duplicates:,} columns with the id of another gene were added to it")
    num_cells = content.matrix.shape[0]
    if not num_cells or not gene_of_id:
        raise DataError(f"{path}: {num_cells} cells and {len(gene_of_id)} genes: there is nothing to prepare.")
    return Source(
        path=path,
        kind=content.kind,
        gene_ids=list(gene_of_id),
        gene_names=gene_names,
        num_cells=num_cells,
        counts_from=content.counts_from,
        num_duplicate_genes=duplicates,
        notes=notes,
        _columns=columns,
        _column_gene=column_gene,
        _content=content,
    )


def _sha256(path: Path, files: list[Path]) -> str:
    if path.is_file():
        return file_sha256(path)
    lines = [f"{file_sha256(file)} {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _ids_and_names(var: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Ensembl ids from the index, or the first column that holds them; else the index is id and name."""
    index = ["" if pd.isna(value) else str(value) for value in var.index]
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


def without_version(gene: str) -> str:
    match = _ENSEMBL.fullmatch(gene)
    return match.group(1) if match else gene


def _is_expression(var: pd.DataFrame) -> np.ndarray:
    """10x files mark antibodies and guides so; in other files a column of this name holds biotypes."""
    for column in _TYPE_COLUMNS:
        if column in var and (var[column].astype(str) == "Gene Expression").any():
            return (var[column].astype(str) == "Gene Expression").to_numpy()
    return np.ones(len(var), dtype=bool)
