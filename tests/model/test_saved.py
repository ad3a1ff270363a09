import pytest
import torch
from safetensors.torch import save_file

from cctrain.errors import CheckpointError
from cctrain.model.saved import load_weights, model_with_weights, save_weights
from tests.model.conftest import in_fp32, random_inputs, random_model, small_config


def load_model(config, path):
    return model_with_weights(config, load_weights(path), path)


@pytest.fixture
def model():
    return random_model(small_config()).float()


def test_a_saved_model_predicts_what_it_did(model, tmp_path):
    save_weights(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_model(small_config(), tmp_path / "model.safetensors")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    inputs = in_fp32(random_inputs([9, 4]))
    with torch.no_grad():
        for ours, theirs in zip(loaded(inputs), model(inputs), strict=True):
            assert torch.equal(ours, theirs)
    assert not loaded.training


def test_saving_leaves_one_file_and_replaces_the_one_before(model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    save_weights(model.state_dict(), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    load_model(small_config(), path)


def test_a_file_cut_short_is_an_error_that_names_it(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_weights(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model(small_config(), path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors cannot be read"):
        load_model(small_config(), tmp_path / "none.safetensors")


def test_weights_of_something_else_are_an_error(tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no cctrain model"):
        load_model(small_config(), tmp_path / "other.safetensors")


def test_weights_of_a_model_of_another_shape_are_an_error(model, tmp_path):
    save_weights(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="do not fit"):
        load_model(small_config("dense"), tmp_path / "model.safetensors")
