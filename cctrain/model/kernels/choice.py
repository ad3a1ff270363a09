"""Which kernels attend: by device, dtype and head width, or as the user says."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from cctrain.errors import UsageError
from cctrain.model.kernels import flash_cpu, flash_cuda, reference
from cctrain.model.kernels.interface import Kernels

log = logging.getLogger(__name__)

# The fastest first. Beside each, why it cannot run on a tensor of queries, or None.
BACKENDS: dict[str, tuple[Kernels, Callable[[Tensor], str | None]]] = {
    "flash_cuda": (flash_cuda.FLASH, flash_cuda.why_not_flash),
    "cutlass_cuda": (flash_cuda.CUTLASS, flash_cuda.why_not_cutlass),
    "flash_cpu": (flash_cpu.KERNELS, flash_cpu.why_not),
    "reference": (reference.KERNELS, lambda queries: None),
}

_logged: set[tuple[torch.device, torch.dtype]] = set()


def choose(backend: str, queries: Tensor) -> Kernels:
    """The kernels that `backend` names, for queries (..., H, D); `auto` takes the fastest that can run.

    Raises `UsageError` if there is no such backend, or it cannot run here.
    """
    if backend == "auto":
        name = next(name for name, (_, why_not) in BACKENDS.items() if why_not(queries) is None)
        _log_once(name, queries)
        return BACKENDS[name][0]
    if backend not in BACKENDS:
        raise UsageError(f"There is no attention backend {backend!r}: it is auto, {', '.join(BACKENDS)}.")
    kernels, why_not = BACKENDS[backend]
    reason = why_not(queries)
    if reason is not None:
        raise UsageError(
            f"The attention backend {backend!r} cannot run on {queries.dtype} on {queries.device.type} with heads of "
            f"width {queries.shape[-1]}: {reason}. Take auto."
        )
    return kernels


def _log_once(name: str, queries: Tensor) -> None:
    where = queries.device, queries.dtype
    if where not in _logged:
        _logged.add(where)
        log.info("Attention in %s on %s runs on the backend %s.", queries.dtype, queries.device, name)
