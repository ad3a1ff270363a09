from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import binom

from cctrain.apply.baselines import gene_mean, refitted_share
from cctrain.apply.metrics import difference, nll_per_cell, verdict
from cctrain.apply.targets import TargetSet
from cctrain.config import ModelConfig, ObjectiveConfig
from cctrain.data.loading.batches import pack
from cctrain.data.loading.contexts import (
    Context,
    ContextRule,
    build_context,
    choose_targets,
    context_size_bound,
    hide_visible,
    nothing_hidden,
    target_probability,
    visible_log_size_factor,
)
from cctrain.training.loop import to_inputs
from tests.model.conftest import random_model

NUM_GENES = 200
EVERY_GENE = np.ones(NUM_GENES, dtype=bool)


def a_rule(max_tokens: int = 10_000, seed: int = 0, purpose: str = "training") -> ContextRule:
    draws = np.random.default_rng(1)
    share = draws.dirichlet(np.ones(NUM_GENES))
    return ContextRule(seed, purpose, draws.uniform(0.05, 0.4, NUM_GENES), share, max_tokens)


def some_counts(seed: int = 0, num: int = NUM_GENES) -> np.ndarray:
    """int64 (num,), half of them zeros."""
    return np.random.default_rng(seed).negative_binomial(0.6, 0.2, num)


def context_of(
    rule: ContextRule, counts: np.ndarray, position: int = 5, sample: int = 9, measured: np.ndarray = EVERY_GENE
) -> Context:
    expressed = np.flatnonzero(counts)
    return build_context(rule, position, sample, expressed, counts[expressed], measured)


def visible_genes(context: Context) -> np.ndarray:
    return np.delete(context.genes, context.targets)


# What a target is


def test_a_target_is_as_likely_as_the_detection_rate_of_its_gene_up_to_a_cap(tiny_store):
    genes = replace(tiny_store.genes, detection_rate=np.array([0.0, 0.1, 0.25, 0.9]))
    probability = target_probability(genes, ObjectiveConfig(target_rate=0.2, detection_cap=0.25))
    assert probability == pytest.approx([0.0, 0.08, 0.2, 0.2])


def test_each_gene_is_a_target_as_often_as_its_probability_says():
    rule, num = a_rule(), 4_000
    rate = np.mean([choose_targets(rule, position, 3, EVERY_GENE) for position in range(num)], axis=0)
    spread = np.sqrt(rule.target_probability * (1 - rule.target_probability) / num)
    assert np.all(np.abs(rate - rule.target_probability) < 5 * spread)


def test_genes_of_one_context_are_drawn_independently():
    rule, num = a_rule(), 4_000
    rule = replace(rule, target_probability=np.full(NUM_GENES, 0.3))
    totals = [choose_targets(rule, position, 3, EVERY_GENE).sum() for position in range(num)]
    variance = NUM_GENES * 0.3 * 0.7
    assert np.mean(totals) == pytest.approx(NUM_GENES * 0.3, abs=5 * np.sqrt(variance / num))
    assert np.var(totals) == pytest.approx(variance, rel=0.15)


def test_targets_do_not_depend_on_any_count():
    rule = a_rule()
    chosen = [context_of(rule, some_counts(seed)) for seed in range(5)]
    chosen.append(context_of(rule, np.zeros(NUM_GENES, dtype=np.int64)))
    for context in chosen:
        assert context.genes[context.targets].tolist() == chosen[0].genes[chosen[0].targets].tolist()


def test_a_gene_that_was_not_measured_is_neither_token_nor_target():
    rule = replace(a_rule(), target_probability=np.full(NUM_GENES, 0.5))
    measured = EVERY_GENE.copy()
    measured[::3] = False
    counts = np.where(measured, some_counts(), 0)
    targets = set()
    for position in range(40):
        context = context_of(rule, counts, position, measured=measured)
        assert measured[context.genes].all()
        targets |= set(context.genes[context.targets].tolist())
    assert targets == set(np.flatnonzero(measured).tolist())


def test_the_same_seed_position_and_cell_draw_the_same_and_others_draw_others():
    counts = some_counts()
    base = context_of(a_rule(max_tokens=20), counts)
    again = context_of(a_rule(max_tokens=20), counts)
    for name, value in vars(base).items():
        assert np.array_equal(value, getattr(again, name)), name
    others = [
        context_of(a_rule(max_tokens=20), counts, position=6),
        context_of(a_rule(max_tokens=20), counts, sample=10),
        context_of(a_rule(max_tokens=20, seed=1), counts),
        context_of(a_rule(max_tokens=20, purpose="validation"), counts),
    ]
    drawn = {tuple(context.genes[context.targets]) for context in (base, *others)}
    kept = {tuple(visible_genes(context)) for context in (base, *others)}
    assert len(drawn) == len(kept) == 5


