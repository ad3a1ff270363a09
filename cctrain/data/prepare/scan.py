"""The one reading of a source: every cell validated and profiled, its tokens written to pieces.

A piece is a range of consecutive cells of one source and a task of its own. Genes are numbered within the source,
in the order of their ids, so that nothing here depends on what else is prepared. The content hash of a cell is
BLAKE2b over its (gene, count) pairs in that order, a gene standing for the BLAKE2b hash of its id: the same
cell has the same hash in whichever file, with whatever other genes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from cctrain.data.files import publish, publish_array, publish_text
from cctrain.data.prepare.pieces import TOKENS_PER_PIECE, Cut, GeneCounts, Piece, count_genes, write_piece
from cctrain.data.prepare.quality import CellProfiles, QualityControl, select_cells
from cctrain.data.prepare.split import under_share
from cctrain.data.prepare.tasks import Advance
from cctrain.data.sources.source import Source, open_source
from cctrain.data.store.layout import LARGEST_STORED_COUNT, smallest_unsigned

LEFT_OUT, TRAINED, HELD_OUT = -1, 0, 1  # sides of a cell

_PROFILE = np.dtype(
    [("content", "<u8"), ("num_genes", "<i4"), ("total", "<i8"), ("mitochondrial", "<f8")]
)  # of a cell: see CellProfiles


@dataclass(frozen=True)
class Opening:
    """What opens a source, in whichever process."""

    path: Path
    counts: str | None
    scratch: Path | None

    def open(self) -> Source:
        return open_source(self.path, self.counts, self.scratch)


@dataclass(frozen=True)
class Expected:
    """The side of each cell as far as it can be told from that cell alone, in a dry run.

    It is the real one unless a side would be empty, or whole values of a column are held out.
    """

    quality: QualityControl
    held_out: float
    seed: int

    def sides(self, cells: CellProfiles) -> np.ndarray:
        """int64 (cells,): TRAINED, HELD_OUT or LEFT_OUT"""
        passed, _ = select_cells(cells, self.quality)
        return np.where(passed, under_share(cells.content, self.held_out, self.seed).astype(np.int64), LEFT_OUT)


@dataclass(frozen=True)
class _Genes:
    """The genes of a source in the order of their ids."""

    rank: np.ndarray  # int32 (genes,) number of each gene of the source
    hashes: np.ndarray  # uint64 (genes,) by number
    mitochondrial: np.ndarray  # int64 (genes,) 1 for MT-..., by number


def arrange(opening: Opening, target: Path, advance: Advance) -> None:
    """Task: make reading by cell possible; int64, the cells at which the source is cut into pieces."""
    source = opening.open()
    source.arrange()
    publish_array(target, source.piece_edges(TOKENS_PER_PIECE))
    advance(1)


def read_edges(path: Path) -> list[int]:
    return np.load(path, allow_pickle=False).tolist()


def hash_source(opening: Opening, target: Path, advance: Advance) -> None:
    """Task: SHA-256 of the inputs of a source by name, as JSON."""
    publish_text(target, json.dumps(opening.open().digests(), sort_keys=True))
    advance(1)


def scan_piece(opening: Opening, cut: Cut, advance: Advance) -> None:
    """Task: the profiles of the cells of a piece, the counts of its genes, and before them its tokens.

    Raises DataError at what is not a count.
    """
    source, genes = _open(opening)
    profiles, gene_total = _empty_profiles(cut, genes)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for first, counts in _ordered_blocks(source, genes, cut.start, cut.stop):
        _profile(counts, genes, profiles[first - cut.start :][: counts.shape[0]], gene_total)
        wide = smallest_unsigned(counts.data.max(initial=0))
        parts.append((counts.indices.astype(smallest_unsigned(len(gene_total))), counts.data.astype(wide)))
        advance(counts.shape[0])
    offsets = np.concatenate([[0], np.cumsum(profiles["num_genes"], dtype=np.int64)])
    tokens = [np.concatenate(list(arrays)) for arrays in zip(*parts, strict=True)]
    write_piece(cut.scanned, Piece(np.arange(cut.start, cut.stop), offsets, tokens[0], tokens[1]))
    publish(cut.profiles, lambda file: np.savez(file, cells=profiles, gene_total=gene_total))


def plan_piece(opening: Opening, cut: Cut, expected: Expected | None, advance: Advance) -> None:
    """Task: `scan_piece` of a dry run, which writes no token, but counts the genes of the sides that are expected."""
    source, genes = _open(opening)
    profiles, gene_total = _empty_profiles(cut, genes)
    sides = np.full(len(profiles), LEFT_OUT)
    found = [_no_counts(len(gene_total))]
    for first, counts in _ordered_blocks(source, genes, cut.start, cut.stop):
        cells = slice(first - cut.start, first - cut.start + counts.shape[0])
        _profile(counts, genes, profiles[cells], gene_total)
        if expected is not None:
            sides[cells] = expected.sides(_as_profiles(profiles[cells], 0, first))
            found.append(_count_block(counts, sides[cells]))
        advance(counts.shape[0])
    if expected is not None:
        _publish_found(cut, found, sides)
    publish(cut.profiles, lambda file: np.savez(file, cells=profiles, gene_total=gene_total))


def count_piece(opening: Opening, cut: Cut, sides: np.ndarray, advance: Advance) -> None:
    """Task: a dry run's second reading, for the sides (cells,) that a selection has really given the cells."""
    source, genes = _open(opening)
    found = [_no_counts(len(genes.rank))]
    for first, counts in _ordered_blocks(source, genes, cut.start, cut.stop):
        found.append(_count_block(counts, sides[first - cut.start :][: counts.shape[0]]))
        advance(counts.shape[0])
    _publish_found(cut, found, sides)


