"""What a file of cells says, read plainly and wholly, with none of cctrain's code; and whether a store says the same.

Ids and tables come by way of anndata, matrices cell by cell by the definition of their form. Where a file is no valid
matrix of counts this raises Invalid: then `cctrain prepare` must have refused it.
"""

import gzip
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr

_ENSEMBL = re.compile(r"(ENS[A-Z]{0,6}G\d{11})(\.\d+)?")
_LARGEST_STORED = 65_535
_INTEGER = re.compile(rb"[+-]?\d+")
_REAL = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Invalid(Exception):
    """The file is no matrix of counts with ids, in words."""


@dataclass
class Expected:
    """`cells[i]` is the count of each gene of cell i, zeros left out."""

    ids: list[str]
    cells: list[dict[str, int]]
    genes: set[str]
    obs: pd.DataFrame | None  # of forms that have tables


def compare(path: Path, out: Path) -> str | None:
    """What is wrong with the store at `out`, which was made of `path`; None if nothing is."""
    counts_from = json.loads((out / "manifest.json").read_bytes())["sources"][0]["counts_from"]
    try:
        expected = read_source(path, counts_from)
    except Invalid as error:
        return f"accepted, but it is no valid input: {error}"
    different = differences(out, expected)
    return different and f"the store is not what the source says: {different}"


def read_source(path: Path, counts_from: str) -> Expected:
    """The cells that `path` holds in the matrix that the store says they came from. Raises Invalid."""
    if path.is_dir() and not any((path / name).exists() for name in ("zarr.json", ".zgroup")):
        ids, columns, entries = _folder(path)
        return _expected(ids, columns, entries, None)
    if path.is_dir():
        return _tree(zarr.open_group(path, mode="r", use_consolidated=False), counts_from)
    with h5py.File(path, "r") as file:
        return _tree(file, counts_from)


def differences(out: Path, expected: Expected) -> str | None:
    """How the store at `out`, of all cells that have a count and all genes that training cells have, differs."""
    num_train = json.loads((out / "manifest.json").read_bytes())["num_train"]
    store = anndata.read_zarr(out / "cells.zarr")
    shared = pd.Series(expected.ids).duplicated(keep=False)
    names = [f"{name}#{i}" if shared[i] else name for i, name in enumerate(expected.ids)]
    row_of = {name: i for i, name in enumerate(names)}
    strange = [str(name) for name in store.obs_names if str(name) not in row_of]
    if strange:
        return f"the cell {strange[0]!r} is not in the source"
    rows = [row_of[str(name)] for name in store.obs_names]
    wanted = [i for i, cell in enumerate(expected.cells) if cell]
    if sorted(rows) != wanted:
        return f"{len(rows)} cells, and the source has {len(wanted)} with counts"
    expressed = {gene for row in rows[:num_train] for gene in expected.cells[row]}
    if list(store.var_names) != sorted(expressed):
        return f"{store.n_vars} genes, and {len(expressed)} are expressed in training cells"
    if not np.asarray(store.varm["measured"]).all():
        return "a gene of the only source counts as not measured"
    side_of: dict[tuple[tuple[str, int], ...], bool] = {}
    for place, (row, (genes, counts)) in enumerate(zip(rows, _stored_cells(out, store), strict=True)):
        found = dict(zip(store.var_names[genes], counts.tolist(), strict=True))
        truth = {gene: min(n, _LARGEST_STORED) for gene, n in expected.cells[row].items() if gene in expressed}
        if found != truth:
            return f"cell {names[row]!r} (row {row}) has other counts than in the source"
        held_out = place >= num_train
        if side_of.setdefault(tuple(sorted(expected.cells[row].items())), held_out) != held_out:
            return f"cell {names[row]!r} has a copy on the other side of the split"
    return _other_obs(store.obs, expected.obs, rows)


