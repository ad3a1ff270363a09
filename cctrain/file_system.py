"""What a folder lies on: a disk of this machine, its memory, or a server."""

from pathlib import Path

import psutil

# fmt: off
_NETWORK_FILE_SYSTEMS = frozenset([
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "cifs", "smb3", "smbfs", "ceph",
    "glusterfs", "panfs", "pvfs2", "orangefs", "wekafs", "afs", "9p", "fuse",
])
# fmt: on


def on_network_file_system(folder: Path) -> bool:
    """Whether a folder, which need not exist yet, is mounted from elsewhere."""
    found = file_system_type(folder)
    return found in _NETWORK_FILE_SYSTEMS or found.startswith("fuse.")


def in_memory(folder: Path) -> bool:
    """Whether files in that folder take memory: a RAM disk, as /tmp may be."""
    return file_system_type(folder) in ("tmpfs", "ramfs")


def file_system_type(folder: Path) -> str:
    """In lower case, such as `ext4`; empty if it cannot be told."""
    path, found, depth = Path(folder).resolve(), "", -1
    for mount in psutil.disk_partitions(all=True):
        point = Path(mount.mountpoint)
        # On equal depth the later mount hides the earlier one.
        if path.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = mount.fstype.lower(), len(point.parts)
    return found
