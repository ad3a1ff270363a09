"""Sweeps without a machine: points whose times follow a known law."""

from typing import Any

import numpy as np

from cctrain.apply.scaling.measure import medians, rates
from cctrain.apply.scaling.points import CRISS_CROSS, Point, Row, points_of
from cctrain.apply.scaling.predict import describe_point
from cctrain.apply.scaling.sweep import Plan
from cctrain.apply.scaling.work import Setting
from cctrain.config import MemoryConfig, ModelConfig

MODEL = ModelConfig(width=16, depth=2, heads=2, latents=8, cell_encoding=0)
SETTING = Setting("cpu", "fp32", 100, MemoryConfig())
DIGEST = "feed"
LENGTHS, LATENTS = [1024, 4096, 8192, 16384, 32768], [32, 64, 128]
# Seconds: attention of all layers on n·M, and on n²; the rest.
PER_PAIR, PER_SQUARE, PER_TOKEN = 1e-8, 2e-9, 2e-5


def a_plan(
    lengths: list[int] = LENGTHS,
    latents: list[int] = LATENTS,
    context_ranks: tuple[int, ...] = (1,),
    budget: float = 1e9,
    rounds: int = 1,
) -> Plan:
    points = list(points_of(MODEL, 4, lengths, latents, list(context_ranks)))
    return Plan(points, SETTING, budget, rounds, 3, product_rate=1e11, digest=DIGEST, command="cctrain scaling")


def timings(point: Point, noise: float = 1.0) -> dict[str, Any]:
    """What a machine that obeys the law would have measured."""
    n, depth = point.tokens, point.model.depth
    ours = point.kind == CRISS_CROSS
    attention = noise * (PER_PAIR * n * point.model.latents if ours else PER_SQUARE * n**2 * depth / MODEL.depth)
    rest = PER_TOKEN * n * (1 if ours else depth / (2 * MODEL.depth))
    return {
        "warm_up": 1.5 * (attention + rest),
        "steps": [(attention + rest) / point.context_ranks] * 3,
        "attention_of_a_layer": [attention / point.context_ranks / depth] * 3,
        "matrix_products": [1e-3] * 3,
        "flops_of_matrix_products": 1e8,
        "memory_bytes": 1000 * n * depth // point.context_ranks,
    }


def a_row(point: Point, noise: float = 1.0, left_out: str | None = None) -> Row:
    row = describe_point(point, SETTING) | {"settings": DIGEST, "commit": "abc", "predicted_seconds": 1.0}
    row["time"] = "2026-01-02T03:04:05+00:00"
    if left_out:
        return row | {"left_out": left_out, "for_want_of": "memory"}
    measured = timings(point, noise)
    row |= medians(measured, point.model.depth) | {"timings": measured}
    return row | rates(row)


def rows_of(plan: Plan, noise: float = 0.0, seed: int = 0) -> dict[str, Row]:
    draws = np.random.default_rng(seed)
    return {point.key: a_row(point, float(np.exp(noise * draws.standard_normal()))) for point in plan.points}


def settings() -> dict[str, Any]:
    return {
        "model": {"width": 16, "depth": 2, "heads": 2, "latents": 8, "latent_width": None, "backend": "auto"},
        "precision": "fp32",
        "genes": 100,
        "memory": {"checkpointing": False},
        "machine": {"device": "cpu", "gpu": None, "threads": 2, "torch": "2.0"},
    }
