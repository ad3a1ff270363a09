"""One rank meets a NaN: no rank takes the step, and training goes on as if its batch had been passed over."""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cctrain.data.store.store import TokenStore
from tests.training.conftest import Case, Result, run_cases
from tests.training.plain import SHARD_ALL, STAGES

pytestmark = [pytest.mark.processes, pytest.mark.slow]

STEPS = 6
POISONED = (1, 4)  # the first step too, at which AdamW has no state yet
MEASURED = ("loss", "grad_norm", "samples", "targets", "tokens", "learning_rate")
# Several micro-batches a step; the poisoned one is the first.
SMALL_BATCHES = "data.micro_batch_tokens=250"
Kind = tuple[int, str, bool]  # ZeRO stage, precision, whether a step has several micro-batches
KINDS: list[Kind] = [*product(STAGES, ("fp32", "bf16"), (False,)), *product(STAGES, ("fp32",), (True,))]
ALWAYS: list[Kind] = [(0, "fp32", True), (2, "bf16", False), (3, "fp32", False)]


@dataclass(frozen=True)
class Trained:
    kinds: list[Kind]
    results: dict[str, Result]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(ALWAYS, marks=pytest.mark.representative, id="some kinds"),
        pytest.param([kind for kind in KINDS if kind not in ALWAYS], id="all other kinds"),
    ],
)
def trained(
    request: pytest.FixtureRequest,
    tiny_config: Path,
    unequal_store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """Two ranks; of each kind one training that meets NaN on the last rank, and one that never sees those batches."""
    cases = []
    for kind in request.param:
        stage, precision, accumulates = kind
        options = (
            *(f"training.steps={STEPS}", *SHARD_ALL),
            *(f"parallel.zero_stage={stage}", f"training.precision={precision}"),
            *((SMALL_BATCHES,) if accumulates else ()),
        )
        cases.append(Case(f"poisoned-{kind}", options, poison=POISONED))
        cases.append(Case(f"omitted-{kind}", options, omit=POISONED))
    out = tmp_path_factory.mktemp("skips") / "out"
    return Trained(request.param, run_cases(cases, 2, tiny_config, unequal_store, out, timeout=600))


def test_a_step_that_meets_nan_on_one_rank_is_taken_by_none_and_counted(trained):
    for kind in trained.kinds:
        result = trained.results[f"poisoned-{kind}"]
        assert result.column("step") == list(range(1, STEPS + 1)), kind
        assert [line["step"] for line in result.lines if not line["applied"]] == list(POISONED), kind
        not_finite = [step for step, loss in enumerate(result.losses, start=1) if math.isnan(loss)]
        assert not_finite == list(POISONED), kind


def test_training_goes_on_as_if_the_batch_had_been_passed_over(trained):
    for kind in trained.kinds:
        poisoned, omitted = trained.results[f"poisoned-{kind}"], trained.results[f"omitted-{kind}"]
        others = [line for line in poisoned.lines if line["step"] not in POISONED]
        assert [line["step"] for line in others] == omitted.column("step"), kind
        for key in MEASURED:
            assert [line[key] for line in others] == omitted.column(key), (kind, key)
        for name, weights in poisoned.weights.items():
            assert np.isfinite(weights).all(), (kind, name)
            assert np.array_equal(weights, omitted.weights[name]), (kind, name)


def test_all_ranks_end_with_the_same_weights(trained):
    for kind in trained.kinds:
        first, second = trained.results[f"poisoned-{kind}"].digests
        assert first == second, kind
        assert trained.results[f"omitted-{kind}"].digests == [first, first], kind


def test_the_poisoned_batch_is_not_the_last_one_of_its_step_where_ranks_accumulate(trained):
    accumulating = [kind for kind in trained.kinds if kind[2]]
    assert accumulating
    for kind in accumulating:
        lines = trained.results[f"poisoned-{kind}"].lines
        assert all(lines[step - 1]["accumulation"] > 1 for step in POISONED), kind
