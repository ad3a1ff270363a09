"""One run in one store through its restarts: the same MLflow run, each step once, read back with MLflow's client."""

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cctrain.tracking.journal import Journal, history, read_journal
from cctrain.tracking.projection import LiveProjection, project, sync
from cctrain.tracking.replay import Replay

MakeRun = Callable[..., Path]


def _client(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(uri)


def _only_run(uri: str) -> Any:
    client = _client(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("cctrain").experiment_id])
    return run


def _points(uri: str, key: str) -> list[tuple[int, float]]:
    run_id = _only_run(uri).info.run_id
    return sorted((point.step, point.value) for point in _client(uri).get_metric_history(run_id, key))


def _steps(uri: str, key: str = "train/loss") -> list[int]:
    return [step for step, _ in _points(uri, key)]


def _doubled(uri: str) -> dict[tuple[str, int], int]:
    """Points of the only run that are there more than once, by key and step; a point of an attempt is its own."""
    run = _only_run(uri)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        rows = connection.execute("select key, step, value from metrics where run_uuid = ?", [run.info.run_id])
        places = Counter((key, step, value if key == "speed/attempt" else None) for key, step, value in rows)
    return {place[:2]: number for place, number in places.items() if number > 1}


def _losses(run_dir: Path) -> dict[int, dict[int, float]]:
    """By attempt, then by step."""
    found: dict[int, dict[int, float]] = {}
    for line in read_journal(run_dir):
        if line["event"] == "step":
            found.setdefault(line["attempt"], {})[line["step"]] = line["loss"]
    return found


def _attempt(run_dir: Path, first: int, last: int, *, store: str, write_attempt: Callable[..., None]) -> None:
    """One attempt with its own projection, as the trainer runs it: killed, so nothing is sent at its end."""
    write_attempt(run_dir, first, first - 1, None)
    replay = Replay(run_dir, store, "cctrain")
    replay.replay(finished=False)
    number = max(line["attempt"] for line in read_journal(run_dir))
    journal = Journal(run_dir, attempt=number)
    for step in range(first, last + 1):
        values = {"loss": 1.0 / step + 1e-6 * number, "learning_rate": 1e-3, "samples": str(step), "step_seconds": 0.1}
        journal.write("step", step, **values)
        if step % 10 == 0:
            journal.write("evaluate", step, nll=0.5 + 1e-6 * number)
            journal.write("checkpoint", step, path="checkpoints/x", seconds=0.25)
        if step % 7 == 0:
            replay.follow()
    replay.follow()


# The same run after every restart


def test_a_crash_and_a_resume_over_steps_that_mlflow_holds_keep_the_run_and_send_them_once(
    make_run: MakeRun, database: str
) -> None:
    run_dir = make_run((1, 60, None))
    first = project(run_dir, database, "cctrain")
    make_run((51, 80, "finished"))
    for _ in range(2):
        assert project(run_dir, database, "cctrain") == first
        losses = _losses(run_dir)
        kept = {step: loss for step, loss in losses[1].items()}
        new = {step: loss for step, loss in losses[2].items() if step > 60}
        assert _points(database, "train/loss") == sorted((kept | new).items())
        assert _doubled(database) == {}
    assert _only_run(database).info.status == "FINISHED"


def test_any_number_of_crashes_under_a_live_projection_keep_the_run_and_each_step_once(
    make_run: MakeRun, database: str, write_attempt: Callable[..., None]
) -> None:
    run_dir = make_run()
    ids = set()
    # Twice over the same steps; before a checkpoint; without reaching the old furthest step; beyond it.
    for first, last in ((1, 8), (1, 47), (41, 55), (41, 52), (41, 43), (41, 64), (61, 61)):
        _attempt(run_dir, first, last, store=database, write_attempt=write_attempt)
        ids.add(_only_run(database).info.run_id)
        assert _only_run(database).info.status == "RUNNING"
    Journal(run_dir, attempt=7).write("stop", 61, status="finished")
    ids.add(project(run_dir, database, "cctrain")["run_id"])
    assert len(ids) == 1
    assert _steps(database) == list(range(1, 65))
    assert _steps(database, "validation/nll") == [10, 20, 30, 40, 50, 60]
    assert _doubled(database) == {}
    curve = [(1, 1), (1, 2), (40, 2), (41, 3), (41, 4), (41, 5), (41, 6), (60, 6), (61, 7)]
    assert _points(database, "speed/attempt") == curve


def test_a_look_that_an_attempt_repeats_is_there_once(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 50, None))
    first = project(run_dir, database, "cctrain")
    before = _points(database, "validation/nll")
    make_run((26, 49, None))
    journal = Journal(run_dir, attempt=2)
    journal.write("evaluate", 50, nll=before[1][1] * 1.001)
    assert project(run_dir, database, "cctrain") == first
    assert _points(database, "validation/nll") == before