# What a context holds


def test_tokens_are_the_visible_expressed_genes_and_the_targets_in_the_order_of_genes():
    rule, counts = a_rule(), some_counts()
    context = context_of(rule, counts)
    hidden = choose_targets(rule, 5, 9, EVERY_GENE)
    assert context.genes.tolist() == np.flatnonzero(hidden | (counts > 0)).tolist()
    assert context.genes[context.targets].tolist() == np.flatnonzero(hidden).tolist()
    assert context.target_counts.tolist() == counts[hidden].tolist()
    assert context.counts.tolist() == np.where(hidden, 0, counts)[context.genes].tolist()
    assert 0 in context.target_counts
    assert context.target_counts.max() > 0


def test_the_size_factor_is_what_is_visible_over_its_share_in_the_training_mean():
    share = np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    rule = ContextRule(0, "training", np.array([0.0, 1.0, 0.0, 1.0, 0.0]), share, 100)
    measured = np.array([True, True, True, True, False])
    context = build_context(rule, 0, 0, np.array([0, 1, 2]), np.array([3, 50, 5]), measured)
    assert context.genes.tolist() == [0, 1, 2, 3]
    assert context.counts.tolist() == [3, 0, 5, 0]
    assert context.targets.tolist() == [1, 3]
    assert context.target_counts.tolist() == [50, 0]
    assert np.exp(context.log_size_factors[0]) == pytest.approx((3 + 5) / (0.1 + 0.3))


def test_a_cell_of_which_nothing_is_visible_has_a_finite_size_factor():
    rule = ContextRule(0, "training", np.array([1.0, 0.0]), np.array([0.75, 0.25]), 100)
    context = build_context(rule, 0, 0, np.array([0]), np.array([4]), np.ones(2, dtype=bool))
    assert np.exp(context.log_size_factors[0]) == pytest.approx(0.5 / 0.25)


def test_a_cell_whose_measured_genes_all_are_targets_has_a_finite_size_factor():
    rule = ContextRule(0, "training", np.array([1.0, 0.0]), np.array([0.75, 0.25]), 100)
    context = build_context(rule, 0, 0, np.array([0]), np.array([4]), np.array([True, False]))
    assert context.targets.tolist() == [0]
    assert np.exp(context.log_size_factors[0]) == pytest.approx(0.5)


def test_truncation_keeps_every_visible_token_equally_often():
    rule, counts = replace(a_rule(max_tokens=30), target_probability=np.zeros(NUM_GENES)), some_counts()
    kept, num = np.zeros(NUM_GENES), 1_000
    for position in range(num):
        kept[context_of(rule, counts, position).genes] += 1
    chance = 30 / np.count_nonzero(counts)
    assert np.all(np.abs(kept[counts > 0] / num - chance) < 5 * np.sqrt(chance * (1 - chance) / num))


def test_truncation_keeps_all_targets_the_order_of_genes_and_the_size_factor():
    counts = some_counts()
    for position in range(20):
        cut, uncut = (context_of(a_rule(max_tokens), counts, position) for max_tokens in (30, 10_000))
        assert len(visible_genes(cut)) == 30 < len(visible_genes(uncut))
        assert np.isin(visible_genes(cut), visible_genes(uncut)).all()
        assert cut.genes[cut.targets].tolist() == uncut.genes[uncut.targets].tolist()
        assert cut.counts.tolist() == uncut.counts[np.isin(uncut.genes, cut.genes)].tolist()
        assert np.all(np.diff(cut.genes) > 0)
        assert cut.log_size_factors == uncut.log_size_factors


def test_max_tokens_is_the_most_visible_tokens_and_cuts_no_shorter_context():
    counts = some_counts()
    num_visible = len(visible_genes(context_of(a_rule(), counts)))
    for max_tokens, expected in ((num_visible - 1, num_visible - 1), (num_visible, num_visible), (1, 1)):
        assert len(visible_genes(context_of(a_rule(max_tokens), counts))) == expected


