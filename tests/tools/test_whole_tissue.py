"""The two tools that train on many nuclei at once, whole and small: on made-up cells in the place of `retina`."""

import json
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tests.data.conftest import gene_ids, random_counts

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.processes]


def made_up_retina(work: Path, num_cells: int) -> None:
    counts = random_counts(num_cells, 1000)
    obs = pd.DataFrame({"donor_id": "one"}, index=[f"cell{i}" for i in range(num_cells)])
    (work / "retina").mkdir()
    cells = anndata.AnnData(sp.csr_matrix(counts), obs, pd.DataFrame(index=gene_ids(1000)))
    cells.write_h5ad(work / "retina" / "retina.h5ad")


def result_of(tool: str, folder: Path, *arguments: object) -> dict:
    out = folder / "result.json"
    words = [*map(str, arguments), "--work", str(folder), "--out", str(out)]
    done = subprocess.run([sys.executable, "-m", f"tools.{tool}", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_every_token_of_every_nucleus_is_in_the_one_context(tmp_path: Path) -> None:
    made_up_retina(tmp_path, 120)
    result = result_of("whole_retina", tmp_path, "--cells", 100)
    assert result["cells"] == 100
    assert result["failures"] == []
    written = anndata.read_h5ad(tmp_path / "retina" / "retina.h5ad")[:100].X
    assert result["expressed"] == np.count_nonzero(written.toarray())
    streams = 4 * result["tokens"] * result["model"]["width"] * (result["model"]["depth"] + 1)
    assert result["peak_bytes_of_files"] >= 0.9 * streams
    assert not list(tmp_path.glob("tissue-*"))


def test_windows_and_cells_are_compared_on_the_same_targets(tmp_path: Path) -> None:
    made_up_retina(tmp_path, 250)
    arguments = ["--cells-seen", 128, "--width", 16, "--runs", tmp_path / "runs"]
    cell, *windows = result_of("compare_contexts", tmp_path, *arguments)["models"]
    assert [row["window"] for row in windows] == [16, 64]
    for row in windows:
        assert row["targets"] == cell["targets"]
        assert row["minus_cell"]["cells"] == cell["held_out_cells"]
        assert row["tokens_a_context"] == pytest.approx(row["window"] * cell["tokens_a_context"], rel=0.1)
