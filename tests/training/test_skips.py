"""One rank meets a NaN: no rank takes the step, and training goes on as if its batch had been passed over."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cctrain.data.store.store import TokenStore
from tests.training.conftest import Case, Result, run_cases
from tests.training.plain import SHARD_ALL, STAGES

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.representative]

STEPS = 6
POISONED = (1, 4)  # the first step too, at which AdamW has no state yet
MEASURED = ("loss", "grad_norm", "samples", "targets", "tokens", "learning_rate")
# Several micro-batches a step; the poisoned one is the first.
SMALL_BATCHES = "data.micro_batch_tokens=250"
KINDS = [*product(STAGES, ("fp32", "bf16"), (False,)), *product(STAGES, ("fp32",), (True,))]


@pytest.fixture(scope="module")
def trained(
    tiny_config: Path, unequal_store: TokenStore, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    """Two ranks; of each kind one training that meets NaN on the last rank, and one that never sees those batches."""
    cases = []
    for kind in KINDS:
        stage, precision, accumulates = kind
        options = (
            *(f"training.steps={STEPS}", *SHARD_ALL),
            *(f"parallel.zero_stage={stage}", f"training.precision={precision}"),
            *((SMALL_BATCHES,) if accumulates else ()),
        )
        cases.append(Case(f"poisoned-{kind}", options, poison=POISONED))
        cases.append(Case(f"omitted-{kind}", options, omit=POISONED))
    return run_cases(cases, 2, tiny_config, unequal_store, tmp_path_factory.mktemp("skips") / "out", timeout=600)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_that_meets_nan_on_one_rank_is_taken_by_none_and_counted(trained, kind):
    result = trained[f"poisoned-{kind}"]
    assert result.column("step") == list(range(1, STEPS + 1))
    assert [line["step"] for line in result.lines if not line["applied"]] == list(POISONED)
    assert [step for step, loss in enumerate(result.losses, start=1) if math.isnan(loss)] == list(POISONED)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_training_goes_on_as_if_the_batch_had_been_passed_over(trained, kind):
    poisoned, omitted = trained[f"poisoned-{kind}"], trained[f"omitted-{kind}"]
    others = [line for line in poisoned.lines if line["step"] not in POISONED]
    assert [line["step"] for line in others] == omitted.column("step")
    for key in MEASURED:
        assert [line[key] for line in others] == omitted.column(key), key
    for name, weights in poisoned.weights.items():
        assert np.isfinite(weights).all(), name
        assert np.array_equal(weights, omitted.weights[name]), name


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_ranks_end_with_the_same_weights(trained, kind):
    first, second = trained[f"poisoned-{kind}"].digests
    assert first == second
    assert trained[f"omitted-{kind}"].digests == [first, first]


def test_the_poisoned_batch_is_not_the_last_one_of_its_step_where_ranks_accumulate(trained):
    for stage in STAGES:
        lines = trained[f"poisoned-{(stage, 'fp32', True)}"].lines
        assert all(lines[step - 1]["accumulation"] > 1 for step in POISONED)
