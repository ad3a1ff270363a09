"""The token store, read: cells as (gene, count) pairs, by row, from what `cctrain prepare` wrote.

    manifest.json   what the store holds, where it came from, and the digest of every file
    cells.zarr      Zarr v3, readable by `anndata.read_zarr`: X (CSR), var, varm["measured"], obs

Rows 0 .. num_train - 1 are the training cells, the rest is held out; both lie in shuffled order. X is read in
chunks that are decoded once and kept up to CACHE_BYTES, so a small store ends up in memory and of a large one
only what is in use. Nothing here chooses cells or targets.
"""

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import zarr

from cctrain.data.files import file_sha256
from cctrain.errors import DataError

FORMAT = "cctrain-token-store"
VERSION = 1
CACHE_BYTES = 512 * 2**20  # decoded genes and counts; a store of PBMC3k takes 9 MB, of a million cells about 8 GB
_CELLS_PER_CHECK = 2_048


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
    """Expressed vocabulary genes of some cells; those of cell i are at offsets[i] .. offsets[i + 1] - 1."""

    offsets: np.ndarray  # int64 (cells + 1,)
    genes: np.ndarray  # int64 (total,), ascending within a cell
    counts: np.ndarray  # int64 (total,), 1 or more


class TokenStore:
    """An open store. `open_store` makes one."""

    def __init__(self, path: Path, manifest: dict) -> None:
        self.path = path
        self.manifest = manifest
        self.digest: str = manifest["digest"]
        self.num_cells: int = manifest["num_cells"]
        self.num_train: int = manifest["num_train"]
        self.num_sources: int = len(manifest["sources"])
        self._root = zarr.open_group(path / "cells.zarr", mode="r", zarr_format=3)
        self._chunks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @cached_property
    def genes(self) -> GeneTable:
        var = self._frame("var")
        share, detection_rate, theta = (var[name].to_numpy(np.float64) for name in ("share", "detection_rate", "theta"))
        loadings = np.asarray(self._array("varm/loadings")[:])
        ids, names = var.index.to_numpy(str), var["gene_name"].to_numpy(str)
        return GeneTable(ids, names, share, detection_rate, theta, loadings)

    @cached_property
    def measured(self) -> np.ndarray:
        """bool (num_sources, V): which vocabulary genes each source measured."""
        return np.ascontiguousarray(_read(self._array("varm/measured")).T)

    @cached_property
    def source_of_cell(self) -> np.ndarray:
        """int64 (num_cells,)"""
        return _read(self._array("obs/source")).astype(np.int64)

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """int64 (num_cells,): expressed vocabulary genes of each cell."""
        return np.diff(self._indptr)

    def obs(self) -> pd.DataFrame:
        """The cells' metadata (num_cells rows), indexed by cell id."""
        return self._frame("obs")

    def cells(self, rows: np.ndarray) -> Cells:
        """The cells at `rows`, in that order, repeats allowed; consecutive rows are read as one slice."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_cells):
            raise IndexError(f"{self.path}: rows {rows.min()}..{rows.max()} of {self.num_cells} cells")
        starts, stops = self._indptr[rows], self._indptr[rows + 1]
        offsets = np.concatenate([[0], np.cumsum(stops - starts)])
        genes = np.empty(offsets[-1], dtype=np.int64)
        counts = np.empty(offsets[-1], dtype=np.int64)
        cuts = np.flatnonzero(np.diff(rows) != 1) + 1
        run_starts = np.concatenate([[0], cuts])[: len(rows)]
        run_stops = np.concatenate([cuts, [len(rows)]])
        for first, last in zip(run_starts.tolist(), run_stops.tolist(), strict=False):
            into = slice(int(offsets[first]), int(offsets[last]))
            self._read(int(starts[first]), int(stops[last - 1]), genes[into], counts[into])
        return Cells(offsets, genes, counts)

    @cached_property
    def _indptr(self) -> np.ndarray:
        return _read(self._array("X/indptr")).astype(np.int64)

    @cached_property
    def _genes_array(self) -> zarr.Array:
        return self._array("X/indices")

    @cached_property
    def _counts_array(self) -> zarr.Array:
        return self._array("X/data")

    def _read(self, start: int, stop: int, genes: np.ndarray, counts: np.ndarray) -> None:
        """Tokens start .. stop - 1 into the two arrays."""
        if stop == start:
            return
        size = self._counts_array.chunks[0]
        wanted = range(start // size, (stop - 1) // size + 1)
        missing = [chunk for chunk in wanted if chunk not in self._chunks]
        decoded = self._decode(missing[0], missing[-1] + 1) if missing else {}
        for chunk in wanted:
            if chunk in self._chunks:
                self._chunks.move_to_end(chunk)
            pair = self._chunks.get(chunk) or decoded[chunk]
            low, high = max(start, chunk * size), min(stop, (chunk + 1) * size)
            genes[low - start : high - start] = pair[0][low - chunk * size : high - chunk * size]
            counts[low - start : high - start] = pair[1][low - chunk * size : high - chunk * size]
        self._keep(decoded)

    def _decode(self, first: int, last: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        size = self._counts_array.chunks[0]
        try:
            genes = _read(self._genes_array, first * size, last * size)
            counts = _read(self._counts_array, first * size, last * size)
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(
                f"{self.path}: tokens {first * size:,} to {last * size:,} of X cannot be decoded "
                f"({error}): the store is damaged. Run `cctrain inspect {self.path} --verify` "
                "for all damage, then prepare it again."
            ) from error
        return {
            first + i: (genes[i * size : (i + 1) * size], counts[i * size : (i + 1) * size])
            for i in range(last - first)
        }

    def _keep(self, decoded: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
        """Into the cache, which forgets what was not used for longest."""
        if not decoded:
            return
        bytes_per_chunk = sum(array.nbytes for array in next(iter(decoded.values())))
        room = max(1, CACHE_BYTES // bytes_per_chunk)
        for chunk, (genes, counts) in list(decoded.items())[-room:]:
            self._chunks[chunk] = (genes.copy(), counts.copy())  # a view would keep the whole slice alive
        while len(self._chunks) > room:
            self._chunks.popitem(last=False)

    def _array(self, name: str) -> zarr.Array:
        found = self._root[name]
        assert isinstance(found, zarr.Array)
        return found

    def _frame(self, name: str) -> pd.DataFrame:
        frame = anndata.io.read_elem(self._root[name])
        assert isinstance(frame, pd.DataFrame)
        return frame


def open_store(path: Path, digest: str | None = None) -> TokenStore:
    """Open a store, after checking its manifest and that every file is there with its size; contents are not
    read.

    With `digest`, the content digest must be that one. Raises DataError.
    """
    path = Path(path)
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / "cells.zarr" / name
        if not file.is_file():
            raise DataError(f"{file}: missing from the store {path}: copy the store again or prepare it again.")
        if file.stat().st_size != entry["bytes"]:
            raise DataError(
                f"{file}: {file.stat().st_size:,} bytes, but its manifest says {entry['bytes']:,}: "
                "it was cut short or altered; copy the store again or prepare it again."
            )
    if digest is not None and digest != manifest["digest"]:
        raise DataError(
            f"{path}: content digest {manifest['digest']}, but {digest} is asked for (data.digest): this is "
            "another store than the run was started on. Point data.store to that one."
        )
    return TokenStore(path, manifest)


def read_manifest(path: Path) -> dict:
    """The manifest of a store of this format and version; DataError if there is none."""
    file = path / "manifest.json"
    if not file.is_file():
        raise DataError(f"{path}: not a token store: no manifest.json. `cctrain prepare` writes one.")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error}): copy the store again or prepare it again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{file}: not the manifest of a token store (its format is not '{FORMAT}').")
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{file}: format version {manifest.get('version')}, and this cctrain reads {VERSION}: prepare "
            "the store again with this version."
        )
    return manifest


def verify_store(path: Path) -> list[str]:
    """Re-hash every file, then the content itself. One message per damage; [] if the store is whole."""
    path = Path(path)
    manifest = read_manifest(path)
    messages = []
    for name, entry in manifest["files"].items():
        file = path / "cells.zarr" / name
        if not file.is_file():
            messages.append(f"{file}: missing")
        elif file.stat().st_size != entry["bytes"]:
            messages.append(f"{file}: {file.stat().st_size:,} bytes instead of {entry['bytes']:,}")
        elif file_sha256(file) != entry["sha256"]:
            messages.append(f"{file}: its bytes have changed (SHA-256 differs from the manifest)")
    if messages:
        return messages
    store = TokenStore(path, manifest)
    content = ContentDigest()
    for first in range(0, store.num_cells, _CELLS_PER_CHECK):
        rows = np.arange(first, min(first + _CELLS_PER_CHECK, store.num_cells))
        cells = store.cells(rows)
        content.add(np.diff(cells.offsets), store.source_of_cell[rows], cells.genes, cells.counts)
    if content.hexdigest(store.genes.ids.tolist(), store.measured, store.num_train) != store.digest:
        messages.append(f"{path}: the content does not have the digest of the manifest, {store.digest}")
    return messages


class ContentDigest:
    """SHA-256 of what a store holds, whatever its container: cells in order, genes, bitmaps, split."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, num_tokens: np.ndarray, source: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> None:
        """Per cell its number of tokens, source, genes and counts, as little-endian uint32."""
        before = np.concatenate([[0], np.cumsum(num_tokens)])[:-1]
        heads = 2 * np.arange(len(num_tokens)) + 2 * before
        words = np.empty(2 * len(num_tokens) + 2 * len(genes), dtype="<u4")
        words[heads], words[heads + 1] = num_tokens, source
        within = np.arange(len(genes)) - np.repeat(before, num_tokens)
        place = np.repeat(heads + 2, num_tokens) + within
        words[place] = genes
        words[place + np.repeat(num_tokens, num_tokens)] = counts
        self._hash.update(words.tobytes())

    def hexdigest(self, gene_ids: list[str], measured: np.ndarray, num_train: int) -> str:
        """With the vocabulary, the bitmap (num_sources, V) and the split point; ends the hash."""
        self._hash.update(vocabulary_digest(gene_ids).encode())
        self._hash.update(np.packbits(np.asarray(measured, dtype=bool), axis=1).tobytes())
        self._hash.update(np.array([len(gene_ids), len(measured), num_train], dtype="<u8").tobytes())
        return self._hash.hexdigest()


def _read(array: zarr.Array, start: int = 0, stop: int | None = None) -> np.ndarray:
    return np.asarray(array[start:stop])


def vocabulary_digest(gene_ids: list[str]) -> str:
    return hashlib.sha256("\n".join(gene_ids).encode()).hexdigest()
