"""The 10x Genomics folder: matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv, each also as .gz.

Matrix Market text is parsed once, in pieces, and re-ordered by cell on disk (see `buckets`): 10x files are
sorted by cell, but nothing in the format promises it. Values are returned as written; `sources` checks them.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from cctrain.data.h5ad import COUNTS_PER_BLOCK, ByCell, Content, RawBlock
from cctrain.errors import DataError

_LOOKED_FOR = "matrix.mtx, features.tsv or genes.tsv, and barcodes.tsv, each plain or .gz"


def open_folder(folder: Path, scratch: Path | None) -> Content:
    matrix = _find(folder, "matrix.mtx")
    genes = _find(folder, "features.tsv", "genes.tsv")
    barcodes = _find(folder, "barcodes.tsv")
    var = _features(genes)
    obs = pd.DataFrame(index=pd.Index(_table(barcodes)[0].astype(str).to_numpy(), name="barcode"))
    reader = _Reader(matrix, (len(obs), len(var)), scratch)
    return Content(var=var, obs=obs, counts_from="matrix.mtx", files=[matrix, genes, barcodes], read=reader.blocks)


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise DataError(f"{folder}: no {' or '.join(names)} in this folder. A 10x folder holds {_LOOKED_FOR}.")


def _table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a table with tabs: {error}.") from error


def _features(path: Path) -> pd.DataFrame:
    """Index: the first column (gene id). gene_name: the second. feature_types: the third, if there."""
    table = _table(path)
    var = pd.DataFrame(index=pd.Index(table[0].to_numpy()))
    for column, name in ((1, "gene_name"), (2, "feature_types")):
        if column in table:
            var[name] = table[column].to_numpy()
    return var


class _Reader:
    """Blocks of the matrix; keeps the parsed, re-ordered copy for the next reading."""

    def __init__(self, path: Path, shape: tuple[int, int], scratch: Path | None) -> None:
        self.path = path
        self.shape = shape
        self.scratch = scratch
        self._by_cell: ByCell | None = None

    def blocks(self) -> Iterator[RawBlock]:
        if self._by_cell is None:
            self._by_cell = _parse(self.path, self.shape, self.scratch)
        yield from self._by_cell.blocks()


def _parse(path: Path, shape: tuple[int, int], scratch: Path | None) -> ByCell:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as text:
            num_entries = _header(path, text, shape)
            by_cell = ByCell(shape, num_entries, scratch)
            seen = 0
            for genes, cells, values in _entries(text):
                _check(path, seen, genes, cells, values, shape)
                by_cell.add(cells - 1, genes - 1, values)
                seen += len(values)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pd.errors.ParserError, ValueError) as error:
        raise DataError(f"{path}: not Matrix Market text, or cut short: {error}.") from error
    if seen != num_entries:
        raise DataError(
            f"{path}: {seen:,} entries, but its header says {num_entries:,}: the file was cut short or "
            "altered; copy it again from its origin."
        )
    return by_cell


def _header(path: Path, text: IO[str], shape: tuple[int, int]) -> int:
    """Read up to the line of sizes; the number of entries that it promises."""
    banner = text.readline().split()
    form = [word.lower() for word in banner[1:]]
    if banner[:1] != ["%%MatrixMarket"] or form[:2] != ["matrix", "coordinate"]:
        raise DataError(f"{path}: does not start with '%%MatrixMarket matrix coordinate ...'.")
    if form[2:] not in (["integer", "general"], ["real", "general"]):
        raise DataError(f"{path}: '{' '.join(form[2:])}' entries; counts are 'integer general' or 'real general'.")
    line = text.readline()
    while line.startswith("%") or line.strip() == "":
        if line == "":
            raise DataError(f"{path}: ends before the line of sizes: the file was cut short.")
        line = text.readline()
    num_genes, num_cells, num_entries = (int(word) for word in line.split())
    if (num_cells, num_genes) != shape:
        raise DataError(
            f"{path}: {num_genes:,} genes x {num_cells:,} cells, but the folder lists {shape[1]:,} genes and "
            f"{shape[0]:,} barcodes: the files do not belong together."
        )
    return num_entries


def _entries(text: IO[str]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    try:
        pieces = pd.read_csv(
            text,
            sep=r"\s+",
            header=None,
            names=["gene", "cell", "value"],
            dtype={"gene": np.int64, "cell": np.int64, "value": np.float64},
            chunksize=COUNTS_PER_BLOCK,
        )
    except pd.errors.EmptyDataError:
        return
    for piece in pieces:
        yield piece["gene"].to_numpy(), piece["cell"].to_numpy(), piece["value"].to_numpy()


def _check(
    path: Path, seen: int, genes: np.ndarray, cells: np.ndarray, values: np.ndarray, shape: tuple[int, int]
) -> None:
    outside = (genes < 1) | (genes > shape[1]) | (cells < 1) | (cells > shape[0])
    if outside.any():
        i = int(np.argmax(outside))
        raise DataError(
            f"{path}: entry {seen + i + 1:,} is for gene {genes[i]} of {shape[1]:,} and cell {cells[i]} of "
            f"{shape[0]:,}: the file is damaged; copy it again from its origin."
        )
