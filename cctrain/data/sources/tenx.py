"""The 10x Genomics folder: matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv, each also compressed.

Matrix Market text is parsed once, in pieces, and put in order of cells on disk (see `by_cell`): 10x files are
sorted by cell, but nothing in the format promises it. Values are returned as written; `sources` checks them.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from cctrain.data.sources.by_cell import ByCell, Entries, arranged
from cctrain.data.sources.raw_blocks import Content, RawBlock
from cctrain.errors import DataError

_LOOKED_FOR = "matrix.mtx, features.tsv or genes.tsv, and barcodes.tsv, each plain or .gz"
_TEXT_PER_PIECE = 2**22  # bytes of matrix.mtx that are parsed at a time, some 300,000 entries
_LONGEST_LINE = 2**16


def open_folder(path: Path, scratch: Path | None) -> Content:
    """`path` is the folder, or the matrix in it where names have a prefix (GSM123_matrix.mtx.gz)."""
    if path.is_dir():
        folder, prefix = path, ""
        matrix_path = _find(folder, "matrix.mtx")
    else:
        folder, prefix = path.parent, path.name[: path.name.rindex("matrix.mtx")]
        matrix_path = path
    genes = _find(folder, f"{prefix}features.tsv", f"{prefix}genes.tsv")
    barcodes = _find(folder, f"{prefix}barcodes.tsv")
    num_genes, num_cells, num_entries = _header(matrix_path)
    var = _features(genes, num_genes)

    def read_obs() -> pd.DataFrame:
        ids = [row[0] for row in _table(barcodes, num_cells, "cells")]
        return pd.DataFrame(index=pd.Index(ids, name="barcode"))

    return Content(
        kind="10x folder",
        var=var,
        read_obs=read_obs,
        counts_from="matrix.mtx",
        matrix=TextMatrix(matrix_path, barcodes, (num_cells, num_genes), num_entries, scratch),
        inputs=[matrix_path, genes, barcodes],
        others=lambda: [],
        notes=[],
    )


@dataclass
class TextMatrix:
    """Matrix Market text of `shape` (cells, columns), with a line an entry."""

    path: Path
    barcodes: Path
    shape: tuple[int, int]
    num_entries: int
    scratch: Path | None
    _by_cell: ByCell | None = None

    def arrange(self) -> None:
        self._arranged()

    def blocks(self, start: int, stop: int) -> Iterator[RawBlock]:
        yield from self._arranged().blocks(start, stop)

    def piece_edges(self, counts_per_piece: int) -> np.ndarray:
        return self._arranged().piece_edges(counts_per_piece)

    def _arranged(self) -> ByCell:
        if self._by_cell is None:
            for _ in _table(self.barcodes, self.shape[0], "cells"):
                pass  # the number of cells is real, not only claimed
            self._by_cell = arranged(
                self.scratch,
                self.path,
                "matrix",
                self.shape,
                self.num_entries,
                np.dtype(np.float64),
                lambda: _entries(self.path, self.shape, self.num_entries),
            )
        return self._by_cell


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise DataError(f"{folder}: no {' or '.join(names)} in this folder. A 10x folder holds {_LOOKED_FOR}.")


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if it is gzip by its first bytes, whatever its name."""
    try:
        with path.open("rb") as plain:
            compressed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if compressed else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read, or was cut short: {error}.") from error


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise DataError(f"{path}: a line of over {_LONGEST_LINE:,} bytes: this is not a text of 10x.")
        yield line.decode().rstrip("\r\n")


def _table(path: Path, expected: int, of_what: str) -> Iterator[list[str]]:
    """Fields of the lines of a table with tabs; DataError if it has not one line for each gene or cell."""
    found = 0
    with _reading(path) as file:
        for line in _lines(path, file):
            if line and found < expected:
                yield line.split("\t")
            found += bool(line)
    if found != expected:
        raise DataError(
            f"{path}: the matrix has {expected:,} {of_what}, and this file lists {found:,}: the files do not belong "
            "together."
        )


