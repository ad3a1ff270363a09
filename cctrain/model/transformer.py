"""The whole model: tokens of packed contexts in, the negative binomials of their targets out.

It knows nothing of files, ranks or DeepSpeed. Depth and width come from `ModelConfig`; the constants of the
gene-mean baseline are buffers, so a saved model predicts by itself.

Initialisation. Every matrix is drawn from N(0, 1/fan_in), so a branch keeps the variance of its normalised
input. A stream receives 2·depth branches; each branch's last matrix is divided by √(2·depth) (GPT-2,
Radford et al. 2019), so the stream's variance about doubles over the whole depth, whatever the depth is, and
every branch carries about 1/√(2·depth) of it. Latents start small (0.02), because what they read from a cell is
an average over thousands of tokens: beside latents of unit variance it would be lost. Gene embeddings start as
the principal loadings of the training cells' log counts, turned at random, plus noise: genes that vary together
start alike. (From noise alone, the same model needed more steps than the quick start has to learn anything.)
The head starts at zero (see `head`).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import cast

import torch
from torch import Tensor, nn

from cctrain.config import MemoryConfig, ModelConfig
from cctrain.model.activations import Activations, place
from cctrain.model.embedding import TokenEmbedding
from cctrain.model.head import NegativeBinomialHead
from cctrain.model.layer import MLP, CrissCrossLayer, DenseLayer, Norm, Read, SelfAttention, Write, finish
from cctrain.model.merge import Exchange
from cctrain.model.tiles import TILE_TOKENS, Cut, cut_into_tiles


@dataclass(frozen=True)
class Inputs:
    """A pack of contexts as the model sees it: no target count is here, nor anything computed from one.

    genes (total,) int64; counts (total,) fp32, 0 at targets; log_size_factors (total,) fp32, of each token's
    cell; targets (T,) int64, the indices of the targets among the tokens; offsets, contexts + 1 integers. A model with
    a cell encoding needs the others: cells (total,) int64, the index of each token's cell; encodings (cells,
    cell_encoding) fp32.
    """

    genes: Tensor
    counts: Tensor
    log_size_factors: Tensor
    targets: Tensor
    offsets: list[int]
    cells: Tensor | None = None
    encodings: Tensor | None = None


class Transformer(nn.Module):
    """`attention` is `criss_cross` or `dense`; share and theta (genes,) come from the training cells.

    `memory` changes nothing about the result. `capacity` is the most tokens that any pack will hold: packs are cut
    into as many tiles as it needs, so that all ranks make the same calls. With an `exchange`, the packs of several
    models are slices of the same contexts, and their latents read all of them. `progress`, which may be set at any
    time, is called many times in forward and backward: a step on a context of millions of tokens takes long.
    """

    log_share: Tensor
    log_theta: Tensor
    latents: nn.Parameter | None

    def __init__(
        self,
        config: ModelConfig,
        share: Tensor,
        theta: Tensor,
        memory: MemoryConfig | None = None,
        capacity: int = 0,
        exchange: Exchange | None = None,
    ):
        super().__init__()
        num_genes, width = len(share), config.width
        self.width = width
        self.memory = memory or MemoryConfig()
        self.capacity = capacity
        self.exchange = exchange
        self.progress: Callable[[], object] | None = None
        self.register_buffer("log_share", share.double().log().float())
        self.register_buffer("log_theta", theta.double().log().float())
        self.embedding = TokenEmbedding(num_genes, width, config.cell_encoding or 0)
        if config.attention == "criss_cross":
            latent_width = config.latent_width or width
            self.latents = nn.Parameter(torch.empty(config.latents, latent_width))
            layers: list[nn.Module] = [
                CrissCrossLayer(width, latent_width, config.heads, config.backend) for _ in range(config.depth)
            ]
        else:
            self.register_parameter("latents", None)
            layers = [DenseLayer(width, config.heads, config.backend) for _ in range(config.depth)]
        self.layers = nn.ModuleList(layers)
        self.head = NegativeBinomialHead(num_genes, width)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """log μ and log θ of every target, fp32 (T,)."""
        cuts, activations = self._cut(inputs), self._activations()
        numbers = _targets_by_tile(inputs.targets, cuts)
        tiles, _ = self._encode(inputs, cuts, activations)
        genes = inputs.genes[inputs.targets]
        log_expected = inputs.log_size_factors[inputs.targets] + self.log_share[genes]
        whole = inputs.targets, self.embedding.gene(genes), genes, log_expected, self.log_theta[genes]
        pieces = zip(tiles, cuts, *(tensor.split(numbers) for tensor in whole), strict=True)
        predicted = [
            activations.run(self._predict, tile, targets - cut.start, *rest) for tile, cut, targets, *rest in pieces
        ]
        log_mu, log_theta = zip(*predicted, strict=True)
        return torch.cat(log_mu), torch.cat(log_theta)

    def embed(self, inputs: Inputs) -> Tensor:
        """One vector for each context, fp32: the mean of its normalised latents (dense: of its tokens)."""
        tokens, latents = self.encode(inputs)
        if latents is not None:
            return _normed(latents).mean(dim=1)
        normed = _normed(tokens)
        bounds = pairwise(inputs.offsets)
        return torch.stack([normed[start:stop].sum(dim=0) / max(1, stop - start) for start, stop in bounds])

    def encode(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """Tokens (total, width) and latents (contexts, M, latent_width) after the last layer; dense has none."""
        tiles, latents = self._encode(inputs, self._cut(inputs), self._activations())
        return torch.cat(tiles), latents

    def compile_token_local(self) -> None:
        """Let torch.compile fuse what follows attention in every layer, most of the arithmetic."""
        compiled = torch.compile(finish, dynamic=True)
        for layer in self.layers:
            cast(CrissCrossLayer | DenseLayer, layer).finish = compiled

    def _cut(self, inputs: Inputs) -> list[Cut]:
        tile_tokens = self.memory.tile_tokens or TILE_TOKENS[inputs.genes.device.type]
        return cut_into_tiles(inputs.offsets, -(-max(inputs.offsets[-1], self.capacity, 1) // tile_tokens))

    def _activations(self) -> Activations:
        return Activations(self.memory.checkpointing, self.memory.offload, self.memory.offload_dir, self.progress)

    def _encode(self, inputs: Inputs, cuts: list[Cut], activations: Activations) -> tuple[list[Tensor], Tensor | None]:
        tiles = self._embed_tokens(inputs, cuts, activations)
        if self.latents is None:
            for layer in self.layers:
                with activations.layer():
                    tiles = layer(tiles, inputs.offsets, activations)
            return tiles, None
        latents = _as_stream(self.latents).expand(len(inputs.offsets) - 1, -1, -1)
        for layer in self.layers:
            with activations.layer():
                tiles, latents = layer(tiles, latents, cuts, activations, self.exchange)
        return tiles, latents

    def _embed_tokens(self, inputs: Inputs, cuts: list[Cut], activations: Activations) -> list[Tensor]:
        is_target = torch.zeros_like(inputs.genes, dtype=torch.bool)
        is_target[inputs.targets] = True
        log_expected = inputs.log_size_factors + self.log_share[inputs.genes]
        # All genes at once: the gradient of a look-up is as large as the table.
        lengths = [cut.stop - cut.start for cut in cuts]
        genes = _as_stream(self.embedding.gene(inputs.genes)).split(lengths)
        counts = (tensor.split(lengths) for tensor in (inputs.counts, log_expected, is_target))
        of_cells = self._cell_vectors(inputs, lengths)
        pieces = zip(genes, of_cells, activations.rooms(list(genes)), *counts, strict=True)
        return [
            place(vectors + of_cell + activations.run(self.embedding, *known), room)
            for vectors, of_cell, room, *known in pieces
        ]

    def _cell_vectors(self, inputs: Inputs, lengths: list[int]) -> Iterator[Tensor | int]:
        """What each tile's tokens have in common with the others of their cell."""
        if self.embedding.cell is None:
            return repeat(0, len(lengths))
        assert inputs.cells is not None
        assert inputs.encodings is not None
        projection = self.embedding.cell
        vectors = _as_stream(projection(inputs.encodings.to(projection.weight.dtype)))
        return (vectors[cells] for cells in inputs.cells.split(lengths))

    def _predict(self, tile: Tensor, targets: Tensor, *of_targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(tile[targets], *of_targets)


def _targets_by_tile(targets: Tensor, cuts: list[Cut]) -> list[int]:
    """How many of the targets, ascending, each tile has."""
    stops = torch.tensor([cut.stop for cut in cuts], dtype=targets.dtype, device=targets.device)
    upto = [0, *torch.searchsorted(targets, stops).tolist()]
    return [after - before for before, after in pairwise(upto)]


def _as_stream(x: Tensor) -> Tensor:
    """Streams are at least fp32: in bf16, 128 rounded additions bury what one cell differs by from another."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normed(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x.float(), x.shape[-1:])


Whole = Callable[[Iterable[nn.Parameter]], AbstractContextManager[object]]


def _already_whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[object]:
    return nullcontext()


def initialize(model: Transformer, loadings: Tensor, seed: int, whole: Whole = _already_whole) -> None:
    """Set the initial weights, drawn on the CPU in fp32 from their own generator: the same on every rank and device.

    loadings (genes, K), mean square norm 1 a gene, say which genes vary together. Within whole(parameters) these may
    be changed, where ranks hold but a part of them.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = len(model.layers)
    lasts = {id(last.weight) for last in last_of_each_branch(model)}

    def draw(parameter: Tensor, std: float) -> None:
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if id(module.weight) in lasts:
                    std /= math.sqrt(2 * depth)
                with whole(module.parameters(recurse=False)):
                    draw(module.weight, std)
                    if module.bias is not None:
                        module.bias.zero_()
            elif isinstance(module, Norm):
                with whole(module.parameters(recurse=False)):
                    module.weight.fill_(1.0)
        embedding = model.embedding
        with whole(embedding.gene.parameters()):
            embedding.gene.weight.copy_(_initial_gene_vectors(loadings.float(), model.width, generator))
        with whole([embedding.mask]):
            draw(embedding.mask, 1.0)
        if model.latents is not None:
            with whole([model.latents]):
                draw(model.latents, 0.02)
        with whole(model.head.parameters()):
            for parameter in model.head.parameters():
                parameter.zero_()


def _initial_gene_vectors(loadings: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """(genes, width): loadings of mean square 1 in a random basis, and noise that tells alike genes apart."""
    num_genes = len(loadings)
    kept = loadings[:, :width]
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[: kept.shape[1]]
    noise = torch.randn(num_genes, width, generator=generator)
    return kept @ basis * math.sqrt(width) + 0.3 * noise


def last_of_each_branch(model: Transformer) -> Iterator[nn.Linear]:
    """The matrix that writes each branch into its stream."""
    for module in model.modules():
        if isinstance(module, (Read, Write, SelfAttention)):
            yield module.out
        elif isinstance(module, MLP):
            yield module.down


def gene_tables(model: Transformer) -> dict[str, Tensor]:
    """The parameters with a row per gene, by name."""
    return {"embedding.gene.weight": model.embedding.gene.weight, "head.log_theta_shift": model.head.log_theta_shift}
