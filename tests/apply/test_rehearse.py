"""What a rehearsal takes steps of: the training's own shape, or a smaller one where that would take long."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from cctrain.apply import rehearse
from cctrain.apply.estimate import contexts_without_store
from cctrain.apply.processes import in_new_processes
from cctrain.apply.rehearse import LONGEST_STEP, MOST_PARAMETERS, growth_after, made_up_batches, smaller
from cctrain.config import Config, ModelConfig
from cctrain.cost.devices import load_device
from cctrain.cost.estimate import estimate, needs_of
from cctrain.cost.parameters import num_parameters
from cctrain.cost.step import step_cost
from cctrain.cost.work import Contexts, work_of
from cctrain.parallel.mesh import Mesh

CPU = torch.device("cpu")


def training(**data: Any) -> Config:
    config = Config(model=ModelConfig(width=64, depth=4, heads=4, latents=16))
    config.training.precision = "fp32"
    config.data.global_batch, config.data.micro_batch_tokens = 7, 2500
    for key, value in data.items():
        setattr(config.data, key, value)
    return config


@pytest.mark.parametrize(("ranks", "sharing"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_ranks_hold_what_the_closed_form_says_of_the_one_with_most_to_do(ranks, sharing):
    config, contexts = training(), Contexts(1000, 60, 50)
    config.parallel.context = sharing
    work = work_of(config, contexts, ranks, tile_tokens=256)
    for rank in range(ranks):
        mesh = Mesh(rank, ranks, CPU, sharing)
        batches = made_up_batches(config, contexts, mesh)
        assert len(batches) == work.micro_batches
        assert sum(len(batch.genes) for batch in batches) == work.micro_batches * work.load.tokens
        assert sum(len(batch.targets) for batch in batches) == work.micro_batches * work.load.targets
        assert max(len(batch.genes) for batch in batches) <= config.data.micro_batch_tokens


def test_the_ranks_of_a_row_hold_slices_of_the_same_contexts_and_rows_of_others():
    config, contexts = training(global_batch=4), Contexts(1000, 60, 50)
    config.parallel.context = 2
    held = [
        np.concatenate([batch.samples for batch in made_up_batches(config, contexts, Mesh(rank, 4, CPU, 2))]).tolist()
        for rank in range(4)
    ]
    assert held == [[0, 1], [0, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize(("global_batch", "micro_batches"), [(8, 2), (3, 1)])
@pytest.mark.parametrize("rank", range(4))
def test_the_fullest_micro_batch_that_is_to_be_expected_is_rehearsed(global_batch, micro_batches, rank):
    config, contexts = training(global_batch=global_batch, micro_batch_tokens=900), Contexts(900, 60, 50, longest=1200)
    config.parallel.context = 2
    most = needs_of(config, contexts, 4, "cpu").work.most
    step = rehearse.fullest_step(config, contexts, Mesh(rank, 4, CPU, 2))
    assert len(step.batches) == micro_batches
    fullest = step.batches[-1]
    assert len(fullest.genes) == pytest.approx(most.tokens, rel=0.01)
    assert len(fullest.samples) == pytest.approx(most.contexts, abs=0.5)
    assert len(fullest.targets) == pytest.approx(most.targets, rel=0.05)
    assert all(len(batch.genes) <= rehearse.FEW_TOKENS for batch in step.batches[:-1])
    drawn = np.concatenate([batch.samples for batch in step.batches]).tolist()
    assert len(set(drawn)) == len(drawn)


def test_targets_are_hidden_and_within_their_contexts():
    [batch] = made_up_batches(training(global_batch=2), Contexts(1000, 60, 50), Mesh(0, 1, CPU))
    assert (batch.counts[batch.targets] == 0).all()
    assert len(np.unique(batch.targets)) == 120
    assert (batch.targets < 1000).sum() == 60


def test_what_memory_grew_by_while_the_steps_doubled_it_grows_by_once_more():
    assert growth_after([1.0, 3.0, 4.0, 5.0]) == 5 - 3
    assert growth_after([4.0, 5.0, 5.0, 5.0, 5.0]) == 0
    assert growth_after([7.0]) == 0


def contexts_without_store_of(genes: int) -> Callable[[Config], Contexts]:
    return partial(contexts_without_store, genes=genes)


def test_a_training_with_short_steps_is_rehearsed_as_it_is():
    config = training(max_tokens=1000)
    found = smaller(config, contexts_without_store_of(50), 1, load_device("h100", "fp32"))
    assert found == (config, contexts_without_store(config, 50))


def test_one_with_long_steps_is_rehearsed_with_less_of_everything_and_itself_not_changed():
    config, contexts_of = training(global_batch=64, max_tokens=1_000_000), contexts_without_store_of(20_000)
    slow = load_device("h100", "fp32")
    slow = replace(slow, products=slow.products / 1000, attention=slow.attention / 1000)
    before = copy.deepcopy(config)
    assert estimate(config, contexts_of(config), slow, 2).seconds.total > 10 * LONGEST_STEP
    small, short = smaller(config, contexts_of, 2, slow)
    assert estimate(small, short, slow, 2).seconds.total <= LONGEST_STEP
    assert config == before
    assert (small.data.global_batch, short.tokens) == (2, small.data.max_tokens)


@pytest.mark.parametrize("window", [None, 64])
def test_a_group_of_cells_is_rehearsed_with_fewer_of_them_and_as_large_a_share_of_targets(window):
    """A cell has 300 visible tokens and 60 targets, and a group 1,000 cells."""

    def contexts_of(config: Config) -> Contexts:
        cells = config.data.window or 1000
        return Contexts(cells * (min(300, config.data.max_tokens or 300) + 60), cells * 60, 20_000)

    config = training(global_batch=1, max_tokens=1000, context="group", window=window)
    slow = load_device("h100", "fp32")
    slow = replace(slow, products=slow.products / 15_000, attention=slow.attention / 15_000)
    assert estimate(config, contexts_of(config), slow, 1).seconds.total > LONGEST_STEP
    small, short = smaller(config, contexts_of, 1, slow)
    assert estimate(small, short, slow, 1).seconds.total <= LONGEST_STEP
    assert short == contexts_of(small)
    assert short.targets / short.tokens == 60 / 360
    assert config.data.window == window


@pytest.mark.parametrize(("attention", "unevenness"), [("dense", (100**2 + 300**2) / 2 / 200**2), ("criss_cross", 1)])
def test_how_unequal_the_contexts_of_a_step_were_is_told_where_it_matters(attention, unevenness):
    config = training()
    config.model.attention = attention
    values = {"contexts": 2, "tokens": 400, "targets": 30, **step_cost(config.model, [100, 300], 30)}
    found = rehearse.contexts_of_step(config, values, genes=50)
    assert replace(found, unevenness=1) == Contexts(200, 15, 50)
    assert found.unevenness == pytest.approx(unevenness)


def few_steps(config: Config, contexts: Contexts, mesh: Mesh) -> dict[str, float]:
    rehearse.SECONDS_OF_STEPS = 0.0
    return rehearse.take_steps(config, contexts, mesh)


@pytest.mark.slow
@pytest.mark.processes
def test_steps_of_made_up_contexts_are_taken_before_there_is_a_store():
    config = training(global_batch=2)
    config.data.digest, config.model.cell_encoding = None, 0
    found = rehearse.Rehearsal(**in_new_processes(few_steps, (config, Contexts(1000, 60, 50)), num_context_ranks=1))
    assert len(found.steps) == 2
    assert all(seconds > 0 and contexts == Contexts(1000, 60, 50) for seconds, contexts in found.steps)
    assert found.memory >= found.memory_of_few_tokens > 10**8
    assert found.growth >= 0


def test_a_model_too_large_for_a_rehearsal_has_fewer_layers_there():
    config = training(max_tokens=1000)
    config.model.width, config.model.depth = 512, 48
    small, _ = smaller(config, contexts_without_store_of(50), 1, load_device("h100", "fp32"))
    assert num_parameters(small.model, 50) <= MOST_PARAMETERS < num_parameters(config.model, 50)
