"""How `fuzz` damages a file or folder: blindly, byte by byte, or knowing what lies where.

A mutation is a function of a path and a generator; it returns in words what it did. The same generator gives the same
bytes. Those that know HDF5 and Zarr are in `fuzz_trees` and `fuzz_metadata`, those that know stores in `fuzz_stores`.
"""

import gzip
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

CRATER = "crater"  # what a payload that is executed leaves behind, in the working folder

GIGANTIC = 10**12  # entries that a file claims and does not have

Mutation = Callable[[Path, random.Random], str]


class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (CRATER,)


def pickled() -> bytes:
    return pickle.dumps(Bomb(), protocol=2)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}... ({len(text)} characters)"


# Blind: any file, whatever it holds


def mutate_blindly(path: Path, draw: random.Random) -> str:
    files = files_of(path)
    file = draw.choice(files)
    place = file.name if file == path else file.relative_to(path).as_posix()
    if len(files) > 1 and draw.random() < 0.25:
        return f"{place}: {_whole_file(file, files, draw)}"
    content = bytearray(file.read_bytes())
    what = _change_bytes(content, draw)
    file.write_bytes(content)
    return f"{place}: {what}"


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _whole_file(file: Path, files: list[Path], draw: random.Random) -> str:
    other = draw.choice([one for one in files if one != file])
    match draw.choice(["swap", "copy", "delete", "folder", "dangling", "loop", "device", "linked"]):
        case "swap":
            mine, theirs = file.read_bytes(), other.read_bytes()
            file.write_bytes(theirs)
            other.write_bytes(mine)
            return f"swapped with {other.name}"
        case "copy":
            file.write_bytes(other.read_bytes())
            return f"replaced by a copy of {other.name}"
        case "delete":
            file.unlink()
            return "deleted"
        case "folder":
            file.unlink()
            file.mkdir()
            return "replaced by an empty folder"
        case "dangling":
            file.unlink()
            file.symlink_to("not-there")
            return "replaced by a link to nothing"
        case "loop":
            file.unlink()
            file.symlink_to(file.name)
            return "replaced by a link to itself"
        case "device":
            file.unlink()
            file.symlink_to("/dev/zero")
            return "replaced by a link to /dev/zero"
        case _:
            file.unlink()
            file.symlink_to(other)
            return f"replaced by a link to {other.name}"


