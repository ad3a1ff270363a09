"""Saved on some ranks and ZeRO stage, loaded on others: the same samples, and losses to 1e-5 relative for 20 steps."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from cctrain.data.store.store import TokenStore
from tests.training.conftest import Case, Result, run_cases
from tests.training.plain import SHARD_ALL, STAGES

pytestmark = [pytest.mark.processes, pytest.mark.slow]

RANKS = (1, 2, 4)
SAVED_AT, STEPS, FEW_STEPS = 4, 24, 12
Way = tuple[int, int]  # ZeRO stage, context ranks
Shape = tuple[int, Way]  # ranks in all
ALONE = tuple((stage, 1) for stage in STAGES)


@pytest.fixture
def launch(tiny_config: Path, unequal_store: TokenStore, tmp_path: Path):
    def run(name: str, num_ranks: int, cases: list[Case]) -> dict[str, Result]:
        return run_cases(cases, num_ranks, tiny_config, unequal_store, tmp_path / name, timeout=1500)

    run.folder = tmp_path
    return run


def saving(launch, num_ranks: int, ways: tuple[Way, ...], steps: int = STEPS) -> dict[Shape, Result]:
    shapes = [(num_ranks, way) for way in ways]
    cases = [
        Case(
            named(shape),
            options(shape, steps),
            save=launch.folder / f"run-{named(shape)}",
            save_at=SAVED_AT,
            verify=True,
        )
        for shape in shapes
    ]
    found = launch(f"save-{num_ranks}", num_ranks, cases)
    return {shape: found[named(shape)] for shape in shapes}


def loading(
    launch, num_ranks: int, pairs: list[tuple[Shape, Way]], steps: int = STEPS
) -> dict[tuple[Shape, Shape], Result]:
    both = [(saved, (num_ranks, way)) for saved, way in pairs]
    cases = [
        Case(f"{named(saved)}-to-{named(shape)}", options(shape, steps), load=launch.folder / f"run-{named(saved)}")
        for saved, shape in both
    ]
    found = launch(f"load-{num_ranks}", num_ranks, cases)
    return {pair: found[case.name] for case, pair in zip(cases, both, strict=True)}


def options(shape: Shape, steps: int) -> tuple[str, ...]:
    _, (stage, num_context_ranks) = shape
    return (
        f"training.steps={steps}",
        *SHARD_ALL,
        f"parallel.zero_stage={stage}",
        f"parallel.context={num_context_ranks}",
    )


def named(shape: Shape) -> str:
    num_ranks, (stage, num_context_ranks) = shape
    return f"{num_ranks}-ranks-zero-{stage}-context-{num_context_ranks}"


def agree(saved: dict[Shape, Result], loaded: dict[tuple[Shape, Shape], Result]) -> None:
    for (source, target), result in loaded.items():
        undisturbed = saved[source]
        assert result.column("step") == undisturbed.column("step")[SAVED_AT:]
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
def test_a_checkpoint_of_two_ranks_resumes_on_one_and_four_at_other_stages_and_with_shared_contexts(launch):
    saved = saving(launch, 2, ((0, 1), (3, 1), (2, 2)), FEW_STEPS)
    on_one = loading(launch, 1, [((2, (3, 1)), (0, 1)), ((2, (2, 2)), (1, 1))], FEW_STEPS)
    on_two = loading(launch, 2, [*((shape, shape[1]) for shape in saved), ((2, (0, 1)), (1, 2))], FEW_STEPS)
    on_four = loading(launch, 4, [((2, (0, 1)), (2, 1)), ((2, (3, 1)), (1, 4))], FEW_STEPS)
    agree(saved, on_one | on_two | on_four)


def test_every_shape_resumes_on_every_other(launch):
    saved = {}
    for num_ranks in RANKS:
        saved |= saving(launch, num_ranks, ALONE)
    for num_ranks in RANKS:
        pairs = [(shape, way) for shape in product(RANKS, ALONE) for way in ALONE]
        agree(saved, loading(launch, num_ranks, pairs))


def test_contexts_shared_by_any_number_of_ranks_resume_on_any_other(launch):
    ways = [(stage, num_context_ranks) for stage, num_context_ranks in zip(STAGES, (1, 2, 4, 2), strict=True)]
    saved = saving(launch, 4, tuple(ways))
    pairs = [((4, way), other) for way in ways for other in ways]
    agree(saved, loading(launch, 4, pairs) | loading(launch, 1, [((4, way), (1, 1)) for way in ways]))
