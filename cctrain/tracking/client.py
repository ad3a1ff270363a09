"""An MLflow store to write to: its client, a database that is created whole, and the experiment, found or made.

MLflow is imported when it is needed and not before.
"""

import importlib
import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cctrain.errors import UsageError
from cctrain.tracking.address import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Says that the experiment is model training, not traces of a language model. From MLflow 3.17 on the page
# goes by its address instead (`ui.run_page`), and this tag decides where the address does not.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


def connect(uri: str) -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # standard output is the command's
    # The birth of a database is told in a hundred lines otherwise, and each try to reach a lost server in one.
    for name, level in (("alembic", "WARNING"), ("mlflow.store.db.utils", "WARNING"), ("urllib3", "ERROR")):
        logging.getLogger(name).setLevel(level)
    database = sqlite_path(uri)
    mlflow = importlib.import_module("mlflow")
    if database is not None and not database.exists():
        _create_database(database, mlflow)
    return mlflow.MlflowClient(tracking_uri=uri)


def _create_database(database: Path, mlflow: Any) -> None:
    """It gets its name when it is whole: one whose creation was cut short cannot be opened by MLflow ever again."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{database.name}.", dir=database.parent) as folder:
        made, whole = Path(folder) / "made.db", Path(folder) / "whole.db"
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{made}")
        # A copy, because MLflow keeps its connections to the file that it made.
        with closing(sqlite3.connect(made)) as source, closing(sqlite3.connect(whole)) as target:
            source.backup(target)
        try:
            os.link(whole, database)
        except FileExistsError:
            pass  # another run was faster
        except OSError:  # a file system without hard links
            whole.replace(database)


def find_experiment(client: "MlflowClient", name: str, folder: Path | None) -> str:
    """The id of the experiment, which is created if it is missing; its files go to `folder`, None: where the server
    decides. Raises UsageError if somebody deleted it."""
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None if folder is None else folder.as_uri()
        try:
            return client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
        except Exception:  # another run may have created it in this moment
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UsageError(
            f"the MLflow experiment {name} was deleted: restore it there, or choose another tracking.experiment"
        )
    for key, value in EXPERIMENT_TAGS.items():
        if key not in found.tags:
            client.set_experiment_tag(found.experiment_id, key, value)
    return found.experiment_id
