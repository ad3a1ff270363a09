"""Small files of cells in every form that a laboratory may bring, and stores prepared from them."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cctrain.data.prepare import prepare
from cctrain.data.quality import QualityControl
from cctrain.data.store import TokenStore, open_store

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


def write_h5ad(
    path: Path,
    counts: np.ndarray,
    *,
    form: Callable[[np.ndarray], Any] = sp.csr_matrix,
    genes: list[str] | None = None,
    names: list[str] | None = None,
    cells: list[str] | None = None,
    obs: dict[str, Any] | None = None,
    layers: dict[str, np.ndarray] | None = None,
    raw: np.ndarray | None = None,
) -> Path:
    num_cells, num_genes = counts.shape
    genes = genes or gene_ids(num_genes)
    var = pd.DataFrame({"gene_name": names or [f"NAME{i}" for i in range(num_genes)]}, index=genes)
    cells = cells or [f"cell{i}" for i in range(num_cells)]
    data = anndata.AnnData(
        form(counts.astype(np.float32)), obs=pd.DataFrame(obs or {}, index=cells), var=var, layers=layers
    )
    if raw is not None:
        data.raw = anndata.AnnData(sp.csr_matrix(raw.astype(np.float32)), obs=data.obs, var=data.var)
    data.write_h5ad(path)
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
