from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cctrain.config import ObjectiveConfig
from cctrain.data.batches import Batch
from cctrain.data.contexts import ContextRule, build_context, target_probability
from cctrain.data.loader import Loader, RankStep, Share
from cctrain.data.order import Order
from cctrain.data.store import TokenStore

GLOBAL_BATCH = 6


def a_rule(store: TokenStore, seed: int = 0, purpose: str = "training", max_tokens: int = 15) -> ContextRule:
    return ContextRule(
        seed, purpose, target_probability(store.genes, ObjectiveConfig(target_rate=0.2)), store.genes.share, max_tokens
    )


def loader_of(store: TokenStore, rank: int = 0, num_ranks: int = 1, limit: int = 100, **rule) -> Loader:
    return Loader(store, a_rule(store, **rule), Share(rank, num_ranks), limit)


def order_of(store: TokenStore) -> Order:
    return Order(store.num_train, store.digest, 0, block=8, window=2)


def steps_of(store: TokenStore, num_steps: int, position: int = 0, **loader) -> list[RankStep]:
    return list(loader_of(store, **loader).training_steps(order_of(store), GLOBAL_BATCH, position, num_steps))


def described(batches: list[Batch]) -> dict[tuple[int, int], tuple]:
    """All that a context holds, by (position, sample)."""
    contents = {}
    for batch in batches:
        for i, (start, stop) in enumerate(pairwise(batch.offsets[: len(batch.samples) + 1])):
            inside = (batch.targets >= start) & (batch.targets < stop)
            key = (int(batch.positions[i]), int(batch.samples[i]))
            assert key not in contents
            contents[key] = (
                tuple(batch.genes[start:stop]),
                tuple(batch.counts[start:stop]),
                tuple(batch.targets[inside] - start),
                tuple(batch.target_counts[inside]),
                float(batch.log_size_factors[i]),
            )
    return contents


def test_the_tiny_store_can_show_what_these_tests_are_about(tiny_store):
    assert tiny_store.num_train % GLOBAL_BATCH
    assert tiny_store.num_sources == 2
    assert not tiny_store.measured.all()
    assert tiny_store.num_tokens.max() > 15


def test_a_step_is_the_global_batch_of_the_order_and_a_short_last_one_is_trained(tiny_store):
    order, position = order_of(tiny_store), 0
    steps = steps_of(tiny_store, 2 * -(-tiny_store.num_train // GLOBAL_BATCH))
    for step in steps:
        samples = order.batch(position, GLOBAL_BATCH)
        assert (step.position, step.num_contexts) == (position, len(samples))
        assert sorted(described(step.batches)) == [(position + i, sample) for i, sample in enumerate(samples)]
        position += len(samples)
    assert {step.num_contexts for step in steps} == {GLOBAL_BATCH, tiny_store.num_train % GLOBAL_BATCH}
    assert position == 2 * tiny_store.num_train


def test_contexts_are_those_of_the_cells_in_the_store(tiny_store):
    rule = a_rule(tiny_store)
    for (position, sample), content in described(steps_of(tiny_store, 1)[0].batches).items():
        cells = tiny_store.cells(np.array([sample]))
        measured = tiny_store.measured[tiny_store.source_of_cell[sample]]
        context = build_context(rule, position, sample, cells.genes, cells.counts, measured)
        assert content[0] == tuple(context.genes)
        assert content[1] == tuple(context.counts)
        assert content[2] == tuple(context.targets)
        assert content[3] == tuple(context.target_counts)
        assert content[4] == np.float32(context.log_size_factor)


def test_a_run_that_starts_anywhere_continues_as_the_whole_run_does(tiny_store):
    whole = steps_of(tiny_store, 12)
    for start in (1, 5, 11):
        rest = steps_of(tiny_store, 12 - start, position=whole[start].position)
        for ours, theirs in zip(rest, whole[start:], strict=True):
            assert described(ours.batches) == described(theirs.batches)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("limit", [60, 1_000])
def test_any_number_of_ranks_runs_the_same_contexts(tiny_store, num_ranks, limit):
    alone = steps_of(tiny_store, 10)
    together = [steps_of(tiny_store, 10, rank=rank, num_ranks=num_ranks, limit=limit) for rank in range(num_ranks)]
    for step, on_ranks in zip(alone, zip(*together, strict=True), strict=True):
        assert len({len(on_rank.batches) for on_rank in on_ranks}) == 1
        assert {on_rank.position for on_rank in on_ranks} == {step.position}
        assert {on_rank.num_contexts for on_rank in on_ranks} == {step.num_contexts}
        batches = [batch for on_rank in on_ranks for batch in on_rank.batches]
        assert described(batches) == described(step.batches)
        assert max(len(batch.genes) for batch in batches) <= limit


def test_no_real_context_exceeds_the_size_that_ranks_agree_by(tiny_store):
    cells = np.arange(tiny_store.num_cells)
    for seed in range(5):
        loader = loader_of(tiny_store, seed=seed)
        for draw in range(40):
            contexts = loader.contexts(cells, np.full(len(cells), draw))
            lengths = np.array([len(context.genes) for context in contexts])
            assert np.all(lengths <= loader.sizes)


def test_a_gene_that_the_source_of_a_cell_did_not_measure_is_neither_token_nor_target(tiny_store):
    loader, cells = loader_of(tiny_store, max_tokens=50), np.arange(tiny_store.num_cells)
    targets = np.zeros_like(tiny_store.measured)
    for draw in range(60):
        for context in loader.contexts(cells, np.full(len(cells), draw)):
            source = tiny_store.source_of_cell[context.sample]
            assert tiny_store.measured[source, context.genes].all()
            targets[source, context.genes[context.targets]] = True
    assert np.array_equal(targets, tiny_store.measured)


def test_a_sample_has_other_targets_in_every_epoch(tiny_store):
    steps = steps_of(tiny_store, 2 * -(-tiny_store.num_train // GLOBAL_BATCH))
    by_sample: dict[int, set] = {}
    for step in steps:
        for (_, sample), (genes, _, targets, *_) in described(step.batches).items():
            by_sample.setdefault(sample, set()).add(tuple(np.array(genes)[list(targets)]))
    assert set(map(len, by_sample.values())) == {2}


def test_validation_draws_are_fixed_whatever_was_trained_before_and_on_however_many_ranks(tiny_store):
    held_out = np.arange(tiny_store.num_train, tiny_store.num_cells)
    draw = np.zeros(len(held_out), dtype=np.int64)
    looks = []
    for num_ranks in (1, 3):
        batches = []
        for rank in range(num_ranks):
            loader = loader_of(tiny_store, rank, num_ranks)
            list(loader.training_steps(order_of(tiny_store), GLOBAL_BATCH, 0, num_ranks))
            loader.rule = replace(loader.rule, purpose="validation")
            batches += loader.batches(held_out, draw)
        looks.append(described(batches))
    assert looks[0] == looks[1]
    assert len(looks[0]) == len(held_out)
    training = described(loader_of(tiny_store).batches(held_out, draw))
    assert training.keys() == looks[0].keys()
    assert training != looks[0]
