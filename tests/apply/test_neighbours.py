from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from cctrain.apply.neighbours import embed_cells, embed_contexts, fit_embedding, nearest, size_factors
from cctrain.apply.targets import TrainingCells, draw_targets

if TYPE_CHECKING:
    from conftest import Tissue


def test_a_context_without_targets_lies_where_its_whole_cell_lies(typed_tissue: Tissue):
    cells, share = typed_tissue.training, typed_tissue.share
    size = size_factors(cells, share)
    embedding = fit_embedding(cells, size, 5, seed=0)
    rows = np.arange(20)
    contexts = draw_targets(cells, rows, share, np.zeros(len(share)), seed=0)
    whole = embed_cells(embedding, cells.take(rows), size[rows])
    np.testing.assert_allclose(embed_contexts(embedding, contexts), whole, rtol=1e-8, atol=1e-10)


def test_hidden_genes_are_missing_and_not_zero(typed_tissue: Tissue):
    cells, share = typed_tissue.training, typed_tissue.share
    size = size_factors(cells, share)
    embedding = fit_embedding(cells, size, 5, seed=0)
    rows = np.arange(60)
    whole = embed_cells(embedding, cells.take(rows), size[rows])
    half = np.where(np.arange(len(share)) % 2, 1.0, 0.0)
    contexts = draw_targets(cells, rows, share, half, seed=0)
    # The same visible counts, but now nothing says that the others are hidden.
    taken_for_zero = replace(contexts, contexts=contexts.contexts[:0], genes=contexts.genes[:0])
    as_missing = np.linalg.norm(embed_contexts(embedding, contexts) - whole, axis=1).mean()
    as_zero = np.linalg.norm(embed_contexts(embedding, taken_for_zero) - whole, axis=1).mean()
    assert as_missing < 0.6 * as_zero


def test_unmeasured_genes_do_not_separate_the_sources(typed_tissue: Tissue):
    counts, share = typed_tissue.training.counts.toarray(), typed_tissue.share
    source = np.arange(len(counts)) % 2
    measured = np.ones((2, len(share)), dtype=bool)
    measured[1, ::3] = False
    counts[(source == 1)[:, None] & ~measured[1]] = 0
    cells = TrainingCells(sp.csr_matrix(counts), source, measured)
    size = size_factors(cells, share)
    places = embed_cells(fit_embedding(cells, size, 3, seed=0), cells, size)
    _, indices = nearest(places, places, 21)
    same_source = (source[indices[:, 1:]] == source[:, None]).mean()
    assert 0.4 < same_source < 0.6


def test_size_factors_count_only_measured_share():
    cells = TrainingCells(
        sp.csr_matrix([[4, 4, 2], [4, 0, 0]]),
        np.array([0, 1]),
        np.array([[True, True, True], [True, False, False]]),
    )
    assert size_factors(cells, np.array([0.4, 0.4, 0.2])).tolist() == [10.0, 10.0]
