"""One run in one MLflow store: find it or create it, ask what has arrived, send the rest.

Points are identified by their step and by the time of the journal line that they come from. A step that a
later attempt repeated is not sent again when it is the same training (see `restarts`): the MLflow run stays
the same through any number of restarts. When a repeated step differs, because somebody changed the schedule, the
run is written anew under a new MLflow run id, since MLflow cannot replace a point; the old one goes to MLflow's
trash, which `mlflow gc` empties.

Only `MlflowClient` is used, never the process-wide state of the fluent interface, and MLflow is imported
when it is needed and not before.
"""

import json
import logging
from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cctrain.errors import UsageError
from cctrain.tracking.address import artifact_folder, check_uri, resolve_uri, strip_credentials
from cctrain.tracking.client import connect, find_experiment
from cctrain.tracking.content import (
    ATTEMPT_MARKER,
    EVALUATE_GROUP,
    STEP_MARKER,
    changes_of,
    has_points,
    metrics_of,
    milliseconds,
    parameters_of,
    status_of,
    tags_of,
    thinned,
    without_steps_to_repeat,
)
from cctrain.tracking.description import description_of, is_own_description
from cctrain.tracking.journal import MEASURED_EVENTS, history, read_journal_from
from cctrain.tracking.restarts import Line, Signature, attempt_curve, is_same_training, signature

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # lines sent, lines to send
Place = tuple[str, int, int]  # event, step; and the attempt where each attempt has its own point

_RUN_TAG = "cctrain.run"
_ARTIFACT_FOLDERS = ("evaluation", "figures")
_MAX_METRICS = 1000  # of MLflow, a batch
_MAX_PER_BATCH = 100  # parameters or tags


class Replay:
    """One run in one store: the client, the MLflow run, and what is known to have arrived."""

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        check_uri(uri)
        self.run_dir, self.uri, self.experiment = Path(run_dir), resolve_uri(uri), experiment
        self.client: MlflowClient = connect(self.uri)
        self.experiment_id = ""
        self.run_id = ""
        self.offset = 0
        self.held: dict[Place, Signature] = {}
        self.sent_config = ("", "")  # to which MLflow run, and what
        self.doubled: Place | None = None  # a point that the store has twice, with different times

    def replay(
        self, *, finished: bool | None = None, progress: Progress | None = None, every_step: bool = False
    ) -> dict[str, Any]:
        """Bring the MLflow run up to the journal; the first call asks the store what it holds.

        Of a long run it sends some steps only (`content.thinned`), unless it is to be every one.
        """
        if not self.run_id:
            self._open()
        # Behind it, because a training that sends its own steps may have sent some in the meantime.
        lines, self.offset = read_journal_from(self.run_dir, 0)
        status = "RUNNING" if finished is False else status_of(lines)
        if finished is None:
            finished = status != "RUNNING"
        counted = history(lines)
        expected = counted if finished else without_steps_to_repeat(counted)
        differing = next((line for line in _points(lines, expected) if self._differs(line)), None)
        if differing is not None:
            self._begin_anew(lines, f"attempt {differing['attempt']} trained step {differing['step']} otherwise")
        elif self.doubled is not None:
            self._begin_anew(lines, f"two writers sent step {self.doubled[1]}")

        self._write_identity()  # a page to open while the first steps are still on their way
        wanted = _points(lines, expected if every_step else thinned(expected))
        self._send([line for line in wanted if _place(line) not in self.held], progress)
        self._describe(lines, counted)
        self._set_status(status, lines)
        self._send_artifacts()  # last: the end of a training waits only so long for a slow server
        return self._write_identity()

    def follow(self) -> None:
        """Send what was appended to the journal since the last call."""
        lines, offset = read_journal_from(self.run_dir, self.offset)
        wanted = [line for line in lines if has_points(line)]
        if any(self._differs(line) for line in wanted):
            self.replay(finished=False)
            return
        self._send([line for line in wanted if _place(line) not in self.held], None)
        self.offset = offset

    def _open(self) -> None:
        lines, _ = read_journal_from(self.run_dir, 0)
        self.experiment_id = find_experiment(self.client, self.experiment, artifact_folder(self.uri, self.run_dir))
        run = self._find_run(_identifier(lines, self.run_dir)) or self._create_run(lines)
        arrived = self._ask_what_arrived(run)
        self.doubled = next((place for place, times in arrived.items() if len(times) > 1), None)
        self.held = self._recognize(run, arrived, lines)
        self.run_id = run.info.run_id

    def _differs(self, line: Line) -> bool:
        held = self.held.get(_place(line))
        return held is not None and not is_same_training(held, signature(line))

    def _find_run(self, identifier: str) -> "Run | None":
        found = self.client.search_runs([self.experiment_id], f"tags.`{_RUN_TAG}` = '{identifier}'")
        if not found:
            return None
        # A server that is lost while it creates the run may have created it; the next try then made another.
        first, *others = sorted(found, key=lambda run: (not run.data.metrics, run.info.run_id))
        for other in others:
            if not other.data.metrics:
                self.client.delete_run(other.info.run_id)
        return first

    def _create_run(self, lines: list[Line], tags: dict[str, str] | None = None) -> "Run":
        name = {"mlflow.runName": self.run_dir.resolve().name}
        return self.client.create_run(
            self.experiment_id,
            start_time=milliseconds(lines[0]),
            tags={**name, **(tags or {}), _RUN_TAG: _identifier(lines, self.run_dir)},
        )

    def _begin_anew(self, lines: list[Line], reason: str) -> None:
        # The name and the tags that people gave the run move with it.
        old = self.client.get_run(self.run_id)
        tags = {key: value for key, value in old.data.tags.items() if not key.startswith("cctrain.")}
        tags.setdefault("mlflow.runName", old.info.run_name)
        self.client.delete_run(old.info.run_id)
        self.run_id, self.held, self.doubled = self._create_run(lines, tags).info.run_id, {}, None
        log.warning(
            "%s, and MLflow cannot replace a point: the run is written anew as MLflow run %s; the former one, %s, is "
            "in MLflow's trash",
            *(reason, self.run_id, old.info.run_id),
        )

    def _ask_what_arrived(self, run: "Run") -> dict[Place, set[int]]:
        """The times, in milliseconds, of the points that the store holds."""
        markers = {STEP_MARKER: "step", ATTEMPT_MARKER: "attempt"}
        arrived: dict[Place, set[int]] = {}
        for key in run.data.metrics:
            event = "evaluate" if key.startswith(EVALUATE_GROUP) else markers.get(key)
            if event is None:
                continue
            for point in self.client.get_metric_history(run.info.run_id, key):
                place = event, point.step, int(point.value) if event == "attempt" else 0
                arrived.setdefault(place, set()).add(point.timestamp)
        return arrived

    def _recognize(self, run: "Run", arrived: dict[Place, set[int]], lines: list[Line]) -> dict[Place, Signature]:
        """The signatures of the lines that the points come from.

        The journal has the lines. Of those that were lost with a node, or were written and sent by a training since
        `lines` were read, the store has the values.
        """
        written = {(_place(line), milliseconds(line)): signature(line) for line in lines if has_points(line)}
        held = {place: written.get((place, min(times))) for place, times in arrived.items()}
        lost = any(found is None and place[0] in MEASURED_EVENTS for place, found in held.items())
        rates, losses, nlls = (
            {point.step: point.value for point in self.client.get_metric_history(run.info.run_id, key)} if lost else {}
            for key in ("train/learning_rate", "train/loss", "validation/nll")
        )

        def stored(event: str, step: int) -> Signature:
            if event == "step":
                return Signature(None, rates.get(step), losses.get(step))
            return Signature(None, None, nlls.get(step) if event == "evaluate" else None)

        return {place: found or stored(*place[:2]) for place, found in held.items()}

    def _send(self, wanted: list[Line], progress: Progress | None) -> None:
        sent = 0
        for batch, num_lines in batches(wanted):
            self.client.log_batch(self.run_id, metrics=batch, synchronous=True)
            for line in wanted[sent : sent + num_lines]:
                self.held[_place(line)] = signature(line)
            sent += num_lines
            if progress is not None:
                progress(sent, len(wanted))

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
            text = strip_credentials(config.read_text(encoding="utf-8"))
            if self.sent_config != (self.run_id, text):
                self.client.log_text(self.run_id, text, config.name)
                self.sent_config = self.run_id, text
        for name in _ARTIFACT_FOLDERS:
            folder = self.run_dir / name
            if folder.is_dir() and any(folder.iterdir()):
                self.client.log_artifacts(self.run_id, str(folder), name)

    def _set_status(self, status: str, lines: list[Line]) -> None:
        if status in ("RUNNING", "KILLED"):  # an end that a later attempt could not take back is not written
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


