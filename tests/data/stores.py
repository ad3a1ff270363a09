"""Token stores of a few cells, written without `prepare`, with shards and chunks small enough to be many."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cctrain.data.store import writer
from cctrain.data.store.content_digest import ContentDigest, vocabulary_digest
from cctrain.data.store.layout import Groups, Layout
from cctrain.data.store.manifest import FORMAT, VERSION, file_entries, write_manifest
from cctrain.data.store.store import TokenStore, open_store
from tests.data.conftest import gene_ids, random_counts

CONTAINERS = ["zarr", "webdataset"]
SMALL_SHARDS = {"tokens_per_chunk": 32, "tokens_per_shard": 256, "cells_per_block": 4}


def layout_of(counts: np.ndarray, container: str, **sizes: Any) -> Layout:
    """Of a dense matrix (cells, genes)."""
    indptr = np.concatenate([[0], np.cumsum((counts > 0).sum(axis=1))])
    types = np.min_scalar_type(counts.shape[1] - 1), np.min_scalar_type(int(counts.max()))
    return Layout(container, indptr, counts.shape[1], *types, **(SMALL_SHARDS | sizes))


def tokens_of(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Genes and counts of all cells, end to end, as int64."""
    cells = sp.csr_matrix(counts.astype(np.int64))
    return cells.indices.astype(np.int64), cells.data


def write_shards(root: Path, counts: np.ndarray, layout: Layout, order: list[int] | None = None) -> None:
    edges = writer.create(root, layout)
    genes, values = tokens_of(counts)
    for shard in range(len(edges) - 1) if order is None else order:
        tokens = slice(edges[shard], edges[shard + 1])
        writer.write_shard(root, layout, shard, genes[tokens], values[tokens])
    writer.close(root, layout)


def write_tables(root: Path, counts: np.ndarray, groups: Groups | None = None) -> None:
    num_cells, num_genes = counts.shape
    names = [f"NAME{i}" for i in range(num_genes)]
    statistics = dict.fromkeys(("share", "detection_rate", "theta"), np.full(num_genes, 1 / num_genes))
    var = pd.DataFrame({"gene_name": names, **statistics}, index=pd.Index(gene_ids(num_genes), name="gene_id"))
    cells = pd.Index([f"cell{i}" for i in range(num_cells)], name="cell_id")
    obs = pd.DataFrame({"source": np.zeros(num_cells, np.uint8)}, index=cells)
    loadings = np.ones((num_genes, 2), dtype=np.float32)
    writer.write_tables(root, var, np.ones((1, num_genes), dtype=bool), loadings, obs, groups)


def write_store(
    root: Path, counts: np.ndarray, container: str, *, groups: Groups | None = None, num_train: int = 1, **sizes: Any
) -> TokenStore:
    """A whole store of the cells of a dense matrix (cells, genes), all of one source."""
    num_cells, num_genes = counts.shape
    layout = layout_of(counts, container, **sizes)
    write_shards(root, counts, layout)
    write_tables(root, counts, groups)
    num_tokens, ids = np.diff(layout.indptr), gene_ids(num_genes)
    digest = ContentDigest()
    digest.add(num_tokens, np.zeros(num_cells, dtype=np.int64), *tokens_of(counts))
    starts = None if groups is None else groups.starts
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "container": container,
        "unit": "cell" if groups is None else "group",
        "digest": digest.hexdigest(ids, np.ones((1, num_genes), dtype=bool), num_train, starts),
        "vocabulary_digest": vocabulary_digest(ids),
        "num_cells": num_cells,
        "num_train": num_train,
        "num_genes": num_genes,
        "num_tokens": layout.num_tokens,
        "num_shards": len(writer.shard_edges(layout)) - 1,
        "num_cells_without_tokens": int((num_tokens == 0).sum()),
        "num_clipped_counts": 0,
        "dtypes": {"genes": layout.genes_dtype.name, "counts": layout.counts_dtype.name},
        "tokens_per_cell": {
            "median": float(np.median(num_tokens)),
            "percentile_99": float(np.percentile(num_tokens, 99)),
            "max": int(num_tokens.max()),
        },
        "sources": [{"name": "a.h5ad", "num_cells": num_cells, "num_cells_kept": num_cells, "counts_from": "X"}],
        "quality": [],
        "files": file_entries(root),
    }
    manifest["sources"][0]["notes"] = []
    write_manifest(root, manifest)
    return open_store(root)


def many_shards(root: Path, container: str, **options: Any) -> tuple[TokenStore, np.ndarray]:
    """70 cells of 20 genes in some four shards, one cell without a token; and the matrix."""
    counts = random_counts(70, 20)
    counts[33] = 0
    return write_store(root, counts, container, **options), counts


def to_dense(store: TokenStore, rows: np.ndarray) -> np.ndarray:
    """int64 (rows, genes)"""
    cells = store.cells(rows)
    matrix = np.zeros((len(rows), len(store.genes.ids)), dtype=np.int64)
    matrix[np.repeat(np.arange(len(rows)), np.diff(cells.offsets)), cells.genes] = cells.counts
    return matrix


def flip_a_bit(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)
