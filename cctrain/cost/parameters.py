"""Trained parameters, tensor by tensor, from the configuration alone; by component in README.md.

The embedding has gene vectors, the count encoding, the mask, and the projection of the signs that tell a cell. Token
projections are the read's keys and values and the write's queries and output, without a bias; before each of the two is
a norm with a gain. Those of the latents are the other four.
"""

from dataclasses import replace
from typing import NamedTuple

from cctrain.config import ModelConfig

COMPONENTS = ("embedding", "token_projections", "token_mlp", "latents", "head")


class Tensors(NamedTuple):
    """`number` parameters of `size` numbers each."""

    component: str
    size: int
    number: int


def parameter_tensors(model: ModelConfig, num_genes: int) -> list[Tensors]:
    width, depth = model.width, model.depth
    outside = [
        Tensors("embedding", num_genes * width, 1),
        Tensors("embedding", 2 * width, 1),
        Tensors("embedding", width**2, 1),
        Tensors("embedding", width, 2),
        Tensors("head", width**2, 1),
        Tensors("head", width, 1),
        Tensors("head", num_genes, 1),
    ]
    if model.cell_encoding:
        outside.append(Tensors("embedding", model.cell_encoding * width, 1))
    projections = Tensors("token_projections", width**2, 4 * depth)
    layers = [projections, *_mlp("token_mlp", width, depth)]
    if model.attention == "dense":
        return [*outside, *layers, Tensors("token_projections", width, depth)]
    latent_width = model.latent_width or width
    return [
        *outside,
        *layers,
        Tensors("token_projections", width, 2 * depth),
        Tensors("latents", model.latents * latent_width, 1),
        Tensors("latents", width * latent_width, 4 * depth),
        Tensors("latents", latent_width, 2 * depth),
        *_mlp("latents", latent_width, depth),
    ]


def parameters_by_component(model: ModelConfig, num_genes: int) -> dict[str, int]:
    tensors = parameter_tensors(model, num_genes)
    return {name: sum(t.size * t.number for t in tensors if t.component == name) for name in COMPONENTS}


def num_parameters(model: ModelConfig, num_genes: int) -> int:
    return sum(parameters_by_component(model, num_genes).values())


def parameters_of_a_layer(model: ModelConfig) -> int:
    deeper = replace(model, depth=model.depth + 1)
    return num_parameters(deeper, num_genes=0) - num_parameters(model, num_genes=0)


def _mlp(component: str, width: int, depth: int) -> list[Tensors]:
    """Two matrices, their biases, and the gain of the norm."""
    return [
        Tensors(component, 4 * width**2, 2 * depth),
        Tensors(component, 4 * width, depth),
        Tensors(component, width, 2 * depth),
    ]
