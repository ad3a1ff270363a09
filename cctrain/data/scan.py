"""The two readings of the sources: profile every cell, then count genes and send entries to their rows.

Genes are numbered over the union of all sources, in the order of their ids. The content hash of a cell is
BLAKE2b over its (gene, count) pairs in that order, a gene standing for the BLAKE2b hash of its id: the same
cell has the same hash in whichever file, with whatever other genes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.sparse as sp

from cctrain.data.buckets import Buckets
from cctrain.data.h5ad import LARGEST_COUNT
from cctrain.data.progress import progress
from cctrain.data.quality import CellProfiles
from cctrain.data.sources import Source
from cctrain.data.store_writer import LARGEST_STORED_COUNT
from cctrain.errors import DataError


@dataclass
class GeneUnion:
    """All genes of all sources."""

    ids: np.ndarray  # (U,) str, ascending
    of_source: list[np.ndarray]  # per source (genes of the source,) int64 place in `ids`

    def measured(self) -> np.ndarray:
        """bool (num_sources, U)"""
        bitmap = np.zeros((len(self.of_source), len(self.ids)), dtype=bool)
        for i, places in enumerate(self.of_source):
            bitmap[i, places] = True
        return bitmap


@dataclass
class GeneCounts:
    """What the second reading counts, over the cells that passed; counts clipped as in the store."""

    train_detected: np.ndarray  # int64 (num_sources, U) training cells that express the gene
    train_total: np.ndarray  # int64 (num_sources, U) sum of their counts
    detected: np.ndarray  # int64 (U,) cells of both splits that express the gene
    largest: np.ndarray  # int64 (U,) largest count


def unite_genes(sources: list[Source]) -> GeneUnion:
    """DataError if a source shares no gene with the others: then their ids are of two kinds."""
    ids = np.unique(np.concatenate([np.array(source.gene_ids) for source in sources]))
    union = GeneUnion(ids, [np.searchsorted(ids, np.array(source.gene_ids)) for source in sources])
    shared = union.measured().sum(axis=0) > 1
    for source, places in zip(sources, union.of_source, strict=True):
        if len(sources) > 1 and not shared[places].any():
            raise DataError(
                f"{source.path}: none of its {len(places):,} genes (such as '{source.gene_ids[0]}') is in "
                "another source: gene names against Ensembl ids, or two species? Genes are matched by id."
            )
    return union


def scan(sources: list[Source], union: GeneUnion) -> CellProfiles:
    """Profiles of all cells, source after source."""
    gene_hash = np.array([_hash(gene.encode()) for gene in union.ids.tolist()], dtype="<u8")
    num_cells = sum(source.num_cells for source in sources)
    profiles = CellProfiles(
        source=np.repeat(np.arange(len(sources), dtype=np.int32), [source.num_cells for source in sources]),
        row=np.concatenate([np.arange(source.num_cells) for source in sources]),
        content=np.empty(num_cells, dtype=np.uint64),
        num_genes=np.empty(num_cells, dtype=np.int32),
        total=np.empty(num_cells, dtype=np.int64),
        mitochondrial=np.empty(num_cells, dtype=np.float64),
    )
    mitochondrial = [np.array([name.upper().startswith("MT-") for name in source.gene_names]) for source in sources]
    done = 0
    for i, counts in _united_blocks(sources, union, "checking cells"):
        cells = slice(done, done + counts.shape[0])
        total = np.asarray(counts.sum(axis=1)).ravel()
        in_mitochondria = np.zeros(len(union.ids), dtype=np.int64)
        in_mitochondria[union.of_source[i]] = mitochondrial[i]
        profiles.content[cells] = _content_hashes(counts, gene_hash)
        profiles.num_genes[cells] = np.diff(counts.indptr)
        profiles.total[cells] = total
        profiles.mitochondrial[cells] = counts @ in_mitochondria / np.maximum(total, 1)
        done = cells.stop
    return profiles


def distribute(
    sources: list[Source], union: GeneUnion, destination: np.ndarray, num_train: int, buckets: Buckets | None
) -> GeneCounts:
    """Count genes over the cells that go somewhere, and send their entries to their rows.

    `destination` (all cells of all sources,): row in the store, -1 for a cell that was left out. Without
    `buckets` genes are counted only.
    """
    shape = (len(sources), len(union.ids))
    found = GeneCounts(
        train_detected=np.zeros(shape, dtype=np.int64),
        train_total=np.zeros(shape, dtype=np.int64),
        detected=np.zeros(shape[1], dtype=np.int64),
        largest=np.zeros(shape[1], dtype=np.int64),
    )
    done = 0
    for i, counts in _united_blocks(sources, union, "sorting cells" if buckets else "counting genes"):
        rows = destination[done : done + counts.shape[0]]
        done += counts.shape[0]
        entry_row = np.repeat(rows, np.diff(counts.indptr))
        kept = entry_row >= 0
        entry_row, genes, values = entry_row[kept], counts.indices[kept], counts.data[kept]
        stored = np.minimum(values, LARGEST_STORED_COUNT)
        train = entry_row < num_train
        found.train_detected[i] += np.bincount(genes[train], minlength=shape[1])
        # Exact: a block's sum of clipped counts is far below 2^53.
        sums = np.bincount(genes[train], weights=stored[train], minlength=shape[1])
        found.train_total[i] += sums.astype(np.int64)
        found.detected += np.bincount(genes, minlength=shape[1])
        np.maximum.at(found.largest, genes, stored)
        if buckets is not None:
            buckets.append(entry_row, genes, np.minimum(values, LARGEST_COUNT))
    return found


def _united_blocks(sources: list[Source], union: GeneUnion, title: str) -> Iterator[tuple[int, sp.csr_matrix]]:
    """(source, counts over the united genes) of all cells in order, with progress on standard error."""
    with progress(title, "cells", sum(source.num_cells for source in sources)) as advance:
        for i, source in enumerate(sources):
            for block in source.blocks():
                counts = block.counts
                united = sp.csr_matrix(
                    (counts.data, union.of_source[i][counts.indices], counts.indptr),
                    shape=(counts.shape[0], len(union.ids)),
                )
                united.sort_indices()
                yield i, united
                advance(counts.shape[0])


def _content_hashes(counts: sp.csr_matrix, gene_hash: np.ndarray) -> np.ndarray:
    pairs = np.empty((len(counts.data), 2), dtype="<u8")
    pairs[:, 0] = gene_hash[counts.indices]
    pairs[:, 1] = counts.data
    ends = counts.indptr.tolist()
    return np.array(
        [_hash(pairs[start:stop].data) for start, stop in pairwise(ends)],
        dtype=np.uint64,
    )


def _hash(content: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
