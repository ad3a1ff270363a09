"""What a restart means: which repeated steps are the same training, and where each attempt begins.

A crash loses what came after the last checkpoint, so the next attempt repeats those steps. They are the same
training when they consumed the same samples at the same learning rate and came to the same loss: bit for bit on
as many ranks as before, to 1e-5 (fp32) or 1e-2 (bf16) relative on another number. A changed schedule makes them
another training.

Pure functions of the journal's lines; no MLflow here.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from cctrain.tracking.address import strip_credentials
from cctrain.tracking.journal import MEASURED_EVENTS

Line = dict[str, Any]

_SAME_RESULT = 1e-2  # relative: as far as bf16 on another number of ranks may be
_SAME_RATE = 1e-9  # the schedule is a formula; only its last bits may depend on the machine
_MAX_REASON = 200
_CIRCUMSTANCES = {
    *("time", "attempt", "utilisation"),
    *("seconds", "step_seconds", "data_seconds", "communication_seconds", "imbalance_seconds", "checkpoint_seconds"),
}
_GROUPS_OF_CIRCUMSTANCES = ("memory/", "system/")


class Signature(NamedTuple):
    """What tells whether a line repeats another. None is not known, and agrees with everything."""

    samples: str | None
    learning_rate: float | None
    result: float | None


@dataclass(frozen=True)
class Restart:
    """Attempt `attempt` went on after step `step`, because the one before ended as `before` says."""

    attempt: int
    step: int
    time: str
    ranks: int | None
    before: str

    def __str__(self) -> str:
        ranks = "" if self.ranks is None else f", {self.ranks} rank{'' if self.ranks == 1 else 's'}"
        return f"attempt {self.attempt} from step {self.step}, {self.time}{ranks}; {self.before}"


def signature(line: Line) -> Signature:
    """The signature of a `step` or `evaluate` line; nothing distinguishes two lines of any other event."""
    if line["event"] == "step":
        return Signature(line.get("samples"), line.get("learning_rate"), line.get("loss"))
    return Signature(None, None, line.get("nll") if line["event"] == "evaluate" else None)


def is_same_training(one: Signature, other: Signature) -> bool:
    return (
        (one.samples is None or other.samples is None or one.samples == other.samples)
        and _is_close(one.learning_rate, other.learning_rate, _SAME_RATE)
        and _is_close(one.result, other.result, _SAME_RESULT)
    )


def repeatable(line: Line) -> Line:
    """What of a measured line the same training repeats bit for bit on as many ranks: all but when it was, in which
    attempt, how long it took and what it found on the machine."""
    return {
        key: value
        for key, value in line.items()
        if key not in _CIRCUMSTANCES and not key.startswith(_GROUPS_OF_CIRCUMSTANCES)
    }


def restarts(lines: list[Line]) -> list[Restart]:
    """Every restart of a run, in order."""
    starts = _starts(lines)
    return [
        Restart(
            attempt=later["attempt"],
            step=later["step"],
            time=f"{later['time'][:16].replace('T', ' ')} UTC",
            ranks=later.get("world_size"),
            before=how_it_ended(earlier["attempt"], lines),
        )
        for earlier, later in pairwise(starts)
    ]


def how_it_ended(attempt: int, lines: list[Line]) -> str:
    """The end of an attempt in words, by its stop line; without one it was killed."""
    stops = [line for line in lines if line["attempt"] == attempt and line["event"] == "stop"]
    if not stops:
        steps = [line["step"] for line in lines if line["attempt"] == attempt and line["event"] in MEASURED_EVENTS]
        return f"attempt {attempt} was killed" + (f" after step {max(steps)}" if steps else " before its first step")
    stop = stops[-1]
    reason = strip_credentials(str(stop.get("reason") or "")).partition("\n")[0]
    if len(reason) > _MAX_REASON:
        reason = f"{reason[:_MAX_REASON]} …"
    return f"attempt {attempt} ended after step {stop['step']}: {stop.get('status')}" + (
        f" ({reason})" if reason else ""
    )


def attempt_curve(lines: list[Line]) -> list[Line]:
    """Lines of event `attempt` for a chart that steps up at each restart; none for a run without restarts.

    Each attempt has a point at its first step and one at the last step that the next attempt left to it.
    """
    starts = _starts(lines)
    if len(starts) < 2:
        return []
    curve = []
    for start, end in zip(starts, [*starts[1:], lines[-1]], strict=True):
        first = start["step"] + 1
        curve.append(_point(first, start, start))
        is_end = end["event"] == "start" or (end["event"] == "stop" and end.get("status") == "finished")
        if is_end and end["step"] > first:
            curve.append(_point(end["step"], start, end))
    return curve


def _point(step: int, start: Line, when: Line) -> Line:
    return {"event": "attempt", "step": step, "attempt": start["attempt"], "time": when["time"]}


def _starts(lines: list[Line]) -> list[Line]:
    return list({line["attempt"]: line for line in lines if line["event"] == "start"}.values())


def _is_close(one: float | None, other: float | None, tolerance: float) -> bool:
    if one is None or other is None:
        return True
    if math.isfinite(one) and math.isfinite(other):
        return math.isclose(one, other, rel_tol=tolerance)
    return str(one) == str(other)
