"""What the ranks tell each other of a step, put together."""

import numpy as np
import pytest
import torch

from cctrain.config import Config, DataConfig
from cctrain.errors import TrainingError
from cctrain.training.loop import data_workers, packing_efficiency, whole_contexts


def test_slices_add_up_to_contexts_by_position():
    slices = torch.tensor([[5, 70, 3, 1], [4, 60, 2, 0], [5, 70, 4, 2], [4, 60, 2, 1]])
    assert whole_contexts(slices, 2).tolist() == [[4, 60, 4, 1], [5, 70, 7, 3]]


def test_a_context_of_which_a_slice_was_not_run_is_an_error_that_names_it():
    slices = torch.tensor([[5, 70, 3, 1], [4, 60, 2, 0], [5, 70, 4, 2]])
    with pytest.raises(TrainingError, match=r"\[\[4, 60\]\]"):
        whole_contexts(slices, 2)


def test_the_packing_is_efficient_where_all_ranks_are_as_full_in_every_micro_batch():
    tokens, micro_batch, rank = np.array([[3, 2, 5, 7, 7], [0, 0, 0, 1, 1], [0, 0, 1, 0, 1]])
    assert packing_efficiency(tokens, micro_batch, rank, num_ranks=2) == 1


def test_the_packing_is_as_efficient_as_the_fullest_rank_of_each_micro_batch_lets_the_others_be():
    tokens, micro_batch, rank = np.array([[10, 5, 8], [0, 0, 1], [0, 1, 0]])
    assert packing_efficiency(tokens, micro_batch, rank, num_ranks=2) == pytest.approx((10 + 5 + 8) / (2 * (10 + 8)))


def test_a_step_without_tokens_wastes_nothing():
    nothing = np.zeros(0, dtype=np.int64)
    assert packing_efficiency(nothing, nothing, nothing, num_ranks=4) == 1


def test_batches_are_made_in_the_background_where_training_leaves_the_cores_to_it_or_as_the_configuration_says():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert (data_workers(Config(), gpu), data_workers(Config(), cpu)) == (2, 0)
    for workers in (0, 3):
        config = Config(data=DataConfig(workers=workers))
        assert data_workers(config, gpu) == data_workers(config, cpu) == workers
