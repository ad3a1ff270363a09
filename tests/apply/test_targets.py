from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from cctrain.apply.metrics import difference, nll_per_cell, verdict
from cctrain.apply.targets import TargetSet, TrainingCells, draw_targets, permuted_across_cells

if TYPE_CHECKING:
    from conftest import Tissue

MakeTargets = Callable[..., TargetSet]


def test_targets_and_visible_genes_are_the_whole_cell_and_do_not_overlap(typed_tissue: Tissue):
    targets = typed_tissue.targets()
    for i in range(targets.num_contexts):
        whole = np.zeros(len(typed_tissue.share), dtype=np.int64)
        visible = targets.visible_genes[targets.visible_offsets[i] : targets.visible_offsets[i + 1]]
        hidden = targets.genes[targets.contexts == i]
        assert not set(visible) & set(hidden)
        whole[visible] = targets.visible_counts[targets.visible_offsets[i] : targets.visible_offsets[i + 1]]
        whole[hidden] = targets.counts[targets.contexts == i]
        assert np.array_equal(whole, typed_tissue.held_out.counts[i].toarray()[0])


def test_choice_of_targets_ignores_the_counts(typed_tissue: Tissue):
    cells = typed_tissue.held_out
    other = TrainingCells(cells.counts[::-1], cells.source_of_cell, cells.measured)
    rows = np.arange(len(cells.source_of_cell))
    drawn = [draw_targets(c, rows, typed_tissue.share, typed_tissue.target_probability, 3) for c in (cells, other)]
    assert np.array_equal(drawn[0].genes, drawn[1].genes)
    assert np.array_equal(drawn[0].contexts, drawn[1].contexts)
    assert not np.array_equal(drawn[0].counts, drawn[1].counts)


def test_genes_are_drawn_as_often_as_their_probability_says(typed_tissue: Tissue):
    num_cells = 4000
    cells = TrainingCells(
        sp.csr_matrix((num_cells, len(typed_tissue.share)), dtype=np.int64),
        np.zeros(num_cells, dtype=np.int64),
        typed_tissue.held_out.measured,
    )
    probability = typed_tissue.target_probability
    targets = draw_targets(cells, np.arange(num_cells), typed_tissue.share, probability, 0)
    rate = np.bincount(targets.genes, minlength=len(probability)) / num_cells
    assert np.abs(rate - probability).max() < 5 * np.sqrt(0.16 / num_cells)


def test_unmeasured_genes_are_neither_targets_nor_part_of_the_size_factor():
    share = np.array([0.5, 0.3, 0.2])
    measured = np.array([[True, True, False]])
    cells = TrainingCells(sp.csr_matrix([[6, 2, 0]]), np.zeros(1, dtype=np.int64), measured)
    targets = draw_targets(cells, np.array([0]), share, np.array([0.0, 1.0, 1.0]), 0)
    assert targets.genes.tolist() == [1]
    # Six visible counts over the share of gene 0, the only measured gene that is no target.
    assert np.exp(targets.log_size_factor).tolist() == [12.0]


def test_permutation_keeps_each_genes_counts_and_moves_them(make_targets: MakeTargets):
    rng = np.random.default_rng(7)
    contexts, genes = np.repeat(np.arange(30), 4), np.tile([5, 1, 8, 2], 30)
    targets = make_targets(contexts, genes, rng.integers(0, 1000, size=120), cells=np.arange(30))
    dealt = permuted_across_cells(targets, seed=0)
    for gene in (1, 2, 5, 8):
        before, after = targets.counts[genes == gene], dealt.counts[genes == gene]
        assert sorted(before) == sorted(after)
        assert (before == after).mean() < 0.3
    assert np.array_equal(dealt.genes, targets.genes)
    assert np.array_equal(dealt.counts, permuted_across_cells(targets, seed=0).counts)


def test_permutation_destroys_what_an_oracle_knew(make_targets: MakeTargets):
    rng = np.random.default_rng(8)
    contexts, genes = np.repeat(np.arange(60), 15), np.tile(np.arange(15), 60)
    state = rng.choice([0.5, 8.0], size=(60, 15))
    targets = make_targets(contexts, genes, rng.poisson(state).ravel(), cells=np.arange(60))
    oracle, mean, poisson = np.log(state).ravel(), np.full(900, np.log(4.25)), np.full(900, np.inf)

    def against_the_mean(judged: TargetSet) -> dict:
        return difference(
            nll_per_cell(judged, oracle, poisson), nll_per_cell(judged, mean, poisson), seed=0, samples=300
        )

    assert verdict(against_the_mean(targets)) == "better"
    assert verdict(against_the_mean(permuted_across_cells(targets, seed=1))) == "worse"
