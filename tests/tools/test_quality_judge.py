"""What every model of the comparison is judged on: the same hidden counts, of which none reaches a model."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from cctrain.apply.baselines import Neighbours
from cctrain.apply.evaluate import NEIGHBOURS, held_out_targets
from cctrain.apply.targets import Prediction, TargetSet
from cctrain.config import ModelConfig
from cctrain.data.loading.batches import pack
from cctrain.data.loading.contexts import choose_targets
from cctrain.data.store.store import Cells, TokenStore
from cctrain.training.data import context_rule
from cctrain.training.loop import to_inputs
from tools.quality_judge import UNTRAINED, HeldOut, baselines, digest, hold_out, judging_config
from tools.quality_plan import GENE_MEAN

CUT = 12  # of 20 to 40 genes
SHAPE = ModelConfig(width=16, depth=1, heads=2, latents=4)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one draw a cell, so that what is hidden can be changed in the cell itself."""
    file = tmp_path_factory.mktemp("quality") / "config.yaml"
    file.write_text("run: {seed: 7}\nobjective: {target_rate: 0.3}\nevaluation: {draws: 1}\n")
    return file


@pytest.fixture(scope="module")
def held_out(tiny_store: TokenStore, config_file: Path) -> HeldOut:
    return hold_out(tiny_store, config_file)


def inputs_of(store: TokenStore, config_file: Path, max_tokens: int | None) -> list[dict[str, object]]:
    _, _, contexts = held_out_targets(store, judging_config(store, config_file, max_tokens))
    inputs = [to_inputs(pack([context]), torch.device("cpu")) for context in contexts()]
    return [{field.name: getattr(one, field.name) for field in fields(one)} for one in inputs]


def with_other_hidden_counts(store: TokenStore, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every target of a held-out cell; many a zero becomes a count, and many a count a zero."""
    rule = context_rule(judging_config(store, config_file, None), store, "validation", 0)
    draws, read = np.random.default_rng(0), store.cells

    def changed(rows: np.ndarray) -> Cells:
        cells, parts = read(rows), []
        for place, row in enumerate(rows):
            span = slice(cells.offsets[place], cells.offsets[place + 1])
            counts = np.zeros(store.num_genes, dtype=np.int64)
            counts[cells.genes[span]] = cells.counts[span]
            hidden = choose_targets(rule, 0, int(row), store.measured[store.source_of_cell[row]])
            counts[hidden] = draws.integers(0, 50, size=hidden.sum()) * (draws.random(hidden.sum()) < 0.5)
            parts.append(counts)
        offsets = np.cumsum([0, *(np.count_nonzero(counts) for counts in parts)])
        genes = np.concatenate([np.flatnonzero(counts) for counts in parts])
        return Cells(offsets, genes, np.concatenate([counts[counts > 0] for counts in parts]))

    monkeypatch.setattr(store, "cells", changed)


@pytest.mark.parametrize("max_tokens", [None, CUT])
def test_no_hidden_count_reaches_a_model_whether_its_contexts_are_whole_or_cut(
    tiny_store: TokenStore,
    held_out: HeldOut,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_tokens: int | None,
) -> None:
    before = inputs_of(tiny_store, config_file, max_tokens)
    with_other_hidden_counts(tiny_store, config_file, monkeypatch)
    after = inputs_of(tiny_store, config_file, max_tokens)
    counts = held_out_targets(tiny_store, judging_config(tiny_store, config_file, max_tokens))[0].counts

    assert (counts != held_out.targets.counts).mean() > 0.5, "the hidden counts are others"
    assert len(before) == len(after) == held_out.targets.num_contexts
    for one, other in zip(before, after, strict=True):
        for name, value in one.items():
            same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
            assert same, name


def test_models_are_judged_on_the_same_counts_wherever_contexts_are_cut(
    tiny_store: TokenStore, held_out: HeldOut, config_file: Path
) -> None:
    cut, _, contexts = held_out_targets(tiny_store, judging_config(tiny_store, config_file, CUT))
    assert digest(cut) == digest(held_out.targets)
    np.testing.assert_array_equal(cut.log_size_factor, held_out.targets.log_size_factor)
    lengths = [len(context.genes) - len(context.targets) for context in contexts()]
    assert max(lengths) == CUT, "something was cut"


def test_the_digest_tells_other_hidden_counts(
    tiny_store: TokenStore, held_out: HeldOut, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_other_hidden_counts(tiny_store, config_file, monkeypatch)
    assert digest(hold_out(tiny_store, config_file).targets) != digest(held_out.targets)


def test_the_seed_of_a_configuration_does_not_change_what_is_hidden(tiny_store: TokenStore, config_file: Path) -> None:
    other = config_file.with_name("other.yaml")
    other.write_text(config_file.read_text().replace("seed: 7", "seed: 8"))
    assert digest(hold_out(tiny_store, other).targets) == digest(hold_out(tiny_store, config_file).targets)


def test_a_store_without_cell_types_has_no_label_transfer(held_out: HeldOut) -> None:
    assert held_out.labels is None
    assert baselines(held_out, SHAPE).keys() == {GENE_MEAN, NEIGHBOURS, UNTRAINED}
    assert baselines(held_out, SHAPE)[UNTRAINED]["label_transfer"] is None


def test_an_untrained_model_predicts_about_the_gene_mean(held_out: HeldOut) -> None:
    found = baselines(held_out, SHAPE, known={NEIGHBOURS})
    assert found[UNTRAINED]["nll"] == pytest.approx(found[GENE_MEAN]["nll"], rel=0.02)
    assert found[UNTRAINED]["nll"] != found[GENE_MEAN]["nll"]


def test_neighbours_are_those_of_evaluate_and_judged_on_the_same_targets(
    held_out: HeldOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_on: list[str] = []
    predict = Neighbours.predict

    def seen(neighbours: Neighbours, targets: TargetSet) -> Prediction:
        judged_on.append(digest(targets))
        return predict(neighbours, targets)

    monkeypatch.setattr(Neighbours, "predict", seen)
    found = baselines(held_out, SHAPE, known={GENE_MEAN, UNTRAINED})
    assert judged_on == [digest(held_out.targets)]
    assert np.isfinite(found[NEIGHBOURS]["nll"])


def test_baselines_that_are_known_are_not_judged_again(held_out: HeldOut) -> None:
    assert baselines(held_out, SHAPE, known={GENE_MEAN, NEIGHBOURS, UNTRAINED}) == {}
