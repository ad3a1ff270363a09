"""What is told of a training: each figure beside those that it follows from."""

from dataclasses import replace

import pytest

from cctrain.config import Config, MemoryConfig
from cctrain.cost.devices import USABLE, Measured, load_device
from cctrain.cost.estimate import Estimate, as_json, as_text, check_budget, estimate, size, summary
from cctrain.cost.flops import ADAMW_FLOPS
from cctrain.cost.memory import peak
from cctrain.cost.step_time import collectives
from cctrain.cost.work import Contexts
from cctrain.errors import UsageError
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


def test_a_rank_holds_as_many_times_what_it_needs_as_a_rehearsal_did(found):
    held = replace(found, device=replace(DEVICE, growth=5e8, held_over_needed=1.25))
    assert held.memory == 1e9 + 5e8 + 1.25 * found.needs.memory
    assert as_json(held)["memory_by_component"]["held_beyond_need"] == 0.25 * found.needs.memory
    assert "it will grow by 500 MB" in as_text(held)
    assert "it will grow" not in as_text(found)
    assert "held 1.25 times what is needed" in as_text(held)
    assert "times what is needed" not in as_text(found)


def test_a_training_fits_into_nine_tenths_of_the_memory_and_into_no_less(found):
    assert USABLE == 0.9
    least = found.memory / 0.9
    assert replace(found, device=replace(DEVICE, memory=least + 1)).fits
    assert not replace(found, device=replace(DEVICE, memory=least - 1)).fits


def test_text_and_summary_say_what_it_fits_into_and_what_fragmentation_may_take(found):
    fitting = "into 72 GB of the 80 GB of NVIDIA H100 SXM"
    assert f": fits {fitting}\n          the other 8 GB are left to the allocator's fragmentation" in as_text(found)
    held = f"a rank comes to hold {size(found.memory)}, the process and all, and fits {fitting}"
    assert held in summary(found.needs, DEVICE)
    too_large = replace(DEVICE, process=72e9)
    assert f": DOES NOT FIT {fitting}" in as_text(replace(found, device=too_large))
    assert f"and DOES NOT FIT {fitting}" in summary(found.needs, too_large)


def test_the_summary_tells_the_memory_that_decides_whether_it_fits(found):
    device = replace(DEVICE, growth=2e9, held_over_needed=3.0)
    assert f"hold {size(3e9 + 3 * found.needs.memory)}, the process and all, and fits" in summary(found.needs, device)


@pytest.mark.parametrize(("per_node", "on_a_node"), [(8, 4), (2, 2)])
@pytest.mark.parametrize(
    ("offload", "where"), [("host", "in the memory of a node's host"), ("disk", "in files of a node")]
)
def test_a_node_holds_what_all_its_ranks_offload(found, per_node, on_a_node, offload, where):
    config = replace(found.needs.config, memory=MemoryConfig(checkpointing=True, offload=offload))
    away = estimate(config, CONTEXTS, replace(DEVICE, per_node=per_node), ranks=4)
    held = on_a_node * away.needs.activations.offloaded
    assert as_json(away)["offloaded_bytes_of_a_node"] == held > 0
    assert f"a rank: {size(held)} {where}\n" in as_text(away)


def test_text_names_the_ranks_and_how_many_share_a_context(found):
    config = found.needs.config
    assert "on        2 × NVIDIA H100 SXM, 2 for each context\n" in as_text(estimate(config, CONTEXTS, DEVICE, ranks=2))
    config.parallel.context = 1
    assert "on        NVIDIA H100 SXM\n" in as_text(estimate(config, CONTEXTS, DEVICE, ranks=1))


def test_text_says_what_share_each_component_has_the_largest_first(found):
    flops = sorted(found.needs.flops.by_component().items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {part / found.needs.flops.total:.0%}" for name, part in flops if part)
    assert f"a step and rank: {shares}; attention" in as_text(found)
    largest, seconds = max(as_json(found)["step_seconds_by_component"].items(), key=lambda item: item[1])
    assert f" s a step: {largest} {seconds / found.seconds.total:.0%}, " in as_text(found)


def test_without_offloading_nothing_is_said_of_it(found):
    assert as_json(found)["offloaded_bytes_of_a_node"] == 0
    assert "offloaded" not in as_text(found)


def test_a_checkpoint_has_weights_and_both_moments_in_fp32(found):
    assert found.needs.checkpoint_bytes == 3 * 4 * found.needs.parameters


def test_hours_are_those_of_all_steps_and_device_hours_of_all_ranks(found):
    told = as_json(found)
    assert told["hours"] == pytest.approx(2 * found.seconds.total)  # of 3,600 seconds
    assert told["device_hours"] == pytest.approx(4 * told["hours"])
    tokens = told["tokens"]
    assert tokens == 7200 * 8 * 1000
    assert told["device_hours_per_billion_tokens"] == pytest.approx(told["device_hours"] / tokens * 1e9)


def test_a_budget_of_tokens_takes_whole_steps_and_their_hours(found):
    told = as_json(found, token_budget=8_001)["token_budget"]
    assert told == {
        "tokens": 8_001,
        "steps": 2,
        "hours": 2 * found.seconds.total / 3600,
        "device_hours": 4 * 2 * found.seconds.total / 3600,
    }
    assert "\nbudget    2 steps, 8,001 tokens: " in as_text(found, token_budget=8_001)


def test_without_a_budget_nothing_is_said_of_one(found):
    assert as_json(found)["token_budget"] is None
    assert "budget" not in as_text(found)


@pytest.mark.parametrize("tokens", [0, -1, float("inf"), float("nan")])
def test_a_budget_that_is_no_number_of_tokens_is_refused(tokens):
    with pytest.raises(UsageError, match="give a number of tokens above 0"):
        check_budget(tokens)


MODEL_IN_WORDS = "criss_cross, 2 layers, width 32, 2 heads, 8 latents"


@pytest.mark.parametrize(
    ("file", "when"),
    [
        (None, "measured on this machine just now"),
        (
            "here.yaml",
            f"measured on NVIDIA H100 SXM on 2026-11-22 with 4 rank(s) and {MODEL_IN_WORDS} in fp32, "
            "and kept in here.yaml",
        ),
    ],
)
def test_the_last_line_says_when_and_where_it_was_measured(found, file, when):
    measured = Measured("2026-11-22", MODEL_IN_WORDS, "fp32", 4, file)
    device = replace(DEVICE, rehearsed_over_parts=1.234, measured=measured)
    last = as_text(replace(found, device=device)).splitlines()[-1]
    assert last == f"{when}: the steps that were rehearsed took 1.23 times as long as their parts, and so will these"
    assert "(by rates measured on such a machine)" in summary(found.needs, device)


@pytest.mark.parametrize("other", [{"model": "dense, 2 layers"}, {"ranks": 2}])
def test_what_was_measured_with_another_model_or_other_ranks_is_no_measurement_here(found, other):
    measured = replace(Measured("2026-11-22", MODEL_IN_WORDS, "fp32", 4, "here.yaml"), **other)
    last = as_text(replace(found, device=replace(DEVICE, measured=measured))).splitlines()[-1]
    assert last.endswith("kept in here.yaml; of another model or number of ranks, as here, this is no measurement")


def test_a_data_sheet_is_a_model(found):
    assert as_text(found).endswith("from data sheets and assumed shares: not a measurement")
    assert summary(found.needs, DEVICE).endswith("(a model, not a measurement)")


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
