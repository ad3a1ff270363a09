"""The token store, written: shuffled cells in, Zarr shards, manifest and digests out.

A shard is a file of 2^26 tokens, 134 MB raw and 30-60 MB compressed for genes, less for counts: few files on
a parallel file system, and a shard in the making fits in memory. A chunk inside is 2^16 tokens (128 KiB),
about 30 whole cells: a block of 64 cells reads three chunks, one random cell one or two. Blosc with zstd and
bitshuffle was the smallest of the codecs tried on counts (184 MB against 247 for lz4 and 502 raw), and crc32c
makes damage an error and not a wrong cell. Compression runs on one thread: with several, Blosc's bytes depend
on their timing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata
import numcodecs.blosc
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

from cctrain.data.store import ContentDigest

TOKENS_PER_CHUNK = 2**16
TOKENS_PER_SHARD = 2**26
LARGEST_STORED_COUNT = 2**16 - 1


def smallest_unsigned(largest: int) -> np.dtype:
    return np.min_scalar_type(int(largest))


class CellWriter:
    """Appends cells to X of a new `cells.zarr`, shard by shard."""

    def __init__(self, root: Path, num_cells: int, num_tokens: int, num_genes: int, largest_count: int) -> None:
        self.group = zarr.open_group(root, mode="w", zarr_format=3)
        self.group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        self.counts_dtype = smallest_unsigned(min(largest_count, LARGEST_STORED_COUNT))
        self.genes_dtype = smallest_unsigned(num_genes - 1)
        matrix = self.group.create_group("X")
        matrix.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [num_cells, num_genes]}
        )
        self._matrix = matrix
        self._shard = min(TOKENS_PER_SHARD, -(-max(num_tokens, 1) // TOKENS_PER_CHUNK) * TOKENS_PER_CHUNK)
        self._counts = self._array("data", num_tokens, self.counts_dtype)
        self._genes = self._array("indices", num_tokens, self.genes_dtype)
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._num_pending = 0
        self._written = 0
        self._num_tokens: list[np.ndarray] = []
        self._digest = ContentDigest()
        self.num_clipped = 0

    @property
    def num_shards(self) -> int:
        return -(-self._counts.shape[0] // self._shard)

    def append(self, cells: sp.csr_matrix, source: np.ndarray) -> sp.csr_matrix:
        """Cells (num, V) with int64 counts, in store order; returns them as stored, counts clipped."""
        self.num_clipped += int((cells.data > LARGEST_STORED_COUNT).sum())
        cells.data = np.minimum(cells.data, LARGEST_STORED_COUNT)
        num_tokens = np.diff(cells.indptr).astype(np.int64)
        self._digest.add(num_tokens, source, cells.indices, cells.data)
        self._num_tokens.append(num_tokens)
        self._pending.append((cells.indices.astype(self.genes_dtype), cells.data.astype(self.counts_dtype)))
        self._num_pending += len(cells.data)
        while self._num_pending >= self._shard:
            self._flush(self._shard)
        return cells

    def close(self) -> np.ndarray:
        """Write what is left and the index of cells; the number of tokens of every cell."""
        if self._num_pending:
            self._flush(self._num_pending)
        num_tokens = np.concatenate(self._num_tokens)
        indptr = np.concatenate([[0], np.cumsum(num_tokens)]).astype(np.int64)
        assert indptr[-1] == self._written == self._counts.shape[0], "the cells do not have the tokens announced"
        self._array("indptr", len(indptr), np.dtype(np.int64))[:] = indptr
        return num_tokens

    def digest(self, gene_ids: list[str], measured: np.ndarray, num_train: int) -> str:
        return self._digest.hexdigest(gene_ids, measured, num_train)

    def _array(self, name: str, length: int, dtype: np.dtype) -> zarr.Array:
        shard = self._shard if name != "indptr" else -(-length // TOKENS_PER_CHUNK) * TOKENS_PER_CHUNK
        return self._matrix.create_array(
            name,
            shape=(length,),
            dtype=dtype,
            chunks=(TOKENS_PER_CHUNK,),
            shards=(shard,),
            compressors=[BloscCodec(cname="zstd", clevel=5, shuffle=BloscShuffle.bitshuffle), Crc32cCodec()],
        )

    def _flush(self, length: int) -> None:
        genes = np.concatenate([pair[0] for pair in self._pending])
        counts = np.concatenate([pair[1] for pair in self._pending])
        into = slice(self._written, self._written + length)
        with one_blosc_thread():
            self._genes[into] = genes[:length]
            self._counts[into] = counts[:length]
        self._written += length
        self._pending = [(genes[length:], counts[length:])]
        self._num_pending -= length


def write_tables(
    group: zarr.Group, var: pd.DataFrame, measured: np.ndarray, loadings: np.ndarray, obs: pd.DataFrame
) -> None:
    """The rest of the AnnData: var (index gene id), varm measured (V, num_sources) and loadings, obs, empty slots."""
    with one_blosc_thread(), anndata.settings.override(auto_shard_zarr_v3=True):
        anndata.io.write_elem(group, "var", var)
        anndata.io.write_elem(group, "obs", obs)
        anndata.io.write_elem(group, "varm", {"measured": measured.T, "loadings": loadings})
        for slot in ("obsm", "obsp", "varp", "layers", "uns"):
            anndata.io.write_elem(group, slot, {})


@contextmanager
def one_blosc_thread() -> Iterator[None]:
    before = numcodecs.blosc.use_threads
    numcodecs.blosc.use_threads = False
    try:
        yield
    finally:
        numcodecs.blosc.use_threads = before
