"""How long this process has waited in collectives, whoever started them: cctrain, autograd or DeepSpeed.

With gloo every collective, started with `async_op` or without, ends in `Work.wait`, which returns when it is done. So
that is where seconds are counted: PyTorch offers no other place that sees them all. With NCCL it only orders streams,
and says nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import Work

_seconds = 0.0


def seconds_waited() -> float:
    """So far, within `counted_waiting`."""
    return _seconds


@contextmanager
def counted_waiting() -> Iterator[None]:
    wait = Work.wait

    def counted(*args: Any, **kwargs: Any) -> Any:
        global _seconds
        started = time.perf_counter()
        try:
            return wait(*args, **kwargs)
        finally:
            _seconds += time.perf_counter() - started

    Work.wait = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Work.wait = wait  # type: ignore[method-assign]
