"""Which trainings are compared: equal in parameters, FLOPs or time to the reference, and none twice."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from cctrain.config import Config, ModelConfig, TrainingConfig
from cctrain.cost.parameters import num_parameters
from cctrain.cost.step import step_cost
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import TokenStore
from cctrain.training.data import training_order, training_rule
from tools.quality_cost import Epoch, epoch_of, flops_of_a_step
from tools.quality_plan import (
    DENSE,
    FLOPS,
    FLOPS_OF_DENSE,
    REFERENCE,
    STEPS,
    TIME,
    TIME_OF_DENSE,
    Cost,
    Training,
    at_learning_rates,
    budgets_of,
    criss_cross,
    plan,
    step_numbers,
    variants_of,
    warmup_steps,
    without_near_repeats,
)

SHAPE = ModelConfig(width=64, depth=2, heads=4)
NUM_GENES, LONGEST, STEPS_OF_REFERENCE = 22_352, 8177, 300
VARIANTS = variants_of(SHAPE, NUM_GENES, LONGEST)
LENGTHS = np.random.default_rng(0).integers(700, LONGEST, size=40).tolist()


@pytest.fixture(scope="module")
def costs() -> dict[str, Cost]:
    """FLOPs of 5 steps of 8 contexts; the time of a FLOP is another for every variant."""

    def epoch(longest: int) -> Epoch:
        lengths = [min(length, longest) for length in LENGTHS]
        return Epoch(lengths, targets=sum(LENGTHS) // 20, steps=5)

    flops = {v.name: flops_of_a_step(v.model(SHAPE), epoch(v.max_tokens or LONGEST)) for v in VARIANTS}
    return {name: Cost(number, number * (1 + place) * 1e-11) for place, (name, number) in enumerate(flops.items())}


def budgets(costs: dict[str, Cost], name: str) -> dict[str, int]:
    [variant] = [variant for variant in VARIANTS if variant.name == name]
    numbers = step_numbers(variant, costs, STEPS_OF_REFERENCE)
    return {budget: number for number, equal in numbers for budget in equal}


@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS if variant.max_tokens is None])
def test_equal_flops_and_equal_time_are_equal_within_half_a_step(costs: dict[str, Cost], name: str) -> None:
    own, reference, numbers = costs[name], costs[REFERENCE], budgets(costs, name)
    assert numbers[STEPS] == STEPS_OF_REFERENCE
    assert abs(numbers[FLOPS] * own.flops - STEPS_OF_REFERENCE * reference.flops) <= own.flops / 2
    assert abs(numbers[TIME] * own.seconds - STEPS_OF_REFERENCE * reference.seconds) <= own.seconds / 2


@pytest.mark.parametrize("latents", [16, 64, 256])
def test_criss_cross_on_whole_cells_is_trained_with_the_flops_of_as_many_steps_of_dense(
    costs: dict[str, Cost], latents: int
) -> None:
    own = costs[criss_cross(latents)].flops
    number = budgets(costs, criss_cross(latents))[FLOPS_OF_DENSE]
    assert abs(number * own - STEPS_OF_REFERENCE * costs[DENSE].flops) <= own / 2


def test_the_reference_alone_is_trained_for_as_long_as_as_many_steps_of_dense(costs: dict[str, Cost]) -> None:
    own, number = costs[REFERENCE].seconds, budgets(costs, REFERENCE)[TIME_OF_DENSE]
    assert abs(number * own - STEPS_OF_REFERENCE * costs[DENSE].seconds) <= own / 2
    assert TIME_OF_DENSE not in budgets(costs, criss_cross(16))
    assert TIME_OF_DENSE not in budgets(costs, criss_cross(256))


def test_the_steps_of_dense_serve_what_criss_cross_is_given_the_cost_of(costs: dict[str, Cost]) -> None:
    [dense] = [variant for variant in VARIANTS if variant.name == DENSE]
    served = budgets_of(dense, costs, STEPS_OF_REFERENCE, trained_for=STEPS_OF_REFERENCE)
    assert served == (STEPS, FLOPS_OF_DENSE, TIME_OF_DENSE)


def test_on_cut_contexts_the_reference_is_trained_for_equal_steps_and_equal_flops(costs: dict[str, Cost]) -> None:
    name = f"{REFERENCE}, n = 500"
    own, numbers = costs[name].flops, budgets(costs, name)
    assert numbers.keys() == {STEPS, FLOPS}
    assert numbers[STEPS] == STEPS_OF_REFERENCE < numbers[FLOPS]
    assert abs(numbers[FLOPS] * own - STEPS_OF_REFERENCE * costs[REFERENCE].flops) <= own / 2


def test_a_cut_that_costs_nearly_what_whole_cells_do_is_trained_once(costs: dict[str, Cost]) -> None:
    name = f"{REFERENCE}, n = 2,000"
    [variant] = [variant for variant in VARIANTS if variant.name == name]
    nearly = costs | {name: Cost(0.99 * costs[REFERENCE].flops, 1.0)}
    assert step_numbers(variant, nearly, STEPS_OF_REFERENCE) == [(STEPS_OF_REFERENCE, (STEPS, FLOPS))]


def test_a_number_of_steps_that_nothing_asks_for_serves_no_budget(costs: dict[str, Cost]) -> None:
    assert budgets_of(VARIANTS[0], costs, STEPS_OF_REFERENCE, trained_for=STEPS_OF_REFERENCE + 1) == ()


def test_learning_rates_are_tried_with_the_reference_and_dense_alone_and_serve_no_budget() -> None:
    trainings = list(at_learning_rates("retina", VARIANTS, STEPS_OF_REFERENCE, 3, [5e-4, 4e-3]))
    asked = [(training.learning_rate, training.variant.name) for training in trainings]
    assert asked == [(5e-4, REFERENCE), (5e-4, DENSE), (4e-3, REFERENCE), (4e-3, DENSE)]
    assert {(training.steps, training.seed, training.equal) for training in trainings} == {(STEPS_OF_REFERENCE, 3, ())}


def test_a_training_at_a_learning_rate_of_its_own_has_a_folder_of_its_own_and_the_others_keep_theirs() -> None:
    [reference, dense] = at_learning_rates("retina", VARIANTS, 200, 0, [5e-4])
    assert dense.folder == "retina/dense-steps-200-seed-0-learning-rate-0.0005"
    assert Training("retina", dense.variant, 200, (STEPS,), 0).folder == "retina/dense-steps-200-seed-0"
    assert reference.title == f"retina, {REFERENCE}, peak learning rate 0.0005, seed 0"


def test_no_other_depth_brings_dense_nearer_to_the_parameters_of_the_reference() -> None:
    by_name = {variant.name: variant for variant in VARIANTS}
    wanted = num_parameters(by_name[REFERENCE].model(SHAPE), NUM_GENES)

    def difference(depth: int) -> int:
        return abs(num_parameters(ModelConfig("dense", 64, depth, 4), NUM_GENES) - wanted)

    assert by_name[DENSE].attention == "dense"
    assert by_name[DENSE].depth == min(range(1, 20), key=difference)


def test_a_number_of_steps_within_two_percent_or_one_step_of_another_is_not_trained_again() -> None:
    assert without_near_repeats({STEPS: 300, FLOPS: 306, TIME: 200}) == [(300, (STEPS, FLOPS)), (200, (TIME,))]
    assert without_near_repeats({STEPS: 300, FLOPS: 307, TIME: 307}) == [(300, (STEPS,)), (307, (FLOPS, TIME))]
    assert without_near_repeats({STEPS: 100, FLOPS: 6, TIME: 5}) == [(100, (STEPS,)), (6, (FLOPS, TIME))]
    assert without_near_repeats({STEPS: 100, FLOPS: 7, TIME: 5}) == [(100, (STEPS,)), (7, (FLOPS,)), (5, (TIME,))]


def test_the_reference_is_trained_for_its_steps_once_a_seed(costs: dict[str, Cost]) -> None:
    trainings = plan("retina", VARIANTS, costs, STEPS_OF_REFERENCE, [0, 1, 2])
    reference = [one for one in trainings if one.variant.name == REFERENCE and one.steps == STEPS_OF_REFERENCE]
    assert [(training.seed, training.equal) for training in reference] == [
        (seed, (STEPS, FLOPS, TIME)) for seed in (0, 1, 2)
    ]


def test_every_run_has_a_folder_of_its_own(costs: dict[str, Cost]) -> None:
    trainings = list(plan("retina", VARIANTS, costs, STEPS_OF_REFERENCE, [0, 1, 2]))
    assert len({training.folder for training in trainings}) == len(trainings)


@pytest.mark.parametrize(("steps", "warmup"), [(450, 10), (900, 20), (11, 1), (60, 1)])
def test_warm_up_takes_the_share_of_the_steps_that_the_configuration_gives_it(steps: int, warmup: int) -> None:
    assert warmup_steps(steps, TrainingConfig(steps=450, warmup=10)) == warmup


def test_contexts_are_cut_for_the_reference_alone_and_only_where_that_cuts_a_cell() -> None:
    def cuts(longest: int) -> list[tuple[int, int, str]]:
        variants = variants_of(SHAPE, NUM_GENES, longest)
        return [(v.max_tokens, v.latents, v.attention) for v in variants if v.max_tokens is not None]

    assert cuts(3000) == [(500, 64, "criss_cross"), (1000, 64, "criss_cross"), (2000, 64, "criss_cross")]
    assert cuts(1000) == [(500, 64, "criss_cross")]


def test_without_a_cut_contexts_are_as_long_as_the_longest_cell() -> None:
    settings = {variant.name: variant.settings(Path("store"), LONGEST) for variant in VARIANTS}
    assert settings[DENSE]["data.max_tokens"] == LONGEST
    assert settings[f"{REFERENCE}, n = 500"]["data.max_tokens"] == 500


def test_flops_of_a_step_are_those_of_the_steps_of_an_epoch(tiny_store: TokenStore) -> None:
    config = Config()
    config.data.store, config.data.max_tokens, config.data.global_batch = str(tiny_store.path), 1000, 5
    loader = Loader(tiny_store, training_rule(config, tiny_store), Share(), 10_000)
    num_steps = -(-tiny_store.num_train // 5)
    steps = list(loader.training_steps(training_order(config, loader), 5, 0, num_steps))
    assert sum(step.num_contexts for step in steps) == tiny_store.num_train
    batches = [batch for step in steps for batch in step.batches]
    flops = [
        step_cost(SHAPE, [stop - start for start, stop in pairwise(batch.offsets.tolist())], len(batch.targets))
        for batch in batches
    ]
    ran = sum(cost["cost/total_flops"] for cost in flops) / num_steps
    # An epoch in another order hides other genes.
    assert flops_of_a_step(SHAPE, epoch_of(config, tiny_store)) == pytest.approx(ran, rel=0.02)
