"""Does depth train? 64 layers of width 64 beside 4, the same steps on PBMC3k in bf16, and what every branch carries.

    python -m tools.check_depth STORE --out tools/results/depth.json

Trains both through `cctrain train`, compares held-out NLL on the same fixed targets, and measures
‖branch‖ / ‖stream‖ of every residual branch of the trained deep model on a pack of held-out cells.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cctrain.apply.predict import load_model
from cctrain.config import load_config
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import open_store
from cctrain.model.layer import MLP, Read, Write
from cctrain.run_directory import open_run
from cctrain.tracking.journal import history, read_journal
from cctrain.training.data import context_rule
from cctrain.training.loop import to_inputs
from tools.record import add_out, circumstances, keep

SETTINGS = {
    "model.width": 64,
    "model.heads": 4,
    "model.latents": 32,
    "data.global_batch": 8,
    "data.max_tokens": 400,
    "objective.target_rate": 0.05,
    "training.precision": "bf16",
    "training.learning_rate": 2e-3,
    "training.warmup": 30,
    "evaluation.every": 100,
    "evaluation.cells": 128,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="the token store of PBMC3k")
    parser.add_argument("--runs", type=Path, default=Path("runs/depth"), help="where the runs go")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 64])
    add_out(parser)
    arguments = parser.parse_args()
    result = {
        "question": "is the deepest model no worse than the shallowest, and does every branch carry something?",
        **circumstances("torch", threads=torch.get_num_threads()),
        "steps": arguments.steps,
        "settings": SETTINGS,
        "models": [],
    }
    for depth in arguments.depths:
        run = arguments.runs / f"depth-{depth:02d}"
        train(run, arguments.store, arguments.steps, depth)
        result["models"].append(describe(run, depth))
        keep(result, arguments.out)
    for model in result["models"]:
        ratios = model["branch_over_stream"]
        print(f"{model['depth']} layers: held-out NLL {model['nll']:.5f}, smallest branch {min(map(min, ratios)):.4f}")


def train(run: Path, store: Path, steps: int, depth: int) -> None:
    settings = SETTINGS | {"model.depth": depth, "training.steps": steps, "run.dir": run, "data.store": store}
    command = [sys.executable, "-m", "cctrain", "train", "configs/cell.yaml"]
    subprocess.run([*command, *(f"{key}={value}" for key, value in settings.items())], check=True)


def describe(run: Path, depth: int) -> dict[str, object]:
    lines = history(read_journal(run))
    look = [line for line in lines if line["event"] == "evaluate"][-1]
    seconds = [line["step_seconds"] for line in lines if line["event"] == "step"]
    return {
        "depth": depth,
        "nll": look["nll"],
        "difference_to_gene_mean": look["difference"],
        "median_step_seconds": float(np.median(seconds)),
        "branches": ["read", "latent MLP", "write", "token MLP"],
        "branch_over_stream": branch_over_stream(run),
    }


@torch.no_grad()
def branch_over_stream(run: Path) -> list[list[float]]:
    """For each layer, ‖branch‖ / ‖stream it is added to‖ of read, latent MLP, write and token MLP."""
    config = load_config(run / "config.yaml")
    store = open_store(Path(config.data.store), config.data.digest)
    model = load_model(open_run(run))
    loader = Loader(store, context_rule(config, store, "validation", config.data.max_tokens or 0), Share(), 1 << 30)
    cells = np.arange(store.num_train, store.num_train + 16)
    [batch] = loader.batches(cells, np.zeros(len(cells), dtype=np.int64))
    ratios: list[float] = []

    def measure(module: nn.Module, inputs: tuple[Tensor, ...], branch: Tensor) -> None:
        stream = inputs[1] if isinstance(module, Read) else inputs[0]
        ratios.append(float(branch.norm() / stream.norm()))

    for module in model.layers.modules():
        if isinstance(module, (Read, MLP, Write)):
            module.register_forward_hook(measure)
    model(to_inputs(batch, torch.device("cpu")))
    return np.array(ratios).reshape(-1, 4).tolist()


if __name__ == "__main__":
    main()
