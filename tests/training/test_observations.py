"""What ranks see of themselves and of their nodes, put together."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cctrain.parallel.mesh import join_mesh
from cctrain.training import observations
from cctrain.training.observations import Observer, memory_of_rank, together

CPU = torch.device("cpu")
MIB = 2**20


def test_the_rank_with_most_memory_and_the_one_that_waited_longest_are_told():
    told = together([[0, 0.5, 0, 300, 400, 10, 20, 30], [1, 0.1, 0, 500, 600, 0, 0, 0]], "cpu")
    assert told["data_seconds"] == 0.5
    assert told["memory/bytes"] == 500
    assert told["memory/peak_bytes"] == 600


def test_what_every_rank_waits_is_communication_and_what_one_waits_more_is_imbalance():
    told = together([[0, 0, 0.75, 1, 1, 0, 0, 0], [1, 0, 0.25, 1, 1, 0, 0, 0]], "cpu")
    assert told["communication_seconds"] == 0.25
    assert told["imbalance_seconds"] == 0.5
    assert "waited_seconds" not in told


def test_a_rank_alone_has_no_communication_to_tell():
    told = together([[0, 0, 0.75, 1, 1, 0, 0, 0]], "cpu")
    assert not {"communication_seconds", "imbalance_seconds"} & told.keys()


def test_each_node_is_told_by_its_first_rank():
    own = [0.0, 0.0, 1.0, 1.0]
    told = together([[0, *own, 11, 12, 13], [1, *own, 0, 0, 0], [0, *own, 21, 22, 23]], "cpu")
    assert [told[f"system/node-{node}/cpu_percent"] for node in (0, 1)] == [11, 21]
    assert [told[f"system/node-{node}/memory_bytes"] for node in (0, 1)] == [12, 22]
    assert [told[f"system/node-{node}/network_bytes_per_second"] for node in (0, 1)] == [13, 23]
    assert sum(key.startswith("system/") for key in told) == 6


def test_each_gpu_is_told_by_its_rank_under_its_node_by_the_names_of_mlflow():
    alike = [0.0] * 7
    told = together([[0, *alike, 100, 10], [1, *alike, 200, 20], [0, *alike, 300, 30], [1, *alike, 400, 40]], "cuda")
    assert {name: value for name, value in told.items() if "gpu" in name} == {
        f"system/node-{node}/gpu_{gpu}_{name}": scale * (2 * node + gpu + 1)
        for node in (0, 1)
        for gpu in (0, 1)
        for name, scale in (("memory_usage_megabytes", 100), ("utilization_percentage", 10))
    }


def test_waiting_is_not_told_of_gpus_whose_collectives_nobody_waits_for():
    told = together([[0, *[0.0] * 7, 100, 10], [1, *[0.0] * 7, 100, 10]], "cuda")
    assert not {"communication_seconds", "imbalance_seconds"} & told.keys()


def test_what_a_gpu_does_not_tell_is_left_out():
    told = together([[0, *[0.0] * 7, 100, math.nan]], "cuda")
    assert told["system/node-0/gpu_0_memory_usage_megabytes"] == 100
    assert "system/node-0/gpu_0_utilization_percentage" not in told


def test_a_node_that_did_not_look_beside_one_that_did_is_left_out():
    own, unseen = [0.0, 0.0, 1.0, 1.0], [math.nan] * 3
    told = together([[0, *own, *unseen], [1, *own, *unseen], [0, *own, 21, 22, 23]], "cpu")
    assert {name: value for name, value in told.items() if name.startswith("system/")} == {
        "system/node-1/cpu_percent": 21,
        "system/node-1/memory_bytes": 22,
        "system/node-1/network_bytes_per_second": 23,
    }


def test_a_rank_tells_of_its_gpu_what_is_not_free_and_what_the_driver_says(gpu_of_pytorch):
    told = gpu_of_pytorch().observe(0.0, 0.0)
    assert told["system/node-0/gpu_0_memory_usage_megabytes"] == 60_000
    assert told["system/node-0/gpu_0_utilization_percentage"] == 87
    assert told["memory/bytes"] == 50 * 10**9


def test_without_the_package_that_asks_the_driver_the_utilization_is_left_out(gpu_of_pytorch, monkeypatch):
    def missing(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    told = gpu_of_pytorch().observe(0.0, 0.0)
    assert [name for name in told if "gpu" in name] == ["system/node-0/gpu_0_memory_usage_megabytes"]


def test_without_a_gpu_none_is_asked(monkeypatch):
    asked = []
    for name in ("mem_get_info", "utilization"):
        monkeypatch.setattr(torch.cuda, name, asked.append)
    with join_mesh():
        told = Observer(CPU).observe(0.0, 0.0)
    assert not asked
    assert not [name for name in told if "gpu" in name]


@pytest.fixture
def gpu_of_pytorch(monkeypatch):
    """Observes what PyTorch would say of a GPU, where there is none: 50 of 80 GB are allocated, others hold 10, and
    kernels run 87 % of the time."""
    says = {"mem_get_info": (20 * 10**9, 80 * 10**9), "utilization": 87}
    says |= {"memory_allocated": 50 * 10**9, "max_memory_allocated": 55 * 10**9}
    for name, said in says.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, said=said: said)
    monkeypatch.setattr(observations, "gather_numbers", lambda values, device: [values])
    return lambda: Observer(torch.device("cuda", 0))


def test_a_step_before_the_next_look_says_nothing_of_node_and_gpu(gpu_of_pytorch, monkeypatch):
    monkeypatch.setattr(observations.time, "monotonic", lambda: 1000.0)
    observer = gpu_of_pytorch()
    first, second = (observer.observe(0.0, 0.0) for _ in range(2))
    assert {name for name in first.keys() - second.keys() if name.startswith("system/")} == first.keys() - second.keys()
    assert {"system/node-0/cpu_percent", "system/node-0/gpu_0_memory_usage_megabytes"} <= first.keys() - second.keys()
    assert second["memory/bytes"] == 50 * 10**9


def test_a_rank_has_as_many_numbers_to_gather_whether_it_looks_or_not(gpu_of_pytorch, monkeypatch):
    gathered = []
    monkeypatch.setattr(observations.time, "monotonic", lambda: 1000.0)
    monkeypatch.setattr(observations, "gather_numbers", lambda values, device: gathered.append(values) or [values])
    observer = gpu_of_pytorch()
    for _ in range(2):
        observer.observe(0.0, 0.0)
    assert len(gathered[0]) == len(gathered[1])


def test_a_node_is_looked_at_once_a_second(monkeypatch):
    looks = iter(range(10, 100, 10))
    clock = [1000.0]
    monkeypatch.setattr(observations.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(observations.psutil, "cpu_percent", lambda: next(looks))
    told = []
    with join_mesh():
        observer = Observer(CPU)  # the first look begins what the second one tells
        for clock[0] in (1000.3, 1000.6, 1001.2, 1001.4):
            told.append(observer.observe(0.0, 0.0).get("system/node-0/cpu_percent"))
    assert told == [20, None, None, 30]


def test_an_observation_of_a_rank_alone_asks_pytorch_for_nothing():
    """A collective takes a tenth of a millisecond, at every step; and the maximum over a dimension starts all threads,
    even of four numbers: milliseconds on a machine in use."""
    with join_mesh():
        observer = Observer(CPU)
        with Operations() as operations:
            observer.observe(0.0, 0.0)
    assert operations.seen == []


class Operations(TorchDispatchMode):
    """The names of the operations that PyTorch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


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