def has_counted(cut: Cut, sides: np.ndarray) -> bool:
    """Whether the genes of a piece were counted for these sides of its cells."""
    if not cut.found.exists():
        return False
    with np.load(cut.found, allow_pickle=False) as file:
        return np.array_equal(file["sides"], sides)


def _empty_profiles(cut: Cut, genes: _Genes) -> tuple[np.ndarray, np.ndarray]:
    return np.empty(cut.stop - cut.start, dtype=_PROFILE), np.zeros(len(genes.rank), dtype=np.int64)


def _profile(counts: sp.csr_matrix, genes: _Genes, profiles: np.ndarray, gene_total: np.ndarray) -> None:
    """Fill in the profiles of the cells of a block, and add the counts of its genes."""
    total = np.asarray(counts.sum(axis=1)).ravel()
    profiles["content"] = _content_hashes(counts, genes.hashes)
    profiles["num_genes"] = np.diff(counts.indptr)
    profiles["total"] = total
    profiles["mitochondrial"] = counts @ genes.mitochondrial / np.maximum(total, 1)
    # Exact: the sum of a block's counts is far below 2^53.
    gene_total += np.bincount(counts.indices, counts.data, minlength=len(gene_total)).astype(np.int64)


def _count_block(counts: sp.csr_matrix, sides: np.ndarray) -> GeneCounts:
    cells = np.argsort(sides, kind="stable")
    cells = cells[sides[cells] != LEFT_OUT]
    kept = counts[cells]
    stored = np.minimum(kept.data, LARGEST_STORED_COUNT)
    # As rows of a store with one training cell: side 0 lies before the split, side 1 behind it.
    piece = Piece(sides[cells], kept.indptr.astype(np.int64), kept.indices, stored)
    return count_genes(piece, HELD_OUT, counts.shape[1], clipped=kept.data > LARGEST_STORED_COUNT)


def _no_counts(num_genes: int) -> GeneCounts:
    return GeneCounts(*(np.zeros(num_genes, dtype=np.int64) for _ in fields(GeneCounts)))


def _publish_found(cut: Cut, found: list[GeneCounts], sides: np.ndarray) -> None:
    sums = {entry.name: sum(getattr(part, entry.name) for part in found) for entry in fields(GeneCounts)}
    publish(cut.found, lambda file: np.savez(file, sides=sides, **sums))


def read_profiles(cuts: list[Cut]) -> tuple[CellProfiles, dict[int, np.ndarray]]:
    """Profiles of all cells, source after source, and by source the counts of its genes (genes,) int64."""
    parts = []
    gene_totals: dict[int, np.ndarray] = {}
    for cut in cuts:
        with np.load(cut.profiles, allow_pickle=False) as file:
            parts.append(file["cells"])
            total = file["gene_total"]
            gene_totals[cut.source] = gene_totals[cut.source] + total if cut.source in gene_totals else total
    parts = [_as_profiles(part, cut.source, cut.start) for part, cut in zip(parts, cuts, strict=True)]
    names = [entry.name for entry in fields(CellProfiles)]
    return CellProfiles(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    ), gene_totals


def _as_profiles(cells: np.ndarray, source: int, start: int) -> CellProfiles:
    """Of consecutive cells of a source."""
    return CellProfiles(
        source=np.full(len(cells), source, dtype=np.int32),
        row=np.arange(start, start + len(cells)),
        **{name: np.ascontiguousarray(cells[name]) for name in _PROFILE.names or ()},
    )


@lru_cache(maxsize=1)
def _open(opening: Opening) -> tuple[Source, _Genes]:
    source = opening.open()
    ids = np.array(source.gene_ids)
    order = np.argsort(ids)
    rank = np.empty(len(ids), dtype=np.int32)
    rank[order] = np.arange(len(ids), dtype=np.int32)
    in_mitochondria = [is_mitochondrial(source.gene_names[i]) for i in order]
    hashes = [_hash(gene.encode()) for gene in ids[order].tolist()]
    return source, _Genes(rank, np.array(hashes, dtype="<u8"), np.array(in_mitochondria, dtype=np.int64))


def is_mitochondrial(gene_name: str) -> bool:
    return gene_name.upper().startswith("MT-")


def _ordered_blocks(source: Source, genes: _Genes, start: int, stop: int) -> Iterator[tuple[int, sp.csr_matrix]]:
    already = bool((np.diff(genes.rank) > 0).all())
    for block in source.blocks(start, stop):
        counts = block.counts
        if not already:
            counts = sp.csr_matrix((counts.data, genes.rank[counts.indices], counts.indptr), shape=counts.shape)
            counts.sort_indices()
        yield block.start, counts


def _content_hashes(counts: sp.csr_matrix, gene_hash: np.ndarray) -> np.ndarray:
    pairs = np.empty((len(counts.data), 2), dtype="<u8")
    pairs[:, 0] = gene_hash[counts.indices]
    pairs[:, 1] = counts.data
    ends = counts.indptr.tolist()
    return np.array([_hash(pairs[start:stop].data) for start, stop in pairwise(ends)], dtype=np.uint64)


def _hash(content: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
