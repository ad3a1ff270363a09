"""Which samples the ranks really ran, step by step, by the digests that they left in the journal of `cctrain train`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cctrain.config import load_config
from cctrain.data.loading.loader import Loader
from cctrain.data.store.store import TokenStore, open_store
from cctrain.parallel.mesh import Mesh
from cctrain.tracking.journal import history, read_journal
from cctrain.training.data import share_of, training_order, training_rule
from cctrain.training.loop import samples_digest
from tests.data.conftest import prepared, random_counts, write_h5ad
from tests.trainer import Trainer
from tools.repack import repack

pytestmark = [pytest.mark.slow, pytest.mark.processes]

BATCH, EPOCHS = 9, 3
CONFIG = f"""
data: {{global_batch: {BATCH}, block: 4, mixed_blocks: 3}}
model: {{width: 16, depth: 1, heads: 2, latents: 4}}
training: {{warmup: 2, learning_rate: 2e-3, precision: fp32}}
evaluation: {{every: 0}}
checkpoint: {{every: 0}}
"""
# The request reaches one rank, in the midst of a step.
ASKED_TO_STOP = """
import signal
def ask(number, rank_step):
    if number == STEP and rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
before_step(ask)
"""


@pytest.fixture(scope="module")
def trainer(tiny_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    folder = tmp_path_factory.mktemp("order")
    (folder / "small.yaml").write_text(CONFIG)
    with Trainer(folder / "small.yaml", tiny_store, folder) as trainer:
        yield trainer


def steps_of(run_dir: Path) -> list[dict]:
    return [line for line in history(read_journal(run_dir)) if line["event"] == "step"]


def batches_of_the_order(run_dir: Path, num_steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions and samples of every global batch, as the order has them."""
    config = load_config(run_dir / "config.yaml")
    store = open_store(Path(config.data.store))
    loader = Loader(store, training_rule(config, store), share_of(Mesh(0, 1, device=None)), 0)
    order, position = training_order(config, loader), 0
    for _ in range(num_steps):
        samples = order.batch(position, BATCH)
        yield position + np.arange(len(samples)), samples
        position += len(samples)


def test_stopped_and_resumed_on_other_numbers_of_ranks_every_sample_is_run_once_an_epoch_in_its_batch(
    trainer, tmp_path
):
    num_cells = trainer.store.num_train
    assert num_cells % BATCH  # the last batch of an epoch is short
    steps_an_epoch = -(-num_cells // BATCH)
    num_steps = EPOCHS * steps_an_epoch
    stops = {1: 1, 3: steps_an_epoch - 1, 4: steps_an_epoch, 2: 2 * steps_an_epoch + 1}
    for ranks, step in stops.items():
        asked = ASKED_TO_STOP.replace("STEP", str(step))
        several = [f"--ranks={ranks}"] if ranks > 1 else []
        trainer.run(tmp_path, 0, f"training.steps={num_steps}", *several, disturbance=asked)
        assert len(steps_of(tmp_path)) == step
    trainer.run(tmp_path, 0, f"training.steps={num_steps}", "--ranks=3")

    batches = list(batches_of_the_order(tmp_path, num_steps))
    for line, (positions, samples) in zip(steps_of(tmp_path), batches, strict=True):
        assert line["samples"] == samples_digest(np.stack((positions, samples), axis=1))
    for epoch in range(EPOCHS):
        ran = np.concatenate([samples for _, samples in batches[epoch * steps_an_epoch : (epoch + 1) * steps_an_epoch]])
        assert sorted(ran) == list(range(num_cells))


def test_a_store_with_fewer_cells_than_ranks_trains_as_on_one_rank(trainer, tmp_path):
    source = write_h5ad(tmp_path / "cells.h5ad", random_counts(4, 40))
    few = prepared(tmp_path / "store", source, held_out=0.25)
    assert few.num_train == 3
    histories = []
    for ranks in (1, 4):
        run_dir = tmp_path / f"run-{ranks}"
        trainer.run(run_dir, 0, f"data.store={few.path}", "training.steps=3", f"--ranks={ranks}")
        histories.append(steps_of(run_dir))
    alone, shared = histories
    for one, other in zip(alone, shared, strict=True):
        assert one["contexts"] == other["contexts"] == 3
        assert one["samples"] == other["samples"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_both_forms_of_a_store_and_any_number_of_workers_give_one_history(trainer, tmp_path):
    tars = repack(trainer.store, tmp_path / "tars", "webdataset")
    assert tars.digest == trainer.store.digest
    told = []
    for store, workers in ((trainer.store, 0), (tars, 0), (tars, 2), (trainer.store, 4)):
        run_dir = tmp_path / f"run-{len(told)}"
        trainer.run(run_dir, 0, "training.steps=12", f"data.store={store.path}", f"data.workers={workers}")
        told.append(
            [{key: line[key] for key in ("step", "samples", "loss", "grad_norm")} for line in steps_of(run_dir)]
        )
    assert told[1:] == [told[0]] * 3
