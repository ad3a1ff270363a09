"""Contexts of several cells: each token carries its cell."""

from dataclasses import replace

import pytest
import torch

from cctrain.config import MemoryConfig
from cctrain.model.transformer import Inputs, Transformer
from tests.model.conftest import ATTENTIONS, random_inputs, random_model, relative_error, small_config

SIGNS = 6
LENGTHS = [4, 3, 5, 2, 6]  # of cells; the first three make a context, the other two another


def grouped_inputs(seed: int = 0) -> Inputs:
    inputs = random_inputs(LENGTHS, seed)
    draws = torch.Generator().manual_seed(seed + 1)
    return replace(
        inputs,
        offsets=[0, 12, 20],
        cells=torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS)),
        encodings=torch.randint(0, 2, (5, SIGNS), generator=draws).double() * 2 - 1,
    )


def model_of(attention: str, memory: MemoryConfig | None = None) -> Transformer:
    return random_model(replace(small_config(attention), cell_encoding=SIGNS), memory=memory)


def gradients(model: Transformer, inputs: Inputs) -> dict[str, torch.Tensor]:
    log_mu, log_theta = model(inputs)
    (log_mu.sin().sum() + log_theta.cos().sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_model_of_single_cells_has_no_parameter_for_telling_them_apart(attention):
    alone, among_others = random_model(small_config(attention)), model_of(attention)
    names = set(dict(among_others.named_parameters())) - set(dict(alone.named_parameters()))
    assert names == {"embedding.cell.weight"}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_parameter_has_a_gradient(attention):
    for name, gradient in gradients(model_of(attention), grouped_inputs()).items():
        assert gradient is not None, name
        assert gradient.any(), name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_numbering_of_the_cells_means_nothing(attention):
    model, inputs = model_of(attention), grouped_inputs()
    order = torch.tensor([3, 0, 4, 2, 1])
    renumbered = replace(inputs, cells=torch.argsort(order)[inputs.cells], encodings=inputs.encodings[order])
    assert relative_error(model(renumbered)[0], model(inputs)[0]) < 1e-12


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_which_tokens_share_a_cell_matters_in_their_context_and_nowhere_else(attention):
    model, inputs = model_of(attention), grouped_inputs()
    moved = inputs.cells.clone()
    moved[3] = 1  # a token of cell 0 becomes one of cell 1
    before, after = model(inputs)[0], model(replace(inputs, cells=moved))[0]
    first_context = inputs.targets < 12
    assert torch.all((before - after)[first_context].abs() > 0)
    assert torch.all((before - after)[~first_context] == 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiles_cut_through_cells_without_a_trace(checkpointing):
    inputs = grouped_inputs()
    whole = gradients(model_of("criss_cross"), inputs)
    tiled = gradients(model_of("criss_cross", MemoryConfig(checkpointing=checkpointing, tile_tokens=3)), inputs)
    for name, gradient in whole.items():
        assert relative_error(tiled[name], gradient) < 1e-6, name  # latents of tiles are merged by log-sum-exps in fp32
