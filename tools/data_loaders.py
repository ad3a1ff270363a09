"""The loaders that `bench_data.py` compares, and the files that each of them reads: all made from one .h5ad.

Every loader gives an epoch of whole batches, in random order, in one form: the CSR arrays of the cells as PyTorch
tensors, genes int32 and counts float32, which an embedding can take. What converts into that form, where a loader has
another, is part of the loader. Opening is not: a loader is a function that opens, and returns an iterator.

    cctrain        TokenStore: a block of consecutive cells a batch, blocks in random order, as one does whose store was
                   shuffled when it was written; and the order of training by default, which mixes 64 blocks of 64. A
                   batch is a set: its rows are sorted before they are read. Beside it, blocks of the same arrays as
                   zarr-python reads them, and with the Rust codecs of zarrs.
    memmap         the same cells in two flat NumPy files, in the types of the store; what no container can beat
    scDataset      blocks of 16 cells, 16,384 cells fetched at once, over AnnCollection of the .h5ad: what its authors
                   recommend (block_size=16, fetch_factor=256 for batches of 64; arXiv:2506.01883)
    AnnLoader      of anndata.experimental, over the .h5ad on disk; sparse, not its default conversion to dense
    WebDataset     with nothing of cctrain: cells as samples and a buffer of 1,000, as its documentation has it; and
                   the tars that cctrain writes, in which a sample is 64 cells
    annbatch       its own collection, written with its defaults; 32 chunks of 512 cells at once, its defaults

Each is measured in one process without workers.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import torch
import zarr
from torch import Tensor

from cctrain.config import DataConfig, ObjectiveConfig
from cctrain.data.loading.contexts import ContextRule, target_probability
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.loading.order import Order
from cctrain.data.prepare.prepare import prepare
from cctrain.data.prepare.quality import QualityControl
from cctrain.data.store.store import TokenStore, open_store
from tools.repack import repack

CELLS_FETCHED = 16_384  # at once, by the loaders that have such a buffer
CELLS_PER_TAR, CELLS_PER_BLOCK = 5_000, 64
SHUFFLE_BUFFER, SHARD_BUFFER = 1_000, 100
MICRO_BATCH_TOKENS = 2**16
EVERY_CELL = QualityControl(min_genes=1, min_cells=1)
ZARR_PYTHON, ZARRS = "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs.ZarrsCodecPipeline"


class Cells(NamedTuple):
    """Genes int32 and counts float32 (total,) of some cells; cell i begins at offsets[i], int64 (cells + 1,)."""

    offsets: Tensor
    genes: Tensor
    counts: Tensor


Open = Callable[["Files", int, int], Iterator[Cells]]  # files, cells of a batch, seed


@dataclass(frozen=True)
class Files:
    """What the loaders read: the .h5ad, and what `make_files` makes of it in one folder."""

    atlas: Path
    work: Path

    @property
    def zarr(self) -> Path:
        return self.work / "zarr"

    @property
    def uncompressed(self) -> Path:
        return self.work / "uncompressed"

    @property
    def tars(self) -> Path:
        return self.work / "webdataset"

    @property
    def memmap(self) -> Path:
        return self.work / "memmap"

    @property
    def cell_tars(self) -> Path:
        return self.work / "webdataset-of-cells"

    @property
    def annbatch(self) -> Path:
        return self.work / "annbatch.zarr"


@dataclass(frozen=True)
class Competitor:
    """A loader, and the packages that it needs."""

    open: Open
    needs: tuple[str, ...] = ()
    fetches: int | None = 1  # cells at once: an epoch is cut short between two fetches only, and never if None

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if find_spec(name) is None]


# ---- the files


def make_files(files: Files, report: Callable[[str], None]) -> None:
    """What is not there yet; each is complete or absent."""
    steps: list[tuple[Path, Callable[[Path], object], tuple[str, ...]]] = [
        (files.zarr, lambda out: prepare([files.atlas], out, quality=EVERY_CELL), ()),
        (files.uncompressed, lambda out: repack(open_store(files.zarr), out, "zarr", compressed=False), ()),
        (files.tars, lambda out: repack(open_store(files.zarr), out, "webdataset"), ()),
        (files.memmap, lambda out: write_memmap(files.zarr, out), ()),
        (files.cell_tars, lambda out: write_cell_tars(files.zarr, out), ()),
        (files.annbatch, lambda out: write_annbatch(files.atlas, out), ("annbatch", "zarrs")),
    ]
    for path, make, needs in steps:
        if path.exists() or any(find_spec(name) is None for name in needs):
            continue
        report(f"writing {path}")
        partial = path.with_name(f"making-{path.name}")
        shutil.rmtree(partial, ignore_errors=True)
        make(partial)
        partial.rename(path)


def write_memmap(store_path: Path, out: Path) -> None:
    """The training cells as indptr.npy, genes.npy and counts.npy."""
    out.mkdir()
    store = open_store(store_path)
    cells = store.cells(np.arange(store.num_train))
    for name, array in (("indptr", cells.offsets), ("genes", cells.genes), ("counts", cells.counts)):
        np.save(out / f"{name}.npy", array)


def write_cell_tars(store_path: Path, out: Path) -> None:
    """The training cells, one a sample."""
    import webdataset

    out.mkdir()
    store = open_store(store_path)
    for first in range(0, store.num_train, CELLS_PER_TAR):
        cells = store.cells(np.arange(first, min(first + CELLS_PER_TAR, store.num_train)))
        with webdataset.TarWriter(str(out / f"{first:09d}.tar"), encoder=True) as tar:
            for i, (start, stop) in enumerate(zip(cells.offsets[:-1], cells.offsets[1:], strict=True)):
                sample = {"genes.npy": cells.genes[start:stop], "counts.npy": cells.counts[start:stop]}
                tar.write({"__key__": f"{first + i:09d}", **sample})


def write_annbatch(atlas: Path, out: Path) -> None:
    from annbatch import DatasetCollection

    with zarr.config.set({"codec_pipeline.path": ZARRS}):
        DatasetCollection(out).add_adatas([atlas], shuffle=True, rng=np.random.default_rng(0))


# ---- the loaders


MEMMAP = "memmap, a block a batch"
UNCOMPRESSED, COMPRESSED, WEBDATASET = "cctrain, Zarr uncompressed", "cctrain, Zarr", "cctrain, WebDataset"
CONTEXTS = "cctrain, contexts with targets"
SC_DATASET, ANN_LOADER, ANNBATCH = "scDataset", "AnnLoader", "annbatch"
SINGLE_CELL_LOADERS = (SC_DATASET, ANN_LOADER, ANNBATCH)


def competitors(batch: int) -> dict[str, Competitor]:
    """By name, in the order of the table; `batch` is in cells."""
    defaults = DataConfig()
    a_block = {"block": batch, "mixed_blocks": 1}
    in_training = {"block": defaults.block, "mixed_blocks": defaults.mixed_blocks}
    window = defaults.block * defaults.mixed_blocks
    fetched = -(-CELLS_FETCHED // batch) * batch
    return {
        MEMMAP: Competitor(open_memmap_blocks),
        "memmap, single cells": Competitor(open_memmap_cells),
        UNCOMPRESSED: Competitor(store_opener("uncompressed", **a_block)),
        f"{UNCOMPRESSED}, by zarr-python": Competitor(zarr_opener("uncompressed", ZARR_PYTHON)),
        f"{UNCOMPRESSED}, by zarrs": Competitor(zarr_opener("uncompressed", ZARRS), needs=("zarrs",)),
        COMPRESSED: Competitor(store_opener("zarr", **a_block)),
        f"{COMPRESSED}, by zarr-python": Competitor(zarr_opener("zarr", ZARR_PYTHON)),
        f"{COMPRESSED}, by zarrs": Competitor(zarr_opener("zarr", ZARRS), needs=("zarrs",)),
        WEBDATASET: Competitor(store_opener("tars", **a_block)),
        f"{COMPRESSED}, order of training": Competitor(store_opener("zarr", **in_training), fetches=window),
        f"{WEBDATASET}, order of training": Competitor(store_opener("tars", **in_training), fetches=window),
        CONTEXTS: Competitor(open_contexts, fetches=window),
        SC_DATASET: Competitor(open_sc_dataset, needs=("scdataset",), fetches=fetched),
        ANN_LOADER: Competitor(open_ann_loader),
        ANNBATCH: Competitor(open_annbatch, needs=("annbatch", "zarrs"), fetches=fetched),
        "WebDataset alone, cells": Competitor(open_cell_tars, fetches=None),
        "WebDataset alone, cctrain's tars": Competitor(open_block_tars, fetches=None),
    }


def store_opener(form: str, block: int, mixed_blocks: int) -> Open:
    """Opens our store in one of its forms, an attribute of `Files`."""

    def open_form(files: Files, batch: int, seed: int) -> Iterator[Cells]:
        store = open_store(getattr(files, form))
        order = Order(store.num_train, store.digest, seed, block, mixed_blocks)
        store.cells(np.arange(0))  # reads the index of cells
        return _in_order(store, order, batch)

    return open_form


def zarr_opener(form: str, pipeline: str) -> Open:
    """Opens the arrays of a store as anybody could, with one of zarr's pipelines of codecs; a block a batch."""

    def open_form(files: Files, batch: int, seed: int) -> Iterator[Cells]:
        store = open_store(getattr(files, form))
        indptr = np.concatenate([[0], np.cumsum(store.num_tokens)])[: store.num_train + 1]
        with zarr.config.set({"codec_pipeline.path": pipeline}):
            matrix = zarr.open_group(store.path / "cells.zarr" / "X", mode="r")
            return _blocks(indptr, matrix["indices"], matrix["data"], batch, seed)

    return open_form


