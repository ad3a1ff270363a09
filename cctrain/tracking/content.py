"""What a run says to MLflow, in plain data: metrics, parameters, tags and a status.

Pure functions of the journal's lines and of `config.yaml`; no MLflow here. Metric names are grouped by the
part before the slash, which is how the MLflow page groups its charts: `train`, `validation`, `speed`, `cost`, `memory`;
`system` has a page of its own there.

MLflow has no honest place for a value that is not finite (it stores +inf as 1.8e308, which flattens every
chart), so such a value is not sent: the chart has a gap, and the tag `cctrain.not_finite` says where.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cctrain.tracking.address import strip_credentials
from cctrain.tracking.journal import MEASURED_EVENTS, last_attempt
from cctrain.tracking.restarts import Line, restarts

STEP_MARKER = "speed/step_seconds"  # every step line has it, and it is finite whatever the loss does
ATTEMPT_MARKER = "speed/attempt"
EVALUATE_GROUP = "validation/"
LATEST_STEPS, EARLIER_STEPS = 1000, 5000

_MAX_PARAMETER = 6000  # MLflow cuts longer values without a word
_MAX_TAG = 5000
_STALE_SECONDS = 15 * 60
_OWN_KEYS = ("event", "attempt", "step", "time")
_SPEED_KEYS = (
    *("step_seconds", "data_seconds", "communication_seconds", "imbalance_seconds", "checkpoint_seconds"),
    *("packing_efficiency", "utilisation"),
)
_RATES = {"tokens": "tokens", "contexts": "contexts", "cost/total_flops": "flops"}  # of a step: by the second
_NOT_ALLOWED = re.compile(r"[^/\w.\- :]")


def metrics_of(line: Line) -> dict[str, float]:
    """The metrics of a line, by MLflow name, those that are not finite included; {} for most events."""
    if not has_points(line):
        return {}
    if line["event"] == "attempt":
        return {ATTEMPT_MARKER: float(line["attempt"])}
    group = "train/" if line["event"] == "step" else EVALUATE_GROUP
    metrics: dict[str, float] = {}
    for key, value in line.items():
        if key in _OWN_KEYS or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if key in _SPEED_KEYS:
            name = f"speed/{key}"
        elif key == "seconds":
            name = f"speed/{line['event']}_seconds"
        elif "/" in key:
            name = key
        else:
            name = group + key
        metrics[_NOT_ALLOWED.sub("_", name)] = float(value)
    if line["event"] == "step" and line.get("step_seconds", 0) > 0:
        for key, name in _RATES.items():
            if key in line:
                metrics[f"speed/{name}_per_second"] = line[key] / line["step_seconds"]
    return metrics


def has_points(line: Line) -> bool:
    """Whether charts show something of a line. `attempt` is no event of the journal: see `attempt_curve`."""
    return line["event"] in (*MEASURED_EVENTS, "attempt")


def milliseconds(line: Line) -> int:
    """The time of a line in MLflow's unit, milliseconds since 1970. It identifies the line in the store."""
    return round(datetime.fromisoformat(line["time"]).timestamp() * 1000)


def without_steps_to_repeat(counted: list[Line]) -> list[Line]:
    """The history without what an earlier attempt measured behind the start of the latest one.

    While a resumed run is under way it will reach those steps itself.
    """
    latest = last_attempt(counted)
    begin = min((line["step"] for line in counted if line["attempt"] == latest), default=0)
    return [
        line
        for line in counted
        if line["event"] not in MEASURED_EVENTS or line["attempt"] == latest or line["step"] <= begin
    ]


def thinned(counted: list[Line]) -> list[Line]:
    """The history of a long run for charts: all of the last 1,000 steps, of those before at most 5,000, evenly chosen,
    and those that a checkpoint kept waiting; and everything that is no step.

    Evenly chosen are the multiples of a power of two, so a run that goes on needs none of the points again.
    """
    steps = sorted((line["step"], looked_at_nodes(line)) for line in counted if line["event"] == "step")
    earlier, stride = steps[:-LATEST_STEPS], 1
    while len(chosen := evenly_chosen(earlier, stride)) > EARLIER_STEPS:
        stride *= 2
    chosen |= {step for step, _ in steps[-LATEST_STEPS:]}
    return [
        line
        for line in counted
        if line["event"] != "step" or line["step"] in chosen or line.get("checkpoint_seconds", 0) > 0
    ]


def looked_at_nodes(line: Line) -> bool:
    """Most steps do not: one a second does."""
    return any(key.startswith("system/") for key in line)


