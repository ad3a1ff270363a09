"""A matrix whose entries come in any order, put in order of cells on disk: complete or absent, and found again.

Entries go to files by range of cells (12 or 16 bytes each), then range after range is sorted in memory and
appended to three plain files: `indptr` (int64), `columns` (uint32) and `values` (as they came). A range that is
too large for memory is divided again first, so memory is bounded whatever the matrix. Two processes that need
the same matrix do not do it twice: one waits for the other.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from cctrain.data.files import sync_to_disk
from cctrain.data.sources import raw_blocks
from cctrain.data.sources.raw_blocks import RawBlock, block_edges, even_pieces
from cctrain.errors import DataError

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # cells, columns, values

_MAX_OPEN_FILES = 256  # a quarter of the usual limit of 1,024 for a process
_COLUMNS_DTYPE = np.dtype("<u4")
_INDPTR_DTYPE = np.dtype("<i8")


def arranged(
    scratch: Path | None,
    path: Path,
    key: str,
    shape: tuple[int, int],
    num_entries: int,
    value_dtype: np.dtype,
    entries: Callable[[], Iterable[Entries]],
) -> "ByCell":
    """The matrix `key` of the file or directory `path`, whose entries `entries()` yields, by cell.

    It lies in a directory of `scratch`, and is taken as it is if it is there already and the files have not
    changed since. Without `scratch` it is temporary and lives as long as the result. `num_entries` is only used to
    choose ranges of cells. Fewer than 2**32 cells. Raises DataError for a cell that memory might not hold.
    """
    if scratch is None:
        folder = tempfile.mkdtemp(prefix="cctrain-by-cell-")
        try:
            _arrange(Path(folder, "matrix"), f"{path}: {key}", shape, num_entries, value_dtype, entries)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        matrix = ByCell(Path(folder, "matrix"), shape)
        weakref.finalize(matrix, shutil.rmtree, folder, ignore_errors=True)
        return matrix
    scratch.mkdir(parents=True, exist_ok=True)
    identity = hashlib.sha256(f"{key} of {file_identity([path])}".encode()).hexdigest()
    done = scratch / f"by-cell-{identity[:24]}"
    if not done.is_dir():
        with done.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, or its process is dead
            if not done.is_dir():
                _arrange(done, f"{path}: {key}", shape, num_entries, value_dtype, entries)
    return ByCell(done, shape)


def file_identity(paths: list[Path]) -> str:
    """The same text for the same files as long as nobody writes to them."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return json.dumps([_status(file) for file in files])


def _status(file: Path) -> tuple[str, int, int]:
    try:
        status = file.stat()
        return str(file.resolve()), status.st_size, status.st_mtime_ns
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise DataError(f"{file}: a link that leads nowhere; copy what it should lead to in its place.") from error


