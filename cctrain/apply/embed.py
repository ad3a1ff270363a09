"""Embed every cell of a file with a trained model: `obsm['X_cctrain']`, in the input's order."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from cctrain.apply.predict import embed_contexts, load_model
from cctrain.data.loading.contexts import Context, ContextRule, build_context, nothing_hidden
from cctrain.data.sources.source import CellBlock, Source, open_source
from cctrain.errors import DataError
from cctrain.parallel.mesh import find_device_kind
from cctrain.run_directory import open_run

log = logging.getLogger(__name__)

KEY = "X_cctrain"


def embed(run_dir: Path, source_path: Path, out: Path, counts: str | None = None) -> dict[str, int]:
    """Write OUT, the input with `obsm['X_cctrain']` float32 (cells, width) added.

    Every cell is a context of its own, whatever the run was trained on. Genes are matched by id; a gene that the source
    did not measure is not in its contexts. Raises DataError if no gene matches or OUT exists already.
    """
    run = open_run(run_dir)
    if out.exists():
        raise DataError(f"{out} exists already: choose another --out, or move it away")
    if not out.parent.is_dir():
        raise DataError(f"there is no folder {out.parent} to write {out.name} to")
    source = open_source(source_path, counts)
    model = load_model(run).to(torch.device(find_device_kind()))
    share = np.exp(model.log_share.double().cpu().numpy())
    vocabulary = {gene: index for index, gene in enumerate(run.gene_ids)}
    to_vocabulary = np.array([vocabulary.get(gene, -1) for gene in source.gene_ids], dtype=np.int64)
    matched = int((to_vocabulary >= 0).sum())
    if not matched:
        raise DataError(
            f"{source_path}: none of its {len(source.gene_ids):,} genes is in the vocabulary of {run_dir} "
            f"(ids such as {run.gene_ids[0]}, not {source.gene_ids[0]}): embed a file with the same kind of gene id"
        )
    log.info("%s of the model's %s genes are measured in %s", f"{matched:,}", f"{len(share):,}", source_path)

    rule = nothing_hidden(share, run.config.data.max_tokens or len(share), run.config.model.cell_encoding or 0)
    cells = _contexts(source, to_vocabulary, rule)
    shown = track(cells, description="embedding cells", total=source.num_cells, console=Console(stderr=True))
    vectors = embed_contexts(model, shown)
    _write(source, source_path, vectors, out)
    return {"cells": source.num_cells, "dimensions": vectors.shape[1], "genes_matched": matched}


def _contexts(source: Source, to_vocabulary: np.ndarray, rule: ContextRule) -> Iterator[Context]:
    measured = np.zeros(len(rule.share), dtype=bool)
    measured[to_vocabulary[to_vocabulary >= 0]] = True
    for block in source.blocks():
        yield from _block_contexts(block, to_vocabulary, rule, measured)


def _block_contexts(
    block: CellBlock, to_vocabulary: np.ndarray, rule: ContextRule, measured: np.ndarray
) -> Iterator[Context]:
    matrix = block.counts
    for row in range(matrix.shape[0]):
        entries = slice(matrix.indptr[row], matrix.indptr[row + 1])
        genes, counts = to_vocabulary[matrix.indices[entries]], matrix.data[entries]
        known = genes >= 0
        genes, counts = genes[known], counts[known]
        ascending = np.argsort(genes, kind="stable")
        # One number for all: a vector does not depend on where in the file its cell is.
        yield build_context(rule, 0, 0, genes[ascending], counts[ascending], measured)


def _write(source: Source, source_path: Path, vectors: np.ndarray, out: Path) -> None:
    """A copy of an .h5ad file with one array more; any other source becomes a file of its counts."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        if source.kind == ".h5ad":
            shutil.copyfile(source_path, partial)
            with h5py.File(partial, "r+") as file:
                anndata.io.write_elem(file.require_group("obsm"), KEY, vectors)
        else:
            import pandas as pd
            import scipy.sparse as sp

            counts = sp.vstack([block.counts for block in source.blocks()], format="csr")
            var = pd.DataFrame({"gene_name": source.gene_names}, index=source.gene_ids)
            cells = anndata.AnnData(counts, obs=source.obs, var=var, obsm={KEY: vectors})
            cells.write_h5ad(partial)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
