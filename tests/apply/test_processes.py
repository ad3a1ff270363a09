"""Tasks in processes of their own, and what is made of how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cctrain.apply.processes import KILLED, LEFT_OUT, OUT_OF_MEMORY, in_new_processes
from cctrain.errors import DataError
from cctrain.parallel.mesh import CACHES_OF_SHAPES, SHAPES_KEPT, Mesh


def out_of_memory() -> dict[str, Any]:
    raise torch.OutOfMemoryError


def not_allocated() -> dict[str, Any]:
    return {"size": len(torch.empty(2**60))}


def killed() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def endless() -> dict[str, Any]:
    time.sleep(600)
    return {}


def defective() -> dict[str, Any]:
    raise ValueError("a defect")


def refused() -> dict[str, Any]:
    raise DataError("no such store")


def place(mesh: Mesh | None = None) -> dict[str, Any]:
    return {"of_mesh": None if mesh is None else [mesh.num_ranks, mesh.num_context_ranks]}


def shapes_kept(mesh: Mesh) -> dict[str, Any]:
    return {"kept": os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]}


def one_without_memory(mesh: Mesh) -> dict[str, Any]:
    """The others wait for it."""
    if mesh.rank == 1:
        raise torch.OutOfMemoryError
    torch.distributed.barrier()
    return {"rank": mesh.rank}


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("task", "reason"), [(out_of_memory, OUT_OF_MEMORY), (not_allocated, OUT_OF_MEMORY), (killed, KILLED)]
)
def test_a_process_without_memory_is_a_point_that_was_left_out(task, reason):
    assert in_new_processes(task, ()) == {LEFT_OUT: reason}


@pytest.mark.slow
@pytest.mark.processes
def test_a_defect_is_an_error_with_its_traceback():
    with pytest.raises(RuntimeError, match="a defect"):
        in_new_processes(defective, ())


@pytest.mark.slow
@pytest.mark.processes
def test_an_error_of_the_user_is_raised_as_it_is():
    with pytest.raises(DataError, match="no such store"):
        in_new_processes(refused, ())


@pytest.mark.slow
@pytest.mark.processes
def test_a_measurement_ends_with_the_process_that_asked_for_it():
    asks = f"from {__name__} import endless, in_new_processes; in_new_processes(endless, ())"
    asking = subprocess.Popen([sys.executable, "-c", asks], cwd=Path(__file__).parents[2])
    while not (measuring := psutil.Process(asking.pid).children()):
        assert asking.poll() is None
        time.sleep(0.1)
    asking.kill()
    asking.wait()
    assert not psutil.wait_procs(measuring, timeout=60)[1]


@pytest.mark.slow
@pytest.mark.processes
def test_of_several_ranks_the_one_without_memory_speaks_for_all():
    assert in_new_processes(one_without_memory, (), 2, num_context_ranks=1) == {LEFT_OUT: OUT_OF_MEMORY}


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_mesh_is_given_where_its_rows_are_told(num_ranks):
    assert in_new_processes(place, (), num_ranks, num_ranks) == {"of_mesh": [num_ranks, num_ranks]}
    assert in_new_processes(place, (), num_ranks) == {"of_mesh": None}


@pytest.mark.slow
@pytest.mark.processes
def test_a_mesh_is_of_the_precision_that_is_told(monkeypatch):
    for cache in CACHES_OF_SHAPES:  # of a mesh that this process joined before
        monkeypatch.delenv(cache, raising=False)
    kept = {precision: in_new_processes(shapes_kept, (), 1, 1, precision) for precision in ("fp32", "bf16")}
    assert kept == {precision: {"kept": SHAPES_KEPT[precision]} for precision in kept}
