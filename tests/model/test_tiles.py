from itertools import pairwise

import pytest
import torch

from cctrain.config import MemoryConfig
from cctrain.model.tiles import cut_into_tiles
from tests.model.conftest import ATTENTIONS, random_inputs, random_model, relative_error, small_config

OFFSETS = [0, 7, 7, 8, 30]


@pytest.mark.parametrize("num_tiles", [1, 2, 7, 30, 41])
def test_tiles_cover_the_pack_in_order_and_are_as_equal_as_can_be(num_tiles):
    cuts = cut_into_tiles(OFFSETS, num_tiles)
    assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
    assert len(cuts) == num_tiles
    assert cuts[-1].stop == 30
    lengths = {cut.stop - cut.start for cut in cuts}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("num_tiles", [1, 2, 7, 41])
def test_a_tile_knows_which_of_its_tokens_belong_to_which_context(num_tiles):
    for tile in cut_into_tiles(OFFSETS, num_tiles):
        owners = [context for context, (start, stop) in enumerate(pairwise(tile.offsets)) for _ in range(start, stop)]
        assert owners == [sum(token >= offset for offset in OFFSETS[1:]) for token in range(tile.start, tile.stop)]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tile_tokens", [1, 5, 17])
def test_neither_predictions_nor_gradients_depend_on_the_tiles(attention, checkpointing, tile_tokens):
    inputs = random_inputs([12, 0, 30, 1])
    whole = random_model(small_config(attention))
    tiled = random_model(small_config(attention), memory=MemoryConfig(checkpointing, tile_tokens=tile_tokens))
    outcomes = [torch.cat(model(inputs)).sin().sum() for model in (whole, tiled)]
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-6, atol=1e-6)  # the head is fp32
    for outcome in outcomes:
        outcome.backward()
    pairs = zip(tiled.named_parameters(), whole.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        assert relative_error(ours.grad, theirs.grad) < 1e-5, name


@pytest.mark.parametrize("lengths", [[5], [30, 20], [1, 1, 1], [0, 30]])
def test_every_pack_within_the_capacity_makes_the_same_calls(lengths):
    calls = []
    model = random_model(small_config(), memory=MemoryConfig(tile_tokens=8), capacity=64)
    for part in model.modules():
        part.register_forward_hook(lambda part, *_: calls.append(part))
    model(random_inputs([30, 30, 4]))
    wanted, calls[:] = list(calls), []
    model(random_inputs(lengths))
    assert calls == wanted
