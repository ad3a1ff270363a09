"""Small files of cells in every form that a laboratory may bring, and stores prepared from them."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cctrain.data.prepare.prepare import prepare
from cctrain.data.prepare.quality import QualityControl
from cctrain.data.sources.source import open_source
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import DataError

ANY_CELL = QualityControl(min_genes=1, min_cells=1)


def gene_ids(num: int, first: int = 0) -> list[str]:
    return [f"ENSG{i:011d}" for i in range(first, first + num)]


def random_counts(num_cells: int, num_genes: int, seed: int = 0) -> np.ndarray:
    """int64 counts with zeros, gene 0 counts the cells from 1, no gene lacks a count."""
    draws = np.random.default_rng(seed)
    counts = draws.negative_binomial(0.5, 0.2, size=(num_cells, num_genes))
    counts[:, 0] = 1 + np.arange(num_cells)
    counts[0, 1:] += 1
    return counts


def write_h5ad(path: Path, counts: np.ndarray, **options: Any) -> Path:
    """Options: those of `as_anndata`."""
    as_anndata(counts, **options).write_h5ad(path)
    return path


def write_zarr(path: Path, counts: np.ndarray, *, zarr_format: int = 3, **options: Any) -> Path:
    """Options: those of `as_anndata`."""
    with anndata.settings.override(zarr_write_format=zarr_format, auto_shard_zarr_v3=False):
        as_anndata(counts, **options).write_zarr(path)
    return path


def as_anndata(
    counts: np.ndarray,
    *,
    form: Callable[[np.ndarray], Any] = sp.csr_matrix,
    genes: list[str] | None = None,
    names: list[str] | None = None,
    cells: list[str] | None = None,
    obs: dict[str, Any] | None = None,
    layers: dict[str, np.ndarray] | None = None,
    raw: np.ndarray | None = None,
) -> anndata.AnnData:
    num_cells, num_genes = counts.shape
    genes = genes or gene_ids(num_genes)
    var = pd.DataFrame({"gene_name": names or [f"NAME{i}" for i in range(num_genes)]}, index=genes)
    cells = cells or [f"cell{i}" for i in range(num_cells)]
    data = anndata.AnnData(
        form(counts.astype(np.float32)), obs=pd.DataFrame(obs or {}, index=cells), var=var, layers=layers
    )
    if raw is not None:
        data.raw = anndata.AnnData(sp.csr_matrix(raw.astype(np.float32)), obs=data.obs, var=data.var)
    return data


def write_10x_h5(
    path: Path,
    counts: np.ndarray,
    *,
    version: int = 3,
    genes: list[str] | None = None,
    types: list[str] | None = None,
    genomes: list[str] | None = None,
) -> Path:
    """The .h5 file of Cell Ranger 3 and later; or, with `version` 2, a group with all counts for each genome."""
    num_cells, num_genes = counts.shape
    by_cell = sp.csr_matrix(counts.astype(np.int32))
    matrix = {
        "barcodes": np.array([f"cell{i}" for i in range(num_cells)], dtype="S18"),
        "data": by_cell.data,
        "indices": by_cell.indices.astype(np.int64),
        "indptr": by_cell.indptr.astype(np.int64),
        "shape": np.array([num_genes, num_cells], dtype=np.int32),
    }
    ids = np.array(genes or gene_ids(num_genes), dtype="S")
    names = np.array([f"NAME{i}" for i in range(num_genes)], dtype="S")
    if version == 3:
        places = {"matrix": {"features/id": ids, "features/name": names}}
        places["matrix"]["features/feature_type"] = np.array(types or ["Gene Expression"] * num_genes, dtype="S")
        places["matrix"]["features/genome"] = np.array(genomes or ["GRCh38"] * num_genes, dtype="S")
    else:
        places = {genome: {"genes": ids, "gene_names": names} for genome in genomes or ["GRCh38"]}
    with h5py.File(path, "w") as file:
        for group, lists in places.items():
            for name, values in (matrix | lists).items():
                file.create_dataset(f"{group}/{name}", data=values, chunks=True, compression="gzip")
    return path


def write_10x(
    folder: Path,
    counts: np.ndarray,
    *,
    genes: list[str] | None = None,
    order: np.ndarray | None = None,
    compressed: bool = False,
    types: list[str] | None = None,
) -> Path:
    """`order` permutes the lines of the matrix, which are sorted by cell otherwise."""
    folder.mkdir()
    num_cells, num_genes = counts.shape
    cell, gene = np.nonzero(counts)
    lines = [f"{g + 1} {c + 1} {counts[c, g]}" for c, g in zip(cell, gene, strict=True)]
    if order is not None:
        lines = [lines[i] for i in order]
    header = [
        "%%MatrixMarket matrix coordinate integer general",
        "%",
        f"{num_genes} {num_cells} {len(lines)}",
    ]
    features = [f"{g}\tNAME{i}" for i, g in enumerate(genes or gene_ids(num_genes))]
    if types:
        features = [f"{line}\t{kind}" for line, kind in zip(features, types, strict=True)]
    for name, content in (
        ("matrix.mtx", header + lines),
        ("features.tsv" if types else "genes.tsv", features),
        ("barcodes.tsv", [f"cell{i}" for i in range(num_cells)]),
    ):
        text = "\n".join(content) + "\n"
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder


def read_all(path: Path, **options: Any) -> np.ndarray:
    """(cells, genes) all counts of a source; its cells are read too."""
    source = open_source(path, **options)
    assert len(source.cell_ids) == source.num_cells
    return np.concatenate([block.counts.toarray() for block in source.blocks()])


def refused(path: Path, match: str, **options: Any) -> None:
    """The source cannot be read, and one line says why and names the file."""
    with pytest.raises(DataError, match=match) as error:
        read_all(path, **options)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def prepared(out: Path, *sources: Path, **options: Any) -> TokenStore:
    options.setdefault("quality", ANY_CELL)
    prepare(list(sources), out, report=lambda message: None, **options)
    return open_store(out)


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """60 cells of 30 genes, with cell types."""
    folder = tmp_path_factory.mktemp("small")
    obs = {"cell_type": pd.Categorical(["rod", "cone"] * 30), "age": np.arange(60)}
    source = write_h5ad(folder / "cells.h5ad", random_counts(60, 30), obs=obs)
    return prepared(folder / "store", source)
