"""What `prepare` and its workers hold at most, whatever the size of the input."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from cctrain.process_memory import resident
from tests.data.conftest import write_h5ad

# Parts of a size that the input has many of. Workers import this script as well, and so do the same.
SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from cctrain.data.prepare import assemble, scan
from cctrain.data.sources import raw_blocks
from cctrain.data.prepare.prepare import prepare
from cctrain.data.prepare.quality import QualityControl
from cctrain.data.store.layout import Layout

raw_blocks.COUNTS_PER_BLOCK = 50_000
scan.TOKENS_PER_PIECE = assemble.TOKENS_PER_PIECE = assemble.SAMPLE_TOKENS = 100_000
assemble.Layout = partial(Layout, tokens_per_chunk=2**12, tokens_per_shard=2**17)

if __name__ == "__main__":
    source, out = map(Path, sys.argv[1:])
    prepare([source], out, quality=QualityControl(), workers=2, report=lambda message: None)
"""
BYTES_PER_CELL = 400
SLACK = 24 * 2**20  # two runs of the same differ by some of it


def peak_memory(folder: Path, source: Path) -> int:
    """VmHWM of the process and of each of its workers, summed."""
    script = folder / "prepare.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script, source, folder / f"{source.stem}-store"]
    process = psutil.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    peaks: dict[int, int] = {}
    while process.poll() is None:
        for pid in [process.pid, *(child.pid for child in process.children(recursive=True))]:
            peaks[pid] = max(peaks.get(pid, 0), resident("VmHWM", pid))
        time.sleep(0.02)
    assert process.returncode == 0
    assert len(peaks) >= 3
    return sum(peaks.values())


@pytest.mark.slow
@pytest.mark.processes
def test_memory_grows_with_the_cells_by_their_metadata_alone(tmp_path):
    draws = np.random.default_rng(0)
    peaks = []
    for num_cells in (2_000, 10_000):  # 0.6 and 3 million counts: 30 pieces, 23 shards
        counts = draws.poisson(1.2, size=(num_cells, 430))
        counts[:, 0] = 1 + np.arange(num_cells)
        peaks.append(peak_memory(tmp_path, write_h5ad(tmp_path / f"{num_cells}.h5ad", counts)))
    assert peaks[1] - peaks[0] < BYTES_PER_CELL * 8_000 + SLACK
