"""The tars as others see them: plain tar files, plain `webdataset`, and files that an attacker has changed."""

import os
import pickle
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from cctrain.data.inspect import inspect_store
from cctrain.data.store.manifest import file_entries, read_manifest, write_manifest
from cctrain.data.store.store import TokenStore, open_store, verify_store
from cctrain.errors import DataError
from tests.data.stores import many_shards

# What data/README.md tells users of webdataset to write: `only` keeps everything else from being decoded.
PLAIN_READER = """
import sys
from pathlib import Path
import numpy as np, webdataset
assert not any(name.split(".")[0] == "cctrain" for name in sys.modules)
tars = sorted(str(tar) for tar in Path(sys.argv[1]).glob("*.tar"))
samples = webdataset.WebDataset(tars, shardshuffle=False).decode({arguments})
read = np.zeros((70, 20), dtype=np.int64)
for sample in samples:
    row, indptr = int(sample["__key__"]), sample["indptr.npy"]
    for i, (start, stop) in enumerate(zip(indptr[:-1], indptr[1:])):
        read[row + i, sample["genes.npy"][start:stop]] = sample["counts.npy"][start:stop]
np.save(sys.argv[2], read)
"""
ONLY = 'only=["counts.npy", "genes.npy", "indptr.npy"]'


def read_plainly(shards: Path, out: Path, arguments: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PLAIN_READER.format(arguments=arguments), str(shards), str(out)]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, env=inherited | environment, cwd=out.parent, capture_output=True, text=True)


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return many_shards(tmp_path / "store", "webdataset")[0]


def npy_of_objects(value: object) -> bytes:
    with BytesIO() as stream:
        np.save(stream, np.array([value], dtype=object), allow_pickle=True)
        return stream.getvalue()


def rewrite(tar: Path, replaced: dict[str, bytes], added: dict[str, bytes]) -> None:
    """Members that end with a key of `replaced` get its content; those of `added` join every sample."""
    with tarfile.open(tar) as old:
        members = [(member.name, old.extractfile(member).read()) for member in old.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as new:
        for name, content in members:
            content = next((other for end, other in replaced.items() if name.endswith(end)), content)
            extra = added.items() if name.endswith("indptr.npy") else ()
            for path, value in [(name, content), *((name.replace("indptr.npy", key), data) for key, data in extra)]:
                header = tarfile.TarInfo(path)
                header.size = len(value)
                new.addfile(header, BytesIO(value))


def renew_manifest(root: Path) -> None:
    """As an attacker does who can write the store."""
    write_manifest(root, read_manifest(root) | {"files": file_entries(root)})


def test_plain_webdataset_reads_every_cell_under_its_secure_setting(tmp_path):
    store, counts = many_shards(tmp_path / "store", "webdataset")
    done = read_plainly(store.path / "shards", tmp_path / "read.npy", WDS_SECURE="1")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "read.npy"), counts)


def test_the_index_says_where_each_sample_lies(store):
    for number in range(store.manifest["num_shards"]):
        tar = store.path / "shards" / f"cells-{number:05d}.tar"
        index = np.load(tar.with_suffix(".index.npy"), allow_pickle=False)
        with tarfile.open(tar) as members:
            counts, genes, indptr = (members.getmembers()[i::3] for i in range(3))
        assert [member.name[12:] for member in (counts[0], genes[0], indptr[0])] == [
            ".counts.npy",
            ".genes.npy",
            ".indptr.npy",
        ]
        assert index["start"].tolist() == [member.offset for member in counts]
        assert index["stop"][:-1].tolist() == index["start"][1:].tolist()
        for name, dtype, found in (("counts", store.cells(np.arange(1)).counts.dtype, counts), ("genes", "u1", genes)):
            for record, member in zip(index, found, strict=True):
                payload = member.offset_data + member.size - record[name]
                tokens = int(payload) // np.dtype(dtype).itemsize
                assert 0 <= tokens <= 4 * 20
                assert member.offset_data < record[name] <= member.offset_data + member.size


