"""Re-ordering more counts than memory holds: entries go to files by row range, then come back range by range.

Serves twice: to turn a matrix that is stored by gene (CSC, Matrix Market in any order) into blocks of cells,
and to shuffle cells when a store is written. It does not sort on disk and merges nothing: a range must fit
in memory, which whoever chooses the ranges sees to.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

MAX_OPEN_FILES = 512  # half of the usual limit of 1,024 for a process


class Buckets:
    """Files of (row, gene, value) entries, one file for each of the row ranges edges[i] .. edges[i+1] - 1.

    `edges` is ascending, from 0 to the number of rows. A range holds fewer than 2**32 rows.
    """

    def __init__(self, directory: Path, edges: np.ndarray, value_dtype: np.dtype | type) -> None:
        self.edges = np.asarray(edges, dtype=np.int64)
        if len(self) > MAX_OPEN_FILES:
            raise ValueError(f"{len(self)} row ranges: at most {MAX_OPEN_FILES} files are kept open")
        self._entry = np.dtype([("row", "<u4"), ("gene", "<u4"), ("value", np.dtype(value_dtype).newbyteorder("<"))])
        directory.mkdir(parents=True, exist_ok=True)
        self._paths = [directory / f"bucket-{i:05d}" for i in range(len(self))]
        self._files = [path.open("wb") for path in self._paths]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def append(self, rows: np.ndarray, genes: np.ndarray, values: np.ndarray) -> None:
        """Entries in any order; those of one row keep theirs."""
        bucket = np.searchsorted(self.edges, rows, side="right") - 1
        order = np.argsort(bucket, kind="stable")
        bucket = bucket[order]
        entries = np.empty(len(order), dtype=self._entry)
        entries["row"] = rows[order] - self.edges[bucket]
        entries["gene"] = genes[order]
        entries["value"] = values[order]
        cuts = np.searchsorted(bucket, np.arange(len(self) + 1))
        for i in np.unique(bucket):
            self._files[i].write(entries[cuts[i] : cuts[i + 1]].data)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def read(self, bucket: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (int64, from the first of the range), genes (int64) and values of one range, as appended."""
        entries = np.fromfile(self._paths[bucket], dtype=self._entry)
        return entries["row"].astype(np.int64), entries["gene"].astype(np.int64), entries["value"].copy()

    def drain(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
        """(first row, one past the last, rows, genes, values) of every range; used files are deleted."""
        self.close()
        for i in range(len(self)):
            yield (int(self.edges[i]), int(self.edges[i + 1]), *self.read(i))
            self._paths[i].unlink()

    def __enter__(self) -> "Buckets":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def even_edges(num_rows: int, num_entries: int, entries_per_bucket: int) -> np.ndarray:
    """Ranges of equally many rows, about `entries_per_bucket` entries each: for rows of unknown size."""
    num_buckets = int(np.clip(-(-num_entries // entries_per_bucket), 1, MAX_OPEN_FILES))
    return np.unique(np.linspace(0, num_rows, num_buckets + 1).astype(np.int64))


def weighted_edges(sizes: np.ndarray, entries_per_bucket: int) -> np.ndarray:
    """Ranges of rows of the given sizes with about `entries_per_bucket` entries each."""
    ends = np.cumsum(sizes, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    num_buckets = int(np.clip(-(-total // entries_per_bucket), 1, MAX_OPEN_FILES))
    inner = np.searchsorted(ends, total * np.arange(1, num_buckets) / num_buckets)
    return np.unique(np.concatenate([[0], inner, [len(sizes)]]).astype(np.int64))
