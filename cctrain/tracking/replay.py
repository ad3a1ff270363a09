"""One run in one MLflow store: find it or create it, ask what has arrived, send the rest.

Points are identified by their step and by the time of the journal line that they come from. MLflow cannot
replace a point, so when it holds points that no longer belong to the history (a crash, then a later attempt
over the same steps), the run is written anew under a new MLflow run id, and the old one goes to MLflow's
trash, which `mlflow gc` empties.

Only `MlflowClient` is used, never the process-wide state of the fluent interface, and MLflow is imported
when it is needed and not before.
"""

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cctrain.errors import UsageError
from cctrain.tracking.address import artifact_folder, check_uri, resolve_uri, sqlite_path, strip_credentials
from cctrain.tracking.content import (
    EVALUATE_GROUP,
    STEP_MARKER,
    Line,
    changes_of,
    description_of,
    is_own_description,
    metrics_of,
    milliseconds,
    parameters_of,
    status_of,
    tags_of,
    without_steps_to_repeat,
)
from cctrain.tracking.journal import MEASURED_EVENTS, history, read_journal_from

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # steps sent, steps to send

_RUN_TAG = "cctrain.run"
_ARTIFACT_FOLDERS = ("evaluation", "figures")
_MAX_METRICS = 1000  # of MLflow, a batch
_MAX_PER_BATCH = 100  # parameters or tags
# Says that the experiment is model training, not traces of a language model. From MLflow 3.17 on the page
# goes by its address instead (`ui.run_page`), and this tag decides where the address does not.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class Replay:
    """One run in one store: the client, the MLflow run, and what is known to have arrived."""

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        check_uri(uri)
        self.run_dir, self.uri, self.experiment = Path(run_dir), resolve_uri(uri), experiment
        self.client: MlflowClient = _connect(self.uri)
        self.experiment_id = ""
        self.run_id = ""
        self.offset = 0
        self.held: dict[tuple[str, int], set[int]] = {}  # (event, step) -> times of the lines, milliseconds

    def replay(self, *, finished: bool | None = None, progress: Progress | None = None) -> dict[str, Any]:
        lines, _ = read_journal_from(self.run_dir, 0)
        identifier = next((line["run"] for line in lines if line["event"] == "start" and "run" in line), None)
        if identifier is None:
            raise no_journal(self.run_dir)
        self.experiment_id = self._find_experiment()
        run = self._find_run(identifier) or self._create_run(identifier, lines)
        self.run_id = run.info.run_id
        self.held = self._ask_what_arrived(run)
        # Again, because a training that sends its own steps may have sent some between the two looks.
        lines, self.offset = read_journal_from(self.run_dir, 0)
        status = "RUNNING" if finished is False else status_of(lines)
        if finished is None:
            finished = status != "RUNNING"
        counted = history(lines)
        measured = [
            line
            for line in (counted if finished else without_steps_to_repeat(counted))
            if line["event"] in MEASURED_EVENTS
        ]
        if self._holds_more_than(measured):
            self._begin_anew(run, identifier, lines)

        self._write_identity()  # a page to open while the first steps are still on their way
        self._send([line for line in measured if _place(line) not in self.held], progress)
        self._describe(lines, counted)
        self._send_artifacts()
        self._set_status(status, lines)
        return self._write_identity()

    def follow(self) -> None:
        """Send what was appended to the journal since the last call."""
        lines, offset = read_journal_from(self.run_dir, self.offset)
        measured = [line for line in lines if line["event"] in MEASURED_EVENTS]
        if any(_place(line) in self.held for line in measured):
            self.replay(finished=False)
            return
        self._send(measured, None)
        self.offset = offset

    def _find_experiment(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            folder = artifact_folder(self.uri, self.run_dir)
            location = None if folder is None else folder.as_uri()
            return self.client.create_experiment(self.experiment, artifact_location=location, tags=_EXPERIMENT_TAGS)
        if found.lifecycle_stage != "active":
            raise UsageError(
                f"the MLflow experiment {self.experiment} was deleted: restore it there, or choose "
                "another tracking.experiment"
            )
        for key, value in _EXPERIMENT_TAGS.items():
            if key not in found.tags:
                self.client.set_experiment_tag(found.experiment_id, key, value)
        return found.experiment_id

    def _find_run(self, identifier: str) -> "Run | None":
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{_RUN_TAG}` = '{identifier}'",
            order_by=["attributes.start_time DESC"],
        )
        return found[0] if found else None

    def _create_run(self, identifier: str, lines: list[Line], tags: dict[str, str] | None = None) -> "Run":
        name = {"mlflow.runName": self.run_dir.resolve().name}
        return self.client.create_run(
            self.experiment_id,
            start_time=milliseconds(lines[0]),
            tags={**name, **(tags or {}), _RUN_TAG: identifier},
        )

    def _begin_anew(self, old: "Run", identifier: str, lines: list[Line]) -> None:
        # The name and the tags that people gave the run move with it.
        tags = {key: value for key, value in old.data.tags.items() if not key.startswith("cctrain.")}
        tags.setdefault("mlflow.runName", old.info.run_name)
        self.client.delete_run(old.info.run_id)
        run = self._create_run(identifier, lines, tags)
        self.run_id, self.held = run.info.run_id, {}
        log.info("a later attempt replaced steps that MLflow already had: written anew as run %s", self.run_id)

    def _ask_what_arrived(self, run: "Run") -> dict[tuple[str, int], set[int]]:
        markers = [("step", STEP_MARKER)] if STEP_MARKER in run.data.metrics else []
        markers += [("evaluate", key) for key in run.data.metrics if key.startswith(EVALUATE_GROUP)]
        held: dict[tuple[str, int], set[int]] = {}
        for event, key in markers:
            for point in self.client.get_metric_history(run.info.run_id, key):
                held.setdefault((event, point.step), set()).add(point.timestamp)
        return held

    def _holds_more_than(self, measured: list[Line]) -> bool:
        times = {_place(line): {milliseconds(line)} for line in measured}
        return any(not found <= times.get(place, set()) for place, found in self.held.items())

    def _send(self, measured: list[Line], progress: Progress | None) -> None:
        sent = 0
        for batch, num_lines in batches(measured):
            self.client.log_batch(self.run_id, metrics=batch, synchronous=True)
            for line in measured[sent : sent + num_lines]:
                self.held.setdefault(_place(line), set()).add(milliseconds(line))
            sent += num_lines
            if progress is not None:
                progress(sent, len(measured))

    def _describe(self, lines: list[Line], counted: list[Line]) -> None:
        from mlflow.entities import Param, RunTag

        parameters = parameters_of(self.run_dir / "config.yaml")
        known = self.client.get_run(self.run_id).data
        new = [Param(key, value) for key, value in parameters.items() if key not in known.params]
        for begin in range(0, len(new), _MAX_PER_BATCH):
            self.client.log_batch(self.run_id, params=new[begin : begin + _MAX_PER_BATCH], synchronous=True)

        tags = tags_of(lines, counted)
        tags |= changes_of(known.params, parameters)
        if is_own_description(known.tags.get("mlflow.note.content", "")):
            tags["mlflow.note.content"] = description_of(lines, counted, parameters)
        changed = [RunTag(key, value) for key, value in tags.items() if known.tags.get(key) != value]
        for begin in range(0, len(changed), _MAX_PER_BATCH):
            self.client.log_batch(self.run_id, tags=changed[begin : begin + _MAX_PER_BATCH], synchronous=True)

    def _send_artifacts(self) -> None:
        config = self.run_dir / "config.yaml"
        if config.is_file():
            self.client.log_text(self.run_id, strip_credentials(config.read_text(encoding="utf-8")), config.name)
        for name in _ARTIFACT_FOLDERS:
            folder = self.run_dir / name
            if folder.is_dir() and any(folder.iterdir()):
                self.client.log_artifacts(self.run_id, str(folder), name)

    def _set_status(self, status: str, lines: list[Line]) -> None:
        if status == "RUNNING":
            self.client.update_run(self.run_id, status=status)
        else:
            self.client.set_terminated(self.run_id, status, end_time=milliseconds(lines[-1]))

    def _write_identity(self) -> dict[str, Any]:
        identity = {
            "uri": strip_credentials(self.uri),
            "experiment": self.experiment,
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
        }
        path = self.run_dir / "mlflow.json"
        temporary = path.with_suffix(".json.new")
        temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
        return identity


def _connect(uri: str) -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The birth of a database is told in a hundred lines otherwise.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    database = sqlite_path(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
    return importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)


def batches(measured: list[Line]) -> Iterator[tuple[list[Any], int]]:
    """Metrics of consecutive lines, at most `_MAX_METRICS`, a line never divided; and the number of lines."""
    from mlflow.entities import Metric

    batch: list[Any] = []
    num_lines = 0
    for line in measured:
        time = milliseconds(line)
        points = [
            Metric(name, value, time, line["step"]) for name, value in metrics_of(line).items() if isfinite(value)
        ]
        if batch and len(batch) + len(points) > _MAX_METRICS:
            yield batch, num_lines
            batch, num_lines = [], 0
        batch += points
        num_lines += 1
    if num_lines:
        yield batch, num_lines


def _place(line: Line) -> tuple[str, int]:
    return line["event"], line["step"]


def no_journal(run_dir: Path) -> UsageError:
    return UsageError(
        f"{run_dir} holds no journal of a run (metrics.jsonl with a start line): pass a run directory, "
        "such as runs/cell"
    )
