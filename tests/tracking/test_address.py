"""Where tracking data may go, and what of an address is shown."""

from pathlib import Path

import pytest

from cctrain.errors import UsageError
from cctrain.tracking.address import check_configured_uri, resolve_uri, strip_credentials
from cctrain.tracking.projection import check_uri, default_uri


@pytest.mark.parametrize("uri", ["mlruns", "/data/mlruns", "./runs", "file:///data/mlruns", "C:/mlruns"])
def test_a_file_store_is_refused_with_what_to_use_instead(uri: str) -> None:
    with pytest.raises(UsageError, match=r"file store.*sqlite:////"):
        check_uri(uri)


@pytest.mark.parametrize("uri", ["ftp://host/x", "sqlite://", "sqlite:///:memory:", "http://", "databrics"])
def test_a_uri_that_keeps_nothing_or_is_not_known_is_refused(uri: str) -> None:
    with pytest.raises(UsageError, match=r"tracking\.uri="):
        check_uri(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////data/mlflow.db",
        "sqlite:///mlflow.db",
        "http://127.0.0.1:5000",
        "https://user:secret@host/mlflow",
        "postgresql+psycopg2://user:secret@host:5432/db",
    ],
)
def test_databases_and_servers_are_accepted(uri: str) -> None:
    check_uri(uri)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://ann:s3cret@host/db",
        "https://ann:s3cret@host:8080/x?y=1",
        "error at 'mysql://ann:s3cret@host/db' (refused)",
        "postgresql://ann:p@s3cret@host/db",
        "postgresql://host/db?user=x&password=s3cret&sslmode=on",
        "http://s3cret@host",
    ],
)
def test_no_credential_is_ever_shown(text: str) -> None:
    assert "s3cret" not in strip_credentials(text)
    assert "host" in strip_credentials(text)


def test_a_refused_uri_does_not_show_its_password() -> None:
    with pytest.raises(UsageError) as caught:
        check_uri("ftp://ann:s3cret@host/x")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["https://ann:s3cret@host/mlflow", "postgresql://host/db?password=s3cret"])
def test_a_configuration_is_refused_credentials_with_where_to_put_them_instead(uri: str) -> None:
    with pytest.raises(UsageError, match=r"MLFLOW_TRACKING_PASSWORD.*--uri") as caught:
        check_configured_uri(uri)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["https://host/mlflow", "postgresql://host/db?sslmode=on", "sqlite:////data/a@b.db"])
def test_a_configuration_may_name_any_store_without_credentials(uri: str) -> None:
    check_configured_uri(uri)


def test_the_default_is_a_database_beside_the_run_which_need_not_exist_yet(tmp_path: Path) -> None:
    assert default_uri(tmp_path / "new" / "cell") == f"sqlite:///{tmp_path}/new/mlflow.db"
    assert default_uri(Path("runs/cell")) == f"sqlite:///{Path.cwd()}/runs/mlflow.db"


def test_under_slurm_the_default_is_the_journal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert default_uri(tmp_path / "cell") is None


def test_a_relative_database_does_not_move_with_the_current_directory() -> None:
    assert resolve_uri("sqlite:///x/mlflow.db") == f"sqlite:///{Path.cwd()}/x/mlflow.db"
    assert resolve_uri("http://host/x") == "http://host/x"
