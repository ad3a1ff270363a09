"""The AnnData file (.h5ad) as blocks of cells, without ever holding the matrix.

CSR and dense matrices are read by rows. CSC is stored by gene: its entries are first re-ordered on disk (see
`buckets`), once, at the first reading. Which of X, raw.X and the layers holds raw counts is decided here.
Values are returned as stored; `sources` checks them.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from cctrain.data.buckets import Buckets, even_edges
from cctrain.errors import DataError

RawBlock = tuple[int, sp.csr_matrix]  # first cell; (cells, columns of the file) values as stored

COUNTS_PER_BLOCK = 4_000_000
CELLS_PER_BLOCK = 2_048
_DENSE_PER_BLOCK = 16_000_000  # values of a dense block, zeros included
_LOOK_AT = 1_000_000  # values that decide whether a matrix looks like counts
LARGEST_COUNT = 2**32 - 1


@dataclass
class Content:
    """What a file or folder of cells holds, before genes are matched."""

    var: pd.DataFrame  # one row a column of the matrix
    obs: pd.DataFrame  # one row a cell
    counts_from: str
    files: list[Path]
    read: Callable[[], Iterator[RawBlock]]


def open_file(path: Path, counts: str | None, scratch: Path | None) -> Content:
    try:
        with h5py.File(path, "r") as file:
            matrices = _matrices(file)
            chosen = _choose(path, file, matrices, counts)
            shape = _shape(file[matrices[chosen]])
            try:
                obs = _frame(file["obs"])
                var = _frame(file["raw/var" if chosen == "raw.X" else "var"])
            except KeyError as error:
                raise DataError(f"{path}: not an AnnData file: {error.args[0]} (looked for obs and var).") from None
    except OSError as error:
        raise DataError(f"{path}: not an .h5ad file, or cut short: HDF5 says '{error}'.") from error
    if shape != (len(obs), len(var)):
        raise DataError(
            f"{path}: {chosen} is {shape[0]:,} x {shape[1]:,}, but there are {len(obs):,} cells in obs and "
            f"{len(var):,} genes in var: the file is damaged; write it again from its origin."
        )
    reader = _Reader(path, matrices[chosen], scratch)
    return Content(var=var, obs=obs, counts_from=chosen, files=[path], read=reader.blocks)


def count_like(path: Path) -> list[str]:
    """Names of the matrices of the file whose first values are counts."""
    with h5py.File(path, "r") as file:
        return [name for name, key in _matrices(file).items() if _looks_like_counts(file[key])]


def first_not_a_count(values: np.ndarray) -> int | None:
    """Position of the first value that is negative, fractional, not finite or too large, or None."""
    if values.dtype.kind in "bu":
        good = values <= LARGEST_COUNT
    else:
        good = (values >= 0) & (values <= LARGEST_COUNT)
        if values.dtype.kind == "f":
            good &= values == np.floor(values)
    return None if good.all() else int(np.argmin(good))


def _matrices(file: h5py.File) -> dict[str, str]:
    """HDF5 key of every matrix, by the name that users give it."""
    found = {name: key for name, key in (("X", "X"), ("raw.X", "raw/X")) if key in file}
    return found | {f"layers/{name}": f"layers/{name}" for name in file.get("layers", {})}


def _choose(path: Path, file: h5py.File, matrices: dict[str, str], counts: str | None) -> str:
    if not matrices:
        raise DataError(f"{path}: not an AnnData file: it has none of X, raw/X and layers.")
    if counts is not None:
        name = {"raw/X": "raw.X"}.get(counts, counts)
        if name not in matrices:
            raise DataError(f"{path}: no {counts}; the file has {', '.join(matrices)}.")
        return name
    good = [name for name, key in matrices.items() if _looks_like_counts(file[key])]
    layers = [name for name in good if name.startswith("layers/")]
    for name in ("X", "raw.X"):
        if name in good:
            return name
    if len(layers) == 1:
        return layers[0]
    if layers:
        raise DataError(f"{path}: {', '.join(layers)} look like counts: choose one with --counts {layers[0]}.")
    raise DataError(
        f"{path}: no raw counts. Looked at {', '.join(matrices)}: each has negative or fractional values. "
        "Log-normalised or corrected data? Save the raw counts in a layer, or give the file they came from."
    )


def _looks_like_counts(matrix: h5py.Dataset | h5py.Group) -> bool:
    if isinstance(matrix, h5py.Group):
        if "data" not in matrix:
            return False
        values = matrix["data"][:_LOOK_AT]
    elif matrix.ndim == 2:
        values = matrix[: max(1, _LOOK_AT // max(1, matrix.shape[1]))]
    else:
        return False
    return values.dtype.kind in "biuf" and first_not_a_count(np.ravel(values)) is None


def _shape(matrix: h5py.Dataset | h5py.Group) -> tuple[int, int]:
    if isinstance(matrix, h5py.Dataset):
        shape = matrix.shape
    else:
        shape = matrix.attrs["shape"] if "shape" in matrix.attrs else matrix.attrs["h5sparse_shape"]
    return int(shape[0]), int(shape[1])


def _frame(group: h5py.Group) -> pd.DataFrame:
    frame = anndata.io.read_elem(group)
    if not isinstance(frame, pd.DataFrame):
        raise DataError(
            f"{group.file.filename}: {group.name} is not a table that this AnnData reads: open the file "
            "with the anndata that wrote it, and write it again with a newer one."
        )
    return frame


class _Reader:
    """Blocks of one matrix; keeps the re-ordered copy of a CSC matrix for the next reading."""

    def __init__(self, path: Path, key: str, scratch: Path | None) -> None:
        self.path = path
        self.key = key
        self.scratch = scratch
        self._by_cell: ByCell | None = None

    def blocks(self) -> Iterator[RawBlock]:
        try:
            with h5py.File(self.path, "r") as file:
                matrix = file[self.key]
                if isinstance(matrix, h5py.Dataset):
                    yield from _dense_blocks(matrix)
                elif _encoding(matrix).startswith("csr"):
                    yield from _csr_blocks(matrix)
                else:
                    if self._by_cell is None:
                        self._by_cell = _by_cell(matrix, self.scratch)
                    yield from self._by_cell.blocks()
        except OSError as error:
            raise DataError(f"{self.path}: {self.key} cannot be read: HDF5 says '{error}'.") from error


def _encoding(matrix: h5py.Group) -> str:
    return str(matrix.attrs["encoding-type"] if "encoding-type" in matrix.attrs else matrix.attrs["h5sparse_format"])


def _dense_blocks(matrix: h5py.Dataset) -> Iterator[RawBlock]:
    num_cells, num_columns = matrix.shape
    step = min(CELLS_PER_BLOCK, max(1, _DENSE_PER_BLOCK // max(1, num_columns)))
    for start in range(0, num_cells, step):
        yield start, sp.csr_matrix(matrix[start : start + step])


def _csr_blocks(matrix: h5py.Group) -> Iterator[RawBlock]:
    shape = _shape(matrix)
    indptr = matrix["indptr"][:].astype(np.int64)
    for start, stop in block_edges(indptr):
        low, high = int(indptr[start]), int(indptr[stop])
        arrays = (matrix["data"][low:high], matrix["indices"][low:high], indptr[start : stop + 1] - low)
        block = sp.csr_matrix((stop - start, shape[1]), dtype=arrays[0].dtype)
        block.data, block.indices, block.indptr = arrays  # not through the constructor: indices are checked later
        yield start, block


def _by_cell(matrix: h5py.Group, scratch: Path | None) -> "ByCell":
    shape = _shape(matrix)
    indptr = matrix["indptr"][:].astype(np.int64)
    by_cell = ByCell(shape, int(indptr[-1]), scratch)
    for first in range(0, int(indptr[-1]), COUNTS_PER_BLOCK):
        last = min(first + COUNTS_PER_BLOCK, int(indptr[-1]))
        columns = np.searchsorted(indptr, np.arange(first, last), side="right") - 1
        cells = matrix["indices"][first:last]
        if len(cells) and (cells.min() < 0 or cells.max() >= shape[0]):
            raise DataError(f"{matrix.file.filename}: {matrix.name} has a cell index outside 0..{shape[0] - 1}.")
        by_cell.add(cells, columns, matrix["data"][first:last])
    return by_cell


class ByCell:
    """A matrix that comes in any order, re-ordered by cell in temporary files; readable repeatedly."""

    def __init__(self, shape: tuple[int, int], num_entries: int, scratch: Path | None) -> None:
        self.shape = shape
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        directory = tempfile.mkdtemp(prefix="cctrain-by-cell-", dir=scratch)
        weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        edges = even_edges(shape[0], num_entries, COUNTS_PER_BLOCK)
        self._buckets = Buckets(Path(directory), edges, np.float64)

    def add(self, cells: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        self._buckets.append(cells, columns, values)

    def blocks(self) -> Iterator[RawBlock]:
        self._buckets.close()
        for i in range(len(self._buckets)):
            first, last = int(self._buckets.edges[i]), int(self._buckets.edges[i + 1])
            cells, columns, values = self._buckets.read(i)
            order = np.lexsort((columns, cells))
            indptr = np.searchsorted(cells[order], np.arange(last - first + 1))
            columns, values = columns[order], values[order]
            for start, stop in block_edges(indptr):
                part = slice(int(indptr[start]), int(indptr[stop]))
                arrays = (values[part], columns[part], indptr[start : stop + 1] - indptr[start])
                yield first + start, sp.csr_matrix(arrays, shape=(stop - start, self.shape[1]))


def block_edges(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of cells of at most COUNTS_PER_BLOCK entries (or one cell) and CELLS_PER_BLOCK cells."""
    start, num_cells = 0, len(indptr) - 1
    while start < num_cells:
        fits = int(np.searchsorted(indptr, indptr[start] + COUNTS_PER_BLOCK, side="right")) - 1
        stop = min(max(fits, start + 1), start + CELLS_PER_BLOCK, num_cells)
        yield start, stop
        start = stop
