"""The token store, written: first a frame, then shards in any order and by any process, then what indexes them.

    edges = create(root, layout)                       # the tokens of each shard
    for shard in range(len(edges) - 1):
        write_shard(root, layout, shard, genes, counts)
    close(root, layout)
    write_tables(root, var, measured, loadings, obs, groups)

A shard's bytes depend on the layout and on its own tokens alone; a shard is complete or absent, and may be written
again. manifest.py describes the files afterwards.
"""

from pathlib import Path
from types import ModuleType

import anndata
import numpy as np
import pandas as pd
import zarr

from cctrain.data.store import shards_webdataset, shards_zarr
from cctrain.data.store.layout import Groups, Layout, cells_folder, remove_partial_files
from cctrain.data.store.shards_zarr import one_blosc_thread

_FORMS: dict[str, ModuleType] = {"zarr": shards_zarr, "webdataset": shards_webdataset}


def shard_edges(layout: Layout) -> np.ndarray:
    """int64 (shards + 1,): the tokens of shard i are edges[i] .. edges[i + 1] - 1."""
    return _FORMS[layout.container].shard_edges(layout)


def create(root: Path, layout: Layout) -> np.ndarray:
    """The frame of a store, without a token; returns `shard_edges`. Shards that are already there stay."""
    group = zarr.open_group(cells_folder(root), mode="a", zarr_format=3)
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    group.require_group("uns").attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    _FORMS[layout.container].create(root, layout)
    return shard_edges(layout)


def write_shard(root: Path, layout: Layout, shard: int, genes: np.ndarray, counts: np.ndarray) -> None:
    """The tokens edges[shard] .. edges[shard + 1] - 1, of any integer type that holds them."""
    start, stop = shard_edges(layout)[shard : shard + 2]
    assert len(genes) == len(counts) == stop - start, "a shard takes the tokens between its edges"
    _FORMS[layout.container].write_shard(root, layout, shard, genes, counts)


def close(root: Path, layout: Layout) -> None:
    """The index of cells; after the last shard, when nothing else is writing."""
    remove_partial_files(root)
    _FORMS[layout.container].close(root, layout)


def write_tables(
    root: Path,
    var: pd.DataFrame,
    measured: np.ndarray,
    loadings: np.ndarray,
    obs: pd.DataFrame,
    groups: Groups | None = None,
) -> None:
    """The rest of the AnnData: var (index gene id), varm measured (V, num_sources) and loadings, obs, the groups.

    `measured` is bool (num_sources, V), `loadings` float32 (V, K). May be called again, also after a kill.
    """
    remove_partial_files(root)
    group = zarr.open_group(cells_folder(root), mode="a", zarr_format=3)
    with one_blosc_thread(), anndata.settings.override(auto_shard_zarr_v3=True):
        anndata.io.write_elem(group, "var", var)
        anndata.io.write_elem(group, "obs", obs)
        anndata.io.write_elem(group, "varm", {"measured": measured.T, "loadings": loadings})
        for slot in ("obsm", "obsp", "varp", "layers"):
            anndata.io.write_elem(group, slot, {})
        if groups is not None:
            uns = group["uns"]
            assert isinstance(uns, zarr.Group)
            anndata.io.write_elem(uns, "groups", {"names": groups.names, "starts": groups.starts})
