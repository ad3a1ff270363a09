"""Which process this is, among how many, on which device; and the process groups that join them.

All W ranks form a grid of W / C rows, the data ranks, and C columns, the context ranks. The C ranks of a row share
each of their contexts; they are consecutive ranks, so that a row lies within a node where C divides the node's ranks.

    rank = data rank · C + context rank

A rank finds itself in the environment that `torchrun`, the `deepspeed` launcher and `cctrain train --ranks`
set: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. Without them the process is alone.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cctrain.errors import UsageError
from cctrain.parallel.waiting import counted_waiting

# PyTorch and oneDNN keep what they made for each of up to 1,024 shapes. Contexts have ever other lengths, so most of it
# is never used again, and the heap stays in pieces around it: gigabytes. In fp32, where oneDNN does GELU alone, steps
# take as long with 8 as with 64, and a rank holds a fifth less; products in bf16 take a tenth longer even with 16.
CACHES_OF_SHAPES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
SHAPES_KEPT = {"fp32": "8", "bf16": "64", "fp16": "64"}


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `context_group` joins the ranks of its row; None where it is alone there."""

    rank: int
    num_ranks: int
    device: torch.device
    num_context_ranks: int = 1
    context_group: dist.ProcessGroup | None = None

    @property
    def data_rank(self) -> int:
        return self.rank // self.num_context_ranks

    @property
    def num_data_ranks(self) -> int:
        return self.num_ranks // self.num_context_ranks

    @property
    def context_rank(self) -> int:
        return self.rank % self.num_context_ranks

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def join_mesh(timeout_seconds: float = 1800.0, num_context_ranks: int = 1, precision: str = "fp32") -> Iterator[Mesh]:
    """Join the process groups (gloo on CPUs, nccl on GPUs) and leave them together with all ranks.

    A collective that takes longer than `timeout_seconds` fails. `precision` is that of the model; on a CPU it decides
    how much is kept of operations on shapes that are gone. Raises UsageError if the ranks do not divide into
    rows of `num_context_ranks`.
    """
    device_kind = find_device_kind()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        for cache in CACHES_OF_SHAPES:  # read when the first operation runs
            os.environ.setdefault(cache, SHAPES_KEPT[precision])
    # DeepSpeed's compiled operations are cached for all environments of a user together, where a build of one
    # breaks the other; keep this environment's to itself.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    device = torch.device(device_kind, local_rank) if device_kind == "cuda" else torch.device("cpu")
    if device_kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"rank {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    backend = "nccl" if device_kind == "cuda" else "gloo"
    # DeepSpeed reads these itself, even when the group exists already.
    alone = {} if "RANK" in os.environ else {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    if not alone:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    else:
        os.environ.update(alone)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        alone_in_row = Mesh(rank=dist.get_rank(), num_ranks=dist.get_world_size(), device=device)
        with counted_waiting():
            yield arrange(alone_in_row, num_context_ranks, timeout_seconds)
        # Without this, about half of two-rank gloo runs abort at exit.
        dist.barrier()
    finally:
        dist.destroy_process_group()
        for name in alone:
            del os.environ[name]  # what this process does next, it does not do as a rank


def arrange(mesh: Mesh, num_context_ranks: int, timeout_seconds: float = 1800.0) -> Mesh:
    """The same ranks in rows of `num_context_ranks`; all ranks call this. Raises UsageError if they do not divide."""
    if mesh.num_ranks % num_context_ranks:
        raise UsageError(
            f"parallel.context={num_context_ranks} does not divide the {mesh.num_ranks} rank(s): each context is "
            "shared by that many ranks, so start a multiple of it (--ranks)"
        )
    if num_context_ranks == 1:
        return replace(mesh, num_context_ranks=1, context_group=None)
    timeout = timedelta(seconds=timeout_seconds)
    rows = [  # every rank takes part in making every group
        dist.new_group(list(range(first, first + num_context_ranks)), timeout=timeout)
        for first in range(0, mesh.num_ranks, num_context_ranks)
    ]
    return replace(mesh, num_context_ranks=num_context_ranks, context_group=rows[mesh.rank // num_context_ranks])


def find_device_kind() -> str:
    """`cuda` or `cpu`. Raises UsageError where there are GPUs that the installed torch cannot use."""
    if torch.cuda.is_available():
        return "cuda"
    if machine_has_gpus() and torch.version.cuda is None and torch.version.hip is None:
        raise UsageError(
            f"this machine has GPUs, but torch {torch.__version__} is built for CPUs only: run "
            "`tools/setup.sh --device cuda` (to train on the CPU all the same, set CUDA_VISIBLE_DEVICES to nothing)"
        )
    return "cpu"


def machine_has_gpus() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1"):
        return False
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Sum each number over all ranks, in fp64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_over_context(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Summed over the ranks that share this rank's contexts; `values` is changed."""
    if mesh.context_group is not None:
        dist.all_reduce(values, group=mesh.context_group)
    return values


def first_rank_says(flag: bool, mesh: Mesh) -> bool:
    """The first rank's flag, on all ranks: what each sees of a shared file system may differ for a moment."""
    return sum_over_ranks([float(flag and mesh.is_first)], mesh.device)[0] > 0


def gather_numbers(values: list[float], device: torch.device) -> list[list[float]]:
    """The numbers of every rank, of which all have as many, in rank order, in fp64."""
    if dist.get_world_size() == 1:
        return [values]  # a collective, at every step, would be most of what observing takes
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return torch.stack(everyone).tolist()


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows (k, columns) of all ranks, whose k may differ, in rank order (Σk, columns); int64."""
    lengths = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(rows)], dtype=torch.int64, device=rows.device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, rows.shape[1], dtype=rows.dtype, device=rows.device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(length)] for part, length in zip(gathered, lengths, strict=True)])


def agree_on_errors(reason: str | None, mesh: Mesh) -> dict[int, str]:
    """What went wrong, by rank; the same on all ranks. Empty if no rank gives a reason."""
    mine = [(mesh.rank, byte) for byte in (reason or "").encode()]
    rows = gather_rows(torch.tensor(mine, dtype=torch.int64, device=mesh.device).reshape(-1, 2)).tolist()
    said: dict[int, bytearray] = {}
    for rank, byte in rows:
        said.setdefault(rank, bytearray()).append(byte)
    return {rank: text.decode(errors="replace") for rank, text in said.items()}
