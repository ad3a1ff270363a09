"""Write a synthetic atlas: an .h5ad of any number of cells, sorted by cell type, at the speed of a disk.

    python -m tools.synthetic_atlas ATLAS.h5ad [--cells 500000] [--expressed 2000] [--genes 30000] [--types 100]

A cell type has a mean for each of its candidate genes, two fifths of which all types share. A cell of depth s has
counts from the negative binomial

    mean  μ = s · m_g,    variance  μ + μ² / θ,    θ = 2

Means and depths are powers of 2^(1/4). So there are only some hundred distributions, each tabulated at 4,096 quantiles,
and a count is one random number looked up. The number of candidates is chosen so that a cell expresses `--expressed`
genes on average; single cells have half or twice as many. Types differ in size by a factor of a hundred, donors have
types in different proportions, and mitochondrial genes are named MT-….

What it is not: biology. Given type and depth, genes are independent. There are no doublets, no ambient RNA, no states
within a type, donors are labels without an effect, and counts end at the quantile 1 − 1/8,192. It shows whether
software bears the size, not whether a model learns.

The matrix is CSR, not compressed: 8 bytes a count (float32 and int32, as anndata writes them) in chunks of 2²⁰, larger
than HDF5's cache, so that a reader of single cells reads no more than its cells. Memory is bounded by a block of cells
and by the tables with a row per cell or gene. The same arguments give the same bytes.
"""

import argparse
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy.stats import nbinom, norm

from tools.record import add_out, circumstances, keep

DISPERSION = 2.0  # θ
STEPS_PER_OCTAVE = 4  # between the levels on which means and depths lie
NUM_LEVELS, LEVEL_OF_ONE = 101, 45  # means from 2^-11.25 to 2^13.75
GENE_LEVEL, GENE_SPREAD = LEVEL_OF_ONE - 3, 6.0  # of the means of candidates: about one count each, two fifths seen
DEPTH_SPREAD, DEPTH_REACH = 2.0, 8  # of the depths of cells, in levels
QUANTILES = 2**12
SHARED = 0.4  # of a type's candidates
TYPE_SPREAD = 3.0  # levels by which a shared gene's mean differs between types
LARGEST_TYPE = 100  # times the smallest one's cells, where there are enough
NUM_DONORS = 20
NUM_MITOCHONDRIAL = 13
VALUES_PER_BLOCK = 2**21  # candidates × cells, zeros included
COUNTS_PER_CHUNK = 2**20


@dataclass(frozen=True)
class Shape:
    """Of an atlas: numbers of cells, genes, cell types, and of the genes that a cell expresses on average."""

    cells: int = 500_000
    expressed: int = 2_000
    genes: int = 30_000
    types: int = 100


@dataclass(frozen=True)
class CellType:
    """Candidate genes int32 (K,), ascending; the level of each one's mean, int64 (K,); donors' shares (NUM_DONORS,)."""

    genes: np.ndarray
    levels: np.ndarray
    donors: np.ndarray


@dataclass(frozen=True)
class Block:
    """Cells of one type: num_genes int64 (cells,), genes int32 and counts uint16 (total,), donors int8 (cells,)."""

    cell_type: int
    num_genes: np.ndarray
    genes: np.ndarray
    counts: np.ndarray
    donors: np.ndarray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("atlas", type=Path, help="the .h5ad to write")
    parser.add_argument("--cells", type=int, default=Shape.cells)
    parser.add_argument("--expressed", type=int, default=Shape.expressed, help="genes that a cell expresses on average")
    parser.add_argument("--genes", type=int, default=Shape.genes)
    parser.add_argument("--types", type=int, default=Shape.types)
    parser.add_argument("--seed", type=int, default=0)
    add_out(parser, "a JSON file for what was written and how fast")
    arguments = parser.parse_args()
    shape = Shape(arguments.cells, arguments.expressed, arguments.genes, arguments.types)
    started = time.perf_counter()
    try:
        num_counts = write_atlas(arguments.atlas, shape, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        **asdict(shape),
        "seed": arguments.seed,
        "counts": num_counts,
        "bytes": arguments.atlas.stat().st_size,
        "seconds": seconds,
        "counts_per_second": num_counts / seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **circumstances("numpy", "h5py"),
    }
    print(
        f"{arguments.atlas}: {shape.cells:,} cells of {shape.types} types, {num_counts:,} counts "
        f"({num_counts / shape.cells:,.0f} a cell), {result['bytes'] / 1e9:.2f} GB in {seconds:.0f} s: "
        f"{num_counts / seconds / 1e6:.1f} million counts/s, {result['bytes'] / seconds / 1e6:,.0f} MB/s; "
        f"peak memory {result['peak_bytes'] / 2**20:,.0f} MiB"
    )
    keep(result, arguments.out)


