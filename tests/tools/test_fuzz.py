"""What `tools/fuzz.py` makes of inputs, that its judgement can fail, and a run of 20 mutants.

`python -m tools.fuzz --mutants 200` is the long version. A failure prints the mutant's id, and the seed is here.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import h5py
import pytest
import zarr

from tests.data.conftest import prepared
from tools.fuzz import FORMS, Original, fault_of, fuzz, judge_source, judge_store, make_mutant, plan
from tools.fuzz_inputs import NUM_CELLS, cell_ids, counts, gene_ids
from tools.fuzz_mutations import CRATER, files_of, pickled
from tools.fuzz_oracle import Invalid, differences, read_source
from tools.fuzz_stores import forge
from tools.fuzz_worker import Ran, Worker

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn of what is done here on purpose

SEED = 5
COUNTS_FROM = {"h5ad-raw": "raw.X", "h5ad-layer": "layers/umi"}
SOURCES = [name for name, form in FORMS.items() if form.kind != "store"]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(tmp_path_factory.mktemp("worker")) as worker:
        yield worker


def bytes_of(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)) if file != path else "": hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files_of(path)
    }


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.representative
def test_twenty_mutants_of_all_forms_are_read_correctly_or_refused_with_one_line(tmp_path: Path) -> None:
    result = fuzz(tmp_path, plan(list(FORMS), 20), SEED)
    assert result["failures"] == []
    assert result["verdict"] == "20 of 20"
    assert result["by_verdict"]["refused"] > 0


@pytest.fixture(scope="module", params=SOURCES)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Original]:
    form = FORMS[request.param]
    return request.param, Original(form, form.write(tmp_path_factory.mktemp("original")), None)


def test_the_oracle_reads_every_form_as_the_counts_that_were_written(original: tuple[str, Original]) -> None:
    name, written = original
    expected = read_source(written.path, COUNTS_FROM.get(name, "X"))
    truth = [dict(zip(gene_ids(), row, strict=True)) for row in counts().tolist()]
    assert expected.ids == cell_ids()
    assert expected.genes == set(gene_ids())
    assert expected.cells == [{gene: count for gene, count in row.items() if count} for row in truth]


def test_the_same_input_is_written_with_the_same_bytes(original: tuple[str, Original], tmp_path: Path) -> None:
    name, written = original
    assert bytes_of(FORMS[name].write(tmp_path)) == bytes_of(written.path)


def test_the_same_seed_and_id_give_the_same_bytes_and_another_seed_gives_others(
    original: tuple[str, Original], tmp_path: Path
) -> None:
    name, written = original
    made = []
    for turn, seed in enumerate((1, 1, 2)):
        here = tmp_path / str(turn)
        contents = []
        for number in range(4):
            (here / str(number)).mkdir(parents=True)
            _, _, what = make_mutant(here / str(number), f"{name}-{number}", seed, written)
            contents.append((what, bytes_of(here / str(number))))
        made.append(contents)
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_the_oracle_refuses_a_fraction_and_an_index_outside_the_matrix(tmp_path: Path) -> None:
    path = FORMS["h5ad-csr"].write(tmp_path)
    with h5py.File(path, "r+") as file:
        file["X/data"][5] = 0.5
    with pytest.raises(Invalid, match=r"0\.5"):
        read_source(path, "X")
    with h5py.File(path, "r+") as file:
        file["X/data"][5], file["X/indices"][7] = 1.0, 1000
    with pytest.raises(Invalid, match="column 1000"):
        read_source(path, "X")


def test_a_store_with_one_count_changed_or_one_cell_less_is_not_what_the_source_says(tmp_path: Path) -> None:
    path = FORMS["h5ad-csr"].write(tmp_path)
    store = prepared(tmp_path / "store", path, workers=1)
    expected = read_source(path, "X")
    assert differences(store.path, expected) is None
    expected.cells[17][gene_ids()[0]] += 1
    assert "'cell17'" in str(differences(store.path, expected))
    expected = read_source(path, "X")
    expected.cells[17] = {}
    assert f"{NUM_CELLS} cells" in str(differences(store.path, expected))


@pytest.mark.slow
@pytest.mark.processes
def test_a_command_that_takes_too_long_is_ended_and_the_next_one_runs(worker: Worker, tmp_path: Path) -> None:
    path = FORMS["h5ad-csr"].write(tmp_path)
    ran = worker.run("prepare", str(path), "--out", str(tmp_path / "first"), seconds=0.001)
    assert ran.code is None
    assert "hangs" in str(fault_of(ran, path))
    assert judge_source(path, tmp_path / "second", worker) == ("read correctly", "")


@pytest.mark.parametrize(
    ("code", "errors", "fault"),
    [
        (1, "Traceback (most recent call last):\nKeyError: 'x'", "exit code 1: KeyError"),
        (-11, "", "ended by signal 11"),
        (2, "cctrain: a.h5ad: no", "exit code 2"),
        (3, "", "with 0 errors"),
        (3, "cctrain: a.h5ad: no\ncctrain: a.h5ad: no", "with 2 errors"),
        (3, "cctrain: the file is damaged", r"does not name a\.h5ad"),
        (3, "cctrain: a.h5ad: no\nand no", "of 2 lines"),
        (3, "cctrain: a.h5ad: \x1b[2J", "not printable"),
        (0, "cctrain: a.h5ad: no", "exit code 0 with 1 errors"),
    ],
)
def test_a_command_that_ends_otherwise_than_it_may_is_at_fault(code: int, errors: str, fault: str) -> None:
    assert re.search(fault, str(fault_of(Ran(code, "", errors, 0.1), Path("a.h5ad"))))


def test_one_clear_line_after_the_report_is_no_fault() -> None:
    said = "a.h5ad: 150 cells, 40 genes, counts from X\ncctrain: a.h5ad: X holds -1.0: not a count.\n"
    assert fault_of(Ran(3, "", said, 0.1), Path("a.h5ad")) is None


@pytest.mark.slow
@pytest.mark.processes
def test_training_that_reads_something_else_is_a_fault_unless_the_store_is_forged(
    worker: Worker, tmp_path: Path
) -> None:
    store = prepared(tmp_path / "store", FORMS["h5ad-csr"].write(tmp_path), workers=1).path
    content = worker.run("read", str(store)).output
    assert judge_store(store, worker, content, forged=False) == ("read correctly", "")
    group = zarr.open_group(store / "cells.zarr", mode="r+")
    group["X/data"][3] = int(group["X/data"][3]) + 1
    forge(store)
    assert judge_store(store, worker, content, forged=True)[0] == "refused"
    verdict, said = judge_store(store, worker, content, forged=False)
    assert verdict == "failed"
    assert "only --verify says" in said


def test_the_payloads_do_go_off_where_something_unpickles_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled())
    Path(CRATER).rmdir()
    # Versions of numcodecs before 0.16 unpickle without being asked to.
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    filters = [{"id": "vlen-utf8"}, {"id": "pickle", "protocol": 2}]
    described = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "order": "C", "compressor": None}
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / ".zarray").write_text(json.dumps(described | {"filters": filters, "fill_value": ""}))
    (tmp_path / "array" / "0").write_bytes(pickled())
    with suppress(Exception):  # whatever it makes of what the pickle returns
        zarr.open_array(tmp_path / "array", mode="r")[:]
    assert Path(CRATER).is_dir()
