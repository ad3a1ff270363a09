"""What ranks see of themselves and of their nodes, put together."""

import numpy as np
import torch

from cctrain.parallel.mesh import join_mesh
from cctrain.training.observations import Observer, memory_of_rank, together

CPU = torch.device("cpu")
MIB = 2**20


def test_the_rank_with_most_memory_and_the_one_that_waited_longest_are_told():
    rows = torch.tensor([[1.0, 0.5, 0, 300, 400, 10, 20, 30], [0.0, 0.1, 0, 500, 600, 0, 0, 0]], dtype=torch.float64)
    told = together(rows)
    assert told["data_seconds"] == 0.5
    assert told["memory/bytes"] == 500
    assert told["memory/peak_bytes"] == 600


def test_what_every_rank_waits_is_communication_and_what_one_waits_more_is_imbalance():
    rows = torch.tensor([[1.0, 0, 0.75, 1, 1, 0, 0, 0], [0.0, 0, 0.25, 1, 1, 0, 0, 0]], dtype=torch.float64)
    told = together(rows)
    assert told["communication_seconds"] == 0.25
    assert told["imbalance_seconds"] == 0.5
    assert "waited_seconds" not in told


def test_each_node_is_told_by_its_first_rank():
    own = [0.0, 0.0, 1.0, 1.0]
    rows = torch.tensor([[1, *own, 11, 12, 13], [0, *own, 0, 0, 0], [1, *own, 21, 22, 23]], dtype=torch.float64)
    told = together(rows)
    assert [told[f"system/node-{node}/cpu_percent"] for node in (0, 1)] == [11, 21]
    assert [told[f"system/node-{node}/memory_bytes"] for node in (0, 1)] == [12, 22]
    assert [told[f"system/node-{node}/network_bytes_per_second"] for node in (0, 1)] == [13, 23]
    assert sum(key.startswith("system/") for key in told) == 6


def test_memory_that_is_given_back_stays_in_the_peak():
    before, _ = memory_of_rank(CPU)
    held = np.ones(64 * MIB, dtype=np.uint8)
    holding, _ = memory_of_rank(CPU)
    del held
    after, peak = memory_of_rank(CPU)
    assert holding - before > 60 * MIB
    assert holding - after > 60 * MIB
    assert peak - after > 60 * MIB


def test_the_processor_is_watched_between_two_calls():
    with join_mesh():
        observer = Observer(CPU)
        for _ in range(20):
            torch.ones(512, 512) @ torch.ones(512, 512)
        told = observer.observe(0.25, 0.0)
    assert told["data_seconds"] == 0.25
    assert 0 < told["system/node-0/cpu_percent"] <= 100
    assert told["system/node-0/memory_bytes"] > told["memory/bytes"] > 0
