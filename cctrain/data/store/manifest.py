"""What a token store says of itself: manifest.json, with a digest of itself and a fingerprint of every other file.

Three looks at the files, by price. Opening a store compares sizes and the SHA-256 of each file's last 64 KiB,
which is all of a small file and enough to tell two shards apart. Before a table is read, its files are hashed
whole. `damaged_files` hashes everything.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from cctrain.data.files import file_sha256
from cctrain.data.store.layout import CONTAINERS
from cctrain.errors import DataError

FORMAT = "cctrain-token-store"
VERSION = 2
MANIFEST = "manifest.json"
_TAIL_BYTES = 2**16
_REMEDY = "copy the store again or prepare it again"

Manifest = dict[str, Any]


def write_manifest(root: Path, manifest: Manifest) -> None:
    """The manifest with a digest of itself, so that one changed character of it is an error."""
    content = {**manifest, "manifest_sha256": _digest_of(manifest)}
    (Path(root) / MANIFEST).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_manifest(path: Path) -> Manifest:
    """The manifest of a store of this format and version; DataError if there is none, or if it is damaged."""
    file, manifest = Path(path) / MANIFEST, check_is_store(path)
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{file}: format version {manifest.get('version')}, and this cctrain reads {VERSION}: prepare "
            "the store again with this version."
        )
    digest = manifest.pop("manifest_sha256", None)
    if digest != _digest_of(manifest):
        raise DataError(f"{file}: it was altered (its own SHA-256 does not match): {_REMEDY}.")
    if manifest.get("container") not in CONTAINERS:
        raise DataError(f"{file}: container {manifest.get('container')!r} is none of {', '.join(CONTAINERS)}.")
    return manifest


def check_is_store(path: Path) -> Manifest:
    """The manifest of a store of whatever version, damaged or not; DataError if there is none."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise DataError(f"{path}: not a token store: no {MANIFEST}. `cctrain prepare` writes one.")
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}): {_REMEDY}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{file}: not the manifest of a token store (its format is not '{FORMAT}').")
    return manifest


def check_fields(path: Path, manifest: Manifest) -> None:
    """DataError if a field that readers rely on is missing or of another kind: a digest of itself proves nothing about
    a manifest that somebody wrote by hand."""
    if (wrong := _wrong_field(manifest)) is not None:
        raise DataError(f"{Path(path) / MANIFEST}: {wrong} is not what cctrain writes there: {_REMEDY}.")


def file_entry(file: Path) -> dict[str, int | str]:
    """What the manifest keeps of one file."""
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file), "tail_sha256": _tail_sha256(file)}


def file_entries(root: Path) -> dict[str, dict[str, int | str]]:
    """The entry of every file below a store's directory but its manifest, by path there, sorted by path."""
    files = sorted(file for file in Path(root).rglob("*") if file.is_file() and file != Path(root) / MANIFEST)
    return {file.relative_to(root).as_posix(): file_entry(file) for file in files}


