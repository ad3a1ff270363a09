import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cctrain.data.fetch import DATASETS, Dataset, Member, fetch
from cctrain.data.package_index import Archive
from cctrain.errors import DataError, UsageError

COUNTS = b"%%MatrixMarket matrix coordinate integer general\n2 1 1\n1 1 3\n"
GENES = b"ENSG1\tA\nENSG2\tB\n"


@pytest.fixture
def find_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives that is all that pip is configured to know."""
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(find_links: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive of a data set `tiny` in the find-links folder, with a file that must stay in it."""
    archive = find_links / "tinycells-1.0.tar.gz"
    files = {"matrix.mtx": COUNTS, "genes.tsv": GENES, "setup.py": b"raise SystemExit"}
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            add_file(tar, f"tinycells-1.0/{name}", content)
    register(monkeypatch, archive)
    return archive


def add_file(tar: tarfile.TarFile, path: str, content: bytes) -> None:
    info = tarfile.TarInfo(path)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def register(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    """Pin the archive as it is now, with the members that a good one has."""
    packed = archive.read_bytes()
    members = tuple(
        Member(f"tinycells-1.0/{name}", name, hashlib.sha256(content).hexdigest(), len(content))
        for name, content in (("matrix.mtx", COUNTS), ("genes.tsv", GENES))
    )
    pinned = Archive("tinycells", "1.0", hashlib.sha256(packed).hexdigest(), len(packed))
    monkeypatch.setitem(DATASETS, "tiny", Dataset(pinned, members, "matrix.mtx", "Tiny.", "Here.", "None."))


def test_a_fetched_folder_holds_the_pinned_files_and_where_they_are_from(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "data" / "tiny"

    assert fetch("tiny", out) == out / "matrix.mtx"

    assert sorted(path.name for path in out.iterdir()) == ["SOURCE.txt", "genes.tsv", "matrix.mtx"]
    assert (out / "matrix.mtx").read_bytes() == COUNTS
    assert (out / "genes.tsv").read_bytes() == GENES
    source = (out / "SOURCE.txt").read_text()
    assert "Origin: Here." in source
    assert hashlib.sha256(tiny.read_bytes()).hexdigest() in source
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


def test_a_simple_index_serves_as_well_as_a_folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "simple" / "tinycells" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(f'<a href="{tiny.as_uri()}">{tiny.name}</a>')
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())

    fetch("tiny", tmp_path / "out")

    assert (tmp_path / "out" / "matrix.mtx").read_bytes() == COUNTS


def test_the_environment_wins_over_pips_configuration_file(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = tmp_path / "pip.conf"
    configuration.write_text(f"[global]\nfind-links = {tiny.parent}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataError, match="was not found"):
        fetch("tiny", tmp_path / "first")

    monkeypatch.delenv("PIP_FIND_LINKS")
    fetch("tiny", tmp_path / "second")

    assert (tmp_path / "second" / "matrix.mtx").is_file()


def test_a_second_call_downloads_nothing(tiny: Path, tmp_path: Path) -> None:
    fetch("tiny", tmp_path / "out")
    tiny.unlink()

    assert fetch("tiny", tmp_path / "out") == tmp_path / "out" / "matrix.mtx"


def test_a_folder_with_a_changed_file_is_refused_and_left_alone(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fetch("tiny", out)
    (out / "genes.tsv").write_text("mine")

    with pytest.raises(DataError, match=r"genes.tsv has SHA-256 .*Move it away"):
        fetch("tiny", out)

    assert (out / "genes.tsv").read_text() == "mine"


def test_a_folder_of_other_things_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(DataError, match=r"does not hold tiny: matrix.mtx is missing"):
        fetch("tiny", tmp_path)


def test_an_archive_with_another_digest_is_refused_before_it_is_opened(tiny: Path, tmp_path: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:-1] + b"x")

    with pytest.raises(DataError, match=r"tinycells 1.0 .*\n.*tinycells-1.0.tar.gz: sent \d+ bytes with SHA"):
        fetch("tiny", tmp_path / "out")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["links"]


def test_an_archive_that_never_ends_is_cut_off(tiny: Path, tmp_path: Path) -> None:
    tiny.write_bytes(tiny.read_bytes() + bytes(10))

    with pytest.raises(DataError, match="sent more than"):
        fetch("tiny", tmp_path / "out")


def replace_member(kind: bytes | None, content: bytes) -> Callable[[tarfile.TarFile], None]:
    def write(tar: tarfile.TarFile) -> None:
        add_file(tar, "tinycells-1.0/genes.tsv", GENES)
        if kind is None:
            add_file(tar, "tinycells-1.0/matrix.mtx", content)
        else:
            info = tarfile.TarInfo("tinycells-1.0/matrix.mtx")
            info.type, info.linkname = kind, content.decode()
            tar.addfile(info)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (replace_member(tarfile.SYMTYPE, b"/etc/hostname"), "is not a plain file"),
        (replace_member(tarfile.LNKTYPE, b"tinycells-1.0/genes.tsv"), "is not a plain file"),
        (replace_member(None, COUNTS + b"more"), "is not a plain file of"),
        (replace_member(None, COUNTS.replace(b"3", b"4")), "matrix.mtx in the archive has SHA-256"),
        (lambda tar: add_file(tar, "tinycells-1.0/genes.tsv", GENES), "lacks tinycells-1.0/matrix.mtx"),
    ],
    ids=["symbolic link", "hard link", "other size", "other content", "missing"],
)
def test_a_member_that_is_not_the_pinned_file_leaves_nothing_behind(
    find_links: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[tarfile.TarFile], None],
    message: str,
) -> None:
    archive = find_links / "tinycells-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        write(tar)
    register(monkeypatch, archive)

    with pytest.raises(DataError, match=message):
        fetch("tiny", tmp_path / "out")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["links"]


def test_a_file_in_place_of_the_folder_is_a_clear_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")

    with pytest.raises(DataError, match="is there already"):
        fetch("tiny", tmp_path / "out")


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'pbmc3k'\? There are: pbmc3k, retina"):
        fetch("PBMC3", tmp_path)
