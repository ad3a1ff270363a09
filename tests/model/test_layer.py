from itertools import pairwise

import numpy as np
import pytest
import torch

from cctrain.model.activations import Activations
from cctrain.model.layer import CrissCrossLayer, DenseLayer
from cctrain.model.tiles import cut_into_tiles
from tests.model import reference
from tests.model.conftest import randomize

# width, latent width, heads, latents
SHAPES = [(8, 8, 1, 3), (8, 6, 2, 4), (12, 20, 3, 1), (16, 4, 4, 7)]
LENGTHS = [5, 0, 9, 1]
OFFSETS = [0, 5, 5, 14, 15]


def parameters_of(layer: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in layer.state_dict().items()}


def criss_cross(shape: tuple[int, int, int, int], seed: int) -> tuple[CrissCrossLayer, torch.Tensor, torch.Tensor]:
    """A layer with random weights, tokens (15, d) and latents (4, M, d_latent)."""
    width, latent_width, heads, num_latents = shape
    layer = CrissCrossLayer(width, latent_width, heads).double()
    randomize(layer, seed)
    draws = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randn(sum(LENGTHS), width, generator=draws, dtype=torch.float64)
    latents = torch.randn(len(LENGTHS), num_latents, latent_width, generator=draws, dtype=torch.float64)
    return layer, tokens, latents


def run(layer: CrissCrossLayer, tokens: torch.Tensor, latents: torch.Tensor, offsets: list[int], num_tiles: int = 1):
    """New tokens and latents, by way of so many tiles."""
    cuts = cut_into_tiles(offsets, num_tiles)
    tiles, latents = layer([tokens[c.start : c.stop] for c in cuts], latents, cuts, Activations())
    return torch.cat(tiles), latents


def run_dense(layer: DenseLayer, tokens: torch.Tensor, offsets: list[int], num_tiles: int = 1) -> torch.Tensor:
    tiles = [tokens[c.start : c.stop] for c in cut_into_tiles(offsets, num_tiles)]
    return torch.cat(layer(tiles, offsets, Activations()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tiles", [1, 3, 40])
@pytest.mark.parametrize("seed", [0, 10])
@torch.no_grad()
def test_a_criss_cross_layer_computes_what_the_reference_spells_out_for_every_context_of_a_pack(shape, num_tiles, seed):
    layer, tokens, latents = criss_cross(shape, seed)
    new_tokens, new_latents = run(layer, tokens, latents, OFFSETS, num_tiles)
    for i, (start, stop) in enumerate(pairwise(OFFSETS)):
        context = tokens[start:stop].numpy(), latents[i].numpy()
        right_tokens, right_latents = reference.criss_cross_layer(parameters_of(layer), *context, heads=shape[2])
        np.testing.assert_allclose(new_tokens[start:stop].numpy(), right_tokens, rtol=0, atol=1e-10)
        np.testing.assert_allclose(new_latents[i].numpy(), right_latents, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tiles", [1, 4])
@torch.no_grad()
def test_a_dense_layer_computes_what_the_reference_spells_out_for_every_context_of_a_pack(shape, num_tiles):
    width, _, heads, _ = shape
    layer = DenseLayer(width, heads).double()
    randomize(layer)
    tokens = torch.randn(sum(LENGTHS), width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    new_tokens = run_dense(layer, tokens, OFFSETS, num_tiles)
    for start, stop in pairwise(OFFSETS):
        right = reference.dense_layer(parameters_of(layer), tokens[start:stop].numpy(), heads)
        np.testing.assert_allclose(new_tokens[start:stop].numpy(), right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_context_comes_out_alone_as_it_does_in_a_pack(shape):
    layer, tokens, latents = criss_cross(shape, seed=3)
    packed_tokens, packed_latents = run(layer, tokens, latents, OFFSETS)
    for i, (start, stop) in enumerate(pairwise(OFFSETS)):
        alone_tokens, alone_latents = run(layer, tokens[start:stop], latents[i : i + 1], [0, stop - start])
        torch.testing.assert_close(packed_tokens[start:stop], alone_tokens, rtol=0, atol=1e-12)
        torch.testing.assert_close(packed_latents[i], alone_latents[0], rtol=0, atol=1e-12)


def test_the_reference_uses_every_parameter_of_a_criss_cross_layer():
    params = parameters_of(criss_cross(SHAPES[1], seed=0)[0])
    tokens, latents = np.ones((2, 8)), np.ones((4, 6))
    reference.criss_cross_layer(params, tokens, latents, heads=2)
    for name in params:
        without = {other: value for other, value in params.items() if other != name}
        with pytest.raises(KeyError, match=name):
            reference.criss_cross_layer(without, tokens, latents, heads=2)


def test_the_reference_uses_every_parameter_of_a_dense_layer():
    params = parameters_of(DenseLayer(8, heads=2).double())
    reference.dense_layer(params, np.ones((2, 8)), heads=2)
    for name in params:
        without = {other: value for other, value in params.items() if other != name}
        with pytest.raises(KeyError, match=name):
            reference.dense_layer(without, np.ones((2, 8)), heads=2)


@torch.no_grad()
def test_tokens_of_one_context_reach_each_other_within_one_layer():
    """The write uses the updated latents. From the old ones, a layer would mix nothing."""
    layer, tokens, latents = criss_cross(SHAPES[1], seed=0)
    before, _ = run(layer, tokens, latents, OFFSETS)
    tokens[1] += 1
    after, _ = run(layer, tokens, latents, OFFSETS)
    assert not torch.any(torch.all(before[:5] == after[:5], dim=1))


def test_a_context_without_tokens_reads_nothing_and_is_not_an_error():
    layer, tokens, latents = criss_cross(SHAPES[1], seed=0)
    _, new_latents = run(layer, tokens, latents, OFFSETS)
    torch.testing.assert_close(new_latents[1], (latents + layer.latent_mlp(latents))[1], rtol=0, atol=1e-15)
    nothing = torch.zeros(0, 8, dtype=torch.float64)
    new_tokens, new_latents = run(layer, nothing, latents, [0] * 5)
    assert new_tokens.shape == (0, 8)
    torch.testing.assert_close(new_latents, latents + layer.latent_mlp(latents), rtol=0, atol=0)


def test_no_key_projection_has_a_bias():
    for layer in (CrissCrossLayer(8, 6, 2), DenseLayer(8, 2)):
        names = dict(layer.named_parameters())
        assert sum(name.endswith("key.weight") for name in names) > 0
        assert not any(name.endswith("key.bias") for name in names)
