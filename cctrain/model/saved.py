"""Weights as safetensors: one file of tensors by name, which can hold no code."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cctrain.config import ModelConfig
from cctrain.errors import CheckpointError
from cctrain.model.transformer import Transformer


def save_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """The file is there whole, or as it was before. Raises CheckpointError if it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial)
        partial.chmod(mode)  # safetensors lets nobody but the owner read it
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written ({error}): make room, then repeat the command") from error


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Raises CheckpointError if the file is damaged."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): copy the run again") from error


def model_with_weights(config: ModelConfig, weights: dict[str, torch.Tensor], source: Path) -> Transformer:
    """The model of `config` in fp32 on the host, with the given weights, ready to predict.

    Raises CheckpointError, naming the source of the weights, if they are those of a model of another shape.
    """
    if "log_share" not in weights or "log_theta" not in weights:
        raise CheckpointError(f"{source} holds no cctrain model: log_share and log_theta are missing")
    model = Transformer(config, weights["log_share"].exp(), weights["log_theta"].exp())
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {source} do not fit the model of its configuration: {error}") from error
    return model.eval()
