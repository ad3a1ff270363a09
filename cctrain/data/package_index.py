"""Downloads one pinned source archive from wherever the user's pip is configured to look.

pip itself would run the archive's own build code (`pip download` of a source archive does), so only its
configuration is used: index-url, extra-index-url, find-links, no-index, trusted-host, cert, client-cert,
proxy and timeout. The search is done by the `unearth` library. The SHA-256 decides what is accepted, so it
does not matter which place answers first. Addresses may hold a login: messages name hosts and nothing else.
"""

import ast
import hashlib
import logging
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httpx2
from pip._internal.models.index import PyPI  # the default of the user's pip
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from unearth import Link, PackageFinder
from unearth.auth import MultiDomainBasicAuth
from unearth.fetchers import Fetcher, PyPIClient

from cctrain.errors import DataError

_CHUNK = 1 << 20
_TRUE = ("1", "true", "yes", "on", "y", "t")


@dataclass(frozen=True)
class Archive:
    """A source archive: the SHA-256 is that of the .tar.gz as the index serves it."""

    package: str
    version: str
    sha256: str
    num_bytes: int


def download(archive: Archive, path: Path) -> None:
    """Write the archive to `path`. DataError, with each place's reason, when none has the pinned bytes."""
    settings = _pip_settings()
    sources = _sources(settings)
    what = f"{archive.package} {archive.version} (source archive, {archive.num_bytes / 1e6:.1f} MB)"
    if not sources:
        raise DataError(
            f"{what} cannot be fetched: pip is configured with no-index and no find-links that exists. "
            "Set PIP_NO_INDEX=0, or put the archive into a folder and name it in PIP_FIND_LINKS."
        )
    failures: list[str] = []
    index_urls = [url for kind, url in sources if kind == "index"]
    with _client(settings, index_urls) as client, _libraries_quiet(failures):
        for kind, url in sources:
            try:
                for link in _find(client, kind, url, archive):
                    problem = _receive(client, link, archive, path)
                    if not problem:
                        return
                    failures.append(f"{link.url_without_fragment}: {problem}")
            except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
                failures.append(f"{url}: {error or type(error).__name__}")
    reasons = "".join(f"\n  {reason}" for reason in dict.fromkeys(map(_mask, failures)))
    raise DataError(
        f"{what} with SHA-256 {archive.sha256} was not found where pip is configured to look.{reasons}\n"
        "Check the network and `python -m pip config list`, then try again; or put the archive into a folder "
        "and name it in PIP_FIND_LINKS."
    )


