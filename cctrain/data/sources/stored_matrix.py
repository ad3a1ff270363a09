"""A matrix in an HDF5 file or a Zarr directory (CSR, CSC, dense) as blocks of cells, never held whole.

CSR and dense matrices are read by rows. CSC is stored by column: its entries are first put in order of cells on
disk (see `by_cell`), once. Whether the parts of a matrix fit each other is checked when it is opened, from
shapes and `indptr` alone; values and indices are looked at block by block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from cctrain.data.sources.by_cell import ByCell, Entries, arranged
from cctrain.data.sources.containers import Container, open_container, refusing
from cctrain.data.sources.raw_blocks import RawBlock, block_edges, even_pieces, first_not_a_count
from cctrain.errors import DataError

DENSE_PER_READ = 4_000_000  # values of a dense matrix that are read at a time, zeros included
_SENT_AT_A_TIME = 500_000  # entries of a CSC matrix
_LOOK_AT = 1_000_000  # values that decide whether a matrix looks like counts
_DAMAGED = "the file is damaged; write it again from its origin."


@dataclass
class StoredMatrix:
    """The matrix of `shape` (cells, columns) at `key`; `form` is "csr", "csc" or "dense"."""

    path: Path
    key: str
    form: str
    shape: tuple[int, int]
    scratch: Path | None
    _by_cell: ByCell | None = None

    def arrange(self) -> None:
        if self.form == "csc" and self._by_cell is None:
            self._by_cell = self._arranged()

    def blocks(self, start: int, stop: int) -> Iterator[RawBlock]:
        self.arrange()
        if self._by_cell is not None:
            yield from self._by_cell.blocks(start, stop)
            return
        with open_container(self.path) as container:
            read = _csr_blocks if self.form == "csr" else _dense_blocks
            yield from read(container, self.key, self.shape[1], start, stop)

    def piece_edges(self, counts_per_piece: int) -> np.ndarray:
        self.arrange()
        if self._by_cell is not None:
            return self._by_cell.piece_edges(counts_per_piece)
        with open_container(self.path) as container:
            if self.form == "csr":
                return even_pieces(_indptr(container, self.key), counts_per_piece)
            array = container.array(self.key, "biuf", num_axes=2)
            rows = max(1, counts_per_piece // max(1, self.shape[1]))
            rows = _whole_chunks(rows, array.chunks)
            return np.unique(np.append(np.arange(0, self.shape[0], rows, dtype=np.int64), self.shape[0]))

    def _arranged(self) -> ByCell:
        with open_container(self.path) as container:
            data = container.array(f"{self.key}/data", "biuf")
            return arranged(
                self.scratch,
                self.path,
                self.key,
                self.shape,
                data.shape[0],
                _value_dtype(np.dtype(data.dtype)),
                lambda: _csc_entries(container, self.key, self.shape),
            )


def form_of(container: Container, key: str) -> str | None:
    """ "csr", "csc", "dense", or None for something that is no matrix of numbers."""
    if not container.is_group(key):
        return "dense"
    attributes = container.attributes(key)
    encoding = str(attributes.get("encoding-type", attributes.get("h5sparse_format", "")))
    return encoding[:3] if encoding in ("csr_matrix", "csc_matrix", "csr", "csc") else None


def check_matrix(container: Container, key: str, form: str, shape: tuple[int, int]) -> None:
    """DataError unless the parts of a matrix of AnnData fit each other and `shape` (cells in obs, genes in var)."""
    if form == "dense":
        stored = tuple(container.array(key, "biuf", num_axes=2).shape)
    else:
        stored = _shape_attribute(container, key)
    if stored != shape:
        raise DataError(
            f"{container.path}: {key} is {stored[0]:,} x {stored[1]:,}, but there are {shape[0]:,} cells in obs and "
            f"{shape[1]:,} genes in var: {_DAMAGED}"
        )
    if form != "dense":
        num_rows, num_per_row = shape if form == "csr" else shape[::-1]
        check_sparse(container, key, num_rows, num_per_row)


def check_sparse(container: Container, key: str, num_rows: int, num_per_row: int) -> None:
    """DataError unless indptr, indices and data of compressed rows fit each other."""
    arrays = {
        name: container.array(f"{key}/{name}", kinds)
        for name, kinds in (("indptr", "iu"), ("indices", "iu"), ("data", "biuf"))
    }
    length = {name: int(array.shape[0]) for name, array in arrays.items()}
    if length["data"] != length["indices"]:
        raise DataError(
            f"{container.path}: {key} has {length['data']:,} values and {length['indices']:,} indices: {_DAMAGED}"
        )
    if length["indptr"] != num_rows + 1:
        raise DataError(
            f"{container.path}: {key}/indptr has {length['indptr']:,} entries where {num_rows + 1:,} belong: {_DAMAGED}"
        )
    for name, array in arrays.items():
        container.check_whole(f"{key}/{name}", array)
    end = 0
    for start in range(0, num_rows + 1, _LOOK_AT):
        part = container.read(f"{key}/indptr", arrays["indptr"], start, min(start + _LOOK_AT, num_rows + 1))
        steps = np.diff(part.astype(np.int64), prepend=end)
        if (start == 0 and part[0] != 0) or steps.min() < 0 or steps.max() > num_per_row:
            bad = start + int(np.argmax((steps < 0) | (steps > num_per_row)))
            raise DataError(
                f"{container.path}: {key}/indptr does not ascend from 0 by at most {num_per_row:,} (entry {bad:,}): "
                f"{_DAMAGED}"
            )
        end = int(part[-1])
    if end != length["data"]:
        raise DataError(f"{container.path}: {key}/indptr ends at {end:,} of {length['data']:,} values: {_DAMAGED}")


def looks_like_counts(container: Container, key: str, shape: tuple[int, int]) -> bool:
    """Whether the first values of a matrix are counts; False for what is no matrix of numbers of this shape."""
    form = form_of(container, key)
    values = key if form == "dense" else f"{key}/data"
    if form is None or values not in container:
        return False
    stored, dtype = container.shape_and_dtype(values)
    if dtype.kind not in "biuf" or len(stored) != (2 if form == "dense" else 1):
        return False
    if form == "dense":
        check_matrix(container, key, form, shape)  # before a row of any length is read
    num_rows = _LOOK_AT if form != "dense" else max(1, _LOOK_AT // max(1, shape[1]))
    array = container.array(values, "biuf", len(stored))
    first = container.read(values, array, 0, min(num_rows, stored[0]))
    return first_not_a_count(np.ravel(_as_values(first))) is None


def _shape_attribute(container: Container, key: str) -> tuple[int, int]:
    attributes = container.attributes(key)
    with refusing(container.path, f"the shape of {key}"):
        shape = np.ravel(attributes.get("shape", attributes.get("h5sparse_shape", ())))
    if len(shape) != 2 or shape.dtype.kind not in "iu":
        raise DataError(f"{container.path}: {key} has no shape of two whole numbers: {_DAMAGED}")
    return int(shape[0]), int(shape[1])


def _csr_blocks(container: Container, key: str, num_columns: int, start: int, stop: int) -> Iterator[RawBlock]:
    data = container.array(f"{key}/data", "biuf")
    indices = container.array(f"{key}/indices", "iu")
    indptr = _indptr(container, key, start, stop + 1)
    for first, last in block_edges(indptr):
        low, high = int(indptr[first]), int(indptr[last])
        columns = container.read(f"{key}/indices", indices, low, high)
        if len(columns) and (columns.min() < 0 or columns.max() >= num_columns):
            raise DataError(
                f"{container.path}: {key} has a gene index outside 0..{num_columns - 1} in the cells from row "
                f"{start + first} on: {_DAMAGED}"
            )
        values = _as_values(container.read(f"{key}/data", data, low, high))
        part = (indptr[first : last + 1] - low).astype(np.int32)
        yield (
            start + first,
            sp.csr_matrix((values, columns.astype(np.int32), part), shape=(last - first, num_columns)),
        )


def _dense_blocks(container: Container, key: str, num_columns: int, start: int, stop: int) -> Iterator[RawBlock]:
    array = container.array(key, "biuf", num_axes=2)
    rows = _whole_chunks(max(1, DENSE_PER_READ // max(1, num_columns)), array.chunks)
    while start < stop:
        end = min(stop, (start // rows + 1) * rows)  # where a chunk ends, whatever the first cell
        slab = sp.csr_matrix(_as_values(container.read(key, array, start, end)))
        for first, last in block_edges(slab.indptr):
            yield start + first, slab[first:last]
        start = end


def _whole_chunks(rows: int, chunks: tuple[int, ...] | None) -> int:
    """So many rows, or a few less, that no chunk is decompressed twice."""
    return rows if not chunks or rows < chunks[0] else rows - rows % chunks[0]


def _indptr(container: Container, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    array = container.array(f"{key}/indptr", "iu")
    return container.read(f"{key}/indptr", array, start, stop).astype(np.int64)


def _csc_entries(container: Container, key: str, shape: tuple[int, int]) -> Iterator[Entries]:
    data = container.array(f"{key}/data", "biuf")
    indices = container.array(f"{key}/indices", "iu")
    indptr = _indptr(container, key)
    for first in range(0, int(indptr[-1]), _SENT_AT_A_TIME):
        last = min(first + _SENT_AT_A_TIME, int(indptr[-1]))
        columns = np.searchsorted(indptr, np.arange(first, last), side="right") - 1
        cells = container.read(f"{key}/indices", indices, first, last)
        if cells.min() < 0 or cells.max() >= shape[0]:
            raise DataError(f"{container.path}: {key} has a cell index outside 0..{shape[0] - 1}: {_DAMAGED}")
        yield cells.astype(np.int64), columns, _as_values(container.read(f"{key}/data", data, first, last))


def _as_values(values: np.ndarray) -> np.ndarray:
    return values.astype(_value_dtype(values.dtype), copy=False)


def _value_dtype(stored: np.dtype) -> np.dtype:
    """What values are computed with: half precision cannot be compared with the largest count."""
    if stored.kind == "f" and stored.itemsize not in (4, 8):
        return np.dtype(np.float32 if stored.itemsize == 2 else np.float64)
    return stored.newbyteorder("=")
