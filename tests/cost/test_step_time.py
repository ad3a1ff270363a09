"""How long a step takes: what it has to do, over the rates of a device."""

from dataclasses import replace
from pathlib import Path

import pytest

from cctrain.config import Config, MemoryConfig, ModelConfig
from cctrain.cost.devices import FOLDER, Device, known_devices, load_device
from cctrain.cost.flops import step_flops
from cctrain.cost.step_time import collectives, rank_flops, seconds_of, step_seconds
from cctrain.cost.traffic import Collective
from cctrain.cost.work import Contexts, work_of
from cctrain.errors import UsageError

MODEL, GENES = ModelConfig(width=32, depth=2, heads=2, latents=8), 500
NEVER_WAITS = float("inf")
# Everything but products takes no time.
IDLE = Device("idle", 1e9, 1.0, 1.0, NEVER_WAITS, NEVER_WAITS, 0.0, 0.0, 0.0, 8, NEVER_WAITS, NEVER_WAITS, 0.0)


def work(tokens=1000, targets=50, global_batch=8, micro_batch_tokens=4000, ranks=2, context_ranks=1, stage=1, **memory):
    config = Config(model=MODEL, memory=MemoryConfig(**memory))
    config.data.global_batch, config.data.micro_batch_tokens = global_batch, micro_batch_tokens
    config.parallel.context, config.parallel.zero_stage = context_ranks, stage
    return work_of(config, Contexts(tokens, targets, GENES), ranks, tile_tokens=256)


def test_micro_batches_hold_as_many_contexts_as_fit_into_their_tokens():
    assert work().micro_batches == 1
    assert work(micro_batch_tokens=2999).micro_batches == 2
    assert work(micro_batch_tokens=10).micro_batches == 4  # a context is never cut
    assert work(micro_batch_tokens=2999).load.contexts == 2


def test_ranks_that_share_a_context_hold_a_part_of_its_tokens_and_more_contexts():
    alone, shared = work(), work(context_ranks=2)
    assert shared.load.contexts * shared.micro_batches == 2 * alone.load.contexts * alone.micro_batches
    assert shared.load.tokens == alone.load.tokens


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_products_of_a_rank_are_its_share_of_the_flops_over_their_rate(checkpointing):
    law = step_flops(MODEL, [1000] * 8, 8 * 50, checkpointing, zero_stage=1)
    taken = step_seconds(MODEL, GENES, work(checkpointing=checkpointing), replace(IDLE, products=10.0))
    assert taken.products == pytest.approx((law.total - law.attention) / 2 / 10)
    assert taken.total == taken.products


def test_context_ranks_share_all_but_the_latents():
    law = step_flops(MODEL, [1000] * 8, 8 * 50).by_component()
    shared = rank_flops(MODEL, work(context_ranks=2)).by_component()
    assert shared["latents"] == pytest.approx(law["latents"])
    assert shared["read"] == pytest.approx(law["read"] / 2)


def test_every_rate_slows_its_own_part():
    here = work(context_ranks=2)
    slower = {
        "attention": {"attention": 1.0},
        "elementwise": {"elementwise": 1.0},
        "targets": {"target_seconds": 1.0},
        "optimizer": {"parameter_seconds": 1.0},
        "calls": {"call": 1.0},
        "exchange": {"inside": 1.0},
        "zero": {"inside": 1.0},
    }
    fast = step_seconds(MODEL, GENES, here, replace(IDLE, products=NEVER_WAITS))
    assert fast.total == 0
    for part, rate in slower.items():
        taken = step_seconds(MODEL, GENES, here, replace(IDLE, products=NEVER_WAITS, **rate))
        assert getattr(taken, part) > 0
        if part not in ("exchange", "zero"):
            assert taken.total == getattr(taken, part)


def test_collectives_are_those_of_every_layer_and_micro_batch():
    exchanged, _ = collectives(MODEL, GENES, work(context_ranks=2, micro_batch_tokens=1))
    assert [one.times for one in exchanged] == [8 * MODEL.depth] * 2


def test_a_group_larger_than_a_node_sends_at_the_rate_between_nodes():
    device = replace(IDLE, inside=100.0, between=10.0, latency=3.0)
    assert seconds_of(Collective("", "all_gather", 800, 8, times=2), device) == pytest.approx(2 * 700 / 100 + 6)
    assert seconds_of(Collective("", "all_gather", 1600, 16), device) == pytest.approx(1500 / 10 + 3)


@pytest.mark.parametrize("name", known_devices())
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_profile_is_of_a_device_below_its_peak(name, precision):
    device = load_device(name, precision)
    assert device.attention < device.products < device.peak
    assert device.between < device.inside < device.elementwise
    assert not device.measured


def test_a_profile_of_ones_own_is_a_file_of_the_same_form(tmp_path: Path):
    own = tmp_path / "own.yaml"
    own.write_text((FOLDER / "h100.yaml").read_text().replace("name: NVIDIA H100 SXM", "name: ours"))
    assert load_device(str(own), "bf16").name == "ours"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("just text", "is no device"),
        ("name: x", "missing or unknown: .*peak"),
        ("a: [", "is not valid YAML"),
        ((FOLDER / "h100.yaml").read_text().replace("bf16:", "fp64:"), "'bf16'"),
        ((FOLDER / "h100.yaml").read_text().replace("3.35e+12", "much"), "much"),
    ],
)
def test_a_profile_that_is_none_is_refused_with_its_name(tmp_path: Path, text: str, complaint: str):
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(UsageError, match=f"own.yaml.*{complaint}"):
        load_device(str(own), "bf16")


def test_an_unknown_device_is_refused_with_those_that_are_known():
    with pytest.raises(UsageError, match="a100, h100, h200"):
        load_device("h1000", "bf16")
