"""Ranks × ZeRO stages × accumulation, against plain PyTorch in float64 on the whole global batch at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cctrain.data.store.store import TokenStore
from cctrain.training.train import build_model
from tests.training.conftest import Case, Result, run_cases
from tests.training.plain import (
    STAGES,
    Reference,
    assert_same_gradient,
    assert_same_training,
    global_batches,
    target_losses,
    zero,
)
from tests.training.ranks_worker import disturb

CLIP = 0.05
CLIPPED = (f"training.clip={CLIP}", "training.steps=8")


@pytest.fixture(scope="module")
def reference(tiny_config: Path, unequal_store: TokenStore) -> Reference:
    return Reference(tiny_config, unequal_store)


@pytest.fixture(scope="module")
def clipped_runs(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Every stage on 2 ranks, with accumulation and clipping."""
    common = (*CLIPPED, reference.accumulate(num_ranks=2, steps=3))
    cases = [Case(f"zero{stage}", (*zero(stage), *common)) for stage in STAGES]
    return run_cases(cases, 2, reference.path, reference.store, tmp_path_factory.mktemp("clipped") / "out")


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def runs(
    request: pytest.FixtureRequest, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    """Everything else, on 1 rank and on 2."""
    cases = []
    for stage in STAGES:
        cases += [
            Case(f"zero{stage}-once", zero(stage)),
            Case(f"zero{stage}-thrice", (*zero(stage), reference.accumulate(request.param, steps=3))),
            Case(f"zero{stage}-bf16", (*zero(stage), "training.precision=bf16")),
            Case(f"zero{stage}-bf16-slow", (*zero(stage), "training.precision=bf16", *SLOW)),
        ]
    cases += [
        Case("again", zero(1)),
        Case("single", (*zero(2), "data.global_batch=1")),
        Case("dense", (*zero(2), "model.attention=dense")),
        Case("recomputed", (*zero(3), "memory.checkpointing=true")),
    ]
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    return run_cases(cases, request.param, reference.path, reference.store, folder / "out")


SLOW = ("training.steps=1", "training.learning_rate=3e-6", "training.warmup=0", "training.weight_decay=0.0")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.representative
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_that_accumulate_and_clip_train_like_plain_pytorch(stage, clipped_runs, reference):
    result, plain = clipped_runs[f"zero{stage}"], reference(*CLIPPED)
    assert 3 in result.column("accumulation")
    assert plain.norms.min() > CLIP, "clipping must be active in every step"
    assert_same_training(result, plain)
    assert_same_gradient(result.gradient, plain, scale=CLIP / plain.norms[0])


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("micro_batch", "accumulation"), [("once", 1), ("thrice", 3)])
def test_every_stage_and_accumulation_trains_like_plain_pytorch(runs, reference, stage, micro_batch, accumulation):
    result = runs[f"zero{stage}-{micro_batch}"]
    assert result.column("accumulation")[0] == accumulation
    assert_same_training(result, reference())


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro_batch", ["once", "thrice"])
def test_every_stage_and_accumulation_has_the_gradient_of_the_whole_batch(runs, reference, stage, micro_batch):
    assert_same_gradient(runs[f"zero{stage}-{micro_batch}"].gradient, reference())


@pytest.mark.slow
@pytest.mark.processes
def test_the_same_training_again_gives_the_same_bits(runs):
    first, again = runs["zero1-once"], runs["again"]
    assert first.column("loss") == again.column("loss")
    assert all(np.array_equal(first.weights[name], again.weights[name]) for name in first.weights)


@pytest.mark.slow
@pytest.mark.processes
def test_a_rank_without_any_context_takes_part_with_weight_zero(runs, reference):
    result, plain = runs["single"], reference("data.global_batch=1")
    assert [sum(sum(steps[i]) for steps in result.contexts) for i in range(20)] == [1] * 20
    if len(result.contexts) == 2:
        assert [0] in result.contexts[1], "no rank was ever without a context"
    assert_same_training(result, plain)
    assert_same_gradient(result.gradient, plain)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "overrides"), [("dense", ("model.attention=dense",)), ("recomputed", ("memory.checkpointing=true",))]
)
def test_dense_attention_and_checkpointing_train_like_plain_pytorch(runs, reference, name, overrides):
    assert_same_training(runs[name], reference(*overrides))
    assert_same_gradient(runs[name].gradient, reference(*overrides))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_stays_close_to_fp32_on_the_same_samples(runs, reference, stage):
    result = runs[f"zero{stage}-bf16"]
    assert result.column("samples") == reference().samples
    np.testing.assert_allclose(result.losses, reference().losses, rtol=1e-2)
    assert not np.array_equal(result.losses, runs[f"zero{stage}-once"].losses)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_keeps_and_saves_weights_in_fp32(runs, reference, stage):
    result = runs[f"zero{stage}-bf16-slow"]
    model = build_model(reference.config(), reference.store.genes)
    if stage == 3:
        model.bfloat16()  # as it is built there, and then disturbed
    disturb(model)
    for name, parameter in model.named_parameters():
        weight = result.weights[name]
        assert weight.dtype == np.float32
        before = parameter.detach().bfloat16().float().numpy()
        large = np.abs(before) > 0.02  # where bf16 is spaced by 1.2e-4 or more, far more than a step
        step = np.abs(weight - before)[large]
        assert 0 < step.max() < 3e-5, f"{name} moved by {step.max()}: no copy in fp32 was trained and saved"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_leaves_the_constants_of_the_gene_mean_in_fp32(runs, reference, stage):
    weights = runs[f"zero{stage}-bf16"].weights
    genes = reference.store.genes
    np.testing.assert_allclose(weights["log_share"], np.log(genes.share), rtol=1e-6)
    np.testing.assert_allclose(weights["log_theta"], np.log(genes.theta), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("way", ["once", "thrice"])
def test_the_look_at_held_out_cells_is_the_plain_mean_over_cells_on_any_number_of_ranks(runs, reference, way):
    look = runs[f"zero2-{way}"].look
    assert look["cells"] == reference.store.num_cells - reference.store.num_train > 1
    assert look["nll"] == pytest.approx(reference.look(runs[f"zero2-{way}"]), rel=1e-5)


def test_a_mean_of_means_would_be_another_loss(reference):
    config = reference.config()
    model = build_model(config, reference.store.genes)
    disturb(model)
    batch = global_batches(config, reference.store)[0]
    with torch.no_grad():
        losses = target_losses(model.double(), batch).numpy()
    bounds = np.searchsorted(batch.targets, batch.offsets)
    contexts = np.split(losses, bounds[1:-1])
    assert losses.mean() == pytest.approx(reference().losses[0], rel=1e-9)
    assert abs(np.mean([part.mean() for part in contexts]) / losses.mean() - 1) > 0.01
