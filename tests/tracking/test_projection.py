"""The projection, read back with MLflow's own client."""

import gc
import json
import logging
import math
import sqlite3
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cctrain.config import load_config, to_yaml
from cctrain.errors import UsageError
from cctrain.tracking import content
from cctrain.tracking.content import status_of, thinned, without_steps_to_repeat
from cctrain.tracking.journal import Journal, history, read_journal
from cctrain.tracking.projection import LiveProjection, project, sync
from cctrain.tracking.replay import batches

MakeRun = Callable[..., Path]
METRICS_OF_A_STEP = 19


def _client(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(uri)


def _only_run(uri: str) -> Any:
    client = _client(uri)
    experiment = client.get_experiment_by_name("cctrain")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def _points(uri: str, key: str) -> list[tuple[int, float]]:
    run_id = _only_run(uri).info.run_id
    return sorted((point.step, point.value) for point in _client(uri).get_metric_history(run_id, key))


def _num_stored(uri: str) -> int:
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        return connection.execute(
            "select count(*) from metrics join runs using (run_uuid) where lifecycle_stage = 'active'"
        ).fetchone()[0]


# One run


def test_a_run_reads_back_as_it_was_written(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 60, "finished"))
    (run_dir / "evaluation").mkdir()
    (run_dir / "evaluation" / "table.md").write_text("| model | nll |\n")
    (run_dir / "figures" / "deep").mkdir(parents=True)
    (run_dir / "figures" / "deep" / "loss.svg").write_text("<svg/>")
    identity = project(run_dir, database, "cctrain")

    client = _client(database)
    run = client.get_run(identity["run_id"])
    lines = [line for line in read_journal(run_dir) if line["event"] == "step"]
    loss = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in loss] == [(line["step"], line["loss"]) for line in lines]
    first = datetime.fromisoformat(lines[0]["time"]).timestamp() * 1000
    assert abs(loss[0].timestamp - first) <= 1
    assert set(run.data.metrics) == {
        *(f"train/{key}" for key in ("loss", "learning_rate", "grad_norm", "tokens", "targets", "contexts")),
        *(
            f"speed/{key}"
            for key in (
                "step_seconds",
                "data_seconds",
                "communication_seconds",
                "imbalance_seconds",
                "checkpoint_seconds",
            )
        ),
        *(f"speed/{key}_per_second" for key in ("tokens", "contexts", "flops")),
        *(f"cost/{key}" for key in ("n", "M", "n_times_M", "attention_flops", "total_flops")),
        "cost/attention_share",
        *(f"validation/{key}" for key in ("nll", "gene_mean_nll", "difference")),
    }
    for key, counted in (("tokens", "tokens"), ("contexts", "contexts"), ("flops", "cost/total_flops")):
        assert run.data.metrics[f"speed/{key}_per_second"] == lines[-1][counted] / lines[-1]["step_seconds"]
    assert [step for step, _ in _points(database, "validation/nll")] == [25, 50]

    assert run.data.params["model.latents"] == "64"
    assert run.data.params["data.store"] == "stores/pbmc3k"
    assert run.data.tags["mlflow.source.git.commit"] == "0123456789abcdef0123456789abcdef01234567"
    assert run.data.tags["cctrain.world_size"] == "2"
    assert run.data.tags["cctrain.last_checkpoint"] == "50"
    assert "64 latents" in run.data.tags["mlflow.note.content"]
    assert "Step 60 of 60, in 1 attempt;" in run.data.tags["mlflow.note.content"]
    assert (run.info.status, run.info.run_name) == ("FINISHED", "cell")
    experiment = client.get_experiment_by_name("cctrain")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"

    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_relative_to(run_dir.parent / "mlflow-artifacts")
    assert (artifacts / "config.yaml").read_text() == (run_dir / "config.yaml").read_text()
    listed = [item.path for item in client.list_artifacts(run.info.run_id)]
    assert listed == ["config.yaml", "evaluation", "figures"]
    assert (artifacts / "figures" / "deep" / "loss.svg").is_file()
    assert json.loads((run_dir / "mlflow.json").read_text()) == identity


