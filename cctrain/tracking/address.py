"""Where tracking data may go: MLflow URIs, checked, and never shown with their credentials.

The default is a SQLite database beside the run directory, so that all runs of one folder share one page. On
a network file system SQLite's locks are not to be trusted, and under Slurm the ranks' node is rarely where
one looks at runs: there the journal alone is written, and `cctrain sync` or `cctrain ui` projects it later.
"""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from cctrain.errors import UsageError
from cctrain.file_system import on_network_file_system

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVERS = ("http", "https")

_USER_INFO = re.compile(r"(?<=://)[^/@\s]*(?:@[^/@\s]*)*@")
_SECRET_QUERY = re.compile(r"(?i)([?&](?:password|passwd|pwd|token|access_token|user)=)[^&\s'\"]*")


def default_uri(run_dir: Path) -> str | None:
    """`sqlite:////…/mlflow.db` beside the run directory; None where only the journal should be written.

    None means: that folder is on a network file system, or this process runs under Slurm.
    """
    folder = Path(run_dir).resolve().parent
    if "SLURM_JOB_ID" in os.environ or on_network_file_system(folder):
        return None
    return database_in(folder)


def database_in(folder: Path) -> str:
    """The URI of the SQLite database in a folder."""
    return f"sqlite:///{Path(folder).resolve() / 'mlflow.db'}"


def check_uri(uri: str) -> None:
    """Raise UsageError unless `uri` names a tracking server or a database that outlives the process."""
    scheme = urlsplit(uri).scheme.split("+")[0].lower()
    shown = strip_credentials(uri)
    instead = (
        "use sqlite:////absolute/path/mlflow.db, a database such as postgresql://…, or a server such as "
        "http://127.0.0.1:5000"
    )
    if scheme in ("", "file") or len(scheme) == 1:  # one letter: a drive
        raise UsageError(
            f"tracking.uri={shown} is a folder, that is MLflow's file store, which MLflow has given up and "
            f"refuses to open: {instead}"
        )
    if scheme not in (*DATABASES, *SERVERS):
        raise UsageError(f"tracking.uri={shown} has the unknown scheme {scheme}: {instead}")
    if scheme == "sqlite" and not _database_path(uri):
        raise UsageError(f"tracking.uri={shown} names no file, so nothing would be kept: {instead}")
    if scheme in SERVERS and not urlsplit(uri).hostname:
        raise UsageError(f"tracking.uri={shown} names no host: {instead}")


def check_configured_uri(uri: str) -> None:
    """As `check_uri`, and without credentials: a configuration is copied to where others can read it."""
    check_uri(uri)
    if strip_credentials(uri) != uri:
        raise UsageError(
            f"tracking.uri={strip_credentials(uri)} was given with a user or a password, which would be written into "
            "the run directory: take them out. For a server, set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD in the environment; for a database, leave tracking.uri unset and send the run "
            "with cctrain sync RUN --uri URI afterwards"
        )


def resolve_uri(uri: str) -> str:
    """The same URI, independent of the current directory (`sqlite:///mlflow.db` is relative to it)."""
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of a SQLite URI's database; None for any other URI."""
    if urlsplit(uri).scheme.split("+")[0].lower() != "sqlite":
        return None
    return Path(_database_path(uri)).resolve()


def is_server(uri: str) -> bool:
    """Whether `uri` is a tracking server, not a database."""
    return urlsplit(uri).scheme.lower() in SERVERS


def artifact_folder(uri: str, run_dir: Path) -> Path | None:
    """Where files of runs go: beside a SQLite database, beside the run for other databases; None for a
    server, which decides itself.
    """
    if is_server(uri):
        return None
    path = sqlite_path(uri)
    return (path or Path(run_dir).resolve()).parent / "mlflow-artifacts"


def strip_credentials(text: str) -> str:
    """The text without the credentials of any URI in it."""
    return _SECRET_QUERY.sub(r"\1…", _USER_INFO.sub("", text))


def _database_path(uri: str) -> str:
    path = uri.partition("://")[2].partition("?")[0]
    path = path.removeprefix("/")
    return "" if path == ":memory:" else path