def write_atlas(path: Path, shape: Shape, seed: int) -> int:
    """The atlas, complete or absent; returns its number of counts. Raises ValueError for an impossible shape."""
    types = cell_types(shape, seed)
    sizes = type_sizes(shape)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with h5py.File(partial, "w", libver=("earliest", "v110")) as file:
            file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            matrix = file.create_group("X")
            matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            matrix.attrs["shape"] = np.array([shape.cells, shape.genes])
            chunks = {"shape": (0,), "maxshape": (None,), "chunks": (COUNTS_PER_CHUNK,)}
            data = matrix.create_dataset("data", dtype=np.float32, **chunks)
            indices = matrix.create_dataset("indices", dtype=np.int32, **chunks)
            num_genes, totals, donors = [], [], []
            for block in blocks(types, sizes, seed):
                _append(data, block.counts)
                _append(indices, block.genes)
                num_genes.append(block.num_genes)
                totals.append(np.add.reduceat(block.counts, np.cumsum(block.num_genes) - block.num_genes, dtype=int))
                donors.append(block.donors)
            indptr = np.concatenate([[0], np.cumsum(np.concatenate(num_genes))]).astype(np.int64)
            matrix.create_dataset("indptr", data=indptr)
            anndata.io.write_elem(file, "obs", _obs(sizes, np.concatenate(donors), np.concatenate(totals)))
            anndata.io.write_elem(file, "var", _var(shape))
            for slot in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
                anndata.io.write_elem(file, slot, {})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return int(indptr[-1])


def type_sizes(shape: Shape) -> np.ndarray:
    """int64 (types,): cells of each type, one at least; log sizes are spread evenly, in no order."""
    weights = LARGEST_TYPE ** np.linspace(0, 1, shape.types)
    ends = np.round(np.cumsum(weights) / weights.sum() * (shape.cells - shape.types)).astype(np.int64)
    sizes = 1 + np.diff(ends, prepend=0)
    return np.random.default_rng(shape.types).permutation(sizes)


def cell_types(shape: Shape, seed: int) -> list[CellType]:
    """Raises ValueError if there are not enough genes for so many to be expressed, or fewer cells than types."""
    if min(shape.cells, shape.expressed, shape.genes, shape.types) < 1 or shape.cells < shape.types:
        raise ValueError(f"{shape}: all are at least 1, and there are as many cells as types or more")
    num_candidates = round(shape.expressed / _share_expressed())
    if num_candidates > shape.genes:
        raise ValueError(f"of {shape.genes:,} genes a cell expresses {int(shape.genes * _share_expressed()):,} at most")
    draws = _draws(seed, "types")
    genes = draws.permutation(shape.genes).astype(np.int32)
    # The named ones among the shared, as every cell has mitochondria.
    genes = np.concatenate([np.arange(min(NUM_MITOCHONDRIAL, shape.genes)), genes[genes >= NUM_MITOCHONDRIAL]])
    num_shared = round(SHARED * num_candidates)
    shared, others = genes[:num_shared], genes[num_shared:]
    of_shared = draws.normal(GENE_LEVEL, np.sqrt(GENE_SPREAD**2 - TYPE_SPREAD**2), num_shared)
    types = []
    for _ in range(shape.types):
        own = draws.choice(others, num_candidates - num_shared, replace=False)
        levels = np.concatenate(
            [of_shared + draws.normal(0, TYPE_SPREAD, num_shared), draws.normal(GENE_LEVEL, GENE_SPREAD, len(own))]
        )
        candidates = np.concatenate([shared, own]).astype(np.int32)
        order = np.argsort(candidates)
        types.append(CellType(candidates[order], _clip_levels(levels)[order], draws.dirichlet(np.ones(NUM_DONORS))))
    return types


