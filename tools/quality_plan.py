"""What is trained to compare quality against cost, as plain data: which models, for how many steps, in which order.

The reference, criss-cross attention through 64 latents, is trained for S steps. Every other model is trained for as
many steps as make it equal to the reference in

    steps            S: the same contexts in the same order. All have about as many parameters, dense by its depth
    FLOPs            S · (FLOPs of the reference's step) / (FLOPs of its own), by the closed form, on the store's cells
    time             S · (seconds of the reference's step) / (seconds of its own), as measured on this machine

On long contexts the last two leave dense so few steps that it hardly learns. So criss-cross is also trained for what
dense takes for S steps, which makes all of these equal to dense in

    FLOPs of dense   S · (FLOPs of dense's step) / (FLOPs of its own)
    time of dense    S · (seconds of dense's step) / (seconds of its own). The reference alone: it takes 11 minutes a
                     seed on retina, and what other numbers of latents change is told by the FLOPs of dense

Warm-up and decay of the learning rate follow the number of steps. Where two of these numbers are nearly the same, one
training serves both. The reference's shape is also trained on contexts that are cut, for S steps, which cost less than
the reference's, and for equal FLOPs. Not for equal time: the seconds of these steps are not measured, but scaled.

The peak of the learning rate is the configuration's, which need not suit both. So the reference and dense may also be
trained for S steps at other peaks, of one seed, to see which peak is best for each.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cctrain.apply.scaling.measure import depth_of_as_many_parameters
from cctrain.config import ModelConfig, TrainingConfig

GENE_MEAN = "gene mean"  # the baseline that a model must beat before comparing with it says anything
REFERENCE_LATENTS, OTHER_LATENTS = 64, (16, 256)
CUT_TO = (500, 1000, 2000)
STEPS, FLOPS, TIME, FLOPS_OF_DENSE, TIME_OF_DENSE = BUDGETS = (
    "steps",
    "FLOPs",
    "time",
    "FLOPs of dense",
    "time of dense",
)
NEARLY_THE_SAME = 0.02


def criss_cross(latents: int) -> str:
    return f"criss-cross, M = {latents}"


REFERENCE, DENSE = criss_cross(REFERENCE_LATENTS), "dense"


@dataclass(frozen=True)
class Variant:
    """A model, and the most visible tokens of the contexts it is trained on; None: all of every cell."""

    name: str
    attention: str
    latents: int
    depth: int
    max_tokens: int | None = None

    def model(self, base: ModelConfig) -> ModelConfig:
        return replace(base, attention=self.attention, latents=self.latents, depth=self.depth)

    def settings(self, store: Path, longest: int) -> dict[str, Any]:
        """Configuration keys; `longest` is the number of tokens of the store's longest cell. Nobody looks at held-out
        cells while it trains."""
        return {
            "data.store": store,
            "data.max_tokens": self.max_tokens or longest,
            "model.attention": self.attention,
            "model.latents": self.latents,
            "model.depth": self.depth,
            "evaluation.every": 0,
        }


@dataclass(frozen=True)
class Cost:
    """Of one training step; and the seconds that judging takes once it is trained."""

    flops: float
    seconds: float
    judging: float = 0.0


@dataclass(frozen=True)
class Training:
    """`equal`: the budgets that its number of steps serves; models are compared within a budget. `learning_rate`: its
    peak, where it is not the configuration's; such a training serves no budget."""

    dataset: str
    variant: Variant
    steps: int
    equal: tuple[str, ...]
    seed: int
    learning_rate: float | None = None

    @property
    def folder(self) -> str:
        """Of its run; no other training has it."""
        model = re.sub(r"\W+", "-", self.variant.name)
        peak = "" if self.learning_rate is None else f"-learning-rate-{self.learning_rate}"
        return f"{self.dataset}/{model}-steps-{self.steps}-seed-{self.seed}{peak}"

    @property
    def purpose(self) -> str:
        if self.learning_rate is None:
            return f"equal in {' and '.join(self.equal)}"
        return f"peak learning rate {self.learning_rate:g}"

    @property
    def title(self) -> str:
        return f"{self.dataset}, {self.variant.name}, {self.purpose}, seed {self.seed}"