class ByCell:
    """Reads what `arranged` left in `directory`. The files are opened for each reading."""

    def __init__(self, directory: Path, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._directory = directory
        self._value_dtype = np.dtype(json.loads((directory / "values.json").read_text()))

    def blocks(self, start: int, stop: int) -> Iterator[RawBlock]:
        indptr = self._read("indptr", _INDPTR_DTYPE, start, stop + 1)
        for first, last in block_edges(indptr):
            low, high = int(indptr[first]), int(indptr[last])
            values = self._read("values", self._value_dtype, low, high)
            columns = self._read("columns", _COLUMNS_DTYPE, low, high).astype(np.int32)
            part = (indptr[first : last + 1] - low).astype(np.int32)
            yield start + first, sp.csr_matrix((values, columns, part), shape=(last - first, self.shape[1]))

    def piece_edges(self, counts_per_piece: int) -> np.ndarray:
        return even_pieces(self._read("indptr", _INDPTR_DTYPE, 0, self.shape[0] + 1), counts_per_piece)

    def _read(self, name: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        # Not a memory map: its pages would count as memory of the process.
        return np.fromfile(self._directory / name, dtype, count=stop - start, offset=start * dtype.itemsize)


def _arrange(
    done: Path,
    name: str,
    shape: tuple[int, int],
    num_entries: int,
    value_dtype: np.dtype,
    entries: Callable[[], Iterable[Entries]],
) -> None:
    partial = done.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: we hold the lock
    partial.mkdir()
    try:
        ranges = _Ranges(partial / "ranges", 0, shape[0], num_entries, value_dtype)
        for cells, columns, values in entries():
            ranges.add(cells, columns, values)
        with (partial / "columns").open("wb") as columns_file, (partial / "values").open("wb") as values_file:
            lengths = np.zeros(shape[0], dtype=np.int64)
            for first, last, part in ranges.sorted(name, shape[1]):
                lengths[first:last] = np.bincount(part["cell"], minlength=last - first)
                columns_file.write(part["column"].astype(_COLUMNS_DTYPE).data)
                values_file.write(part["value"].copy().data)
        np.concatenate([[0], np.cumsum(lengths)]).astype(_INDPTR_DTYPE).tofile(partial / "indptr")
        (partial / "values.json").write_text(json.dumps(value_dtype.newbyteorder("<").str))
        (partial / "ranges").rmdir()
        for file in sorted(partial.iterdir()):
            sync_to_disk(file)
        os.rename(partial, done)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class _Ranges:
    """Files of entries, one a range of the cells first .. last - 1; about COUNTS_PER_BLOCK entries each if possible."""

    def __init__(self, folder: Path, first: int, last: int, num_entries: int, value_dtype: np.dtype) -> None:
        wanted = -(-num_entries // raw_blocks.COUNTS_PER_BLOCK)
        num_ranges = max(1, min(wanted, _MAX_OPEN_FILES, last - first))
        self._edges = first + (last - first) * np.arange(num_ranges + 1) // num_ranges
        self._entry = np.dtype([("cell", "<u4"), ("column", "<u4"), ("value", value_dtype.newbyteorder("<"))])
        self._folder = folder
        folder.mkdir()
        self._paths = [folder / f"{i:05d}" for i in range(num_ranges)]
        self._files = [path.open("wb") for path in self._paths]

    def add(self, cells: np.ndarray, columns: np.ndarray, values: np.ndarray) -> None:
        place = np.searchsorted(self._edges, cells, side="right") - 1
        order = np.argsort(place, kind="stable")
        entries = np.empty(len(order), dtype=self._entry)
        entries["cell"], entries["column"], entries["value"] = cells[order], columns[order], values[order]
        cuts = np.searchsorted(place[order], np.arange(len(self._files) + 1))
        for i in np.flatnonzero(np.diff(cuts)):
            self._files[i].write(entries[cuts[i] : cuts[i + 1]].data)

    def sorted(self, name: str, most_per_cell: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(first cell, one past the last, entries by cell and column, cells counted from the first) of all ranges.

        Raises DataError for a cell that memory might not hold, with more entries than there are columns.
        """
        for file in self._files:
            file.close()
        for i, path in enumerate(self._paths):
            first, last = int(self._edges[i]), int(self._edges[i + 1])
            num_entries = path.stat().st_size // self._entry.itemsize
            if num_entries > 2 * raw_blocks.COUNTS_PER_BLOCK and last - first > 1:
                yield from self._divided(path, first, last, num_entries, name, most_per_cell)
            elif num_entries > max(2 * raw_blocks.COUNTS_PER_BLOCK, most_per_cell):
                raise DataError(
                    f"{name} has {num_entries:,} values for {most_per_cell:,} genes in the cell of row {first:,}: the "
                    "file is damaged; copy it again from its origin."
                )
            else:
                entries = np.fromfile(path, self._entry)
                entries["cell"] -= np.uint32(first)
                path.unlink()
                yield first, last, entries[np.lexsort((entries["column"], entries["cell"]))]

    def _divided(
        self, path: Path, first: int, last: int, num_entries: int, name: str, most_per_cell: int
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        step = raw_blocks.COUNTS_PER_BLOCK
        folder = self._folder / f"{path.name}-parts"
        parts = _Ranges(folder, first, last, num_entries, self._entry["value"])
        for start in range(0, num_entries, step):
            piece = np.fromfile(path, self._entry, count=step, offset=start * self._entry.itemsize)
            parts.add(piece["cell"].astype(np.int64), piece["column"], piece["value"])
        path.unlink()
        yield from parts.sorted(name, most_per_cell)
        folder.rmdir()
