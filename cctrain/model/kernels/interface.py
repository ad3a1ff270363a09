"""What a backend offers: the read, the write and self-attention, each forward and backward, on packed tokens.

Shapes, with H heads of D dimensions, M latents a context, and `total` tokens of which context i holds
`offsets[i]:offsets[i + 1]`:

    read    queries (contexts, M, H, D)   keys, values (total, H, D)
    write   queries (total, H, D)         keys, values (contexts, M, H, D)
    self    queries, keys, values (total, H, D)

A forward takes (queries, keys, values, offsets) and returns out, shaped and typed like the queries, and lse, their
shape without D: the log of the sum of the exponentials of the scores, fp32 (fp64 for fp64). Scores are divided by
√D. A query without keys has out 0 and lse `NO_KEYS`.

A backward takes (grad_out, queries, keys, values, out, lse, offsets) and returns the gradients of queries, keys and
values. Out and lse may be those over more keys than it is given: then the gradients are this part's share, which is
what makes a merge over parts exact.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor, list[int]], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[int]], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Kernels:
    read_forward: Forward
    read_backward: Backward
    write_forward: Forward
    write_backward: Backward
    self_forward: Forward
    self_backward: Backward