def _change_bytes(content: bytearray, draw: random.Random) -> str:
    size = len(content)
    first = draw.randrange(size) if size else 0
    length = min(size - first, draw.choice([1, 4, 16, 64, 512, 4096]))
    last = first + length
    where = f"bytes {first} to {last - 1} of {size}"
    match draw.choice(["flip", "flip", "flip", "overwrite", "zero", "truncate", "repeat", "cut", "exchange", "append"]):
        case "flip" if size:
            places = [draw.randrange(8 * size) for _ in range(draw.choice([1, 1, 1, 3, 8]))]
            for place in places:
                content[place // 8] ^= 1 << place % 8
            return f"flipped bits {', '.join(map(str, places))}"
        case "overwrite":
            content[first:last] = draw.randbytes(length)
            return f"overwrote {where}"
        case "zero":
            content[first:last] = bytes(length)
            return f"zeroed {where}"
        case "truncate":
            keep = draw.choice([0, 1, first, max(0, size - 1)])
            del content[keep:]
            return f"truncated to {keep} bytes of {size}"
        case "repeat":
            content[last:last] = content[first:last]
            return f"repeated {where}"
        case "cut":
            del content[first:last]
            return f"cut out {where}"
        case "exchange" if size:
            other = draw.randrange(size)
            length = min(length, abs(other - first), size - max(other, first))
            mine, theirs = content[first : first + length], content[other : other + length]
            content[first : first + length], content[other : other + length] = theirs, mine
            return f"exchanged {length} bytes at {first} and {other}"
        case _:
            content += draw.randbytes(length or 1)
            return f"appended {length or 1} random bytes"


# Text: the three files of a 10x folder


def edit_text(name: str, change: Callable[[list[bytes], random.Random], str]) -> Mutation:
    """A mutation of the lines (without their ends) of the file of a 10x folder whose name begins with `name`."""

    def mutate(path: Path, draw: random.Random) -> str:
        (file,) = (file for file in files_of(path) if re.match(name, file.name))
        compressed = file.name.endswith(".gz")
        content = file.read_bytes()
        lines = (gzip.decompress(content) if compressed else content).splitlines()
        what = change(lines, draw)
        content = b"".join(line + b"\n" for line in lines)
        file.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
        return f"{file.name}: {what}"

    return mutate


_SIZES = 2  # the line of sizes follows the banner and an empty comment, as scipy writes them


def _word(line: int | None, word: int, values: list[bytes]) -> Callable[[list[bytes], random.Random], str]:
    """Replace a word of the matrix: of the given line, or of any entry."""

    def change(lines: list[bytes], draw: random.Random) -> str:
        place = draw.randrange(_SIZES + 1, len(lines)) if line is None else line
        words = lines[place].split()
        words[word] = draw.choice(values)
        lines[place] = b" ".join(words)
        return f"line {place + 1} is now {lines[place].decode(errors='replace')!r}"

    return change


def _line(*choices: bytes) -> Callable[[list[bytes], random.Random], str]:
    """Replace any line of ids, or in the matrix any entry."""

    def change(lines: list[bytes], draw: random.Random) -> str:
        place, line = draw.randrange(min(3, len(lines) - 1), len(lines)), draw.choice(choices)
        lines[place] = line
        return f"line {place + 1} is now {line[:60].decode(errors='replace')!r} ({len(line)} bytes)"

    return change


def _insert(*choices: bytes) -> Callable[[list[bytes], random.Random], str]:
    def change(lines: list[bytes], draw: random.Random) -> str:
        place, line = draw.randrange(min(3, len(lines)), len(lines) + 1), draw.choice(choices)
        lines.insert(place, line)
        return f"{line[:60].decode(errors='replace')!r} inserted as line {place + 1}"

    return change


def _repeat_line(lines: list[bytes], draw: random.Random) -> str:
    place, other = (
        draw.randrange(min(3, len(lines) - 1), len(lines)),
        draw.randrange(min(3, len(lines) - 1), len(lines)),
    )
    lines[place] = lines[other]
    return f"line {place + 1} is now a copy of line {other + 1}"


def _drop_line(lines: list[bytes], draw: random.Random) -> str:
    place = draw.randrange(len(lines))
    return f"line {place + 1} is gone: {lines.pop(place).decode()!r}"


def _one_entry_more(lines: list[bytes], draw: random.Random) -> str:
    """An entry that is there twice, and a header that says so: Matrix Market leaves open what it means."""
    lines.append(draw.choice(lines[_SIZES + 1 :]))
    words = lines[_SIZES].split()
    lines[_SIZES] = b" ".join([*words[:2], str(int(words[2]) + 1).encode()])
    return f"the entry {lines[-1].decode()!r} is there twice"


def _each_line(change: Callable[[bytes], bytes], what: str) -> Callable[[list[bytes], random.Random], str]:
    def all_of_them(lines: list[bytes], draw: random.Random) -> str:
        lines[:] = [change(line) for line in lines]
        return what

    return all_of_them


def _banner(*choices: bytes) -> Callable[[list[bytes], random.Random], str]:
    def change(lines: list[bytes], draw: random.Random) -> str:
        lines[0] = draw.choice(choices)
        return f"its first line is now {lines[0].decode(errors='replace')!r}"

    return change


def _to_end(lines: list[bytes], draw: random.Random) -> str:
    del lines[:]
    return "nothing is left"


def _other_copy(path: Path, draw: random.Random) -> str:
    """The same file plain and compressed, with different contents."""
    file = draw.choice(files_of(path))
    if file.name.endswith(".gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes())[:-3])
        return f"{file.name} is also there plain, and shorter"
    file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()[:-3], mtime=0))
    return f"{file.name} is also there compressed, and shorter"


