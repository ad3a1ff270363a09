"""What a context costs, computed from the configuration alone. A multiply-add counts 2 FLOPs.

Forward FLOPs of one layer for one context of n tokens, with M latents, width d and latent width d_l:

    read + write scores and values   8 · n · M · d                  the n·M term
    token projections                8 · n · d²                     the read's K and V, the write's Q and output
    token MLP                       16 · n · d²
    latents                          M · (8 · d · d_l + 16 · d_l²)  the other projections, and the latent MLP
    dense: scores and values         4 · n² · d                     in place of read and write
    dense: token projections         8 · n · d²

Embedding: 2·n·(2·d + d²) for the count encoding. Head: 2·d² + 4·d per target. Backward is twice forward, and the
attention kernels compute the scores once more there. Checkpointing repeats the forward of the layers, but for the
read, whose result is kept, and for the last product of each stage, which backward does not need. Norms, activations,
the loss and the projection of a cell's signs (once a cell) are not counted, nor is it that every context rank repeats
the latents' part.
"""

from dataclasses import dataclass

from cctrain.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs by component; `attention` is the part that scales with n·M (dense: n²)."""

    attention: float
    projections: float
    mlp: float
    latents: float
    embedding: float
    head: float

    @property
    def total(self) -> float:
        return self.attention + self.projections + self.mlp + self.latents + self.embedding + self.head


def forward_flops(model: ModelConfig, tokens: list[int], targets: int) -> Flops:
    """Forward FLOPs of contexts with these numbers of tokens and `targets` targets in all."""
    width, depth = model.width, model.depth
    total = sum(tokens)
    if model.attention == "criss_cross":
        latent_width = model.latent_width or width
        attention = 8 * total * model.latents * width
        latents = len(tokens) * model.latents * (8 * width * latent_width + 16 * latent_width**2)
    else:
        attention = 4 * sum(n * n for n in tokens) * width
        latents = 0
    return Flops(
        attention=depth * attention,
        projections=depth * 8 * total * width**2,
        mlp=depth * 16 * total * width**2,
        latents=depth * latents,
        embedding=2 * total * (2 * width + width**2),
        head=(2 * width**2 + 4 * width) * targets,
    )


def step_cost(model: ModelConfig, tokens: list[int], targets: int, checkpointing: bool) -> dict[str, float]:
    """The `cost/…` values of one training step over contexts with these numbers of tokens.

    n is the mean number of tokens of a context; FLOPs are of forward, backward and recomputation together.
    """
    forward = forward_flops(model, tokens, targets)
    recomputed = _recomputed(model, forward, len(tokens), targets) if checkpointing else _NOTHING
    attention = 3.5 * forward.attention + recomputed.attention
    total = 3 * (forward.total - forward.attention) + recomputed.total - recomputed.attention + attention
    n = sum(tokens) / len(tokens)
    cost = {
        "cost/n": n,
        "cost/attention_flops": attention,
        "cost/total_flops": total,
        "cost/attention_share": attention / total,
    }
    if model.attention == "criss_cross":
        cost |= {"cost/M": model.latents, "cost/n_times_M": n * model.latents}
    return cost


_NOTHING = Flops(0, 0, 0, 0, 0, 0)


def _recomputed(model: ModelConfig, forward: Flops, num_contexts: int, targets: int) -> Flops:
    width, latent_width = model.width, model.latent_width or model.width
    criss_cross = model.attention == "criss_cross"
    # Of a latent's projections, the query of the read and the value of the write end their stages.
    latent = 4 * width * latent_width + 16 * latent_width**2
    return Flops(
        attention=forward.attention / 2 if criss_cross else forward.attention,
        projections=forward.projections,
        mlp=forward.mlp / 2,
        latents=model.depth * num_contexts * model.latents * latent if criss_cross else 0,
        embedding=forward.embedding,
        head=2 * width**2 * targets,
    )


def num_parameters(model: ModelConfig, num_genes: int) -> int:
    """Trained parameters, exactly."""
    width, latent_width = model.width, model.latent_width or model.width
    embedding = num_genes * width + width + (2 * width + width) + width * width + (model.cell_encoding or 0) * width
    head = width + width * width + num_genes
    if model.attention == "criss_cross":
        read_write = 4 * width * width + 4 * width * latent_width + 2 * (width + latent_width)
        layer = read_write + _mlp_parameters(width) + _mlp_parameters(latent_width)
        return embedding + head + model.latents * latent_width + model.depth * layer
    return embedding + head + model.depth * (4 * width * width + width + _mlp_parameters(width))


def _mlp_parameters(width: int) -> int:
    """Two matrices, two biases and the norm."""
    return 8 * width * width + 6 * width
