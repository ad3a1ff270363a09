"""Tokens as the two arrays of a CSR matrix in Zarr v3: cells.zarr/X/indices (genes) and X/data (counts), sharded.

Blosc with lz4; the bytes of genes are shuffled, of counts the bits: for counts these pack a quarter better, for genes
no better, and are read in twice the time. Zstd packs a sixth to a fifth better, and takes twice the time to read.
CRC-32C makes damage an error and not a wrong cell. Compression runs on one thread: with several, Blosc's bytes depend
on their timing.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
import zarr
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

from cctrain.data.store.layout import Layout, cells_folder
from cctrain.errors import DataError

_CHUNKS_FOR_A_THREAD = 8  # from so many on, their halves are decoded side by side
_CHUNKS_AT_ONCE = 8  # in a call to the system; then they are in the cache when they are checked
_CRC_BYTES = 4


# ---- writing


def shard_edges(layout: Layout) -> np.ndarray:
    """int64 (shards + 1,): the tokens of shard i are edges[i] .. edges[i + 1] - 1. A store has at least one."""
    size = _tokens_per_shard(layout)
    num_shards = max(1, -(-layout.num_tokens // size))
    return np.minimum(np.arange(num_shards + 1) * size, layout.num_tokens)


def create(root: Path, layout: Layout) -> None:
    """X without values; what is already there stays."""
    matrix = zarr.open_group(cells_folder(root) / "X", mode="a", zarr_format=3)
    shape = [layout.num_cells, layout.num_genes]
    matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
    for name, dtype in (("data", layout.counts_dtype), ("indices", layout.genes_dtype)):
        if name not in matrix:
            _create_array(matrix, name, layout.num_tokens, dtype, _tokens_per_shard(layout), layout)


def write_shard(root: Path, layout: Layout, shard: int, genes: np.ndarray, counts: np.ndarray) -> None:
    """One file of each array; zarr writes a file beside its place and renames it."""
    start, stop = shard_edges(layout)[shard : shard + 2].tolist()
    for name, values, dtype in (("indices", genes, layout.genes_dtype), ("data", counts, layout.counts_dtype)):
        # Zarr would leave out a chunk of zeros, which is all that a vocabulary of one gene has.
        with one_blosc_thread(), zarr.config.set({"array.write_empty_chunks": True}):
            array = zarr.open_array(cells_folder(root) / "X" / name, mode="r+", zarr_format=3)
            array[start:stop] = values.astype(dtype, copy=False)


def close(root: Path, layout: Layout) -> None:
    """The index of cells, whose last entry ends the last shard."""
    matrix = zarr.open_group(cells_folder(root) / "X", mode="a", zarr_format=3)
    if "indptr" in matrix:
        del matrix["indptr"]
    write_indptr(matrix, layout)


def write_indptr(group: zarr.Group, layout: Layout) -> None:
    """`indptr`, as one file."""
    length = len(layout.indptr)
    whole = -(-length // layout.tokens_per_chunk) * layout.tokens_per_chunk
    array = _create_array(group, "indptr", length, np.dtype(np.int64), whole, layout)
    with one_blosc_thread():
        array[:] = layout.indptr


def _tokens_per_shard(layout: Layout) -> int:
    """Shards are whole chunks; a small store has one shard, which is no larger than its tokens need."""
    whole = -(-max(layout.num_tokens, 1) // layout.tokens_per_chunk) * layout.tokens_per_chunk
    return min(layout.tokens_per_shard, whole)


def _create_array(group: zarr.Group, name: str, length: int, dtype: np.dtype, shard: int, layout: Layout) -> zarr.Array:
    shuffle = BloscShuffle.bitshuffle if name == "data" else BloscShuffle.shuffle
    blosc = BloscCodec(cname="lz4", clevel=5, shuffle=shuffle)
    return group.create_array(
        name,
        shape=(length,),
        dtype=dtype,
        chunks=(layout.tokens_per_chunk,),
        shards=(shard,),
        compressors=[blosc, Crc32cCodec()] if layout.compressed else [Crc32cCodec()],
    )


@contextmanager
def one_blosc_thread() -> Iterator[None]:
    before = numcodecs.blosc.use_threads
    numcodecs.blosc.use_threads = False
    try:
        yield
    finally:
        numcodecs.blosc.use_threads = before


# ---- reading


class ZarrShards:
    """Chunks of equal size; a shard is a file of each of the two arrays.

    The files are read directly, as the specification of the sharding codec lays them out: about as fast as the Rust
    codecs of `zarrs` are, and twice as fast as zarr-python (`tools/bench_data.py`).
    """

    def __init__(self, root: Path, indptr: np.ndarray) -> None:
        self._root = root
        self._genes, self._counts = (
            _ShardedArray.open(cells_folder(root) / "X" / name) for name in ("indices", "data")
        )
        size, total = self._genes.tokens_per_chunk, int(indptr[-1])
        self.edges = np.minimum(np.arange(-(-total // size) + 1) * size, total)
        self.genes_dtype, self.counts_dtype = self._genes.dtype, self._counts.dtype

    def decode(self, first: int, last: int, genes: np.ndarray, counts: np.ndarray) -> None:
        """Chunks first .. last - 1 into the two arrays; DataError names the shard that is damaged."""
        with one_blosc_thread():
            if last - first < _CHUNKS_FOR_A_THREAD:
                self._read_both(first, last, genes, counts)
                return
            middle = (first + last) // 2  # genes and counts do not take the same time, but halves do
            cut = int(self.edges[middle] - self.edges[first])
            beside = _thread_of(os.getpid()).submit(self._read_both, first, middle, genes[:cut], counts[:cut])
            try:
                self._read_both(middle, last, genes[cut:], counts[cut:])
            finally:
                beside.result()

    def _read_both(self, first: int, last: int, genes: np.ndarray, counts: np.ndarray) -> None:
        self._read(self._genes, first, last, genes)
        self._read(self._counts, first, last, counts)

    def _read(self, array: "_ShardedArray", first: int, last: int, out: np.ndarray) -> None:
        for shard in range(first // array.chunks_per_shard, -(-last // array.chunks_per_shard)):
            before = shard * array.chunks_per_shard
            chunks = range(max(first, before), min(last, before + array.chunks_per_shard))
            place = (chunks.start - first) * array.tokens_per_chunk
            try:
                array.read(shard, range(chunks.start - before, chunks.stop - before), out[place:])
            except (ValueError, RuntimeError, OSError, OverflowError, MemoryError) as error:
                raise DataError(
                    f"{array.file(shard)}: cannot be decoded ({error}): the store is damaged. Run "
                    f"`cctrain inspect {self._root} --verify` for all damage, then prepare it again."
                ) from error


@cache
def _thread_of(process: int) -> ThreadPoolExecutor:
    """One for all reading of a process: to start one takes a quarter of a millisecond, and a fork leaves it behind."""
    return ThreadPoolExecutor(1, thread_name_prefix="decoding")


@dataclass(frozen=True)
class _ShardedArray:
    """An array that `_create_array` made. Its shards end with an index: offset and length of each chunk, CRC-32C."""

    folder: Path
    dtype: np.dtype
    tokens_per_chunk: int
    chunks_per_shard: int
    compressed: bool

    @classmethod
    def open(cls, folder: Path) -> "_ShardedArray":
        array = zarr.open_array(folder, mode="r", zarr_format=3)
        codecs = [codec["name"] for codec in _inner_codecs(array)]
        if array.shards is None or codecs not in (["bytes", "blosc", "crc32c"], ["bytes", "crc32c"]):
            raise DataError(f"{folder}: coded by {codecs}, which cctrain does not write: prepare the store again.")
        dtype = np.dtype(array.dtype).newbyteorder("<")
        return cls(folder, dtype, array.chunks[0], array.shards[0] // array.chunks[0], "blosc" in codecs)

    def file(self, shard: int) -> Path:
        return self.folder / "c" / str(shard)

    def read(self, shard: int, chunks: range, out: np.ndarray) -> None:
        """Chunks of one shard to the start of `out`, which may end within the last; ValueError if one is damaged."""
        places = [out[first : first + self.tokens_per_chunk] for first in range(0, len(out), self.tokens_per_chunk)]
        places = places[: len(chunks)]
        end = places[-1]
        if len(end) < self.tokens_per_chunk:  # the end of the array: its last chunk is filled up
            places[-1] = np.empty(self.tokens_per_chunk, dtype=self.dtype)
        with self.file(shard).open("rb", buffering=0) as stream:
            descriptor, size = stream.fileno(), os.fstat(stream.fileno()).st_size
            index_bytes = 16 * self.chunks_per_shard + _CRC_BYTES
            index = np.frombuffer(_pread(descriptor, index_bytes, size - index_bytes), dtype=np.uint8)
            _check(index[:-_CRC_BYTES], index[-_CRC_BYTES:])
            spans = index[:-_CRC_BYTES].view("<u8").reshape(-1, 2)[chunks.start : chunks.stop].tolist()
            for number, (offset, length) in zip(chunks, spans, strict=True):
                if offset + length > size or length <= _CRC_BYTES:
                    raise ValueError(f"chunk {number} lies beyond the end")
            for first, last in _adjacent(spans):
                read = self._decompress if self.compressed else self._copy
                read(descriptor, spans[first:last], places[first:last])
        if places[-1] is not end:
            end[:] = places[-1][: len(end)]

    def _decompress(self, descriptor: int, spans: list[tuple[int, int]], places: list[np.ndarray]) -> None:
        (first, _), (last, length) = spans[0], spans[-1]
        encoded = np.frombuffer(_pread(descriptor, last + length - first, first), dtype=np.uint8)
        for (offset, length), place in zip(spans, places, strict=True):
            chunk = encoded[offset - first : offset - first + length]
            _check(chunk[:-_CRC_BYTES], chunk[-_CRC_BYTES:])
            numcodecs.blosc.decompress(chunk[:-_CRC_BYTES], place)

    def _copy(self, descriptor: int, spans: list[tuple[int, int]], places: list[np.ndarray]) -> None:
        checksums = np.empty((len(places), _CRC_BYTES), dtype=np.uint8)
        if any(length != place.nbytes + _CRC_BYTES for (_, length), place in zip(spans, places, strict=True)):
            raise ValueError("it is too short")
        buffers = [part.data for pair in zip(places, checksums, strict=True) for part in pair]
        if os.preadv(descriptor, buffers, spans[0][0]) != sum(length for _, length in spans):
            raise ValueError("it is too short")
        for place, checksum in zip(places, checksums, strict=True):
            _check(place, checksum)


def _adjacent(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Offsets and lengths that follow each other without a gap, as ranges of their numbers."""
    first = 0
    for last in range(1, len(spans) + 1):
        if last == len(spans) or last - first == _CHUNKS_AT_ONCE or sum(spans[last - 1]) != spans[last][0]:
            yield first, last
            first = last


def _inner_codecs(array: zarr.Array) -> list[dict[str, Any]]:
    """Of the chunks inside a shard; none where there are no shards."""
    metadata: dict[str, Any] = dict(array.metadata.to_dict())
    return metadata["codecs"][0]["configuration"].get("codecs", [])


def _pread(descriptor: int, length: int, offset: int) -> bytes:
    """So many bytes of a file; ValueError where it ends before."""
    content = os.pread(descriptor, length, offset) if offset >= 0 else b""
    if len(content) != length:
        raise ValueError("it is too short")
    return content


def _check(content: np.ndarray, checksum: np.ndarray) -> None:
    if google_crc32c.value(content) != int.from_bytes(checksum.tobytes(), "little"):
        raise ValueError("its CRC-32C does not match")
