"""The shape of a store's shards: what a writer and a reader of either form must agree on before any token is written.

A chunk is what is decoded at once, a shard is a file. A shard of 2^25 tokens is 67 MB raw for genes and as much
for counts: few files on a parallel file system, and several can be in the making in the memory of a laptop. Two
forms hold the same tokens in the same order:

    zarr          chunks of 2^16 tokens (about 30 whole cells), cut without regard to cells
    webdataset    blocks of 64 whole cells, one sample of a tar each
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CONTAINERS = ("zarr", "webdataset")
CELLS = "cells.zarr"
SHARDS = "shards"
LARGEST_STORED_COUNT = 2**16 - 1
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class Layout:
    """All that decides where a token of a store lies; equal layouts and tokens give equal bytes.

    `compressed` is for Zarr, and for measuring what compression costs; tars are never compressed. The sizes below
    it are those of every store that `cctrain prepare` writes; tests make them smaller.
    """

    container: str  # one of CONTAINERS
    indptr: np.ndarray  # int64 (cells + 1,): the tokens of cell i are indptr[i] .. indptr[i + 1] - 1
    num_genes: int
    genes_dtype: np.dtype
    counts_dtype: np.dtype
    compressed: bool = True
    tokens_per_chunk: int = 2**16
    tokens_per_shard: int = 2**25
    cells_per_block: int = 64

    @property
    def num_cells(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.indptr[-1])


@dataclass(frozen=True)
class Groups:
    """Groups of cells, such as tissue samples: the cells of group g are rows starts[g] .. starts[g + 1] - 1."""

    names: np.ndarray  # (G,) str
    starts: np.ndarray  # int64 (G + 1,)
    num_train: int  # groups 0 .. num_train - 1 are of the training split


def smallest_unsigned(largest: int) -> np.dtype:
    return np.min_scalar_type(int(largest))


def cells_folder(root: Path) -> Path:
    return Path(root) / CELLS


def shards_folder(root: Path) -> Path:
    return Path(root) / SHARDS


def partial_name(file: Path) -> Path:
    """Where a file is written before it is renamed into its place; zarr's own such names end like this too."""
    return file.with_name(f"{file.name}.{os.getpid()}{PARTIAL_SUFFIX}")


def remove_partial_files(root: Path) -> None:
    """What processes left that were killed while they wrote; none may be writing."""
    for folder in (cells_folder(root), shards_folder(root)):
        for file in sorted(folder.rglob(f"*{PARTIAL_SUFFIX}")):
            file.unlink()
