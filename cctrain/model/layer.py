"""The criss-cross layer and its dense control, pre-norm, on packed tokens.

    L ← L + Read (norm L, norm X)      latents read the tokens
    L ← L + MLP  (norm L)
    X ← X + Write(norm X, norm L)      tokens read the *updated* latents
    X ← X + MLP  (norm X)

The latent MLP stands before the write, so that the last layer's latent parameters receive a gradient too. Key
projections have no bias: softmax cancels it. Queries, values and outputs have none either; the MLPs do.

The token stream comes in tiles (see `tiles`): the read takes its keys and values tile by tile and merges what it
found; the write and the token MLP need nothing but their tile and the latents. A layer is made of four stages, which
`Activations` runs: latents to queries, tiles to what the latents read, latents to keys and values, tiles to tiles.

Prior art: Set Transformer's ISAB (Lee et al. 2019), Perceiver IO (Jaegle et al. 2021), Luna's pack and unpack
(Ma et al. 2021), RIN's read and write (Jabri et al. 2022), BiXT (Hiller et al. 2024).

Shapes: tiles (tokens of the tile, d), latents (contexts, M, d_latent); cuts say whose a tile's tokens are.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cctrain.model import attention
from cctrain.model.activations import Activations, place
from cctrain.model.merge import Exchange
from cctrain.model.tiles import Cut


class Norm(nn.LayerNorm):
    """Layer normalisation with a gain and no bias: from the precision of the stream to that of the weights."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), None, self.eps)
        return normed.to(self.weight.dtype)


class Read(nn.Module):
    """Latents read the tokens."""

    def __init__(self, width: int, latent_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_latents = Norm(latent_width)
        self.norm_tokens = Norm(width)
        self.query = nn.Linear(latent_width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, latent_width, bias=False)

    def queries(self, latents: Tensor) -> Tensor:
        return _split(self.query(self.norm_latents(latents)), self.heads)

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm_tokens(tokens)
        return _split(self.key(tokens), self.heads), _split(self.value(tokens), self.heads)


class Write(nn.Module):
    """Tokens read the latents."""

    def __init__(self, width: int, latent_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_tokens = Norm(width)
        self.norm_latents = Norm(latent_width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(latent_width, width, bias=False)
        self.value = nn.Linear(latent_width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def queries(self, tokens: Tensor) -> Tensor:
        return _split(self.query(self.norm_tokens(tokens)), self.heads)

    def keys_and_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.norm_latents(latents)
        return _split(self.key(latents), self.heads), _split(self.value(latents), self.heads)


class SelfAttention(nn.Module):
    """Tokens read each other."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def queries_keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.norm(tokens)
        query, key, value = (_split(project(tokens), self.heads) for project in (self.query, self.key, self.value))
        return query, key, value


class MLP(nn.Module):
    """norm, up to 4 × width, GELU, down."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = Norm(width)
        self.up = nn.Linear(width, 4 * width)
        self.activation = nn.GELU()
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(self.norm(x))))


class CrissCrossLayer(nn.Module):
    def __init__(self, width: int, latent_width: int, heads: int, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        self.read = Read(width, latent_width, heads)
        self.latent_mlp = MLP(latent_width)
        self.write = Write(width, latent_width, heads)
        self.token_mlp = MLP(width)
        self.finish = finish

    def forward(
        self,
        tiles: list[Tensor],
        latents: Tensor,
        cuts: list[Cut],
        activations: Activations,
        exchange: Exchange | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """`exchange` joins what the latents read with what they read of the same contexts elsewhere."""
        reading = attention.Reading(exchange, self.backend)

        def read(tile: Tensor, queries: Tensor, offsets: list[int]) -> Tensor:
            return reading.tile(queries, *self.read.keys_and_values(tile), offsets)

        queries = activations.run(self.read.queries, latents)
        links = [activations.run(read, tile, queries, cut.offsets) for tile, cut in zip(tiles, cuts, strict=True)]
        found, _ = reading.result(links)
        latents, keys, values = activations.run(self._update, latents, found)
        tiles = [
            place(activations.run(self._write, tile, keys, values, cut.offsets), room)
            for tile, cut, room in zip(tiles, cuts, activations.rooms(tiles), strict=True)
        ]
        return tiles, latents

    def _update(self, latents: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The new latents, and the keys and values that they show the tokens."""
        latents = latents + self.read.out(found.flatten(-2))
        latents = latents + self.latent_mlp(latents)
        return latents, *self.write.keys_and_values(latents)

    def _write(self, tile: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> Tensor:
        written = attention.write(self.write.queries(tile), keys, values, offsets, backend=self.backend)
        return self.finish(tile, written, self.write.out, self.token_mlp)


class DenseLayer(nn.Module):
    """The control: self-attention over the tokens in place of read and write."""

    def __init__(self, width: int, heads: int, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        self.attention = SelfAttention(width, heads)
        self.token_mlp = MLP(width)
        self.finish = finish

    def forward(self, tiles: list[Tensor], offsets: list[int], activations: Activations) -> list[Tensor]:
        """One stage: attention needs all the tokens at once."""
        return list(activations.run(self._attend, offsets, *tiles))

    def _attend(self, offsets: list[int], *tiles: Tensor) -> tuple[Tensor, ...]:
        parts = zip(*(self.attention.queries_keys_and_values(tile) for tile in tiles), strict=True)
        queries, keys, values = (torch.cat(part) for part in parts)
        attended = attention.self_attention(queries, keys, values, offsets, backend=self.backend)
        pieces = zip(tiles, attended.split([len(tile) for tile in tiles]), strict=True)
        return tuple(self.finish(tile, piece, self.attention.out, self.token_mlp) for tile, piece in pieces)


def finish(tile: Tensor, attended: Tensor, out: nn.Linear, mlp: MLP) -> Tensor:
    """The token-local rest of a layer, after its attention."""
    tile = tile + out(attended.flatten(-2))
    return tile + mlp(tile)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))
