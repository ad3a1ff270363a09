"""The token store, read: cells as (gene, count) pairs, by row, from what `cctrain prepare` wrote.

    manifest.json   what the store holds, where it came from, and the digest of every file
    cells.zarr      Zarr v3, readable by `anndata.read_zarr`: X (CSR), var, varm["measured"], obs
    shards/         instead of X: WebDataset tars

Rows 0 .. num_train - 1 are the training cells, the rest is held out; both lie in shuffled order. Tokens are read in
chunks that are decoded once and kept up to CACHE_BYTES, so a small store ends up in memory and of a large one
only what is in use. Nothing here chooses cells or targets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import zarr

from cctrain.data.progress import progress
from cctrain.data.store import shards_webdataset, shards_zarr
from cctrain.data.store.chunk_cache import ChunkCache, Shards
from cctrain.data.store.content_digest import ContentDigest
from cctrain.data.store.layout import CELLS, Groups, cells_folder
from cctrain.data.store.manifest import Manifest, check_fields, check_files, check_whole, damaged_files, read_manifest
from cctrain.errors import DataError

CACHE_BYTES = 512 * 2**20  # decoded genes and counts; a store of PBMC3k takes 9 MB, of a million cells about 8 GB
_TOKENS_PER_CHECK = 2**23


@dataclass(frozen=True)
class GeneTable:
    """The vocabulary, ordered by gene id; everything but ids and names is estimated from training cells."""

    ids: np.ndarray  # (V,) str
    names: np.ndarray  # (V,) str
    share: np.ndarray  # (V,) float64, mean share of the counts, sum 1
    detection_rate: np.ndarray  # (V,) float64, share of the cells that express it where it is measured
    theta: np.ndarray  # (V,) float64, negative binomial: variance = mu + mu^2 / theta
    loadings: np.ndarray  # (V, K) float32, which genes vary together: see statistics.gene_loadings


@dataclass(frozen=True)
class Cells:
    """Expressed vocabulary genes of some cells; those of cell i are at offsets[i] .. offsets[i + 1] - 1.

    Genes and counts have the unsigned types they are stored in, which a sum or a product overflows: widen them
    first. They may be views of what the store keeps in memory, and then are not writeable.
    """

    offsets: np.ndarray  # int64 (cells + 1,)
    genes: np.ndarray  # (total,), ascending within a cell
    counts: np.ndarray  # (total,), 1 or more


class TokenStore:
    """An open store. `open_store` makes one. It pickles as its path, so that a worker process opens its own."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.digest: str = manifest["digest"]
        self.num_cells: int = manifest["num_cells"]
        self.num_train: int = manifest["num_train"]
        self.num_sources: int = len(manifest["sources"])
        self.unit: str = manifest["unit"]
        self.num_genes: int = manifest["num_genes"]
        with self._reading(""):
            self._root = zarr.open_group(cells_folder(path), mode="r", zarr_format=3)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.path, self.manifest)

    @cached_property
    def genes(self) -> GeneTable:
        var = self.var()
        with self._reading("var"):
            share, detection_rate, theta = (
                var[name].to_numpy(np.float64) for name in ("share", "detection_rate", "theta")
            )
            ids, names = var.index.to_numpy(str), var["gene_name"].to_numpy(str)
        loadings = self._array("varm/loadings", "f", (self.num_genes, None))
        return GeneTable(ids, names, share, detection_rate, theta, loadings)

    @cached_property
    def measured(self) -> np.ndarray:
        """bool (num_sources, V): which vocabulary genes each source measured."""
        return np.ascontiguousarray(self._array("varm/measured", "b", (self.num_genes, self.num_sources)).T)

    @cached_property
    def source_of_cell(self) -> np.ndarray:
        """int64 (num_cells,)"""
        source = self._array("obs/source", "iu", (self.num_cells,)).astype(np.int64)
        if len(source) and not 0 <= source.min() <= source.max() < self.num_sources:
            raise self._damaged("obs/source", f"it names source {source.max()} of {self.num_sources}")
        return source

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """int64 (num_cells,): expressed vocabulary genes of each cell."""
        return np.diff(self._indptr)

    @cached_property
    def groups(self) -> Groups | None:
        """None unless the store was prepared with --group-by."""
        if self.unit != "group":
            return None
        names = np.array(self._array("uns/groups/names", "OTU", (None,)).tolist(), dtype=str)
        starts = self._array("uns/groups/starts", "iu", (len(names) + 1,)).astype(np.int64)
        if not _ascends(starts, self.num_cells) or not (np.diff(starts) > 0).all():
            raise self._damaged("uns/groups/starts", f"its groups are not the {self.num_cells:,} cells in order")
        return Groups(names, starts, int(np.searchsorted(starts[:-1], self.num_train)))

    def var(self) -> pd.DataFrame:
        """The genes' table (V rows), indexed by gene id; `genes` has its columns as arrays."""
        return self._frame("var", self.num_genes)

    def obs(self) -> pd.DataFrame:
        """The cells' metadata (num_cells rows), indexed by cell id."""
        return self._frame("obs", self.num_cells)

    def cells(self, rows: np.ndarray) -> Cells:
        """The cells at `rows`, in that order, repeats allowed; consecutive rows are read as one slice."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_cells):
            raise IndexError(f"{self.path}: rows {rows.min()}..{rows.max()} of {self.num_cells} cells")
        starts, stops = self._indptr[rows], self._indptr[rows + 1]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(stops - starts, out=offsets[1:])
        is_first = np.ones(len(rows), dtype=bool)
        is_first[1:] = np.diff(rows) != 1
        is_last = np.roll(is_first, -1)
        genes, counts = self._chunks.read(starts[is_first], stops[is_last])
        return Cells(offsets, genes, counts)

    @cached_property
    def _indptr(self) -> np.ndarray:
        """int64 (num_cells + 1,): the tokens of cell i are _indptr[i] .. _indptr[i + 1] - 1."""
        folder = "X" if self.manifest["container"] == "zarr" else shards_webdataset.TABLE
        indptr = self._array(f"{folder}/indptr", "iu", (self.num_cells + 1,)).astype(np.int64, copy=False)
        if not _ascends(indptr, self.manifest["num_tokens"]):
            raise self._damaged(f"{folder}/indptr", "its cells are not consecutive tokens")
        return indptr

    @cached_property
    def _chunks(self) -> ChunkCache:
        with self._reading("X" if self.manifest["container"] == "zarr" else shards_webdataset.TABLE):
            return ChunkCache(self._shards(), CACHE_BYTES, self._check_genes)

    def _check_genes(self, genes: np.ndarray) -> None:
        if len(genes) and int(genes.max()) >= self.num_genes:
            raise self._damaged("", f"a cell has gene {int(genes.max()):,} of a vocabulary of {self.num_genes:,}")

    def _shards(self) -> Shards:
        if self.manifest["container"] == "zarr":
            return shards_zarr.ZarrShards(self.path, self._indptr)
        rows = self._array(f"{shards_webdataset.TABLE}/rows", "iu", (None,))
        block = self._array(f"{shards_webdataset.TABLE}/cells_per_block", "iu", (1,))
        if int(block[0]) < 1 or not _ascends(rows, self.num_cells):
            raise self._damaged(shards_webdataset.TABLE, "its shards are not the cells in order")
        return shards_webdataset.TarShards(self.path, self.manifest, self._indptr, rows, int(block[0]))

    def _array(self, name: str, kinds: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """A whole array with a dtype of one of these kinds; `shape` has None where any length will do."""
        self._check_whole(name)
        with self._reading(name):
            found = self._root[name]
            if not isinstance(found, zarr.Array) or len(found.shape) != len(shape):
                raise self._damaged(name, "it is no array of as many dimensions")
            if any(wanted not in (length, None) for length, wanted in zip(found.shape, shape, strict=True)):
                raise self._damaged(name, f"its shape is {found.shape}")
            values = np.asarray(found[:])
        if values.dtype.kind not in kinds:
            raise self._damaged(name, f"it holds {values.dtype}")
        return values

    def _frame(self, name: str, num_rows: int) -> pd.DataFrame:
        self._check_whole(name)
        with self._reading(name):
            frame = anndata.io.read_elem(self._root[name])
        if not isinstance(frame, pd.DataFrame) or len(frame) != num_rows:
            raise self._damaged(name, f"it is no table of {num_rows:,} rows")
        return frame

    def _damaged(self, name: str, what: str) -> DataError:
        return DataError(f"{cells_folder(self.path) / name}: {what}: prepare the store again.")

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Zarr and anndata raise nearly every class of exception about metadata that cannot be."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise self._damaged(name, f"cannot be read ({type(error).__name__}: {text})") from error

    def _check_whole(self, name: str) -> None:
        folder = f"{CELLS}/{name}/"
        check_whole(self.path, self.manifest, [file for file in self.manifest["files"] if file.startswith(folder)])


def _ascends(edges: np.ndarray, stop: int) -> bool:
    """From 0 to `stop` without a step back."""
    return len(edges) > 0 and edges[0] == 0 and edges[-1] == stop and bool((np.diff(edges) >= 0).all())


def open_store(path: Path, digest: str | None = None) -> TokenStore:
    """Open a store, after checking its manifest and that every file is there, with its size and its end.

    Its other contents are checked as they are read. With `digest`, the content digest must be that one. Raises
    DataError.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_fields(path, manifest)
    check_files(path, manifest)
    if digest is not None and digest != manifest["digest"]:
        raise DataError(
            f"{path}: content digest {manifest['digest']}, but {digest} is asked for (data.digest): this is "
            "another store than the run was started on. Point data.store to that one."
        )
    return TokenStore(path, manifest)


