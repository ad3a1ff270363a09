from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cctrain.config import ObjectiveConfig
from cctrain.data.loading.batches import Batch
from cctrain.data.loading.contexts import Context, ContextRule, build_context, target_probability
from cctrain.data.loading.loader import Loader, RankStep, Share
from cctrain.data.loading.order import Order
from cctrain.data.store.store import Groups, TokenStore

GLOBAL_BATCH = 6


def a_rule(store: TokenStore, seed: int = 0, purpose: str = "training", max_tokens: int = 15) -> ContextRule:
    return ContextRule(
        seed, purpose, target_probability(store.genes, ObjectiveConfig(target_rate=0.2)), store.genes.share, max_tokens
    )


def loader_of(store: TokenStore, rank: int = 0, num_ranks: int = 1, limit: int = 100, **rule) -> Loader:
    return Loader(store, a_rule(store, **rule), Share(rank, num_ranks), limit)


def order_of(store: TokenStore) -> Order:
    return Order(store.num_train, store.digest, 0, block=8, mixed_blocks=2)


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
                float(batch.log_size_factors[batch.cells[start]]),
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
        assert content[4] == np.float32(context.log_size_factors[0])


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
            assert np.all(lengths <= loader.sizes(cells, np.full(len(cells), draw)))


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


# Contexts of several cells


@pytest.fixture
def grouped_store(tiny_store: TokenStore) -> TokenStore:
    """Another view of the tiny store: its training cells lie in groups of 7, 1 and the rest, the others are a group."""
    store = TokenStore(tiny_store.path, tiny_store.manifest)
    starts = np.array([0, 7, 8, tiny_store.num_train, tiny_store.num_cells])
    store.__dict__["groups"] = Groups(np.array(["a", "b", "c", "d"]), starts, 3)
    return store


def group_loader(store: TokenStore, window: int | None = None, share: Share | None = None, purpose: str = "training"):
    rule = replace(a_rule(store, purpose=purpose), kind="group", window=window, cell_encoding=70)
    return Loader(store, rule, share or Share(), 10_000)


def everything(loader: Loader) -> list[Context]:
    return loader.contexts(np.arange(len(loader.samples)), np.arange(len(loader.samples)))


@pytest.mark.parametrize("window", [None, 3])
def test_the_tokens_of_a_group_are_those_of_its_cells_one_after_the_other(grouped_store, window):
    loader = group_loader(grouped_store, window)
    for context in everything(loader):
        rows = loader.samples.cells(context.sample, loader.samples.epoch_of(context.position))
        assert len(context.log_size_factors) == len(rows)
        for cell, row in enumerate(rows):
            cells = grouped_store.cells(np.array([row]))
            measured = grouped_store.measured[grouped_store.source_of_cell[row]]
            alone = build_context(loader.rule, context.position, row, cells.genes, cells.counts, measured)
            tokens = np.flatnonzero(context.cells == cell)
            assert np.all(np.diff(tokens) == 1)
            assert context.genes[tokens].tolist() == alone.genes.tolist()
            assert context.counts[tokens].tolist() == alone.counts.tolist()
            mine = np.isin(context.targets, tokens)
            assert (context.targets[mine] - tokens[0]).tolist() == alone.targets.tolist()
            assert context.target_counts[mine].tolist() == alone.target_counts.tolist()
            assert context.log_size_factors[cell] == alone.log_size_factors[0]


def test_a_held_out_cell_has_the_same_targets_alone_and_in_its_group(grouped_store):
    held_out = np.arange(grouped_store.num_train, grouped_store.num_cells)
    draw = np.full(len(held_out), 2)
    alone = Loader(grouped_store, a_rule(grouped_store, purpose="validation"), Share(), 0).contexts(held_out, draw)
    loader = group_loader(grouped_store, purpose="validation")
    [group] = loader.contexts(np.array([loader.samples.num_train]), np.array([2]))
    cells = group.cells[group.targets]
    for cell, context in enumerate(alone):
        assert group.genes[group.targets[cells == cell]].tolist() == context.genes[context.targets].tolist()
        assert group.target_counts[cells == cell].tolist() == context.target_counts.tolist()
        assert group.log_size_factors[cell] == context.log_size_factors[0]