def _stored_cells(out: Path, store: anndata.AnnData) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Genes and counts of every cell, from X or from tars."""
    if store.X is not None:
        for place in range(store.n_obs):
            yield store.X[place].indices, store.X[place].data
    for file in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(file) as tar:
            arrays = {
                member.name: np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
                for member in tar.getmembers()
            }
        for key in sorted({name.split(".")[0] for name in arrays}):
            indptr, genes, counts = (arrays[f"{key}.{part}.npy"] for part in ("indptr", "genes", "counts"))
            for first, last in pairwise(indptr.tolist()):
                yield genes[first:last], counts[first:last]


def _other_obs(stored: pd.DataFrame, obs: pd.DataFrame | None, rows: list[int]) -> str | None:
    for column in ("cell_type", "sample", "age"):
        if obs is None or column not in obs or column not in stored:
            continue
        truth = obs[column].iloc[rows].astype(object).to_numpy()
        found = stored[column].astype(object).to_numpy()
        same = (truth == found) | (pd.isna(truth) & pd.isna(found)) | (truth.astype(str) == found.astype(str))
        if not np.all(same):
            return f"obs column {column!r} differs in row {rows[int(np.argmin(same))]}"
    return None


def _expected(
    ids: list[str], columns: list[str | None], entries: list[tuple[int, int, float]], obs: pd.DataFrame | None
) -> Expected:
    """From (cell, column, value); a column that is no gene has no id."""
    genes = [None if name is None else _without_version(name) for name in columns]
    cells: list[dict[str, int]] = [{} for _ in ids]
    for cell, column, value in entries:
        if not 0 <= cell < len(ids) or not 0 <= column < len(columns):
            raise Invalid(f"an entry for cell {cell} and column {column}")
        if not (value >= 0 and value == np.floor(value) and value < 2**32):
            raise Invalid(f"the value {value}")
        gene = genes[column]
        if gene is not None and value:
            cells[cell][gene] = cells[cell].get(gene, 0) + int(value)
    return Expected(ids, cells, {gene for gene in genes if gene is not None}, obs)


def _without_version(name: str) -> str:
    match = _ENSEMBL.fullmatch(name)
    return match.group(1) if match else name


# HDF5 and Zarr


def _tree(tree: Any, counts_from: str) -> Expected:
    if "obs" not in tree or counts_from.split("/")[0] not in ("X", "raw.X", "layers"):
        return _tenx_h5(tree)
    obs, var = (anndata.io.read_elem(tree[name]) for name in ("obs", "raw/var" if counts_from == "raw.X" else "var"))
    ids, columns = [str(name) for name in obs.index], _gene_ids(var)
    matrix = tree[counts_from.replace("raw.X", "raw/X")]
    if isinstance(matrix, h5py.Dataset | zarr.Array):
        values = np.asarray(matrix[...])
        if values.shape != (len(ids), len(columns)):
            raise Invalid(f"a matrix of shape {values.shape}")
        entries = [
            (cell, column, float(values[cell, column])) for cell in range(len(ids)) for column in range(len(columns))
        ]
        return _expected(ids, columns, entries, obs)
    if [int(size) for size in matrix.attrs["shape"]] != [len(ids), len(columns)]:
        raise Invalid(f"a matrix of shape {matrix.attrs['shape']}")
    encoding = str(matrix.attrs["encoding-type"])
    if encoding not in ("csr_matrix", "csc_matrix"):
        raise Invalid(f"a matrix of type {encoding}")
    by_cell = encoding == "csr_matrix"
    entries = [
        (outer, inner, value) if by_cell else (inner, outer, value)
        for outer, inner, value in _compressed(matrix, len(ids) if by_cell else len(columns))
    ]
    return _expected(ids, columns, entries, obs)


def _compressed(matrix: Any, length: int) -> list[tuple[int, int, float]]:
    data, indices, indptr = (np.asarray(matrix[part][...]) for part in ("data", "indices", "indptr"))
    if data.ndim != 1 or indices.ndim != 1 or indptr.shape != (length + 1,):
        raise Invalid(f"{data.shape} values, {indices.shape} indices, {indptr.shape} pointers for {length} rows")
    if indptr.dtype.kind not in "iuf" or indices.dtype.kind not in "iuf" or data.dtype.kind not in "biuf":
        raise Invalid(f"types {data.dtype}, {indices.dtype}, {indptr.dtype}")
    if not (indices == np.floor(indices)).all() or not (indptr == np.floor(indptr)).all():
        raise Invalid("indices that are no whole numbers")
    pointers = [int(pointer) for pointer in indptr]
    if pointers != sorted(pointers) or pointers[0] < 0 or pointers[-1] > min(len(data), len(indices)):
        raise Invalid("pointers that do not ascend within the data")
    return [
        (row, int(indices[place]), float(data[place]))
        for row in range(length)
        for place in range(pointers[row], pointers[row + 1])
    ]


def _tenx_h5(file: h5py.File) -> Expected:
    groups = ["matrix"] if "matrix" in file else [name for name in file if "barcodes" in file[name]]
    if len(groups) != 1:
        raise Invalid(f"matrices {groups}")
    matrix = file[groups[0]]
    ids = _texts(matrix["barcodes"])
    names = ("features/id", "features/name") if "features" in matrix else ("genes", "gene_names")
    columns = _gene_ids(pd.DataFrame({"name": _texts(matrix[names[1]])}, index=_texts(matrix[names[0]])))
    if "features" in matrix and "feature_type" in matrix["features"]:
        types = _texts(matrix["features/feature_type"])
        if len(types) != len(columns):
            raise Invalid("another number of types than of features")
        if "Gene Expression" in types:
            columns = [name if kind == "Gene Expression" else None for name, kind in zip(columns, types, strict=True)]
    if [int(size) for size in matrix["shape"][...]] != [len(columns), len(ids)]:
        raise Invalid("another shape than barcodes and features have")
    return _expected(ids, columns, _compressed(matrix, len(ids)), None)


def _texts(array: h5py.Dataset) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in array[...].tolist()]


def _gene_ids(var: pd.DataFrame) -> list[str | None]:
    """The index if it holds Ensembl ids, else the first column of text that does, else the index."""
    candidates = [[str(name) for name in var.index]]
    for name in var.columns:
        values = var[name]
        if values.dtype.kind in "OSU" or isinstance(values.dtype, pd.CategoricalDtype | pd.StringDtype):
            shown = [
                value if isinstance(value, str) and value else str(own)
                for value, own in zip(values, var.index, strict=True)
            ]
            candidates.append(shown)
    for names in candidates:
        if sum(_ENSEMBL.match(name) is not None for name in names) > len(names) / 2:
            return list(names)
    return list(candidates[0])


# 10x folders


def _folder(path: Path) -> tuple[list[str], list[str | None], list[tuple[int, int, float]]]:
    ids = [line.split(b"\t")[0].decode() for line in _lines(path, "barcodes.tsv")]
    features = [[part.decode() for part in line.split(b"\t")] for line in _lines(path, "features.tsv", "genes.tsv")]
    types = [parts[2] if len(parts) > 2 else "" for parts in features]
    some = "Gene Expression" in types
    names = [parts[1] if len(parts) > 1 else "" for parts in features]
    columns = _gene_ids(pd.DataFrame({"name": names}, index=[parts[0] for parts in features]))
    columns = [
        name if not some or kind == "Gene Expression" else None for name, kind in zip(columns, types, strict=True)
    ]
    lines = _lines(path, "matrix.mtx", keep_empty=True)
    banner = lines[0].lower().split()
    if banner[:3] != [b"%%matrixmarket", b"matrix", b"coordinate"] or banner[3:] not in (
        [b"integer", b"general"],
        [b"real", b"general"],
    ):
        raise Invalid(f"the first line {lines[0]!r}")
    body = [line.split() for line in lines[1:] if line.strip() and not line.startswith(b"%")]
    if any(len(words) != 3 for words in body):
        raise Invalid("a line that has not three words")
    sizes = [_whole(word) for word in body[0]]
    if sizes != [len(columns), len(ids), len(body) - 1]:
        raise Invalid(f"sizes {sizes}")
    return ids, columns, [(_whole(cell) - 1, _whole(gene) - 1, _number(value)) for gene, cell, value in body[1:]]


def _whole(word: bytes) -> int:
    if not _INTEGER.fullmatch(word):
        raise Invalid(f"{word!r} is no whole number")
    return int(word)


def _number(word: bytes) -> float:
    if not _REAL.fullmatch(word):
        raise Invalid(f"{word!r} is no number")
    return float(word)


def _lines(folder: Path, *names: str, keep_empty: bool = False) -> list[bytes]:
    """Lines of the first that is there; an empty one is not counted as a line of ids by every reader."""
    for name in names:
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                content = file.read_bytes()
                lines = (
                    (gzip.decompress(content) if file.suffix == ".gz" else content).replace(b"\r\n", b"\n").split(b"\n")
                )
                return lines if keep_empty else [line for line in lines if line]
    raise Invalid(f"no {' or '.join(names)}")
