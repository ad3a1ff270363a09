import pytest
import torch

from cctrain.apply.scaling.work import (
    Setting,
    attention_of_a_layer,
    num_targets,
    random_context,
    slice_of,
    training_step,
)
from cctrain.config import MemoryConfig, ModelConfig
from cctrain.parallel.mesh import Mesh

SETTING = Setting("cpu", "fp32", 50, MemoryConfig(tile_tokens=16))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_slices_of_all_ranks_are_the_whole_context(num_ranks):
    whole, counts = random_context(41, 50, torch.Generator().manual_seed(1), "cpu")
    ranks = [Mesh(rank, num_ranks, torch.device("cpu"), num_ranks) for rank in range(num_ranks)]
    parts = [slice_of(whole, counts, mesh) for mesh in ranks]
    assert torch.cat([part.genes for part, _ in parts]).equal(whole.genes)
    assert torch.cat([part.counts for part, _ in parts]).equal(whole.counts)
    assert torch.cat([target_counts for _, target_counts in parts]).equal(counts)
    genes_of_targets = torch.cat([part.genes[part.targets] for part, _ in parts])
    assert genes_of_targets.equal(whole.genes[whole.targets])


def test_one_token_in_twenty_is_a_target_and_its_count_is_hidden():
    inputs, counts = random_context(400, 50, torch.Generator().manual_seed(1), "cpu")
    assert len(inputs.targets) == len(counts) == num_targets(400) == 20
    assert not inputs.counts[inputs.targets].any()


@pytest.mark.parametrize("attention", ["criss_cross", "dense"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_and_the_attention_of_its_layer_run_in_tiles(attention, checkpointing):
    setting = Setting("cpu", "fp32", 50, MemoryConfig(checkpointing, tile_tokens=16))
    model = ModelConfig(attention=attention, width=16, depth=2, heads=2, latents=4, latent_width=24, cell_encoding=0)
    training_step(model, 40, setting)()
    attention_of_a_layer(model, 40, setting)()