def open_contexts(files: Files, batch: int, seed: int) -> Iterator[Cells]:
    """What training receives: targets hidden, packed to the size of a micro-batch; `batch` is the global batch."""
    store = open_store(files.zarr)
    defaults = DataConfig()
    order = Order(store.num_train, store.digest, seed, defaults.block, defaults.mixed_blocks)
    chances = target_probability(store.genes, ObjectiveConfig())
    most = int(store.manifest["tokens_per_cell"]["percentile_99"])
    rule = ContextRule(seed, "training", chances, store.genes.share, most)
    steps = Loader(store, rule, Share(), MICRO_BATCH_TOKENS).training_steps(
        order, batch, 0, -(-store.num_train // batch)
    )
    return (as_cells(packed.offsets, packed.genes, packed.counts) for step in steps for packed in step.batches)


def open_memmap_blocks(files: Files, batch: int, seed: int) -> Iterator[Cells]:
    return _blocks(*_memmap(files), batch, seed)


def open_memmap_cells(files: Files, batch: int, seed: int) -> Iterator[Cells]:
    indptr, genes, counts = _memmap(files)
    rows = np.random.default_rng(seed).permutation(len(indptr) - 1)

    def read(first: int) -> Cells:
        some = rows[first : first + batch]
        cuts = [slice(start, stop) for start, stop in zip(indptr[some], indptr[some + 1], strict=True)]
        return laid_out([genes[cut] for cut in cuts], [counts[cut] for cut in cuts])

    return map(read, range(0, len(rows), batch))


def open_sc_dataset(files: Files, batch: int, seed: int) -> Iterator[Cells]:
    from anndata.experimental import AnnCollection
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    dataset = scDataset(
        AnnCollection([anndata.read_h5ad(files.atlas, backed="r")]),
        BlockShuffling(block_size=16),
        batch_size=batch,
        fetch_factor=-(-CELLS_FETCHED // batch),
        fetch_callback=lambda collection, rows: collection[rows].X,
        batch_transform=_of_matrix,
        seed=seed,
    )
    return iter(DataLoader(dataset, batch_size=None))


def open_ann_loader(files: Files, batch: int, seed: int) -> Iterator[Cells]:
    from anndata.experimental import AnnLoader

    np.random.seed(seed)  # which its order is drawn from
    atlas = anndata.read_h5ad(files.atlas, backed="r")
    return (
        _of_matrix(cells.X) for cells in AnnLoader(atlas, batch_size=batch, shuffle=True, use_default_converter=False)
    )


def open_annbatch(files: Files, batch: int, seed: int) -> Iterator[Cells]:
    from annbatch import DatasetCollection
    from annbatch import Loader as AnnbatchLoader

    zarr.config.set({"codec_pipeline.path": ZARRS})
    draws = np.random.default_rng(seed)
    loader = AnnbatchLoader(batch_size=batch, shuffle=True, preload_to_gpu=False, rng=draws)
    loader.use_collection(DatasetCollection(files.annbatch, mode="r"), load_adata=_matrix_alone)
    return (_of_matrix(cells["X"]) for cells in loader)


def open_cell_tars(files: Files, batch: int, seed: int) -> Iterator[Cells]:
    samples = _plain_webdataset(files.cell_tars, seed, SHUFFLE_BUFFER).to_tuple("genes.npy", "counts.npy")
    return (laid_out(*zip(*cells, strict=True)) for cells in samples.batched(batch, collation_fn=None))


def open_block_tars(files: Files, batch: int, seed: int) -> Iterator[Cells]:
    samples = _plain_webdataset(files.tars / "shards", seed, SHUFFLE_BUFFER // CELLS_PER_BLOCK)
    blocks = samples.to_tuple("indptr.npy", "genes.npy", "counts.npy")
    return (
        _of_blocks(*zip(*some, strict=True)) for some in blocks.batched(batch // CELLS_PER_BLOCK, collation_fn=None)
    )


# ---- the form


def as_cells(offsets: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> Cells:
    """Of arrays of any numbers; copied only where their type is another."""
    typed = (offsets.astype(np.int64, copy=False), genes.astype(np.int32, copy=False))
    return Cells(*map(torch.from_numpy, (*typed, counts.astype(np.float32, copy=False))))


def laid_out(genes: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> Cells:
    """Pieces end to end, an offset for each."""
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in genes])])
    return as_cells(offsets, np.concatenate(genes), np.concatenate(counts))


def _of_matrix(cells: Any) -> Cells:
    return as_cells(cells.indptr, cells.indices, cells.data)


def _matrix_alone(group: zarr.Group) -> anndata.AnnData:
    return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]))


