"""A prepare that is interrupted, killed or short of memory, and what the next one makes of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cctrain.data.prepare import counting
from cctrain.data.prepare import inputs as inputs_module
from cctrain.data.prepare import prepare as prepare_module
from cctrain.data.prepare.prepare import prepare
from cctrain.data.store.store import verify_store
from cctrain.errors import DataError
from tests.data.conftest import ANY_CELL, prepared, random_counts, write_10x, write_h5ad
from tests.data.prepare.test_prepare import same_files, small_parts

STAGES = {
    "arrange": inputs_module,
    "scan_piece": inputs_module,
    "select": prepare_module,
    "sort_piece": counting,
    "count_tokens": counting,
    "fit_genes": prepare_module,
    "hash_content": prepare_module,
    "write_shard": prepare_module,
    "merge_obs": prepare_module,
    "file_entries": prepare_module,
}
# The stage, and at which of its calls it is interrupted.
STOPS = [
    ("sort_piece", 2),
    *((stage, 1) for stage in STAGES),
    ("scan_piece", 3),
    ("count_tokens", 2),
    ("write_shard", 2),
]


def sources(folder: Path) -> list[Path]:
    obs = {"type": ["a", "b"] * 20, "sample": [f"s{i % 8}" for i in range(40)]}
    return [
        write_h5ad(folder / "a.h5ad", random_counts(40, 12), obs=obs),
        write_h5ad(folder / "b.h5ad", random_counts(40, 12, seed=1), obs=obs),
    ]


def interrupted_at(stage: str, monkeypatch: pytest.MonkeyPatch, out: Path, *files: Path, **options: Any) -> None:
    """A prepare that stops where it would begin a stage."""

    def interrupt(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[stage], stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(out, *files, **options)


@pytest.mark.parametrize(
    ("stage", "at"),
    [STOPS[0], *(pytest.param(*stop, marks=pytest.mark.slow) for stop in STOPS[1:])],
)
def test_interrupted_anywhere_and_continued_the_bytes_are_the_same(tmp_path, monkeypatch, stage, at):
    small_parts(monkeypatch)
    files = sources(tmp_path)
    whole = prepared(tmp_path / "whole", *files, group_by="sample")
    work, calls = getattr(STAGES[stage], stage), 0

    def interrupt(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return work(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[stage], stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "store", *files, group_by="sample")
    assert not (tmp_path / "store").exists()
    continued = prepared(tmp_path / "store", *files, group_by="sample")
    assert same_files(whole.path, continued.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad", "store", "whole"]


def test_what_was_scanned_is_not_read_again(tmp_path, monkeypatch):
    small_parts(monkeypatch)
    files = sources(tmp_path)
    interrupted_at("select", monkeypatch, tmp_path / "store", *files)

    def refuse(*arguments, **named):
        raise AssertionError("scanned again")

    monkeypatch.setattr(inputs_module, "scan_piece", refuse)
    messages: list[str] = []
    prepare(files, tmp_path / "store", quality=ANY_CELL, report=messages.append)
    assert any("continuing" in message for message in messages)


@pytest.mark.parametrize("change", ["option", "source"])
def test_after_a_change_it_begins_anew(tmp_path, monkeypatch, change):
    files = sources(tmp_path)
    interrupted_at("select", monkeypatch, tmp_path / "store", *files)
    seed = 0
    if change == "option":
        seed = 1
    else:
        write_h5ad(files[1], random_counts(40, 12, seed=9))
    messages: list[str] = []
    prepare(files, tmp_path / "store", quality=ANY_CELL, seed=seed, report=messages.append)
    assert any("beginning anew" in message for message in messages)
    fresh = prepared(tmp_path / "fresh", *files, seed=seed)
    assert same_files(fresh.path, tmp_path / "store")


def test_a_source_that_fails_now_and_not_before_ends_it(tmp_path, monkeypatch):
    """Cells are sorted for the sources that could be read: with others, what was sorted is for nothing."""
    small_parts(monkeypatch)
    files = sources(tmp_path)
    interrupted_at("count_tokens", monkeypatch, tmp_path / "store", *files, keep_going=True)
    selection = tmp_path / "store.partial" / "scratch" / "selection.sha256"
    selection.write_text("0" * 64)
    with pytest.raises(DataError, match="begins anew"):
        prepared(tmp_path / "store", *files, keep_going=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad"]


def start(folder: Path, files: list[Path], workers: int) -> subprocess.Popen:
    """`cctrain prepare` as a process, with the group of its workers."""
    arguments = ["prepare", *map(str, files), f"--out={folder / 'store'}", "--min-genes=1", "--min-cells=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-m", "cctrain", *arguments, f"--workers={workers}"],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for(found, process: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not found():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.processes
def test_killed_with_its_workers_and_continued_the_bytes_are_the_same(tmp_path):
    files = [*sources(tmp_path), write_10x(tmp_path / "c", random_counts(300, 200, seed=2))]
    whole = prepared(tmp_path / "whole", *files)
    process = start(tmp_path, files, workers=2)
    profiles = tmp_path / "store.partial" / "scratch" / "profiles"
    wait_for(lambda: profiles.is_dir() and any(profiles.iterdir()), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert not (tmp_path / "store").exists()
    again = start(tmp_path, files, workers=2)
    assert again.wait(timeout=300) == 0
    assert "continuing" in again.stderr.read()
    assert same_files(whole.path, tmp_path / "store")
    assert verify_store(tmp_path / "store") == []


@pytest.mark.processes
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_signal_ends_it_with_a_word_on_how_to_continue(tmp_path, number, code):
    files = [*sources(tmp_path), write_10x(tmp_path / "c", random_counts(3000, 200, seed=2))]
    process = start(tmp_path, files, workers=2)
    profiles = tmp_path / "store.partial" / "scratch" / "profiles"
    wait_for(lambda: profiles.is_dir() and any(profiles.iterdir()), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


@pytest.mark.processes
def test_a_worker_that_runs_out_of_memory_is_exit_code_3_and_one_line(tmp_path):
    files = [*sources(tmp_path), write_10x(tmp_path / "c", random_counts(3000, 200, seed=2))]
    process = start(tmp_path, files, workers=2)
    profiles = tmp_path / "store.partial" / "scratch" / "profiles"
    wait_for(lambda: profiles.is_dir() and any(profiles.iterdir()), process)
    for worker in psutil.Process(process.pid).children(recursive=True):
        if "spawn_main" in " ".join(worker.cmdline()):
            worker.send_signal(signal.SIGKILL)  # what the kernel sends
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 3
    assert "killed by signal 9" in errors
    assert "Traceback" not in errors
