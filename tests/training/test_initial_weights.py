"""A new run that starts from the weights of another one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cctrain.config import Config, load_config, to_yaml
from cctrain.errors import CheckpointError, UsageError
from cctrain.model.saved import save_weights
from cctrain.model.transformer import Transformer, gene_tables, initialize
from cctrain.parallel.mesh import join_mesh
from cctrain.run_directory import CONFIG, WEIGHTS, write_vocabulary
from cctrain.training.checkpoint_files import (
    FORMAT,
    file_digest,
    partial_folder,
    publish,
    write_manifest,
)
from cctrain.training.engine import sharded_if_wanted, whole
from cctrain.training.initial_weights import start_from

SHAPE = ("model.width=8", "model.depth=1", "model.heads=2", "model.latents=3", "model.latent_width=6")
HERE = ["new", "b", "newer", "a", "c"]  # genes of the run that starts; the source has a, b, c, d


def config(*overrides: str, folder: Path) -> Config:
    (folder / "mine.yaml").write_text("data: {store: my-store}\n")
    return load_config(folder / "mine.yaml", [*SHAPE, *overrides])


def model(config: Config, num_genes: int, seed: int) -> Transformer:
    made = Transformer(config.model, torch.full((num_genes,), 1 / num_genes), torch.ones(num_genes))
    initialize(made, torch.zeros(num_genes, 2), seed)
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 100 * index))
    return made


@pytest.fixture
def fresh(tmp_path: Path) -> Transformer:
    return model(config(folder=tmp_path), len(HERE), seed=1)


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., tuple[Path, Transformer]]:
    """A run as a training leaves it, finished or with a checkpoint alone, and the model that it has trained."""

    def make(*overrides: str, genes: str = "abcd", finished: bool = True) -> tuple[Path, Transformer]:
        folder = tmp_path / "source"
        folder.mkdir()
        made = config(*overrides, folder=tmp_path)
        trained = model(made, len(genes), seed=2)
        (folder / CONFIG).write_text(to_yaml(made))
        write_vocabulary(folder, list(genes), list(genes))
        if finished:
            save_weights(trained.state_dict(), folder / WEIGHTS)
        else:
            write_checkpoint(folder, trained)
        return folder, trained

    return make


def write_checkpoint(run_dir: Path, trained: Transformer) -> None:
    partial = partial_folder(run_dir, 5)
    partial.mkdir(parents=True)
    parameters = dict(trained.named_parameters())
    tensors = {f"master:{name}:0": tensor.detach().flatten().clone() for name, tensor in parameters.items()}
    tensors |= {f"buffer:{name}": buffer.clone() for name, buffer in trained.named_buffers()}
    file = partial / "rank-00000.safetensors"
    save_file(tensors, file)
    manifest = {
        "format": FORMAT,
        "step": 5,
        "parameters": [{"name": name, "shape": list(tensor.shape)} for name, tensor in parameters.items()],
        "files": [{"name": file.name, "bytes": file.stat().st_size, "sha256": file_digest(file)}],
        "fragments": [[index, 0, 0, tensor.numel()] for index, tensor in enumerate(parameters.values())],
    }
    write_manifest(partial, manifest)
    publish(run_dir, 5)


@pytest.mark.parametrize("finished", [True, False])
def test_genes_are_matched_by_id_and_the_others_keep_their_initial_vectors(fresh, make_source, finished):
    source, trained = make_source(finished=finished)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    facts = start_from(fresh, HERE, source)
    assert facts == {"init_from": str(source), "init_genes_matched": 3}
    place = {gene: row for row, gene in enumerate("abcd")}
    tables = gene_tables(fresh)
    assert tables.keys() == gene_tables(trained).keys()
    for name, parameter in fresh.named_parameters():
        theirs = trained.state_dict()[name]
        if name not in tables:
            assert torch.equal(parameter, theirs), name
            assert not torch.equal(parameter, before[name]), name
            continue
        for row, gene in enumerate(HERE):
            expected = theirs[place[gene]] if gene in place else before[name][row]
            assert torch.equal(parameter[row], expected), (name, gene)


def test_what_was_estimated_from_the_cells_stays_that_of_the_new_store(fresh, make_source):
    before = {name: buffer.clone() for name, buffer in fresh.named_buffers()}
    start_from(fresh, HERE, make_source()[0])
    assert before.keys() == {"log_share", "log_theta"}
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_model_of_another_shape_is_refused_with_the_parameters_listed(fresh, make_source):
    source, _ = make_source("model.latent_width=4", "model.latents=2")
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(CheckpointError) as refused:
        start_from(fresh, HERE, source)
    assert f"the model of {source} has another shape" in str(refused.value)
    assert "  latents: [2, 4] there, [3, 6] here" in str(refused.value)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, before[name]), "nothing is copied when it is refused"


def test_a_model_with_more_layers_is_refused(fresh, make_source):
    source, _ = make_source("model.depth=2")
    with pytest.raises(CheckpointError, match=r"  layers\.1\.\S+: absent here"):
        start_from(fresh, HERE, source)


def test_a_model_of_the_other_attention_is_refused(fresh, make_source):
    source, _ = make_source("model.attention=dense")
    with pytest.raises(CheckpointError, match=r"  latents: absent there, \[3, 6\] here"):
        start_from(fresh, HERE, source)


def test_a_run_without_a_common_gene_is_refused_with_an_id_of_each(fresh, make_source):
    source, _ = make_source(genes="xyz")
    with pytest.raises(CheckpointError, match=r"none of the 5 genes is in .*source.*'x'.*'new' here"):
        start_from(fresh, HERE, source)


def test_a_source_that_is_no_run_or_has_no_weights_is_refused(fresh, make_source, tmp_path):
    with pytest.raises(UsageError, match="nowhere is not a run directory"):
        start_from(fresh, HERE, tmp_path / "nowhere")
    source, _ = make_source()
    (source / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no weights yet"):
        start_from(fresh, HERE, source)


def test_weights_reach_a_model_that_is_sharded_as_it_is_built(make_source, tmp_path):
    source, _ = make_source()
    made = config("parallel.zero_stage=3", folder=tmp_path)
    share, theta, loadings = torch.full((len(HERE),), 1 / len(HERE)), torch.ones(len(HERE)), torch.zeros(len(HERE), 2)
    plain = Transformer(made.model, share, theta)
    initialize(plain, loadings, 1)
    start_from(plain, HERE, source)
    with join_mesh():
        with sharded_if_wanted(made):
            sharded = Transformer(made.model, share, theta)
        initialize(sharded, loadings, 1, whole)
        start_from(sharded, HERE, source)
        for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
            assert ours.numel() == 0, "it is not sharded"
            with whole([ours]):
                assert torch.equal(ours, theirs), name
