"""`cctrain estimate`, through the command line."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from cctrain.apply import calibrate, rehearse
from cctrain.apply.estimate import rehearsed_over_parts
from cctrain.apply.processes import KILLED, LEFT_OUT
from cctrain.config import Config, ModelConfig, load_config
from cctrain.cost.devices import load_device
from cctrain.cost.estimate import estimate
from cctrain.cost.parameters import num_parameters
from cctrain.cost.work import Contexts
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import TokenStore
from cctrain.errors import TrainingError
from cctrain.training.data import look_at_store, training_order, training_rule
from tests.commands import cctrain

CONFIG = """
model: {width: 16, depth: 1, heads: 2, latents: 4}
training: {precision: fp32}
"""

REHEARSED = rehearse.Rehearsal([(1.0, Contexts(1000, 50, 500))], 0.9e9, 5e8, growth=1e8)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def estimated(config: Path, *words: str, code: int = 0) -> str:
    done = cctrain("estimate", config, *words, code=code)
    return done.stderr if code else done.stdout


def test_a_store_says_how_long_its_contexts_are(config: Path, tiny_store: TokenStore):
    loaded, contexts = look_at_store(load_config(config, [f"data.store={tiny_store.path}"]), tiny_store)
    loader = Loader(tiny_store, training_rule(loaded, tiny_store), Share(), 10**6)
    order = training_order(loaded, loader)
    epochs = [loader.step(order, tiny_store.num_train, tiny_store.num_train * epoch) for epoch in range(20)]
    batches = [batch for step in epochs for batch in step.batches]
    drawn = sum(len(batch.samples) for batch in batches)
    assert contexts.genes == len(tiny_store.genes.ids)
    assert contexts.targets == pytest.approx(sum(len(batch.targets) for batch in batches) / drawn, rel=0.05)
    # An expressed gene that becomes a target is counted as both here.
    tokens = np.concatenate([np.diff(batch.offsets) for batch in batches])
    assert contexts.tokens == pytest.approx(tokens.sum() / drawn, rel=0.08)
    assert contexts.longest == pytest.approx(tokens.max(), rel=0.08)
    assert contexts.unevenness == pytest.approx((tokens**2).mean() / tokens.mean() ** 2, rel=0.02)


def test_what_a_step_takes_beyond_its_parts_does_not_depend_on_how_long_its_contexts_were():
    config = Config(model=ModelConfig(attention="dense", width=64, depth=2))
    config.data.micro_batch_tokens = 24_000
    device = load_device("h100", "fp32")
    lengths = [Contexts(tokens, tokens / 20, 500, unevenness=uneven) for tokens in (500, 9000) for uneven in (1.0, 1.4)]
    parts = [estimate(config, contexts, device, 1).seconds.total for contexts in lengths]
    assert len(set(parts)) == len(parts)
    steps = [(1.5 * seconds, contexts) for seconds, contexts in zip(parts, lengths, strict=True)]
    assert rehearsed_over_parts(steps, config, device, 1) == pytest.approx(1.5)
    held_up = (9 * parts[0], lengths[0])
    assert rehearsed_over_parts([*steps, held_up], config, device, 1) == pytest.approx(1.5)


def test_it_answers_in_one_json_object(config: Path, tiny_store: TokenStore):
    words = (f"data.store={tiny_store.path}", "--device", "h100", "--ranks", "8", "--json")
    told = json.loads(estimated(config, *words))
    model = load_config(config, [f"data.store={tiny_store.path}"]).model
    model.cell_encoding = 0
    assert told["parameters"] == num_parameters(model, len(tiny_store.genes.ids))
    assert told["fits"] is True
    assert told["measured"] is False
    assert told["ranks"] == 8
    assert told["checkpoint_bytes"] == 12 * told["parameters"]
    assert told["step_seconds"] == pytest.approx(sum(told["step_seconds_by_component"].values()))
    assert told["hours"] == pytest.approx(told["step_seconds"] * 10_000 / 3600)
    assert told["device_hours"] == pytest.approx(8 * told["hours"])


def test_before_there_is_a_store_contexts_are_as_long_as_one_says(config: Path):
    text = estimated(config, "--tokens", "100000", "--device", "a100", "--ranks", "2", "parallel.context=2")
    assert "2 × NVIDIA A100 SXM, 2 for each context" in text
    assert "about 100,000 tokens, 5,000 of them targets" in text
    assert "a model of devices that are not here" in text


def test_what_does_not_fit_is_said_to(config: Path):
    words = ("--tokens", "20000000", "--device", "h100", "model.width=1024", "model.depth=24")
    assert "DOES NOT FIT" in estimated(config, *words)
    assert ": fits" in estimated(config, *words, "--ranks", "64", "parallel.context=64", "memory.checkpointing=true")


def test_without_store_and_tokens_it_asks_for_a_store(config: Path):
    assert "data.store is missing" in estimated(config, "--device", "h100", code=2)


def test_context_ranks_that_do_not_divide_the_ranks_are_refused(config: Path):
    said = estimated(config, "--tokens", "1000", "--device", "h100", "--ranks", "3", "parallel.context=2", code=2)
    assert "parallel.context=2 does not divide 3 ranks" in said


@pytest.fixture
def measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of a slow CPU, whose steps take a second; they come to hold a gigabyte, with few tokens half of one."""
    rates = replace(
        load_device("h100", "fp32"), name="slow", products=1e9, attention=1 / 3 * 1e9, per_node=2, kind="cpu"
    )
    monkeypatch.setattr(calibrate, "on_local_ranks", lambda *_: asdict(rates))
    monkeypatch.setattr(rehearse, "rehearse", lambda *_: REHEARSED)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("training.precision=fp16",), "training.precision=fp16 needs a GPU"),
        (("--ranks", "3", "parallel.context=2"), "parallel.context=2 does not divide 3 ranks"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_measured(config: Path, words: tuple[str, ...], said: str):
    told = estimated(config, "--tokens", "1000", *words, code=2)
    assert said in told
    assert "measuring" not in told


@pytest.mark.usefixtures("measured_at_once")
def test_the_configuration_of_a_run_may_be_estimated_for_contexts_that_its_store_does_not_have(
    config: Path, monkeypatch: pytest.MonkeyPatch
):
    """Which has a digest of its store."""
    rehearsed: list[Config] = []
    monkeypatch.setattr(rehearse, "rehearse", lambda config, *_: rehearsed.append(config) or REHEARSED)
    estimated(config, "--tokens", "1000", "data.digest=0123")
    assert not rehearse.has_store(rehearsed[0])


def test_memory_that_does_not_suffice_is_an_error_of_a_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate, "in_new_processes", lambda *_: {LEFT_OUT: KILLED})
    with pytest.raises(TrainingError, match=f"this machine could not be measured: {KILLED}"):
        calibrate.calibrate(ModelConfig(), "fp32", 2)


