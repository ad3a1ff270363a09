"""Tokens as WebDataset tars: shards/cells-00000.tar and so on, which plain `webdataset` reads without this package.

A sample is a block of 64 consecutive cells (fewer at the end), named by the row of its first cell, in three arrays
that NumPy reads without pickle:

    000000000064.counts.npy    (tokens,) counts, 1 or more
    000000000064.genes.npy     (tokens,) genes as positions in cells.zarr/var, ascending within a cell
    000000000064.indptr.npy    int32 (cells + 1,): the tokens of its cell i are indptr[i] .. indptr[i + 1] - 1

One cell a sample would be read 18 times more slowly. What belongs to cells, such as their split, their source and
their metadata, is in cells.zarr/obs at the same rows. Our own reader does not parse the tar: beside each is
cells-00000.index.npy, with a record a sample: where it lies and its CRC-32C, headers included, so that every byte is
checked when it is decoded. The bytes depend on the tokens alone: no time, no user.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import zarr

from cctrain.data.store.layout import SHARDS, Layout, cells_folder, partial_name, shards_folder
from cctrain.data.store.manifest import Manifest, check_whole
from cctrain.data.store.shards_zarr import write_indptr
from cctrain.errors import DataError

TABLE = "uns/shards"  # in cells.zarr: indptr, rows, cells_per_block
_INDEX_RECORD = np.dtype([("start", "<u8"), ("counts", "<u8"), ("genes", "<u8"), ("stop", "<u8"), ("crc32c", "<u4")])
_TAR_RECORD = 512  # headers are one, contents are padded to whole ones


# ---- writing


def shard_edges(layout: Layout) -> np.ndarray:
    """int64 (shards + 1,): the tokens of shard i are edges[i] .. edges[i + 1] - 1. A shard is whole blocks."""
    return layout.indptr[_shard_rows(layout)]


def create(root: Path, layout: Layout) -> None:
    shards_folder(root).mkdir(exist_ok=True)


def write_shard(root: Path, layout: Layout, shard: int, genes: np.ndarray, counts: np.ndarray) -> None:
    """A tar and its index, each renamed into its place when it is complete, the tar last."""
    from webdataset import TarWriter  # imports torch: over a second

    first, last = _shard_rows(layout)[shard : shard + 2].tolist()
    genes, counts = (
        values.astype(dtype.newbyteorder("<"), copy=False)
        for values, dtype in ((genes, layout.genes_dtype), (counts, layout.counts_dtype))
    )
    tar, index_file = tar_path(root, shard), index_path(root, shard)
    partial = partial_name(tar)
    index = np.zeros(-(-(last - first) // layout.cells_per_block), dtype=_INDEX_RECORD)
    with partial.open("wb") as stream, TarWriter(stream, encoder=False, user="", group="", mtime=0) as writer:
        position = 0
        for record, row in zip(index, range(first, last, layout.cells_per_block), strict=True):
            indptr = layout.indptr[row : min(row + layout.cells_per_block, last) + 1]
            tokens = slice(*(indptr[[0, -1]] - layout.indptr[first]))
            arrays = {"counts": counts[tokens], "genes": genes[tokens], "indptr": (indptr - indptr[0]).astype("<i4")}
            members = {f"{name}.npy": _npy(array) for name, array in arrays.items()}
            writer.write({"__key__": f"{row:012d}", **members})
            record["start"] = position
            for name, content in zip(arrays, members.values(), strict=True):  # a tar writer sorts them by name
                if name != "indptr":
                    record[name] = position + _TAR_RECORD + len(content) - arrays[name].nbytes
                position += _TAR_RECORD + _padded(len(content))
            record["stop"] = position
    with partial.open("rb") as written:
        for record in index:
            written.seek(int(record["start"]))
            record["crc32c"] = google_crc32c.value(written.read(int(record["stop"] - record["start"])))
    _write_atomically(index_file, _npy(index))
    partial.replace(tar)


def close(root: Path, layout: Layout) -> None:
    """What a reader must know of all shards, as a table of cells.zarr."""
    group = zarr.open_group(cells_folder(root), mode="a", zarr_format=3)
    table = group.require_group(TABLE)
    table.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    for name in list(table):
        del table[name]
    write_indptr(table, layout)
    table.create_array("rows", data=_shard_rows(layout))
    table.create_array("cells_per_block", data=np.array([layout.cells_per_block]))
    for array in table.array_values():
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def tar_path(root: Path, shard: int) -> Path:
    return shards_folder(root) / f"cells-{shard:05d}.tar"


def index_path(root: Path, shard: int) -> Path:
    return shards_folder(root) / f"cells-{shard:05d}.index.npy"


def _block_rows(num_cells: int, cells_per_block: int) -> np.ndarray:
    """int64 (blocks + 1,): first row of every block."""
    return np.append(np.arange(0, num_cells, cells_per_block), num_cells)


def _shard_rows(layout: Layout) -> np.ndarray:
    """int64 (shards + 1,): first row of every shard, the block where another `tokens_per_shard` tokens are full."""
    rows = _block_rows(layout.num_cells, layout.cells_per_block)
    full = np.arange(0, max(1, layout.num_tokens), layout.tokens_per_shard)
    cuts = np.searchsorted(layout.indptr[rows], full)
    return rows[np.unique(np.append(cuts, len(rows) - 1))]


def _npy(array: np.ndarray) -> bytes:
    with io.BytesIO() as stream:
        np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
        return stream.getvalue()


def _padded(length: int) -> int:
    return -(-length // _TAR_RECORD) * _TAR_RECORD


def _write_atomically(file: Path, content: bytes) -> None:
    partial = partial_name(file)
    partial.write_bytes(content)
    partial.replace(file)


# ---- reading


class TarShards:
    """Chunks are the blocks of cells, in the order of the shards."""

    def __init__(self, root: Path, manifest: Manifest, indptr: np.ndarray, rows: np.ndarray, block: int) -> None:
        """`rows` int64 (shards + 1,) and `block`, cells a block, are what `close` left."""
        self._root, self._manifest = root, manifest
        starts = _block_rows(len(indptr) - 1, block)
        self.edges = indptr[starts]
        self.genes_dtype, self.counts_dtype = (np.dtype(manifest["dtypes"][name]) for name in ("genes", "counts"))
        self._first_block = np.searchsorted(starts, rows)
        self._indices: dict[int, np.ndarray] = {}

    def decode(self, first: int, last: int, genes: np.ndarray, counts: np.ndarray) -> None:
        """Blocks first .. last - 1 into the two arrays; DataError names the shard that is damaged."""
        before = int(self.edges[first])
        for shard, blocks in self._blocks_by_shard(first, last):
            file, index = tar_path(self._root, shard), self._index(shard)
            try:
                descriptor = os.open(file, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{file}: {error.strerror}, since the store was opened: copy it again.") from error
            try:
                for block in blocks:
                    record = index[block - self._first_block[shard]]
                    tokens = slice(int(self.edges[block]) - before, int(self.edges[block + 1]) - before)
                    if not _read_sample(descriptor, record, genes[tokens], counts[tokens]):
                        raise DataError(
                            f"{file}: the sample at byte {record['start']:,} is not the one that was written "
                            f"(CRC-32C): the store is damaged. Run `cctrain inspect {self._root} --verify` for all "
                            "damage, then prepare it again."
                        )
            finally:
                os.close(descriptor)

    def _blocks_by_shard(self, first: int, last: int) -> Iterator[tuple[int, range]]:
        shard = int(np.searchsorted(self._first_block, first, side="right")) - 1
        while first < last:
            stop = min(last, int(self._first_block[shard + 1]))
            yield shard, range(first, stop)
            first, shard = stop, shard + 1

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._indices:
            file = index_path(self._root, shard)
            check_whole(self._root, self._manifest, [f"{SHARDS}/{file.name}"])
            try:
                index = np.load(file, allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise DataError(f"{file}: not an index of a shard ({error}): prepare the store again.") from error
            if index.dtype != _INDEX_RECORD or index.shape != (np.diff(self._first_block)[shard],):
                raise DataError(f"{file}: not the index of its shard: prepare the store again.")
            self._indices[shard] = index
        return self._indices[shard]


def _read_sample(descriptor: int, record: np.void, genes: np.ndarray, counts: np.ndarray) -> bool:
    """A sample into the two arrays; whether it is what was written.

    One call reads the payloads to their places and the headers around them to a side, for the checksum.
    """
    start, counts_at, genes_at, stop = (int(record[name]) for name in ("start", "counts", "genes", "stop"))
    gaps = [counts_at - start, genes_at - counts_at - counts.nbytes, stop - genes_at - genes.nbytes]
    if min(gaps) < 0 or stop > os.fstat(descriptor).st_size:
        return False
    head, middle, end = (np.empty(gap, dtype=np.uint8) for gap in gaps)
    parts = [part.view(np.uint8) for part in (head, counts, middle, genes, end)]
    if os.preadv(descriptor, [part.data for part in parts], start) != stop - start:
        return False
    crc = 0
    for part in parts:
        crc = google_crc32c.extend(crc, part)
    return crc == int(record["crc32c"])