def check_files(root: Path, manifest: Manifest) -> None:
    """Every file is there, with its size and its end; DataError names the first that is not."""

    def look(named: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = named
        file = Path(root) / name
        try:
            if (found := _missing_or_cut(file, entry)) is not None:
                return f"{file}: {found}"
            is_same = _tail_sha256(file) == entry["tail_sha256"]
        except OSError as error:
            return f"{file}: {error.strerror}"
        return None if is_same else f"{file}: another file than the one that was written there"

    # On a parallel file system each look waits for a server.
    with ThreadPoolExecutor(8) as threads:
        for message in threads.map(look, manifest["files"].items()):
            if message is not None:
                raise DataError(f"{message}; {_REMEDY}. `cctrain inspect {root} --verify` names all damage.")


def check_whole(root: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Hash these files, whole; DataError names the first whose bytes have changed."""
    for name in names:
        file = Path(root) / name
        try:
            is_same = file_sha256(file) == manifest["files"][name]["sha256"]
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}: {_REMEDY}.") from error
        if not is_same:
            raise DataError(f"{file}: its bytes have changed (SHA-256 differs from the manifest): {_REMEDY}.")


def damaged_files(root: Path, manifest: Manifest, advance: Callable[[int], None] = lambda amount: None) -> list[str]:
    """Hash everything: one message a file that is missing, cut short, another's, or changed. `advance` gets bytes."""
    named_by_sha256 = {entry["sha256"]: name for name, entry in manifest["files"].items()}
    messages = []
    for name, entry in manifest["files"].items():
        file = Path(root) / name
        try:
            found = _missing_or_cut(file, entry)
            if found is None and (digest := file_sha256(file)) != entry["sha256"]:
                other = named_by_sha256.get(digest)
                found = (
                    "its bytes have changed (SHA-256 differs from the manifest)"
                    if other is None
                    else f"it holds what belongs into {other}: swapped, or one was copied over the other"
                )
        except OSError as error:
            found = str(error.strerror)
        if found is not None:
            messages.append(f"{file}: {found}")
        advance(entry["bytes"])
    return messages


def _wrong_field(manifest: Manifest) -> str | None:
    dtypes, tokens, files = (manifest.get(name) for name in ("dtypes", "tokens_per_cell", "files"))
    good = {
        **{name: _is_number(manifest.get(name)) for name in _NUMBERS},
        "digest": isinstance(manifest.get("digest"), str),
        "unit": manifest.get("unit") in ("cell", "group"),
        "dtypes": isinstance(dtypes, dict) and all(dtypes.get(name) in _DTYPES for name in ("genes", "counts")),
        "tokens_per_cell": isinstance(tokens, dict) and all(_is_number(tokens.get(name)) for name in _OF_TOKENS),
        **{name: manifest.get(name) is None or _is_number(manifest[name]) for name in ("held_out", "seed")},
        "failed": isinstance(manifest.get("failed", []), list),
        "group_by": isinstance(manifest.get("group_by"), str | None),
        "split_by": isinstance(manifest.get("split_by"), str | None),
        "hold_out": _are(manifest.get("hold_out", []), lambda value: isinstance(value, str)),
        "notes": _are(manifest.get("notes", []), lambda note: isinstance(note, str)),
        "sources": bool(manifest.get("sources")) and _are(manifest["sources"], _is_source),
        "quality": _are(manifest.get("quality"), lambda row: isinstance(row, dict) and row.keys() >= _OF_RULES),
        "files": isinstance(files, dict) and all(_is_entry(name, entry) for name, entry in files.items()),
    }
    wrong = [name for name, is_good in good.items() if not is_good]
    if not wrong and not 0 <= manifest["num_train"] <= manifest["num_cells"]:
        return "num_train"
    return wrong[0] if wrong else None


_NUMBERS = (
    *("num_cells", "num_train", "num_genes", "num_tokens"),
    *("num_shards", "num_cells_without_tokens", "num_clipped_counts"),
)
_DTYPES = ("uint8", "uint16", "uint32", "uint64")
_OF_TOKENS = ("median", "percentile_99", "max")
_OF_RULES = {"rule", "value", "of", "removed", "left"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63


def _are(values: Any, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(is_one, values))


def _is_source(source: Any) -> bool:
    return (
        isinstance(source, dict)
        and all(_is_number(source.get(name)) for name in ("num_cells", "num_cells_kept"))
        and all(isinstance(source.get(name), str) for name in ("name", "counts_from"))
        and _are(source.get("notes"), lambda note: isinstance(note, str))
    )


def _is_entry(name: str, entry: Any) -> bool:
    """A file below the store's directory, by its plain name."""
    return (
        bool(name)
        and name.isprintable()
        and PurePosixPath(name).as_posix() == name
        and not name.startswith("/")
        and not {".", ".."} & set(name.split("/"))
        and isinstance(entry, dict)
        and _is_number(entry.get("bytes"))
        and all(isinstance(entry.get(digest), str) for digest in ("sha256", "tail_sha256"))
    )


def _missing_or_cut(file: Path, entry: dict[str, Any]) -> str | None:
    if not file.is_file():
        return "missing"
    size = file.stat().st_size
    if size != entry["bytes"]:
        verb = "cut short" if size < entry["bytes"] else "altered"
        return f"{size:,} bytes, but its manifest says {entry['bytes']:,}: {verb}"
    return None


def _tail_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL_BYTES))
        return hashlib.sha256(stream.read()).hexdigest()


def _digest_of(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