def test_samples_are_whole_cells_named_by_their_first_row_without_time_or_user(store):
    members = []
    for tar in sorted((store.path / "shards").glob("*.tar")):
        with tarfile.open(tar) as opened:
            members += opened.getmembers()
    assert [int(member.name.split(".")[0]) for member in members[::3]] == list(range(0, 70, 4))
    assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in members} == {
        (0, 0, 0, "", "")
    }


def test_samples_hold_the_smallest_safe_types(store):
    with tarfile.open(store.path / "shards" / "cells-00000.tar") as tar:
        arrays = {
            member.name.split(".")[1]: np.load(BytesIO(tar.extractfile(member).read()), allow_pickle=False)  # type: ignore[union-attr]
            for member in tar.getmembers()[:3]
        }
    assert {name: array.dtype for name, array in arrays.items()} == {
        "counts": np.uint8,
        "genes": np.uint8,
        "indptr": np.int32,
    }


# ---- nothing that is loaded executes code


def test_a_pickle_in_a_tar_is_executed_by_nobody(store, tmp_path):
    marker, tar = tmp_path / "executed", store.path / "shards" / "cells-00000.tar"
    rewrite(tar, {}, dict.fromkeys(["evil.pyd", "pth", "x.pickle", "x.pkl"], pickle.dumps(Evil(marker))))
    renew_manifest(store.path)
    inspect_store(store.path)
    with pytest.raises(DataError, match=r"cells-00000\.tar"):
        open_store(store.path).cells(np.arange(70))
    with pytest.raises(DataError, match=r"cells-00000\.tar"):
        verify_store(store.path)
    assert read_plainly(store.path / "shards", tmp_path / "read.npy", ONLY).returncode == 0
    assert not marker.exists()
    assert read_plainly(store.path / "shards", tmp_path / "read.npy").returncode != 0
    assert marker.exists(), "the pickle of this test does nothing"


def test_an_array_of_objects_in_a_tar_is_executed_by_nobody(store, tmp_path):
    marker, tar = tmp_path / "executed", store.path / "shards" / "cells-00000.tar"
    rewrite(tar, {"genes.npy": npy_of_objects(Evil(marker))}, {})
    renew_manifest(store.path)
    with pytest.raises(DataError, match=r"cells-00000\.tar"):
        open_store(store.path).cells(np.arange(70))
    done = read_plainly(store.path / "shards", tmp_path / "read.npy", ONLY)
    assert "allow_pickle=False" in done.stderr
    assert not marker.exists()


@pytest.mark.parametrize("as_array", [True, False])
def test_an_index_that_is_a_pickle_is_refused_unread(store, tmp_path, as_array):
    marker, index = tmp_path / "executed", store.path / "shards" / "cells-00000.index.npy"
    index.write_bytes(npy_of_objects(Evil(marker)) if as_array else pickle.dumps(Evil(marker)))
    renew_manifest(store.path)
    with pytest.raises(DataError, match=r"cells-00000\.index\.npy: not an index of a shard"):
        open_store(store.path).cells(np.arange(70))
    with pytest.raises(DataError, match=r"cells-00000\.index\.npy"):
        verify_store(store.path)
    assert not marker.exists()


@pytest.mark.parametrize("change", ["another type", "too short", "beyond the end", "backwards", "another shard's"])
def test_an_index_that_lies_is_refused(store, change):
    file = store.path / "shards" / "cells-00000.index.npy"
    index = np.load(file)
    if change == "another type":
        index = np.zeros(len(index))
    elif change == "too short":
        index = index[:-1]
    elif change == "beyond the end":
        index["stop"][-1] += 2**20
    elif change == "backwards":
        index["genes"][0] = 0
    else:
        index = np.load(file.with_name("cells-00001.index.npy"))
    np.save(file, index)
    renew_manifest(store.path)
    with pytest.raises(DataError, match=r"cells-00000\."):
        open_store(store.path).cells(np.arange(70))
