"""How `fuzz` damages token stores: manifest, arrays, tars; and how it forges a manifest that agrees with the damage.

A forged store passes every check of sizes and digests of files, so that what lies behind them is tried as well: the
content digest, and whatever reads numbers that cannot be.
"""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr

from tools.fuzz_metadata import METADATA, broken, drop_key, edit_json, retype
from tools.fuzz_mutations import GIGANTIC, Mutation, files_of, pickled
from tools.fuzz_trees import arrays_of, read, write

MANIFEST = "manifest.json"
_TAIL = 2**16  # bytes at the end of a file that have a digest of their own


def sign(path: Path) -> None:
    """Make the manifest agree with itself."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest.pop("manifest_sha256", None)
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps({**manifest, "manifest_sha256": digest}, indent=1) + "\n")


def forge(path: Path) -> None:
    """Make the indices of tars, and then the manifest, agree with the files as they are now."""
    for index in sorted((path / "shards").glob("*.index.npy")):
        _forge_index(index)
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["files"] = {
        file.relative_to(path).as_posix(): _entry(file.read_bytes())
        for file in files_of(path)
        if file != path / MANIFEST
    }
    (path / MANIFEST).write_text(json.dumps(manifest))
    sign(path)


def _forge_index(file: Path) -> None:
    """Checksums of what now lies where each sample lay."""
    index = np.load(file, allow_pickle=False)
    tar = file.with_name(file.name.replace(".index.npy", ".tar")).read_bytes()
    for record in index if index.dtype.names else ():
        record["crc32c"] = google_crc32c.value(tar[int(record["start"]) : int(record["stop"])])
    np.save(file, index)


def _entry(content: bytes) -> dict[str, int | str]:
    digests = {"sha256": content, "tail_sha256": content[-_TAIL:]}
    return {"bytes": len(content)} | {key: hashlib.sha256(part).hexdigest() for key, part in digests.items()}


def _then(mutation: Mutation, agree: Callable[[Path], None]) -> Mutation:
    def mutate(path: Path, draw: random.Random) -> str:
        what = mutation(path, draw)
        agree(path)
        return what

    return mutate


# The manifest


def _name(content: Any, draw: random.Random) -> tuple[Any, str]:
    """A listed file goes by another name, or one more is listed."""
    name = draw.choice(sorted(content["files"]))
    new = draw.choice(
        ["../outside", "/etc/hostname", "a\x00b", "", ".", "..", "x" * 5000, f"./{name}", "cells.zarr/../../outside"]
    )
    content["files"][new] = content["files"][name]
    if draw.random() < 0.5:
        del content["files"][name]
    return content, f"{name!r} is listed as {new[:60]!r}"


def _outside(path: Path, draw: random.Random) -> str:
    """A file outside the store, listed with its true size and digest."""
    outside = path.parent / "outside"
    outside.write_bytes(b"not of the store")
    manifest = json.loads((path / MANIFEST).read_bytes())
    name = draw.choice(["../outside", str(outside)])
    manifest["files"][name] = _entry(outside.read_bytes())
    (path / MANIFEST).write_text(json.dumps(manifest))
    return f"{MANIFEST}: lists a file outside the store"


def _number(content: Any, draw: random.Random) -> tuple[Any, str]:
    keys = sorted(key for key, value in content.items() if isinstance(value, int))
    key = draw.choice(keys)
    before, new = (
        content[key],
        draw.choice([content[key] + 1, content[key] - 1, 0, -1, GIGANTIC, 2**70, True, 1.5, "1"]),
    )
    content[key] = new
    return content, f"{key} was {before}, is {new!r}"


def _swap_shards(path: Path, draw: random.Random) -> str:
    shards = [file for file in files_of(path) if file.suffix == ".tar" or "c" in file.relative_to(path).parts]
    first, second = draw.sample(shards, 2)
    mine, theirs = first.read_bytes(), second.read_bytes()
    first.write_bytes(theirs)
    second.write_bytes(mine)
    return f"{first.relative_to(path)} and {second.relative_to(path)} swapped"


def _one_bit(path: Path, draw: random.Random) -> str:
    file = draw.choice([file for file in files_of(path) if file.name != MANIFEST])
    content = bytearray(file.read_bytes())
    place = draw.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)
    return f"{file.relative_to(path)}: bit {place} flipped"


def _extra_file(path: Path, draw: random.Random) -> str:
    name = draw.choice(["notes.txt", "cells.zarr/X/data/c/9", "shards/cells-00009.tar", "cells.zarr/evil.pickle"])
    file = path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickled())
    return f"{name}: one file more, a pickle"


_MANIFEST_CHANGES: list[Mutation] = [
    *(edit_json(change, MANIFEST) for change in (drop_key, drop_key, retype, retype, retype, _name, _number, _number)),
    _outside,
]

# Arrays of cells.zarr


def _edit(change: Callable[[zarr.Group, random.Random], str]) -> Mutation:
    def mutate(path: Path, draw: random.Random) -> str:
        return change(zarr.open_group(path / "cells.zarr", mode="r+", use_consolidated=False), draw)

    return mutate


def _numeric(tree: zarr.Group) -> list[str]:
    return [path for path in arrays_of(tree) if tree[path].dtype.kind in "biuf" and tree[path].size]


def _number_in_array(tree: zarr.Group, draw: random.Random) -> str:
    path = draw.choice(_numeric(tree))
    values = read(tree, path)
    place = draw.randrange(values.size)
    choices = [np.nan, np.inf, -1.0, 0.0, 1e300] if values.dtype.kind == "f" else [0, 1, 2, 200, 255]
    if values.dtype.kind in "iu" and values.dtype.itemsize > 1:
        choices += [60_000]
    if values.dtype.itemsize == 8 and values.dtype.kind == "i":
        choices += [-1, GIGANTIC, -GIGANTIC]
    with np.errstate(all="ignore"):
        values.flat[place] = np.asarray(draw.choice(choices)).astype(values.dtype)
    write(tree, path, values)
    return f"{path}[{place}] = {values.flat[place]}"


def _length_of_array(tree: zarr.Group, draw: random.Random) -> str:
    path = draw.choice([path for path in arrays_of(tree) if tree[path].ndim and tree[path].size])
    values = read(tree, path)
    name, new = draw.choice(
        [
            ("without its last", values[:-1]),
            ("empty", values[:0]),
            ("with its last twice", np.concatenate([values, values[-1:]])),
            ("in reversed order", values[::-1]),
            ("with another dimension", values[..., None]),
        ]
    )
    write(tree, path, np.ascontiguousarray(new))
    return f"{path}: {name}"


def _type_of_array(tree: zarr.Group, draw: random.Random) -> str:
    path = draw.choice(_numeric(tree))
    new = draw.choice(["float64", "int8", "bool", "complex64", "<U5", "uint64"])
    with np.errstate(all="ignore"):
        write(tree, path, read(tree, path).astype(new))
    return f"{path} is now of type {new}"


def _swap_arrays(tree: zarr.Group, draw: random.Random) -> str:
    first, second = draw.sample(arrays_of(tree), 2)
    mine, theirs = read(tree, first), read(tree, second)
    write(tree, first, theirs)
    write(tree, second, mine)
    return f"{first} and {second} swapped"


def _delete_array(tree: zarr.Group, draw: random.Random) -> str:
    path = draw.choice(arrays_of(tree))
    del tree[path]
    return f"{path} deleted"


def _gigantic_array(tree: zarr.Group, draw: random.Random) -> str:
    path = draw.choice(arrays_of(tree))
    old, attributes = tree[path], dict(tree[path].attrs)
    shape, chunks = (GIGANTIC, *old.shape[1:]), (1024, *old.shape[1:])
    above, _, name = path.rpartition("/")
    dtype = old.dtype
    del tree[path]
    tree[above].create_array(name, shape=shape, dtype=dtype, chunks=chunks)
    tree[path].attrs.update(attributes)
    return f"{path}: {GIGANTIC:,} entries, of which none is there"


def _in_zarr(mutation: Mutation) -> Mutation:
    return lambda path, draw: f"cells.zarr/{mutation(path / 'cells.zarr', draw)}"


_ARRAY_CHANGES: list[Mutation] = [
    _edit(change)
    for change in (
        _number_in_array, _number_in_array, _number_in_array, _length_of_array, _length_of_array, _type_of_array,
        _swap_arrays, _delete_array, _gigantic_array,
    )
] + [_in_zarr(mutation) for mutation in METADATA]  # fmt: skip

# Tars


def _edit_tar(change: Callable[[list[tuple[str, bytes]], random.Random], str]) -> Mutation:
    """A change of the members, as (name, content)."""

    def mutate(path: Path, draw: random.Random) -> str:
        file = draw.choice(sorted((path / "shards").glob("*.tar")))
        with tarfile.open(file) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]  # type: ignore[union-attr]
        what = change(members, draw)
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), 0o444
                tar.addfile(member, io.BytesIO(content))
        return f"{file.name}: {what}"

    return mutate


def _pickle_as_member(members: list[tuple[str, bytes]], draw: random.Random) -> str:
    key = members[0][0].split(".")[0]
    name = draw.choice(
        [f"{key}.pyd", f"{key}.pickle", f"{key}.payload.pyd", "../../evil.pyd", f"{key}.pth", f"{key}.npy"]
    )
    members.insert(draw.randrange(len(members) + 1), (name, pickled()))
    return f"a pickle as member {name}"


def _pickle_instead(members: list[tuple[str, bytes]], draw: random.Random) -> str:
    """A pickle, bare or as an array of objects, in the place of a member, of the same size where that is possible."""
    place = draw.randrange(len(members))
    name, content = members[place]
    new = pickled()
    if draw.random() < 0.7:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        new = header.getvalue() + pickled()
    members[place] = (name, new.ljust(len(content), b"\x00"))
    return f"a pickle as {name}"


def _wrong_array(members: list[tuple[str, bytes]], draw: random.Random) -> str:
    place = draw.choice([place for place, (name, _) in enumerate(members) if name.endswith(".npy")])
    name, content = members[place]
    values = np.load(io.BytesIO(content), allow_pickle=False)
    what, new = draw.choice(
        [
            ("one more everywhere", values + values.dtype.type(1)),
            ("shorter", values[:-1]),
            ("reversed", values[::-1].copy()),
            ("as int64", values.astype(np.int64) * 1000),
            ("negative", -1 - values.astype(np.int64)),
        ]
    )
    file = io.BytesIO()
    np.save(file, new)
    members[place] = (name, file.getvalue())
    return f"{name}: {what}"


def _member_gone(members: list[tuple[str, bytes]], draw: random.Random) -> str:
    return f"{members.pop(draw.randrange(len(members)))[0]} is gone"


def _members_swapped(members: list[tuple[str, bytes]], draw: random.Random) -> str:
    first, second = draw.sample(range(len(members)), 2)
    mine, theirs = members[first], members[second]
    members[first], members[second] = (mine[0], theirs[1]), (theirs[0], mine[1])
    return f"{mine[0]} and {theirs[0]} swapped"


def _place_in_index(path: Path, draw: random.Random) -> str:
    """A sample lies elsewhere, says the index of its tar."""
    file = draw.choice(sorted((path / "shards").glob("*.index.npy")))
    index = np.load(file, allow_pickle=False)
    place, name = draw.randrange(len(index)), draw.choice(["start", "counts", "genes", "stop"])
    before = int(index[name][place])
    index[name][place] = new = draw.choice([0, before + 1, before + 512, GIGANTIC, 2**63, 2**64 - 1])
    np.save(file, index)
    return f"{file.name}: {name} of sample {place} was {before}, is {new}"


def _other_index(path: Path, draw: random.Random) -> str:
    file = draw.choice(sorted((path / "shards").glob("*.index.npy")))
    index = np.load(file, allow_pickle=False)
    what, new = draw.choice(
        [("of two samples", index[:2]), ("twice as long", np.tile(index, 2)), ("of numbers", np.arange(3))]
    )
    np.save(file, new)
    return f"{file.name}: {what}"


_TAR_CHANGES: list[Mutation] = [
    *map(_edit_tar, (_pickle_as_member, _pickle_instead, _pickle_instead)),
    *map(_edit_tar, (_wrong_array, _member_gone, _members_swapped)),
    _place_in_index, _place_in_index, _other_index,
]  # fmt: skip


def damage(has_tars: bool) -> list[Mutation]:
    """Mutations after which the manifest does not agree with itself or with a file."""
    of_files = [_swap_shards, _swap_shards, _one_bit, _one_bit, _extra_file, *(_TAR_CHANGES if has_tars else [])]
    return [*_MANIFEST_CHANGES, edit_json(broken, MANIFEST), edit_json(broken, MANIFEST), *of_files]


def forgeries(has_tars: bool) -> list[Mutation]:
    """Mutations of the manifest and of the content, after which everything agrees but the content digest."""
    of_content = [*_ARRAY_CHANGES, *(_TAR_CHANGES * 2 if has_tars else [])]
    return [_then(change, sign) for change in _MANIFEST_CHANGES] + [_then(change, forge) for change in of_content]
