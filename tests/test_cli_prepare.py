"""`cctrain prepare` at the command line: options, exit codes, and what is printed where."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cctrain.cli import app
from cctrain.data.store.store import open_store
from tests.data.conftest import gene_ids, random_counts, write_h5ad

ANY_CELL = ("--min-genes=1", "--min-cells=1")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["prepare", *map(str, arguments), *ANY_CELL])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    obs = {"sample": [f"s{i % 8}" for i in range(40)], "donor": [f"d{i % 4}" for i in range(40)]}
    return write_h5ad(tmp_path / "a.h5ad", random_counts(40, 12), obs=obs)


def test_options_arrive_in_the_store(tmp_path, source):
    (tmp_path / "genes.txt").write_text("\n".join(gene_ids(6)))
    out = tmp_path / "store"
    done = run(
        *(source, f"--out={out}", "--group-by=sample", "--split-by=donor", "--hold-out=d1", "--hold-out=d2"),
        *(f"--vocabulary={tmp_path / 'genes.txt'}", "--min-matched=0.1", "--format=webdataset", "--workers=1"),
    )
    assert done.exit_code == 0, done.output
    store = open_store(out)
    assert (store.unit, store.manifest["container"]) == ("group", "webdataset")
    assert store.manifest["hold_out"] == ["d1", "d2"]
    assert store.genes.ids.tolist() == gene_ids(6)


def test_with_keep_going_the_store_is_there_and_the_exit_code_is_3(tmp_path, source):
    out = tmp_path / "store"
    done = run(source, tmp_path / "missing.h5ad", f"--out={out}", "--keep-going", "--workers=1", "--json")
    assert done.exit_code == 3
    assert json.loads(done.stdout)["failed"][0]["name"] == "missing.h5ad"
    assert "1 of 2 sources failed, and are not in the store" in done.stderr
    assert open_store(out).num_cells == 40


def test_without_it_nothing_is_there_and_the_exit_code_is_3(tmp_path, source):
    done = run(source, tmp_path / "missing.h5ad", f"--out={tmp_path / 'store'}", "--workers=1")
    assert done.exit_code == 3
    assert "missing.h5ad: no such file" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, source):
    done = run(source, f"--out={tmp_path / 'store'}", "--dry-run", "--json", "--group-by=sample", "--workers=1")
    assert done.exit_code == 0
    plan = json.loads(done.stdout)
    assert (plan["num_cells"], plan["unit"], plan["num_groups"]) == (40, "group", 8)
    assert plan["bytes_at_most"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


@pytest.mark.parametrize("option", ["--format=tar", "--hold-out=x", "--min-matched=7", "--held-out=2", "--workers=0"])
def test_options_without_meaning_are_exit_code_2(tmp_path, source, option):
    done = run(source, f"--out={tmp_path / 'store'}", option)
    assert done.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]
