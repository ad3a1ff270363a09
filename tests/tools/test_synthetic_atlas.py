"""The atlas of `tools/synthetic_atlas.py`: what it promises of its cells, and that cctrain and anndata can read it."""

import hashlib
import itertools
import tracemalloc
from pathlib import Path

import anndata
import numpy as np
import pytest

from cctrain.data.sources.source import open_source
from tools.synthetic_atlas import NUM_MITOCHONDRIAL, Shape, cell_types, type_sizes, write_atlas

SHAPE = Shape(cells=3_000, expressed=120, genes=1_500, types=12)


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> anndata.AnnData:
    path = tmp_path_factory.mktemp("atlas") / "atlas.h5ad"
    num_counts = write_atlas(path, SHAPE, seed=0)
    data = anndata.read_h5ad(path)
    assert data.X.nnz == num_counts
    return data


def test_the_atlas_is_whole_counts_in_csr_with_ascending_genes(atlas: anndata.AnnData) -> None:
    assert atlas.shape == (SHAPE.cells, SHAPE.genes)
    assert atlas.X.format == "csr"
    assert atlas.X.has_canonical_format
    assert atlas.X.data.min() >= 1
    np.testing.assert_array_equal(atlas.X.data, np.rint(atlas.X.data))
    np.testing.assert_array_equal(atlas.obs["n_counts"], np.asarray(atlas.X.sum(axis=1)).ravel())


def test_cells_express_as_many_genes_as_asked_for_on_average_and_differ_in_depth(atlas: anndata.AnnData) -> None:
    expressed = np.diff(atlas.X.indptr)
    assert expressed.mean() == pytest.approx(SHAPE.expressed, rel=0.05)
    assert np.percentile(expressed, 95) > 1.5 * np.percentile(expressed, 5)
    assert expressed.min() > 0


def test_cells_are_sorted_by_type_and_types_differ_in_size(atlas: anndata.AnnData) -> None:
    codes = atlas.obs["cell_type"].cat.codes.to_numpy()
    assert (np.diff(codes) >= 0).all()
    sizes = np.bincount(codes)
    np.testing.assert_array_equal(sizes, type_sizes(SHAPE))
    assert len(sizes) == SHAPE.types
    assert sizes.max() > 20 * sizes.min() > 0


def test_no_two_cells_are_identical(atlas: anndata.AnnData) -> None:
    cells = {
        (atlas.X.indices[first:last].tobytes(), atlas.X.data[first:last].tobytes())
        for first, last in itertools.pairwise(atlas.X.indptr)
    }
    assert len(cells) == SHAPE.cells


def test_cells_of_a_type_resemble_each_other_more_than_cells_of_another(atlas: anndata.AnnData) -> None:
    codes = atlas.obs["cell_type"].cat.codes.to_numpy()
    largest, other = np.argsort(np.bincount(codes))[[-1, -2]]
    seen = atlas.X.toarray() > 0
    first, second = np.array_split(seen[codes == largest], 2)
    profiles = [part.mean(axis=0) for part in (first, second, seen[codes == other])]
    same, different = (np.corrcoef(profiles[0], profile)[0, 1] for profile in profiles[1:])
    assert same > 0.9 > different + 0.1


def test_counts_are_overdispersed(atlas: anndata.AnnData) -> None:
    counts = atlas.X[(atlas.obs["cell_type"] == "type 000").to_numpy()].toarray()
    mean, variance = counts.mean(axis=0), counts.var(axis=0)
    often = mean > 2
    assert often.sum() > 10
    assert np.median(variance[often] / mean[often]) > 1.5


def test_mitochondrial_genes_are_named_and_expressed(atlas: anndata.AnnData) -> None:
    mitochondrial = atlas.var["gene_name"].str.startswith("MT-").to_numpy()
    assert mitochondrial.sum() == NUM_MITOCHONDRIAL
    assert atlas.X[:, mitochondrial].sum() > 0


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    small = Shape(cells=300, expressed=60, genes=400, types=5)
    digests = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        write_atlas(tmp_path / name, small, seed)
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_memory_does_not_grow_with_the_number_of_cells(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for cells in (3_000, 6_000):
        shape = Shape(cells=cells, expressed=1_000, genes=3_000, types=1)
        tracemalloc.start()
        write_atlas(tmp_path / "atlas.h5ad", shape, seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        sizes.append((tmp_path / "atlas.h5ad").stat().st_size)
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 0.1 * (sizes[1] - sizes[0])


def test_prepare_finds_the_counts(tmp_path: Path) -> None:
    path = tmp_path / "atlas.h5ad"
    write_atlas(path, Shape(cells=200, expressed=50, genes=300, types=3), seed=0)
    source = open_source(path)
    assert (source.counts_from, source.num_cells, len(source.gene_ids)) == ("X", 200, 300)


def test_a_shape_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of 100 genes a cell expresses \d+ at most"):
        cell_types(Shape(cells=10, expressed=90, genes=100, types=2), seed=0)
    with pytest.raises(ValueError, match="as many cells as types"):
        cell_types(Shape(cells=10, expressed=9, genes=100, types=11), seed=0)
