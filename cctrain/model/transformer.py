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
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cctrain.config import ModelConfig
from cctrain.model.embedding import TokenEmbedding
from cctrain.model.head import NegativeBinomialHead
from cctrain.model.layer import MLP, CrissCrossLayer, DenseLayer, Norm, Read, SelfAttention, Write


@dataclass(frozen=True)
class Inputs:
    """A pack of contexts as the model sees it: no target count is here, nor anything computed from one.

    genes (total,) int64; counts (total,) fp32, 0 at targets; log_size_factors (total,) fp32, of each token's
    cell; targets (T,) int64, the indices of the targets among the tokens; offsets, contexts + 1 integers.
    """

    genes: Tensor
    counts: Tensor
    log_size_factors: Tensor
    targets: Tensor
    offsets: list[int]


class Transformer(nn.Module):
    """`attention` is `criss_cross` or `dense`; share and theta (genes,) come from the training cells."""

    log_share: Tensor
    log_theta: Tensor
    latents: nn.Parameter | None

    def __init__(self, config: ModelConfig, share: Tensor, theta: Tensor, checkpointing: bool = False):
        super().__init__()
        num_genes, width = len(share), config.width
        self.width = width
        self.checkpointing = checkpointing
        self.register_buffer("log_share", share.double().log().float())
        self.register_buffer("log_theta", theta.double().log().float())
        self.embedding = TokenEmbedding(num_genes, width)
        if config.attention == "criss_cross":
            latent_width = config.latent_width or width
            self.latents = nn.Parameter(torch.empty(config.latents, latent_width))
            layers: list[nn.Module] = [CrissCrossLayer(width, latent_width, config.heads) for _ in range(config.depth)]
        else:
            self.register_parameter("latents", None)
            layers = [DenseLayer(width, config.heads) for _ in range(config.depth)]
        self.layers = nn.ModuleList(layers)
        self.head = NegativeBinomialHead(num_genes, width)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """log μ and log θ of every target, fp32 (T,)."""
        tokens, _ = self.encode(inputs)
        genes = inputs.genes[inputs.targets]
        log_expected = inputs.log_size_factors[inputs.targets] + self.log_share[genes]
        gene_vectors = self.embedding.gene(genes)
        return self.head(tokens[inputs.targets], gene_vectors, genes, log_expected, self.log_theta[genes])

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
        is_target = torch.zeros_like(inputs.genes, dtype=torch.bool)
        is_target[inputs.targets] = True
        log_expected = inputs.log_size_factors + self.log_share[inputs.genes]
        tokens = _as_stream(self.embedding(inputs.genes, inputs.counts, log_expected, is_target))
        latents = None
        if self.latents is not None:
            latents = _as_stream(self.latents).expand(len(inputs.offsets) - 1, -1, -1)
        for layer in self.layers:
            state = (tokens,) if latents is None else (tokens, latents)
            if self.checkpointing and torch.is_grad_enabled():
                result = checkpoint(layer, *state, inputs.offsets, use_reentrant=False, preserve_rng_state=False)
            else:
                result = layer(*state, inputs.offsets)
            tokens, latents = (result, None) if latents is None else result
        return tokens, latents


def _as_stream(x: Tensor) -> Tensor:
    """Streams are at least fp32: in bf16, 128 rounded additions bury what one cell differs by from another."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normed(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x.float(), x.shape[-1:])


def initialize(model: Transformer, loadings: Tensor, seed: int) -> None:
    """Set the initial weights, on the CPU, from their own generator: the same on every rank and device.

    loadings (genes, K), mean square norm 1 a gene, say which genes vary together.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = len(model.layers)
    lasts = {id(last.weight) for last in last_of_each_branch(model)}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if id(module.weight) in lasts:
                    std /= math.sqrt(2 * depth)
                module.weight.normal_(0.0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Norm):
                module.weight.fill_(1.0)
        embedding = model.embedding
        embedding.gene.weight.copy_(_initial_gene_vectors(loadings.float(), model.width, generator))
        embedding.mask.normal_(0.0, 1.0, generator=generator)
        if model.latents is not None:
            model.latents.normal_(0.0, 0.02, generator=generator)
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
