"""What a training resolves before it starts, and how it ends when something goes wrong."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cctrain.config import Config, load_config
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import TokenStore
from cctrain.errors import UsageError
from cctrain.tracking.journal import read_journal
from cctrain.training.checkpoint_files import latest_checkpoint, read_manifest
from cctrain.training.data import resolve, resolve_micro_batch, training_rule
from cctrain.training.guards import read_outcome
from tests.trainer import Started, Trainer


def steps(run_dir: Path) -> list[dict]:
    return [line for line in read_journal(run_dir) if line["event"] == "step"]


@pytest.fixture
def config(tiny_config: Path, unequal_store: TokenStore) -> Config:
    return load_config(tiny_config, [f"data.store={unequal_store.path}"])


@pytest.fixture
def start(tiny_config: Path, unequal_store: TokenStore, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    with Trainer(tiny_config, unequal_store, tmp_path) as trainer:
        yield partial(trainer.start, tmp_path / "run")


def test_defaults_that_depend_on_the_store_are_resolved_and_kept(config, unequal_store):
    resolved = resolve(config, unequal_store)
    sizes = unequal_store.num_tokens[: unequal_store.num_train]
    assert np.mean(sizes <= resolved.data.max_tokens) >= 0.96
    assert resolved.data.max_tokens <= sizes.max()
    assert resolved.data.digest == unequal_store.digest
    assert Path(resolved.data.store).is_absolute()
    assert config.data.max_tokens is None


def test_the_longest_context_must_fit_a_micro_batch(config, unequal_store):
    config = resolve(config, unequal_store)
    loader = Loader(unequal_store, training_rule(config, unequal_store), Share(), 0)
    longest = loader.largest_size()
    config.data.micro_batch_tokens = longest
    assert resolve_micro_batch(config, loader) == longest
    config.data.micro_batch_tokens = longest - 1
    with pytest.raises(UsageError, match=r"lower data\.max_tokens"):
        resolve_micro_batch(config, loader)


@pytest.mark.slow
def test_a_training_that_diverges_fails_with_the_step_in_the_journal(start, tmp_path):
    often = ("evaluation.every=1", "checkpoint.every=1")
    training = start("training.learning_rate=1e30", "training.steps=20", "training.max_skipped=3", *often)
    message = training.communicate(timeout=120)[1]
    assert training.returncode == 5
    assert "Lower training.learning_rate" in message
    assert "Traceback" not in message
    last = steps(tmp_path / "run")[-1]
    assert not np.isfinite(last["loss"])
    assert f"step {last['step']} " in message
    stop = read_journal(tmp_path / "run")[-1]
    assert (stop["event"], stop["status"]) == ("stop", "failed")
    assert read_outcome(tmp_path / "run") == "failed"
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    # What the held-out cells say of such weights is no number, and they are nobody's best.
    assert not np.isfinite([line["nll"] for line in read_journal(tmp_path / "run") if line["event"] == "evaluate"][-1])
    assert read_manifest(latest_checkpoint(tmp_path / "run"))["held_out_nll"] is None
