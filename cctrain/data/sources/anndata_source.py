"""AnnData, as an .h5ad file or a Zarr directory: the tables, and which matrix holds raw counts.

Only obs, var (or raw/var) and the matrices are looked at; uns, obsm and the rest are never read.
"""

from pathlib import Path

import anndata
import pandas as pd

from cctrain.data.sources.containers import Container, open_container, refusing
from cctrain.data.sources.raw_blocks import Content
from cctrain.data.sources.stored_matrix import StoredMatrix, check_matrix, form_of, looks_like_counts
from cctrain.errors import DataError


def open_anndata(container: Container, counts: str | None, scratch: Path | None) -> Content:
    """`counts` is "X", "raw.X" or "layers/NAME"; without it the choice is made by the first values."""
    path = container.path
    matrices = _matrices(container)
    if not matrices:
        raise DataError(
            f"{path}: neither AnnData (it has none of X, raw/X and layers) nor a 10x file; it has "
            f"{', '.join(container.names()[:10]) or 'nothing'}."
        )
    num_cells = _num_rows(container, "obs")
    chosen = _choose(container, matrices, num_cells, counts)
    key, var_key = matrices[chosen], _var_of(chosen)
    shape = (num_cells, _num_rows(container, var_key))
    form = form_of(container, key)
    if form is None:
        raise DataError(
            f"{path}: {chosen} is neither CSR nor CSC nor dense: write the file again with a newer anndata."
        )
    check_matrix(container, key, form, shape)

    def read_obs() -> pd.DataFrame:
        with open_container(path) as again:
            return _table(again, "obs", num_cells)

    def others() -> list[str]:
        with open_container(path) as again:
            return [name for name in matrices if name != chosen and _has_counts(again, name, matrices[name], num_cells)]

    return Content(
        kind="AnnData Zarr" if path.is_dir() else ".h5ad",
        var=_table(container, var_key, shape[1]),
        read_obs=read_obs,
        counts_from=chosen,
        matrix=StoredMatrix(path, key, form, shape, scratch),
        inputs=[path],
        others=others,
        notes=_missing_chunks(container, key) if form == "dense" else [],
    )


def _missing_chunks(container: Container, key: str) -> list[str]:
    """Of a dense matrix, whose writers may leave out what is all zeros: nobody can tell that from a loss."""
    missing, wanted = container.missing_parts(key, container.array(key, "biuf", num_axes=2))
    if not missing:
        return []
    return [f"{missing:,} of {wanted:,} chunks of {key} are not there and were read as zeros (lost, or all zeros)"]


def _matrices(container: Container) -> dict[str, str]:
    """Key of every matrix, by the name that users give it."""
    found = {name: key for name, key in (("X", "X"), ("raw.X", "raw/X")) if key in container}
    if "layers" in container:
        found |= {f"layers/{name}": f"layers/{name}" for name in container.names("layers")}
    return found


def _var_of(name: str) -> str:
    return "raw/var" if name == "raw.X" else "var"


def _choose(container: Container, matrices: dict[str, str], num_cells: int, counts: str | None) -> str:
    path = container.path
    if counts is not None:
        name = {"raw/X": "raw.X"}.get(counts, counts)
        if name not in matrices:
            raise DataError(f"{path}: no {counts}; the file has {', '.join(matrices)}.")
        return name
    for name in ("X", "raw.X"):
        if name in matrices and _has_counts(container, name, matrices[name], num_cells):
            return name
    layers = [
        name
        for name, key in matrices.items()
        if name.startswith("layers/") and _has_counts(container, name, key, num_cells)
    ]
    if len(layers) == 1:
        return layers[0]
    if layers:
        raise DataError(f"{path}: {', '.join(layers)} look like counts: choose one with --counts {layers[0]}.")
    raise DataError(
        f"{path}: no raw counts. Looked at {', '.join(matrices)}: each has negative or fractional values. "
        "Log-normalised or corrected data? Save the raw counts in a layer, or give the file they came from."
    )


def _has_counts(container: Container, name: str, key: str, num_cells: int) -> bool:
    return looks_like_counts(container, key, (num_cells, _num_rows(container, _var_of(name))))


def _num_rows(container: Container, key: str) -> int:
    """Length of the index of a table."""
    if key not in container:
        raise DataError(f"{container.path}: not an AnnData file: it has no {key} (looked for obs and var).")
    index = container.attributes(key).get("_index") if container.is_group(key) else None
    if not isinstance(index, str):
        raise DataError(
            f"{container.path}: {key} is not a table that this AnnData reads: open the file with the anndata that "
            "wrote it, and write it again with a newer one."
        )
    name = f"{key}/{index}"
    if container.is_group(name):  # a nullable or a categorical index
        name += "/codes" if f"{name}/codes" in container else "/values"
    array = container.array(name, "biufOSUT")
    if array.shape[0] * array.dtype.itemsize > 2**20:
        container.check_whole(name, array)
    return int(array.shape[0])


def _table(container: Container, key: str, num_rows: int) -> pd.DataFrame:
    container.check_below(key, num_rows)
    for name in _column_names(container, key):
        if f"{key}/{name}" not in container:
            raise DataError(f"{container.path}: {key} lacks its column '{name}': the file is damaged.")
    with refusing(container.path, key):
        frame = anndata.io.read_elem(container.root[key])
    if not isinstance(frame, pd.DataFrame) or len(frame) != num_rows:
        raise DataError(f"{container.path}: {key} is not a table of {num_rows:,} rows: the file is damaged.")
    return frame


def _column_names(container: Container, key: str) -> list[str]:
    attributes = container.attributes(key)
    with refusing(container.path, key):
        return [str(name) for name in attributes.get("column-order", [])]
