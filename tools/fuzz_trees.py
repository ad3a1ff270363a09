"""How `fuzz` damages HDF5 files and Zarr directories whose parts it knows: matrix, ids, tables, attributes, links.

Both are trees of groups and arrays with attributes, so most changes are written once for both. What only HDF5 can hold
(links, references) comes after; the metadata of Zarr, which are JSON, are changed in `fuzz_metadata`.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr

from tools.fuzz_inputs import Form
from tools.fuzz_metadata import METADATA
from tools.fuzz_mutations import GIGANTIC, Mutation, pickled, shown

Tree = h5py.Group | zarr.Group
Change = Callable[[Any, Form, random.Random], str]

INVALID_TEXT = [b"\xff\xfe\xfd", b"a\x00b", b"", b"\x1b[2Jcell", b"x" * 200_000, b"a/b", b"\xed\xa0\x80"]


def in_tree(form: Form) -> list[Mutation]:
    """All mutations of a file (kind h5) or directory (kind zarr) of this form."""
    of_both = [_edit(form, change) for change in _OF_BOTH]
    return of_both + ([_edit(form, change) for change in _ONLY_HDF5] if form.kind == "h5" else METADATA)


def _edit(form: Form, change: Change) -> Mutation:
    def mutate(path: Path, draw: random.Random) -> str:
        if path.is_file():
            with h5py.File(path, "r+") as tree:
                return change(tree, form, draw)
        return change(zarr.open_group(path, mode="r+", use_consolidated=False), form, draw)

    return mutate


# The tree


def is_array(node: Any) -> bool:
    return isinstance(node, h5py.Dataset | zarr.Array)


def arrays_of(tree: Any) -> list[str]:
    """Paths of all arrays, sorted."""
    return [path for path, node in _nodes(tree) if is_array(node)]


def groups_of(tree: Any) -> list[str]:
    return [path for path, node in _nodes(tree) if not is_array(node)]


def _nodes(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for name in sorted(tree.keys()):
        node = tree[name]
        yield above + name, node
        if not is_array(node):
            yield from _nodes(node, f"{above}{name}/")


def read(tree: Any, path: str) -> np.ndarray:
    return np.asarray(tree[path][...])


def write(tree: Any, path: str, values: np.ndarray, keep_attributes: bool = True) -> None:
    """Replace a node by an array."""
    attributes = dict(tree[path].attrs) if keep_attributes and path in tree else {}
    if path in tree:
        del tree[path]
    if isinstance(tree, h5py.Group):
        tree[path] = values
    else:
        above, _, name = path.rpartition("/")
        (tree[above] if above else tree).create_array(name, data=values)
    tree[path].attrs.update(attributes)


def _matrix_part(tree: Any, form: Form, part: str) -> str:
    """Path of data, indices or indptr; of a dense matrix, which has none of them, that of the matrix."""
    return form.matrix if is_array(tree[form.matrix]) else f"{form.matrix}/{part}"


# Changes that both kinds of tree can hold


def _value(tree: Any, form: Form, draw: random.Random) -> str:
    path = _matrix_part(tree, form, "data")
    values = read(tree, path).astype(np.float64)
    new = draw.choice([np.nan, np.inf, -1.0, 0.5, 1e300, 2.0**33, 2.0**32 - 1, 65_536.0, -0.0])
    place = draw.randrange(values.size)
    values.flat[place] = new
    write(tree, path, values)
    return f"{path}[{place}] = {new}, as float64"


def _all_values(tree: Any, form: Form, draw: random.Random) -> str:
    path = _matrix_part(tree, form, "data")
    values = read(tree, path)
    name, change = draw.choice([("log1p", np.log1p), ("negative", np.negative), ("zero", np.zeros_like)])
    write(tree, path, change(values))
    return f"{path}: all values {name}"


def _dtype(tree: Any, form: Form, draw: random.Random) -> str:
    path = _matrix_part(tree, form, draw.choice(["data", "data", "indices", "indptr"]))
    dtype = draw.choice(["S8", "bool", "int8", "uint8", "float16", "complex64", ">f4", ">i8", "uint64", "<f8"])
    with np.errstate(all="ignore"):
        write(tree, path, read(tree, path).astype(dtype))
    return f"{path} is now of type {dtype}"


def _index(tree: Any, form: Form, draw: random.Random) -> str:
    path = _matrix_part(tree, form, "indices")
    values = read(tree, path).astype(np.int64)
    new = draw.choice([-1, 10**6, 2**31, 2**40, -(2**62), values.flat[0]])
    place = draw.randrange(values.size)
    values.flat[place] = new
    write(tree, path, values)
    return f"{path}[{place}] = {new}"


def _unsorted(tree: Any, form: Form, draw: random.Random) -> str:
    """Within one row the entries in another order, or one gene twice: both are legal."""
    if is_array(tree[form.matrix]):
        return _value(tree, form, draw)
    indptr, indices = (read(tree, f"{form.matrix}/{part}") for part in ("indptr", "indices"))
    row = draw.choice([row for row in range(len(indptr) - 1) if indptr[row + 1] - indptr[row] > 1])
    first, last = int(indptr[row]), int(indptr[row + 1])
    if draw.random() < 0.5:
        data = read(tree, f"{form.matrix}/data")
        indices[first:last], data[first:last] = indices[first:last][::-1], data[first:last][::-1]
        write(tree, f"{form.matrix}/data", data)
        what = "in reversed order"
    else:
        indices[first + 1] = indices[first]
        what = "with its first index twice"
    write(tree, f"{form.matrix}/indices", indices)
    return f"{form.matrix}: row {row} {what}"


def _indptr(tree: Any, form: Form, draw: random.Random) -> str:
    path = _matrix_part(tree, form, "indptr")
    values = read(tree, path).astype(np.int64)
    place = draw.randrange(values.size)
    new = draw.choice([-1, 0, 10**6, 10**15, 2**62, -(2**40), int(values.flat[-1])])
    values.flat[place] = new
    write(tree, path, values)
    return f"{path}[{place}] = {new}"


def _length(tree: Any, form: Form, draw: random.Random) -> str:
    path = draw.choice([_matrix_part(tree, form, part) for part in ("data", "indices", "indptr")] + list(form.ids))
    values = read(tree, path)
    name, new = draw.choice(
        [
            ("without its last", values[:-1]),
            ("with its first ten alone", values[:10]),
            ("empty", values[:0]),
            ("with its last twice", np.concatenate([values, values[-1:]])),
            ("as a column", values.reshape(len(values), -1)[:, :1]),
            ("as a scalar", values.flat[0]),
        ]
    )
    write(tree, path, np.asarray(new))
    return f"{path}: {name}"


def _float_indptr(tree: Any, form: Form, draw: random.Random) -> str:
    path = _matrix_part(tree, form, draw.choice(["indptr", "indices"]))
    write(tree, path, read(tree, path) + draw.choice([0.0, 0.5, np.nan]))
    return f"{path}: floating-point"


def _shape(tree: Any, form: Form, draw: random.Random) -> str:
    matrix = tree[form.matrix]
    new = draw.choice(
        [
            [0, 0], [GIGANTIC, 40], [150, GIGANTIC], [-1, 40], [150], [40, 150, 3], [40, 150], [151, 40], [150, 41],
            [2**63 - 1, 2], [150.5, 40.0], [], "150 x 40",
        ]
    )  # fmt: skip
    if is_array(matrix):
        write(tree, form.matrix, read(tree, form.matrix).reshape(-1)[:3990].reshape(draw.choice([(133, 30), (3990,)])))
        return f"{form.matrix} has another shape"
    if "shape" in matrix.attrs:
        matrix.attrs["shape"] = new
    else:
        write(tree, f"{form.matrix}/shape", np.asarray(new, dtype=None if isinstance(new, str) or not new else "f8"))
    return f"{form.matrix}: shape is now {new!r}"


def _swap(tree: Any, form: Form, draw: random.Random) -> str:
    first, second = draw.sample(arrays_of(tree), 2)
    if draw.random() < 0.5 and not is_array(tree[form.matrix]):
        first, second = (f"{form.matrix}/{part}" for part in draw.sample(["data", "indices", "indptr"], 2))
    mine, theirs = read(tree, first), read(tree, second)
    write(tree, first, theirs)
    write(tree, second, mine)
    return f"{first} and {second} swapped"


def _delete(tree: Any, form: Form, draw: random.Random) -> str:
    path = draw.choice(arrays_of(tree) + groups_of(tree))
    del tree[path]
    return f"{path} deleted"


def _attribute(tree: Any, form: Form, draw: random.Random) -> str:
    """One attribute gone or replaced."""
    places = [(path, name) for path in arrays_of(tree) + groups_of(tree) for name in sorted(tree[path].attrs)]
    places += [("/", name) for name in sorted(tree.attrs)]
    if not places:
        return _delete(tree, form, draw)
    path, name = draw.choice(places)
    attributes = tree.attrs if path == "/" else tree[path].attrs
    if draw.random() < 0.3:
        del attributes[name]
        return f"attribute {name} of {path} deleted"
    new = draw.choice(
        ["", "csr_matrix", "csc_matrix", "array", "dataframe", "none-such", "99.0", 7, -1, "index", [1, 2]]
    )
    attributes[name] = new
    return f"attribute {name} of {path} is now {new!r}"


def _matrix_encoding(tree: Any, form: Form, draw: random.Random) -> str:
    new = draw.choice(["csr_matrix", "csc_matrix", "array", "dataframe", "", 3])
    before = tree[form.matrix].attrs.get("encoding-type")
    tree[form.matrix].attrs["encoding-type"] = new
    return f"{form.matrix}: encoding-type {before!r} is now {new!r}"


def _becomes_array(tree: Any, form: Form, draw: random.Random) -> str:
    path = draw.choice([*groups_of(tree), form.matrix])
    write(tree, path, np.arange(3), keep_attributes=draw.random() < 0.5)
    return f"{path} is now an array of three numbers"


def _becomes_group(tree: Any, form: Form, draw: random.Random) -> str:
    path = draw.choice([_matrix_part(tree, form, part) for part in ("data", "indices", "indptr")] + list(form.ids))
    attributes = dict(tree[path].attrs)
    del tree[path]
    tree.create_group(path).attrs.update(attributes)
    return f"{path} is now an empty group"


def _ids(tree: Any, form: Form, draw: random.Random) -> str:
    path = draw.choice(form.ids)
    values = read(tree, path)
    place, other = draw.sample(range(len(values)), 2)
    match draw.choice(["twice", "numbers", "all alike", "version"]):
        case "twice":
            values[place] = values[other]
            what = f"the id at {other} also at {place}"
        case "numbers":
            values = np.arange(len(values))
            what = "numbers"
        case "all alike":
            values[:] = values[0]
            what = "all alike"
        case _:
            one = values[other]
            values = values.astype(object)
            values[place] = one + (b".3" if isinstance(one, bytes) else ".3")
            if isinstance(one, bytes):
                values = values.astype("S")
            elif isinstance(tree, zarr.Group):
                values = values.astype(np.dtypes.StringDType())
            what = f"the id at {other} with a version at {place}"
    write(tree, path, values)
    return f"{path}: {what}"


def _gigantic(tree: Any, form: Form, draw: random.Random) -> str:
    """Arrays that claim to be huge and take no space: nothing was ever written to their chunks."""
    matrix = form.matrix
    parts = [matrix] if is_array(tree[matrix]) else [f"{matrix}/{part}" for part in ("data", "indices", "indptr")]
    chosen = draw.choice([parts, *([part] for part in parts), [draw.choice(form.ids)]])
    for path in chosen:
        attributes, old = dict(tree[path].attrs), tree[path]
        shape, dtype = (GIGANTIC, *old.shape[1:]), old.dtype
        chunks = (1024, *old.shape[1:])
        del tree[path]
        if isinstance(tree, h5py.Group):
            tree.create_dataset(path, shape=shape, dtype=dtype, chunks=chunks)
        else:
            above, _, name = path.rpartition("/")
            (tree[above] if above else tree).create_array(name, shape=shape, dtype=dtype, chunks=chunks)
        tree[path].attrs.update(attributes)
    return f"{', '.join(chosen)}: {GIGANTIC:,} entries, of which none is there"


_OF_BOTH: list[Change] = [
    _value, _all_values, _dtype, _index, _indptr, _length, _shape, _unsorted, _float_indptr, _swap, _delete, _attribute,
    _matrix_encoding, _becomes_array, _becomes_group, _ids, _gigantic,
]  # fmt: skip


# HDF5 alone


def _text(tree: h5py.File, form: Form, draw: random.Random) -> str:
    """An id that is no text, or hardly one."""
    path, new = draw.choice(form.ids), draw.choice(INVALID_TEXT)
    values = [value if isinstance(value, bytes) else str(value).encode() for value in read(tree, path).tolist()]
    place = draw.randrange(len(values))
    values[place] = new
    attributes = dict(tree[path].attrs)
    del tree[path]
    if b"\x00" in new:
        tree[path] = np.array(values, dtype="S")
    else:
        tree.create_dataset(path, data=np.array(values, dtype=object), dtype=h5py.string_dtype())
    tree[path].attrs.update(attributes)
    return f"{path}[{place}] = {shown(new)}"


def _bomb(tree: h5py.File, form: Form, draw: random.Random) -> str:
    """A pickle where an old version or another program may have put one."""
    above = draw.choice(["uns", "obs", "var", "obsm", form.matrix])
    if above not in tree or is_array(tree[above]):
        above = "pickles"
        tree.create_group(above)
    path = f"{above}/payload"
    match draw.choice(["opaque", "bytes", "text"]):
        case "opaque":
            tree[path] = np.void(pickled())
        case "bytes":
            tree[path] = np.frombuffer(pickled(), dtype=np.uint8)
        case _:
            tree[path] = pickled().hex()
    if draw.random() < 0.5:
        tree[path].attrs["encoding-type"] = draw.choice(["pickle", "object", "bytes", "string"])
        tree[path].attrs["encoding-version"] = "0.1.0"
    if "column-order" in tree[above].attrs and draw.random() < 0.5:
        tree[above].attrs["column-order"] = np.array(["payload"], dtype=h5py.string_dtype())
    return f"a pickle at {path}"


def _reference(tree: h5py.File, form: Form, draw: random.Random) -> str:
    path = draw.choice([_matrix_part(tree, form, "data"), *form.ids])
    length, attributes = tree[path].shape[0], dict(tree[path].attrs)
    del tree[path]
    tree.create_dataset(path, data=np.array([tree.ref] * length, dtype=h5py.ref_dtype), dtype=h5py.ref_dtype)
    tree[path].attrs.update(attributes)
    return f"{path}: references to objects"


def _link(tree: h5py.File, form: Form, draw: random.Random) -> str:
    path = draw.choice([form.matrix, *form.ids, *groups_of(tree)])
    match draw.choice(["itself", "nothing", "other file", "cycle", "root", "raw bytes"]):
        case "itself":
            del tree[path]
            tree[path] = h5py.SoftLink(f"/{path}")
            return f"{path}: a link to itself"
        case "nothing":
            del tree[path]
            tree[path] = h5py.SoftLink("/not/there")
            return f"{path}: a link to nothing"
        case "other file":
            del tree[path]
            tree[path] = h5py.ExternalLink("/etc/hostname", f"/{path}")
            return f"{path}: a link to another file, which is no HDF5"
        case "cycle":
            above = path if not is_array(tree[path]) else path.rpartition("/")[0] or "/"
            tree[above]["again"] = tree[above]
            return f"{above} holds itself"
        case "root":
            del tree[path]
            tree[path] = h5py.SoftLink("/")
            return f"{path}: a link to the root"
        case _:
            path = _matrix_part(tree, form, "data")
            old, attributes = tree[path], dict(tree[path].attrs)
            shape, dtype = old.shape, old.dtype
            del tree[path]
            tree.create_dataset(path, shape=shape, dtype=dtype, external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])
            tree[path].attrs.update(attributes)
            return f"{path}: its bytes are those of another file"


def _compound(tree: h5py.File, form: Form, draw: random.Random) -> str:
    path = draw.choice([_matrix_part(tree, form, part) for part in ("data", "indptr")] + list(form.ids))
    values = np.zeros(tree[path].shape[0], dtype=[("index", "S8"), ("value", "<f4")])
    write(tree, path, values, keep_attributes=draw.random() < 0.5)
    return f"{path}: a table"


_ONLY_HDF5: list[Change] = [_text, _text, _bomb, _bomb, _reference, _link, _link, _compound]
