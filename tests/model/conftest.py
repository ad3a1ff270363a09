"""Small models with nothing special about their weights, and packs of random contexts for them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cctrain.config import MemoryConfig, ModelConfig
from cctrain.model.transformer import Inputs, Transformer

NUM_GENES = 30
ATTENTIONS = ("criss_cross", "dense")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def small_config(attention: str = "criss_cross") -> ModelConfig:
    """Latents of another width than tokens, so that no two dimensions can be mistaken for each other."""
    return ModelConfig(attention=attention, width=16, depth=3, heads=2, latents=5, latent_width=12)


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Every parameter becomes random, gains around 1, so that nothing is zero and nothing is symmetric."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3 * noise)
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                part.weight += 1


def random_model(
    config: ModelConfig,
    num_genes: int = NUM_GENES,
    seed: int = 0,
    memory: MemoryConfig | None = None,
    capacity: int = 0,
) -> Transformer:
    """In float64."""
    draws = torch.Generator().manual_seed(seed)
    share = torch.rand(num_genes, generator=draws, dtype=torch.float64) + 0.1
    theta = torch.rand(num_genes, generator=draws, dtype=torch.float64) + 0.5
    model = Transformer(config, share / share.sum(), theta, memory, capacity).double()
    randomize(model, seed)
    return model


def random_inputs(lengths: list[int], seed: int = 0, num_genes: int = NUM_GENES) -> Inputs:
    """Contexts of these lengths in float64; about a third of the tokens are targets."""
    draws = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    counts = 1 + torch.poisson(torch.full((total,), 3.0, dtype=torch.float64), generator=draws)
    targets = torch.nonzero(torch.rand(total, generator=draws) < 0.35).ravel()
    counts[targets] = 0
    sizes = torch.randn(len(lengths), generator=draws, dtype=torch.float64)
    return Inputs(
        genes=torch.cat([torch.randperm(num_genes, generator=draws)[:length] for length in lengths]),
        counts=counts,
        log_size_factors=torch.repeat_interleave(sizes, torch.tensor(lengths)),
        targets=targets,
        offsets=[0, *torch.tensor(lengths).cumsum(0).tolist()],
    )


def on(device: str, inputs: Inputs) -> Inputs:
    tensors = {name: value.to(device) for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    return replace(inputs, **tensors)


def in_fp32(inputs: Inputs) -> Inputs:
    return replace(inputs, counts=inputs.counts.float(), log_size_factors=inputs.log_size_factors.float())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