def test_a_second_replay_changes_nothing(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 60, "finished"))
    first = project(run_dir, database, "cctrain")
    num_stored = _num_stored(database)
    assert num_stored == 60 * METRICS_OF_A_STEP + 2 * 3 + 1  # two looks, and one step after a checkpoint
    assert project(run_dir, database, "cctrain") == first
    (run_dir / "mlflow.json").unlink()
    assert project(run_dir, database, "cctrain") == first
    assert _num_stored(database) == num_stored


def test_a_second_replay_sends_no_step(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 40, "preempted"))
    sent: list[tuple[int, int]] = []
    project(run_dir, database, "cctrain", progress=lambda *numbers: sent.append(numbers))
    assert sent == [(41, 41)]
    sent.clear()
    project(run_dir, database, "cctrain", progress=lambda *numbers: sent.append(numbers))
    assert sent == []


def test_a_batch_holds_at_most_a_thousand_metrics_and_never_part_of_a_step(make_run: MakeRun) -> None:
    steps = [line for line in read_journal(make_run((1, 150, None))) if line["event"] == "step"]
    found = list(batches([line | {"memory/bytes": 1, "checkpoint_seconds": 0.0} for line in steps]))
    assert [len(metrics) for metrics, _ in found] == [987, 987, 987, 189]
    assert [num_lines for _, num_lines in found] == [47, 47, 47, 9]
    assert {metric.step for metric in found[0][0]} == set(range(1, 48))
    assert list(batches([])) == []


def test_more_than_a_batch_of_metrics_arrives_whole(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 150, "finished"))
    project(run_dir, database, "cctrain")
    assert [step for step, _ in _points(database, "cost/M")] == list(range(1, 151))


def test_a_step_of_more_metrics_than_a_batch_holds_arrives_whole_and_its_marker_last(
    make_run: MakeRun, database: str
) -> None:
    run_dir = make_run((1, 1, None))
    gpus = {f"system/node-{n // 8}/gpu_{n % 8}_utilization_percentage": float(n) for n in range(2100)}
    Journal(run_dir, attempt=1).write("step", 2, loss=0.5, step_seconds=0.5, **gpus)
    [line] = [line for line in read_journal(run_dir) if line["step"] == 2]
    found = list(batches([line]))
    assert [(len(metrics), num_lines) for metrics, num_lines in found] == [(1000, 0), (1000, 0), (102, 1)]
    assert found[-1][0][-1].key == content.STEP_MARKER
    project(run_dir, database, "cctrain")
    assert _num_stored(database) == METRICS_OF_A_STEP + 2102
    assert project(run_dir, database, "cctrain")
    assert _num_stored(database) == METRICS_OF_A_STEP + 2102


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 50, "preempted"))
    first = project(run_dir, database, "cctrain")
    assert _only_run(database).info.status == "KILLED"
    make_run((51, 60, "finished"))
    assert project(run_dir, database, "cctrain") == first
    assert [step for step, _ in _points(database, "train/loss")] == list(range(1, 61))
    assert _only_run(database).info.status == "FINISHED"


def test_a_later_start_line_with_another_identifier_does_not_lose_the_run(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 5, "interrupted"))
    first = project(run_dir, database, "cctrain")
    Journal(run_dir).write("start", 5, run="another", world_size=8)
    for _ in range(2):
        assert project(run_dir, database, "cctrain") == first
    assert _only_run(database).data.tags["cctrain.world_size"] == "8"


def test_the_seconds_of_an_evaluation_are_a_speed(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 3, None))
    Journal(run_dir, attempt=1).write("evaluate", 3, nll=0.5, seconds=1.5)
    project(run_dir, database, "cctrain")
    assert _points(database, "speed/evaluate_seconds") == [(3, 1.5)]


