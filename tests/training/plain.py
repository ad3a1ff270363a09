"""Training as plain PyTorch does it, in float64 on the whole global batch at once: what distributed runs must equal."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from cctrain.config import Config, load_config
from cctrain.data.loading.batches import Batch
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import TokenStore
from cctrain.training.data import held_out_batches, resolve, training_order, training_rule
from cctrain.training.engine import _optimizer, set_learning_rate
from cctrain.training.loop import samples_digest, to_inputs
from cctrain.training.objective import negative_log_likelihood
from cctrain.training.schedule import learning_rate
from cctrain.training.train import build_model
from tests.training.conftest import Result
from tests.training.ranks_worker import disturb

STAGES = (0, 1, 2, 3)
# Without this, stage 3 shards no parameter of so small a model; with small buckets stage 2 reduces in several.
SHARD_ALL = (
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    "deepspeed.zero_optimization.reduce_bucket_size=500",
)
ALL_TOKENS = 10**6


@dataclass(frozen=True)
class Plain:
    """What one process without DeepSpeed computes. gradient (of step 1, before clipping) and weights are float64;
    in_float32 is the same gradient in float32."""

    losses: np.ndarray
    norms: np.ndarray
    samples: list[str]
    gradient: dict[str, np.ndarray]
    in_float32: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def plain_training(config: Config, store: TokenStore) -> Plain:
    """Float64 from the embedding to the last layer, one backward of (sum of the NLL / targets) a step."""
    training, batches = config.training, global_batches(config, store)
    model = build_model(config, store.genes)
    disturb(model)
    in_float32 = gradient_of(copy.deepcopy(model), batches[0])
    model.double()
    plain = SimpleNamespace(optimizer=_optimizer(model, config))  # as much of an engine as a learning rate needs
    losses, norms, samples, gradient = [], [], [], {}
    for step, batch in enumerate(batches, start=1):
        loss = target_losses(model, batch).sum() / len(batch.targets)
        plain.optimizer.zero_grad()
        loss.backward()
        if step == 1:
            gradient = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip or torch.inf)))
        set_learning_rate(plain, learning_rate(step, training))
        plain.optimizer.step()
        losses.append(loss.item())
        samples.append(samples_digest(np.stack((batch.positions, batch.samples), axis=1)))
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return Plain(np.array(losses), np.array(norms), samples, gradient, in_float32, weights)


def gradient_of(model: torch.nn.Module, batch: Batch) -> dict[str, np.ndarray]:
    (target_losses(model, batch).sum() / len(batch.targets)).backward()
    return {name: parameter.grad.double().numpy() for name, parameter in model.named_parameters()}


def global_batches(config: Config, store: TokenStore) -> list[Batch]:
    loader = Loader(store, training_rule(config, store), Share(), ALL_TOKENS)
    order = training_order(config, loader)
    steps = loader.training_steps(order, config.data.global_batch, 0, config.training.steps)
    return [batch for step in steps for batch in step.batches]


def target_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    inputs = to_inputs(batch, torch.device("cpu"))
    inputs = replace(inputs, counts=inputs.counts.double(), log_size_factors=inputs.log_size_factors.double())
    log_mu, log_theta = model(inputs)
    return negative_log_likelihood(torch.from_numpy(batch.target_counts).double(), log_mu.double(), log_theta.double())


class Reference:
    """Configurations and plain trainings, each made once."""

    def __init__(self, path: Path, store: TokenStore):
        self.path, self.store = path, store
        self.trained: dict[tuple[str, ...], Plain] = {}

    def config(self, *overrides: str) -> Config:
        return resolve(load_config(self.path, [f"data.store={self.store.path}", *overrides]), self.store)

    def __call__(self, *overrides: str) -> Plain:
        if overrides not in self.trained:
            self.trained[overrides] = plain_training(self.config(*overrides), self.store)
        return self.trained[overrides]

    def look(self, result: Result) -> float:
        """The held-out NLL of a result's weights: the plain mean within each cell, then over cells."""
        config = self.config()
        loader = Loader(self.store, training_rule(config, self.store), Share(), ALL_TOKENS)
        [batch] = held_out_batches(config, self.store, loader)
        model = build_model(config, self.store.genes)
        model.load_state_dict({name: torch.from_numpy(weight) for name, weight in result.weights.items()})
        with torch.no_grad():
            losses = target_losses(model.double(), batch).numpy()
        cells = batch.cells[batch.targets]
        return float(np.mean([losses[cells == cell].mean() for cell in np.unique(cells)]))

    def longest_slice(self, num_context_ranks: int) -> int:
        """The least micro-batch that holds any context's slice."""
        share = Share(num_context_ranks=num_context_ranks)
        return int(Loader(self.store, training_rule(self.config(), self.store), share, 0).largest_size())

    def accumulate(self, num_ranks: int, steps: int) -> str:
        """The micro-batch size with which the first step accumulates `steps` times on so many ranks."""
        config = self.config()
        loader = Loader(self.store, training_rule(config, self.store), Share(), 0)
        [first, *_] = global_batches(config, self.store)
        step = loader.sizes(first.samples, first.positions)
        tokens = int(np.ceil(step.sum() / (num_ranks * steps) * 1.12))
        assert tokens >= loader.largest_size(), "the cells are too few or too large to force this accumulation"
        return f"data.micro_batch_tokens={tokens}"


def zero(stage: int) -> tuple[str, ...]:
    return (f"parallel.zero_stage={stage}", *SHARD_ALL)


def assert_same_training(result: Result, plain: Plain) -> None:
    assert np.isfinite(result.losses).all()
    np.testing.assert_allclose(result.losses, plain.losses, rtol=1e-5, atol=0)
    assert result.column("samples") == plain.samples
    np.testing.assert_allclose(result.column("grad_norm"), plain.norms, rtol=1e-4)
    assert result.weights.keys() - {"log_share", "log_theta"} == plain.weights.keys()
    for name, weight in plain.weights.items():
        # AdamW turns a gradient that is all rounding into a whole step: a few elements may differ by that much.
        difference = np.abs(result.weights[name] - weight)
        assert np.quantile(difference, 0.99) < 1e-4, name


def assert_same_gradient(found: dict[str, np.ndarray], plain: Plain, scale: float = 1.0) -> None:
    """Within 1e-5 of float64; where terms cancel, as near as plain PyTorch in float32 comes on this machine."""
    assert found.keys() == plain.gradient.keys()
    whole = np.sqrt(sum((gradient**2).sum() for gradient in plain.gradient.values()))
    for name, gradient in plain.gradient.items():
        size = max(np.linalg.norm(gradient), 1e-6 * whole)
        rounding = np.linalg.norm(plain.in_float32[name] - gradient) / size
        error = np.linalg.norm(found[name] / scale - gradient) / size
        assert error < max(1e-5, rounding), f"{name}: {error:.2g}, in float32 {rounding:.2g}"
        assert np.any(gradient), f"{name} has no gradient: the comparison would say nothing"
