"""The formulas of memory beside what PyTorch's allocator gave out."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median

import numpy as np
import pytest
import torch

from cctrain.config import Config, MemoryConfig, ModelConfig
from cctrain.cost.memory import LARGEST_BUCKET, activations, peak, rank_memory, reduce_bucket, state
from cctrain.cost.parameters import num_parameters, parameters_of_a_layer
from cctrain.cost.traffic import Gathering
from cctrain.cost.work import Load
from cctrain.training.objective import negative_log_likelihood
from tests.cost.conftest import ZERO_KINDS, ZERO_MODEL, ZERO_RANKS, said_by_ranks, work
from tests.cost.counting import NUM_GENES, built, inputs_of, most_allocated

TOLERANCE = 0.15
# Of the memory that malloc gives out, blocks of more bytes count; PyTorch keeps no compiled kernel for a next time.
ONLY_TENSORS = {"MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
SHAPES = {
    "criss_cross": ModelConfig(width=48, depth=2, heads=2, latents=16),
    "deep": ModelConfig(width=32, depth=5, heads=4, latents=8),
    "wide latents": ModelConfig(width=32, depth=3, heads=2, latents=64, latent_width=96),
    "dense": ModelConfig(attention="dense", width=48, depth=2, heads=2),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Each other one takes PyTorch's dense attention in 16 bit up to 2 MB on a CPU, more than shapes that are quick."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Setting:
    """`contexts` of as many tokens each, or of these numbers of tokens."""

    model: ModelConfig
    lengths: tuple[int, ...] = (3000,)
    targets: int = 150
    genes: int = NUM_GENES
    tile: int = 512
    checkpointing: bool = False
    element_bytes: int = 4


def computed(setting: Setting) -> float:
    load = Load(sum(setting.lengths), len(setting.lengths), setting.targets)
    memory = MemoryConfig(setting.checkpointing)
    return activations(setting.model, setting.genes, load, memory, setting.tile, setting.element_bytes).total


def measured(setting: Setting) -> int:
    model = built(setting.model, setting.genes, setting.checkpointing, backend="auto", tile_tokens=setting.tile)
    model.to(torch.float32 if setting.element_bytes == 4 else torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        log_mu, log_theta = model(inputs_of(list(setting.lengths), setting.targets))
        negative_log_likelihood(torch.ones(setting.targets), log_mu, log_theta).sum().backward()

    step()
    return most_allocated(step)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("lengths", [(3000,), (150,) * 16, (700, 2300)])
def test_a_forward_and_backward_need_what_the_formula_says(config, checkpointing, element_bytes, lengths):
    targets = sum(lengths) // 20
    setting = Setting(config, lengths, targets, checkpointing=checkpointing, element_bytes=element_bytes)
    assert computed(setting) == pytest.approx(measured(setting), rel=TOLERANCE)


# A term that is too large or too small shows where little else grows.
SHORT, FEW_TOKENS = {"tile": 64, "targets": 12}, {"lengths": (1000,), "tile": 125}
NARROW = {"width": 2, "heads": 1}
GROWTH = {
    "tokens": ({"lengths": (1024,)}, {"lengths": (4096,)}),
    "tokens of one tile": ({"lengths": (200,), "tile": 4096}, {"lengths": (800,), "tile": 4096}),
    "narrow tokens": ({"lengths": (1024,), **NARROW}, {"lengths": (4096,), **NARROW}),
    "tokens of one layer": ({"lengths": (1024,), "depth": 1}, {"lengths": (4096,), "depth": 1}),
    "genes": ({"genes": 2000}, {"genes": 8000}),
    "depth": ({"depth": 2}, {"depth": 6}),
    "narrow depth": ({"depth": 2, **NARROW}, {"depth": 6, **NARROW}),
    "heads": ({"heads": 2}, {"heads": 24}),
    "contexts": ({"lengths": (64,) * 4, **SHORT}, {"lengths": (16,) * 16, **SHORT}),
    "latents": ({"latents": 16}, {"latents": 64}),
    "many latents": ({"latents": 1000, **FEW_TOKENS}, {"latents": 2000, **FEW_TOKENS}),
    "tile": ({"tile": 500}, {"tile": 1500}),
    "targets": ({"targets": 1500, "tile": 200}, {"targets": 3000, "tile": 200}),
    "targets of one tile": ({"targets": 150, "tile": 3000}, {"targets": 3000, "tile": 3000}),
}
OF_DENSE_ATTENTION = {"tokens", "genes", "depth"}
WITHOUT_CHECKPOINTING = {"targets of one tile", "tokens of one layer"}  # with it, a tile in its layer needs more
# In 16 bit oneDNN copies what it multiplies, more or less of it by the CPU: beside so narrow tiles that is much.
BESIDE_COPIES = {"tile", "tokens of one tile", "targets of one tile", "many latents"}
NEARLY_EXACT = {"genes", "depth", "tokens of one layer", "latents", "many latents", "targets"}


@pytest.mark.parametrize(
    ("quantity", "attention", "checkpointing"),
    [
        (quantity, attention, checkpointing)
        for quantity in GROWTH
        for attention in ("criss_cross", "dense")
        for checkpointing in (False, True)
        if attention == "criss_cross" or quantity in OF_DENSE_ATTENTION
        if not (checkpointing and quantity in WITHOUT_CHECKPOINTING)
    ],
)
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of Intel's GPUs; whoever turns oneDNN off is told of it
def test_more_of_a_quantity_needs_as_much_more_as_the_formula_says(quantity, attention, checkpointing, element_bytes):
    model = ModelConfig(attention=attention, width=48, depth=2, heads=2, latents=16)
    setting = Setting(model, checkpointing=checkpointing, element_bytes=element_bytes)
    less, more = (grown(setting, **to) for to in GROWTH[quantity])
    tolerance = 0.03 if quantity in NEARLY_EXACT and not checkpointing else TOLERANCE
    with torch.backends.mkldnn.flags(enabled=quantity not in BESIDE_COPIES):
        found = measured(more) - measured(less)
    assert computed(more) - computed(less) == pytest.approx(found, rel=tolerance)


def grown(setting: Setting, **to: object) -> Setting:
    of_model = {name: value for name, value in to.items() if hasattr(setting.model, name)}
    of_setting = {name: value for name, value in to.items() if name not in of_model}
    return replace(setting, model=replace(setting.model, **of_model), **of_setting)


def test_deepspeed_reduces_as_many_numbers_at_once_as_the_formula_says_where_nobody_chose():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig().reduce_bucket_size == LARGEST_BUCKET


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("stage", "precision"),
    [pytest.param(*kind, marks=pytest.mark.representative if kind == (3, "bf16") else ()) for kind in ZERO_KINDS],
)
def test_a_rank_of_a_larger_model_keeps_and_needs_as_much_more_as_the_formula_says(even_store, stage, precision):
    num_genes, element_bytes = len(even_store.genes.ids), 4 if precision == "fp32" else 2
    law, found = [], []
    for model in (ZERO_MODEL, replace(ZERO_MODEL, width=480)):
        plan = {"store": str(even_store.path), "model": asdict(model), "stage": stage, "precision": precision}
        told = said_by_ranks("memory_worker", plan, **ONLY_TENSORS)
        parameters = num_parameters(model, num_genes)
        held = state(model, num_genes, stage, element_bytes, ZERO_RANKS, parameters)
        made = activations(model, num_genes, Load(**told["load"]), MemoryConfig(), 4096, element_bytes)
        law.append((held.kept, peak(held, made, told["micro_batches"])))
        found.append((median(told["kept"]), median(told["most"])))
    (kept, most), (law_kept, law_most) = (np.subtract(*reversed(pair)) for pair in (found, law))
    assert law_kept == pytest.approx(kept, rel=TOLERANCE)
    assert law_most == pytest.approx(most, rel=TOLERANCE)


@pytest.mark.processes
def test_deepspeed_allocates_no_more_for_reducing_gradients_than_there_are(even_store, zero_trainings):
    total = num_parameters(ZERO_MODEL, len(even_store.genes.ids))
    buckets = {(step["stage"], step["precision"]): step["reduce_bucket"] for step in zero_trainings}
    without = {(0, "fp32"), (0, "bf16"), (1, "bf16")}  # these have none
    assert buckets == {kind: None if kind in without else total for kind in buckets}
    assert reduce_bucket(total) == total
    assert reduce_bucket(10**10) == LARGEST_BUCKET


def of_state(stage: int, precision: str, p: int, w: int, b: int, s: int) -> tuple[float, float, float]:
    """Kept, in backward, in the optimizer's step: the module's table, of a model that is gathered whole."""
    return {
        (0, "fp32"): (12 * p, 8 * p, 8 * p),
        (1, "fp32"): (4 * p + 12 * p / w, 4 * p + 4 * b + 2 * p / w, 16 * p / w),
        (2, "fp32"): (4 * p + 12 * p / w, 4 * b + 4 * min(2 * b, p) + 4 * p / w, 16 * p / w),
        (3, "fp32"): (4 * s * (1 - 1 / w) + 20 * p / w + 4 * b, 8 * p - 4 * s * (1 - 1 / w), 12 * p / w),
        (0, "bf16"): (14 * p, 4 * p, 7 * p),
        (1, "bf16"): (6 * p + 12 * p / w, 8 * p, 2 * p + 8 * p / w),
        (2, "bf16"): (2 * p + 12 * p / w, 2 * b + 2 * min(2 * b, p) + 4 * p / w, 12 * p / w),
        (3, "bf16"): (2 * s * (1 - 1 / w) + 18 * p / w + 2 * b, 4 * p - 2 * s * (1 - 1 / w), 12 * p / w),
    }[stage, precision]


@pytest.mark.parametrize(("stage", "precision"), ZERO_KINDS)
@pytest.mark.parametrize("share_in_a_bucket", [0.25, 1.0])
def test_state_is_what_the_table_says(stage, precision, share_in_a_bucket):
    model, num_genes, ranks = ModelConfig(), 1000, 4
    sizes = [parameter.numel() for parameter in built(model, num_genes).parameters()]
    total, small = sum(sizes), sum(size for size in sizes if size <= 100_000)
    bucket = round(share_in_a_bucket * total)
    found = state(model, num_genes, stage, 4 if precision == "fp32" else 2, ranks, bucket)
    table = of_state(stage, precision, total, ranks, bucket, small)
    assert (found.kept, found.backward, found.step) == pytest.approx(table)


def test_one_rank_reduces_no_gradients():
    alone, together = (state(ModelConfig(), 1000, 0, 4, ranks, bucket=0) for ranks in (1, 2))
    assert together.backward == 2 * alone.backward


@pytest.mark.parametrize(
    ("options", "ahead"),
    [
        ({"stage3_max_live_parameters": 50_000_000}, 50_000_000),
        ({"stage3_max_live_parameters": 50_000_000, "stage3_prefetch_bucket_size": 0}, 0),
    ],
)
def test_under_stage_3_no_more_weights_are_gathered_than_may_live_and_a_layer(options, ahead):
    model, num_genes, ranks = ModelConfig(width=1024, depth=48, heads=16), 20_000, 8
    total = num_parameters(model, num_genes)
    small = 48 * 16 * 1024 + 64 * 1024 + 5 * 1024 + 20_000  # vectors of the layers, first latents, around, of genes
    gathered = small + ahead + parameters_of_a_layer(model)
    assert gathered < total
    found = state(model, num_genes, 3, 2, ranks, 0, Gathering(**options))
    assert found.weights == pytest.approx(2 * (total / ranks + small * (ranks - 1) / ranks))
    assert found.weights + found.backward == pytest.approx(2 * (total / ranks + total + gathered))


def test_under_stage_3_tensors_that_are_said_to_be_small_are_whole_on_every_rank():
    model, sizes = ModelConfig(), [parameter.numel() for parameter in built(ModelConfig(), 1000).parameters()]
    found = state(model, 1000, 3, 4, 4, 0, Gathering(stage3_param_persistence_threshold=1000))
    assert found.weights == pytest.approx(sum(sizes) + 3 * sum(size for size in sizes if size <= 1000))


def test_more_ranks_share_more_at_every_stage_and_the_last_shares_all():
    model, num_genes = ModelConfig(width=1024, depth=48, heads=16), 20_000
    whole = 16 * num_parameters(model, num_genes)
    for element_bytes in (2, 4):
        kept = [state(model, num_genes, stage, element_bytes, 1000, bucket=0).kept for stage in range(4)]
        assert kept[0] > kept[1] >= kept[2] > kept[3]
        assert kept[3] < 0.05 * whole


@pytest.mark.parametrize(("options", "bucket"), [({}, None), ({"reduce_bucket_size": 1000}, 1000)])
def test_the_bucket_is_as_large_as_the_model_unless_the_configuration_says_how_large(options, bucket):
    config = Config(model=ModelConfig(), deepspeed={"zero_optimization": options})
    held, _ = rank_memory(config, 1000, work(stage=3))
    total = num_parameters(config.model, 1000)
    assert held == state(config.model, 1000, 3, 4, 2, bucket or total)


def test_checkpoints_off_the_device_leave_two_streams_of_tokens_on_it():
    model, load = ModelConfig(depth=30), Load(1_000_000, 1, 0)
    here = activations(model, 0, load, MemoryConfig(True), 4096, 2)
    away = activations(model, 0, load, MemoryConfig(True, offload="host"), 4096, 2)
    stream = 4 * 1_000_000 * model.width
    assert here.streams + here.working == 32 * stream
    assert away.streams == 2 * stream
    assert away.offloaded == 31 * stream
    assert away.total == away.streams + away.working + away.latents + away.pack


@pytest.mark.parametrize(
    ("attention", "element_bytes", "copied"), [("criss_cross", 2, 4 * 64 * 96), ("criss_cross", 4, 0), ("dense", 2, 0)]
)
def test_the_latents_that_contexts_begin_with_are_copied_where_they_are_in_16_bit(attention, element_bytes, copied):
    model = ModelConfig(attention=attention, latents=64, latent_width=96)
    made = activations(model, 1000, Load(5000, 0, 250), MemoryConfig(True), 4096, element_bytes)
    assert made.latents == copied


def test_in_the_first_backward_of_a_step_gradients_take_the_place_of_activations():
    held = state(ModelConfig(), 1000, 1, 4, 4, 1000)
    made = activations(ModelConfig(), 1000, Load(5000, 1, 250), MemoryConfig(), 4096, 4)
    assert peak(held, made, 2) == held.kept + max(made.total + held.backward, held.step)
    assert peak(held, made, 1) == held.kept + max(made.total, held.backward, held.step)


def test_the_optimizers_step_finds_no_activations():
    held = replace(state(ModelConfig(), 1000, 1, 4, 4, 1000), step=1e12)
    made = activations(ModelConfig(), 1000, Load(5000, 1, 250), MemoryConfig(), 4096, 4)
    assert peak(held, made, 2) == peak(held, made, 1) == held.kept + 1e12
