"""What `tools/check_atlas.py` measures, where the answer is known; and the whole tool, on a small atlas."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cctrain.data.store.store import TokenStore
from tests.data.conftest import prepared
from tools.check_atlas import (
    CONTINUED,
    KILLED,
    ONE_WORKER,
    UNDISTURBED,
    Broken,
    differing,
    failures,
    file_digests,
    mean_entropy,
    mixing,
    prepare,
    read_atlas,
    session_members,
    watch,
)
from tools.synthetic_atlas import Shape, write_atlas

ROOT = Path(__file__).parents[2]
MIB = 2**20

# A parent that holds 40 MiB and waits, while its child holds 60 MiB and works for so many seconds.
FAMILY = """
import subprocess, sys
mine = b"x" * (40 * 2**20)
code = "import time; held = b'y' * (60 * 2**20)\\nwhile time.process_time() < SECONDS: pass"
subprocess.run([sys.executable, "-c", code.replace("SECONDS", sys.argv[1])])
print("said at the end")
"""


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("atlas") / "atlas.h5ad"
    write_atlas(path, Shape(cells=3_000, expressed=40, genes=300, types=10), seed=0)
    return path


@pytest.fixture(scope="module")
def store(atlas: Path) -> TokenStore:
    return prepared(atlas.parent / "store", atlas)


def family(seconds: float) -> list[str]:
    return [sys.executable, "-c", FAMILY, str(seconds)]


@pytest.mark.processes
def test_memory_and_work_of_all_processes_are_added_up(tmp_path: Path) -> None:
    watched, exit_code = watch(family(1), tmp_path / "log", tmp_path, kill_after=None)

    assert exit_code == 0
    assert not watched.killed
    assert watched.processes == 2
    assert watched.cpu_seconds > 1
    assert 100 * MIB < watched.shared_once_bytes <= watched.peak_bytes < 180 * MIB
    assert "said at the end" in (tmp_path / "log").read_text()


@pytest.mark.processes
def test_a_kill_ends_all_processes_of_the_command_after_so_much_work(tmp_path: Path) -> None:
    watched, exit_code = watch(family(600), tmp_path / "log", tmp_path, kill_after=1)

    assert watched.killed
    assert exit_code == -signal.SIGKILL
    assert watched.processes == 2
    assert watched.seconds > 1


@pytest.mark.processes
def test_members_of_a_session_are_found_after_their_parent_is_gone() -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '60'])"
    leader = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    leader.wait()
    [orphan] = session_members(leader.pid)
    os.kill(orphan, signal.SIGKILL)


def test_every_kind_of_difference_between_folders_is_found(tmp_path: Path) -> None:
    for name, content in (("same", "a"), ("changed", "b"), ("missing", "c")):
        (tmp_path / "one" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / "deep" / name).write_text(content)
    (tmp_path / "other" / "deep").mkdir(parents=True)
    for name, content in (("same", "a"), ("changed", "B"), ("new", "d")):
        (tmp_path / "other" / "deep" / name).write_text(content)

    one, other = file_digests(tmp_path / "one"), file_digests(tmp_path / "other")

    assert differing(one, one) == []
    assert differing(one, other) == ["deep/changed", "deep/missing", "deep/new"]


def test_entropy_is_that_of_the_labels_of_whole_batches() -> None:
    labels = np.array([0, 1, 2, 3, 5, 5, 5, 5, 0, 0, 1, 1, 0, 1])
    assert mean_entropy(labels, 4) == pytest.approx((2 + 0 + 1) / 3)


def test_a_prepared_atlas_is_as_mixed_as_a_random_permutation_and_the_atlas_is_not(
    store: TokenStore, atlas: Path
) -> None:
    [row] = mixing(store, read_atlas(atlas)[0], batches=[32], epochs=60)

    assert abs(row["training_against_random"]) < 0.01
    assert row["unshuffled_against_random"] < -0.5
    assert row["block_reads_of_unshuffled_against_random"] < row["training_against_random"]


def test_a_batch_larger_than_the_training_split_is_refused(store: TokenStore, atlas: Path) -> None:
    with pytest.raises(Broken, match=r"no batch of 4,096 cells among 2,\d+ training cells"):
        mixing(store, read_atlas(atlas)[0], batches=[4096], epochs=1)


def test_a_prepare_that_fails_ends_the_check_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(Broken, match=r"exit code [23]: .*absent\.h5ad"):
        prepare(tmp_path / "absent.h5ad", tmp_path / "one-worker", workers=1)


def a_result(**changes: Any) -> dict[str, Any]:
    run = {"cpu_seconds": 100.0, "peak_bytes": 2**30, "processes": 3, "messages": []}
    row = {"batch": 64, "training_against_random": 0.001, "unshuffled_against_random": -0.9}
    return {
        "runs": {
            UNDISTURBED: run,
            ONE_WORKER: run,
            KILLED: run,
            CONTINUED: run | {"cpu_seconds": 50.0, "messages": ["continues"]},
        },
        "differing_files": {ONE_WORKER: [], KILLED: []},
        "mixing": [row],
        "bounds": {"memory_bytes": 2**31, "entropy": 0.01},
    } | changes


def test_every_broken_bound_is_named_and_nan_breaks_it() -> None:
    fine = a_result()
    run, row = fine["runs"][UNDISTURBED], fine["mixing"][0]
    assert failures(fine) == []
    large = fine["runs"] | {ONE_WORKER: run | {"peak_bytes": 2**31}}
    assert failures(a_result(runs=large)) == ["memory, one-worker: 2.00 GiB in 3 processes"]
    slow_and_silent = fine["runs"] | {CONTINUED: run | {"cpu_seconds": 100.0}}
    assert len(failures(a_result(runs=slow_and_silent))) == 2
    [changed] = failures(a_result(differing_files={ONE_WORKER: [], KILLED: ["a", "b"]}))
    assert changed == "bytes, killed: 2 files differ from undisturbed's, the first is a"
    for value in (0.01, -0.02, float("nan")):
        assert len(failures(a_result(mixing=[row | {"training_against_random": value}]))) == 1
    [unsorted] = failures(a_result(mixing=[row | {"unshuffled_against_random": 0.001}]))
    assert "not sorted" in unsorted


@pytest.mark.slow
@pytest.mark.processes
def test_a_small_atlas_keeps_every_bound(tmp_path: Path) -> None:
    atlas, out = tmp_path / "atlas.h5ad", tmp_path / "result.json"
    options = f"--batches 64 256 --epochs 20 --kill-at 0.6 --out {out}"
    write_atlas(atlas, Shape(cells=10_000, expressed=300, genes=2_000, types=20), seed=0)

    done = subprocess.run(
        [sys.executable, "-m", "tools.check_atlas", atlas, *options.split(), "--work", tmp_path / "work"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "every bound holds" in done.stdout
    result = json.loads(out.read_text())
    assert result["runs"][UNDISTURBED]["processes"] >= 3
    assert result["runs"][KILLED]["seconds"] < result["runs"][UNDISTURBED]["seconds"]
    assert [row["batch"] for row in result["mixing"]] == [64, 256]
    assert (tmp_path / "work" / UNDISTURBED / "store" / "manifest.json").is_file()
    assert not (tmp_path / "work" / KILLED).exists()
