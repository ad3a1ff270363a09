import base64
import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cctrain.data.package_index import Archive, download
from cctrain.errors import DataError

CONTENT = bytes(range(256)) * 64
ARCHIVE = Archive("tinycells", "1.0", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
SECRET = "5ecret-w0rd"


@pytest.fixture(autouse=True)
def _pip_without_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in list(os.environ):
        if key.startswith("PIP_") or key.lower().endswith("_proxy"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


class Index(BaseHTTPRequestHandler):
    """A package index that asks for a login, and redirects the page's canonical address as indexes do."""

    def do_GET(self) -> None:
        login = base64.b64encode(f"reader:{SECRET}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {login}":
            self.answer(401, b"")
        elif self.path == "/simple/tinycells/":
            self.send_response(302)
            self.send_header("Location", "/pages/tinycells/")
            self.end_headers()
        elif self.path == "/pages/tinycells/":
            self.answer(200, b'<a href="../../files/tinycells-1.0.tar.gz">tinycells-1.0.tar.gz</a>')
        elif self.path == "/files/tinycells-1.0.tar.gz":
            self.answer(200, CONTENT)
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index_port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_index_behind_a_login_is_read_with_the_login_that_pip_has(
    index_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://reader:{SECRET}@127.0.0.1:{index_port}/simple")

    download(ARCHIVE, tmp_path / "archive")

    assert (tmp_path / "archive").read_bytes() == CONTENT


def test_a_refused_login_is_reported_without_the_login(
    index_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{SECRET}:{SECRET}@127.0.0.1:{index_port}/simple?key={SECRET}")

    with (
        caplog.at_level("INFO"),
        pytest.raises(DataError, match=r"127.0.0.1:\d+: Client Error\(401\)") as raised,
    ):
        download(ARCHIVE, tmp_path / "archive")

    printed = capfd.readouterr()
    assert SECRET not in str(raised.value) + printed.out + printed.err + caplog.text


def test_an_index_out_of_reach_is_a_data_error_and_the_next_place_is_tried(
    index_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://reader:{SECRET}@127.0.0.1:9/simple")
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9: .*refused") as raised:
        download(ARCHIVE, tmp_path / "archive")
    assert SECRET not in str(raised.value)

    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://reader:{SECRET}@127.0.0.1:{index_port}/simple")
    download(ARCHIVE, tmp_path / "archive")

    assert (tmp_path / "archive").read_bytes() == CONTENT


def test_an_index_that_announces_another_digest_is_not_downloaded_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinycells-1.0.tar.gz").write_bytes(CONTENT)
    page = tmp_path / "simple" / "tinycells" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="../../tinycells-1.0.tar.gz#sha256={"0" * 64}">tinycells-1.0.tar.gz</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())

    with pytest.raises(DataError, match="offers an archive with SHA-256 0000"):
        download(ARCHIVE, tmp_path / "archive")

    assert not (tmp_path / "archive").exists()


def test_a_wheel_of_the_same_version_is_not_taken_for_the_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinycells-1.0-py3-none-any.whl").write_bytes(CONTENT)
    monkeypatch.setenv("PIP_NO_INDEX", "true")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(DataError, match="was not found where pip is configured to look"):
        download(ARCHIVE, tmp_path / "archive")


def test_no_place_to_look_is_said_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(DataError, match="no-index"):
        download(ARCHIVE, tmp_path / "archive")


def test_a_certificate_that_is_not_there_names_pips_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "missing.pem"))

    with pytest.raises(DataError, match=r"pip's `cert` \(.*missing.pem\)"):
        download(ARCHIVE, tmp_path / "archive")


def test_a_broken_pip_configuration_is_not_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text(f"index-url = https://reader:{SECRET}@127.0.0.1/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))

    with pytest.raises(DataError, match="pip config debug") as raised:
        download(ARCHIVE, tmp_path / "archive")

    assert SECRET not in str(raised.value)