def test_a_journal_from_before_steps_told_what_checkpoints_took_is_replayed_without_that_chart(
    make_run: MakeRun, database: str
) -> None:
    run_dir = make_run((1, 60, "finished"))
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("checkpoint_seconds", None)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    project(run_dir, database, "cctrain")
    assert [step for step, _ in _points(database, "train/loss")] == list(range(1, 61))
    assert "speed/checkpoint_seconds" not in _only_run(database).data.metrics
    assert _only_run(database).data.tags["cctrain.last_checkpoint"] == "50"


def test_a_run_under_way_waits_for_the_steps_it_will_repeat(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 60, None), (51, 53, None))
    counted = without_steps_to_repeat(history(read_journal(run_dir)))
    assert max(line["step"] for line in counted if line["event"] == "step") == 53
    project(run_dir, database, "cctrain", finished=False)
    assert [step for step, _ in _points(database, "train/loss")] == list(range(1, 54))
    assert _only_run(database).info.status == "RUNNING"


def test_a_torn_line_is_not_sent(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 10, None))
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    project(run_dir, database, "cctrain")
    assert [step for step, _ in _points(database, "train/loss")] == list(range(1, 10))


def test_a_value_that_is_not_finite_is_a_gap_and_a_tag(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 3, None))
    journal = Journal(run_dir)
    journal.write("step", 4, loss=math.nan, grad_norm=math.inf, step_seconds=0.1, tokens=5)
    journal.write("step", 5, loss=0.5, grad_norm=1.0, step_seconds=0.1, tokens=5)
    journal.write("stop", 5, status="failed")
    for _ in range(2):
        project(run_dir, database, "cctrain")
        assert [step for step, _ in _points(database, "train/loss")] == [1, 2, 3, 5]
        assert [step for step, _ in _points(database, "speed/step_seconds")] == [1, 2, 3, 4, 5]
        assert all(value < 1e300 for _, value in _points(database, "train/grad_norm"))
    run = _only_run(database)
    assert run.data.tags["cctrain.not_finite"] == "train/loss: nan at step 4; train/grad_norm: inf at step 4"
    assert run.info.status == "FAILED"


def test_a_long_parameter_is_shortened_visibly_and_a_changed_one_is_a_tag(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 3, "killed"))
    config = load_config(run_dir / "config.yaml")
    config.deepspeed = {"zero_optimization": {"note": "x" * 9000}}
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    project(run_dir, database, "cctrain")
    config.parallel.zero_stage = 3
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    project(run_dir, database, "cctrain")
    run = _only_run(database)
    note = run.data.params["deepspeed.zero_optimization.note"]
    assert len(note) == 6000
    assert note.endswith("xxx … (9000 characters in all; see config.yaml)")
    assert run.data.params["parallel.zero_stage"] == "1"
    assert run.data.tags["cctrain.changed.parallel.zero_stage"] == "1 → 3"
    assert [key for key in run.data.tags if "changed" in key] == ["cctrain.changed.parallel.zero_stage"]


def test_a_description_that_a_person_wrote_stays(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 3, "killed"))
    identity = project(run_dir, database, "cctrain")
    _client(database).set_tag(identity["run_id"], "mlflow.note.content", "the good one")
    project(run_dir, database, "cctrain")
    assert _only_run(database).data.tags["mlflow.note.content"] == "the good one"


def test_a_password_in_the_configuration_reaches_neither_parameters_nor_files(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 3, "killed"), uri="postgresql://ann:s3cret@host/db")
    project(run_dir, database, "cctrain")
    run = _only_run(database)
    assert run.data.params["tracking.uri"] == "postgresql://host/db"
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert "s3cret" not in (artifacts / "config.yaml").read_text()
    assert b"s3cret" not in Path(database.removeprefix("sqlite:///")).read_bytes()
    assert "s3cret" not in (run_dir / "mlflow.json").read_text()


