from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cctrain.file_system import file_system_type, in_memory, on_network_file_system


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    types = {"/": "ext4", "/scratch": "Lustre", "/scratch/local": "xfs", "/sshfs": "fuse.sshfs", "/ram": "tmpfs"}
    mounted = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in types.items()]
    mounted.append(SimpleNamespace(mountpoint="/ram", fstype="ext4"))
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounted)


@pytest.mark.usefixtures("mounts")
def test_a_folder_lies_on_what_is_mounted_nearest_above_it_and_last():
    assert file_system_type(Path("/home/me/new/run")) == "ext4"
    assert file_system_type(Path("/scratch/runs")) == "lustre"
    assert file_system_type(Path("/scratch/local/runs")) == "xfs"
    assert file_system_type(Path("/ram/x")) == "ext4"


@pytest.mark.usefixtures("mounts")
def test_folders_of_servers_are_told_from_disks():
    assert on_network_file_system(Path("/scratch/x"))
    assert on_network_file_system(Path("/sshfs/x"))
    assert not on_network_file_system(Path("/scratch/local/x"))


def test_the_folders_of_this_machine_are_told():
    assert not on_network_file_system(Path.home())
    assert in_memory(Path("/dev/shm"))
