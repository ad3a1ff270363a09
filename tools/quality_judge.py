"""How good a trained model is on held-out cells: the same hidden counts whatever the model, its seed and its contexts.

The held-out draws are those of `cctrain evaluate` under seed 0. Which genes are hidden depends on the gene alone, and
the size factor on all visible counts, also where the context is cut, so a cut changes what the model reads and nothing
that it is judged on. `targets` in each result is a digest of the hidden genes and counts, to prove that.

Label transfer is that of `tools/label_transfer.py`, where the store has cell types.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cctrain.apply import metrics
from cctrain.apply.baselines import gene_mean
from cctrain.apply.evaluate import DETECTED_IN, held_out_targets
from cctrain.apply.predict import load_model, predict_targets
from cctrain.apply.targets import Prediction, TargetSet
from cctrain.config import Config, load_config
from cctrain.data.loading.contexts import nothing_hidden
from cctrain.data.store.store import TokenStore
from cctrain.parallel.mesh import find_device_kind
from cctrain.run_directory import open_run
from tools.label_transfer import embed_store, principal_components, transfer

LABEL = "cell_type"  # column of obs
SEED = 0  # of the hidden counts; models have seeds of their own
METRICS = ("nll", "correlation_within_gene", "label_transfer")


@dataclass(frozen=True)
class HeldOut:
    """What models are judged on. `labels`, str (num_cells,), or None where the store has no cell types."""

    store: TokenStore
    config: Config
    targets: TargetSet
    labels: np.ndarray | None


def hold_out(store: TokenStore, config_file: Path) -> HeldOut:
    config = judging_config(store, config_file, None)
    obs = store.obs()
    labels = obs[LABEL].astype(str).to_numpy() if LABEL in obs else None
    return HeldOut(store, config, held_out_targets(store, config)[0], labels)


def judging_config(store: TokenStore, config_file: Path, max_tokens: int | None) -> Config:
    longest = max_tokens or int(store.num_tokens.max())
    return load_config(config_file, [f"data.store={store.path}", f"data.max_tokens={longest}", f"run.seed={SEED}"])


def judge(run: Path, held_out: HeldOut, config_file: Path, max_tokens: int | None) -> dict[str, Any]:
    """METRICS (label_transfer: None without labels) and `targets`; contexts are cut to `max_tokens`, if any."""
    store = held_out.store
    model = load_model(open_run(run)).to(torch.device(find_device_kind()))
    config = judging_config(store, config_file, max_tokens)
    targets, _, contexts = held_out_targets(store, config)
    row = scores(targets, predict_targets(model, contexts()), store)
    if held_out.labels is not None:
        rule = nothing_hidden(store.genes.share, config.data.max_tokens or 0)
        row["label_transfer"] = transfer(embed_store(model, rule, store), held_out.labels, store.num_train)
    return row | {"targets": digest(targets)}


def baselines(held_out: HeldOut, dimensions: int) -> dict[str, dict[str, Any]]:
    """What needs no training: the gene mean, and PCA of that many dimensions where there are labels."""
    store, targets = held_out.store, held_out.targets
    found = {"gene mean": scores(targets, gene_mean(targets, store.genes.share, store.genes.theta), store)}
    if held_out.labels is not None:
        places = principal_components(store, dimensions)
        found["PCA"] = dict.fromkeys(METRICS) | {"label_transfer": transfer(places, held_out.labels, store.num_train)}
    return found


def scores(targets: TargetSet, prediction: Prediction, store: TokenStore) -> dict[str, Any]:
    considered = store.genes.detection_rate >= DETECTED_IN
    correlation = metrics.correlation_within_gene(targets, prediction[0], considered)["mean"]
    return {
        "nll": float(np.nanmean(metrics.nll_per_cell(targets, *prediction))),
        "correlation_within_gene": None if np.isnan(correlation) else correlation,
        "label_transfer": None,
    }


def digest(targets: TargetSet) -> str:
    """SHA-256 of the hidden genes and counts and of the cells they are of, int64 little endian."""
    parts = targets.cell_of_context[targets.contexts], targets.genes, targets.counts
    return hashlib.sha256(np.stack(parts).astype("<i8").tobytes()).hexdigest()
