"""The MLflow page of a run: a server on this machine, the run's charts opened in it, all gone on Ctrl-C.

A run on a database is replayed first, so that the page shows what the journal holds. A run that was written
as a journal only is replayed into a database beside it, or, where that folder is on a network file system,
into one in the local cache. A run on a tracking server needs nothing started: its page is opened there.

The server listens on 127.0.0.1 alone. To look from elsewhere, forward the port: `ssh -L 5000:127.0.0.1:5000`.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console

from cctrain.errors import UsageError
from cctrain.file_system import on_network_file_system
from cctrain.tracking.address import (
    artifact_folder,
    check_uri,
    database_in,
    is_server,
    resolve_uri,
    sqlite_path,
    strip_credentials,
)
from cctrain.tracking.journal import JOURNAL_NAME
from cctrain.tracking.projection import configured_uri, sync

HOST = "127.0.0.1"
_FIRST_PORT = 5000
MODEL_TRAINING = "workflowType=machine_learning"  # the view of a page
_START_SECONDS = 180.0  # a cold file system takes over a minute to import the server


@dataclass(frozen=True)
class Page:
    """A page to open: on which tracking URI, and of which run (None: the list of experiments)."""

    uri: str
    folder: Path
    experiment_id: str | None
    run_id: str | None

    def address(self, server: str) -> str:
        if self.experiment_id is None or self.run_id is None:
            return f"{server.rstrip('/')}/#/experiments?{MODEL_TRAINING}"
        return run_page(server, self.experiment_id, self.run_id)


def serve(run_dir: Path | None, *, uri: str | None = None, port: int | None = None, open_browser: bool = True) -> None:
    """Show a run's chart page until Ctrl-C; without a run, the newest one below `runs/`.

    Prints the address. The browser opens if there is a display and `open_browser`. Raises UsageError if there
    is no run, the port is taken, or the server does not start.
    """
    page = find_page(run_dir, uri)
    if is_server(page.uri):
        _show(page.address(strip_credentials(page.uri)), open_browser)
        return
    try:
        with _interrupted_by_sigterm(), running_server(page, port) as (server, process):
            _show(page.address(server), open_browser)
            print("Ctrl-C ends the server.", file=sys.stderr, flush=True)
            process.wait()
    except KeyboardInterrupt:
        return
    raise UsageError("the MLflow server ended by itself: start it again, or give it another --port")


def run_page(uri_of_server: str, experiment_id: str, run_id: str, tab: str = "model-metrics") -> str:
    """The address of a run's charts, or of another of its tabs, on an MLflow server in its view for model training.

    MLflow 3 otherwise frames every page with its tools for language-model traces.
    """
    server = uri_of_server.rstrip("/")
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}/{tab}?{MODEL_TRAINING}"


def find_page(run_dir: Path | None, uri: str | None = None) -> Page:
    """The page of a run, after its journal has been replayed into the database that serves it; or of a scaling sweep,
    which has no journal and is where `cctrain scaling` sent it.
    """
    if uri is not None:
        check_uri(uri)
        uri = resolve_uri(uri)
    if run_dir is None:
        run_dir = _newest_run(Path("runs"))
    if run_dir is None:
        if uri is None:
            raise UsageError("there is no run below ./runs: pass a run directory, or an MLflow --uri")
        return Page(uri, Path.cwd(), None, None)
    run_dir = Path(run_dir)
    recorded = _recorded(run_dir)
    if not (run_dir / JOURNAL_NAME).is_file():
        if not recorded or strip_credentials(uri or recorded["uri"]) != recorded["uri"]:
            raise UsageError(f"{run_dir} holds no {JOURNAL_NAME}: pass a run directory, such as runs/cell")
        return Page(uri or recorded["uri"], run_dir, recorded["experiment_id"], recorded["run_id"])
    uri = uri or _where_to_look(run_dir)
    if is_server(uri) and recorded.get("uri") == strip_credentials(uri):
        identity = recorded
    else:
        experiment = recorded.get("experiment") if recorded.get("uri") == strip_credentials(uri) else None
        identity = sync([run_dir], uri, experiment)[0]
    return Page(uri, run_dir, identity["experiment_id"], identity["run_id"])


@contextmanager
def running_server(page: Page, port: int | None = None) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """An MLflow server for a page's database, from the moment it answers; yields its address and process."""
    port = _free_port() if port is None else _check_port(port)
    folder = artifact_folder(page.uri, page.folder)
    assert folder is not None, "a tracking server is not served again"
    folder.parent.mkdir(parents=True, exist_ok=True)
    server = f"http://{HOST}:{port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        HOST,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*command, "--artifacts-destination", str(folder)],
            env={
                **os.environ,
                # Not on the command line, where every user of the machine could read a password.
                "MLFLOW_BACKEND_STORE_URI": page.uri,
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "DO_NOT_TRACK": "true",
                # Its workers for language-model jobs; training has no use for them.
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            },
            cwd=folder.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to us, and we end it with its own children
        )
        try:
            _wait_until_healthy(process, server, output)
            yield server, process
        finally:
            _stop(process)