def _memmap(files: Files) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    genes, counts = (np.load(files.memmap / f"{name}.npy", mmap_mode="r") for name in ("genes", "counts"))
    return np.load(files.memmap / "indptr.npy"), genes, counts


def _blocks(indptr: np.ndarray, genes: Any, counts: Any, batch: int, seed: int) -> Iterator[Cells]:
    """Blocks of consecutive cells in random order, from arrays that are read by slices."""
    num_cells = len(indptr) - 1
    for block in np.random.default_rng(seed).permutation(-(-num_cells // batch)).tolist():
        first, last = block * batch, min((block + 1) * batch, num_cells)
        tokens = slice(int(indptr[first]), int(indptr[last]))
        yield as_cells(indptr[first : last + 1] - indptr[first], genes[tokens], counts[tokens])


def _in_order(store: TokenStore, order: Order, batch: int) -> Iterator[Cells]:
    position = 0
    while position < order.num_samples:
        rows = order.batch(position, batch)
        if order.mixed_blocks == 1:  # a batch is a block: the store's last one is short, and must not shift the others
            rows = rows[rows // order.block == rows[0] // order.block]
        position += len(rows)
        cells = store.cells(np.sort(rows))
        yield as_cells(cells.offsets, cells.genes, cells.counts)


def _plain_webdataset(folder: Path, seed: int, buffer: int) -> Any:
    import webdataset

    tars = sorted(map(str, folder.glob("*.tar")))
    return webdataset.WebDataset(tars, shardshuffle=SHARD_BUFFER, seed=seed).shuffle(buffer, seed=seed).decode()


def _of_blocks(indptrs: Sequence[np.ndarray], genes: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> Cells:
    lengths = np.concatenate([np.diff(indptr) for indptr in indptrs])
    return as_cells(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate(genes), np.concatenate(counts))
