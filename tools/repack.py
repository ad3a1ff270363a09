"""A store again in another form, from the store alone: the same cells, order and content digest."""

import shutil
from pathlib import Path

import numpy as np

from cctrain.data.store import writer
from cctrain.data.store.layout import Layout
from cctrain.data.store.manifest import file_entries, write_manifest
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import DataError


def repack(store: TokenStore, out: Path, container: str, compressed: bool = True) -> TokenStore:
    """Write `store` to OUT, which must not exist yet, and open it. Holds one shard in memory."""
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists: choose another place.")
    partial = out.with_name(f"{out.name}.repacking")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    indptr = np.concatenate([[0], np.cumsum(store.num_tokens)])
    genes_dtype, counts_dtype = (np.dtype(store.manifest["dtypes"][name]) for name in ("genes", "counts"))
    layout = Layout(container, indptr, len(store.genes.ids), genes_dtype, counts_dtype, compressed)
    edges = writer.create(partial, layout)
    for shard, (start, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        first = np.searchsorted(indptr, start, side="right") - 1
        cells = store.cells(np.arange(first, np.searchsorted(indptr, stop)))
        tokens = slice(start - int(indptr[first]), stop - int(indptr[first]))
        writer.write_shard(partial, layout, shard, cells.genes[tokens], cells.counts[tokens])
    writer.close(partial, layout)
    writer.write_tables(partial, store.var(), store.measured, store.genes.loadings, store.obs(), store.groups)
    manifest = store.manifest | {"container": container, "num_shards": len(edges) - 1}
    write_manifest(partial, manifest | {"files": file_entries(partial)})
    partial.rename(out)
    return open_store(out, store.digest)