def batches(measured: list[Line]) -> Iterator[tuple[list[Any], int]]:
    """Metrics of consecutive lines, at most `_MAX_METRICS`, and the number of lines that end there.

    A line is divided only if it alone has more, as on hundreds of GPUs; what says that it has arrived comes last.
    """
    from mlflow.entities import Metric

    batch: list[Any] = []
    num_lines = 0
    for line in measured:
        time = milliseconds(line)
        metrics = metrics_of(line)
        if STEP_MARKER in metrics:
            metrics[STEP_MARKER] = metrics.pop(STEP_MARKER)
        points = [Metric(name, value, time, line["step"]) for name, value in metrics.items() if isfinite(value)]
        if batch and len(batch) + len(points) > _MAX_METRICS:
            yield batch, num_lines
            batch, num_lines = [], 0
        while len(points) > _MAX_METRICS:
            yield points[:_MAX_METRICS], 0
            points = points[_MAX_METRICS:]
        batch += points
        num_lines += 1
    if num_lines:
        yield batch, num_lines


def _points(lines: list[Line], counted: list[Line]) -> list[Line]:
    """The lines to send, one for each place."""
    found = [line for line in [*counted, *attempt_curve(lines)] if has_points(line)]
    return list({_place(line): line for line in found}.values())


def _place(line: Line) -> Place:
    return line["event"], line["step"], line["attempt"] if line["event"] == "attempt" else 0


def _identifier(lines: list[Line], run_dir: Path) -> str:
    identifier = next((line["run"] for line in lines if line["event"] == "start" and "run" in line), None)
    if identifier is None:
        raise no_journal(run_dir)
    return identifier


def no_journal(run_dir: Path) -> UsageError:
    return UsageError(
        f"{run_dir} holds no journal of a run (metrics.jsonl with a start line): pass a run directory, "
        "such as runs/cell"
    )
