"""No file of a run, of its checkpoints or of its store can execute code: in place of each, something that would."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cctrain.cli import app
from cctrain.config import load_config, to_yaml
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import CctrainError
from cctrain.parallel.mesh import Mesh, join_mesh
from cctrain.run_directory import write_vocabulary
from cctrain.run_lock import hold_run
from cctrain.tracking.journal import Journal
from cctrain.training.checkpoint import load_checkpoint, save_checkpoint
from cctrain.training.checkpoint_files import damaged_files, file_digest, read_manifest, run_weights, write_manifest
from cctrain.training.data import resolve
from cctrain.training.engine import build_engine
from cctrain.training.guards import write_outcome
from cctrain.training.initial_weights import start_from
from cctrain.training.resume import check_changes, check_checkpoints_are_there, read_past
from cctrain.training.train import build_model

CHECKPOINT = "checkpoints/step-00000002"


class _Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.crater),)


def _pickled(crater: Path) -> bytes:
    return pickle.dumps(_Bomb(crater))


def _pickled_as_text(crater: Path) -> bytes:
    return pickle.dumps(_Bomb(crater), protocol=0)


def _yaml_that_calls(crater: Path) -> bytes:
    return f"run: !!python/object/apply:os.mkdir ['{crater}']\n".encode()


PAYLOADS = {"pickle": _pickled, "pickle as text": _pickled_as_text, "yaml": _yaml_that_calls}


@pytest.fixture(params=PAYLOADS)
def payload(request: pytest.FixtureRequest) -> Callable[[Path], bytes]:
    return PAYLOADS[request.param]


@pytest.fixture
def crater(tmp_path: Path) -> Path:
    return tmp_path / "crater"


class Lab:
    """A run with one checkpoint, and everything that a training would load it with, in this process."""

    def __init__(self, config_path: Path, store: TokenStore, folder: Path, mesh: Mesh) -> None:
        self.run_dir, self.store, self.mesh = folder / "run", store, mesh
        self.config = resolve(load_config(config_path, [f"data.store={store.path}", f"run.dir={self.run_dir}"]), store)
        self.model = build_model(self.config, store.genes)
        self.engine = build_engine(self.model, self.config, mesh)
        self.genes = store.genes.ids.tolist()
        self.run_dir.mkdir()
        save_checkpoint(self.engine, self.run_dir, mesh, 2, {"position": 20, "attempt": 1})
        (self.run_dir / "config.yaml").write_text(to_yaml(self.config))
        write_vocabulary(self.run_dir, self.genes, store.genes.names.tolist())
        journal = Journal(self.run_dir)
        journal.write("start", 0, run="a")
        journal.write("checkpoint", 2, path=CHECKPOINT)
        journal.close()
        write_outcome(self.run_dir, "requeue")

    def copy(self, to: Path) -> Path:
        shutil.copytree(self.run_dir, to)
        return to


@pytest.fixture(scope="module")
def lab(tiny_config: Path, unequal_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        with join_mesh() as mesh:
            yield Lab(tiny_config, unequal_store, tmp_path_factory.mktemp("security"), mesh)


def resume(lab: Lab, run_dir: Path) -> None:
    past = read_past(run_dir)
    check_changes(run_dir, lab.config, False)
    check_checkpoints_are_there(run_dir, past)
    assert load_checkpoint(lab.engine, run_dir, lab.mesh)["step"] == 2


def init_from(lab: Lab, run_dir: Path) -> None:
    start_from(build_model(lab.config, lab.store.genes), lab.genes, run_dir)


def lock(lab: Lab, run_dir: Path) -> None:
    with hold_run(run_dir):
        assert json.loads((run_dir / "lock").read_text())["pid"] == os.getpid()


# What is loaded by whom, the exit code that it ends with (0: it says nothing, and is as good as absent), the message.
LOADED = [
    (f"{CHECKPOINT}/manifest.json", resume, 4, "no checkpoint of this run is whole"),
    (f"{CHECKPOINT}/manifest.json", init_from, 4, "manifest.json"),
    (f"{CHECKPOINT}/rank-00000.safetensors", resume, 4, "no checkpoint of this run is whole"),
    (f"{CHECKPOINT}/rank-00000.safetensors", init_from, 4, "rank-00000.safetensors"),
    ("checkpoints/latest", resume, 0, ""),
    ("checkpoints/latest", init_from, 0, ""),
    ("config.yaml", resume, 2, "config.yaml"),
    ("config.yaml", init_from, 2, "config.yaml"),
    ("vocabulary.json", init_from, 4, "vocabulary.json is damaged"),
    ("weights.safetensors", init_from, 4, "weights.safetensors cannot be read"),
    ("metrics.jsonl", resume, 0, ""),
    ("lock", lock, 0, ""),
]
COMMANDS = [
    (f"{CHECKPOINT}/manifest.json", ("inspect", ".", "--verify"), 4, "manifest.json cannot be read"),
    (f"{CHECKPOINT}/manifest.json", ("evaluate", "."), 4, "manifest.json cannot be read"),
    (f"{CHECKPOINT}/rank-00000.safetensors", ("inspect", ".", "--verify"), 4, "rank-00000.safetensors has"),
    (f"{CHECKPOINT}/rank-00000.safetensors", ("evaluate", "."), 4, "rank-00000.safetensors has"),
    ("checkpoints/latest", ("inspect", ".", "--verify"), 4, "which is not there"),
    ("config.yaml", ("train", "config.yaml"), 2, "config.yaml"),
    ("config.yaml", ("inspect", "."), 2, "config.yaml"),
    ("config.yaml", ("evaluate", "."), 2, "config.yaml"),
    ("vocabulary.json", ("evaluate", "."), 4, "vocabulary.json is damaged"),
    ("weights.safetensors", ("evaluate", "."), 4, "weights.safetensors cannot be read"),
    ("metrics.jsonl", ("inspect", "."), 0, ""),
    ("outcome", ("inspect", "."), 0, ""),
]


def test_the_bombs_of_these_tests_do_go_off(crater):
    for load, make in (
        (pickle.loads, _pickled),
        (pickle.loads, _pickled_as_text),
        (yaml.unsafe_load, _yaml_that_calls),
    ):
        load(make(crater))
        crater.rmdir()


@pytest.mark.parametrize(
    ("name", "reader", "code", "message"), LOADED, ids=lambda value: getattr(value, "__name__", None)
)
def test_what_a_training_loads_executes_nothing(lab, tmp_path, crater, payload, name, reader, code, message):
    run_dir = lab.copy(tmp_path / "run")
    reader(lab, run_dir)  # a whole file is read
    plant(run_dir / name, payload(crater))
    error = refusal(lambda: reader(lab, run_dir))
    assert (error.exit_code if error else 0) == code
    assert error is None or (message in str(error) and str(run_dir) in str(error))
    assert not crater.exists()


@pytest.mark.parametrize(("name", "arguments", "code", "message"), COMMANDS)
def test_what_a_command_loads_executes_nothing(
    lab, tmp_path, crater, payload, name, arguments, code, message, capfd, monkeypatch
):
    run_dir = lab.copy(tmp_path / "run")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.delenv("RANK", raising=False)
    plant(run_dir / name, payload(crater))
    paths = {".": str(run_dir), "config.yaml": str(run_dir / "config.yaml")}
    with pytest.raises(SystemExit) as ended:
        app([paths.get(argument, argument) for argument in arguments])
    shown = capfd.readouterr()
    assert ended.value.code == code, shown.err
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert "mkdir" not in shown.out  # a payload that is text is no outcome either
    assert not crater.exists()


def test_a_checkpoint_whose_manifest_vouches_for_the_bomb_is_refused(lab, tmp_path, crater, payload):
    run_dir = lab.copy(tmp_path / "run")
    folder = run_dir / CHECKPOINT
    file = folder / "rank-00000.safetensors"
    plant(file, payload(crater))
    manifest = read_manifest(folder)
    manifest["files"][0] |= {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    write_manifest(folder, manifest)
    assert damaged_files(folder, manifest) == []
    with pytest.raises(CctrainError, match=r"rank-00000\.safetensors cannot be read") as resumed:
        resume(lab, run_dir)
    with pytest.raises(CctrainError, match=r"rank-00000\.safetensors cannot be read") as loaded:
        run_weights(run_dir)
    assert (resumed.value.exit_code, loaded.value.exit_code) == (4, 4)
    assert not crater.exists()


def test_no_file_of_a_store_executes_anything_when_all_of_it_is_read(lab, tmp_path, crater, payload):
    whole = read_store(lab.store.path)
    files = [path.relative_to(lab.store.path) for path in sorted(lab.store.path.rglob("*")) if path.is_file()]
    assert len(files) > 10
    for name in files:
        folder = tmp_path / "store"
        shutil.copytree(lab.store.path, folder)
        plant(folder / name, payload(crater))
        read = []
        error = refusal(lambda folder=folder, read=read: read.append(read_store(folder)))
        assert read == [whole] or (error is not None and error.exit_code == 3 and str(folder) in str(error)), name
        assert not crater.exists(), name
        shutil.rmtree(folder)


def refusal(load: Callable[[], Any]) -> CctrainError | None:
    """The error of ours that it ends with, if any; another one fails the test."""
    try:
        load()
    except CctrainError as error:
        return error
    return None


def read_store(path: Path) -> tuple[Any, ...]:
    store = open_store(path)
    cells = store.cells(np.arange(store.num_cells))
    genes = store.genes
    arrays = (cells.offsets, cells.genes, cells.counts, store.measured, store.source_of_cell, genes.share, genes.theta)
    return (*(array.tolist() for array in arrays), genes.ids.tolist(), store.obs().to_csv())


def plant(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, (0, 0))  # a lock of old: its lease has run out