def test_for_an_embedding_nothing_is_hidden():
    counts, rule = some_counts(), a_rule()
    expressed = np.flatnonzero(counts)
    context = build_context(nothing_hidden(rule.share, 10_000), 0, 4, expressed, counts[expressed], EVERY_GENE)
    assert context.genes.tolist() == expressed.tolist()
    assert context.counts.tolist() == counts[expressed].tolist()
    assert len(context.targets) == len(context.target_counts) == 0
    assert np.exp(context.log_size_factors[0]) == pytest.approx(counts.sum() / rule.share.sum())


def test_hiding_what_is_visible_keeps_targets_and_size_factor():
    context = context_of(a_rule(), some_counts())
    hidden = hide_visible(context)
    assert hidden.genes.tolist() == context.genes[context.targets].tolist()
    assert hidden.targets.tolist() == list(range(len(hidden.genes)))
    assert not hidden.counts.any()
    assert hidden.target_counts.tolist() == context.target_counts.tolist()
    assert hidden.log_size_factors == context.log_size_factors


# What a context does not tell


def twins(rule: ContextRule) -> tuple[list[Context], list[Context]]:
    """Contexts of three cells, and of cells that differ from them only in the counts of the targets."""
    pairs = []
    for sample in range(3):
        counts = some_counts(sample)
        hidden = choose_targets(rule, 5, sample, EVERY_GENE)
        changed = np.where(hidden, np.where(counts > 0, 0, 1 + some_counts(100 + sample) * 50), counts)
        assert np.all((changed > 0)[hidden] != (counts > 0)[hidden])
        pairs.append((context_of(rule, counts, sample=sample), context_of(rule, changed, sample=sample)))
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


@pytest.mark.parametrize("max_tokens", [10_000, 25])
def test_counts_of_targets_change_nothing_that_the_model_sees(max_tokens):
    batch, changed = map(pack, twins(a_rule(max_tokens)))
    assert not np.array_equal(batch.target_counts, changed.target_counts)
    for name, value in vars(batch).items():
        if name != "target_counts":
            assert np.array_equal(value, getattr(changed, name)), name


