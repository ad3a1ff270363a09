"""The loaders that `tools/bench_data.py` compares give the same cells, and its table says what was measured."""

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import pytest

from cctrain.data.store.store import open_store
from tools.bench_data import measure, summary, table, take_turn, targets
from tools.data_loaders import (
    ANN_LOADER,
    ANNBATCH,
    COMPRESSED,
    CONTEXTS,
    MEMMAP,
    SC_DATASET,
    UNCOMPRESSED,
    Files,
    as_cells,
    competitors,
    make_files,
)
from tools.synthetic_atlas import Shape, write_atlas

pytestmark = pytest.mark.filterwarnings("ignore:.*AnnLoader is deprecated:FutureWarning")

ROOT = Path(__file__).parents[2]
BATCH, NUM_CELLS = 64, 500
LOADERS = competitors(BATCH)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("loaders")
    write_atlas(folder / "atlas.h5ad", Shape(cells=NUM_CELLS, expressed=40, genes=300, types=5), seed=0)
    files = Files(folder / "atlas.h5ad", folder / "work")
    files.work.mkdir()
    make_files(files, report=lambda message: None)
    return files


@pytest.fixture(scope="module")
def training_cells(files: Files) -> list[tuple[bytes, bytes]]:
    """Genes and counts of each training cell, sorted."""
    store = open_store(files.zarr)
    return sorted(cells_of([store.cells(np.arange(store.num_train))]))


def cells_of(batches) -> list[tuple[bytes, bytes]]:
    found = []
    for offsets, genes, counts in ((np.asarray(b.offsets), np.asarray(b.genes), np.asarray(b.counts)) for b in batches):
        for start, stop in itertools.pairwise(offsets):
            found.append((genes[start:stop].astype(np.int64).tobytes(), counts[start:stop].astype(np.int64).tobytes()))
    return found


def epoch(files: Files, name: str, seed: int = 0) -> list:
    if LOADERS[name].missing:
        pytest.skip(f"{LOADERS[name].missing} not installed")
    return list(LOADERS[name].open(files, BATCH, seed))


@pytest.mark.parametrize(
    "name", [name for name in LOADERS if name.startswith(("cctrain", "memmap")) and name != CONTEXTS]
)
def test_an_epoch_has_every_training_cell_once_in_another_order_each_time(
    files: Files, training_cells: list[tuple[bytes, bytes]], name: str
) -> None:
    first, second = cells_of(epoch(files, name, seed=1)), cells_of(epoch(files, name, seed=2))
    assert sorted(first) == sorted(second) == training_cells
    assert first != second


@pytest.mark.parametrize("name", ["WebDataset alone, cells"])
def test_plain_webdataset_gives_every_training_cell_once(
    files: Files, training_cells: list[tuple[bytes, bytes]], name: str
) -> None:
    assert sorted(cells_of(epoch(files, name))) == training_cells


@pytest.mark.parametrize("name", [SC_DATASET, ANN_LOADER, ANNBATCH, "WebDataset alone, cctrain's tars"])
def test_loaders_of_whole_files_give_every_cell_once(files: Files, name: str) -> None:
    found = cells_of(epoch(files, name))
    assert len(found) == len(set(found)) == NUM_CELLS
    counts = sum(np.frombuffer(cell[1], dtype=np.int64).sum() for cell in found)
    assert counts == pytest.approx(anndata.read_h5ad(files.atlas).X.sum(), rel=1e-3)  # but for genes left out


def test_batches_are_tensors_of_one_form(files: Files) -> None:
    for name in LOADERS:
        if LOADERS[name].missing or name == CONTEXTS:
            continue
        batch = epoch(files, name)[0]
        types = [str(tensor.dtype) for tensor in (batch.offsets, batch.genes, batch.counts)]
        assert types == ["torch.int64", "torch.int32", "torch.float32"], name
        assert len(batch.offsets) == BATCH + 1, name


def test_contexts_are_those_of_all_training_cells(files: Files) -> None:
    batches = list(LOADERS[CONTEXTS].open(files, BATCH, 0))
    assert sum(len(batch.offsets) - 1 for batch in batches) == open_store(files.zarr).num_train


def test_files_that_are_there_are_used(files: Files) -> None:
    said: list[str] = []
    make_files(files, said.append)
    assert said == []


def test_a_turn_lasts_as_long_as_asked_for_and_counts_cells_and_tokens(files: Files) -> None:
    turn = take_turn(LOADERS[MEMMAP], files, BATCH, seed=0, least_seconds=0.05)
    assert turn["seconds"] >= 0.05
    assert turn["cells"] >= BATCH
    assert turn["tokens"] / turn["cells"] == pytest.approx(open_store(files.zarr).num_tokens.mean(), rel=0.2)


@pytest.mark.parametrize(("fetches", "batches"), [(1, 1), (6, 3), (None, 10)])
def test_an_epoch_ends_early_between_two_fetches_only(fetches: int | None, batches: int) -> None:
    two_cells = as_cells(np.array([0, 2, 3]), np.arange(3), np.ones(3))
    total = {"cells": 0, "tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    measure(iter([two_cells] * 10), fetches, 0.0, total)
    assert (total["cells"], total["tokens"]) == (2 * batches, 3 * batches)
    assert total["seconds"] > 0


def test_targets_compare_the_right_loaders_and_say_when_one_was_not_measured() -> None:
    rates = {MEMMAP: 100.0, UNCOMPRESSED: 70.0, COMPRESSED: 40.0, SC_DATASET: 5.0, ANN_LOADER: 16.0}
    assert [target["reached"] for target in targets(rates)] == pytest.approx([0.7, 0.4, 2.5])
    assert [target["reached"] for target in targets({COMPRESSED: 40.0})] == [None, None, None]


def test_the_table_shows_medians_what_is_missing_and_whether_targets_are_met() -> None:
    turns = [{"cells": cells, "tokens": 10 * cells, "seconds": 2.0, "cpu_seconds": 4.0} for cells in (100, 300, 120)]
    rates = {MEMMAP: summary(turns), UNCOMPRESSED: summary(turns[:1])}
    result = {
        "rates": rates,
        "missing": {SC_DATASET: ["scdataset"]},
        "bytes": {"atlas.h5ad": 10**7},
        "targets": targets({name: rate["cells_per_second"] for name, rate in rates.items()}),
    }
    shown = table(result).splitlines()
    assert shown[1].split()[-5:] == ["60", "600", "100.0%", "167%", "30"]
    assert shown[3].endswith("missing: scdataset")
    assert "0.83, met" in shown[-3]
    assert "not measured" in shown[-2]


@pytest.mark.slow
@pytest.mark.processes
def test_a_comparison_takes_turns_and_lists_what_is_missing(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    names = [MEMMAP, UNCOMPRESSED, SC_DATASET, ANNBATCH, "WebDataset alone, cells"]
    options = f"--work {files.work} --batch {BATCH} --rounds 2 --seconds 0.05 --out {out}"

    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_data", files.atlas, *options.split(), "--only", *names],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert sorted([*result["rates"], *result["missing"]]) == sorted(names)
    assert all(rate["cells_per_second"] > 0 and len(rate["turns"]) == 2 for rate in result["rates"].values())
    assert (SC_DATASET in result["missing"]) == (find_spec("scdataset") is None)