def test_a_resumed_run_under_way_leaves_the_steps_beyond_it_alone(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 60, None))
    first = project(run_dir, database, "cctrain")
    make_run((51, 53, None))
    replay = Replay(run_dir, database, "cctrain")
    assert replay.replay(finished=False) == first
    assert _steps(database) == list(range(1, 61))
    Journal(run_dir, attempt=2).write("step", 54, loss=_losses(run_dir)[1][54], step_seconds=9.0, learning_rate=54e-5)
    replay.follow()
    assert _steps(database) == list(range(1, 61))
    assert _doubled(database) == {}
    assert _only_run(database).info.run_id == first["run_id"]


def test_following_goes_on_behind_the_last_line(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 25, None))
    replay = Replay(run_dir, database, "cctrain")
    replay.replay(finished=False)
    journal = Journal(run_dir)
    journal.write("step", 26, loss=0.5, step_seconds=0.1)
    journal.write("checkpoint", 26, path="checkpoints/step-00000026", seconds=1.25)
    journal.write("step", 27, loss=0.5, step_seconds=0.1)
    replay.follow()
    assert replay.offset == (run_dir / "metrics.jsonl").stat().st_size
    assert _steps(database) == list(range(1, 28))


@pytest.mark.parametrize("rate", [1e-3, 5e-4])
def test_steps_that_mlflow_holds_and_the_journal_lost_with_a_node_keep_the_run_unless_they_differ(
    make_run: MakeRun, database: str, rate: float
) -> None:
    run_dir = make_run((1, 60, None))
    first = project(run_dir, database, "cctrain")
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in read_journal(run_dir) if line["step"] <= 52]
    path.write_bytes(b"".join(whole[: len(kept)]))
    make_run((53, 70, "finished"), rate=rate)
    assert (project(run_dir, database, "cctrain") == first) is (rate == 1e-3)
    assert _steps(database) == list(range(1, 71))
    assert _doubled(database) == {}


# Written anew


def test_a_changed_schedule_over_steps_that_mlflow_holds_writes_the_run_anew_and_says_so(
    make_run: MakeRun, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = make_run((1, 60, None))
    first = project(run_dir, database, "cctrain")
    _client(database).set_tag(first["run_id"], "mine", "kept")
    make_run((51, 55, "finished"), rate=5e-4)
    for _ in range(2):
        identity = project(run_dir, database, "cctrain")
        expected = [(line["step"], line["loss"]) for line in history(read_journal(run_dir)) if line["event"] == "step"]
        assert len(expected) == 60
        assert _points(database, "train/loss") == expected
    assert identity["run_id"] != first["run_id"]
    assert _client(database).get_run(first["run_id"]).info.lifecycle_stage == "deleted"
    assert _only_run(database).data.tags["mine"] == "kept"
    (warning,) = (record.getMessage() for record in caplog.records if record.name.startswith("cctrain"))
    assert warning.startswith("attempt 2 trained step 51 otherwise")
    assert identity["run_id"] in warning
    assert first["run_id"] in warning


def test_a_changed_schedule_that_repeats_nothing_keeps_the_run(make_run: MakeRun, database: str) -> None:
    first = project(make_run((1, 50, "stopped")), database, "cctrain")
    run_dir = make_run((51, 60, "finished"), rate=5e-4)
    assert project(run_dir, database, "cctrain") == first
    assert _steps(database) == list(range(1, 61))


def test_a_run_under_way_that_differs_is_written_anew_once_and_without_the_steps_beyond_it(
    make_run: MakeRun, database: str, write_attempt: Callable[..., None]
) -> None:
    run_dir = make_run((1, 60, None))
    first = project(run_dir, database, "cctrain")
    write_attempt(run_dir, 51, 50, None)
    replay = Replay(run_dir, database, "cctrain")
    replay.replay(finished=False)
    assert replay.run_id == first["run_id"]
    journal = Journal(run_dir, attempt=2)
    ids = []
    for step in range(51, 55):
        journal.write("step", step, loss=0.25, learning_rate=1e-5, samples=f"{step:064x}", step_seconds=0.1)
        replay.follow()
        ids.append(replay.run_id)
    assert len(set(ids)) == 1
    assert ids[0] != first["run_id"]
    assert _points(database, "train/loss")[50:] == [(step, 0.25) for step in range(51, 55)]
    journal.write("stop", 54, status="failed")
    replay.replay(finished=True)
    assert _steps(database) == list(range(1, 61)), "the history has them, so MLflow does"


def test_a_step_that_two_writers_sent_is_repaired(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 10, "finished"))
    first = project(run_dir, database, "cctrain")
    _client(database).log_metric(first["run_id"], "speed/step_seconds", 0.5, step=4)
    assert list(_doubled(database)) == [("speed/step_seconds", 4)]
    assert project(run_dir, database, "cctrain")["run_id"] != first["run_id"]
    assert _doubled(database) == {}
    assert _steps(database) == list(range(1, 11))