def evenly_chosen(steps: Sequence[tuple[int, bool]], stride: int) -> set[int]:
    """The multiples of the stride, and from each one on the first that looked at nodes: both are periodic, and might
    never meet."""
    looks: dict[int, int] = {}
    for step, looked in steps:
        if looked:
            looks.setdefault(step // stride, step)
    return {step for step, _ in steps if step % stride == 0} | set(looks.values())


def parameters_of(config_file: Path) -> dict[str, str]:
    """Every key of a resolved configuration, dotted, with its value as text; {} if there is no such file.

    Long values are shortened and say so; the whole value is in the artifact `config.yaml`. Read as plain
    YAML, so that a run of another version of cctrain can be projected too.
    """
    if not config_file.is_file():
        return {}
    values = OmegaConf.to_container(OmegaConf.load(config_file))
    flat = dict(_flatten(values, "")) if isinstance(values, dict) else {}
    return {key: _shorten(_as_text(value), _MAX_PARAMETER, "see config.yaml") for key, value in flat.items()}


def tags_of(lines: list[Line], counted: list[Line]) -> dict[str, str]:
    """The facts of the latest start line, and what a chart cannot show of the rest."""
    start = [line for line in lines if line["event"] == "start"][-1]
    tags = {
        f"cctrain.{_NOT_ALLOWED.sub('_', key)}": _as_text(value)
        for key, value in start.items()
        if key not in (*_OWN_KEYS, "run")  # the identifier is the first start line's, for ever
    }
    commit = start.get("commit") or start.get("git_commit")
    if commit:
        tags["mlflow.source.git.commit"] = str(commit)
    tags["cctrain.attempts"] = str(last_attempt(lines))
    again = restarts(lines)
    if again:
        tags["cctrain.restarts"] = "\n".join(str(restart) for restart in reversed(again))
    checkpoints = [line["step"] for line in lines if line["event"] == "checkpoint"]
    if checkpoints:
        tags["cctrain.last_checkpoint"] = str(checkpoints[-1])
    skips = _skipped_steps(lines, counted)
    if skips:
        tags["cctrain.skipped_steps"] = ", ".join(map(str, skips))
    not_finite = _not_finite(counted)
    if not_finite:
        tags["cctrain.not_finite"] = not_finite
    return {key: _shorten(value, _MAX_TAG, "see the journal") for key, value in tags.items()}


def changes_of(first: dict[str, str], parameters: dict[str, str]) -> dict[str, str]:
    """Tags for what a resumed run changed: MLflow keeps the first value of a parameter for ever."""
    return {
        f"cctrain.changed.{key}": _shorten(f"{first[key]} → {value}", _MAX_TAG, "see config.yaml")
        for key, value in parameters.items()
        if first.get(key, value) != value
    }


def status_of(lines: list[Line], now: datetime | None = None) -> str:
    """FINISHED, FAILED, KILLED or RUNNING, by the `status` of the latest attempt's stop line.

    Any other status (`requeue`, `stopped`) is KILLED until the run goes on: MLflow has no word for a run that
    waits to be started again. Without a stop line the process is alive or was killed: KILLED once the journal
    has been silent for 15 minutes.
    """
    last = lines[-1]
    if last["event"] == "stop":
        known = {"finished": "FINISHED", "failed": "FAILED"}
        return known.get(str(last.get("status", "")).lower(), "KILLED")
    silent = (now or datetime.now(UTC)) - datetime.fromisoformat(last["time"])
    return "RUNNING" if silent.total_seconds() < _STALE_SECONDS else "KILLED"


def _skipped_steps(lines: list[Line], counted: list[Line]) -> list[int]:
    """Without those that a later attempt repeated and took."""
    latest = {line["step"]: line["attempt"] for line in counted if line["event"] == "step"}
    skips = [line for line in lines if line["event"] == "skip"]
    return sorted({line["step"] for line in skips if line["attempt"] >= latest.get(line["step"], 0)})


def _not_finite(counted: list[Line]) -> str:
    places: dict[str, list[str]] = {}
    for line in counted:
        for name, value in metrics_of(line).items():
            if not math.isfinite(value):
                places.setdefault(name, []).append(f"{value} at step {line['step']}")
    return "; ".join(f"{name}: {', '.join(found)}" for name, found in places.items())


def _flatten(values: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{_NOT_ALLOWED.sub('_', str(key))}"
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _as_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return strip_credentials(text)


def _shorten(text: str, limit: int, where: str) -> str:
    if len(text) <= limit:
        return text
    note = f" … ({len(text)} characters in all; {where})"
    return text[: limit - len(note)] + note
