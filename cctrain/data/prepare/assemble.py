"""From sorted pieces to the store: the shards, the content digest and what is fitted, each a task of its own.

All read the same cells (`pieces.Shuffled`) and none waits for another, so that one worker can fit dispersions while
another compresses shards. The digest has to see the cells in order: it is one task, of the pieces, not of what was
written; `cctrain inspect --verify` compares the two.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from threadpoolctl import threadpool_limits

from cctrain.data.files import publish, publish_text, sync_to_disk
from cctrain.data.hashing import hash64
from cctrain.data.prepare.pieces import TOKENS_PER_PIECE, Shuffled, ranges_of_rows
from cctrain.data.prepare.statistics import dispersions, gene_loadings
from cctrain.data.prepare.tasks import Advance
from cctrain.data.store import writer
from cctrain.data.store.content_digest import ContentDigest
from cctrain.data.store.layout import Layout

# Dispersions and loadings are fitted on a random sample of the training cells. 20 million tokens take some 0.5 GB.
SAMPLE_CELLS = 50_000
SAMPLE_TOKENS = 20_000_000
_TOKENS_PER_HASH = 1_000_000


@dataclass(frozen=True)
class Frame:
    """What decides the bytes of the shards; a Layout whose index of cells lies in a file."""

    root: Path
    container: str
    indptr: Path
    num_genes: int
    genes_dtype: str
    counts_dtype: str

    def layout(self) -> Layout:
        indptr = np.load(self.indptr, mmap_mode="r", allow_pickle=False)
        dtypes = np.dtype(self.genes_dtype), np.dtype(self.counts_dtype)
        return Layout(self.container, indptr, self.num_genes, *dtypes)


def write_shard(frame: Frame, shuffled: Shuffled, shard: int, marker: Path, advance: Advance) -> None:
    """Task: one shard of the store."""
    layout = frame.layout()
    start, stop = writer.shard_edges(layout)[shard : shard + 2].tolist()
    genes = np.empty(stop - start, dtype=layout.genes_dtype)
    counts = np.empty(stop - start, dtype=layout.counts_dtype)
    first = int(np.searchsorted(layout.indptr, start, side="right")) - 1
    last = int(np.searchsorted(layout.indptr, stop, side="left"))
    for rows in ranges_of_rows(layout.indptr, first, last, TOKENS_PER_PIECE):
        cells = shuffled.collect(rows)
        before = int(layout.indptr[rows[0]])
        low, high = max(start, before), min(stop, int(layout.indptr[rows[-1] + 1]))
        genes[low - start : high - start] = cells.genes[low - before : high - before]
        counts[low - start : high - start] = cells.counts[low - before : high - before]
        advance(high - low)
    began = time.time()
    writer.write_shard(frame.root, layout, shard, genes, counts)
    _sync_since(frame.root, began)
    publish_text(marker, "")


def hash_content(
    shuffled: Shuffled,
    indptr: Path,
    gene_ids: list[str],
    measured: np.ndarray,
    num_train: int,
    group_starts: np.ndarray | None,
    target: Path,
    advance: Advance,
) -> None:
    """Task: the content digest, as text."""
    starts = np.load(indptr, mmap_mode="r", allow_pickle=False)
    content = ContentDigest()
    for rows in ranges_of_rows(starts, 0, len(starts) - 1, TOKENS_PER_PIECE):
        cells = shuffled.collect(rows)
        source = shuffled.source_of(rows)
        for part in ranges_of_rows(cells.offsets, 0, len(rows), _TOKENS_PER_HASH):
            tokens = slice(int(cells.offsets[part[0]]), int(cells.offsets[part[-1] + 1]))
            num_tokens = np.diff(cells.offsets[part[0] : part[-1] + 2])
            content.add(num_tokens, source[part], cells.genes[tokens], cells.counts[tokens])
        advance(int(cells.offsets[-1]))
    publish_text(target, content.hexdigest(gene_ids, measured, num_train, group_starts))


def sample_cells(num_tokens: np.ndarray, num_train: int, seed: int, grouped: bool) -> np.ndarray:
    """Rows (ascending) of the training cells that are fitted on, from the tokens of every cell.

    The first ones, which are random cells; those with the smallest hash where neighbours are of one group.
    """
    rows = np.arange(num_train)
    if grouped:
        rows = np.argsort(hash64(seed, "sample", rows), kind="stable")
    fits = int(np.searchsorted(np.cumsum(num_tokens[rows]), SAMPLE_TOKENS, side="right"))
    return np.sort(rows[: max(1, min(fits, SAMPLE_CELLS))])


def fit_genes(
    shuffled: Shuffled,
    indptr: Path,
    rows: np.ndarray,
    shares: np.ndarray,
    measured: np.ndarray,
    target: Path,
    advance: Advance,
) -> None:
    """Task: dispersions and loadings of all genes from the cells at `rows`, as arrays `theta` and `loadings`.

    On one thread: with several, sums in BLAS are rounded as the number of cores has it.
    """
    counts = _matrix_of(shuffled, indptr, rows, len(shares))
    source = shuffled.source_of(rows)
    with threadpool_limits(1):
        theta = dispersions(counts, source, shares, measured, advance)
        loadings = gene_loadings(counts, source, shares, measured)
    publish(target, lambda file: np.savez(file, theta=theta, loadings=loadings))


def _matrix_of(shuffled: Shuffled, indptr: Path, rows: np.ndarray, num_genes: int) -> sp.csr_matrix:
    """Counts uint16 (rows, num_genes), collected part by part: indices and counts are held once."""
    starts = np.load(indptr, mmap_mode="r", allow_pickle=False)
    offsets = np.concatenate([[0], np.cumsum(starts[rows + 1] - starts[rows])])
    genes = np.empty(int(offsets[-1]), dtype=np.int32)
    counts = np.empty(len(genes), dtype=np.uint16)
    for part in ranges_of_rows(offsets, 0, len(rows), TOKENS_PER_PIECE):
        cells = shuffled.collect(rows[part])
        tokens = slice(int(offsets[part[0]]), int(offsets[part[-1] + 1]))
        genes[tokens], counts[tokens] = cells.genes, cells.counts
    return sp.csr_matrix((counts, genes, offsets.astype(np.int32)), shape=(len(rows), num_genes))


def read_fitted(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """theta (V,) and loadings (V, K)"""
    with np.load(path, allow_pickle=False) as file:
        return file["theta"], file["loadings"]


def _sync_since(root: Path, began: float) -> None:
    """Flush what was written since then: a marker may not outlive, in a crash of the machine, what it marks."""
    for file in root.rglob("*"):
        with suppress(FileNotFoundError):  # a temporary file of another worker
            if file.is_file() and file.stat().st_mtime >= began - 1:
                sync_to_disk(file)
