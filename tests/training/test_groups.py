"""Contexts of several cells, trained on two ranks, against plain PyTorch in float64 on the whole global batch."""

from pathlib import Path

import numpy as np
import pytest

from cctrain.config import load_config
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import TokenStore
from cctrain.training.data import held_out_batches, resolve, training_rule
from tests.data.conftest import prepared, write_h5ad
from tests.training.conftest import Case, Result, run_cases, unequal_counts
from tests.training.plain import Reference, assert_same_gradient, assert_same_training, zero

pytestmark = [pytest.mark.slow, pytest.mark.processes]

WHOLE = ("data.context=group", "data.global_batch=3", "training.steps=6")
WINDOWS = (*WHOLE, "data.window=3")
# So many tiles that cuts fall within cells, of a pack as large as the largest context.
TILES = ("memory.tile_tokens=40", "data.micro_batch_tokens=600", "memory.checkpointing=true", "memory.offload=disk")
SHARED = "parallel.context=2"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Groups of 1 to 10 cells."""
    folder, counts = tmp_path_factory.mktemp("groups"), unequal_counts(45)
    donors = [f"donor {number}" for number in np.repeat(np.arange(9), range(1, 10))]
    shuffled = np.random.default_rng(1).permutation(len(counts))
    source = write_h5ad(folder / "cells.h5ad", counts[shuffled], obs={"donor": donors})
    return prepared(folder / "store", source, group_by="donor", held_out=0.3)


@pytest.fixture(scope="module")
def reference(tiny_config: Path, store: TokenStore) -> Reference:
    return Reference(tiny_config, store)


@pytest.fixture(scope="module")
def runs(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    cases = [
        Case("windows, shared, sharded", (*WINDOWS, *zero(3), *TILES, SHARED)),
        Case("windows, dealt", (*WINDOWS, *zero(2))),
        Case("whole, shared", (*WHOLE, *zero(1), SHARED, "parallel.check_ranks=true")),
        Case("whole, dense", (*WHOLE, *zero(1), "model.attention=dense")),
    ]
    return run_cases(cases, 2, reference.path, reference.store, tmp_path_factory.mktemp("runs") / "out")


def science(name: str) -> tuple[str, ...]:
    dense = ("model.attention=dense",) if "dense" in name else ()
    return (*(WINDOWS if "windows" in name else WHOLE), *dense)


def test_the_store_can_show_what_these_tests_are_about(store):
    assert store.groups is not None
    sizes = np.diff(store.groups.starts)
    assert 1 < store.groups.num_train < len(sizes)
    assert sizes.max() > 3
    assert len(set(sizes.tolist())) > 4


@pytest.mark.representative
@pytest.mark.parametrize("name", ["windows, shared, sharded", "windows, dealt", "whole, shared", "whole, dense"])
def test_contexts_of_groups_train_like_plain_pytorch(runs, reference, name):
    plain = reference(*science(name))
    assert_same_training(runs[name], plain)
    assert_same_gradient(runs[name].gradient, plain)


@pytest.mark.representative
def test_however_ranks_share_the_work_they_run_the_same_windows(runs):
    shared, dealt = (runs[name].column("samples") for name in ("windows, shared, sharded", "windows, dealt"))
    assert shared == dealt
    assert len(set(shared)) == len(shared)


@pytest.mark.representative
def test_the_look_is_a_mean_over_cells_whoever_held_their_tokens(runs, store):
    shared, dealt = (runs[name].look for name in ("windows, shared, sharded", "windows, dealt"))
    assert shared["cells"] == dealt["cells"] == store.num_cells - store.num_train
    assert shared["nll"] == pytest.approx(dealt["nll"], rel=1e-4)


def test_the_look_hides_the_same_counts_of_a_cell_in_every_kind_of_context(tiny_config, store):
    hidden = []
    for kind in (("data.context=cell",), ("data.context=group",), ("data.context=group", "data.window=2")):
        config = resolve(load_config(tiny_config, [f"data.store={store.path}", *kind]), store)
        loader = Loader(store, training_rule(config, store), Share(), 10**6)
        [batch] = held_out_batches(config, store, loader)
        cells = batch.cells[batch.targets]
        targets = zip(batch.log_size_factors[cells], batch.genes[batch.targets], batch.target_counts, strict=True)
        hidden.append(sorted(map(tuple, np.array(list(targets)).tolist())))
    assert hidden[0] == hidden[1] == hidden[2]
