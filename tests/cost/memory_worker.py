"""One of several ranks: takes training steps under one ZeRO stage, and tells what memory they needed.

Argument: a JSON object with the store, the model's configuration, a stage and a precision. Prints for each step the
bytes of tensors that the rank kept after it and had at most in it; and the largest micro-batch: tokens, contexts,
targets. It counts in the allocator of the C library, for a tensor may be freed by any thread: what was sent, by gloo's.
MALLOC_MMAP_THRESHOLD_ must be set: blocks above it count, which are tensors and not Python's objects.
"""

import gc
import json
import sys
from pathlib import Path

from cctrain.parallel.mesh import join_mesh
from cctrain.process_memory import resident
from tests.allocator import mapped
from tests.cost.zero_worker import Training

STEPS = 4


def forget_the_peak() -> None:
    """VmHWM begins anew (`man 5 proc`)."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    plan = json.loads(sys.argv[1])
    with join_mesh() as mesh:
        training = Training(plan["store"], plan["model"], plan["stage"], plan["precision"], mesh)
        before, kept, most = mapped(), [], []
        training.build()
        for _ in range(STEPS):
            gc.collect()
            forget_the_peak()
            begun_with, resident_then = mapped() - before, resident("VmRSS")
            training.step()
            most.append(begun_with + resident("VmHWM") - resident_then)
            gc.collect()
            kept.append(mapped() - before)
        largest = max(training.batches, key=lambda batch: len(batch.genes))
        load = {"tokens": len(largest.genes), "contexts": len(largest.offsets) - 1, "targets": len(largest.targets)}
        if mesh.is_first:
            print(json.dumps({"kept": kept, "most": most, "load": load, "micro_batches": len(training.batches)}))