@pytest.mark.usefixtures("measured_at_once")
def test_what_was_measured_and_kept_estimates_the_same_again(config: Path, tmp_path: Path):
    file, words = tmp_path / "here.yaml", ("--tokens", "1000", "parallel.context=2", "--json")
    measured = json.loads(estimated(config, *words, "--save-device", str(file)))
    again = json.loads(estimated(config, *words, "--device", str(file)))
    assert measured["device"]["measured"].pop("file") is None
    assert again["device"]["measured"].pop("file") == str(file)
    assert again == measured
    assert again["ranks"] == 2
    assert again["measured"] is True
    assert 4e8 < again["device"]["process"] < 5e8
    assert again["device"]["growth"] == 1e8
    assert again["memory_bytes"] == pytest.approx(1e9)
    assert again["rehearsed_over_parts"] != 1


@pytest.mark.usefixtures("measured_at_once")
def test_without_other_ranks_a_kept_device_has_those_that_it_was_measured_with(config: Path, tmp_path: Path):
    file, words = tmp_path / "here.yaml", ("--tokens", "1000", "--json")
    estimated(config, *words, "--save-device", str(file), "--ranks", "2")
    assert json.loads(estimated(config, *words, "--device", str(file)))["ranks"] == 2
    assert json.loads(estimated(config, *words, "--device", str(file), "--ranks", "4"))["ranks"] == 4


@pytest.mark.usefixtures("measured_at_once")
def test_a_kept_device_tells_where_from_and_refuses_another_precision(config: Path, tmp_path: Path):
    file, words = tmp_path / "here.yaml", ("--tokens", "1000")
    assert "measured on this machine just now" in estimated(config, *words, "--save-device", str(file))
    assert f", and kept in {file}: " in estimated(config, *words, "--device", str(file)).splitlines()[-1]
    said = estimated(config, *words, "--device", str(file), "training.precision=bf16", code=2)
    assert f"{file} was measured in fp32" in said


def test_a_file_is_not_overwritten_and_that_is_said_before_anything_is_measured(config: Path, tmp_path: Path):
    file = tmp_path / "here.yaml"
    file.write_text("mine")
    said = estimated(config, "--tokens", "1000", "--save-device", str(file), code=2)
    assert f"{file} exists already: choose another --save-device FILE" in said
    assert "measuring" not in said
    assert file.read_text() == "mine"


def test_what_is_not_measured_here_cannot_be_kept(config: Path, tmp_path: Path):
    words = ("--tokens", "1000", "--save-device")
    assert "measures nothing" in estimated(config, *words, str(tmp_path / "a.yaml"), "--device", "h100", code=2)
    assert "there is no folder" in estimated(config, *words, str(tmp_path / "nowhere" / "a.yaml"), code=2)


@pytest.mark.parametrize("budget", ["10e9", "10_000_000_000"])
def test_a_budget_of_tokens_is_told_beside_the_steps(config: Path, budget: str):
    words = ("--tokens", "1000", "--device", "h100", "--token-budget", budget)
    assert "\nbudget    625,000 steps, 10,000,000,000 tokens: " in estimated(config, *words)
    told = json.loads(estimated(config, *words, "--json"))
    assert told["token_budget"]["steps"] == 625_000
    assert told["token_budget"]["device_hours"] == pytest.approx(62.5 * told["device_hours"])


def test_a_budget_of_nothing_is_refused(config: Path):
    said = estimated(config, "--tokens", "1000", "--device", "h100", "--token-budget", "0", code=2)
    assert "--token-budget 0: give a number of tokens above 0" in said


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.representative)])
def test_on_this_machine_its_parts_are_measured_on_as_many_ranks_as_will_run(
    config: Path, tiny_store: TokenStore, ranks: int
):
    words = (f"data.store={tiny_store.path}", f"parallel.context={ranks}", "--ranks", str(ranks), "--json")
    told = json.loads(estimated(config, *words))
    assert told["measured"] is True
    assert told["ranks"] == ranks
    device = told["device"]
    assert min(device[rate] for rate in ("products", "attention", "elementwise", "inside", "call")) > 0
    assert told["rehearsed_over_parts"] > 0
    assert device["process"] > 10**8
    assert device["held_over_needed"] >= 1
    alone = ("exchange", "zero") if ranks == 1 else ()
    assert all((seconds > 0) != (part in alone) for part, seconds in told["step_seconds_by_component"].items())
