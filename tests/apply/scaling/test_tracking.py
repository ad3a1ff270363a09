"""A sweep in MLflow: a parent, a child for each point, and the same once more when it is sent again."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from cctrain.apply.scaling import tracking
from cctrain.apply.scaling.analysis import analyse
from cctrain.apply.scaling.tracking import NOTE_TAG, PARENT_TAG, POINT_TAG, track
from cctrain.config import Config, to_yaml
from tests.apply.scaling.sweeps import a_plan, a_row, rows_of

SHORT, NAME = a_plan([4096, 8192], [32, 64]), "cctrain"


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "runs" / "cell-scaling"
    (folder / "figures").mkdir(parents=True)
    config = Config()
    config.data.store = "none"
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "report.md").write_text("found")
    (folder / "figures" / "cost.svg").write_text("<svg/>")
    return folder


@pytest.fixture
def send(folder, database):
    artifacts = [folder / "report.md", folder / "figures" / "cost.svg"]
    return lambda rows: track(folder, "sweep", rows, analyse(rows.values()), artifacts, database, NAME)


@pytest.fixture
def client(database):
    import mlflow

    return mlflow.MlflowClient(database)


def everything(client, identity) -> dict:
    """Of every run: its tags, parameters and the history of its metrics."""
    runs = client.search_runs([identity["experiment_id"]])
    return {
        run.info.run_id: (
            run.data.tags,
            run.data.params,
            {
                key: [p.to_dictionary() for p in client.get_metric_history(run.info.run_id, key)]
                for key in run.data.metrics
            },
        )
        for run in runs
    }


def test_a_parent_has_a_child_for_each_point_with_its_cost_and_speed(send, client, folder):
    rows = rows_of(SHORT)
    identity = send(rows)
    assert json.loads((folder / "mlflow.json").read_text()) == identity
    assert identity["children"].keys() == rows.keys()
    for key, run_id in identity["children"].items():
        run, row = client.get_run(run_id), rows[key]
        assert run.data.tags[PARENT_TAG] == identity["run_id"]
        assert run.info.run_name == key
        assert run.info.status == "FINISHED"
        assert run.data.metrics["speed/step_seconds"] == row["step_seconds"]
        assert run.data.metrics["cost/attention_share"] == row["attention_share_of_flops"]
        assert run.data.metrics["cost/n"] == row["tokens"]


def test_the_parent_has_curves_over_n_exponents_parameters_and_files(send, client):
    rows = rows_of(SHORT)
    run_id = send(rows)["run_id"]
    run = client.get_run(run_id)
    curve = client.get_metric_history(run_id, "speed/attention_seconds criss-cross M 64")
    assert {p.step: p.value for p in curve} == {
        n: rows[f"criss-cross, M = 64, n = {n}"]["attention_seconds"] for n in (4096, 8192)
    }
    assert run.data.metrics["cost/exponent of attention in nM"] == pytest.approx(1)
    assert run.data.params["model.width"] == "256"
    assert [file.path for file in client.list_artifacts(run_id)] == ["figures", "report.md"]


def test_the_sweep_and_its_points_begin_when_their_measuring_began(send, client):
    rows = rows_of(SHORT)
    began = [f"2026-01-02T03:{minute:02}:00+00:00" for minute in range(len(rows))]
    for row, time in zip(rows.values(), began, strict=True):
        row["began"] = time
    identity = send(rows)
    milliseconds = [datetime.fromisoformat(time).timestamp() * 1000 for time in began]
    assert client.get_run(identity["run_id"]).info.start_time == milliseconds[0]
    assert [client.get_run(run).info.start_time for run in identity["children"].values()] == milliseconds


def test_a_point_kept_by_an_older_version_begins_when_it_was_kept(send, client):
    rows = rows_of(SHORT)
    kept = datetime.fromisoformat(next(iter(rows.values()))["time"]).timestamp() * 1000
    assert client.get_run(send(rows)["run_id"]).info.start_time == kept


def test_a_description_that_a_person_wrote_stays(send, client):
    rows = rows_of(SHORT)
    run_id = send(rows)["run_id"]
    assert "scaling sweep" in client.get_run(run_id).data.tags[NOTE_TAG]
    client.set_tag(run_id, NOTE_TAG, "the good one")
    send(rows)
    assert client.get_run(run_id).data.tags[NOTE_TAG] == "the good one"


def test_the_same_call_again_adds_nothing(send, client):
    rows = rows_of(SHORT)
    identity = send(rows)
    before = everything(client, identity)
    assert send(rows) == identity
    assert everything(client, identity) == before
    assert len(before) == 1 + len(rows)


def test_further_points_join_the_same_parent(send, client):
    first = send(rows_of(SHORT))
    second = send(rows_of(a_plan([4096, 8192, 16384], [32, 64])))
    assert second["run_id"] == first["run_id"]
    assert first["children"].items() <= second["children"].items()
    assert len(everything(client, second)) == 1 + 12


def test_a_point_that_was_left_out_has_a_child_that_says_why_and_no_time(send, client):
    rows = rows_of(SHORT)
    point = SHORT.points[-1]
    rows[point.key] = a_row(point, left_out="out of memory")
    run = client.get_run(send(rows)["children"][point.key])
    assert run.info.status == "KILLED"
    assert run.data.tags["cctrain.left_out"] == "out of memory"
    assert not [name for name in run.data.metrics if name.startswith("speed/")]


def test_a_point_that_was_measured_after_all_replaces_its_child(send, client):
    rows, point = rows_of(SHORT), SHORT.points[-1]
    left_out = rows | {point.key: a_row(point, left_out="over budget")}
    before = send(left_out)
    rows[point.key]["time"] = "2026-02-02T03:04:05+00:00"
    after = send(rows)
    assert after["children"][point.key] != before["children"][point.key]
    children = [tags.get(POINT_TAG) for tags, *_ in everything(client, after).values()]
    assert children.count(point.key) == 1


def test_a_call_that_broke_off_is_completed_without_duplicates(send, client, monkeypatch):
    rows, whole = rows_of(SHORT), tracking.point_metrics
    broken = SHORT.points[3].key

    def break_off(row):
        if row["key"] == broken:
            raise ConnectionError
        return whole(row)

    monkeypatch.setattr(tracking, "point_metrics", break_off)
    with pytest.raises(ConnectionError):
        send(rows)
    monkeypatch.setattr(tracking, "point_metrics", whole)
    identity = send(rows)
    kept = everything(client, identity)
    assert len(kept) == 1 + len(rows)
    assert identity["children"].keys() == rows.keys()