def _features(path: Path, num_genes: int) -> pd.DataFrame:
    """Index: the first column (gene id). gene_name: the second. feature_types: the third, if there."""
    table = list(_table(path, num_genes, "genes"))
    var = pd.DataFrame(index=pd.Index([row[0] for row in table]))
    for column, name in ((1, "gene_name"), (2, "feature_types")):
        lacking = [i for i, row in enumerate(table) if len(row) <= column]
        if not lacking:
            var[name] = [row[column] for row in table]
        elif len(lacking) < len(table):
            raise DataError(f"{path}: line {lacking[0] + 1:,} has no {name}, and other lines have one.")
    return var


def _header(path: Path) -> tuple[int, int, int]:
    with _reading(path) as file:
        return _read_header(path, file)


def _read_header(path: Path, file: BinaryIO) -> tuple[int, int, int]:
    """Read up to the line of sizes: genes, cells, entries."""
    lines = _lines(path, file)
    banner = next(lines, "").split()
    form = [word.lower() for word in banner[1:]]
    if banner[:1] != ["%%MatrixMarket"] or form[:2] != ["matrix", "coordinate"]:
        raise DataError(f"{path}: does not start with '%%MatrixMarket matrix coordinate ...'.")
    if form[2:] not in (["integer", "general"], ["real", "general"]):
        raise DataError(f"{path}: '{' '.join(form[2:])}' entries; counts are 'integer general' or 'real general'.")
    sizes = next((line for line in lines if line.strip() and not line.startswith("%")), None)
    if sizes is None:
        raise DataError(f"{path}: ends before the line of sizes: the file was cut short.")
    words = sizes.split()
    if len(words) != 3 or not all(word.isascii() and word.isdigit() and len(word) < 16 for word in words):
        raise DataError(f"{path}: '{sizes[:80]}' where the numbers of genes, cells and entries belong.")
    num_genes, num_cells, num_entries = (int(word) for word in words)
    return num_genes, num_cells, num_entries


def _entries(path: Path, shape: tuple[int, int], num_entries: int) -> Iterator[Entries]:
    seen = 0
    with _reading(path) as file:
        _read_header(path, file)
        for piece in _pieces(path, file):
            genes, cells, values = _parse(path, piece)
            outside = (genes < 1) | (genes > shape[1]) | (cells < 1) | (cells > shape[0])
            if outside.any():
                i = int(np.argmax(outside))
                raise DataError(
                    f"{path}: entry {seen + i + 1:,} is for gene {genes[i]} of {shape[1]:,} and cell {cells[i]} of "
                    f"{shape[0]:,}: the file is damaged; copy it again from its origin."
                )
            seen += len(values)
            yield cells - 1, genes - 1, values
    if seen != num_entries:
        raise DataError(
            f"{path}: {seen:,} entries, but its header says {num_entries:,}: the file was cut short or "
            "altered; copy it again from its origin."
        )


def _pieces(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The rest of the file in pieces of whole lines."""
    rest = b""
    while read := file.read(_TEXT_PER_PIECE):
        end = read.rfind(b"\n") + 1
        if not end and len(rest) + len(read) > _TEXT_PER_PIECE + _LONGEST_LINE:
            raise DataError(f"{path}: a line of over {_LONGEST_LINE:,} bytes: this is not Matrix Market text.")
        if end:
            yield rest + read[:end]
            rest = b""
        rest += read[end:]
    if rest.strip():
        yield rest


def _parse(path: Path, piece: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genes, cells (from 1) and values of the lines."""
    if not piece.strip():
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    try:
        table = pd.read_csv(
            io.BytesIO(piece),
            sep=r"\s+",
            header=None,
            dtype={0: np.int64, 1: np.int64, 2: np.float64},
            quoting=3,
            na_filter=False,
        )
    except (ValueError, OverflowError, pd.errors.ParserError) as error:
        raise DataError(f"{path}: not lines of gene, cell and count: {str(error).splitlines()[0]}.") from error
    if table.shape[1] != 3:
        raise DataError(f"{path}: lines of {table.shape[1]} numbers; gene, cell and count are three.")
    return tuple(table[i].to_numpy() for i in range(3))  # type: ignore[return-value]