def test_the_signs_of_a_cell_are_its_own_in_a_context_and_others_in_the_next(grouped_store):
    loader = group_loader(grouped_store)
    (first,), (again,), (later,) = (loader.contexts(np.array([0]), np.array([position])) for position in (0, 0, 1))
    assert first.encodings.shape == (7, 70)
    assert set(np.unique(first.encodings)) == {-1.0, 1.0}
    assert len(np.unique(first.encodings, axis=0)) == 7
    assert np.array_equal(first.encodings, again.encodings)
    assert not np.any(np.all(first.encodings == later.encodings, axis=1))


def test_the_signs_of_a_cell_do_not_depend_on_the_cells_beside_it(grouped_store):
    whole, windows = group_loader(grouped_store), group_loader(grouped_store, window=3)
    [group] = whole.contexts(np.array([0]), np.array([0]))
    for sample in range(3):
        [context] = windows.contexts(np.array([sample]), np.array([0]))
        assert np.array_equal(context.encodings, group.encodings[windows.samples.cells(sample, 0)])


def test_signs_are_fair_and_independent(grouped_store):
    loader = group_loader(grouped_store)
    signs = np.concatenate(
        [context.encodings for p in range(400) for context in loader.contexts(np.array([0]), np.array([p]))]
    )
    products = signs.T @ signs / len(signs)
    bound = 6 / np.sqrt(len(signs))
    assert np.all(np.abs(signs.mean(axis=0)) < bound)
    assert np.all(np.abs(products - np.eye(70)) < bound)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_slices_of_a_group_are_its_tokens_and_no_rank_reads_a_cell_that_it_holds_nothing_of(
    grouped_store, num_ranks, window, monkeypatch
):
    read: list[int] = []
    cells = TokenStore.cells
    monkeypatch.setattr(TokenStore, "cells", lambda store, rows: read.extend(rows.tolist()) or cells(store, rows))
    wholes = everything(group_loader(grouped_store, window))
    parts = []
    for rank in range(num_ranks):
        loader = group_loader(grouped_store, window, Share(context_rank=rank, num_context_ranks=num_ranks))
        read.clear()
        parts.append(everything(loader))
        held = [
            int(row)
            for context in parts[-1]
            for row in loader.samples.cells(context.sample, loader.samples.epoch_of(context.position))[
                np.unique(context.cells)
            ]
        ]
        # A cell whose share of the slice is less than a token is read for nothing: at most the two at its ends.
        assert set(held) <= set(read)
        assert len(read) <= len(held) + 2 * len(wholes)
    for whole, *slices in zip(wholes, *parts, strict=True):
        lengths = [len(part.genes) for part in slices]
        starts = np.cumsum([0, *lengths[:-1]])
        assert max(lengths) <= loader.sizes(np.array([whole.sample]), np.array([whole.position]))[0]
        for name in ("genes", "counts", "cells", "target_counts"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in slices]), getattr(whole, name)), name
        targets = np.concatenate([part.targets + start for part, start in zip(slices, starts, strict=True)])
        assert np.array_equal(targets, whole.targets)
        for part in slices:
            held_cells = np.unique(part.cells)
            assert np.array_equal(part.log_size_factors[held_cells], whole.log_size_factors[held_cells])
            assert np.array_equal(part.encodings[held_cells], whole.encodings[held_cells])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("num_context_ranks", [1, 2, 3])
def test_no_context_exceeds_the_largest_size_in_any_epoch(grouped_store, window, num_context_ranks):
    loader = group_loader(grouped_store, window, Share(num_context_ranks=num_context_ranks))
    samples = np.arange(len(loader.samples))
    for epoch in range(6):
        sizes = loader.sizes(samples, samples * 0 + epoch * loader.samples.num_train)
        assert sizes.max() <= loader.largest_size()


def test_a_pack_numbers_the_cells_of_all_its_contexts(grouped_store):
    loader = group_loader(grouped_store, window=3)
    samples = np.arange(4)
    [batch] = loader.batches(samples, samples)
    contexts = loader.contexts(samples, samples)
    num_cells = [len(context.log_size_factors) for context in contexts]
    assert len(batch.log_size_factors) == len(batch.encodings) == sum(num_cells)
    place = np.repeat(np.cumsum([0, *num_cells[:-1]]), [len(context.genes) for context in contexts])
    assert np.array_equal(batch.cells, place + np.concatenate([context.cells for context in contexts]))
    of_tokens = np.concatenate([context.log_size_factors[context.cells] for context in contexts])
    assert np.array_equal(batch.log_size_factors[batch.cells], of_tokens.astype(np.float32))
