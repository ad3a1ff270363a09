"""The exact merge across ranks: the collectives by which slices of a context, on C ranks, become one context again.

What a layer moves is (M · d + M · heads) fp32 numbers a context forward, gathered, and M · d backward, summed:
nothing that grows with the number of tokens.
"""

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

    def reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        reduced = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(reduced, operation, group=group)
        return reduced

    return Exchange(
        num_shards,
        gather=lambda x: gather(x.contiguous()),
        sum=lambda x: reduce(x, dist.ReduceOp.SUM),
        max=lambda x: reduce(x, dist.ReduceOp.MAX),
    )
