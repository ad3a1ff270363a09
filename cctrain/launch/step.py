"""Ranks that `srun` has started: from Slurm's numbers to RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT,
as `torchrun` would have set them. The batch script sets the last two itself."""

import os
import re
import subprocess
from collections.abc import MutableMapping

from cctrain.errors import UsageError


def adopt_step(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where `srun` started this process with others, say so in the environment; otherwise leave it as it is.

    A step of one process is left alone: it is also what an interactive shell on a node is, from which
    `cctrain train --ranks N` starts its own.
    """
    num_ranks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or num_ranks == "1" or "SLURM_PROCID" not in environment:
        return
    per_node = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_address(environment)
    environment.setdefault("MASTER_PORT", str(10000 + 2 * (int(environment["SLURM_JOB_ID"]) % 10000)))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=num_ranks,
        LOCAL_RANK=environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(per_node[int(environment["SLURM_NODEID"])]),
    )


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form: "2(x3),1" means 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UsageError(
                f"cannot read Slurm's tasks per node, {text!r}: set RANK, WORLD_SIZE and LOCAL_RANK yourself"
            )
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def nodes_of_step() -> list[str]:
    """The node of each rank of this step; [] where Slurm cannot be asked."""
    nodes = _scontrol("show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")).split()
    counts = tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return [node for node, count in zip(nodes, counts, strict=False) for _ in range(count)]


def first_address(environment: MutableMapping[str, str]) -> str:
    """The address of the step's first node; its name where Slurm cannot be asked, as in many containers."""
    nodes = environment["SLURM_STEP_NODELIST"]
    first = _scontrol("show", "hostnames", nodes).split("\n")[0]
    if first:
        found = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first))
        return found[1] if found else first
    if re.search(r"[\[,]", nodes):
        raise UsageError(f"cannot tell the first node of {nodes}, because scontrol is not to be had: set MASTER_ADDR")
    return nodes


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
