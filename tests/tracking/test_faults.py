"""A tracking server that is gone, goes, or is slow: the training never waits, and a later sync makes it good.

A real MLflow server stands behind a proxy that counts, delays, holds or loses calls. That the training is not
delayed is shown by its cause: its journal is complete while the projection still waits for the first answer.
"""

import http.client
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cctrain.data.store.store import TokenStore
from cctrain.errors import UsageError
from cctrain.launch.local import free_port
from cctrain.tracking.journal import Journal, read_journal
from cctrain.tracking.projection import LiveProjection, project, sync
from cctrain.tracking.ui import Page, running_server
from tests.trainer import CELL_YAML, SMALL

MakeRun = Callable[..., Path]
WriteAttempt = Callable[..., None]


class Proxy:
    """Between a client and an MLflow server, on a port of its own.

    Each call first waits `delay` seconds, and until `hold` is cleared. From call number `lose_from` on, calls
    are lost: with `lose="request"` the server never sees them, with `lose="answer"` only the answer is lost.
    """

    def __init__(self, server: str) -> None:
        self.lose = "request"
        self.num_calls = self.num_answered = 0
        self._go, self._closed = threading.Event(), threading.Event()
        self._go.set()
        self._lock, self._target = threading.Lock(), urlsplit(server).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                proxy._forward(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._handler, self._port = Handler, 0
        self.open()
        self.uri = f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Listen, again on the same port; all calls are answered."""
        self.delay, self.lose_from = 0.0, sys.maxsize
        self._closed.clear()
        self._go.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def hold(self) -> None:
        self._go.clear()

    def close(self) -> None:
        """From now on nobody listens, and calls under way are lost."""
        self._closed.set()
        self._go.set()
        self._server.shutdown()
        self._server.server_close()

    def _forward(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            self.num_calls += 1
            number = self.num_calls
        self._go.wait()
        self._closed.wait(self.delay)
        is_lost = number >= self.lose_from or self._closed.is_set()
        if not is_lost or self.lose == "answer":
            connection = http.client.HTTPConnection(self._target, timeout=60)
            connection.request(handler.command, handler.path, body, dict(handler.headers.items()))
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
        if is_lost:
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)
        with self._lock:
            self.num_answered += 1


@pytest.fixture(scope="module")
def server(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    database = folder / "mlflow.db"
    database.write_bytes(empty_database.read_bytes())
    page = Page(f"sqlite:///{database}", folder, None, None)
    with running_server(page, free_port()) as (address, _):
        yield address


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's client tries each call once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def _runs(server: str, experiment: str) -> tuple[Any, list[Any]]:
    import mlflow

    client = mlflow.MlflowClient(server)
    found = client.get_experiment_by_name(experiment)
    return client, client.search_runs([found.experiment_id]) if found else []


def _assert_complete(server: str, experiment: str, run_dir: Path, status: str = "FINISHED") -> str:
    """One run, with each step of the journal once, and all the rest; returns its id."""
    client, (run,) = _runs(server, experiment)
    lines = read_journal(run_dir)
    for key, event in (("train/loss", "step"), ("speed/step_seconds", "step"), ("validation/nll", "evaluate")):
        points = Counter(point.step for point in client.get_metric_history(run.info.run_id, key))
        assert points == Counter({line["step"]: 1 for line in lines if line["event"] == event})
    assert run.info.status == status
    assert run.data.params["model.latents"]
    assert "Step " in run.data.tags["mlflow.note.content"]
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    return run.info.run_id


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def _wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# Beside a journal that is being written


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_gone_for_the_whole_run_costs_one_warning_and_a_sync_makes_it_good(
    make_run: MakeRun, write_attempt: WriteAttempt, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = make_run()
    live = LiveProjection(run_dir, f"http://127.0.0.1:{free_port()}", "gone", every=0.05)
    write_attempt(run_dir, 1, 30, None)
    live.start()
    _wait_for(lambda: bool(_warnings(caplog)))
    journal = Journal(run_dir, attempt=1)
    journal.write("step", 31, loss=0.5, learning_rate=1e-3, samples="x", step_seconds=0.1)
    journal.write("stop", 31, status="finished")
    live.close()
    (warning,) = _warnings(caplog)
    assert f"cctrain sync {run_dir}" in warning
    assert [line["step"] for line in read_journal(run_dir) if line["event"] == "step"] == list(range(1, 32))
    sync([run_dir], server, "gone")
    _assert_complete(server, "gone", run_dir)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_goes_half_way_keeps_what_it_had_and_a_sync_sends_the_rest_to_the_same_run(
    make_run: MakeRun, write_attempt: WriteAttempt, server: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = make_run()
    write_attempt(run_dir, 1, 30, None)
    live = LiveProjection(run_dir, proxy.uri, "half-way", every=0.05)
    live.start()
    _wait_for(lambda: any(run.data.metrics for run in _runs(server, "half-way")[1]))
    first = _runs(server, "half-way")[1][0].info.run_id
    _wait_for((run_dir / "mlflow.json").is_file)
    proxy.close()
    journal = Journal(run_dir, attempt=1)
    for step in range(31, 61):
        journal.write("step", step, loss=0.5, learning_rate=1e-3, samples=str(step), step_seconds=0.1)
    journal.write("stop", 60, status="finished")
    live.close()
    (warning,) = _warnings(caplog)
    assert f"cctrain sync {run_dir}" in warning
    client, _ = _runs(server, "half-way")
    assert len(client.get_metric_history(first, "train/loss")) == 30
    assert len([line for line in read_journal(run_dir) if line["event"] == "step"]) == 60
    proxy.open()
    sync([run_dir], proxy.uri, "half-way")
    assert _assert_complete(server, "half-way", run_dir) == first


@pytest.mark.usefixtures("impatient")
def test_the_training_does_not_wait_for_a_server_that_has_not_answered_once(
    make_run: MakeRun, write_attempt: WriteAttempt, server: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = make_run()
    proxy.hold()
    live = LiveProjection(run_dir, proxy.uri, "held", every=0.05, close_within=0.5)
    write_attempt(run_dir, 1, 0, None)
    live.start()
    _wait_for(lambda: proxy.num_calls == 1)
    journal = Journal(run_dir, attempt=1)
    for step in range(1, 101):
        journal.write("step", step, loss=0.5, learning_rate=1e-3, samples=str(step), step_seconds=0.1)
    journal.write("stop", 100, status="finished")
    # The cause: all of this happened while the projection was waiting for its very first answer.
    assert (proxy.num_calls, proxy.num_answered) == (1, 0)
    assert len([line for line in read_journal(run_dir) if line["event"] == "step"]) == 100
    live.close()
    assert (proxy.num_calls, proxy.num_answered) == (1, 0)
    (warning,) = _warnings(caplog)
    assert f"cctrain sync {run_dir}" in warning
    assert "not done within" in warning
    proxy.close()
    _wait_for(lambda: not any(thread.name == "mlflow-projection" for thread in threading.enumerate()))
    proxy.open()
    sync([run_dir], proxy.uri, "held")
    _assert_complete(server, "held", run_dir)


def test_the_process_ends_though_the_server_never_answers(
    make_run: MakeRun, write_attempt: WriteAttempt, proxy: Proxy
) -> None:
    run_dir = make_run()
    write_attempt(run_dir, 1, 5, "finished")
    proxy.hold()
    script = (
        "from pathlib import Path\nfrom cctrain.tracking.projection import LiveProjection\n"
        f"live = LiveProjection(Path({str(run_dir)!r}), {proxy.uri!r}, 'never', close_within=0.5)\n"
        "live.start()\ninput()\nlive.close()\nprint('closed')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: proxy.num_calls == 1)
        out, _ = process.communicate("close\n", timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "closed\n")
    assert (proxy.num_calls, proxy.num_answered) == (1, 0)


@pytest.mark.slow
def test_a_run_of_two_minutes_beside_a_server_that_takes_ten_seconds_a_call_arrives_whole(
    make_run: MakeRun, write_attempt: WriteAttempt, server: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = make_run()
    write_attempt(run_dir, 1, 30, None)
    proxy.delay = 10.0
    live = LiveProjection(run_dir, proxy.uri, "slow", every=3600.0)
    live.start()
    _wait_for(lambda: proxy.num_answered == 12, 240)  # it is up to date: nothing is under way
    write_attempt(run_dir, 31, 60, "finished")
    live.close()
    assert _warnings(caplog) == []
    _assert_complete(server, "slow", run_dir)


# A sync that breaks off


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("lose", ["request", "answer"])
def test_a_sync_that_breaks_off_at_any_call_is_made_good_by_the_next(
    make_run: MakeRun, server: str, lose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cctrain.tracking.replay._MAX_METRICS", 300)  # several batches
    run_dir = make_run((1, 40, None), (26, 50, "requeue"))
    num_calls = 0
    for breaks_at in range(1, 40):
        proxy = Proxy(server)
        proxy.lose, proxy.lose_from = lose, breaks_at
        try:
            project(run_dir, proxy.uri, f"{lose}-{breaks_at}")
        except Exception:
            num_calls += 1
        else:
            proxy.close()
            break
        proxy.lose_from = sys.maxsize
        sync([run_dir], proxy.uri, f"{lose}-{breaks_at}")
        _assert_complete(server, f"{lose}-{breaks_at}", run_dir, "KILLED")
        proxy.close()
    else:
        pytest.fail("it never came through")
    assert num_calls >= 12


@pytest.mark.usefixtures("impatient")
def test_a_sync_that_breaks_off_says_what_to_do(make_run: MakeRun, proxy: Proxy) -> None:
    proxy.lose_from = 5
    with pytest.raises(UsageError, match=r"cannot write .* to MLflow at http.*: check that it can be reached"):
        sync([make_run((1, 5, "finished"))], proxy.uri)


def test_a_sync_into_a_server_says_nothing_on_standard_output(
    make_run: MakeRun, server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    sync([make_run((1, 5, "finished"))], server, "quiet")
    assert capfd.readouterr().out == ""


# A whole training


def _start(run_dir: Path, store: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cctrain", "train", str(CELL_YAML), f"data.store={store}", f"run.dir={run_dir}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *SMALL, *overrides], env=environment, cwd=run_dir.parent, stderr=subprocess.PIPE, text=True
    )


def _train(run_dir: Path, store: Path, *overrides: str) -> str:
    """Its standard error."""
    process = _start(run_dir, store, *overrides)
    try:
        _, told = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, told
    return told


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gone", "goes", "slow"])
def test_a_training_finishes_with_a_whole_journal_and_one_warning_whatever_the_server_does(
    tiny_store: TokenStore, tmp_path: Path, server: str, proxy: Proxy, fault: str
) -> None:
    run_dir = tmp_path / "cell"
    if fault == "gone":
        proxy.close()
    elif fault == "goes":
        proxy.lose_from = 5  # the run is there, its first steps are lost
    else:
        proxy.delay = 10.0
    experiment = f"training-{fault}"
    tracking = (f"tracking.uri={proxy.uri}", f"tracking.experiment={experiment}")
    told = " ".join(_train(run_dir, tiny_store.path, *tracking).split())
    assert told.count("MLflow tracking failed") == 1
    assert "cctrain sync" in told
    assert "Retrying" not in told
    assert "Traceback" not in told
    lines = read_journal(run_dir)
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4]
    assert lines[-1]["status"] == "finished"
    if fault != "gone":
        assert proxy.num_calls > 0
        proxy.close()
    proxy.open()
    sync([run_dir])
    _assert_complete(server, experiment, run_dir)


@pytest.mark.slow
def test_a_training_that_is_killed_and_resumed_is_one_run_in_mlflow_with_each_step_once(
    tiny_store: TokenStore, tmp_path: Path, server: str
) -> None:
    run_dir = tmp_path / "cell"
    tracking = (f"tracking.uri={server}", "tracking.experiment=killed", "training.steps=300", "checkpoint.every=20")

    def last_step() -> int:
        return max((line["step"] for line in read_journal(run_dir)), default=0)

    process = _start(run_dir, tiny_store.path, *tracking)
    try:
        _wait_for(lambda: last_step() >= 30, 120)
    finally:
        process.kill()
        process.communicate()
    reached = last_step()
    assert reached < 300, "it had ended before it was killed"
    first = sync([run_dir])[0]["run_id"]  # now MLflow holds steps that no checkpoint has
    told = _train(run_dir, tiny_store.path, *tracking)
    assert "MLflow cannot replace" not in told
    begun = [line["step"] for line in read_journal(run_dir) if line["event"] == "start"]
    assert 0 == begun[0] < begun[1] < reached, "no step was repeated"
    client, (run,) = _runs(server, "killed")
    assert run.info.run_id == first
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(first, "train/loss")] == list(range(1, 301))
    attempts = {(point.step, point.value) for point in client.get_metric_history(first, "speed/attempt")}
    assert attempts == {(1, 1), (begun[1], 1), (begun[1] + 1, 2), (300, 2)}
