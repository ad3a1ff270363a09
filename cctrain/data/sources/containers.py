"""An HDF5 file or a Zarr directory (formats 2 and 3) as one thing: groups, arrays and attributes behind keys.

Both come from elsewhere, perhaps damaged, perhaps made to harm. So nothing is read before it was looked at: an
array must lie in this very file, its parts must be there, and what it claims to be must be something that its
bytes on disk can hold; a Zarr array may only use codecs that decompress (numcodecs also knows "pickle", which
runs whatever the file says). What the libraries raise about foreign bytes becomes one DataError that names file
and key.
"""

import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import zarr

from cctrain.errors import CctrainError, DataError

Array: TypeAlias = h5py.Dataset | zarr.Array
Node: TypeAlias = h5py.Group | zarr.Group | h5py.Dataset | zarr.Array

_CODECS = {
    *("blosc", "bytes", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"),
    *("adler32", "crc32", "crc32c", "fletcher32", "sharding_indexed"),
    *("delta", "shuffle", "transpose", "vlen-bytes", "vlen-utf8"),
}
_LARGEST_CHUNK = 2**30  # bytes; a chunk is decompressed whole
_ALWAYS_FINE = 2**20  # bytes that any array may claim
_DEEPEST = 6  # groups within groups; a link in a circle has no end
_DAMAGED = "the file is damaged or was cut short; copy it again from its origin."


@dataclass(frozen=True)
class Container:
    """Keys are paths from the root, such as "raw/X/data"."""

    path: Path
    root: h5py.Group | zarr.Group

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def is_group(self, key: str) -> bool:
        return isinstance(self._node(key), h5py.Group | zarr.Group)

    def names(self, key: str = "") -> list[str]:
        """What lies directly in the root or in a group, sorted."""
        group = self._node(key) if key else self.root
        if not isinstance(group, h5py.Group | zarr.Group):
            raise DataError(f"{self.path}: {key} is an array where a group belongs: {_DAMAGED}")
        with refusing(self.path, key):
            if isinstance(group, h5py.Group):
                return sorted(group.keys())
            # Not from zarr, which passes over members whose metadata are damaged.
            return sorted(child.name for child in (self.path / key).iterdir() if _is_zarr_node(child))

    def attributes(self, key: str) -> dict[str, Any]:
        node = self._node(key)
        with refusing(self.path, key):
            return dict(node.attrs)

    def shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        """What an array claims; nothing for a group or an array without values, kind "V"."""
        node = self._node(key)
        if not isinstance(node, Array):
            return (), np.dtype("V")
        with refusing(self.path, key):
            return tuple(int(size) for size in node.shape or ()), np.dtype(node.dtype)

    def array(self, key: str, kinds: str, num_axes: int = 1) -> Array:
        """The array, with a dtype of one of these kinds (as in numpy: "iu" for whole numbers)."""
        array = self._node(key)
        if not isinstance(array, Array):
            raise DataError(f"{self.path}: {key} is a group where an array belongs: {_DAMAGED}")
        shape, dtype = self.shape_and_dtype(key)
        if dtype.kind not in kinds:
            raise DataError(f"{self.path}: {key} holds {dtype} where {_KINDS.get(kinds, 'text')} belong: {_DAMAGED}")
        if len(shape) != num_axes:
            raise DataError(f"{self.path}: {key} has {len(shape)} axes, not {num_axes}: {_DAMAGED}")
        self._check(key, array)
        return array

    def read(self, key: str, array: Array, start: int = 0, stop: int | None = None) -> np.ndarray:
        """array[start:stop] along the first axis, in the byte order of this machine."""
        with refusing(self.path, key):
            values = np.asarray(array[start:stop])
        expected = (len(range(*slice(start, stop).indices(array.shape[0]))), *array.shape[1:])
        if values.shape != expected:
            raise DataError(f"{self.path}: {key} gave {values.shape} values instead of {expected}: {_DAMAGED}")
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def check_whole(self, key: str, array: Array) -> None:
        """DataError if a part of the array was never written, or is lost: it would be read as zeros."""
        missing, wanted = self.missing_parts(key, array)
        if missing:
            raise DataError(f"{self.path}: {key} lacks {missing:,} of its {wanted:,} parts: {_DAMAGED}")

    def missing_parts(self, key: str, array: Array) -> tuple[int, int]:
        """How many chunks (or bytes of an array without chunks) are not on disk, and how many there should be."""
        with refusing(self.path, key):
            wanted, found = _num_parts(self.path, array)
        return max(0, wanted - found), wanted

    def check_below(self, key: str, num_rows: int, depth: int = 0) -> None:
        """Look at every array in and below a group that is a table of `num_rows` rows, before it is read."""
        if depth > _DEEPEST:
            raise DataError(f"{self.path}: {key} lies deeper than any table of AnnData: {_DAMAGED}")
        node = self._node(key)
        if isinstance(node, h5py.Group | zarr.Group):
            for name in self.names(key):
                self.check_below(f"{key}/{name}", num_rows, depth + 1)
            return
        self._check(key, node)
        with refusing(self.path, key):
            claimed = math.prod(node.shape or ()) * np.dtype(node.dtype).itemsize
        if claimed > max(_ALWAYS_FINE, 64 * num_rows):
            self.check_whole(key, node)

    def _node(self, key: str) -> Node:
        node = self._find(key)
        if node is None:
            raise DataError(f"{self.path}: has no {key}: {_DAMAGED}")
        return node

    def _find(self, key: str) -> Node | None:
        node: Node = self.root
        place = self.path
        for part in key.split("/"):
            with refusing(self.path, key):
                if not isinstance(node, h5py.Group | zarr.Group) or part in ("", ".", ".."):
                    return None
                place = place / part
                if isinstance(node, zarr.Group):
                    exists = _is_zarr_node(place)
                else:
                    exists = node.id.links.exists(part.encode())
                    if exists and node.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
                        raise DataError(f"{self.path}: {key} is a link: copy what it leads to in its place.")
                if not exists:
                    return None
                node = node[part]
        return node

    def _check(self, key: str, array: Array) -> None:
        with refusing(self.path, key):
            if isinstance(array, h5py.Dataset):
                elsewhere = array.is_virtual or array.external
                names: set[str] = set()
            else:
                elsewhere = False
                names = set(_codec_names(array))
            chunk = getattr(array, "chunks", None) or ()
            chunk_bytes = math.prod(chunk) * np.dtype(array.dtype).itemsize
        if elsewhere:
            raise DataError(f"{self.path}: {key} keeps its values in another file: copy them into this one.")
        if names - _CODECS:
            raise DataError(
                f"{self.path}: {key} is encoded with '{min(names - _CODECS)}', which is not read here (some codecs "
                "execute what a file says): write the file again with anndata's defaults."
            )
        if chunk_bytes > _LARGEST_CHUNK:
            raise DataError(
                f"{self.path}: {key} has chunks of {chunk_bytes / 2**30:,.1f} GiB, at most 1 GiB is read: "
                "write the file again with anndata's defaults."
            )


_KINDS = {"iu": "whole numbers", "biuf": "numbers"}


@contextmanager
def open_container(path: Path) -> Iterator[Container]:
    """Open a file as HDF5, a directory as Zarr, for reading."""
    if path.is_dir():
        with refusing(path, "the Zarr directory"):
            # Consolidated metadata are a copy, and a copy may differ from what is there.
            root = zarr.open_group(path, mode="r", use_consolidated=False)
        yield Container(path, root)
        return
    try:
        file = h5py.File(path, "r")
    except Exception as error:
        raise DataError(f"{path}: not an .h5ad file, or cut short: HDF5 says '{_one_line(error)}'.") from error
    with file:
        yield Container(path, file)


@contextmanager
def refusing(path: Path, key: str) -> Iterator[None]:
    """Around calls of a library that reads foreign bytes, and nothing else: what it raises is the file's fault.

    h5py, zarr and their codecs raise nearly every class of exception, MemoryError included.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CctrainError:
        raise
    except Exception as error:
        raise DataError(f"{path}: {key or 'the root'} cannot be read ({_one_line(error)}): {_DAMAGED}") from error


def _is_zarr_node(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("zarr.json", ".zgroup", ".zarray"))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _num_parts(path: Path, array: Array) -> tuple[int, int]:
    """How many parts the array should have on disk, and has: chunks, or bytes where it is not chunked."""
    if array.shape is None or 0 in array.shape:
        return 0, 0
    if isinstance(array, zarr.Array):
        # Counted by hand: zarr goes through all the names that the shape claims.
        files = (name for _, _, names in os.walk(path / array.path) for name in names)
        return _num_chunks(array.shape, array.shards or array.chunks), sum(
            not name.startswith(".") and name != "zarr.json" for name in files
        )
    if array.chunks is None:
        return array.size * array.dtype.itemsize, min(array.id.get_storage_size(), path.stat().st_size)
    return _num_chunks(array.shape, array.chunks), array.id.get_num_chunks()


def _num_chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> int:
    return math.prod(-(-int(size) // int(length)) for size, length in zip(shape, chunk, strict=True))


def _codec_names(array: zarr.Array) -> Iterator[str]:
    """Names of all codecs of a Zarr array, those inside of shards included."""
    if array.metadata.zarr_format == 2:
        for codec in (array.metadata.compressor, *(array.metadata.filters or ())):
            if codec is not None:
                yield codec.codec_id
    else:
        yield from _nested_names([codec.to_dict() for codec in array.metadata.codecs])


def _nested_names(codecs: Iterable[dict[str, Any]]) -> Iterator[str]:
    for codec in codecs:
        yield str(codec["name"]).removeprefix("numcodecs.")
        settings = codec.get("configuration") or {}
        yield from _nested_names(settings.get("codecs", ()))
        yield from _nested_names(settings.get("index_codecs", ()))
