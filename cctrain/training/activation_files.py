"""Is there room on disk for what memory.offload=disk will keep there? Asked before a step is taken."""

import logging
import os
import shutil
import tempfile
from pathlib import Path

from cctrain.config import Config
from cctrain.errors import UsageError
from cctrain.file_system import in_memory
from cctrain.parallel.mesh import Mesh, agree_on_errors

log = logging.getLogger(__name__)


def check_room_for_activations(config: Config, mesh: Mesh) -> None:
    """All ranks call this, once data.micro_batch_tokens is known. Raises UsageError, the same on all."""
    if config.memory.offload != "disk":
        return
    folder = Path(config.memory.offload_dir or tempfile.gettempdir())
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = local_ranks * bytes_in_files(config)
    if said := agree_on_errors(lack_of_room(folder, needed), mesh):
        raise UsageError(next(iter(said.values())))
    if mesh.is_first and in_memory(folder):
        log.warning("%s lies in memory, not on a disk: name another folder with memory.offload_dir", folder)


def bytes_in_files(config: Config) -> int:
    """Of one rank: the tokens at the start of each layer and after the last, in fp32."""
    return 4 * (config.data.micro_batch_tokens or 0) * config.model.width * (config.model.depth + 1)


def lack_of_room(folder: Path, needed: int) -> str | None:
    """What keeps `needed` bytes from being written there."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return f"memory.offload_dir={folder} is not a folder that can be written to: name one on a fast local disk"
    free = shutil.disk_usage(folder).free
    if free < needed:
        return (
            f"memory.offload=disk needs up to {needed / 2**30:,.1f} GiB on this node, and {folder} has "
            f"{free / 2**30:,.1f}: name a folder with more room with memory.offload_dir, share each context among more "
            "nodes, or lower data.micro_batch_tokens"
        )
    return None
