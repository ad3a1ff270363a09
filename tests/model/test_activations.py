import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cctrain.config import MemoryConfig
from cctrain.errors import TrainingError
from cctrain.model import activations
from cctrain.model.activations import Activations, ActivationStore, in_file, in_memory, place
from tests.model.conftest import ATTENTIONS, CUDA, on, random_inputs, random_model, small_config


@pytest.fixture(autouse=True)
def small_tensors_count_as_large(monkeypatch):
    monkeypatch.setattr(activations, "LARGE", 64)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("tile_tokens", [None, 7])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_checkpoints_elsewhere_change_no_bit(attention, tile_tokens, device, tmp_path):
    inputs, results = on(device, random_inputs([12, 0, 30])), []
    for offload in ("device", "host", "disk"):
        memory = MemoryConfig(True, offload, offload_dir=str(tmp_path), tile_tokens=tile_tokens)
        model = random_model(small_config(attention), memory=memory).to(device)
        torch.cat(model(inputs)).sin().sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for wanted, *found in zip(*results, strict=True):
        assert all(torch.equal(gradient, wanted) for gradient in found)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_there_is_progress_in_every_layer_of_forward_and_of_backward(attention):
    model = random_model(small_config(attention), memory=MemoryConfig(checkpointing=True))
    stages: list[None] = []
    model.progress = lambda: stages.append(None)
    loss = torch.cat(model(random_inputs([12, 30]))).sin().sum()
    forward = len(stages)
    loss.backward()
    assert forward >= len(model.layers)
    assert len(stages) - forward >= len(model.layers)


def test_what_a_stage_begins_with_leaves_the_device_until_backward():
    linear, kept = nn.Linear(16, 16), Activations(checkpointing=True, offload="host")
    begin = torch.randn(9, 16, requires_grad=True) * 2
    there = weakref.ref(begin)
    with kept.layer():
        end = kept.run(lambda x: torch.tanh(linear(x)), begin)
    del begin
    gc.collect()
    assert there() is None
    [parked] = kept.store.order
    assert parked.host.shape == (9, 16)
    end.sum().backward()
    assert kept.store.order == []
    assert parked.copied is None


@pytest.mark.parametrize("offload", ["device", "host", "disk"])
def test_freed_memory_is_given_back_in_forward_and_in_backward_where_checkpoints_wait_elsewhere(
    offload, tmp_path, monkeypatch
):
    given_back: list[None] = []
    monkeypatch.setattr(activations, "give_back_freed_memory", lambda: given_back.append(None))
    monkeypatch.setattr(activations, "MUCH", 1)
    model = random_model(small_config("criss_cross"), memory=MemoryConfig(True, offload, offload_dir=str(tmp_path)))
    loss = torch.cat(model(random_inputs([12, 30]))).sin().sum()
    in_forward = len(given_back)
    loss.backward()
    assert (in_forward >= len(model.layers)) == (offload != "device")
    assert (len(given_back) - in_forward >= len(model.layers)) == (offload != "device")


def test_two_stages_of_a_layer_that_begin_with_one_tensor_send_it_once():
    kept, x = Activations(checkpointing=True, offload="host"), torch.randn(9, 16, requires_grad=True)
    with kept.layer():
        y = kept.run(torch.tanh, x) + kept.run(torch.sin, x)
    first, second = kept.store.order
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
    store, values = ActivationStore(in_memory), torch.arange(40.0)
    first = store.put(values)
    store.parked.clear()
    values += 1
    second = store.put(values)
    assert torch.equal(store.take(second), torch.arange(40.0) + 1)
    assert torch.equal(store.take(first), torch.arange(40.0))


def test_while_one_tensor_is_used_the_one_before_it_is_on_its_way():
    store = ActivationStore(in_memory)
    parked = [store.put(torch.full((40,), float(number))) for number in range(3)]
    store.take(parked[2])
    assert [one.copied is not None for one in parked] == [False, True, False]


def test_what_backward_does_not_need_is_passed_over():
    store = ActivationStore(in_memory)
    parked = [store.put(torch.full((40,), float(number))) for number in range(3)]
    assert torch.equal(store.take(parked[0]), torch.zeros(40))
    assert torch.equal(store.take(parked[2]), torch.full((40,), 2.0))


@pytest.mark.parametrize("small", [torch.zeros(3), torch.zeros(40, dtype=torch.int64)])
def test_small_tensors_and_integers_stay_where_they_are(small: Tensor):
    assert ActivationStore(in_memory).put(small) is small


def test_a_place_in_a_file_is_mapped_and_leaves_nothing_in_the_folder(tmp_path):
    values = torch.randn(300, 7)
    place = in_file(values, str(tmp_path)).copy_(values)
    assert torch.equal(place, values)
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert not list(tmp_path.iterdir())
    del place
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("missing", ["room", "folder"])
def test_activations_that_find_no_room_on_the_disk_end_with_a_word_on_what_to_do(tmp_path, missing):
    if missing == "room":
        values = torch.empty(2**50, device="meta")
    else:
        values, tmp_path = torch.zeros(40), tmp_path / "absent"
    with pytest.raises(TrainingError, match=r"memory\.offload_dir"):
        in_file(values, str(tmp_path))
    assert not tmp_path.exists() or not list(tmp_path.iterdir())