def variants_of(base: ModelConfig, num_genes: int, longest: int) -> list[Variant]:
    """The reference first. Cuts that would cut no cell of the store are left out."""
    shape = replace(base, attention="criss_cross", latents=REFERENCE_LATENTS)
    reference = Variant(REFERENCE, "criss_cross", REFERENCE_LATENTS, base.depth)
    return [
        reference,
        *(replace(reference, name=criss_cross(latents), latents=latents) for latents in OTHER_LATENTS),
        Variant(DENSE, "dense", REFERENCE_LATENTS, depth_of_as_many_parameters(shape, num_genes)),
        *(replace(reference, name=f"{REFERENCE}, n = {n:,}", max_tokens=n) for n in CUT_TO if n < longest),
    ]


def plan(
    dataset: str, variants: Iterable[Variant], costs: dict[str, Cost], steps: int, seeds: Iterable[int]
) -> Iterator[Training]:
    """All trainings of a data set; `costs` by the variant's name."""
    numbers = [(variant, step_numbers(variant, costs, steps)) for variant in variants]
    for seed in seeds:
        for variant, by_number in numbers:
            for number, equal in by_number:
                yield Training(dataset, variant, number, equal, seed)


def at_learning_rates(
    dataset: str, variants: Iterable[Variant], steps: int, seed: int, learning_rates: Iterable[float]
) -> Iterator[Training]:
    """The reference and dense, for `steps` at each of these peaks."""
    models = [variant for variant in variants if variant.name in (REFERENCE, DENSE)]
    for peak in learning_rates:
        for variant in models:
            yield Training(dataset, variant, steps, (), seed, peak)


def step_numbers(variant: Variant, costs: dict[str, Cost], steps: int) -> list[tuple[int, tuple[str, ...]]]:
    """How many steps this variant is trained for, and which budgets each number serves."""
    own, reference, dense = costs[variant.name], costs[REFERENCE], costs[DENSE]
    exact = {STEPS: steps, FLOPS: steps * reference.flops / own.flops}
    if variant.max_tokens is None:
        exact[TIME] = steps * reference.seconds / own.seconds
        exact[FLOPS_OF_DENSE] = steps * dense.flops / own.flops
    if variant.name in (REFERENCE, DENSE):
        exact[TIME_OF_DENSE] = steps * dense.seconds / own.seconds
    return without_near_repeats({budget: max(1, round(number)) for budget, number in exact.items()})


def budgets_of(variant: Variant, costs: dict[str, Cost], steps: int, trained_for: int) -> tuple[str, ...]:
    """Those that a training of so many steps serves."""
    return dict(step_numbers(variant, costs, steps)).get(trained_for, ())


def without_near_repeats(numbers: dict[str, int]) -> list[tuple[int, tuple[str, ...]]]:
    """Each number with the budgets that it serves: its own, and those whose number differs by 2 % or a single step."""
    kept: list[tuple[int, tuple[str, ...]]] = []
    for budget, number in numbers.items():
        for place, (other, served) in enumerate(kept):
            if abs(number - other) <= max(1, NEARLY_THE_SAME * other):
                kept[place] = other, (*served, budget)
                break
        else:
            kept.append((number, (budget,)))
    return kept


def warmup_steps(steps: int, schedule: TrainingConfig) -> int:
    """The share of the steps that the configuration gives it: of few steps, its number would be most of them."""
    return max(1, round(steps * schedule.warmup / schedule.steps))


def predicted_seconds(training: Training, cost: Cost, around: float) -> float:
    """Of training and judging; `around` is what every training takes beside its steps."""
    return around + training.steps * cost.seconds + cost.judging
