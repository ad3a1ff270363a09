"""Training on draws by weight, from the command line."""

from pathlib import Path

import numpy as np
import pytest

from cctrain.data.store.store import TokenStore
from cctrain.tracking.journal import read_journal
from tests.commands import refusal
from tests.data.conftest import prepared, write_h5ad
from tests.trainer import Trainer
from tests.training.conftest import unequal_counts

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.representative]


def num_steps(run: Path) -> int:
    return sum(line["event"] == "step" for line in read_journal(run))


def store_with_weights(folder: Path, half: int) -> TokenStore:
    """The same cells whatever `half` is, which says for which of them the weight is not 0."""
    folder.mkdir()
    counts = unequal_counts(40)
    source = write_h5ad(folder / "cells.h5ad", counts, obs={"weight": (np.arange(40) % 2 == half).astype(float)})
    return prepared(folder / "store", source)


def test_a_run_follows_its_weights_and_never_others(tiny_config, tmp_path):
    store, other = (store_with_weights(tmp_path / str(half), half) for half in (0, 1))
    assert store.digest == other.digest
    run, little = tmp_path / "run", ("training.steps=2", "evaluation.every=0")
    train = ("train", tiny_config, f"run.dir={run}")
    with Trainer(tiny_config, store, tmp_path) as trainer:
        # A slip of the pen is refused before anything of the run is written down.
        assert "it has" in refusal(2, *train, f"data.store={store.path}", *little, "data.weights=weights")
        trainer.run(run, 0, *little, "data.weights=weight")
        assert num_steps(run) == 2
        more = ("training.steps=4", "--accept-changes", "evaluation.every=0", "data.weights=weight")
        assert "data.weights_digest" in refusal(2, *train, f"data.store={other.path}", *more)
        assert num_steps(run) == 2
        trainer.run(run, 0, *more)
        assert num_steps(run) == 4
