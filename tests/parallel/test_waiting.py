"""What a rank waits in collectives for another that comes late."""

import json
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import Work

from cctrain.launch.local import free_port, rank_environment
from cctrain.parallel.mesh import join_mesh
from cctrain.parallel.waiting import seconds_waited

LATE = 0.3  # seconds
COLLECTIVES = {
    "all_reduce": lambda x: dist.all_reduce(x),
    "all_reduce, not waited for at once": lambda x: dist.all_reduce(x, async_op=True).wait(),
    "all_gather": lambda x: dist.all_gather([torch.zeros_like(x) for _ in range(2)], x),
    "reduce_scatter": lambda x: dist.reduce_scatter(x[:4], [x[:4].clone(), x[4:].clone()]),
    "broadcast": lambda x: dist.broadcast(x, 1),
    "barrier": lambda x: dist.barrier(),
}


@pytest.mark.processes
def test_every_kind_of_collective_counts_what_its_rank_waits_for_a_late_one():
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=rank_environment(rank, 2, port) | {"CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    in_time, late = (json.loads(rank.communicate(timeout=120)[0]) for rank in ranks)
    assert set(in_time) == set(COLLECTIVES)
    assert min(in_time.values()) > 0.9 * LATE
    assert all(late[name] < in_time[name] for name in COLLECTIVES)


def test_what_takes_time_without_a_collective_is_no_waiting():
    with join_mesh():
        before = seconds_waited()
        time.sleep(0.01)
        assert seconds_waited() == before
        dist.all_reduce(torch.zeros(1))
        assert seconds_waited() > before


def test_pytorch_is_left_as_it_was():
    wait = Work.wait
    with join_mesh():
        assert Work.wait is not wait
    assert Work.wait is wait


if __name__ == "__main__":
    with join_mesh() as mesh:
        waited = {}
        for name, collective in COLLECTIVES.items():
            dist.barrier()
            before = seconds_waited()
            if mesh.rank == 1:
                time.sleep(LATE)
            collective(torch.ones(8))
            waited[name] = seconds_waited() - before
    print(json.dumps(waited))
