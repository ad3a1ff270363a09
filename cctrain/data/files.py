"""Files on disk that are complete or absent, and their digests.

Such a file is written beside its place, flushed to disk, then renamed.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cctrain.errors import DataError


def publish(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """`path` with what `write` writes, whoever else may be writing the same."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def publish_array(path: Path, array: np.ndarray) -> None:
    publish(path, lambda file: np.save(file, array, allow_pickle=False))


def publish_text(path: Path, text: str) -> None:
    publish(path, lambda file: file.write(text.encode()))


def check_free_space(folder: Path, needed: int) -> None:
    """DataError if the file system of `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: {free / 1e9:.1f} GB free, and preparing needs up to {needed / 1e9:.1f} GB there "
            "(temporary files included): free some space or choose another --out."
        )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(root: Path) -> None:
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
