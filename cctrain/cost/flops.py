"""FLOPs of a training step, by component, from the configuration alone: the formulas are in README.md, "FLOPs and
parameters", and of the optimizer in "State".

Backward is twice forward: a gradient of the weights and one of the inputs, which the count features do not need. The
attention kernels compute the scores once more there, 2.5 times forward. Checkpointing repeats the forward of the
layers, but for the read, whose result is kept, and for the last product of each stage, which backward does not need.
Under ZeRO 3 that is repeated too: torch stops when everything that backward needs is there, and DeepSpeed's linear
layer says what it needs only after its product.

Products of matrices count, two for a multiply-add, and of the optimizer every operation, which is in no total (AdamW:
1 for decay, 3 + 4 for the moments, 6 for the step). Not counted: norms, activations, what the head does with a target's
vector, the loss, the projection of a cell's signs (once a cell); and that every context rank repeats the latents' part.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from cctrain.config import ModelConfig

ADAMW_FLOPS = 14  # a parameter


@dataclass(frozen=True)
class Flops:
    """By component; `attention`, of read, write and self-attention, scales with n·M or n²."""

    embedding: float = 0.0
    read: float = 0.0
    write: float = 0.0
    self_attention: float = 0.0
    token_projections: float = 0.0
    token_mlp: float = 0.0
    latents: float = 0.0
    head: float = 0.0

    @property
    def attention(self) -> float:
        return self.read + self.write + self.self_attention

    @property
    def total(self) -> float:
        return sum(self.by_component().values())

    def by_component(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class StepFlops:
    """Of one step over whole contexts, on all ranks together, without the optimizer."""

    forward: Flops
    backward: Flops
    recomputation: Flops

    @property
    def attention(self) -> float:
        return self.forward.attention + self.backward.attention + self.recomputation.attention

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total + self.recomputation.total

    def by_component(self) -> dict[str, float]:
        """Of the three together."""
        parts = [part.by_component() for part in (self.forward, self.backward, self.recomputation)]
        return {name: sum(part[name] for part in parts) for name in parts[0]}


def step_flops(
    model: ModelConfig, tokens: Sequence[float], targets: float, checkpointing: bool = False, zero_stage: int = 0
) -> StepFlops:
    """Contexts with these numbers of tokens, and `targets` targets in all."""
    forward, recomputation = forward_flops(model, tokens, targets), Flops()
    if checkpointing:
        recomputation = replace(forward, read=0.0)
        if zero_stage < 3:
            recomputation = _without_last_products(model, recomputation, len(tokens))
    return StepFlops(forward, _backward(model, forward, float(sum(tokens))), recomputation)


def forward_flops(model: ModelConfig, tokens: Sequence[float], targets: float) -> Flops:
    width, depth, n = model.width, model.depth, float(sum(tokens))
    shared = {
        "embedding": 2 * n * (2 * width + width**2),
        "token_projections": depth * 8 * n * width**2,
        "token_mlp": depth * 16 * n * width**2,
        "head": 2 * width**2 * targets,
    }
    if model.attention == "dense":
        return Flops(**shared, self_attention=depth * 4 * sum(length**2 for length in tokens) * width)
    latent_width = model.latent_width or width
    either_way = depth * 4 * n * model.latents * width
    of_a_latent = 8 * width * latent_width + 16 * latent_width**2
    return Flops(**shared, read=either_way, write=either_way, latents=depth * len(tokens) * model.latents * of_a_latent)


def optimizer_flops(parameters_updated: float) -> float:
    """Of one rank in a step."""
    return ADAMW_FLOPS * parameters_updated


def _backward(model: ModelConfig, forward: Flops, n: float) -> Flops:
    return Flops(
        embedding=2 * forward.embedding - 4 * n * model.width,
        read=2.5 * forward.read,
        write=2.5 * forward.write,
        self_attention=2.5 * forward.self_attention,
        token_projections=2 * forward.token_projections,
        token_mlp=2 * forward.token_mlp,
        latents=2 * forward.latents,
        head=2 * forward.head,
    )


def _without_last_products(model: ModelConfig, recomputation: Flops, num_contexts: int) -> Flops:
    """Of the token MLP the second product; of the latents' projections the read's query and the write's value."""
    of_a_latent = 4 * model.width * (model.latent_width or model.width) if model.attention == "criss_cross" else 0
    latents = recomputation.latents - model.depth * num_contexts * model.latents * of_a_latent
    return replace(recomputation, token_mlp=recomputation.token_mlp / 2, latents=latents)