def test_an_empty_double_of_the_run_goes_to_the_trash(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 10, None))
    first = project(run_dir, database, "cctrain")
    tags = {"cctrain.run": _only_run(database).data.tags["cctrain.run"]}
    for _ in range(5):  # so that one of their ids comes before the run's
        _client(database).create_run(first["experiment_id"], tags=tags)
    assert project(run_dir, database, "cctrain") == first
    assert _only_run(database).info.run_id == first["run_id"]


# What a person sees


def test_a_restart_is_a_step_of_a_curve_a_tag_and_a_line_of_the_description(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 60, None), (51, 80, "requeue"), (81, 90, "finished"))
    project(run_dir, database, "cctrain")
    curve = [(1, 1), (50, 1), (51, 2), (80, 2), (81, 3), (90, 3)]
    assert _points(database, "speed/attempt") == curve
    tags = _only_run(database).data.tags
    assert [text.partition(",")[0] for text in tags["cctrain.restarts"].splitlines()] == [
        "attempt 3 from step 80",
        "attempt 2 from step 50",
    ]
    assert f"- {tags['cctrain.restarts'].splitlines()[0]}\n" in tags["mlflow.note.content"]
    assert tags["cctrain.attempts"] == "3"


def test_the_status_follows_the_run_through_its_life(make_run: MakeRun, database: str) -> None:
    statuses = []
    for attempt in ((1, 10, "requeue"), (11, 20, "stopped"), (21, 30, "failed"), (31, 40, "finished")):
        run_dir = make_run(attempt)
        replay = Replay(run_dir, database, "cctrain")
        replay.replay(finished=False)
        statuses.append(_only_run(database).info.status)
        replay.replay(finished=True)
        statuses.append(_only_run(database).info.status)
        if attempt[2] in ("requeue", "stopped"):
            assert _only_run(database).info.end_time is None, "MLflow could not take it back"
    assert statuses[::2] == ["RUNNING"] * 4
    assert statuses[1::2] == ["KILLED", "KILLED", "FAILED", "FINISHED"]
    assert _only_run(database).info.end_time


def test_the_seconds_of_a_checkpoint_are_a_speed_at_the_step_after_it(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 101, None))
    project(run_dir, database, "cctrain")
    assert _points(database, "speed/checkpoint_seconds") == [(51, 0.75), (101, 0.75)]
    assert _only_run(database).data.tags["cctrain.last_checkpoint"] == "100"


# Into another store


def test_sync_after_restarts_fills_a_second_store_with_the_history_and_a_second_sync_sends_nothing(
    make_run: MakeRun, database: str, empty_database: Path, tmp_path: Path
) -> None:
    run_dir = make_run((1, 60, None))
    project(run_dir, database, "cctrain")
    make_run((51, 80, "requeue"), (81, 90, "finished"))
    project(run_dir, database, "cctrain")
    other = tmp_path / "other.db"
    other.write_bytes(empty_database.read_bytes())
    uri = f"sqlite:///{other}"
    done = sync([run_dir], uri)
    expected = [(line["step"], line["loss"]) for line in history(read_journal(run_dir)) if line["event"] == "step"]
    assert _points(uri, "train/loss") == expected
    assert _points(uri, "speed/attempt") == _points(database, "speed/attempt")
    assert _doubled(uri) == {}
    sent: list[tuple[int, int]] = []
    assert project(run_dir, uri, "cctrain", progress=lambda *numbers: sent.append(numbers)) == done[0]
    assert sent == []
    assert sync([run_dir], uri) == done


def test_a_resumed_live_projection_shows_the_restart_at_once(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 60, None))
    first = project(run_dir, database, "cctrain")
    make_run((51, 52, None))
    live = LiveProjection(run_dir, database, "cctrain", every=60.0)
    live.start()
    deadline = time.monotonic() + 30
    while _only_run(database).info.status != "RUNNING" or "cctrain.restarts" not in _only_run(database).data.tags:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert _points(database, "speed/attempt") == [(1, 1), (50, 1), (51, 2)]
    assert _only_run(database).info.run_id == first["run_id"]
    live.close()


def test_runs_that_start_at_the_same_moment_share_a_new_experiment(make_run: MakeRun, database: str) -> None:
    runs = [make_run((1, 5, "finished"), name=f"run-{number}") for number in range(6)]
    together = threading.Barrier(len(runs))
    found = []

    def start(run_dir: Path) -> None:
        replay = Replay(run_dir, database, "new")
        together.wait()
        found.append(replay.replay()["experiment_id"])

    threads = [threading.Thread(target=start, args=(run_dir,)) for run_dir in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(runs)
    assert len(set(found)) == 1
