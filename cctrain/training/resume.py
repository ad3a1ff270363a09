"""What a resumed run may change, and what an earlier attempt has left behind in the run directory.

Every field of the configuration is `fixed`, `schedule` or `free` (see `config`). A resumed run keeps the fixed ones,
changes the scheduled ones only on purpose, and changes the free ones as it likes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cctrain.config import Config, field_help, load_config
from cctrain.errors import CheckpointError, UsageError
from cctrain.run_directory import CHECKPOINTS, CONFIG
from cctrain.tracking.journal import history, last_attempt, read_journal
from cctrain.training.checkpoint_files import find_checkpoints


@dataclass(frozen=True)
class Change:
    key: str
    resume: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} → {_shown(self.new)}"


@dataclass(frozen=True)
class Past:
    """What the journal says of earlier attempts: their number, the run's identifier, the steps at which they looked
    at the held-out cells, and the last step with a checkpoint."""

    attempts: int
    run: str | None
    looks: frozenset[int]
    last_checkpoint: int | None


def read_past(run_dir: Path) -> Past:
    lines = read_journal(run_dir)
    return Past(
        attempts=last_attempt(lines),
        run=next((line["run"] for line in lines if line["event"] == "start" and "run" in line), None),
        looks=frozenset(line["step"] for line in history(lines) if line["event"] == "evaluate"),
        last_checkpoint=max((line["step"] for line in lines if line["event"] == "checkpoint"), default=None),
    )


def check_changes(run_dir: Path, config: Config, accept_changes: bool) -> list[Change]:
    """What differs from the configuration of the attempt before; both must be resolved.

    Raises UsageError, with the differences listed, for fixed fields and for scheduled ones that are not accepted.
    """
    if not (run_dir / CONFIG).is_file():
        return []
    found = changes(load_config(run_dir / CONFIG), config)
    refused = [change for change in found if change.resume == "fixed"]
    if refused:
        raise UsageError(
            f"{run_dir} holds a run of another configuration, and these keys cannot change:\n{_listed(refused)}\n"
            "Give them their former values, or choose another run directory with run.dir=DIR"
        )
    scheduled = [change for change in found if change.resume == "schedule"]
    if scheduled and not accept_changes:
        raise UsageError(
            f"{run_dir} holds a run with other values of:\n{_listed(scheduled)}\n"
            "Give them their former values, or add --accept-changes to go on with the new ones"
        )
    return found


def changes(old: Config, new: Config) -> list[Change]:
    found = []
    for key, (_, resume, _) in field_help().items():
        before, after = _value(old, key), _value(new, key)
        if before != after:
            found.append(Change(key, resume, before, after))
    return found


def check_checkpoints_are_there(run_dir: Path, past: Past) -> None:
    """A run that has saved must not begin anew because its checkpoints are gone."""
    if past.last_checkpoint is not None and not find_checkpoints(run_dir):
        raise CheckpointError(
            f"{run_dir} has saved step {past.last_checkpoint}, but {run_dir / CHECKPOINTS} holds no checkpoint any "
            "more: restore it from a copy, or train anew in another run directory (run.dir=DIR)"
        )


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def _listed(found: list[Change]) -> str:
    return "\n".join(f"  {change}" for change in found)
