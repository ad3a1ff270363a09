"""What every rank sees of itself at a step, and one rank of each node of the node; put together for the journal.

data_seconds           that the rank waited for data, which waited longest
communication_seconds  that the rank waited in collectives, which waited least: what none could avoid. On CPUs only
imbalance_seconds      that another one waited longer there, for ranks that had more to do. On CPUs only
memory/bytes           of the rank with the most: what PyTorch has allocated on its GPU, or what is resident
memory/peak_bytes      the same, at most so far
system/node-0/…        cpu_percent of all its cores and network_bytes_per_second, sent and received, since the step
                       before; memory_bytes that all its processes use
"""

import os
import time

import psutil
import torch
from torch import Tensor

from cctrain.parallel.mesh import gather_rows
from cctrain.process_memory import resident

OF_RANK = ("data_seconds", "waited_seconds", "memory/bytes", "memory/peak_bytes")
OF_NODE = ("cpu_percent", "memory_bytes", "network_bytes_per_second")


class Observer:
    """One rank's; each call tells what has happened since the one before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        psutil.cpu_percent()
        self._last = time.monotonic(), network_bytes()

    def observe(self, data_seconds: float, waited_seconds: float) -> dict[str, float]:
        """All ranks call this, and get the same."""
        own = [data_seconds, waited_seconds, *memory_of_rank(self._device)]
        node = self._of_node() if self._is_first_of_node else [0.0] * len(OF_NODE)
        row = torch.tensor([[float(self._is_first_of_node), *own, *node]], dtype=torch.float64, device=self._device)
        return together(gather_rows(row))

    def _of_node(self) -> list[float]:
        before, sent_before = self._last
        now, sent = self._last = time.monotonic(), network_bytes()
        rate = (sent - sent_before) / max(now - before, 1e-9)
        return [psutil.cpu_percent(), float(psutil.virtual_memory().used), rate]


def together(rows: Tensor) -> dict[str, float]:
    """Of all ranks' rows (ranks, 1 + 4 + 3) in rank order: whether it is the first rank of its node, its own, its
    node's."""
    own = rows[:, 1 : 1 + len(OF_RANK)]
    found = dict(zip(OF_RANK, own.max(dim=0).values.tolist(), strict=True))
    longest, least = found.pop("waited_seconds"), float(own[:, OF_RANK.index("waited_seconds")].min())
    if rows.device.type == "cpu":
        found |= {"communication_seconds": least, "imbalance_seconds": longest - least}
    for number, node in enumerate(rows[rows[:, 0] > 0, 1 + len(OF_RANK) :].tolist()):
        found |= {f"system/node-{number}/{name}": value for name, value in zip(OF_NODE, node, strict=True)}
    return found


def memory_of_rank(device: torch.device) -> tuple[float, float]:
    """Bytes, now and at most so far."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device)), float(torch.cuda.max_memory_allocated(device))
    return resident("VmRSS"), resident("VmHWM")


def network_bytes() -> int:
    """That this node has sent to others and received from them."""
    counters = psutil.net_io_counters(pernic=True)
    return sum(one.bytes_sent + one.bytes_recv for name, one in counters.items() if name != "lo")