def _where_to_look(run_dir: Path) -> str:
    """The recorded place of a run if it is still there, else the configured one, else a database for it."""
    configured = configured_uri(run_dir)
    recorded = _recorded(run_dir).get("uri")
    if recorded and recorded != strip_credentials(configured or ""):  # equal: only ours has the credentials
        database = sqlite_path(recorded)
        if database is None or database.is_file():
            return recorded
    if configured:
        return resolve_uri(configured)
    folder = run_dir.resolve().parent
    return database_in(folder if not on_network_file_system(folder) else _local_folder(folder))


def _recorded(run_dir: Path) -> dict[str, str]:
    path = run_dir / "mlflow.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}): delete it; it is written anew from the journal") from error


def _newest_run(folder: Path) -> Path | None:
    journals = folder.glob(f"*/{JOURNAL_NAME}")
    newest = max(journals, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None


def _local_folder(runs: Path) -> Path:
    """A private folder on a local disk for the database of a folder of runs on a network file system."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cctrain"
    if on_network_file_system(base):
        base = Path(tempfile.gettempdir()) / f"cctrain-{os.getuid()}"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise UsageError(f"{base} belongs to somebody else: set TMPDIR to a local folder of your own")
    folder = base / f"mlflow-{hashlib.sha256(str(runs).encode()).hexdigest()[:12]}"
    folder.mkdir(exist_ok=True)
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, _FIRST_PORT))
        except OSError:
            probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _check_port(port: int) -> int:
    with socket.socket() as probe:
        # As the server itself does: a port whose last connections are still fading is not taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"port {port} cannot be used ({error}): choose another with --port, or none, for a free one"
            ) from error
    return port


def _wait_until_healthy(process: subprocess.Popen[bytes], server: str, output: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with Console(stderr=True).status(f"starting the MLflow server on {server}"):
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            if _is_healthy(server):
                return
            time.sleep(0.2)
    output.seek(0)
    tail = strip_credentials(output.read().decode(errors="replace"))[-2000:]
    ended = "ended" if process.poll() is not None else f"did not answer within {_START_SECONDS:.0f} s"
    raise UsageError(f"the MLflow server {ended}; check the tracking URI. Its last words:\n{tail}")


def _is_healthy(server: str) -> bool:
    # A proxy of the environment is not for this machine's own address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{server}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)  # its own session: the server and its workers, nothing else
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(0.1)  # then SIGKILL to a worker that outlived its parent
    process.wait()


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end us as Ctrl-C does, so that it does not orphan the server."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _show(address: str, open_browser: bool) -> None:
    print(address, flush=True)
    has_display = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if open_browser and has_display:
        webbrowser.open(address)