def verify_store(path: Path) -> list[str]:
    """Re-hash every file, then the content itself. One message per damage; [] if the store is whole."""
    path = Path(path)
    manifest = read_manifest(path)
    check_fields(path, manifest)
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    with progress("hashing files", "bytes", total) as advance:
        messages = damaged_files(path, manifest, advance)
    if messages:
        return messages
    store = TokenStore(path, manifest)
    if content_digest(store) != store.digest:
        messages.append(f"{path}: the content does not have the digest of the manifest, {store.digest}")
    return messages


def content_digest(store: TokenStore) -> str:
    """Read every cell, in order, and hash what it holds."""
    content = ContentDigest()
    ends = np.cumsum(store.num_tokens)
    with progress("reading cells", "cells", store.num_cells) as advance:
        first = 0
        while first < store.num_cells:
            before = ends[first] - store.num_tokens[first]
            last = max(first + 1, int(np.searchsorted(ends, before + _TOKENS_PER_CHECK, side="right")))
            rows = np.arange(first, last)
            cells = store.cells(rows)
            content.add(np.diff(cells.offsets), store.source_of_cell[rows], cells.genes, cells.counts)
            advance(last - first)
            first = last
    starts = None if store.groups is None else store.groups.starts
    return content.hexdigest(store.genes.ids.tolist(), store.measured, store.num_train, starts)