_BANNER = b"%%MatrixMarket matrix coordinate"
_NO_COUNTS = [
    b"-1",
    b"0.5",
    b"nan",
    b"inf",
    b"1e400",
    b"",
    b"x",
    b"1_0",
    b"0x10",
    b"99999999999999999999",
    b"1e3",
    b"0",
]
_NO_INDEX = [b"0", b"-1", b"1000", b"1.5", b"", b"99999999999999999999", b"nan"]
_NO_SIZE = [b"0", b"-3", b"1000000000000", b"99999999999999999999", b"1.5", b"x", b"7"]
_MATRIX = "matrix"
_GENES = "genes|features"
_BARCODES = "barcodes"
_ODD_LINES = (
    b"",
    b"\xff\xfe\xfd",
    b"a\x00b",
    b"\x1b[2Jcell",
    b"x" * 1_000_000,
    b'"',
    b"NA",
    b"# no comment",
    b"a\tb\tc\td\te",
)

IN_FOLDER: list[Mutation] = [
    edit_text(_MATRIX, _word(None, 2, _NO_COUNTS)),
    edit_text(_MATRIX, _word(None, 0, _NO_INDEX)),
    edit_text(_MATRIX, _word(None, 1, _NO_INDEX)),
    edit_text(_MATRIX, _word(_SIZES, 0, _NO_SIZE)),
    edit_text(_MATRIX, _word(_SIZES, 1, _NO_SIZE)),
    edit_text(_MATRIX, _word(_SIZES, 2, _NO_SIZE)),
    edit_text(
        _MATRIX, _banner(b"", b"\xef\xbb\xbf" + _BANNER + b" integer general", b"%%MatrixMarket matrix array real")
    ),
    edit_text(
        _MATRIX, _banner(*(_BANNER + end for end in (b" integer symmetric", b" pattern general", b" complex general")))
    ),
    edit_text(_MATRIX, _banner(_BANNER + b" real general", _BANNER.upper() + b" INTEGER GENERAL", b"\xff\xfe")),
    edit_text(_MATRIX, _each_line(lambda line: line + b"\r", "lines end with carriage returns")),
    edit_text(_MATRIX, _each_line(lambda line: line.replace(b" ", b"\t"), "tabs instead of blanks")),
    edit_text(_MATRIX, _each_line(lambda line: line if line.startswith(b"%") else line + b" 7", "a fourth column")),
    edit_text(_MATRIX, _insert(b"", b"% a comment", b"1 1", b"1 1 1 1", b"\xff\xff", b"\x00")),
    edit_text(_MATRIX, _repeat_line),
    edit_text(_MATRIX, _drop_line),
    edit_text(_MATRIX, _one_entry_more),
    edit_text(_MATRIX, _to_end),
    edit_text(_GENES, _line(*_ODD_LINES)),
    edit_text(_GENES, _repeat_line),
    edit_text(_GENES, _drop_line),
    edit_text(_GENES, _insert(*_ODD_LINES)),
    edit_text(_GENES, _each_line(lambda line: line.replace(b"\t", b" "), "blanks instead of tabs")),
    edit_text(_GENES, _to_end),
    edit_text(_BARCODES, _line(*_ODD_LINES)),
    edit_text(_BARCODES, _repeat_line),
    edit_text(_BARCODES, _drop_line),
    edit_text(_BARCODES, _insert(*_ODD_LINES)),
    edit_text(_BARCODES, _each_line(lambda line: line + b"\r", "lines end with carriage returns")),
    edit_text(_BARCODES, _to_end),
    _other_copy,
]
