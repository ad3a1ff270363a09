"""The criss-cross layer and its dense control, pre-norm, on packed tokens.

    L ← L + Read (norm L, norm X)      latents read the tokens
    L ← L + MLP  (norm L)
    X ← X + Write(norm X, norm L)      tokens read the *updated* latents
    X ← X + MLP  (norm X)

The latent MLP stands before the write, so that the last layer's latent parameters receive a gradient too. Key
projections have no bias: softmax cancels it. Queries, values and outputs have none either; the MLPs do.

Prior art: Set Transformer's ISAB (Lee et al. 2019), Perceiver IO (Jaegle et al. 2021), Luna's pack and unpack
(Ma et al. 2021), RIN's read and write (Jabri et al. 2022), BiXT (Hiller et al. 2024).

Shapes: tokens (total, d), latents (contexts, M, d_latent), offsets as in `attention`.
"""

from torch import Tensor, nn
from torch.nn import functional

from cctrain.model import attention


class Norm(nn.LayerNorm):
    """Layer normalisation with a gain and no bias: from the precision of the stream to that of the weights."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), None, self.eps)
        return normed.to(self.weight.dtype)


class Read(nn.Module):
    def __init__(self, width: int, latent_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_latents = Norm(latent_width)
        self.norm_tokens = Norm(width)
        self.query = nn.Linear(latent_width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, latent_width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor, offsets: list[int]) -> Tensor:
        queries = self.query(self.norm_latents(latents))
        tokens = self.norm_tokens(tokens)
        shape = (self.heads, -1)
        result = attention.read(
            queries.unflatten(-1, shape),
            self.key(tokens).unflatten(-1, shape),
            self.value(tokens).unflatten(-1, shape),
            offsets,
        )
        return self.out(result.flatten(-2))


class Write(nn.Module):
    def __init__(self, width: int, latent_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_tokens = Norm(width)
        self.norm_latents = Norm(latent_width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(latent_width, width, bias=False)
        self.value = nn.Linear(latent_width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor, offsets: list[int]) -> Tensor:
        queries = self.query(self.norm_tokens(tokens))
        latents = self.norm_latents(latents)
        shape = (self.heads, -1)
        result = attention.write(
            queries.unflatten(-1, shape),
            self.key(latents).unflatten(-1, shape),
            self.value(latents).unflatten(-1, shape),
            offsets,
        )
        return self.out(result.flatten(-2))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = Norm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor, offsets: list[int]) -> Tensor:
        tokens = self.norm(tokens)
        shape = (self.heads, -1)
        result = attention.self_attention(
            self.query(tokens).unflatten(-1, shape),
            self.key(tokens).unflatten(-1, shape),
            self.value(tokens).unflatten(-1, shape),
            offsets,
        )
        return self.out(result.flatten(-2))


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
    def __init__(self, width: int, latent_width: int, heads: int):
        super().__init__()
        self.read = Read(width, latent_width, heads)
        self.latent_mlp = MLP(latent_width)
        self.write = Write(width, latent_width, heads)
        self.token_mlp = MLP(width)

    def forward(self, tokens: Tensor, latents: Tensor, offsets: list[int]) -> tuple[Tensor, Tensor]:
        latents = latents + self.read(tokens, latents, offsets)
        latents = latents + self.latent_mlp(latents)
        tokens = tokens + self.write(tokens, latents, offsets)
        tokens = tokens + self.token_mlp(tokens)
        return tokens, latents


class DenseLayer(nn.Module):
    """The control: self-attention over the tokens in place of read and write."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.token_mlp = MLP(width)

    def forward(self, tokens: Tensor, offsets: list[int]) -> Tensor:
        tokens = tokens + self.attention(tokens, offsets)
        return tokens + self.token_mlp(tokens)
