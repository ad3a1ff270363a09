"""How `fuzz` damages metadata that are JSON: those of Zarr, and the manifest of a token store.

JSON is changed at a random place, or a Zarr array is made to say of itself what is not so: sizes, types, codecs, one
of which unpickles.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.fuzz_mutations import GIGANTIC, Mutation, files_of, pickled, shown


def edit_json(change: Callable[[Any, random.Random], tuple[Any, str]], names: str = "*") -> Mutation:
    """Change the JSON of one of the metadata files."""

    def mutate(path: Path, draw: random.Random) -> str:
        files = [file for file in files_of(path) if file.name in METADATA_FILES or file.suffix == ".json"]
        file = draw.choice([file for file in files if file.match(names)])
        content, what = change(json.loads(file.read_bytes()), draw)
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return f"{file.relative_to(path).as_posix()}: {what}"

    return mutate


METADATA_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")


def drop_key(content: Any, draw: random.Random) -> tuple[Any, str]:
    holder, key = _any_place(content, draw)
    del holder[key]
    return content, f"{key!r} deleted"


def retype(content: Any, draw: random.Random) -> tuple[Any, str]:
    holder, key = _any_place(content, draw)
    before, new = (
        holder[key],
        draw.choice([None, "x", "", -1, 0, 2**70, 1.5, float("nan"), True, [], {}, [[[]]], "\x00", "../x"]),
    )
    holder[key] = new
    return content, f"{key!r} was {shown(before)}, is {new!r}"


def _any_place(content: Any, draw: random.Random) -> tuple[Any, Any]:
    """A key or index anywhere, as likely near the top as far below."""
    if not isinstance(content, dict | list) or not content:
        content = {"empty": 0}
    holder, key = content, None
    while True:
        key = draw.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        below = holder[key]
        if not isinstance(below, dict | list) or not below or draw.random() < 0.35:
            return holder, key
        holder = below


def broken(content: Any, draw: random.Random) -> tuple[Any, str]:
    text = json.dumps(content).encode()
    what, new = draw.choice(
        [
            ("empty", b""),
            ("cut short", text[: len(text) // 2]),
            ("100,000 brackets", b"[" * 100_000),
            ("not UTF-8", b'{"a": "\xff"}'),
            ("null", b"null"),
            ("a list", b"[" + text + b"]"),
            ("with a byte order mark", b"\xef\xbb\xbf" + text),
            ("a number of 10,000 digits", b'{"shape": ' + b"9" * 10_000 + b"}"),
        ]
    )
    return new, what


def _array_metadata(path: Path, draw: random.Random) -> tuple[Path, dict[str, Any]]:
    files = [file for file in files_of(path) if file.name in ("zarr.json", ".zarray")]
    loaded = [(file, json.loads(file.read_bytes())) for file in files]
    return draw.choice([(file, content) for file, content in loaded if "shape" in content])


def _claims(path: Path, draw: random.Random) -> str:
    """What an array says of itself, and is not so."""
    file, content = _array_metadata(path, draw)
    old = file.name == ".zarray"
    rank = len(content["shape"])
    match draw.choice(["shape", "chunks", "type", "codec", "fill"]):
        case "shape":
            content["shape"] = draw.choice([[GIGANTIC] * max(rank, 1), [0] * rank, [-1] * rank, [3] * (rank + 1)])
            what = f"shape {content['shape']}"
        case "chunks":
            chunks = [draw.choice([0, -1, GIGANTIC, 1])] * max(rank, 1)
            if old:
                content["chunks"] = chunks
            else:
                content["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": chunks}}
            what = f"chunks {chunks}"
        case "type":
            new = draw.choice(
                ["|O", "<f8", "|S5", "<M8[ns]", "|V9"] if old else ["float64", "string", "bool", "r9", "x"]
            )
            content["dtype" if old else "data_type"] = new
            what = f"type {new}"
        case "codec":
            if old:
                content["compressor"] = draw.choice([None, {"id": "zlib", "level": 1}, {"id": "none-such"}])
                what = f"compressor {content['compressor']}"
            else:
                content["codecs"] = draw.choice([[], [{"name": "none-such"}], [{"name": "bytes"}], [{"name": "gzip"}]])
                what = f"codecs {content['codecs']}"
        case _:
            content["fill_value"] = draw.choice(["NaN", None, [], "x", 10**30])
            what = f"fill value {content['fill_value']!r}"
    file.write_text(json.dumps(content))
    return f"{file.relative_to(path).as_posix()}: {what}"


def _pickle_filter(path: Path, draw: random.Random) -> str:
    """numcodecs knows a filter that unpickles: an array of Zarr v2 may ask for it, in a v3 directory too."""
    file, content = _array_metadata(path, draw)
    array = file.parent
    shape = content["shape"] or [1]
    described = {
        "zarr_format": 2, "shape": shape, "chunks": shape, "dtype": "|O", "order": "C", "compressor": None,
        "filters": [*draw.choice([[], [{"id": "vlen-utf8"}]]), {"id": "pickle", "protocol": 2}],
        "fill_value": "", "dimension_separator": ".",
    }  # fmt: skip
    if file.name == "zarr.json":
        (array / ".zattrs").write_text(json.dumps(content.get("attributes", {})))
        file.unlink()
    (array / ".zarray").write_text(json.dumps(described))
    (array / ".".join("0" * len(shape))).write_bytes(pickled())
    return f"{array.relative_to(path).as_posix()}: a pickle, with the filter that reads it"


METADATA: list[Mutation] = [
    *map(edit_json, (drop_key, drop_key, retype, retype, retype, broken)),
    _claims, _claims, _claims, _pickle_filter, _pickle_filter,
]  # fmt: skip
