"""One rank of a test: trains every case of a plan through the trainer's own functions and writes what happened."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from cctrain.config import Config, load_config
from cctrain.data.loading import loader as loader_module
from cctrain.data.loading.loader import Loader, RankStep
from cctrain.data.loading.order import Order
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import TrainingError
from cctrain.parallel.exchange import context_exchange
from cctrain.parallel.mesh import Mesh, arrange, join_mesh, sum_over_ranks
from cctrain.training import loop, train
from cctrain.training.checkpoint import load_checkpoint, save_checkpoint
from cctrain.training.checkpoint_files import FragmentReader, read_manifest
from cctrain.training.data import (
    held_out_batches,
    resolve,
    resolve_micro_batch,
    share_of,
    training_order,
    training_rule,
)
from cctrain.training.engine import build_engine, whole
from cctrain.training.loop import StepResult, evaluate_held_out, run_steps
from cctrain.training.train import build_model
from tests.forked import begin


def run_case(case: dict[str, Any], config_path: str, mesh: Mesh, out: Path) -> None:
    config = load_config(Path(config_path), case["overrides"])
    mesh = arrange(mesh, config.parallel.context)
    store = open_store(Path(config.data.store))
    config = resolve(config, store)
    try:
        with MISTAKES[case.get("mistake", "")](mesh):
            train_case(case, config, store, mesh, out)
    except TrainingError as error:
        (out / f"{case['name']}-error-{mesh.rank}.txt").write_text(str(error))


def train_case(case: dict[str, Any], config: Config, store: TokenStore, mesh: Mesh, out: Path) -> None:
    rule = training_rule(config, store)
    loader = PoisonedLoader(store, rule, share_of(mesh), 0)
    loader.poisoned = case.get("poison", ())
    loader.micro_batch_tokens = config.data.micro_batch_tokens = resolve_micro_batch(config, loader)
    order = training_order(config, loader)
    model = build_model(config, store.genes, mesh)
    held = sum(getattr(parameter, "ds_tensor", parameter).numel() for parameter in model.parameters())
    disturb(model)
    engine = build_engine(model, config, mesh)
    lines, gradient, start = [], {}, {"step": 0, "position": 0}
    if case.get("load"):
        start = load_checkpoint(engine, Path(case["load"]), mesh)
        assert start is not None
    for result in steps_but(case.get("omit", ()), engine, config, mesh, loader, order, start):
        lines.append({"step": result.step, "applied": result.applied, **result.values})
        if result.step == 1 and result.applied:
            gradient = first_gradient(engine, config.training.beta1)
        if case.get("save") and result.step == case["save_at"]:
            save_checkpoint(engine, Path(case["save"]), mesh, result.step, {"position": result.position})
            if case.get("verify"):
                verify_content(engine, mesh, Path(case["save"]) / "checkpoints" / f"step-{result.step:08d}")
    steps = loader.training_steps(order, config.data.global_batch, 0, config.training.steps)
    contexts = [[len(batch.samples) for batch in step.batches] for step in steps]
    look = evaluate_held_out(engine, mesh, held_out_batches(config, store, loader))
    weights = {name: tensor.numpy() for name, tensor in full_weights(engine).items()}
    found = {"lines": lines, "contexts": contexts, "look": look, "digest": digest_of_parameters(engine), "held": held}
    (out / f"{case['name']}-rank-{mesh.rank}.json").write_text(json.dumps(found))
    if mesh.is_first:
        arrays = {f"weights:{name}": array for name, array in weights.items()}
        arrays |= {f"gradient:{name}": array for name, array in gradient.items()}
        np.savez(out / f"{case['name']}.npz", **arrays)


@contextmanager
def losses_averaged_by_rank(mesh: Mesh) -> Iterator[None]:
    """The mean of the ranks' mean losses, in place of the sum over the whole global batch."""
    step = loop.train_step

    def averaged(engine: Any, config: Config, mesh: Mesh, rank_step: RankStep, *rest: Any) -> StepResult:
        own = sum(len(batch.targets) for batch in rank_step.batches)
        [total] = sum_over_ranks([own], mesh.device)
        backward = engine.backward
        engine.backward = lambda loss, **how: backward(loss * total / (mesh.num_ranks * own), **how)
        try:
            return step(engine, config, mesh, rank_step, *rest)
        finally:
            engine.backward = backward

    with patch.object(loop, "train_step", averaged):
        yield


@contextmanager
def latents_counted_by_every_rank(mesh: Mesh) -> Iterator[None]:
    """What the replicated latents receive, C times."""
    exchange = context_exchange(mesh)
    assert exchange is not None
    wrong = replace(exchange, sum=lambda x: exchange.num_shards * exchange.sum(x))
    with patch.object(train, "context_exchange", lambda mesh: wrong):
        yield


