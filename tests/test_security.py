"""A planted password is written nowhere, and no file that is loaded can execute code."""

import base64
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cctrain.config import Config, load_config, to_yaml
from cctrain.data.store.store import TokenStore
from cctrain.errors import CctrainError, UsageError
from cctrain.launch.local import free_port
from cctrain.run_directory import open_run
from cctrain.tracking.journal import Journal, read_journal
from cctrain.tracking.projection import sync
from cctrain.tracking.ui import Page, find_page, running_server
from cctrain.training.resume import read_past
from tests.trainer import CELL_YAML, SMALL

SECRET = "s3cret-of-ann"


def _cctrain(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "SLURM_"))}
    environment = inherited | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    command = [sys.executable, "-m", "cctrain", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def _files_with_secret(folder: Path) -> list[str]:
    forms = [SECRET.encode(), base64.b64encode(f"ann:{SECRET}".encode())]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if any(form in path.read_bytes() for form in forms)]


def _make_run(run_dir: Path, uri: str | None = None) -> Path:
    run_dir.mkdir(parents=True)
    config = Config()
    config.data.store, config.run.dir, config.tracking.uri = "stores/mine", str(run_dir), uri
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "vocabulary.json").write_text('{"ids": [], "names": []}')
    journal = Journal(run_dir)
    journal.write("start", 0, run="a")
    journal.write("step", 1, loss=0.5, learning_rate=1e-3, samples="x", step_seconds=0.1)
    journal.write("stop", 1, status="finished")
    return run_dir


# A planted password


@pytest.fixture
def guarded_server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """An MLflow server behind a proxy that keeps the credentials of each call; its address and these."""
    from http.client import HTTPConnection

    seen: list[str] = []
    folder = tmp_path / "server"
    folder.mkdir()
    with running_server(Page(f"sqlite:///{folder}/mlflow.db", folder, None, None), free_port()) as (address, _):

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                seen.append(self.headers.get("Authorization", ""))
                connection = HTTPConnection(address.removeprefix("http://"), timeout=60)
                connection.request(self.command, self.path, body, {"Content-Type": self.headers["Content-Type"] or ""})
                answer = connection.getresponse()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.getheader("Content-Type") or "")
                self.end_headers()
                self.wfile.write(answer.read())
                connection.close()

            do_POST = do_PUT = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as proxy:
            Thread(target=proxy.serve_forever, args=(0.05,), daemon=True).start()
            yield f"http://127.0.0.1:{proxy.server_port}", seen
            proxy.shutdown()


@pytest.mark.slow
@pytest.mark.representative
def test_the_tracking_password_of_the_environment_reaches_the_server_and_no_file(
    tiny_store: TokenStore, tmp_path: Path, guarded_server: tuple[str, list[str]]
) -> None:
    address, seen = guarded_server
    login = {"MLFLOW_TRACKING_USERNAME": "ann", "MLFLOW_TRACKING_PASSWORD": SECRET}
    tracked = [f"data.store={tiny_store.path}", "run.dir=runs/cell", f"tracking.uri={address}", *SMALL]
    for arguments in (["train", str(CELL_YAML), *tracked], ["sync", "runs/cell", "--debug"]):
        done = _cctrain(tmp_path, *arguments, **login)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
        assert set(seen) == {f"Basic {base64.b64encode(f'ann:{SECRET}'.encode()).decode()}"}
        seen.clear()
    # Run directory and checkpoints, and the server's database with parameters, tags and files.
    assert _files_with_secret(tmp_path) == []
    assert (tmp_path / "runs" / "cell" / "mlflow.json").is_file()
    assert (tmp_path / "server" / "mlflow.db").is_file()


@pytest.mark.slow
def test_a_password_in_the_address_is_refused_before_it_is_written(tiny_store: TokenStore, tmp_path: Path) -> None:
    uri = f"tracking.uri=http://ann:{SECRET}@127.0.0.1:{free_port()}"
    done = _cctrain(tmp_path, "train", str(CELL_YAML), f"data.store={tiny_store.path}", "run.dir=cell", uri, *SMALL)
    assert done.returncode == 2, done.stderr
    assert "MLFLOW_TRACKING_PASSWORD" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET not in path.read_text(errors="replace")


def test_a_password_in_the_address_given_to_sync_is_written_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_dir = _make_run(tmp_path / "runs" / "cell")
    with pytest.raises(UsageError, match=r"cannot write .* at http://127\.0\.0\.1") as caught:
        sync([run_dir], f"http://ann:{SECRET}@127.0.0.1:{free_port()}")
    shown = capfd.readouterr()
    assert SECRET not in f"{caught.value}{shown.out}{shown.err}{caplog.text}"
    assert _files_with_secret(tmp_path) == []


# Files that would execute code


class _Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.crater),)


@pytest.fixture(scope="module")
def database(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all: MLflow takes a while to open each."""
    return f"sqlite:///{shutil.copy(empty_database, tmp_path_factory.mktemp('tracking'))}"


@pytest.fixture
def crater(tmp_path: Path) -> Path:
    return tmp_path / "crater"


def _pickled(crater: Path) -> bytes:
    return pickle.dumps(_Bomb(crater))


def _pickled_as_text(crater: Path) -> bytes:
    return pickle.dumps(_Bomb(crater), protocol=0)


def _yaml_that_calls(crater: Path) -> bytes:
    return f"tracking: !!python/object/apply:os.mkdir ['{crater}']\n".encode()


PAYLOADS = [_pickled, _pickled_as_text, _yaml_that_calls]
READERS: dict[str, Callable[[Path], Any]] = {
    "sync": lambda run_dir: sync([run_dir]),
    "ui": find_page,
    "read the journal": read_journal,
    "resume": read_past,
    "open": open_run,
    "configure": lambda run_dir: load_config(run_dir / "config.yaml"),
}
LOADED_BY = {
    "metrics.jsonl": ["sync", "ui", "read the journal", "resume"],
    "config.yaml": ["sync", "ui", "open", "configure"],
    "mlflow.json": ["sync", "ui"],
    "vocabulary.json": ["open"],
}


def test_the_bombs_of_these_tests_do_go_off(crater: Path) -> None:
    import yaml

    pickle.loads(_pickled(crater))
    crater.rmdir()
    pickle.loads(_pickled_as_text(crater))
    crater.rmdir()
    yaml.unsafe_load(_yaml_that_calls(crater))
    assert crater.is_dir()


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: payload.__name__.strip("_"))
@pytest.mark.parametrize(("name", "reader"), [(name, r) for name, readers in LOADED_BY.items() for r in readers])
def test_no_file_of_a_run_executes_code_when_it_is_loaded(
    tmp_path: Path, crater: Path, database: str, name: str, reader: str, payload: Callable[[Path], bytes]
) -> None:
    run_dir = _make_run(tmp_path / "runs" / "cell", database)
    READERS[reader](run_dir)  # a whole file is read
    (run_dir / name).write_bytes(payload(crater))
    said = None
    try:
        READERS[reader](run_dir)
    except CctrainError as error:
        said = str(error)
    assert said is None or str(run_dir) in said
    assert not crater.exists()


def test_a_configuration_given_by_hand_executes_nothing(tmp_path: Path, crater: Path) -> None:
    path = tmp_path / "mine.yaml"
    for payload in PAYLOADS:
        path.write_bytes(payload(crater))
        with pytest.raises(UsageError, match=r"mine\.yaml"):
            load_config(path)
    assert not crater.exists()
