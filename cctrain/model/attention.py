"""Packed attention: many contexts of any length in one flat array, none of which sees another.

    read   latents read the tokens    Q = latents (M per context)   K, V = tokens (n of the context)
    write  tokens read the latents    Q = tokens                    K, V = latents
    self   tokens read each other     the dense control

Each is softmax(Q Kᵀ / √d_head) V within one context. The cost of read and write is n·M, of self n². A pack is
attended context by context through PyTorch's `scaled_dot_product_attention`, so nothing is padded, and no FLOP
is spent on another context's tokens.

Shapes: H heads of D dimensions; `total` is the number of tokens of the whole pack; context i holds the tokens
`offsets[i]:offsets[i + 1]`. Offsets are a list of Python integers: they shape the computation, so they live on
the host.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def read(queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> Tensor:
    """Latents (contexts, M, H, D) read keys and values (total, H, D); returns (contexts, M, H, D).

    A context without tokens reads exactly zero.
    """
    outputs = []
    for context, (start, stop) in enumerate(pairwise(offsets)):
        if start == stop:
            outputs.append(torch.zeros_like(queries[context]))
        else:
            outputs.append(_attend(queries[context], keys[start:stop], values[start:stop]))
    return torch.stack(outputs)


def write(queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> Tensor:
    """Tokens (total, H, D) read the latents (contexts, M, H, D) of their context; returns (total, H, D)."""
    outputs = [
        _attend(queries[start:stop], keys[context], values[context])
        for context, (start, stop) in enumerate(pairwise(offsets))
        if start != stop
    ]
    return torch.cat(outputs) if outputs else torch.zeros_like(queries)


def self_attention(queries: Tensor, keys: Tensor, values: Tensor, offsets: list[int]) -> Tensor:
    """Tokens (total, H, D) read all tokens of their context; returns (total, H, D)."""
    outputs = [
        _attend(queries[start:stop], keys[start:stop], values[start:stop])
        for start, stop in pairwise(offsets)
        if start != stop
    ]
    return torch.cat(outputs) if outputs else torch.zeros_like(queries)


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One context: (q, H, D) against (k, H, D) gives (q, H, D)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (queries, keys, values))
    return scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)