@contextmanager
def a_slice_dropped(mesh: Mesh) -> Iterator[None]:
    """The second context rank holds no token."""
    right = loader_module.tokens_of_slice

    def dropped(expected: np.ndarray, cell: int, num_tokens: int, context_rank: int, num: int) -> tuple[int, int]:
        return (0, 0) if context_rank == 1 else right(expected, cell, num_tokens, context_rank, num)

    with patch.object(loader_module, "tokens_of_slice", dropped):
        yield


@contextmanager
def a_rank_disturbed(mesh: Mesh) -> Iterator[None]:
    """From step 2 on, the last rank's first weight is another in its last bit."""
    step = loop.train_step

    def disturbed(engine: Any, config: Config, mesh: Mesh, rank_step: RankStep, number: int, *rest: Any) -> StepResult:
        if number == 2 and mesh.rank == mesh.num_ranks - 1:
            weight = next(engine.module.parameters()).data.view(-1)
            weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
        return step(engine, config, mesh, rank_step, number, *rest)

    with patch.object(loop, "train_step", disturbed):
        yield


MISTAKES = {
    "a rank disturbed": a_rank_disturbed,
    "": lambda mesh: nullcontext(),
    "losses averaged by rank": losses_averaged_by_rank,
    "latents counted by every rank": latents_counted_by_every_rank,
    "a slice dropped": a_slice_dropped,
}


class PoisonedLoader(Loader):
    """A loader that, in the steps `poisoned`, gives the last rank a count that no store can hold, NaN; in its first
    batch, which need not be the last of the step."""

    poisoned: tuple[int, ...] = ()

    def training_steps(self, *arguments: Any) -> Iterator[RankStep]:
        for number, step in enumerate(super().training_steps(*arguments), start=1):
            if number in self.poisoned and self.share.data_rank == self.share.num_data_ranks - 1:
                step.batches[0].target_counts[0] = math.nan
            yield step


def steps_but(
    omitted: tuple[int, ...], engine: Any, config: Config, mesh: Mesh, loader: Loader, order: Order, start: dict
) -> Iterator[StepResult]:
    """All steps but those `omitted`, whose batches are consumed and never shown to the model."""
    step, position = start["step"], start["position"]
    for end in (*omitted, config.training.steps + 1):
        for result in islice(run_steps(engine, config, mesh, loader, order, step, position), end - step - 1):
            yield result
            position = result.position
        step, position = end, position + len(order.batch(position, config.data.global_batch))


def digest_of_parameters(engine: Any) -> str:
    """SHA-256 of what this rank computes with; at stage 3, where it holds parts, of what all gather."""
    whole = full_weights(engine) if engine.zero_optimization_stage() == 3 else engine.module.state_dict()
    digest = hashlib.sha256()
    for name in sorted(whole):
        digest.update(whole[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def disturb(model: torch.nn.Module) -> None:
    """A new model's head is zero, and so are the gradients of all below it; here every parameter shall have one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            with whole([parameter]):
                parameter += (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def first_gradient(engine: Any, beta1: float) -> dict[str, np.ndarray]:
    """What AdamW received in step 1: its first moment started at zero, so it is (1 − β₁) times the gradient."""
    return {
        name: moment.double().cpu().numpy() / (1 - beta1) for name, moment in whole_state(engine, "exp_avg").items()
    }


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in whole_state(engine, "master").items()} | {
        name: buffer.cpu() for name, buffer in engine.module.named_buffers()
    }


def whole_state(engine: Any, kind: str) -> dict[str, torch.Tensor]:
    """What DeepSpeed's own functions say of every parameter, fp32."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links the states after its first parameter group has stepped, so the second one's are missing.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if kind == "master":
            whole = safe_get_full_fp32_param(parameter)
        else:
            whole = safe_get_full_optimizer_state(parameter, kind)
        if whole is None:
            master = master_of(optimizer, parameter)
            state = getattr(optimizer, "optimizer", optimizer).state
            whole = master if kind == "master" else state[master][kind]
        found[name] = whole.detach().float().clone()
    return found


def verify_content(engine: Any, mesh: Mesh, checkpoint: Path) -> None:
    """The checkpoint holds, of every parameter, what DeepSpeed says."""
    manifest = read_manifest(checkpoint)
    reader = FragmentReader(checkpoint, manifest)
    for kind in manifest["kinds"]:
        for name, state in whole_state(engine, kind).items():
            if mesh.is_first:
                saved = reader.read_whole(kind, name, list(state.shape))
                assert torch.equal(saved, state.cpu()), (kind, name)


def master_of(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Without ZeRO: the parameter itself, or its copy in fp32."""
    pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)
    for halves, masters in pairs:
        for half, master in zip(halves, masters, strict=True):
            if half is parameter:
                return master
    return parameter


def run_rank(environment: dict[str, str], config_path: str, cases: list[dict[str, Any]], out: Path, log: Path) -> None:
    """All that a forked process does; what it says is in `log`."""
    begin(environment, log, log)
    logging.basicConfig(level=logging.WARNING)
    torch.manual_seed(1)  # nothing may depend on the global generator, nor draw from it
    with join_mesh() as mesh:
        for case in cases:
            run_case(case, config_path, mesh, out)
