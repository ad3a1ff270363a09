"""From a target's token to the negative binomial of its count.

    log μ = log(visible size factor) + b_g + f(token)        log θ = log θ_g(training) + δ_g
    f(token) = ⟨norm(token), w + P e_g⟩ / √width

b_g is the log mean share of gene g in the training cells and θ_g its maximum-likelihood dispersion, both
constants; e_g is the gene's embedding. w, P and δ start at zero, so an untrained model *is* the gene-mean
baseline and every gain is earned. Everything here is fp32, whatever the precision of the layers.
"""

import torch
from torch import Tensor, nn


class NegativeBinomialHead(nn.Module):
    """Tokens of targets (T, width) become log μ and log θ, both fp32 (T,)."""

    def __init__(self, num_genes: int, width: int):
        super().__init__()
        self.width = width
        self.direction = nn.Parameter(torch.zeros(width))
        self.gene_direction = nn.Parameter(torch.zeros(width, width))
        self.log_theta_shift = nn.Parameter(torch.zeros(num_genes))

    def forward(
        self, tokens: Tensor, gene_vectors: Tensor, genes: Tensor, log_expected: Tensor, log_theta: Tensor
    ) -> tuple[Tensor, Tensor]:
        """gene_vectors (T, width) are the embeddings e_g of the targets `genes` (T,); log_expected and log_theta
        (T,) are what the gene mean says of them."""
        normed = nn.functional.layer_norm(tokens.float(), (self.width,))
        directions = self.direction.float() + gene_vectors.float() @ self.gene_direction.float().T
        change = (normed * directions).sum(-1) * self.width**-0.5
        return log_expected + change, log_theta + self.log_theta_shift.float()[genes]