def test_without_a_stop_line_silence_decides_the_status(make_run: MakeRun) -> None:
    lines = read_journal(make_run((1, 3, None)))
    last = datetime.fromisoformat(lines[-1]["time"])
    assert status_of(lines, last + timedelta(minutes=1)) == "RUNNING"
    assert status_of(lines, last + timedelta(hours=1)) == "KILLED"


def test_a_deleted_experiment_is_an_error_that_says_so(make_run: MakeRun, database: str) -> None:
    client = _client(database)
    client.delete_experiment(client.create_experiment("cctrain"))
    with pytest.raises(UsageError, match="experiment cctrain was deleted"):
        project(make_run((1, 3, None)), database, "cctrain")


# Long runs


@pytest.mark.parametrize(("num_steps", "stride"), [(6_000, 1), (6_001, 2), (100_000, 32)])
def test_of_a_long_run_the_last_thousand_steps_are_chosen_and_at_most_five_thousand_before(num_steps, stride) -> None:
    steps = [{"event": "step", "step": step} for step in range(1, num_steps + 1)]
    looks = [{"event": "evaluate", "step": 77}]
    chosen = thinned([*looks, *steps])
    assert chosen[:1] == looks
    taken = [line["step"] for line in chosen[1:]]
    last = num_steps - 1000
    assert taken == [*range(stride, last + 1, stride), *range(last + 1, num_steps + 1)]
    assert last // stride <= 5000 < 2 * last // stride or stride == 1


def test_of_a_long_run_every_step_that_a_checkpoint_kept_waiting_is_chosen() -> None:
    steps = [{"event": "step", "step": step, "checkpoint_seconds": float(step == 501)} for step in range(1, 20_001)]
    taken = [line["step"] for line in thinned(steps)]
    assert [step for step in taken if step < 1000 and step % 4] == [501]


def a_step(step: int) -> dict[str, Any]:
    """Nodes are looked at in every fourth one, beginning with the first."""
    return {"event": "step", "step": step} | ({"system/node-0/cpu_percent": 50.0} if step % 4 == 1 else {})


@pytest.mark.parametrize("num_steps", [20_000, 100_000])
def test_of_a_long_run_there_are_as_many_looks_at_nodes_as_other_points(num_steps: int) -> None:
    lines = thinned([a_step(step) for step in range(1, num_steps + 1)])
    earlier = [line for line in lines if line["step"] <= num_steps - 1000]
    looks = [line["step"] for line in earlier if "system/node-0/cpu_percent" in line]
    assert len(earlier) <= 5000
    assert len(looks) >= len(earlier) // 2
    stride = earlier[3]["step"] - earlier[1]["step"]
    assert looks == list(range(1, num_steps - 1000 + 1, stride))


def test_a_long_run_that_goes_on_needs_no_step_that_was_not_chosen_before() -> None:
    def chosen(num_steps: int) -> set[int]:
        return {line["step"] for line in thinned([a_step(step) for step in range(1, num_steps + 1)])}

    assert all(chosen(num) & set(range(9_001)) <= chosen(9_000) for num in (9_500, 20_000, 50_000))


def test_sync_thins_a_long_run_adds_nothing_the_second_time_and_sends_every_step_if_told(
    make_run: MakeRun, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "LATEST_STEPS", 10)
    monkeypatch.setattr(content, "EARLIER_STEPS", 30)
    run_dir = make_run((1, 60, None), (51, 100, "finished"))
    for _ in range(2):
        sync([run_dir], database)
        assert [step for step, _ in _points(database, "train/loss")] == [*range(4, 91, 4), *range(91, 101)]
        assert [step for step, _ in _points(database, "validation/nll")] == [25, 50, 75, 100]
    sync([run_dir], database, every_step=True)
    assert [step for step, _ in _points(database, "train/loss")] == list(range(1, 101))
    sync([run_dir], database)
    assert len(_points(database, "train/loss")) == 100


# Several runs, and while training


