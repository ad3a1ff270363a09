import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cctrain.errors import UsageError
from cctrain.launch.local import free_port, rank_environment
from cctrain.parallel import mesh
from cctrain.parallel.exchange import context_exchange
from cctrain.parallel.mesh import arrange, find_device_kind, gather_rows, join_mesh, sum_over_ranks

TOGETHER = """
import json, sys
import torch
from cctrain.parallel.exchange import context_exchange
from cctrain.parallel.mesh import arrange, gather_numbers, gather_rows, join_mesh, sum_over_context, sum_over_ranks

def places(mesh):
    return [mesh.data_rank, mesh.num_data_ranks, mesh.context_rank, mesh.num_context_ranks]

def exchanged(mesh):
    exchange, mine = context_exchange(mesh), torch.tensor([1.0, -1.0]) * (mesh.rank + 1)
    found = [exchange.gather(mine), exchange.sum(mine.clone()), exchange.max(mine.clone())]
    return [exchange.num_shards, *(tensor.tolist() for tensor in found)]

with join_mesh() as mesh:
    start, num = [(0, 3), (3, 1)][mesh.rank]
    rows = torch.arange(2 * start, 2 * (start + num)).reshape(num, 2)
    print(json.dumps({
        "mesh": [mesh.rank, mesh.num_ranks, mesh.is_first, mesh.device.type],
        "unequal": gather_rows(rows).tolist(),
        "one without": gather_rows(rows[:num * mesh.rank]).tolist(),
        "none at all": list(gather_rows(rows[:0]).shape),
        "numbers": gather_numbers([mesh.rank, 1.0 + 2.0**-50], mesh.device),
        "sums": sum_over_ranks([1.0 + mesh.rank, 2.0**-40], mesh.device),
        "rows": [places(arrange(mesh, 1)), places(arrange(mesh, 2))],
        "exchanged": exchanged(arrange(mesh, 2)),
        "sum in a row": sum_over_context(torch.tensor([mesh.rank + 1]), arrange(mesh, 2)).item(),
        "sum alone": sum_over_context(torch.tensor([mesh.rank + 1]), mesh).item(),
    }))
"""

EVER_OTHER_SHAPES = """
import sys, torch
from cctrain.parallel.mesh import join_mesh

with join_mesh(precision=sys.argv[1]):
    for _ in range(2):
        for length in range(100, 100 + int(sys.argv[2])):
            torch.nn.functional.gelu(torch.ones(length))
"""


@pytest.fixture(scope="module")
def together() -> list[dict]:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER],
            env={**rank_environment(rank, 2, port), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path.cwd())},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(output) for output in outputs]


@pytest.mark.processes
def test_ranks_find_themselves_in_their_environment(together):
    assert [found["mesh"] for found in together] == [[0, 2, True, "cpu"], [1, 2, False, "cpu"]]


@pytest.mark.processes
def test_rows_of_unequal_numbers_are_gathered_in_the_order_of_ranks(together):
    for found in together:
        assert found["unequal"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert found["one without"] == [[6, 7]]
        assert found["none at all"] == [0, 2]


@pytest.mark.processes
def test_numbers_are_gathered_in_the_order_of_ranks_and_keep_64_bits(together):
    assert [found["numbers"] for found in together] == [[[0.0, 1.0 + 2.0**-50], [1.0, 1.0 + 2.0**-50]]] * 2


@pytest.mark.processes
def test_sums_over_ranks_keep_64_bits(together):
    assert [found["sums"] for found in together] == [[3.0, 2.0**-39]] * 2


@pytest.mark.processes
def test_ranks_stand_in_rows_of_context_ranks(together):
    assert together[0]["rows"] == [[0, 2, 0, 1], [0, 1, 0, 2]]
    assert together[1]["rows"] == [[1, 2, 0, 1], [0, 1, 1, 2]]


@pytest.mark.processes
def test_an_exchange_gathers_in_the_order_of_ranks_and_reduces_elementwise(together):
    for found in together:
        assert found["exchanged"] == [2, [[1.0, -1.0], [2.0, -2.0]], [3.0, -3.0], [2.0, -1.0]]


@pytest.mark.processes
def test_sums_over_a_row_are_those_of_the_ranks_in_it(together):
    assert [found["sum in a row"] for found in together] == [3, 3]
    assert [found["sum alone"] for found in together] == [1, 2]


def test_a_rank_alone_exchanges_nothing():
    with join_mesh() as alone:
        assert context_exchange(alone) is None


def test_ranks_that_do_not_divide_into_rows_are_an_error_that_says_so():
    with join_mesh() as alone, pytest.raises(UsageError, match=r"parallel\.context=2 does not divide the 1 rank"):
        arrange(alone, 2)


def test_a_process_alone_is_its_own_mesh_and_leaves_no_trace(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        with join_mesh() as alone:
            assert (alone.rank, alone.num_ranks, alone.is_first) == (0, 1, True)
            rows = torch.tensor([[1, 2]])
            assert gather_rows(rows).tolist() == [[1, 2]]
            assert sum_over_ranks([0.1], alone.device) == [0.1]
        assert "RANK" not in os.environ
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@pytest.mark.parametrize(
    ("precision", "shapes", "chosen", "made"),
    [
        ("fp32", 20, {}, 40),
        ("bf16", 20, {}, 20),
        ("bf16", 100, {}, 200),
        ("fp32", 100, dict.fromkeys(mesh.CACHES_OF_SHAPES, "100"), 100),
    ],
)
def test_what_operations_keep_for_shapes_long_gone_is_let_go_unless_the_environment_says_otherwise(
    precision, shapes, chosen, made
):
    """They are gone through twice: in fp32 8 are kept at most and in bf16 64, so that of more the second time finds
    none."""
    environment = {name: value for name, value in os.environ.items() if name not in mesh.CACHES_OF_SHAPES} | chosen
    words = [sys.executable, "-c", EVER_OTHER_SHAPES, precision, str(shapes)]
    environment |= {"ONEDNN_VERBOSE": "profile_create", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path.cwd())}
    said = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert said.stdout.count("create:cache_miss") == made, said.stdout + said.stderr


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="torch is built for GPUs")
def test_gpus_that_torch_cannot_use_are_an_error_that_names_the_remedy(monkeypatch):
    monkeypatch.setattr(mesh, "machine_has_gpus", lambda: True)
    with pytest.raises(UsageError, match=r"tools/setup\.sh --device cuda"):
        find_device_kind()


def test_hiding_the_gpus_chooses_the_cpu(monkeypatch):
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not mesh.machine_has_gpus()
