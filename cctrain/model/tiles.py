"""The token stream in tiles: consecutive pieces of the flat array of a pack, each with its own offsets.

Given the latents, everything that happens to a token is local to it. So it is done tile by tile, and what one tile
needs for a moment (the hidden layer of its MLP, its keys and values) does not grow with the length of the context.
"""

from dataclasses import dataclass
from itertools import pairwise

TILE_TOKENS = {"cpu": 4096, "cuda": 65_536}  # by default: on CPUs a tile shall stay in the cache


@dataclass(frozen=True)
class Cut:
    """Tokens `start:stop` of the pack; offsets, contexts + 1 integers, say whose they are, counted from `start`."""

    start: int
    stop: int
    offsets: list[int]


def cut_into_tiles(offsets: list[int], num_tiles: int) -> list[Cut]:
    """Tiles as equal as can be, wherever contexts begin and end; they may be empty."""
    total = offsets[-1]
    bounds = [total * tile // num_tiles for tile in range(num_tiles + 1)]
    return [
        Cut(start, stop, [min(max(offset, start), stop) - start for offset in offsets])
        for start, stop in pairwise(bounds)
    ]