def _pip_settings() -> dict[str, str]:
    """What `pip install` would use: [global], then [install], then PIP_* from the environment, last wins."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode and "No module named pip" not in result.stderr:
        # Its own message may quote the file, and the file may hold a password.
        raise DataError("pip cannot read its configuration: run `python -m pip config debug` and correct it.")
    settings: dict[str, str] = {}
    entries = [line.partition("=") for line in result.stdout.splitlines()]
    for section in ("global.", "install."):
        for key, _, value in entries:
            if key.startswith(section):
                settings[key.removeprefix(section)] = str(ast.literal_eval(value))
    for key, value in os.environ.items():
        if key.startswith("PIP_") and value:
            settings[key.removeprefix("PIP_").lower().replace("_", "-")] = value
    return settings


def _sources(settings: Mapping[str, str]) -> list[tuple[str, str]]:
    """(kind, address) of every place to look, kind being "find_links" or "index"."""
    sources = []
    for place in settings.get("find-links", "").split():
        local = Path(place).expanduser()
        if "://" in place:
            sources.append(("find_links", place))
        elif local.exists():
            sources.append(("find_links", str(local.resolve())))
    if settings.get("no-index", "").lower() not in _TRUE:
        indexes = [settings.get("index-url") or PyPI.simple_url]
        indexes += settings.get("extra-index-url", "").split()
        sources += [("index", url) for url in indexes]
    return sources


def _client(settings: Mapping[str, str], index_urls: list[str]) -> PyPIClient:
    proxy = settings.get("proxy")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    hosts = settings.get("trusted-host", "").split()
    try:
        # Given by ourselves, because the client would send requests to trusted hosts past the proxy.
        insecure = httpx2.HTTPTransport(verify=False, proxy=proxy)
        return PyPIClient(
            trusted_hosts=hosts,
            mounts={f"all://{host}": insecure for host in hosts},
            verify=_verification(settings),
            proxy=proxy,
            timeout=float(settings.get("timeout") or settings.get("default-timeout") or 15),
            follow_redirects=True,
            auth=MultiDomainBasicAuth(prompting=False, index_urls=index_urls),
        )
    except (ValueError, ImportError, httpx2.InvalidURL) as error:
        raise DataError(
            f"pip's configuration cannot be used: {_mask(str(error))}. See `python -m pip config list`."
        ) from None


def _verification(settings: Mapping[str, str]) -> ssl.SSLContext | bool:
    cert = settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE")
    client_cert = settings.get("client-cert")
    if not cert and not client_cert:
        return True
    try:
        if cert and os.path.isdir(cert):
            context = ssl.create_default_context(capath=cert)
        else:
            context = ssl.create_default_context(cafile=cert)
        if client_cert:
            context.load_cert_chain(client_cert)
    except OSError as error:
        raise DataError(
            f"pip's `cert` ({cert}) or `client-cert` ({client_cert}) cannot be read: {error}. "
            "Correct the pip configuration."
        ) from error
    return context


def _find(client: PyPIClient, kind: str, url: str, archive: Archive) -> list[Link]:
    finder = PackageFinder(
        cast(Fetcher, client),
        index_urls=[url] if kind == "index" else [],
        find_links=[url] if kind == "find_links" else [],
        no_binary=[":all:"],
        ignore_compatibility=True,
    )
    matches = finder.find_matches(f"{archive.package}=={archive.version}")
    return [match.link for match in matches if match.link.filename.endswith(".tar.gz")]


def _receive(client: PyPIClient, link: Link, archive: Archive, path: Path) -> str:
    """Stream the archive to its file; what is wrong with it, or an empty text."""
    announced = (link.hash_option or {}).get("sha256", [archive.sha256])
    if archive.sha256 not in announced:
        return f"offers an archive with SHA-256 {announced[0]}"
    digest = hashlib.sha256()
    received = 0
    # Otherwise a server may label the .tar.gz as a compressed transfer, and it would arrive unpacked.
    headers = {"Accept-Encoding": "identity"}
    with client.stream("GET", link.url_without_fragment, headers=headers) as response:
        if response.status_code != 200:
            return f"answered {response.status_code} {response.reason_phrase}"
        with _progress() as progress, path.open("wb") as file:
            task = progress.add_task(f"{archive.package} {archive.version}", total=archive.num_bytes)
            for chunk in response.iter_bytes(_CHUNK):
                received += len(chunk)
                if received > archive.num_bytes:
                    return f"sent more than the {archive.num_bytes} bytes of the pinned archive"
                digest.update(chunk)
                file.write(chunk)
                progress.update(task, completed=received)
    if digest.hexdigest() != archive.sha256:
        return f"sent {received} bytes with SHA-256 {digest.hexdigest()}"
    return ""


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def _libraries_quiet(messages: list[str]) -> Iterator[None]:
    """Collect unearth's warnings instead of printing them: one index without the package is no news.

    httpx2 says nothing at all, because at INFO it logs whole addresses, with the tokens in them.
    """

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    finder, requests = logging.getLogger("unearth"), logging.getLogger("httpx2")
    handler, propagate, level = Collect(logging.WARNING), finder.propagate, requests.level
    finder.addHandler(handler)
    finder.propagate = False
    requests.setLevel(logging.WARNING)
    try:
        yield
    finally:
        finder.removeHandler(handler)
        finder.propagate = propagate
        requests.setLevel(level)


def _mask(text: str) -> str:
    """The text with web addresses cut down to their hosts: a login may stand before, a token after."""
    login, host, rest = r"(?:[^\s'\"]*@)?", r"([^\s/?#'\"]*?)", r"(?:[/?#][^\s'\"]*?)?(?=:?(?:[\s'\"]|$))"
    return re.sub(rf"\b(?!file:)[a-z][a-z0-9+.-]*://{login}{host}{rest}", r"\1", text)
