import json
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from cctrain.apply.embed import embed
from cctrain.config import Config, load_config, to_yaml
from cctrain.data.store.store import TokenStore
from cctrain.errors import DataError
from cctrain.model.saved import save_weights
from cctrain.model.transformer import Transformer
from cctrain.run_directory import write_vocabulary
from cctrain.training.data import resolve
from cctrain.training.train import build_model
from tests.data.conftest import gene_ids, prepared, write_10x, write_10x_h5, write_h5ad, write_zarr

NUM_CELLS, NUM_GENES, WIDTH = 12, 40, 8


def counts(num_cells: int = NUM_CELLS, num_genes: int = NUM_GENES) -> np.ndarray:
    draws = np.random.default_rng(1)
    return draws.poisson(np.geomspace(0.2, 30, num_cells)[:, None], size=(num_cells, num_genes)) + np.eye(
        num_cells, num_genes, dtype=np.int64
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("embed")
    return prepared(folder / "store", write_h5ad(folder / "cells.h5ad", counts()))


@pytest.fixture(scope="module", params=["criss_cross", "dense", "criss_cross, cell_encoding: 70"])
def run(request: pytest.FixtureRequest, store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves: random weights serve as well as trained ones."""
    folder = tmp_path_factory.mktemp(f"run-{request.param}")
    (folder / "in.yaml").write_text(
        f"model: {{attention: {request.param}, width: {WIDTH}, depth: 2, heads: 2, latents: 3}}"
    )
    config: Config = resolve(load_config(folder / "in.yaml", [f"data.store={store.path}"]), store)
    model: Transformer = build_model(config, store.genes)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) * (not name.startswith("log_"))
        for name, tensor in model.state_dict().items()
    }
    (folder / "config.yaml").write_text(to_yaml(config))
    write_vocabulary(folder, store.genes.ids.tolist(), store.genes.names.tolist())
    save_weights(weights, folder / "weights.safetensors")
    return folder


def vectors(run: Path, source: Path, out: Path) -> np.ndarray:
    embed(run, source, out)
    return anndata.read_h5ad(out).obsm["X_cctrain"]


@pytest.fixture
def plain(run: Path, tmp_path: Path) -> np.ndarray:
    """The vectors of the cells in the order and with the genes that the run was trained on."""
    return vectors(run, write_h5ad(tmp_path / "plain.h5ad", counts()), tmp_path / "plain-out.h5ad")


def test_every_cell_has_its_own_finite_vector(plain):
    assert plain.shape == (NUM_CELLS, WIDTH)
    assert plain.dtype == np.float32
    assert np.isfinite(plain).all()
    assert len(np.unique(plain.round(4), axis=0)) == NUM_CELLS


def test_the_order_of_genes_and_genes_the_model_does_not_know_change_nothing(run, plain, tmp_path):
    draws = np.random.default_rng(2)
    more = np.concatenate([counts(), draws.poisson(3, size=(NUM_CELLS, 25))], axis=1)
    columns = draws.permutation(more.shape[1])
    genes = np.array(gene_ids(NUM_GENES) + gene_ids(25, first=5000))[columns].tolist()
    source = write_h5ad(tmp_path / "shuffled.h5ad", more[:, columns], genes=genes)
    np.testing.assert_allclose(vectors(run, source, tmp_path / "out.h5ad"), plain, atol=1e-4)


def test_vectors_follow_their_cells(run, plain, tmp_path):
    order = np.random.default_rng(3).permutation(NUM_CELLS)
    source = write_h5ad(tmp_path / "reordered.h5ad", counts()[order], cells=[f"cell{i}" for i in order])
    np.testing.assert_allclose(vectors(run, source, tmp_path / "out.h5ad"), plain[order], atol=1e-4)


def test_a_10x_folder_and_versions_of_gene_ids_give_the_same_vectors(run, plain, tmp_path):
    source = write_10x(tmp_path / "10x", counts(), genes=[f"{gene}.7" for gene in gene_ids(NUM_GENES)])
    np.testing.assert_allclose(vectors(run, source, tmp_path / "out.h5ad"), plain, atol=1e-4)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert written.obs_names.tolist() == [f"cell{i}" for i in range(NUM_CELLS)]
    assert np.array_equal(written.X.toarray(), counts())
    assert written.var_names.tolist() == gene_ids(NUM_GENES)


@pytest.mark.parametrize(("write", "name"), [(write_zarr, "cells.zarr"), (write_10x_h5, "cells.h5")])
def test_a_zarr_directory_and_a_10x_file_give_the_same_vectors_beside_their_counts(run, plain, tmp_path, write, name):
    source = write(tmp_path / name, counts())
    np.testing.assert_allclose(vectors(run, source, tmp_path / "out.h5ad"), plain, atol=1e-4)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert written.obs_names.tolist() == [f"cell{i}" for i in range(NUM_CELLS)]
    assert np.array_equal(written.X.toarray(), counts())


def test_genes_that_were_not_measured_are_accepted_and_counted(run, plain, tmp_path):
    source = write_h5ad(tmp_path / "few.h5ad", counts()[:, :15], genes=gene_ids(15))
    assert embed(run, source, tmp_path / "out.h5ad") == {"cells": NUM_CELLS, "dimensions": WIDTH, "genes_matched": 15}
    found = anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_cctrain"]
    assert np.isfinite(found).all()
    assert not np.allclose(found, plain, atol=1e-2)


def test_a_cell_without_any_known_gene_gets_a_vector_too(run, tmp_path):
    silent = counts()
    silent[4] = 0
    found = vectors(run, write_h5ad(tmp_path / "silent.h5ad", silent), tmp_path / "out.h5ad")
    assert np.isfinite(found).all()


def test_all_else_in_the_file_stays_as_it_was(run, tmp_path):
    source = write_h5ad(
        tmp_path / "rich.h5ad", counts(), obs={"age": np.arange(NUM_CELLS)}, layers={"more": counts() * 2}, raw=counts()
    )
    embed(run, source, tmp_path / "out.h5ad", counts="X")
    given, written = anndata.read_h5ad(source), anndata.read_h5ad(tmp_path / "out.h5ad")
    assert written.obs.equals(given.obs)
    assert written.var.equals(given.var)
    assert np.array_equal(written.layers["more"], given.layers["more"])
    assert (written.raw.X != given.raw.X).nnz == 0
    assert list(written.obsm) == ["X_cctrain"]


def test_embedding_again_replaces_older_vectors_of_the_input(run, plain, tmp_path):
    first = tmp_path / "plain-out.h5ad"
    np.testing.assert_allclose(vectors(run, first, tmp_path / "second.h5ad"), plain, atol=1e-6)


def test_an_output_that_exists_is_never_overwritten(run, plain, tmp_path):
    with pytest.raises(DataError, match="exists already"):
        embed(run, tmp_path / "plain.h5ad", tmp_path / "plain-out.h5ad")


def test_a_failure_leaves_no_file_behind(run, tmp_path):
    bad = counts().astype(np.float64)
    bad[3, 3] = 0.5
    source = write_h5ad(tmp_path / "bad.h5ad", bad)
    with pytest.raises(DataError, match="cell3"):
        embed(run, source, tmp_path / "out.h5ad", counts="X")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.h5ad"]
    assert json.loads((run / "vocabulary.json").read_text())["ids"]
