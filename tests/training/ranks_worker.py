"""One rank of a test: trains every case of a plan through the trainer's own functions and writes what happened.

python ranks_worker.py PLAN.json OUT     (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment)
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cctrain.config import load_config
from cctrain.data.loader import Loader
from cctrain.data.order import Order
from cctrain.data.store import open_store
from cctrain.parallel.mesh import Mesh, join_mesh
from cctrain.training.engine import build_engine, full_weights
from cctrain.training.loop import evaluate_held_out, run_steps
from cctrain.training.train import build_model, held_out_batches, resolve, resolve_micro_batch, training_rule


def run_case(case: dict[str, Any], config_path: str, mesh: Mesh, out: Path) -> None:
    config = load_config(Path(config_path), case["overrides"])
    store = open_store(Path(config.data.store))
    config = resolve(config, store)
    rule = training_rule(config, store)
    loader = Loader(store, rule, mesh.rank, mesh.num_ranks, 0)
    loader.micro_batch_tokens = config.data.micro_batch_tokens = resolve_micro_batch(config, loader)
    order = Order(store.num_train, store.digest, config.run.seed, config.data.block, config.data.window)
    model = build_model(config, store)
    disturb(model)
    engine = build_engine(model, config, mesh)
    lines, gradient = [], {}
    for values in run_steps(engine, config, mesh, loader, order):
        lines.append(values)
        if values["step"] == 1:
            gradient = first_gradient(engine, config.training.beta1)
    steps = loader.training_steps(order, config.data.global_batch, 0, config.training.steps)
    contexts = [[len(batch.samples) for batch in step.batches] for step in steps]
    look = evaluate_held_out(engine, mesh, held_out_batches(config, store, loader))
    weights = {name: tensor.numpy() for name, tensor in full_weights(engine).items()}
    found = {"lines": lines, "contexts": contexts, "look": look}
    (out / f"{case['name']}-rank-{mesh.rank}.json").write_text(json.dumps(found))
    if mesh.is_first:
        arrays = {f"weights:{name}": array for name, array in weights.items()}
        arrays |= {f"gradient:{name}": array for name, array in gradient.items()}
        np.savez(out / f"{case['name']}.npz", **arrays)


def disturb(model: torch.nn.Module) -> None:
    """A new model's head is zero, and so are the gradients of all below it; here every parameter shall have one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def first_gradient(engine: Any, beta1: float) -> dict[str, np.ndarray]:
    """What AdamW received in step 1: its first moment started at zero, so it is (1 − β₁) times the gradient."""
    from deepspeed.utils import safe_get_full_optimizer_state

    optimizer = engine.optimizer
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links the states after its first parameter group has stepped, so the second one's are missing.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        if moment is None:
            moment = optimizer.state[master_of(optimizer, parameter)]["exp_avg"]
        found[name] = moment.double().cpu().numpy() / (1 - beta1)
    return found


def master_of(optimizer: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Without ZeRO: the parameter itself, or its copy in fp32."""
    pairs = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)
    for halves, masters in pairs:
        for half, master in zip(halves, masters, strict=True):
            if half is parameter:
                return master
    return parameter


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    plan, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.manual_seed(1)  # nothing may depend on the global generator, nor draw from it
    with join_mesh() as mesh:
        for case in plan["cases"]:
            run_case(case, plan["config"], mesh, out)


if __name__ == "__main__":
    main()
