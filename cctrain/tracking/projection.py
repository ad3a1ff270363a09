"""MLflow as a projection of a run's journal: replayed as often as one likes, each step arrives once.

`project` replays one run, `sync` several for the command line, and `LiveProjection` follows a run from a
thread while it trains. A tracking error never ends or delays training: the journal is the truth, and
`cctrain sync` projects it at any later time. How a run is found again and what is sent is in `replay`, what
a line means to MLflow in `content`, where it may go in `address`. MLflow is imported when it is needed and
not before.
"""

import gc
import logging
import os
import threading
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress as Bar

from cctrain.errors import CctrainError, UsageError
from cctrain.tracking.address import check_uri, default_uri, strip_credentials
from cctrain.tracking.journal import read_journal
from cctrain.tracking.replay import Progress, Replay, no_journal

__all__ = ["LiveProjection", "check_uri", "configured_uri", "default_uri", "project", "sync"]

log = logging.getLogger(__name__)


def project(
    run_dir: Path,
    uri: str,
    experiment: str,
    *,
    finished: bool | None = None,
    progress: Progress | None = None,
    every_step: bool = False,
) -> dict[str, Any]:
    """Replay a run's journal into an MLflow store; what it holds already is not sent again, and of a long run only
    some steps are (`content.thinned`), unless it is to be every one.

    A run that is training now (`finished=False`) stays RUNNING, and steps that an earlier attempt reached and
    this one has not yet wait. By default the journal tells: a stop line, or 15 minutes of silence, is the
    end. Writes `mlflow.json` in the run directory and returns it: {uri (without credentials), experiment,
    experiment_id, run_id}.

    Raises UsageError for a folder without a journal and for a URI that is refused; MLflow's own errors
    otherwise.
    """
    return Replay(run_dir, uri, experiment).replay(finished=finished, progress=progress, every_step=every_step)


def sync(
    run_dirs: list[Path], uri: str | None = None, experiment: str | None = None, every_step: bool = False
) -> list[dict[str, Any]]:
    """Replay the journals of several runs, with progress on standard error, and return what `project` does.

    Default URI: the run's `tracking.uri`, else the database beside it. Default experiment: the run's own.
    Every run is tried; the first error is raised at the end, as UsageError.
    """
    for run_dir in run_dirs:
        if not read_journal(run_dir):
            raise no_journal(run_dir)
    done: list[dict[str, Any]] = []
    failures: list[CctrainError] = []
    with Bar(console=Console(stderr=True)) as bar:
        for run_dir in run_dirs:
            task = bar.add_task(f"{run_dir} to MLflow", total=None)

            def show(sent: int, total: int, task: Any = task) -> None:
                bar.update(task, completed=sent, total=max(total, 1))

            try:
                done.append(_sync_one(Path(run_dir), uri, experiment, every_step, show))
                bar.update(task, completed=1, total=1)
            except CctrainError as error:
                failures.append(error)
    if failures:
        raise UsageError("\n".join(str(error) for error in failures))
    return done


class LiveProjection:
    """Projects a run while it trains, from a daemon thread of its own. Nothing here raises."""

    def __init__(
        self, run_dir: Path, uri: str, experiment: str, *, every: float = 10.0, close_within: float = 60.0
    ) -> None:
        self._run_dir, self._uri, self._experiment = Path(run_dir), uri, experiment
        self._every, self._close_within = every, close_within
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow-projection", daemon=True)
        self._warned = False

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Send what is left, the status too: call it behind the journal's stop line. Waits up to
        `close_within` seconds.
        """
        self._closing.set()
        if self._thread.is_alive():
            quick = min(2.0, self._close_within)
            self._thread.join(quick)
            if self._thread.is_alive():
                log.info("sending the last steps to MLflow, for at most %.0f s", self._close_within)
            self._thread.join(self._close_within - quick)
            if self._thread.is_alive():
                self._warn(f"it was not done within {self._close_within:.0f} s")

    def _follow(self) -> None:
        # A dead server must be noticed in seconds here; MLflow's own patience is several minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        projection: Replay | None = None
        pause = self._every
        is_frozen = False
        while True:
            last = self._closing.is_set()
            try:
                if projection is None:
                    projection = Replay(self._run_dir, self._uri, self._experiment)
                    projection.replay(finished=last)
                    if not is_frozen:
                        # MLflow is loaded now, and stays: to look for garbage among its hundred thousands of objects,
                        # again and again, took a third of the time of sending.
                        gc.collect()
                        gc.freeze()
                        is_frozen = True
                elif last:
                    projection.replay(finished=True)
                else:
                    projection.follow()
                pause = self._every
                if last and self._warned:
                    log.info("MLflow has the whole run after all")
            except Exception as error:  # whatever it is, training goes on
                projection = None  # what arrived is unknown: ask the store next time
                pause = min(2 * pause, 300.0)
                self._warn(f"{type(error).__name__}: {error}")
            if last:
                return
            self._closing.wait(pause)

    def _warn(self, reason: str) -> None:
        if self._warned:
            return
        self._warned = True
        log.warning(
            "MLflow tracking failed; training goes on and the journal has everything. Later: cctrain sync %s (%s)",
            self._run_dir,
            strip_credentials(reason),
        )


def configured_uri(run_dir: Path) -> str | None:
    """`tracking.uri` of a run's configuration."""
    return _tracking_key(run_dir, "uri")


def _sync_one(
    run_dir: Path, uri: str | None, experiment: str | None, every_step: bool, progress: Progress
) -> dict[str, Any]:
    uri = uri or configured_uri(run_dir) or default_uri(run_dir)
    if uri is None:
        raise UsageError(
            f"{run_dir} names no tracking.uri, and a database beside it is not safe here (Slurm, or a "
            "network file system): say where with --uri, for example --uri sqlite:////local/disk/mlflow.db"
        )
    experiment = experiment or _tracking_key(run_dir, "experiment") or "cctrain"
    try:
        return project(run_dir, uri, experiment, progress=progress, every_step=every_step)
    except CctrainError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy, requests and the file system have many error types
        raise UsageError(
            f"cannot write {run_dir} to MLflow at {strip_credentials(uri)}: check that it can be reached and "
            f"written ({type(error).__name__}: {strip_credentials(str(error))})"
        ) from error


def _tracking_key(run_dir: Path, key: str) -> str | None:
    config = Path(run_dir) / "config.yaml"
    if not config.is_file():
        return None
    try:
        return OmegaConf.select(OmegaConf.load(config), f"tracking.{key}")
    except Exception as error:  # the YAML parser has many error types
        raise UsageError(f"{config} is not valid YAML ({error}): restore it, as the run wrote it") from error
