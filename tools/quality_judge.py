"""How good a trained model is on held-out cells: the same hidden counts whatever the model, its seed and its contexts.

The held-out draws are those of `cctrain evaluate` under seed 0. Which genes are hidden depends on the gene alone, and
the size factor on all visible counts, also where the context is cut, so a cut changes what the model reads and nothing
that it is judged on. `targets` in each result is a digest of the hidden genes and counts, to prove that.

Label transfer is that of `tools/label_transfer.py`, where the store has cell types.
"""

import hashlib
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cctrain.apply import metrics
from cctrain.apply.baselines import fit_neighbours, gene_mean
from cctrain.apply.evaluate import DETECTED_IN, NEIGHBOURS, held_out_targets, training_cells
from cctrain.apply.predict import load_model, predict_targets
from cctrain.apply.targets import Prediction, TargetSet
from cctrain.config import Config, ModelConfig, load_config
from cctrain.data.loading.contexts import nothing_hidden, target_probability
from cctrain.data.store.store import TokenStore
from cctrain.model.transformer import Transformer
from cctrain.parallel.mesh import find_device_kind
from cctrain.run_directory import open_run
from cctrain.training.data import resolve
from cctrain.training.train import build_model
from tools.label_transfer import embed_store, principal_components, transfer
from tools.quality_plan import GENE_MEAN

LABEL = "cell_type"  # column of obs
SEED = 0  # of the hidden counts; models have seeds of their own
UNTRAINED = "untrained"
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
    config = judging_config(held_out.store, config_file, max_tokens)
    return judge_model(load_model(open_run(run)), held_out, config)


def judge_model(model: Transformer, held_out: HeldOut, config: Config) -> dict[str, Any]:
    store, model = held_out.store, model.to(torch.device(find_device_kind()))
    targets, _, contexts = held_out_targets(store, config)
    row = scores(targets, predict_targets(model, contexts()), store)
    if held_out.labels is not None:
        rule = nothing_hidden(store.genes.share, config.data.max_tokens or 0)
        row["label_transfer"] = transfer(embed_store(model, rule, store), held_out.labels, store.num_train)
    return row | {"targets": digest(targets)}


def baselines(held_out: HeldOut, shape: ModelConfig, known: Container[str] = ()) -> dict[str, dict[str, Any]]:
    """Scores of what needs no training, but those that are known: the gene mean, a model of that shape with its first
    weights, the neighbours of `cctrain evaluate`; and where there are labels, PCA of as many dimensions as it has."""
    store, targets, labels = held_out.store, held_out.targets, held_out.labels

    def of_pca() -> dict[str, Any]:
        assert labels is not None
        places = principal_components(store, shape.width)
        return dict.fromkeys(METRICS) | {"label_transfer": transfer(places, labels, store.num_train)}

    def of_neighbours() -> dict[str, Any]:
        genes, probability = store.genes, target_probability(store.genes, held_out.config.objective)
        fitted = fit_neighbours(training_cells(store), genes.share, genes.theta, probability, SEED)
        return scores(targets, fitted.predict(targets), store)

    ways: dict[str, Callable[[], dict[str, Any]]] = {
        GENE_MEAN: lambda: scores(targets, gene_mean(targets, store.genes.share, store.genes.theta), store),
        **({} if labels is None else {"PCA": of_pca}),
        NEIGHBOURS: of_neighbours,
        UNTRAINED: lambda: judge_model(untrained(store, held_out.config, shape), held_out, held_out.config),
    }
    return {name: way() for name, way in ways.items() if name not in known}


def untrained(store: TokenStore, config: Config, shape: ModelConfig) -> Transformer:
    """With the weights that a training under SEED starts with."""
    return build_model(resolve(replace(config, model=shape), store), store.genes).eval()


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
