"""A sweep in MLflow: one parent run, and a child for each point. Sent as often as one likes, it is there once.

The parent has the curves, with n in the place of the step, the fits, and report, table and figures as files; a child
has one point. Runs are found again by the sweep's identifier, so that a second call, or one after a server that failed
half-way, completes what is there. A child whose point was measured again is replaced.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cctrain.apply.scaling.analysis import CRISS_CROSS_TERMS, THEORY
from cctrain.apply.scaling.description import point_description, sweep_description
from cctrain.apply.scaling.points import DENSE, Row
from cctrain.run_directory import CONFIG, write_atomically
from cctrain.tracking.address import artifact_folder, check_uri, resolve_uri, strip_credentials
from cctrain.tracking.client import connect, find_experiment
from cctrain.tracking.content import milliseconds, parameters_of
from cctrain.tracking.description import is_own_description

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SWEEP_TAG, POINT_TAG, TIME_TAG = "cctrain.sweep", "cctrain.point", "cctrain.time"
PARENT_TAG, NOTE_TAG = "mlflow.parentRunId", "mlflow.note.content"
ENDED = ("FINISHED", "KILLED")
_MAX_PER_BATCH = 100
_MAX_METRICS = 1000
_NOT_ALLOWED = re.compile(r"[^/\w.\- :]")


def track(
    folder: Path, sweep: str, rows: dict[str, Row], found: dict[str, Any], artifacts: list[Path], uri: str, name: str
) -> dict[str, Any]:
    """Bring the experiment `name` of an MLflow store up to these rows; writes DIR/mlflow.json, and returns it.

    Raises UsageError for a URI that is refused, and MLflow's own errors.
    """
    # A dead server must be noticed in seconds here; MLflow's own patience is several minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    check_uri(uri)
    uri = resolve_uri(uri)
    client = connect(uri)
    experiment = find_experiment(client, name, artifact_folder(uri, folder))
    there = list(_runs_of(client, experiment, sweep))
    parent = next((run for run in there if POINT_TAG not in run.data.tags), None)
    if parent is None:
        parent = client.create_run(
            experiment,
            start_time=min(map(_began, rows.values()), default=None),
            tags={SWEEP_TAG: sweep, "mlflow.runName": folder.resolve().name},
        )
    identity = {
        "uri": strip_credentials(uri),
        "experiment": name,
        "experiment_id": experiment,
        "run_id": parent.info.run_id,
        "children": {},
    }
    children = {run.data.tags[POINT_TAG]: run for run in there if POINT_TAG in run.data.tags}
    for row in rows.values():
        run_id = _child(client, experiment, sweep, parent.info.run_id, row, children.get(row["key"]))
        identity["children"][row["key"]] = run_id
    _describe_parent(client, parent, folder, rows, found)
    for path in artifacts:
        within = path.parent.relative_to(folder).as_posix()
        client.log_artifact(parent.info.run_id, str(path), None if within == "." else within)
    client.set_terminated(parent.info.run_id, "FINISHED", end_time=max(map(milliseconds, rows.values()), default=None))
    write_atomically(folder / "mlflow.json", json.dumps(identity, indent=2).encode() + b"\n")
    return identity


def point_metrics(row: Row) -> dict[str, float]:
    """By MLflow name; of a point that was left out, what the closed form says of it."""
    metrics = {
        "cost/n": row["tokens"],
        "cost/parameters": row["parameters"],
        "cost/total_flops": row["flops"],
        "cost/attention_flops": row["flops"] * row["attention_share_of_flops"],
        "cost/attention_share": row["attention_share_of_flops"],
    }
    if row["latents"] is not None:
        metrics |= {"cost/M": row["latents"], "cost/n_times_M": row["tokens"] * row["latents"]}
    if "step_seconds" in row:
        metrics |= {
            "cost/attention_share_of_time": row["attention_share_of_time"],
            "cost/memory_bytes": row["memory_bytes"],
            "speed/step_seconds": row["step_seconds"],
            "speed/attention_seconds": row["attention_seconds"],
            "speed/rest_seconds": row["step_seconds"] - row["attention_seconds"],
            "speed/warm_up_seconds": row["timings"]["warm_up"],
            "speed/tokens_per_second": row["tokens_per_second"],
            "speed/utilisation": row["utilisation"],
        }
    return {name: float(value) for name, value in metrics.items()}


def fit_metrics(found: dict[str, Any]) -> dict[str, float]:
    """Exponents with their intervals, the law of the whole step, crossovers."""
    metrics: dict[str, float | None] = {}
    for name in THEORY:
        if (law := found["attention"][name]) is not None:
            of = _plain(f"attention in {name}")
            metrics |= {
                f"cost/exponent of {of}": law["exponent"],
                f"cost/exponent of {of}: low": law["low"],
                f"cost/exponent of {of}: high": law["high"],
                f"cost/R2 of {of}": law["r_squared"],
            }
    law = found["total"]["criss-cross"]
    for letter, term in zip("abce", CRISS_CROSS_TERMS, strict=True):
        metrics[f"cost/total: {letter}"] = law["coefficients"][term]["value"] if law else None
    for crossing in found["crossovers"]:
        name = _plain(f"{DENSE[crossing['against']]}, M = {crossing['latents']}")
        metrics[f"cost/crossover with {name}"] = crossing["tokens"]
    return {name: float(value) for name, value in metrics.items() if value is not None}


def _runs_of(client: "MlflowClient", experiment: str, sweep: str) -> Iterator["Run"]:
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.`{SWEEP_TAG}` = '{sweep}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _child(client: "MlflowClient", experiment: str, sweep: str, parent: str, row: Row, there: "Run | None") -> str:
    """The run of this point, made if it is missing, and made anew if it is of another measurement or not whole."""
    from mlflow.entities import Metric, Param

    if there is not None:
        if there.data.tags.get(TIME_TAG) == row["time"] and there.info.status in ENDED:
            return there.info.run_id
        client.delete_run(there.info.run_id)
    time = milliseconds(row)
    tags = {
        "mlflow.runName": row["key"],
        PARENT_TAG: parent,
        SWEEP_TAG: sweep,
        POINT_TAG: row["key"],
        TIME_TAG: row["time"],
        NOTE_TAG: point_description(row),
    }
    if row["commit"]:
        tags["mlflow.source.git.commit"] = row["commit"]
    if "left_out" in row:
        tags["cctrain.left_out"] = row["left_out"]
    run = client.create_run(experiment, start_time=_began(row), tags=tags).info.run_id
    keys = ("name", "kind", "attention", "latents", "context_ranks", "depth", "tokens")
    client.log_batch(
        run,
        metrics=[Metric(name, value, time, row["tokens"]) for name, value in point_metrics(row).items()],
        params=[Param(key, str(row[key])) for key in keys],
        synchronous=True,
    )
    client.set_terminated(run, "KILLED" if "left_out" in row else "FINISHED", end_time=time)
    return run


def _began(row: Row) -> int:
    """In milliseconds; of a point that does not say it, when it was kept."""
    return milliseconds({"time": row.get("began", row["time"])})


def _describe_parent(
    client: "MlflowClient", parent: "Run", folder: Path, rows: dict[str, Row], found: dict[str, Any]
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    run, known = parent.info.run_id, parent.data
    points = list(_curve_points(rows.values()))
    sent = {
        (name, point.step, point.timestamp)
        for name in {name for name, *_ in points} & known.metrics.keys()
        for point in client.get_metric_history(run, name)
    }
    metrics = [Metric(name, value, time, step) for name, value, time, step in points if (name, step, time) not in sent]
    now = max(map(milliseconds, rows.values()), default=0)
    fits = fit_metrics(found)
    metrics += [Metric(name, value, now, 0) for name, value in fits.items() if known.metrics.get(name) != value]
    configuration = parameters_of(folder / CONFIG)
    params = [Param(key, value) for key, value in configuration.items() if key not in known.params]
    tags = {"cctrain.points": str(len(rows)), "cctrain.left_out": str(sum("left_out" in row for row in rows.values()))}
    if is_own_description(known.tags.get(NOTE_TAG, "")):
        tags[NOTE_TAG] = sweep_description(rows.values(), found, configuration)
    for begin in range(0, len(metrics), _MAX_METRICS):
        client.log_batch(run, metrics=metrics[begin : begin + _MAX_METRICS], synchronous=True)
    for begin in range(0, len(params), _MAX_PER_BATCH):
        client.log_batch(run, params=params[begin : begin + _MAX_PER_BATCH], synchronous=True)
    changed = [RunTag(key, value) for key, value in tags.items() if known.tags.get(key) != value]
    client.log_batch(run, tags=changed, synchronous=True)


def _curve_points(rows: Iterable[Row]) -> Iterator[tuple[str, float, int, int]]:
    """(name, value, time, n)."""
    for row in rows:
        if "step_seconds" in row:
            for name in ("speed/step_seconds", "speed/attention_seconds", "cost/memory_bytes"):
                value = point_metrics(row)[name]
                yield f"{name} {_plain(row['name'])}", value, milliseconds(row), row["tokens"]


def _plain(name: str) -> str:
    """Without what MLflow does not allow in a name."""
    return " ".join(_NOT_ALLOWED.sub("", name.replace("n²", "n2")).split())
