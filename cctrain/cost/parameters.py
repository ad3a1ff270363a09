"""Trained parameters, tensor by tensor, from the configuration alone.

With V genes, width d, latent width d_l, M latents and e signs that tell a cell, of one layer where it says so:

    embedding            V · d + d² + 4 · d + e · d        gene vectors, count encoding, mask; the projection of signs
    token projections    4 · d² + 2 · d  a layer           keys and values of the read, queries and output of the write
    token MLP            8 · d² + 6 · d  a layer
    latents              M · d_l, and  4 · d · d_l + 2 · d_l + 8 · d_l² + 6 · d_l  a layer
    head                 d² + d + V

    dense: token projections 4 · d² + d a layer, no latents
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