@pytest.mark.parametrize("attention", ["criss_cross", "dense"])
def test_counts_of_targets_change_no_prediction(attention):
    config = ModelConfig(attention=attention, width=16, depth=2, heads=2, latents=4)
    model = random_model(config, NUM_GENES).float()
    with torch.no_grad():
        inputs, changed = (to_inputs(pack(contexts), torch.device("cpu")) for contexts in twins(a_rule(60)))
        for ours, theirs in zip(model(inputs), model(changed), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(model.embed(inputs), model.embed(changed))


def test_the_length_of_a_context_tells_nothing_of_its_targets_counts():
    rule = a_rule()
    rng = np.random.default_rng(0)
    lengths, expressed = [], []
    visible = some_counts()
    for position in range(400):
        hidden = choose_targets(rule, position, 9, EVERY_GENE)
        # What lies under the targets is anything between nothing and everything.
        under = rng.random(NUM_GENES) < rng.random()
        context = context_of(rule, np.where(hidden, under, visible), position)
        assert len(context.genes) == len(context.targets) + np.count_nonzero(visible[~hidden])
        lengths.append(len(context.genes))
        expressed.append(np.mean(context.target_counts > 0))
    assert abs(np.corrcoef(lengths, expressed)[0, 1]) < 5 / np.sqrt(400)


def simulated_cells(num_cells: int, num_genes: int, seed: int) -> np.ndarray:
    """Negative binomial counts of three cell types at depths that differ fourfold."""
    rng = np.random.default_rng(seed)
    profiles = (rng.gamma(1.0, size=num_genes) + 0.05) * np.exp(rng.normal(0.0, 1.2, size=(3, num_genes)))
    profiles /= profiles.sum(axis=1, keepdims=True)
    mean = rng.uniform(100, 400, size=(num_cells, 1)) * profiles[rng.integers(3, size=num_cells)]
    return rng.poisson(mean * rng.gamma(2.0, 1 / 2.0, size=mean.shape))


def as_target_set(contexts: list[Context], num_cells: int) -> TargetSet:
    nothing = np.zeros(0, dtype=np.int64)
    return TargetSet(
        contexts=np.repeat(np.arange(len(contexts)), [len(context.targets) for context in contexts]),
        genes=np.concatenate([context.genes[context.targets] for context in contexts]),
        counts=np.concatenate([context.target_counts for context in contexts]).astype(np.int64),
        cell_of_context=np.arange(len(contexts)) % num_cells,
        log_size_factor=np.array([context.log_size_factors[0] for context in contexts]),
        visible_offsets=np.zeros(len(contexts) + 1, dtype=np.int64),
        visible_genes=nothing,
        visible_counts=nothing,
        source_of_context=np.zeros(len(contexts), dtype=np.int64),
    )


def targets_by_expression(rule: ContextRule, counts: np.ndarray, cell: int) -> Context:
    """How not to do it: half of the expressed genes and as many zeros are the targets of the cell."""
    rng = np.random.default_rng(cell)
    expressed = np.flatnonzero(counts)
    hidden = rng.choice(expressed, len(expressed) // 2, replace=False)
    zeros = rng.choice(np.flatnonzero(counts == 0), min(len(hidden), np.count_nonzero(counts == 0)), replace=False)
    genes = np.sort(np.concatenate([hidden, zeros]))
    visible = np.ones(len(counts), dtype=bool)
    visible[genes] = False
    size = visible_log_size_factor(rule.share, visible, counts[visible])
    return Context(
        sample=cell,
        position=0,
        genes=genes,
        counts=np.zeros(len(genes), dtype=np.float32),
        cells=np.zeros(len(genes), dtype=np.int64),
        targets=np.arange(len(genes)),
        target_counts=counts[genes].astype(np.float32),
        log_size_factors=np.array([size]),
        encodings=np.zeros((1, 0), dtype=np.float32),
    )


def what_the_choice_of_targets_tells(by_expression: bool) -> dict:
    """Held-out loss of the gene mean learned from hidden training counts minus that of the one of all of them."""
    cells = simulated_cells(num_cells=500, num_genes=120, seed=0)
    training, held_out = cells[:400], cells[400:]
    share = training.sum(axis=0) / training.sum()
    detection = sp.csr_matrix(training).getnnz(axis=0) / len(training)
    rule = ContextRule(0, "training", 0.2 * np.minimum(1.0, detection / 0.25), share, 10_000)
    measured = np.ones(len(share), dtype=bool)
    sets = []
    for purpose, some in (("training", training), ("validation", held_out)):
        contexts = []
        for draw in range(4):
            for cell, counts in enumerate(some):
                if by_expression:
                    contexts.append(targets_by_expression(rule, counts, 1_000 * draw + cell))
                else:
                    contexts.append(context_of(replace(rule, purpose=purpose), counts, draw, cell, measured))
        sets.append(as_target_set(contexts, len(some)))
    hidden_training, hidden_held_out = sets
    theta = np.full(len(share), 1.0)
    losses = [
        nll_per_cell(hidden_held_out, *gene_mean(hidden_held_out, candidate, theta))
        for candidate in (refitted_share(hidden_training, share), share)
    ]
    return difference(*losses, seed=0)


def test_the_choice_of_targets_teaches_a_gene_mean_nothing():
    gain = what_the_choice_of_targets_tells(by_expression=False)
    assert verdict(gain) != "better", gain
    assert abs(gain["mean"]) < 0.002, gain


def test_the_same_check_finds_that_targets_chosen_by_expression_tell_about_their_counts():
    gain = what_the_choice_of_targets_tells(by_expression=True)
    assert verdict(gain) == "better"
    assert gain["mean"] < -0.005


# How long a context may be


@pytest.mark.parametrize("num_genes", [1, 3, 10, 50, 500, 20_000])
@pytest.mark.parametrize("probability", [0.001, 0.02, 0.2, 1.0])
def test_more_targets_than_the_bound_allows_come_less_than_once_in_a_billion_contexts(num_genes, probability):
    share = np.full(num_genes, 1 / num_genes)
    rule = ContextRule(0, "training", np.full(num_genes, probability), share, max_tokens=7)
    measured = np.ones((1, num_genes), dtype=bool)
    bound = context_size_bound(rule, np.array([0, 5, 100]), measured, np.zeros(3, dtype=np.int64))
    most_targets = bound[0]
    assert bound.tolist() == [most_targets, most_targets + 5, most_targets + 7]
    assert most_targets <= num_genes
    assert binom.sf(most_targets, num_genes, probability) < 1e-9


def test_the_bound_counts_only_genes_that_the_source_of_the_cell_measured():
    rule = ContextRule(0, "training", np.ones(10), np.full(10, 0.1), max_tokens=100)
    measured = np.zeros((2, 10), dtype=bool)
    measured[0, :4] = measured[1, :9] = True
    bound = context_size_bound(rule, np.array([3, 3]), measured, np.array([1, 0]))
    assert bound.tolist() == [3 + 9, 3 + 4]