def test_sync_replays_several_runs_into_one_experiment(make_run: MakeRun, database: str) -> None:
    runs = [make_run((1, 5, "finished"), name=name) for name in ("one", "two")]
    results = sync(runs, None, None)  # the database beside them
    assert results[0]["uri"] == database
    assert results[0]["experiment_id"] == results[1]["experiment_id"]
    assert results[0]["run_id"] != results[1]["run_id"]
    assert sync(runs) == results


def test_sync_of_a_folder_without_a_journal_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty holds no journal"):
        sync([tmp_path / "empty"])


def test_sync_to_a_place_that_cannot_be_written_is_a_usage_error(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write .*cell to MLflow"):
        sync([make_run((1, 3, None))], f"sqlite:///{tmp_path}/file/mlflow.db")


def test_sync_under_slurm_asks_for_a_uri(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(UsageError, match="--uri"):
        sync([make_run((1, 3, None))])


def test_steps_arrive_while_the_run_goes_on_and_each_once(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 5, None))
    live = LiveProjection(run_dir, database, "cctrain", every=0.1)
    live.start()
    _wait_for(lambda: (run_dir / "mlflow.json").is_file() and _num_stored(database) == 5 * METRICS_OF_A_STEP)
    journal = Journal(run_dir, attempt=1)
    for step in range(6, 9):
        journal.write("step", step, loss=1.0 / step, step_seconds=0.1, tokens=10)
    _wait_for(lambda: _num_stored(database) == 5 * METRICS_OF_A_STEP + 3 * 4)
    assert _only_run(database).info.status == "RUNNING"
    journal.write("step", 9, loss=1.0 / 9, step_seconds=0.1, tokens=10)
    journal.write("stop", 9, status="finished")
    live.close()
    assert [step for step, _ in _points(database, "train/loss")] == list(range(1, 10))
    assert _only_run(database).info.status == "FINISHED"


def test_the_garbage_collector_leaves_out_what_mlflow_loads(make_run: MakeRun, database: str) -> None:
    run_dir = make_run((1, 5, None))
    gc.unfreeze()
    assert any(one is MlflowClient for one in gc.get_objects())
    live = LiveProjection(run_dir, database, "cctrain", every=0.1)
    live.start()
    try:
        _wait_for(lambda: gc.get_freeze_count() > 0)
        assert not any(one is MlflowClient for one in gc.get_objects())
    finally:
        live.close()
        gc.unfreeze()


@pytest.mark.parametrize("uri", ["sqlite:///{}/file/mlflow.db", "http://ann:s3cret@127.0.0.1:9", "mlruns"])
def test_a_tracking_error_is_one_warning_with_the_way_out_and_never_an_exception(
    make_run: MakeRun,
    tmp_path: Path,
    uri: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "file").write_text("")
    run_dir = make_run((1, 5, None))
    with caplog.at_level(logging.INFO, logger="cctrain"):
        live = LiveProjection(run_dir, uri.format(tmp_path), "cctrain", every=0.05)
        live.start()
        _wait_for(lambda: bool(caplog.records))
        time.sleep(0.3)
        live.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert f"cctrain sync {run_dir}" in warnings[0]
    assert "s3cret" not in caplog.text


def test_a_store_that_comes_back_receives_everything(
    make_run: MakeRun, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(database.removeprefix("sqlite:///"))
    away = path.rename(path.with_name("away"))
    path.mkdir()
    run_dir = make_run((1, 5, "finished"))
    live = LiveProjection(run_dir, database, "cctrain", every=0.05)
    live.start()
    _wait_for(lambda: bool(caplog.records))
    path.rmdir()
    away.rename(path)
    live.close()
    assert [step for step, _ in _points(database, "train/loss")] == [1, 2, 3, 4, 5]
    assert len(caplog.records) == 1


def test_close_waits_no_longer_than_it_was_told(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture, silent_server: str
) -> None:
    live = LiveProjection(make_run((1, 5, None)), silent_server, "cctrain", close_within=0.5)
    live.start()
    begin = time.monotonic()
    live.close()
    assert time.monotonic() - begin < 5
    assert "cctrain sync" in caplog.text


def _wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
