"""The 10x Genomics .h5 file: `/matrix` since Cell Ranger 3, one group a genome before.

Its matrix has a column a cell, compressed by column, so it is read by cell as it lies.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from cctrain.data.sources.containers import Container, open_container, refusing
from cctrain.data.sources.raw_blocks import Content
from cctrain.data.sources.stored_matrix import StoredMatrix, check_sparse
from cctrain.errors import DataError

_PARTS = {"barcodes", "data", "indices", "indptr", "shape"}


def is_tenx(container: Container) -> bool:
    return bool(_groups(container))


def open_tenx(container: Container, counts: str | None, scratch: Path | None) -> Content:
    """`counts` may name the group: "matrix", or the genome of a file of several."""
    path = container.path
    key = _choose(container, counts)
    cells, genes = _shape(container, key)
    if "features" in container.names(key):
        columns = {"id": "features/id", "gene_name": "features/name", "feature_types": "features/feature_type"}
    else:
        columns = {"id": "genes", "gene_name": "gene_names"}
    var = pd.DataFrame({name: _texts(container, f"{key}/{part}", genes) for name, part in columns.items()})
    check_sparse(container, key, cells, genes)
    barcodes = container.array(f"{key}/barcodes", "SO")
    if barcodes.shape[0] != cells:
        raise DataError(f"{path}: {key} has {cells:,} cells and {barcodes.shape[0]:,} barcodes: {_DAMAGED}")

    def read_obs() -> pd.DataFrame:
        with open_container(path) as again:
            return pd.DataFrame(index=pd.Index(_texts(again, f"{key}/barcodes", cells), name="barcode"))

    return Content(
        kind="10x .h5",
        var=var.set_index("id"),
        read_obs=read_obs,
        counts_from=key,
        matrix=StoredMatrix(path, key, "csr", (cells, genes), scratch),
        inputs=[path],
        others=lambda: [],
        notes=_genomes(container, key, genes),
    )


_DAMAGED = "the file is damaged; copy it again from its origin."


def _groups(container: Container) -> list[str]:
    groups = [name for name in container.names() if container.is_group(name)]
    return [name for name in groups if set(container.names(name)) >= _PARTS]


def _choose(container: Container, counts: str | None) -> str:
    path, groups = container.path, _groups(container)
    if counts is not None:
        if counts not in groups:
            raise DataError(f"{path}: no {counts}; this 10x file has {', '.join(groups)}.")
        return counts
    if len(groups) > 1:
        raise DataError(
            f"{path}: holds the cells of {len(groups)} genomes ({', '.join(groups)}), each with genes of its own: "
            f"choose one with --counts {groups[0]}."
        )
    return groups[0]


def _shape(container: Container, key: str) -> tuple[int, int]:
    """(cells, genes); the file has them the other way round."""
    stored, _ = container.shape_and_dtype(f"{key}/shape")
    if stored != (2,):
        raise DataError(f"{container.path}: {key}/shape is not two numbers: {_DAMAGED}")
    genes, cells = container.read(f"{key}/shape", container.array(f"{key}/shape", "iu"))
    return int(cells), int(genes)


def _texts(container: Container, key: str, expected: int) -> list[str]:
    array = container.array(key, "SO")
    if array.shape[0] != expected:
        raise DataError(f"{container.path}: {key} has {array.shape[0]:,} entries where {expected:,} belong: {_DAMAGED}")
    container.check_whole(key, array)
    values = container.read(key, array)
    with refusing(container.path, key):
        texts = [value.decode() for value in values.tolist()]
    return texts


def _genomes(container: Container, key: str, genes: int) -> list[str]:
    if f"{key}/features/genome" not in container:
        return []
    genomes = np.unique([name for name in _texts(container, f"{key}/features/genome", genes) if name])
    return [f"genes of {len(genomes)} genomes: {', '.join(genomes)}"] if len(genomes) > 1 else []
