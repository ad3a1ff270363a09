"""Saved on some ranks and ZeRO stage, loaded on others: the same samples, and losses to 1e-5 relative for 20 steps."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cctrain.data.store import TokenStore
from tests.training.conftest import Case, Result, run_cases
from tests.training.test_ranks import SHARD_ALL, STAGES

pytestmark = [pytest.mark.processes, pytest.mark.slow]

RANKS = (1, 2, 4)
SAVED_AT, STEPS = 4, 24
Shape = tuple[int, int]  # ranks, ZeRO stage
OPTIONS = (f"training.steps={STEPS}", *SHARD_ALL)


@pytest.fixture
def launch(tiny_config: Path, unequal_store: TokenStore, tmp_path: Path):
    def run(name: str, num_ranks: int, cases: list[Case]) -> dict[str, Result]:
        return run_cases(cases, num_ranks, tiny_config, unequal_store, tmp_path / name, timeout=1500)

    run.folder = tmp_path
    return run


def saving(launch, num_ranks: int, stages: tuple[int, ...]) -> dict[Shape, Result]:
    cases = [
        Case(
            f"{num_ranks}-{stage}",
            (*OPTIONS, f"parallel.zero_stage={stage}"),
            save=run_of(launch, (num_ranks, stage)),
            save_at=SAVED_AT,
            verify=True,
        )
        for stage in stages
    ]
    found = launch(f"save-{num_ranks}", num_ranks, cases)
    return {(num_ranks, stage): found[f"{num_ranks}-{stage}"] for stage in stages}


def loading(launch, num_ranks: int, pairs: list[tuple[Shape, int]]) -> dict[tuple[Shape, Shape], Result]:
    cases = [
        Case(
            f"{saved[0]}-{saved[1]}-to-{num_ranks}-{stage}",
            (*OPTIONS, f"parallel.zero_stage={stage}"),
            load=run_of(launch, saved),
        )
        for saved, stage in pairs
    ]
    found = launch(f"load-{num_ranks}", num_ranks, cases)
    return {(saved, (num_ranks, stage)): found[case.name] for case, (saved, stage) in zip(cases, pairs, strict=True)}


def run_of(launch, shape: Shape) -> Path:
    return launch.folder / f"run-{shape[0]}-{shape[1]}"


def agree(saved: dict[Shape, Result], loaded: dict[tuple[Shape, Shape], Result]) -> None:
    for (source, target), result in loaded.items():
        undisturbed = saved[source]
        assert result.column("step") == list(range(SAVED_AT + 1, STEPS + 1))
        assert result.column("samples") == undisturbed.column("samples")[SAVED_AT:], (source, target)
        np.testing.assert_allclose(
            result.losses, undisturbed.losses[SAVED_AT:], rtol=1e-5, err_msg=f"{source} to {target}"
        )
        # On four ranks gloo is not bit-identical even undisturbed: on a machine with eight times more processes than
        # cores, 2 of about 100 runs under ZeRO 2 differed by rounding.
        if source == target and source[0] <= 2:
            assert result.losses.tolist() == undisturbed.losses[SAVED_AT:].tolist(), f"{source} is not bit-identical"
            for name, weights in result.weights.items():
                assert np.array_equal(weights, undisturbed.weights[name]), (source, name)


@pytest.mark.representative
def test_a_checkpoint_of_two_ranks_resumes_on_one_and_four_and_at_other_stages(launch):
    saved = saving(launch, 2, STAGES)
    on_one = loading(launch, 1, [((2, 0), 3), ((2, 3), 0)])
    on_two = loading(launch, 2, [((2, stage), stage) for stage in STAGES])
    on_four = loading(launch, 4, [((2, 1), 2), ((2, 3), 1)])
    agree(saved, on_one | on_two | on_four)


def test_every_shape_resumes_on_every_other(launch):
    saved = {}
    for num_ranks in RANKS:
        saved |= saving(launch, num_ranks, STAGES)
    shapes = list(product(RANKS, STAGES))
    for num_ranks in RANKS:
        pairs = [(shape, stage) for shape in shapes for stage in STAGES]
        agree(saved, loading(launch, num_ranks, pairs))