def blocks(types: list[CellType], sizes: np.ndarray, seed: int) -> Iterator[Block]:
    """All cells, type after type; the draws of a block depend on the seed, its type and its first cell alone."""
    cells_per_block = max(1, VALUES_PER_BLOCK // len(types[0].genes))
    for index, (cell_type, size) in enumerate(zip(types, sizes.tolist(), strict=True)):
        for first in range(0, size, cells_per_block):
            draws = _draws(seed, "cells", index, first)
            yield _block(index, cell_type, min(cells_per_block, size - first), draws)


def _block(index: int, cell_type: CellType, num_cells: int, draws: np.random.Generator) -> Block:
    num_values = num_cells * len(cell_type.genes)
    depths = _clip_depths(draws.normal(0, DEPTH_SPREAD, num_cells))
    # 64 random bits are four numbers of 16, of which the upper 12 choose the quantile.
    bits = draws.integers(0, 2**64, -(-num_values // 4), dtype=np.uint64).view(np.uint16)[:num_values]
    place = (QUANTILES * depths)[:, None] + QUANTILES * cell_type.levels
    place += (bits >> 4).reshape(place.shape)
    counts = np.take(_quantile_table(), place)
    counts[:, 0] += (counts == 0).all(axis=1)  # no cell is empty
    expressed = counts != 0
    # Ten times as fast as indexing with the mask, in which every value is a branch that nobody can predict.
    kept = np.flatnonzero(expressed)
    return Block(
        cell_type=index,
        num_genes=np.count_nonzero(expressed, axis=1),
        genes=np.take(np.tile(cell_type.genes, num_cells), kept),
        counts=np.take(counts, kept),
        donors=draws.choice(NUM_DONORS, num_cells, p=cell_type.donors).astype(np.int8),
    )


@cache
def _quantile_table() -> np.ndarray:
    """uint16 (levels · QUANTILES,): counts by level of the mean and by quantile."""
    means = 2.0 ** ((np.arange(NUM_LEVELS) - LEVEL_OF_ONE) / STEPS_PER_OCTAVE)
    quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES
    table = nbinom.ppf(quantiles, DISPERSION, (DISPERSION / (DISPERSION + means))[:, None])
    return np.minimum(table, np.iinfo(np.uint16).max).astype(np.uint16).ravel()


@cache
def _share_expressed() -> float:
    """Of the candidates, in a cell, on average over the means of genes and the depths of cells."""
    seen = (_quantile_table().reshape(NUM_LEVELS, QUANTILES) > 0).mean(axis=1)
    spread = norm.ppf((np.arange(10_000) + 0.5) / 10_000)
    genes = np.bincount(_clip_levels(GENE_LEVEL + GENE_SPREAD * spread), minlength=NUM_LEVELS) / len(spread)
    depths = np.bincount(_clip_depths(DEPTH_SPREAD * spread) + DEPTH_REACH) / len(spread)
    shifts = np.arange(-DEPTH_REACH, DEPTH_REACH + 1)
    return float(sum(share * np.dot(genes, np.roll(seen, -shift)) for share, shift in zip(depths, shifts, strict=True)))


def _clip_levels(levels: np.ndarray) -> np.ndarray:
    """int64, so far from both ends of the table that no depth leads out of it."""
    return np.clip(np.rint(levels), DEPTH_REACH, NUM_LEVELS - 1 - DEPTH_REACH).astype(np.int64)


def _clip_depths(depths: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(depths), -DEPTH_REACH, DEPTH_REACH).astype(np.int64)


def _append(dataset: h5py.Dataset, values: np.ndarray) -> None:
    start = len(dataset)
    dataset.resize((start + len(values),))
    dataset[start:] = values


def _obs(sizes: np.ndarray, donors: np.ndarray, totals: np.ndarray) -> pd.DataFrame:
    types = pd.Index([f"type {index:03d}" for index in range(len(sizes))])
    names = pd.Index([f"donor {index:02d}" for index in range(NUM_DONORS)])
    return pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(np.repeat(np.arange(len(sizes)), sizes), types),
            "donor": pd.Categorical.from_codes(donors, names),
            "n_counts": totals.astype(np.float32),
        },
        index=[f"cell{index:08d}" for index in range(len(donors))],
    )


def _var(shape: Shape) -> pd.DataFrame:
    names = [f"MT-{index + 1}" if index < NUM_MITOCHONDRIAL else f"GENE{index}" for index in range(shape.genes)]
    return pd.DataFrame({"gene_name": names}, index=[f"ENSG{index + 1:011d}" for index in range(shape.genes)])


def _draws(seed: int, *keys: str | int) -> np.random.Generator:
    words = [int.from_bytes(key.encode()) if isinstance(key, str) else key for key in keys]
    return np.random.Generator(np.random.SFC64([seed, *words]))


if __name__ == "__main__":
    main()
