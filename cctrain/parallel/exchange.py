"""The exact merge across ranks: the collectives by which slices of a context, on C ranks, become one context again.

What a layer moves is (M · d + M · heads) fp32 numbers a context forward, gathered, and M · d backward, summed:
nothing that grows with the number of tokens.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from cctrain.model.merge import Exchange
from cctrain.parallel.mesh import Mesh


def context_exchange(mesh: Mesh) -> Exchange | None:
    """Among the ranks of this rank's row; None where it is alone there."""
    if mesh.context_group is None:
        return None
    group, num_shards = mesh.context_group, mesh.num_context_ranks

    def gather(x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(num_shards)]
        dist.all_gather(gathered, x, group=group)
        return torch.stack(gathered)

    def reduce(operation: dist.ReduceOp.RedOpType, x: Tensor) -> Tensor:
        dist.all_reduce(x, operation, group=group)
        return x

    return Exchange(num_shards, gather, partial(reduce, dist.ReduceOp.SUM), partial(reduce, dist.ReduceOp.MAX))
