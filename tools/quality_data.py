"""The data sets of the comparison: fetched, prepared, opened, and what is known of each before anything is trained."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from cctrain.config import TrainingConfig, load_config
from cctrain.cost.parameters import num_parameters
from cctrain.data.store.store import open_store
from tools.public_data import whole_cells
from tools.quality_cost import Epoch, epoch_of, flops_of_a_step, seconds_a_flop
from tools.quality_judge import LABEL, HeldOut, digest, hold_out
from tools.quality_plan import REFERENCE, Cost, Variant, variants_of

FORWARD_OF_A_STEP = 1 / 3


@dataclass(frozen=True)
class Dataset:
    """`facts`, which JSON can hold, decide the plan and what is judged."""

    name: str
    held_out: HeldOut
    config_file: Path
    variants: list[Variant]
    facts: dict[str, Any]

    def settings(self, variant: Variant) -> list[str]:
        """Overrides of the configuration file."""
        settings = variant.settings(self.held_out.store.path, self.facts["longest"])
        return [f"{key}={value}" for key, value in settings.items()]


def open_dataset(name: str, steps: int, work: Path, config_file: Path) -> Dataset:
    """`steps` are the reference's; the store is made in `work`, if it is not there."""
    held_out = hold_out(open_store(whole_cells(name, work)), config_file)
    store, base = held_out.store, held_out.config
    longest = int(store.num_tokens.max())
    variants = variants_of(base.model, store.num_genes, longest)

    def epoch(most: int) -> Epoch:
        return epoch_of(replace(base, data=replace(base.data, max_tokens=most)), store)

    epochs = {most: epoch(most) for most in {variant.max_tokens or longest for variant in variants}}
    facts = {
        "config": config_file.read_text(),
        "store": store.digest,
        "steps": steps,
        "training_cells": store.num_train,
        "held_out_cells": store.num_cells - store.num_train,
        "longest": longest,
        "draws": base.evaluation.draws,
        "targets": len(held_out.targets.genes),
        "targets_digest": digest(held_out.targets),
        "labels": None if held_out.labels is None else LABEL,
        "steps_an_epoch": epochs[longest].steps,
        "tokens_a_context": float(np.mean(epochs[longest].tokens)),
        "variants": {
            variant.name: asdict(variant)
            | {
                "parameters": num_parameters(variant.model(base.model), store.num_genes),
                "flops_a_step": flops_of_a_step(variant.model(base.model), epochs[variant.max_tokens or longest]),
                "cells_cut": float(np.mean(store.num_tokens[: store.num_train] > (variant.max_tokens or longest))),
            }
            for variant in variants
        },
    }
    return Dataset(name, held_out, config_file, variants, facts)


def variants_in(facts: dict[str, Any]) -> list[Variant]:
    names = [field.name for field in fields(Variant)]
    return [Variant(**{name: variant[name] for name in names}) for variant in facts["variants"].values()]


def peak_learning_rate(facts: dict[str, Any]) -> float:
    """The configuration's."""
    return OmegaConf.merge({"training": TrainingConfig()}, OmegaConf.create(facts["config"])).training.learning_rate


def measured_seconds(dataset: Dataset) -> dict[str, float]:
    """Of a step of each variant. Steps on cut contexts have other FLOPs and the same seconds a FLOP."""
    whole = [variant for variant in dataset.variants if variant.max_tokens is None]
    rates = seconds_a_flop({v.name: load_config(dataset.config_file, dataset.settings(v)) for v in whole})
    flops = {name: variant["flops_a_step"] for name, variant in dataset.facts["variants"].items()}
    return {v.name: flops[v.name] * rates.get(v.name, rates[REFERENCE]) for v in dataset.variants}


def costs(facts: dict[str, Any], seconds_a_step: dict[str, float]) -> dict[str, Cost]:
    """By variant. A variant trained on cut contexts is judged twice."""
    judged = facts["held_out_cells"] * facts["draws"]
    if facts["labels"] is not None:
        judged += facts["training_cells"] + facts["held_out_cells"]
    steps = judged * facts["steps_an_epoch"] / facts["training_cells"]
    return {
        name: Cost(
            variant["flops_a_step"],
            seconds_a_step[name],
            judging=steps
            * FORWARD_OF_A_STEP
            * (seconds_a_step[name] + (seconds_a_step[REFERENCE] if variant["max_tokens"] else 0.0)),
        )
        for name, variant in facts["variants"].items()
    }
