import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from cctrain.config import MemoryConfig
from cctrain.model import activations
from cctrain.model.activations import Activations, HostStore, place
from tests.model.conftest import ATTENTIONS, CUDA, on, random_inputs, random_model, small_config


@pytest.fixture(autouse=True)
def small_tensors_count_as_large(monkeypatch):
    monkeypatch.setattr(activations, "LARGE", 64)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("tile_tokens", [None, 7])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_checkpoints_on_the_host_change_no_bit(attention, tile_tokens, device):
    inputs, results = on(device, random_inputs([12, 0, 30])), []
    for offload in ("device", "host"):
        memory = MemoryConfig(checkpointing=True, offload=offload, tile_tokens=tile_tokens)
        model = random_model(small_config(attention), memory=memory).to(device)
        torch.cat(model(inputs)).sin().sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_what_a_stage_begins_with_leaves_the_device_until_backward():
    linear, kept = nn.Linear(16, 16), Activations(checkpointing=True, on_host=True)
    begin = torch.randn(9, 16, requires_grad=True) * 2
    there = weakref.ref(begin)
    with kept.layer():
        end = kept.run(lambda x: torch.tanh(linear(x)), begin)
    del begin
    gc.collect()
    assert there() is None
    [parked] = kept.host.order
    assert parked.host.shape == (9, 16)
    end.sum().backward()
    assert kept.host.order == []
    assert parked.copied is None


def test_two_stages_of_a_layer_that_begin_with_one_tensor_send_it_once():
    kept, x = Activations(checkpointing=True, on_host=True), torch.randn(9, 16, requires_grad=True)
    with kept.layer():
        y = kept.run(torch.tanh, x) + kept.run(torch.sin, x)
    first, second = kept.host.order
    assert first is second
    y.sum().backward()
    torch.testing.assert_close(x.grad, 1 - x.tanh() ** 2 + x.cos())


def test_tiles_that_are_kept_lie_in_one_piece_of_memory_and_are_the_same_to_autograd():
    tiles = [torch.randn(length, 6, requires_grad=True) for length in (4, 0, 3)]
    rooms = Activations(checkpointing=True).rooms(tiles)
    placed = [place(tile * 2, room) for tile, room in zip(tiles, rooms, strict=True)]
    assert len({tile.untyped_storage().data_ptr() for tile in placed}) == 1
    assert placed[0].untyped_storage().nbytes() == 7 * 6 * 4
    sum(tile.square().sum() for tile in placed).backward()
    for tile, copy in zip(tiles, placed, strict=True):
        assert torch.equal(copy, tile * 2)
        assert torch.equal(tile.grad, 8 * tile)


@pytest.mark.parametrize("checkpointing", [False, True])
@torch.no_grad()
def test_without_a_backward_nothing_is_kept_and_nothing_is_moved(checkpointing):
    tiles = [torch.randn(4, 6)]
    assert Activations(checkpointing).rooms(tiles) == [None]
    assert place(tiles[0], None) is tiles[0]


def test_a_tensor_of_a_later_layer_is_never_taken_for_one_that_had_its_place_in_memory():
    store, values = HostStore(), torch.arange(40.0)
    first = store.put(values)
    store.parked.clear()
    values += 1
    second = store.put(values)
    assert torch.equal(store.take(second), torch.arange(40.0) + 1)
    assert torch.equal(store.take(first), torch.arange(40.0))


def test_while_one_tensor_is_used_the_one_before_it_is_on_its_way():
    store = HostStore()
    parked = [store.put(torch.full((40,), float(number))) for number in range(3)]
    store.take(parked[2])
    assert [one.copied is not None for one in parked] == [False, True, False]


def test_what_backward_does_not_need_is_passed_over():
    store = HostStore()
    parked = [store.put(torch.full((40,), float(number))) for number in range(3)]
    assert torch.equal(store.take(parked[0]), torch.zeros(40))
    assert torch.equal(store.take(parked[2]), torch.full((40,), 2.0))


@pytest.mark.parametrize("small", [torch.zeros(3), torch.zeros(40, dtype=torch.int64)])
def test_small_tensors_and_integers_stay_where_they_are(small: Tensor):
    assert HostStore().put(small) is small
