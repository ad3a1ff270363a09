"""The preflight's judgement, and the whole of it on two ranks of this machine. On two nodes: test_cluster."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cctrain.code_version import code_digest
from cctrain.launch import preflight
from cctrain.launch.local import free_port, rank_environment
from cctrain.launch.preflight import bad_nodes, check_devices, check_mark, check_space, collect, notes, told


def facts(node: str, *problems: str, **changes: Any) -> dict[str, Any]:
    same = {"cctrain": "1", "python": "3.11.2", "torch": "2.9", "deepspeed": "0.19", "code": "c0de", "commit": "abc"}
    return {"node": node, "problems": list(problems)} | same | changes


def test_nodes_that_are_alike_are_good():
    assert bad_nodes([facts("n1"), facts("n1"), facts("n2")], "c0de") == {}


def test_the_odd_node_is_named_and_each_trouble_told_once():
    ranks = [facts("n1"), facts("n2", "no disk", torch="2.8"), facts("n2", "no disk", torch="2.8"), facts("n3")]
    # n2 has two ranks of four: a tie, which the first rank decides.
    assert bad_nodes(ranks, None) == {"n2": ["no disk", "has torch 2.8 where others have 2.9"]}


def test_of_two_codes_the_one_that_was_submitted_is_right():
    ranks = [facts("n1", code="new"), facts("n2", code="c0de")]
    [(node, [problem])] = bad_nodes(ranks, "c0de").items()
    assert (node, problem) == ("n1", "has other code of cctrain than was submitted (abc)")


def test_other_code_than_submitted_everywhere_is_told_and_can_be_borne():
    ranks = [facts("n1"), facts("n2")]
    assert bad_nodes(ranks, "other") == {}
    [note] = notes(ranks, "other")
    assert "this job finds other code than was submitted" in note
    assert notes(ranks, "c0de") == notes(ranks, None) == []


def test_the_message_tells_how_to_go_round_the_bad_nodes():
    bad = {"n2": ["no disk"], "n7": ["no GPU", "no torch"]}
    text = told(bad, 3)
    assert "the nodes n2, n7:\n  n2: no disk\n  n7: no GPU\n  n7: no torch\n" in text
    assert text.endswith("#SBATCH --exclude=n2,n7")
    assert "--exclude" not in told(bad, 2), "there would be no node left"


def test_a_rank_that_says_nothing_is_named_with_its_node(monkeypatch):
    monkeypatch.setattr(preflight, "WAIT_SECONDS", 1.0)
    monkeypatch.setattr(preflight, "node_of", lambda rank: f"n{rank + 1}")
    store = dist.TCPStore("127.0.0.1", free_port(), 2, True, timedelta(seconds=5), wait_for_workers=False)
    store.set("facts/0", json.dumps(facts("n1")))
    bad = bad_nodes(collect(store, "facts", 2), None)
    assert list(bad) == ["n2"]
    assert "rank 1 said nothing" in bad["n2"][0]


def test_gpus_that_the_job_asked_for_must_be_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    problems: list[str] = []
    check_devices(0, problems)
    assert problems == []
    check_devices(2, problems)
    assert problems == ["torch sees 0 GPUs where the job asked for 2 (nvidia-smi there says more)"]


def test_there_must_be_room_for_two_of_the_newest_checkpoints(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    step = tmp_path / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    with open(step / "rank-00000.safetensors", "wb") as file:
        file.truncate(3 * 2**30)
    for free, fine in ((5.9, False), (6.1, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage(0, 0, int(free * 2**30)))
        problems: list[str] = []
        check_space(tmp_path, problems)
        assert (problems == []) == fine
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 2**29))
    check_space(tmp_path / "checkpoints", problems := [])
    assert problems == [f"{tmp_path}/checkpoints has 0.5 GiB free, a checkpoint needs 1.0 GiB"]


def test_a_run_directory_of_its_own_on_a_node_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "preflight-feed").write_text("feed")
    assert check_mark(tmp_path, "feed") == []
    assert sorted(path.name for path in (tmp_path / "slurm").iterdir()) == ["preflight-feed"]
    assert "is not the folder that the first node sees" in check_mark(tmp_path, "f00d")[0]


def run_preflight(run_dir: Path, *arguments: str, changes: dict[int, dict[str, str]] | None = None) -> list:
    """Both ranks of a preflight on this machine, each a node of its own; returns (exit code, what it said)."""
    port, ranks = free_port(), []
    for rank in range(2):
        environment = rank_environment(rank, 2, port) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": f"n{rank + 1}"}
        environment |= (changes or {}).get(rank, {})
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "cctrain.launch.preflight", str(run_dir), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


@pytest.mark.processes
def test_good_ranks_pass_and_only_the_first_speaks(tmp_path):
    (first, said), (second, other) = run_preflight(tmp_path, "--code", code_digest())
    assert (first, second) == (0, 0), said + other
    assert "2 ranks on n1, n2" in said
    assert "an all-reduce over 2 ranks was right" in said
    assert "other code" not in said
    assert other == ""
    assert list((tmp_path / "slurm").iterdir()) == []


@pytest.mark.processes
def test_other_code_than_was_submitted_is_told_before_the_training_and_does_not_prevent_it(tmp_path):
    (first, said), (second, other) = run_preflight(tmp_path, "--code", "0" * 64)
    assert (first, second) == (0, 0), said + other
    assert said.startswith("preflight: this job finds other code than was submitted")


@pytest.mark.processes
def test_a_rank_without_its_gpus_ends_all_and_the_first_says_why(tmp_path):
    (first, said), (second, other) = run_preflight(tmp_path, "--gpus=1")
    assert (first, second) == (5, 5), said + other
    assert "  n2: torch sees 0 GPUs where the job asked for 1" in said
    assert other == ""


@pytest.mark.processes
def test_a_torch_that_cannot_be_imported_is_the_trouble_of_its_own_node(tmp_path):
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    path = os.pathsep.join([str(broken.parent), os.environ.get("PYTHONPATH", "")])
    environment = rank_environment(1, 2, free_port()) | {"SLURMD_NODENAME": "n2", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", "cctrain.launch.preflight", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 5
    assert done.stderr == "preflight: node n2 cannot import torch: libcudart.so.13: cannot open shared object file\n"
