"""Decoded tokens, kept in memory up to a number of bytes: any runs of tokens, from shards that decode whole chunks.

What was decoded in one go is kept as one piece, and forgotten as one, the piece first that was not used for
longest. So a run of tokens that lies in a single piece is handed out as a view of it: a block of 1,024 cells is
copied nowhere between the codec and the caller. A single run as long as that is not kept at all: who reads so much at
once comes back an epoch later, and memory that is fresh from the system costs more (0.35 ms a MB) than reading and
checking what fills it (0.08 ms).
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_MOST_TOKENS_KEPT = 2**20  # in one piece
_LARGEST_MAPPING = 2**25 - 2**13  # glibc adapts to what is freed up to 32 MiB, its own header included


class Shards(Protocol):
    """Tokens in the chunks of some container; those of chunk i are edges[i] .. edges[i + 1] - 1."""

    edges: np.ndarray  # int64 (chunks + 1,)
    genes_dtype: np.dtype
    counts_dtype: np.dtype

    def decode(self, first: int, last: int, genes: np.ndarray, counts: np.ndarray) -> None:
        """The tokens of the chunks first .. last - 1 into the two arrays, which have their length."""
        ...


@dataclass(frozen=True)
class _Piece:
    first: int  # chunks first .. last - 1
    last: int
    start: int  # tokens start .. stop - 1
    stop: int
    genes: np.ndarray
    counts: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.genes.nbytes + self.counts.nbytes


class ChunkCache:
    """`most_bytes` bounds what is kept between reads; a read itself holds at most as much again, and its result."""

    def __init__(
        self, shards: Shards, most_bytes: int, check: Callable[[np.ndarray], None] = lambda genes: None
    ) -> None:
        """`check` looks at the genes of everything that is decoded, and raises where they cannot be."""
        self._shards = shards
        self._check = check
        self._most_bytes = most_bytes
        self._bytes = 0
        self._pieces: OrderedDict[int, _Piece] = OrderedDict()  # by number of the piece, longest unused first
        self._piece_of_chunk: dict[int, int] = {}
        self._num_made = 0
        _keep_freed_memory()

    def read(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Genes and counts of the tokens starts[i] .. stops[i] - 1 of every run i, end to end.

        starts and stops are int64 (runs,). The arrays have the stored types; views of the cache are read-only.
        """
        lengths = stops - starts
        into = np.cumsum(lengths) - lengths
        first_chunk = np.searchsorted(self._shards.edges, starts, side="right") - 1
        last_chunk = np.searchsorted(self._shards.edges, stops, side="left")
        if len(starts) == 1 and lengths[0]:
            is_kept = lengths[0] <= _MOST_TOKENS_KEPT
            held = self._hold(np.arange(first_chunk[0], last_chunk[0]), is_kept)
            piece = held[int(first_chunk[0])]
            if piece.stop >= stops[0]:
                tokens = slice(int(starts[0]) - piece.start, int(stops[0]) - piece.start)
                return piece.genes[tokens], piece.counts[tokens]
        genes, counts = self._empty(int(lengths.sum()))
        # In the order of the shards each chunk is needed once; with tokens in it, a run has a chunk.
        order = np.argsort(starts, kind="stable")
        order = order[lengths[order] > 0]
        for runs in self._batches(order, first_chunk, last_chunk):
            held = self._hold(_union(first_chunk[runs], last_chunk[runs]), is_kept=True)
            for run in runs.tolist():
                place, position, stop = int(into[run]), int(starts[run]), int(stops[run])
                chunk = int(first_chunk[run])
                while position < stop:
                    piece = held[chunk]
                    until = min(stop, piece.stop)
                    here = slice(position - piece.start, until - piece.start)
                    genes[place : place + until - position] = piece.genes[here]
                    counts[place : place + until - position] = piece.counts[here]
                    place, position, chunk = place + until - position, until, piece.last
        return genes, counts

    def _empty(self, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        types = self._shards.genes_dtype, self._shards.counts_dtype
        return np.empty(num_tokens, dtype=types[0]), np.empty(num_tokens, dtype=types[1])

    def _batches(self, order: np.ndarray, first_chunk: np.ndarray, last_chunk: np.ndarray) -> list[np.ndarray]:
        """The runs in `order` in lots whose chunks together stay near `most_bytes`."""
        edges = self._shards.edges
        reached = np.maximum.accumulate(last_chunk[order])
        before = np.concatenate([[0], reached[:-1]])[: len(order)]
        new = edges[last_chunk[order]] - edges[np.minimum(np.maximum(first_chunk[order], before), last_chunk[order])]
        bytes_per_token = self._shards.genes_dtype.itemsize + self._shards.counts_dtype.itemsize
        lot = np.cumsum(new) * bytes_per_token // max(1, self._most_bytes)
        return np.split(order, np.flatnonzero(np.diff(lot)) + 1) if len(order) else []

    def _hold(self, chunks: np.ndarray, is_kept: bool) -> dict[int, _Piece]:
        """The piece of each chunk (ascending numbers), from the cache, or decoded and then kept or not."""
        held: dict[int, _Piece] = {}
        for first, last in _consecutive(chunks.tolist()):
            missing = [chunk for chunk in range(first, last) if chunk not in self._piece_of_chunk]
            if 2 * len(missing) > last - first:
                missing = list(range(first, last))  # one piece, although some of it is there: it can be a view
            cached = set(range(first, last)).difference(missing)
            for chunk in cached:
                number = self._piece_of_chunk[chunk]
                self._pieces.move_to_end(number)
                held[chunk] = self._pieces[number]
            for low, high in _consecutive(missing):
                for first_decoded, last_decoded in self._parts(low, high) if is_kept else [(low, high)]:
                    piece = self._decode(first_decoded, last_decoded, is_kept)
                    held |= dict.fromkeys(range(first_decoded, last_decoded), piece)
        return held

    def _parts(self, first: int, last: int) -> list[tuple[int, int]]:
        """Chunks first .. last - 1 in ranges of some `_MOST_TOKENS_KEPT` tokens."""
        part = (self._shards.edges[first + 1 : last + 1] - self._shards.edges[first] - 1) // _MOST_TOKENS_KEPT
        cuts = (first + 1 + np.flatnonzero(np.diff(part))).tolist()
        return list(zip([first, *cuts], [*cuts, last], strict=True))

    def _decode(self, first: int, last: int, is_kept: bool) -> _Piece:
        """Chunks first .. last - 1 as a piece."""
        start, stop = int(self._shards.edges[first]), int(self._shards.edges[last])
        genes, counts = self._empty(stop - start)
        self._shards.decode(first, last, genes, counts)
        self._check(genes)
        genes.flags.writeable = counts.flags.writeable = False
        piece = _Piece(first, last, start, stop, genes, counts)
        if is_kept:
            self._keep(piece)
        return piece

    def _keep(self, piece: _Piece) -> None:
        """Into the cache, which forgets what was not used for longest."""
        number, self._num_made = self._num_made, self._num_made + 1
        self._pieces[number] = piece
        self._piece_of_chunk |= dict.fromkeys(range(piece.first, piece.last), number)
        self._bytes += piece.nbytes
        while self._bytes > self._most_bytes:
            oldest, forgotten = self._pieces.popitem(last=False)
            self._bytes -= forgotten.nbytes
            for chunk in range(forgotten.first, forgotten.last):
                if self._piece_of_chunk.get(chunk) == oldest:
                    del self._piece_of_chunk[chunk]


def _keep_freed_memory() -> None:
    """Have the allocator use freed arrays again, up to 64 MB of them.

    glibc gives large blocks back to the system as they are freed, unless one as large was freed before: then its
    thresholds have grown (mallopt(3), M_MMAP_THRESHOLD). Batches of 17 MB a time were made 4 times faster by it.
    Another allocator does not mind.
    """
    del_at_once = np.empty(_LARGEST_MAPPING, dtype=np.uint8)
    del del_at_once


def _consecutive(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges (first, last + 1)."""
    array = np.asarray(numbers, dtype=np.int64)
    cuts = np.flatnonzero(np.diff(array) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(array, cuts) if len(part)]


def _union(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The numbers in any of the ranges first[i] .. last[i] - 1, which are sorted by `first`; ascending."""
    ranges = [np.arange(low, high) for low, high in zip(first.tolist(), last.tolist(), strict=True)]
    return np.unique(np.concatenate(ranges))
