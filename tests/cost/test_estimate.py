"""What is told of a training: each figure beside those that it follows from."""

from dataclasses import replace

import pytest

from cctrain.config import Config
from cctrain.cost.devices import load_device
from cctrain.cost.estimate import Estimate, as_json, as_text, estimate, size, summary
from cctrain.cost.flops import ADAMW_FLOPS
from cctrain.cost.memory import peak
from cctrain.cost.step_time import collectives
from cctrain.cost.work import Contexts
from tests.cost.conftest import WORK_MODEL

DEVICE = replace(load_device("h100", "fp32"), process=1e9)
CONTEXTS = Contexts(tokens=1000, targets=50, genes=500)


@pytest.fixture
def found() -> Estimate:
    config = Config(model=WORK_MODEL)
    config.data.global_batch, config.data.micro_batch_tokens = 8, 1000
    config.parallel.context, config.parallel.zero_stage = 2, 1
    config.training.steps = 7200
    return estimate(config, CONTEXTS, DEVICE, ranks=4)


def test_a_rank_needs_its_process_and_the_peak_of_all_its_micro_batches(found):
    needs = found.needs
    assert needs.work.micro_batches == 2
    assert found.memory == 1e9 + peak(needs.state, needs.activations, 2) > 1e9 + peak(needs.state, needs.activations, 1)


def test_a_training_fits_into_the_memory_that_it_needs_and_into_no_less(found):
    assert replace(found, device=replace(DEVICE, memory=found.memory)).fits
    assert not replace(found, device=replace(DEVICE, memory=found.memory - 1)).fits


def test_a_checkpoint_has_weights_and_both_moments_in_fp32(found):
    assert found.needs.checkpoint_bytes == 3 * 4 * found.needs.parameters


def test_hours_are_those_of_all_steps_and_device_hours_of_all_ranks(found):
    told = as_json(found)
    assert told["hours"] == pytest.approx(2 * found.seconds.total)
    assert told["device_hours"] == pytest.approx(4 * told["hours"])
    tokens = 7200 * 8 * 1000
    assert told["device_hours_per_billion_tokens"] == pytest.approx(told["device_hours"] / tokens * 1e9)


def test_tokens_per_second_are_those_of_all_contexts_of_a_step(found):
    told = as_json(found)
    assert told["tokens_per_second"] * told["step_seconds"] == pytest.approx(8 * 1000)


def test_utilisation_is_the_share_of_the_peak_and_attention_its_share_of_all_flops(found):
    told, flops = as_json(found), found.needs.flops
    assert told["utilisation"] * told["step_seconds"] * DEVICE.peak == pytest.approx(flops.total)
    assert told["attention_share"] == pytest.approx((flops.read + flops.write) / flops.total)


def test_the_optimizer_is_a_component_beside_the_products_and_no_part_of_their_sum(found):
    told = as_json(found)
    of_components = told["flops_by_component"]
    # Under ZeRO 1 each of the four ranks updates a quarter.
    assert of_components.pop("optimizer") == ADAMW_FLOPS * found.needs.parameters / 4
    assert told["product_flops_of_a_rank"] == sum(of_components.values()) == found.needs.flops.total


def test_without_zero_the_optimizer_of_every_rank_updates_all_parameters(found):
    work = replace(found.needs.work, zero_stage=0)
    assert replace(found.needs, work=work).optimizer_flops == ADAMW_FLOPS * found.needs.parameters


def test_the_text_says_that_the_optimizers_flops_are_in_no_share(found):
    optimizer = f"and {found.needs.optimizer_flops:.3g} of the optimizer, elementwise"
    assert f"{optimizer}: attention's share and that of the peak are without them\n" in as_text(found)


def test_what_is_sent_is_told_by_who_sends_it(found):
    exchanged, of_zero = collectives(WORK_MODEL, 500, found.needs.work)
    sent = {"context ranks": sum(one.sent for one in exchanged), "ZeRO": sum(one.sent for one in of_zero)}
    assert as_json(found)["sent_bytes_of_a_rank"] == sent
    assert f"{size(sum(sent.values()))} sent" in summary(found.needs)


@pytest.mark.parametrize(("number", "text"), [(2.5e12, "2.5 TB"), (80e9, "80 GB"), (1e6, "1 MB"), (999e3, "999 kB")])
def test_a_size_is_told_in_the_largest_unit_of_which_it_has_one(number, text):
    assert size(number) == text
