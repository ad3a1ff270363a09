"""The long context and the comparison that `tools/million_tokens.py` makes; and the whole tool, on a small context."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cctrain.config import Config
from cctrain.data.loading.batches import pack
from cctrain.data.loading.contexts import ContextRule
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import TokenStore
from cctrain.errors import DataError
from cctrain.training.checkpoint_files import FORMAT, write_manifest
from cctrain.training.data import context_rule
from tests.data.conftest import prepared, random_counts, write_h5ad
from tools.million_tokens import MEMORY_BOUND, failures, gradient_errors, one_context

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rule(tiny_store: TokenStore) -> ContextRule:
    return context_rule(Config(), tiny_store, "training", max_tokens=1000)


def test_cells_in_the_order_of_the_store_make_one_context(tiny_store: TokenStore, rule: ContextRule) -> None:
    rows = np.arange(8)
    cells = Loader(tiny_store, rule, Share(), 0).contexts(rows, rows)
    length = sum(len(cell.genes) for cell in cells)

    batch = pack([one_context(tiny_store, rule, length)])

    assert batch.offsets.tolist() == [0, length]
    assert len(batch.samples) == len(batch.positions) == 1
    np.testing.assert_array_equal(batch.genes, np.concatenate([cell.genes for cell in cells]))
    np.testing.assert_array_equal(batch.counts, np.concatenate([cell.counts for cell in cells]))
    of_tokens = np.concatenate([np.full(len(cell.genes), cell.log_size_factors[0], np.float32) for cell in cells])
    np.testing.assert_array_equal(batch.log_size_factors[batch.cells], of_tokens)
    hidden = np.concatenate([np.isin(np.arange(len(cell.genes)), cell.targets) for cell in cells])
    np.testing.assert_array_equal(batch.targets, np.flatnonzero(hidden))
    np.testing.assert_array_equal(batch.target_counts, np.concatenate([cell.target_counts for cell in cells]))


@pytest.mark.parametrize("num_tokens", range(1, 90, 8))
def test_the_last_cell_is_cut_so_that_the_number_of_tokens_is_exact(
    tiny_store: TokenStore, rule: ContextRule, num_tokens: int
) -> None:
    whole, cut = (pack([one_context(tiny_store, rule, length)]) for length in (300, num_tokens))

    assert cut.offsets.tolist() == [0, num_tokens]
    np.testing.assert_array_equal(cut.genes, whole.genes[:num_tokens])
    np.testing.assert_array_equal(cut.counts, whole.counts[:num_tokens])
    np.testing.assert_array_equal(cut.cells, whole.cells[:num_tokens])
    there = whole.targets < num_tokens
    np.testing.assert_array_equal(cut.targets, whole.targets[there])
    np.testing.assert_array_equal(cut.target_counts, whole.target_counts[there])


def test_a_store_with_too_few_tokens_is_refused(tiny_store: TokenStore, rule: ContextRule) -> None:
    with pytest.raises(DataError, match=r"training cells of .* have [\d,]+ tokens: lower --tokens"):
        one_context(tiny_store, rule, 10**6)


def write_gradients(run: Path, files: list[dict[str, torch.Tensor]], shapes: dict[str, list[int]]) -> None:
    """A checkpoint that holds first moments alone; each file holds fragments, by `name:start`."""
    folder = run / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    table = []
    for index, fragments in enumerate(files):
        save_file({f"exp_avg:{key}": tensor for key, tensor in fragments.items()}, folder / f"{index}.safetensors")
        for key, tensor in fragments.items():
            name, start = key.split(":")
            table.append([list(shapes).index(name), index, int(start), len(tensor)])
    write_manifest(
        folder,
        {
            "format": FORMAT,
            "parameters": [{"name": name, "shape": shape} for name, shape in shapes.items()],
            "files": [{"name": f"{index}.safetensors"} for index in range(len(files))],
            "fragments": table,
        },
    )


def test_gradients_are_compared_parameter_by_parameter_however_they_are_sharded(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    shapes = {"matrix": [3, 4], "tiny": [2], "zero": [5]}
    b = {"matrix": torch.randn(12, generator=draws), "tiny": torch.full((2,), 1e-9), "zero": torch.zeros(5)}
    a = {name: tensor + 1e-4 * torch.randn(tensor.shape, generator=draws) for name, tensor in b.items()}
    whole = [{f"{name}:0": tensor for name, tensor in b.items()}]
    halves = [{"matrix:0": a["matrix"][:7].clone()}, {"matrix:7": a["matrix"][7:].clone(), "tiny:0": a["tiny"]}]
    write_gradients(tmp_path / "one", whole, shapes)
    write_gradients(tmp_path / "two", [*halves, {"zero:0": a["zero"]}], shapes)

    errors, without = gradient_errors(tmp_path / "two", tmp_path / "one")

    all_of_b = np.sqrt(sum((tensor.double().numpy() ** 2).sum() for tensor in b.values()))
    for name in shapes:
        exact, other = b[name].double().numpy(), a[name].double().numpy()
        wanted = np.linalg.norm(other - exact) / max(np.linalg.norm(exact), 1e-6 * all_of_b)
        assert errors[name] == pytest.approx(wanted, rel=1e-12)
    assert without == ["zero"]


def test_every_broken_bound_is_named_and_nan_breaks_each() -> None:
    small, large = ({"ranks": ranks, "all_processes_bytes": size} for ranks, size in ((1, 2**30), (2, MEMORY_BOUND)))
    pair = {"ranks": 2, "against": 1, "loss": 1e-6, "gradients": {"a": 9e-6, "b": 0.0}, "without_gradient": []}

    assert failures([small], [pair]) == []
    assert failures([small, large], []) == ["2 rank(s): all processes together took 20.00 GiB"]
    assert failures([], [pair | {"loss": 1e-5}]) == ["2 rank(s) against 1: the loss differs by 1e-05"]
    assert failures([], [pair | {"gradients": {"a": 1e-5}}]) == [
        "2 rank(s) against 1: the gradient of a differs by 1e-05"
    ]
    assert failures([], [pair | {"without_gradient": ["b"]}]) == ["2 rank(s) against 1: b has no gradient"]
    assert len(failures([], [pair | {"loss": float("nan"), "gradients": {"a": float("nan")}}])) == 2


@pytest.mark.slow
@pytest.mark.processes
def test_a_step_on_one_long_context_is_the_same_on_one_and_on_three_context_ranks(tmp_path: Path) -> None:
    source = write_h5ad(tmp_path / "cells.h5ad", random_counts(60, 200))
    prepared(tmp_path / "retina-store", source)
    options = "--tokens 3001 --ranks 1 3 --depth 2 --width 16 --heads 2 --latents 5 --tile-tokens 300 --threads 1"
    out = tmp_path / "result.json"

    done = subprocess.run(
        [sys.executable, "-m", "tools.million_tokens", *options.split(), "--work", tmp_path, "--out", out],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "every bound holds" in done.stdout
    result = json.loads(out.read_text())
    [comparison] = result["comparisons"]
    assert max(comparison["gradients"].values()) < 1e-5
    assert sum(comparison["gradients"].values()) > 0, "different sums, not one result read twice"
    assert [len(run["peak_bytes"]) for run in result["runs"]] == [1, 3]
    assert not list(tmp_path.glob(".million-tokens-*"))
