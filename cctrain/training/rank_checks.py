"""For debugging: do all ranks still do the same thing? Switched on by `parallel.check_ranks`; a few percent slower.

Every rank must be at the same step; the ranks of a row must have run the same contexts, and hold the same latents
after the last layer; and without ZeRO 3, which keeps one copy of the weights in all, all must have the same weights.
Compared are sums of bits, so the least difference shows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cctrain.data.loading.loader import RankStep
from cctrain.errors import TrainingError
from cctrain.parallel.mesh import Mesh, gather_rows


@contextmanager
def same_on_all_ranks(engine: Any, mesh: Mesh, rank_step: RankStep, step: int) -> Iterator[None]:
    """Compare the ranks after what is done within, one optimizer step. Raises TrainingError on all of them."""
    model, latents = engine.module, []

    def note(layer: nn.Module, given: Any, result: Any) -> None:
        latents.append(checksum(result[1]))

    hook = model.layers[-1].register_forward_hook(note) if model.latents is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
    of_row = {f"the latents of micro-batch {index}": value for index, value in enumerate(latents)}
    for index, batch in enumerate(rank_step.batches):
        contexts = torch.from_numpy(batch.positions * 1_000_003 + batch.samples)
        of_row[f"the contexts of micro-batch {index}"] = checksum(contexts)
    of_all = {"the step": step, "the position": rank_step.position}
    if engine.zero_optimization_stage() < 3:
        of_all |= {f"the weight {name}": checksum(weight) for name, weight in model.named_parameters()}
    values = torch.tensor([*of_all.values(), *of_row.values()], dtype=torch.int64, device=mesh.device)
    everyone = gather_rows(values.unsqueeze(0)).unflatten(0, (-1, mesh.num_context_ranks))  # row, rank in it, value
    differs = torch.cat(
        ((everyone != everyone[:1, :1])[..., : len(of_all)], (everyone != everyone[:, :1])[..., len(of_all) :]), dim=2
    )
    names = [*of_all, *of_row]
    found = [f"{names[place]} on rank {rank}" for rank, place in differs.flatten(0, 1).nonzero().tolist()]
    if found:
        raise TrainingError(f"the ranks have diverged at step {step}: {', '.join(found[:8])}")


def checksum(tensor: Tensor) -> int:
    """A sum over the bits of a tensor, each element weighted by its place; int64, wrapping around."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    weights = torch.arange(1, len(flat) + 1, device=flat.device) % 65_521
    return int((flat.long() * (weights + 1)).sum())
