"""What every rank sees of itself at a step, and one rank of each node of the node; put together for the journal.

data_seconds           that the rank waited for data, which waited longest
communication_seconds  that the rank waited in collectives, which waited least: what none could avoid
imbalance_seconds      that another one waited longer there, for ranks that had more to do
memory/bytes           of the rank with the most: what PyTorch has allocated on its GPU, or what is resident
memory/peak_bytes      the same, at most so far
system/node-0/…        cpu_percent of all its cores and network_bytes_per_second, sent and received, since the look
                       before; memory_bytes that all its processes use; of each rank's GPU, under MLflow's names,
                       gpu_0_memory_usage_megabytes of all its processes, and gpu_0_utilization_percentage, the share of
                       the last moments in which a kernel ran, where the package nvidia-ml-py is installed

Node and GPU are looked at once a second at most, at the first step and where a second has passed: other steps have no
`system/…`. Waiting is told of several ranks on CPUs alone. A node's ranks follow each other, and GPU 0 is that of the
first.
"""

import math
import os
import time

import psutil
import torch

from cctrain.parallel.mesh import gather_numbers
from cctrain.process_memory import memory_of

OF_RANK = ("data_seconds", "waited_seconds", "memory/bytes", "memory/peak_bytes")
OF_NODE = ("cpu_percent", "memory_bytes", "network_bytes_per_second")
OF_GPU = ("memory_usage_megabytes", "utilization_percentage")
SECONDS_BETWEEN_LOOKS = 1.0


class Observer:
    """One rank's; each call tells what has happened since the one before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._tells_utilization = device.type == "cuda" and tells_utilization(device)
        psutil.cpu_percent()
        self._looked, self._moved = time.monotonic(), network_bytes()
        self._next_look = -math.inf

    def observe(self, data_seconds: float, waited_seconds: float) -> dict[str, float]:
        """All ranks call this, and get the same."""
        own = [data_seconds, waited_seconds, *memory_of_rank(self._device)]
        row = [float(self._local_rank), *own, *self._look()]
        return together(gather_numbers(row, self._device), self._device.type)

    def _look(self) -> list[float]:
        """At node and GPU; NaN before the next look is due, so that ranks whose clocks differ have rows of one length.

        Looking takes most of the time, and what psutil or a driver says of less than a second is chance.
        """
        now = time.monotonic()
        if now < self._next_look:
            return [math.nan] * (len(OF_NODE) + (len(OF_GPU) if self._device.type == "cuda" else 0))
        seconds, self._looked, self._next_look = now - self._looked, now, now + SECONDS_BETWEEN_LOOKS
        return [*self._look_at_node(seconds), *self._look_at_gpu()]

    def _look_at_node(self, seconds: float) -> list[float]:
        """Its first rank's to do, so many seconds after the last time."""
        if self._local_rank > 0:
            return [math.nan] * len(OF_NODE)
        before, self._moved = self._moved, network_bytes()
        rate = (self._moved - before) / max(seconds, 1e-9)
        return [psutil.cpu_percent(), float(psutil.virtual_memory().used), rate]

    def _look_at_gpu(self) -> list[float]:
        """Nothing without one; NaN is what it does not tell."""
        if self._device.type != "cuda":
            return []
        free, total = torch.cuda.mem_get_info(self._device)
        busy = torch.cuda.utilization(self._device) if self._tells_utilization else math.nan
        return [(total - free) / 1e6, float(busy)]


def together(rows: list[list[float]], device_type: str) -> dict[str, float]:
    """Of all ranks' rows in rank order: its number on its node, its own values, its node's from the first one there,
    its GPU's if it has one. What is NaN of node or GPU was not seen, and is left out.

    Plain numbers: PyTorch starts all its threads for a maximum over a dimension, even of four numbers (4.6 ms beside
    other work on two cores, where the Python here takes 0.1).
    """
    own = {name: [row[1 + place] for row in rows] for place, name in enumerate(OF_RANK)}
    waited = own.pop("waited_seconds")
    found = {name: max(values) for name, values in own.items()}
    if device_type == "cpu" and len(rows) > 1:
        found |= {"communication_seconds": min(waited), "imbalance_seconds": max(waited) - min(waited)}
    node = -1
    for local_rank, *values in rows:
        of_node, of_gpu = values[len(OF_RANK) :][: len(OF_NODE)], values[len(OF_RANK) + len(OF_NODE) :]
        if local_rank == 0:
            node += 1
            seen = zip(OF_NODE, of_node, strict=True)
            found |= {f"system/node-{node}/{name}": value for name, value in seen if value == value}
        # Where there is no GPU, there are no values.
        gpu = zip(OF_GPU, of_gpu, strict=False)
        found |= {f"system/node-{node}/gpu_{local_rank:.0f}_{name}": value for name, value in gpu if value == value}
    return found


def memory_of_rank(device: torch.device) -> tuple[float, float]:
    """Bytes, now and at most so far."""
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device)), float(torch.cuda.max_memory_allocated(device))
    held = memory_of()
    return held.get("VmRSS", 0), held.get("VmHWM", 0)


def tells_utilization(device: torch.device) -> bool:
    """Whether PyTorch can ask the driver for it: it needs nvidia-ml-py, and a part of a GPU (MIG) has none."""
    try:
        torch.cuda.utilization(device)
    except Exception:  # NVML's errors have no base class that is there without it
        return False
    return True


def network_bytes() -> int:
    """That this node has sent to others and received from them."""
    counters = psutil.net_io_counters(pernic=True)
    return sum(one.bytes_sent + one.bytes_recv for name, one in counters.items() if name != "lo")
