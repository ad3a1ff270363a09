import numpy as np
import pytest

from cctrain.data.store import chunk_cache
from cctrain.data.store.chunk_cache import ChunkCache


class Numbers:
    """1,000 tokens, gene i and count i, in chunks of unequal size, one of them empty; remembers what it decoded."""

    edges = np.array([0, 100, 130, 130, 400, 401, 600, 1000])
    genes_dtype, counts_dtype = np.dtype(np.uint16), np.dtype(np.uint32)

    def __init__(self) -> None:
        self.decoded: list[tuple[int, int]] = []

    def decode(self, first: int, last: int, genes: np.ndarray, counts: np.ndarray) -> None:
        self.decoded.append((first, last))
        genes[:] = counts[:] = np.arange(self.edges[first], self.edges[last])


def runs(*pairs: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    starts, stops = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return starts, stops


def expected(*pairs: tuple[int, int]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=int), *(np.arange(*pair) for pair in pairs)])


@pytest.mark.parametrize("most_bytes", [0, 500, 3_000, 10**9])
def test_any_runs_come_in_the_order_asked_for_whatever_is_kept(most_bytes):
    cache, draws = ChunkCache(Numbers(), most_bytes), np.random.default_rng(0)
    for _ in range(200):
        starts = draws.integers(0, 1000, size=draws.integers(0, 6))
        stops = np.minimum(starts + draws.integers(0, 400, size=len(starts)), 1000)
        genes, counts = cache.read(starts, stops)
        wanted = expected(*zip(starts.tolist(), stops.tolist(), strict=True))
        assert np.array_equal(genes, wanted)
        assert np.array_equal(counts, wanted)
        assert (genes.dtype, counts.dtype) == (np.uint16, np.uint32)


def test_what_was_read_is_not_decoded_again():
    shards = Numbers()
    cache = ChunkCache(shards, 10**9)
    cache.read(*runs((0, 1000)))
    cache.read(*runs((990, 1000), (5, 130), (5, 7)))
    assert shards.decoded == [(0, 7)]


def test_scattered_runs_decode_each_chunk_once_and_neighbours_together():
    shards = Numbers()
    ChunkCache(shards, 10**9).read(*runs((110, 120), (700, 710), (410, 420), (3, 4), (101, 102)))
    assert shards.decoded == [(0, 2), (5, 7)]


def test_what_was_not_used_for_longest_is_forgotten_first():
    shards = Numbers()
    cache = ChunkCache(shards, 6 * (400 + 270 + 30))  # bytes of the last chunk, of 130 to 400 and of 100 to 130
    for run in [(600, 1000), (130, 400), (600, 601), (100, 130), (401, 600)]:
        cache.read(*runs(run))
    shards.decoded.clear()
    cache.read(*runs((100, 130)))
    cache.read(*runs((130, 131)))
    assert shards.decoded == [(3, 4)]


def test_no_more_is_kept_than_allowed():
    cache = ChunkCache(Numbers(), 2_000)
    for run in [(0, 100), (100, 130), (130, 400), (401, 600), (0, 1000), (400, 401)]:
        cache.read(*runs(run))
        assert sum(piece.genes.nbytes + piece.counts.nbytes for piece in cache._pieces.values()) <= 2_000
    assert set(cache._piece_of_chunk.values()) <= set(cache._pieces)


def test_a_run_inside_one_piece_is_a_view_that_cannot_be_written():
    cache = ChunkCache(Numbers(), 10**9)
    first, second = cache.read(*runs((100, 900)))[0], cache.read(*runs((200, 300)))[0]
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        second[0] = 7


def test_neighbouring_blocks_are_views_although_they_share_a_chunk():
    shards = Numbers()
    cache = ChunkCache(shards, 10**9)
    cache.read(*runs((0, 380)))
    block = cache.read(*runs((380, 1000)))[0]
    assert not block.flags.owndata
    assert shards.decoded == [(0, 4), (3, 7)]


def test_large_requests_are_decoded_in_lots():
    shards = Numbers()
    ChunkCache(shards, 6 * 300).read(*runs(*((start, start + 1) for start in range(0, 1000, 7))))
    assert len(shards.decoded) > 1
    assert all(Numbers.edges[last] - Numbers.edges[first] <= 700 for first, last in shards.decoded)


def test_long_runs_are_not_kept(monkeypatch):
    monkeypatch.setattr(chunk_cache, "_MOST_TOKENS_KEPT", 250)
    shards = Numbers()
    cache = ChunkCache(shards, 10**9)
    for _ in range(2):
        assert np.array_equal(cache.read(*runs((0, 500)))[0], np.arange(500))
    assert shards.decoded == [(0, 6), (0, 6)]
    assert not cache._pieces


def test_scattered_runs_over_much_are_kept_in_parts(monkeypatch):
    monkeypatch.setattr(chunk_cache, "_MOST_TOKENS_KEPT", 250)
    shards = Numbers()
    cache = ChunkCache(shards, 10**9)
    everywhere = runs(*((start, start + 1) for start in range(0, 1000, 10)))
    assert np.array_equal(cache.read(*everywhere)[0], everywhere[0])
    assert shards.decoded == [(0, 2), (3, 6), (6, 7)]
    assert np.array_equal(cache.read(*everywhere)[0], everywhere[0])
    assert len(shards.decoded) == 3


def test_no_runs_give_no_tokens():
    genes, counts = ChunkCache(Numbers(), 10**9).read(*runs())
    assert len(genes) == len(counts) == 0
    assert (genes.dtype, counts.dtype) == (np.uint16, np.uint32)
