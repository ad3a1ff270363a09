"""A trained model on packs of contexts: predictions of targets, embeddings of cells; one process, no gradients."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch

from cctrain.apply.targets import Prediction
from cctrain.data.loading.batches import packs
from cctrain.data.loading.contexts import Context
from cctrain.model.saved import model_with_weights
from cctrain.model.transformer import Inputs, Transformer
from cctrain.run_directory import TrainedRun
from cctrain.training.checkpoint_files import run_weights
from cctrain.training.loop import to_inputs

TOKENS_AT_ONCE = 32_768


def load_model(run: TrainedRun) -> Transformer:
    """A run's model in fp32 on the host: with its final weights, or those of its latest checkpoint."""
    shape = replace(run.config.model, backend="auto")  # what trained it may not run here
    return model_with_weights(shape, run_weights(run.path), run.path)


def predict_targets(model: Transformer, contexts: Iterable[Context]) -> Prediction:
    """log μ and log θ of all targets, float64 (T,), in the order of the contexts."""
    log_mu, log_theta = [np.zeros(0)], [np.zeros(0)]
    for inputs in _packed(model, contexts):
        with torch.inference_mode():
            mu, theta = model(inputs)
        log_mu.append(mu.double().cpu().numpy())
        log_theta.append(theta.double().cpu().numpy())
    return np.concatenate(log_mu), np.concatenate(log_theta)


def embed_contexts(model: Transformer, contexts: Iterable[Context]) -> np.ndarray:
    """float32 (contexts, width of the embedding)."""
    parts = []
    for inputs in _packed(model, contexts):
        with torch.inference_mode():
            parts.append(model.embed(inputs).cpu().numpy())
    return np.concatenate(parts)


def _packed(model: Transformer, contexts: Iterable[Context]) -> Iterator[Inputs]:
    device = model.log_share.device
    for batch in packs(contexts, TOKENS_AT_ONCE):
        yield to_inputs(batch, device)
