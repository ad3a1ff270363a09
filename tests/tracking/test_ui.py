"""The MLflow page of a run: which one, where from, and a real server for it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from cctrain.errors import UsageError
from cctrain.tracking.projection import sync
from cctrain.tracking.ui import Page, find_page, run_page, running_server, serve

MakeRun = Callable[..., Path]


def test_the_page_of_a_run_is_its_charts_in_the_view_for_training() -> None:
    expected = "http://h:1/#/experiments/1/runs/abc/model-metrics?workflowType=machine_learning"
    assert run_page("http://h:1/", "1", "abc") == run_page("http://h:1", "1", "abc") == expected


def test_a_journal_without_mlflow_is_replayed_beside_the_run_even_under_slurm(
    make_run: MakeRun, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run_dir = make_run((1, 5, "finished"))
    page = find_page(run_dir)
    assert page.uri == database
    assert page.run_id == json.loads((run_dir / "mlflow.json").read_text())["run_id"]


def test_a_run_that_went_on_without_mlflow_is_brought_up_to_date(make_run: MakeRun, database: str) -> None:
    import mlflow

    run_dir = make_run((1, 5, "preempted"))
    find_page(run_dir)
    make_run((6, 9, "finished"))
    run_id = find_page(run_dir).run_id
    assert len(mlflow.MlflowClient(database).get_metric_history(run_id, "train/loss")) == 9


def test_the_recorded_place_is_used_again_while_it_exists(
    make_run: MakeRun, database: str, empty_database: Path, tmp_path: Path
) -> None:
    run_dir = make_run((1, 5, "finished"))
    other = tmp_path / "other.db"
    other.write_bytes(empty_database.read_bytes())
    sync([run_dir], f"sqlite:///{other}", "mine")
    page = find_page(run_dir)
    assert page.uri == f"sqlite:///{other}"
    assert json.loads((run_dir / "mlflow.json").read_text())["experiment"] == "mine"
    other.unlink()
    assert find_page(run_dir).uri == database


def test_without_a_run_the_newest_below_runs_is_shown(
    make_run: MakeRun, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    older, newer = (make_run((1, 3, "finished"), name=name) for name in ("b", "a"))
    os.utime(older / "metrics.jsonl", (1, 1))
    assert find_page(None).folder == Path("runs") / newer.name


def test_without_any_run_the_error_says_what_to_pass() -> None:
    with pytest.raises(UsageError, match="pass a run directory"):
        find_page(None)


def test_the_page_of_a_scaling_sweep_is_where_it_was_sent(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.json").write_text(json.dumps({"uri": uri, "experiment_id": "1", "run_id": "abc"}))
    assert find_page(tmp_path) == find_page(tmp_path, uri) == Page(uri, tmp_path, "1", "abc")
    with pytest.raises(UsageError, match=r"metrics\.jsonl"):
        find_page(tmp_path, f"sqlite:///{tmp_path}/other.db")


def test_a_folder_without_a_journal_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"metrics\.jsonl"):
        find_page(tmp_path)


def test_a_run_on_a_server_only_has_its_page_printed(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_run((1, 3, "finished"), uri="https://ann:s3cret@mlflow.example/lab")
    identity = {"uri": "https://mlflow.example/lab", "experiment": "e", "experiment_id": "7", "run_id": "abc"}
    (run_dir / "mlflow.json").write_text(json.dumps(identity))
    serve(run_dir, open_browser=False)
    assert capsys.readouterr().out.strip() == run_page("https://mlflow.example/lab", "7", "abc")


def test_a_port_in_use_is_an_error_that_names_it(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 3, "finished"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} cannot be used"):
            serve(run_dir, port=port, open_browser=False)


def test_a_server_that_cannot_start_shows_its_last_words(make_run: MakeRun, database: str) -> None:
    page = find_page(make_run((1, 3, "finished")))
    Path(database.removeprefix("sqlite:///")).write_text("not a database")
    with pytest.raises(UsageError, match=r"(?s)MLflow server ended.*not a database"), running_server(page):
        pass


@pytest.mark.slow
@pytest.mark.representative
def test_a_served_run_answers_on_this_machine_only_and_ends_with_the_command(
    make_run: MakeRun, database: str, tmp_path: Path
) -> None:
    run_dir = make_run((1, 5, "finished"))
    program = (
        "from pathlib import Path; from cctrain.tracking.ui import serve\n"
        f"serve(Path({str(run_dir)!r}), open_browser=False)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        address = command.stdout.readline().strip()
        server = address.partition("/#/")[0]
        try:
            assert server.startswith("http://127.0.0.1:")
            identity = json.loads((run_dir / "mlflow.json").read_text())
            url = f"{server}/api/2.0/mlflow/runs/get?run_id={identity['run_id']}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert json.load(answer)["run"]["info"]["status"] == "FINISHED"
            url = f"{server}/get-artifact?path=config.yaml&run_uuid={identity['run_id']}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert answer.read() == (run_dir / "config.yaml").read_bytes()

            other = make_run((1, 5, "finished"), name="other")
            with_password = server.replace("//", "//ann:s3cret@")
            (sent,) = sync([other], with_password, "cctrain")
            assert sent["uri"] == server
            assert "s3cret" not in (other / "mlflow.json").read_text()
            assert sync([other], with_password, "cctrain") == [sent]
            url = f"{server}/api/2.0/mlflow/metrics/get-history?run_id={sent['run_id']}&metric_key=train/loss"
            with urllib.request.urlopen(url, timeout=30) as answer:
                assert [point["step"] for point in json.load(answer)["metrics"]] == [1, 2, 3, 4, 5]
        finally:
            command.send_signal(signal.SIGINT)
        assert command.wait(20) == 0
    port = int(server.rpartition(":")[2])
    _wait_until_free(port)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "cell",
        "mlflow-artifacts",
        "mlflow.db",
        "other",
    ]


def _wait_until_free(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        assert time.monotonic() < deadline, f"something still listens on port {port}"
        time.sleep(0.1)
