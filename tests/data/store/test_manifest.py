from pathlib import Path

import pytest

from cctrain.data.store.manifest import (
    FORMAT,
    VERSION,
    check_fields,
    check_files,
    check_whole,
    damaged_files,
    file_entries,
    read_manifest,
    write_manifest,
)
from cctrain.errors import DataError

MANIFEST = {"format": FORMAT, "version": VERSION, "container": "zarr", "num_cells": 60}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Two files of 100,000 bytes that differ in their first byte alone, and one of a few."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"a" + bytes(99_999))
    (tmp_path / "deep" / "b").write_bytes(b"b" + bytes(99_999))
    (tmp_path / "c").write_bytes(b"short")
    write_manifest(tmp_path, MANIFEST | {"files": file_entries(tmp_path)})
    return tmp_path


def test_it_comes_back_as_it_was_written(written):
    manifest = read_manifest(written)
    assert {name: manifest[name] for name in MANIFEST} == MANIFEST
    assert list(manifest["files"]) == ["c", "deep/a", "deep/b"]
    assert manifest["files"]["c"]["bytes"] == 5


def test_it_is_not_among_its_files_when_it_is_written_again(written):
    assert list(file_entries(written)) == ["c", "deep/a", "deep/b"]


@pytest.mark.parametrize("change", [("60", "61"), ('"num_cells": 60', '"num_cells": 60, "num_train": 60')])
def test_one_changed_character_is_an_error(written, change):
    file = written / "manifest.json"
    file.write_text(file.read_text().replace(*change, 1))
    with pytest.raises(DataError, match=r"manifest\.json: it was altered"):
        read_manifest(written)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "not the manifest"),
        ("[1]", "not the manifest"),
        ('{"format": "cctrain-token-store", "version": 1}', "version 1, and this cctrain reads 2: prepare the store"),
        ('{"format": "cctrain-token-store", "version": 2}', "it was altered"),
    ],
)
def test_a_manifest_of_something_else_is_refused(tmp_path, content, message):
    file = tmp_path / "manifest.json"
    file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


def test_a_container_that_is_not_known_is_refused(tmp_path):
    write_manifest(tmp_path, MANIFEST | {"container": "parquet"})
    with pytest.raises(DataError, match="container 'parquet' is none of zarr, webdataset"):
        read_manifest(tmp_path)


def test_a_folder_without_manifest_is_no_store(tmp_path):
    with pytest.raises(DataError, match="not a token store"):
        read_manifest(tmp_path)


def test_whole_files_pass_every_look(written):
    manifest = read_manifest(written)
    check_files(written, manifest)
    check_whole(written, manifest, manifest["files"])
    assert damaged_files(written, manifest) == []


def test_the_quick_look_sees_the_end_of_a_file_and_the_others_all_of_it(written):
    manifest = read_manifest(written)
    (written / "deep" / "a").write_bytes(b"x" + bytes(99_999))
    check_files(written, manifest)
    with pytest.raises(DataError, match="deep/a: its bytes have changed"):
        check_whole(written, manifest, ["deep/a"])
    assert "deep/a: its bytes have changed" in damaged_files(written, manifest)[0]
    (written / "deep" / "a").write_bytes(b"a" + bytes(99_998) + b"x")
    with pytest.raises(DataError, match="deep/a: another file than"):
        check_files(written, manifest)


def test_every_look_names_a_file_that_is_not_there(written):
    manifest = read_manifest(written)
    (written / "c").unlink()
    (written / "c").mkdir()
    with pytest.raises(DataError, match="c: missing"):
        check_files(written, manifest)
    with pytest.raises(DataError, match="/c: "):
        check_whole(written, manifest, ["c"])
    assert [message.rsplit(": ", 1)[1] for message in damaged_files(written, manifest)] == ["missing"]


def test_a_file_that_was_copied_over_another_is_told_from_one_that_changed(written):
    manifest = read_manifest(written)
    (written / "deep" / "b").write_bytes((written / "deep" / "a").read_bytes())
    [message] = damaged_files(written, manifest)
    assert "deep/b: it holds what belongs into deep/a" in message


def test_hashing_advances_by_the_bytes_of_every_file(written):
    amounts: list[int] = []
    damaged_files(written, read_manifest(written), amounts.append)
    assert amounts == [5, 100_000, 100_000]


def test_it_holds_no_number_that_json_lacks(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(tmp_path, {"loss": float("nan")})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("held_out", {}),
        ("seed", "0"),
        ("hold_out", True),
        ("split_by", 3),
        ("group_by", []),
        ("failed", None),
        ("notes", 1),
    ],
)
def test_a_field_of_another_kind_is_refused_whatever_the_digest_says(small_store, field, value):
    check_fields(small_store.path, small_store.manifest)
    with pytest.raises(DataError, match=f"{field} is not what cctrain writes there"):
        check_fields(small_store.path, small_store.manifest | {field: value})
