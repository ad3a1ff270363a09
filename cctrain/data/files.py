"""Files on disk: directories that are complete or absent, and digests.

Such a directory is written beside its place, flushed to disk, then renamed.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cctrain.errors import DataError


@contextmanager
def workspace(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder OUT.partial-<pid> that becomes OUT when the block ends, and is removed if it fails.

    The caller has made sure that an existing OUT may be replaced. Raises DataError when the disk is full.
    """
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _flush_to_disk(partial)
        _replace(out, partial, overwrite)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(f"{out.parent}: the disk or quota is full; nothing was kept of {out.name}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free_space(folder: Path, needed: int) -> None:
    """DataError if the file system of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: {free / 1e9:.1f} GB free, and preparing needs up to {needed / 1e9:.1f} GB there "
            "(temporary files included): free some space or choose another --out."
        )


def file_entries(root: Path) -> dict[str, dict[str, int | str]]:
    """Size and SHA-256 of every file below a folder, by its path there, sorted by path."""
    return {
        file.relative_to(root).as_posix(): {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(path for path in root.rglob("*") if path.is_file())
    }


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(out: Path, partial: Path, overwrite: bool) -> None:
    if overwrite and out.exists():
        old = out.with_name(f"{out.name}.old-{os.getpid()}")
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
    sync_to_disk(out.parent)


def _flush_to_disk(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            sync_to_disk(Path(folder, name))
        sync_to_disk(Path(folder))


def sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
