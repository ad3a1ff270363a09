"""Which code this is, asked in a small checkout of the test's own."""

import subprocess
from pathlib import Path

import pytest

from cctrain import code_version
from cctrain.code_version import code_commit, code_difference, code_digest


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "cctrain"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "loop.py").write_text("steps = 1\n")
    (tmp_path / "notes.txt").write_text("a\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=first")
    monkeypatch.setattr(code_version, "PACKAGE", package)
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout):
    assert code_commit() == git(checkout, "rev-parse", "HEAD").strip()
    assert code_difference() == ""


def test_kept_results_are_no_code(checkout):
    kept = checkout / "tools" / "results" / "speed.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message=second")
    kept.write_text('{"rows": []}\n')
    assert code_commit() == git(checkout, "rev-parse", "HEAD").strip()
    (checkout / "notes.txt").write_text("b\n")
    changed = code_commit()
    assert changed != git(checkout, "rev-parse", "HEAD").strip()
    kept.write_text('{"rows": [1]}\n')
    assert code_commit() == changed


def test_changes_and_new_files_of_the_package_are_a_patch_that_applies(checkout, tmp_path_factory):
    clean = tmp_path_factory.mktemp("clean") / "clone"
    git(checkout, "clone", "--quiet", ".", str(clean))
    (checkout / "cctrain" / "loop.py").write_text("steps = 2\n")
    (checkout / "cctrain" / "new.py").write_text("x = 1\n")
    (checkout / "notes.txt").write_text("b\n")
    (checkout / "data.bin").write_text("not of the package\n")
    commit, _, digest = (code_commit() or "").partition("+")
    assert commit == git(checkout, "rev-parse", "HEAD").strip()
    assert len(digest) == 12
    (checkout / "submitted.diff").write_text(code_difference())
    git(clean, "apply", str(checkout / "submitted.diff"))
    for name in ("cctrain/loop.py", "cctrain/new.py", "notes.txt"):
        assert (clean / name).read_text() == (checkout / name).read_text()
    assert not (clean / "data.bin").exists()


def test_the_digest_is_of_the_source_alone_and_needs_no_git(checkout, tmp_path_factory, monkeypatch):
    before = code_digest()
    copy = tmp_path_factory.mktemp("copy") / "elsewhere"
    subprocess.run(["cp", "-r", checkout / "cctrain", copy], check=True)
    monkeypatch.setattr(code_version, "PACKAGE", copy)
    assert code_commit() is None
    assert code_digest() == before
    (copy / "loop.py").rename(copy / "pool.py")
    renamed = code_digest()
    assert renamed != before
    (copy / "pool.py").write_text("steps = 3\n")
    assert code_digest() not in (before, renamed)


def test_a_package_inside_somebody_elses_checkout_has_no_commit(checkout, monkeypatch):
    foreign = checkout / "site-packages"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    monkeypatch.setattr(code_version, "PACKAGE", foreign)
    assert code_commit() is None
