import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cctrain.data.sources import hdf5_probe
from cctrain.data.sources.hdf5_probe import why_unreadable
from cctrain.data.sources.source import open_source
from cctrain.errors import DataError
from tests.data.conftest import random_counts, write_h5ad


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hdf5_probe, "CPU_SECONDS", 0.5)


def child_that(program: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", program], bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def zero_heap_of_strings(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = content.index(b"GCOL") + 16  # behind the header of the first heap
    content[start : start + 2000] = bytes(2000)
    path.write_bytes(content)


def test_a_whole_file_may_be_read_again_and_again(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(9, 4), obs={"kind": np.array(["a", "b", "c"] * 3)})
    assert [why_unreadable(path) for _ in range(3)] == [None] * 3


def test_what_is_no_hdf5_file_is_left_to_the_readers(tmp_path):
    (tmp_path / "text.h5ad").write_text("no cells")
    assert why_unreadable(tmp_path / "text.h5ad") is None
    assert why_unreadable(tmp_path / "absent.h5ad") is None


def test_a_file_on_which_hdf5_hangs_is_refused_and_the_next_one_is_read(tmp_path):
    damaged = write_h5ad(tmp_path / "damaged.h5ad", random_counts(9, 4))
    zero_heap_of_strings(damaged)
    with pytest.raises(DataError, match=r"damaged\.h5ad: .* the file is damaged"):
        open_source(damaged)
    whole = write_h5ad(tmp_path / "whole.h5ad", random_counts(9, 4))
    assert open_source(whole).num_cells == 9


def test_a_child_that_hangs_is_ended_and_the_key_is_said(tmp_path):
    child = child_that("input(); print('\"obs/age\"', flush=True)\nwhile True: pass")
    assert hdf5_probe._ask(child, tmp_path) == "HDF5 hangs at obs/age"
    assert child.poll() is not None


def test_a_child_that_crashes_is_noticed_and_the_key_is_said(tmp_path):
    child = child_that("import os; input(); print('\"obs/age\"', flush=True); os.abort()")
    assert hdf5_probe._ask(child, tmp_path) == "HDF5 crashes at obs/age"


def test_a_child_that_only_waits_for_a_disk_is_waited_for(tmp_path):
    child = child_that("import time; input(); time.sleep(1.5); print('done')")
    assert hdf5_probe._ask(child, tmp_path) is None


def test_a_file_that_was_looked_at_is_not_looked_at_again_with_the_same_scratch(tmp_path, monkeypatch):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(9, 4))
    open_source(path, scratch=tmp_path / "scratch")
    monkeypatch.setattr("cctrain.data.sources.source.why_unreadable", lambda path: "HDF5 was asked again")
    assert open_source(path, scratch=tmp_path / "scratch").num_cells == 9
    with pytest.raises(DataError, match="asked again"):
        open_source(path, scratch=tmp_path / "other")
