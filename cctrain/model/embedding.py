"""One token: a gene, and either its visible count or the mask that stands for a hidden one.

    visible   gene + encode(log(1 + count), log(1 + expected count))
    target    gene + mask

The count enters continuously, through a small MLP, beside what the gene mean would expect at the cell's
visible depth: 3 counts mean much for a gene of which 0.1 were expected. A target's own count never comes
here; the batch does not hold it. In a context of several cells a projection of the cell's signs is added, by which
tokens of one cell find each other.
"""

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """`gene` looks up the genes' vectors, `cell` projects the cells' signs; calling the module gives what is added."""

    def __init__(self, num_genes: int, width: int, cell_encoding: int = 0):
        super().__init__()
        self.gene = nn.Embedding(num_genes, width)
        self.cell = nn.Linear(cell_encoding, width, bias=False) if cell_encoding else None
        self.mask = nn.Parameter(torch.empty(width))
        self.count_up = nn.Linear(2, width)
        self.count_down = nn.Linear(width, width, bias=False)

    def forward(self, counts: Tensor, log_expected: Tensor, is_target: Tensor) -> Tensor:
        """counts fp32 (0 at targets), log_expected fp32, is_target bool, all (tokens,), give (tokens, width)."""
        features = torch.stack((torch.log1p(counts), torch.log1p(log_expected.exp())), dim=-1)
        encoded = self.count_down(nn.functional.gelu(self.count_up(features.to(self.mask.dtype))))
        return torch.where(is_target.unsqueeze(-1), self.mask, encoded)
