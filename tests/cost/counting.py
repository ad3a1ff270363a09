"""What PyTorch really did: FLOPs by the operators it dispatched, bytes by its allocations; and small models for it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cctrain.config import MemoryConfig, ModelConfig
from cctrain.model.transformer import Inputs, Transformer
from tests.model.conftest import randomize

NUM_GENES = 40
MODELS = {
    "criss_cross": ModelConfig(width=32, depth=2, heads=4, latents=8),
    "wide latents": ModelConfig(width=32, depth=3, heads=2, latents=6, latent_width=48),
    "narrow latents": ModelConfig(width=48, depth=1, heads=4, latents=16, latent_width=20),
    "dense": ModelConfig(attention="dense", width=32, depth=2, heads=4, latent_width=48),
}
# The reference is made of plain products; the other is what trains on CPUs.
BACKENDS = ("reference", "flash_cpu")
ATEN = torch.ops.aten


def _flash(queries: tuple[int, ...], keys: tuple[int, ...], *_: object, out_shape: object = None, **__: object) -> int:
    """Scores and values: two products, of shapes (batch, heads, length, head width)."""
    batch, heads, length, width = queries
    return 2 * 2 * batch * heads * length * keys[2] * width


def _flash_backward(_: object, queries: tuple[int, ...], keys: tuple[int, ...], *__: object, **___: object) -> int:
    """The scores again, and four gradients: five products."""
    batch, heads, length, width = queries
    return 5 * 2 * batch * heads * length * keys[2] * width


# PyTorch itself counts them as nothing.
FLASH_ON_CPU = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: _flash,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}
ATTENTION = (ATEN.bmm, *FLASH_ON_CPU)


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """FLOPs that `run` took in all, and in attention alone."""
    with FlopCounterMode(display=False, custom_mapping=FLASH_ON_CPU) as counter:
        run()
    of_operator = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), sum(of_operator.get(operator, 0) for operator in ATTENTION)


class OperatorsGiving(TorchDispatchMode):
    """How often each operator gave a tensor of this shape, by its name."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.times = shape, Counter[str]()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.shape == self.shape:
            self.times[operator.overloadpacket.__name__] += 1
        return found


def most_allocated(run: Callable[[], object]) -> int:
    """The most bytes at a time that PyTorch's allocator on the CPU gave out in `run`, on threads that it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def built(
    config: ModelConfig,
    num_genes: int = NUM_GENES,
    checkpointing: bool = False,
    backend: str = "reference",
    tile_tokens: int | None = None,
) -> Transformer:
    share, theta = torch.full((num_genes,), 1 / num_genes), torch.ones(num_genes)
    memory = MemoryConfig(checkpointing, tile_tokens=tile_tokens)
    model = Transformer(replace(config, backend=backend), share, theta, memory)
    randomize(model)
    return model


def inputs_of(lengths: list[int], num_targets: int) -> Inputs:
    """Targets are spread evenly."""
    total = sum(lengths)
    return Inputs(
        genes=torch.arange(total) % NUM_GENES,
        counts=torch.ones(total),
        log_size_factors=torch.zeros(total),
        targets=torch.arange(num_targets) * total // num_targets,
        offsets=[0, *np.cumsum(lengths).tolist()],
    )
