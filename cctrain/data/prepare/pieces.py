"""Cells on their way from the sources to the store: pieces on disk, sorted by destination row.

A piece is some millions of tokens of consecutive cells of one source. The shuffle is: sort the cells of every piece
by their row in the store, then collect the cells of any range of rows from all pieces, in each of which they lie
side by side. No token is ever sorted, only its cell, and a token takes 2 to 6 bytes on disk.

    NAME.genes.npy, NAME.counts.npy   (tokens,) smallest unsigned types, genes ascending within a cell
    NAME.cells.npz                    rows (cells,), offsets (cells + 1,) int64; written last
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from cctrain.data.files import publish, publish_array
from cctrain.data.prepare.tasks import Advance
from cctrain.data.store.layout import LARGEST_STORED_COUNT, smallest_unsigned

TOKENS_PER_PIECE = 8_000_000  # also collected from the pieces at a time
LARGEST_BYTE = 2**8 - 1
ABSENT = -1  # place of a gene that is not in the vocabulary

_PLACE = np.dtype([("piece", "<u4"), ("num_raw", "<u4"), ("start", "<i8")])


@dataclass(frozen=True)
class Cut:
    """Where a piece comes from, the cells start .. stop - 1 of a source, and what is written of it."""

    name: str  # says which cells of which input these are, whatever becomes of other inputs
    source: int
    start: int
    stop: int
    folder: Path

    @property
    def profiles(self) -> Path:
        return self.folder / "profiles" / f"{self.name}.npz"

    @property
    def scanned(self) -> Path:
        return self.folder / "scanned" / self.name

    @property
    def sorted(self) -> Path:
        return self.folder / "sorted" / self.name

    @property
    def found(self) -> Path:
        return self.folder / "found" / f"{self.name}.npz"

    @property
    def num_tokens(self) -> Path:
        return self.folder / "num_tokens" / f"{self.name}.npy"


@dataclass(frozen=True)
class Piece:
    """Cells with their tokens; those of cell i are at offsets[i] .. offsets[i + 1] - 1."""

    rows: np.ndarray  # int64 (cells,) ascending: row in the source, and once sorted in the store
    offsets: np.ndarray  # int64 (cells + 1,)
    genes: np.ndarray  # (tokens,) number within the source
    counts: np.ndarray  # (tokens,)


@dataclass(frozen=True)
class GeneCounts:
    """What is counted over the cells that go into the store, counts clipped as they are there. All int64 (genes,)."""

    train_detected: np.ndarray  # training cells that express the gene
    train_total: np.ndarray  # sum of their counts
    detected: np.ndarray  # cells of both sides that express the gene
    beyond_byte: np.ndarray  # counts over 255
    clipped: np.ndarray  # counts over 65,535


def write_piece(name: Path, piece: Piece) -> None:
    publish_array(_file(name, "genes"), piece.genes)
    publish_array(_file(name, "counts"), piece.counts)
    publish(_file(name, "cells", "npz"), lambda file: np.savez(file, rows=piece.rows, offsets=piece.offsets))


def read_piece(name: Path) -> Piece:
    """The tokens are memory-mapped: what is not looked at is not read."""
    rows, offsets = _read_cells(name)
    return Piece(rows, offsets, _memory_map(_file(name, "genes")), _memory_map(_file(name, "counts")))


def remove_piece(name: Path) -> None:
    for file in (_file(name, "cells", "npz"), _file(name, "genes"), _file(name, "counts")):
        file.unlink(missing_ok=True)


def sort_piece(cut: Cut, destination: Path, first: int, num_train: int, num_genes: int, advance: Advance) -> None:
    """Task: the piece by destination row, without the cells that go nowhere; then the scanned piece is removed.

    `destination` holds int64 (all cells of all sources,): row in the store, or -1; those of this piece begin at
    `first`.
    """
    scanned = read_piece(cut.scanned)
    rows = np.array(_memory_map(destination)[first : first + len(scanned.rows)])
    cells = np.argsort(rows, kind="stable")
    cells = cells[rows[cells] >= 0]
    at = _token_places(scanned.offsets[cells], np.diff(scanned.offsets)[cells])
    counts = np.take(scanned.counts, at)
    stored = np.minimum(counts, LARGEST_STORED_COUNT) if counts.itemsize > 2 else counts
    stored = stored.astype(smallest_unsigned(stored.max(initial=0)))
    offsets = np.concatenate([[0], np.cumsum(np.diff(scanned.offsets)[cells])])
    piece = Piece(rows[cells], offsets, np.take(scanned.genes, at), stored)
    del at
    found = count_genes(piece, num_train, num_genes, clipped=counts > LARGEST_STORED_COUNT)
    publish(cut.found, lambda file: np.savez(file, **vars(found)))
    write_piece(cut.sorted, piece)
    remove_piece(cut.scanned)
    advance(cut.stop - cut.start)


def count_genes(piece: Piece, num_train: int, num_genes: int, clipped: np.ndarray) -> GeneCounts:
    """Over the cells of a sorted piece; `clipped` (tokens,) masks the counts that were larger than is stored."""
    train = slice(0, int(piece.offsets[np.searchsorted(piece.rows, num_train)]))
    genes, counts = piece.genes, piece.counts
    return GeneCounts(
        train_detected=np.bincount(genes[train], minlength=num_genes),
        # Exact: a piece's sum of clipped counts is far below 2^53.
        train_total=np.bincount(genes[train], counts[train], minlength=num_genes).astype(np.int64),
        detected=np.bincount(genes, minlength=num_genes),
        beyond_byte=np.bincount(genes[counts > LARGEST_BYTE], minlength=num_genes),
        clipped=np.bincount(genes[clipped], minlength=num_genes),
    )


def read_found(cut: Cut) -> GeneCounts:
    with np.load(cut.found, allow_pickle=False) as file:
        return GeneCounts(**{entry.name: file[entry.name] for entry in fields(GeneCounts)})


def sorted_marker(cut: Cut) -> Path:
    return _file(cut.sorted, "cells", "npz")


def count_tokens(cut: Cut, vocabulary_place: Path, advance: Advance) -> None:
    """Task: how many genes of the vocabulary each cell of a sorted piece has, int64 (cells,)."""
    piece, place = read_piece(cut.sorted), _memory_map(vocabulary_place)
    within = np.concatenate([[0], np.cumsum(place[piece.genes] != ABSENT, dtype=np.int64)])
    publish_array(cut.num_tokens, np.diff(within[piece.offsets]))
    advance(cut.stop - cut.start)


@dataclass(frozen=True)
class Shuffled:
    """All sorted pieces as one set of cells in store order. It names files and holds none: workers get a copy."""

    cuts: list[Cut]
    folder: Path

    @property
    def places(self) -> Path:
        """(cells,) _PLACE: where each row of the store lies in the pieces."""
        return self.folder / "places.npy"

    def vocabulary_place(self, source: int) -> Path:
        """int32 (genes of the source,): number in the vocabulary, or ABSENT."""
        return self.folder / f"vocabulary-{source:06d}.npy"

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """int64 (rows,)"""
        of_piece = np.array([cut.source for cut in self.cuts], dtype=np.int64)
        return of_piece[_memory_map(self.places)["piece"][rows]]

    def collect(self, rows: np.ndarray) -> Piece:
        """The cells at ascending `rows`, genes by their number in the vocabulary (int32), counts uint16."""
        places = _memory_map(self.places)[rows]
        by_piece = np.argsort(places["piece"], kind="stable")
        ordered = places[by_piece]
        genes = np.empty(int(ordered["num_raw"].sum(dtype=np.int64)), dtype=np.int32)
        counts = np.empty(len(genes), dtype=np.uint16)
        done = 0
        for piece, start, stop in _runs(ordered):
            cut = self.cuts[piece]
            into = slice(done, done + stop - start)
            place = _memory_map(self.vocabulary_place(cut.source))
            np.take(place, _memory_map(_file(cut.sorted, "genes"))[start:stop], out=genes[into])
            counts[into] = _memory_map(_file(cut.sorted, "counts"))[start:stop]
            done = into.stop
        kept = genes != ABSENT
        ends = np.cumsum(ordered["num_raw"], dtype=np.int64)
        if not kept.all():
            ends = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])[ends]
            genes, counts = genes[kept], counts[kept]
        lengths = np.diff(ends, prepend=0)
        back = np.empty(len(rows), dtype=np.int64)
        back[by_piece] = np.arange(len(rows))
        at = _token_places((ends - lengths)[back], lengths[back])
        offsets = np.concatenate([[0], np.cumsum(lengths[back])])
        return Piece(rows, offsets, np.take(genes, at), np.take(counts, at))


def ranges_of_rows(indptr: np.ndarray, first: int, last: int, most_tokens: int) -> Iterator[np.ndarray]:
    """The rows first .. last - 1, some at a time: at most so many tokens, or one cell. `indptr` (cells + 1,)"""
    while first < last:
        fits = int(np.searchsorted(indptr, indptr[first] + most_tokens, side="right")) - 1
        stop = min(max(fits, first + 1), last)
        yield np.arange(first, stop)
        first = stop


def index_cells(shuffled: Shuffled, num_cells: int) -> np.ndarray:
    """Write where each row lies; int64 (cells,): the tokens of each row that are in the vocabulary."""
    places = np.empty(num_cells, dtype=_PLACE)
    num_tokens = np.empty(num_cells, dtype=np.int64)
    for number, cut in enumerate(shuffled.cuts):
        rows, offsets = _read_cells(cut.sorted)
        part = np.empty(len(rows), dtype=_PLACE)
        part["piece"], part["num_raw"], part["start"] = number, np.diff(offsets), offsets[:-1]
        places[rows] = part
        num_tokens[rows] = np.load(cut.num_tokens, allow_pickle=False)
    publish_array(shuffled.places, places)
    return num_tokens


def _runs(ordered: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(piece, start, stop) of the tokens that lie side by side, for places ordered by piece and row."""
    stops = ordered["start"] + ordered["num_raw"]
    breaks = (ordered["start"][1:] != stops[:-1]) | (ordered["piece"][1:] != ordered["piece"][:-1])
    firsts = np.concatenate([[0], np.flatnonzero(breaks) + 1])[: len(ordered)]
    lasts = np.concatenate([firsts[1:] - 1, [len(ordered) - 1]])[: len(ordered)]
    yield from zip(
        ordered["piece"][firsts].tolist(), ordered["start"][firsts].tolist(), stops[lasts].tolist(), strict=True
    )


def _token_places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: starts[i], starts[i] + 1, ... lengths[i] of them, one cell after the other."""
    before = np.cumsum(lengths) - lengths
    places = np.repeat(starts - before, lengths)
    places += np.arange(len(places))
    return places


def _read_cells(name: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(_file(name, "cells", "npz"), allow_pickle=False) as file:
        return file["rows"], file["offsets"]


def _memory_map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _file(name: Path, part: str, suffix: str = "npy") -> Path:
    return name.with_name(f"{name.name}.{part}.{suffix}")
