"""What one rank does in a step, laid out from the configuration."""

from functools import partial

import pytest

from cctrain.cost.work import Load, fullest
from tests.cost.conftest import work


def test_micro_batches_hold_as_many_contexts_as_fit_into_their_tokens():
    assert work().micro_batches == 1
    assert work(micro_batch_tokens=2999).micro_batches == 2
    assert work(micro_batch_tokens=10).micro_batches == 4  # a context is never cut


def test_a_rank_holds_of_a_micro_batch_its_contexts_with_their_tokens_and_targets():
    assert work().load == Load(tokens=4000, contexts=4, targets=200)
    assert work(micro_batch_tokens=2999).load == Load(tokens=2000, contexts=2, targets=100)


def test_ranks_that_share_a_context_hold_a_part_of_its_tokens_and_of_its_targets_and_more_contexts():
    assert work(context_ranks=2).load == Load(tokens=4000, contexts=8, targets=200)


def test_where_ranks_have_unequal_numbers_of_contexts_it_is_the_rank_with_most():
    assert work(ranks=3).load.contexts == 3


def test_the_fullest_micro_batch_has_as_many_of_the_longest_steps_contexts_as_it_takes():
    mean, unevenness = Load(tokens=2000, contexts=2, targets=100), 1.04  # a standard deviation of 200 tokens
    largest = partial(fullest, mean, longest=1400, unevenness=unevenness)
    assert largest(contexts=16, micro_batch_tokens=20_000).tokens == pytest.approx(16_000 + 3 * 4 * 200)
    assert largest(contexts=2, micro_batch_tokens=9000) == Load(2800, 2, 100)
    assert largest(contexts=4, micro_batch_tokens=5000) == Load(5000, 4, 200)
    assert largest(contexts=4, micro_batch_tokens=3000) == Load(3000, 3, 150)
    assert fullest(mean, 2, longest=1000, unevenness=1.0, micro_batch_tokens=1500) == mean


def test_the_longest_context_comes_some_day_however_rare_it_is():
    mean = Load(tokens=2000, contexts=2, targets=100)
    assert fullest(mean, 2, longest=3000, unevenness=1.01, micro_batch_tokens=9000) == Load(4000, 2, 100)


def test_contexts_that_are_all_alike_up_to_rounding_have_no_spread():
    mean = Load(tokens=2000, contexts=2, targets=100)
    assert fullest(mean, 2, longest=1000, unevenness=1 - 1e-12, micro_batch_tokens=9000) == mean


def test_memory_follows_the_fullest_micro_batch_where_the_longest_context_is_known():
    alike, unlike = work(micro_batch_tokens=8000), work(micro_batch_tokens=8000, longest=1300)
    assert (alike.most, unlike.load) == (alike.load, alike.load)
    assert unlike.most == Load(tokens=1300 + 3 * 1000, contexts=4, targets=200)


def test_of_the_longest_context_a_rank_that_shares_it_holds_a_part():
    shared = work(micro_batch_tokens=8000, longest=1300, context_ranks=2)
    assert shared.most == Load(tokens=650 + 7 * 500, contexts=8, targets=200)


@pytest.mark.parametrize(("precision", "element_bytes"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_elements_have_the_bytes_of_the_precision(precision, element_bytes):
    assert work(precision=precision).element_bytes == element_bytes


def test_tiles_are_those_of_the_device_unless_the_configuration_has_its_own():
    assert work().tile_tokens == 256
    assert work(tile_tokens=64).tile_tokens == 64


def test_the_stage_is_that_of_the_configuration():
    assert work(stage=3).zero_stage == 3
