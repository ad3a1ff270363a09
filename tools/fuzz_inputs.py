"""The small valid inputs that `fuzz` damages: the same cells in every form that `cctrain prepare` reads, and stores.

Everything here is a pure function of nothing, to the last byte, so that a seed alone makes a mutant again. The files
of the 10x forms are written by their specification and not by cctrain.
"""

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

NUM_CELLS, NUM_GENES = 150, 40
ANY_CELL = ("--min-genes=1", "--min-cells=1")


@dataclass(frozen=True)
class Form:
    """`write` takes a folder and returns the file or folder that it made there; `matrix` is the place of the counts
    in a file or Zarr directory, `ids` are the places of cell ids and gene ids there. A store is prepared from an
    .h5ad with the further arguments in `options`."""

    kind: str  # h5, zarr, folder or store
    write: Callable[[Path], Path]
    matrix: str = "X"
    ids: tuple[str, str] = ("obs/_index", "var/_index")
    options: tuple[str, ...] = ()


def counts() -> np.ndarray:
    """int64 (NUM_CELLS, NUM_GENES): no empty cell, no unseen gene, two cells alike, one count above 65,535."""
    values = np.random.default_rng(0).negative_binomial(0.5, 0.2, size=(NUM_CELLS, NUM_GENES))
    values[:, 0] = 1 + np.arange(NUM_CELLS)
    values[0, 1:] += 1
    values[7] = values[3]
    values[11, 5] = 70_000
    return values


def gene_ids() -> list[str]:
    return [f"ENSG{gene:011d}" for gene in range(NUM_GENES)]


def cell_ids() -> list[str]:
    return [f"cell{cell}" for cell in range(NUM_CELLS)]


def _anndata(x: object, **further: object) -> anndata.AnnData:
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([("rod", "cone", "glia")[cell % 3] for cell in range(NUM_CELLS)]),
            "sample": [f"sample {cell % 10}" for cell in range(NUM_CELLS)],
            "age": np.arange(NUM_CELLS),
        },
        index=cell_ids(),
    )
    var = pd.DataFrame({"gene_name": [f"NAME{gene}" for gene in range(NUM_GENES)]}, index=gene_ids())
    return anndata.AnnData(x, obs=obs, var=var, **further)


def _counts_in_x(form: Callable[[np.ndarray], object]) -> anndata.AnnData:
    return _anndata(form(counts().astype(np.float32)), uns={"note": "not read"})


def _counts_in_raw() -> anndata.AnnData:
    data = _anndata(sp.csr_matrix(np.log1p(counts()).astype(np.float32)))
    data.raw = _anndata(sp.csr_matrix(counts().astype(np.float32)))
    return data


def _counts_in_layer() -> anndata.AnnData:
    logarithms = np.log1p(counts()).astype(np.float32)
    layers = {"umi": sp.csc_matrix(counts().astype(np.float64)), "scaled": logarithms - 1}
    return _anndata(logarithms, layers=layers)


def _h5ad(make: Callable[[], anndata.AnnData]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "cells.h5ad"
        make().write_h5ad(path)
        return path

    return write


def _zarr(make: Callable[[], anndata.AnnData], version: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "cells.zarr"
        with anndata.settings.override(zarr_write_format=version):
            make().write_zarr(path)
        return path

    return write


def _by_cell(file: h5py.Group) -> None:
    """10x files hold genes x cells in CSC, that is, the arrays of cells x genes in CSR."""
    matrix = sp.csr_matrix(counts())
    file["data"] = matrix.data.astype(np.int32)
    file["indices"] = matrix.indices.astype(np.int64)
    file["indptr"] = matrix.indptr.astype(np.int64)
    file["shape"] = np.array([NUM_GENES, NUM_CELLS], dtype=np.int32)
    file["barcodes"] = np.array(cell_ids(), dtype="S")


def _tenx_h5_v3(folder: Path) -> Path:
    path = folder / "feature_bc_matrix.h5"
    with h5py.File(path, "w") as file:
        file.attrs["filetype"] = "matrix"
        matrix = file.create_group("matrix")
        _by_cell(matrix)
        features = matrix.create_group("features")
        features["id"] = np.array(gene_ids(), dtype="S")
        features["name"] = np.array([f"NAME{gene}" for gene in range(NUM_GENES)], dtype="S")
        features["feature_type"] = np.array(["Gene Expression"] * NUM_GENES, dtype="S")
        features["genome"] = np.array(["GRCh38"] * NUM_GENES, dtype="S")
        features["_all_tag_keys"] = np.array(["genome"], dtype="S")
    return path


def _tenx_h5_v2(folder: Path) -> Path:
    path = folder / "gene_bc_matrices.h5"
    with h5py.File(path, "w") as file:
        genome = file.create_group("GRCh38")
        _by_cell(genome)
        genome["genes"] = np.array(gene_ids(), dtype="S")
        genome["gene_names"] = np.array([f"NAME{gene}" for gene in range(NUM_GENES)], dtype="S")
    return path


def _tenx_folder(names: tuple[str, str, str]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        run = folder / "filtered_matrix"
        run.mkdir()
        text = io.BytesIO()
        scipy.io.mmwrite(text, sp.coo_matrix(counts().T), field="integer", symmetry="general")
        columns = [f"{gene}\tNAME{i}" for i, gene in enumerate(gene_ids())]
        if names[1].startswith("features"):
            columns = [f"{line}\tGene Expression" for line in columns]
        contents = (text.getvalue(), _lines(columns), _lines(cell_ids()))
        for name, content in zip(names, contents, strict=True):
            (run / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
        return run

    return write


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


_csr_file = _h5ad(lambda: _counts_in_x(sp.csr_matrix))
_TENX = ("matrix/barcodes", "matrix/features/id")

FORMS: dict[str, Form] = {
    "h5ad-csr": Form("h5", _csr_file),
    "h5ad-csc": Form("h5", _h5ad(lambda: _counts_in_x(sp.csc_matrix))),
    "h5ad-dense": Form("h5", _h5ad(lambda: _counts_in_x(np.asarray))),
    "h5ad-raw": Form("h5", _h5ad(_counts_in_raw), "raw/X", ("obs/_index", "raw/var/_index")),
    "h5ad-layer": Form("h5", _h5ad(_counts_in_layer), "layers/umi"),
    "10x-h5-v2": Form("h5", _tenx_h5_v2, "GRCh38", ("GRCh38/barcodes", "GRCh38/genes")),
    "10x-h5-v3": Form("h5", _tenx_h5_v3, "matrix", _TENX),
    "10x-folder-v2": Form("folder", _tenx_folder(("matrix.mtx", "genes.tsv", "barcodes.tsv"))),
    "10x-folder-v3": Form("folder", _tenx_folder(("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"))),
    "zarr-v2-csr": Form("zarr", _zarr(lambda: _counts_in_x(sp.csr_matrix), 2)),
    "zarr-v3-csc": Form("zarr", _zarr(lambda: _counts_in_x(sp.csc_matrix), 3)),
    "zarr-v3-dense": Form("zarr", _zarr(lambda: _counts_in_x(np.asarray), 3)),
    "store-zarr": Form("store", _csr_file, options=("--format=zarr",)),
    "store-webdataset": Form("store", _csr_file, options=("--format=webdataset",)),
    "store-groups": Form("store", _csr_file, options=("--group-by=sample",)),
}
