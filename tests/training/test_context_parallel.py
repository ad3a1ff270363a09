"""Contexts shared by several ranks, against plain PyTorch in float64 on the whole global batch at once."""

from pathlib import Path

import numpy as np
import pytest

from cctrain.data.store.store import TokenStore
from tests.training.conftest import Case, Result, errors_of, run_cases
from tests.training.plain import STAGES, Reference, assert_same_gradient, assert_same_training, zero

pytestmark = [pytest.mark.slow, pytest.mark.processes]

SHORT = ("training.steps=6",)
TILES = ("memory.tile_tokens=40",)
RECOMPUTED = ("memory.checkpointing=true", "memory.offload=host")


@pytest.fixture(scope="module")
def reference(tiny_config: Path, unequal_store: TokenStore) -> Reference:
    return Reference(tiny_config, unequal_store)


MISTAKES = ("losses averaged by rank", "latents counted by every rank", "a slice dropped")


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def pairs(reference: Reference, pairs_folder: Path) -> dict[str, Result]:
    """Two ranks that share every context, in every way of keeping activations; and runs with a mistake in them."""
    base = ("parallel.context=2", *SHORT, reference.accumulate(num_ranks=2, steps=2))
    cases = [
        Case("sharded", (*base, *zero(3), *TILES, *RECOMPUTED)),
        Case("replicated", (*base, *zero(1), "parallel.check_ranks=true")),
        Case("one context", (*base, *zero(2), "data.global_batch=1")),
        Case("bf16", (*base, *zero(1), *TILES, *RECOMPUTED, "training.precision=bf16")),
        *(Case(mistake, (*base, *zero(1)), mistake=mistake) for mistake in MISTAKES),
        Case("diverged", (*base, *zero(0), "parallel.check_ranks=true"), mistake="a rank disturbed"),
    ]
    return run_cases(cases, 2, reference.path, reference.store, pairs_folder / "out")


@pytest.mark.representative
@pytest.mark.parametrize("name", ["sharded", "replicated"])
def test_two_ranks_that_share_every_context_train_like_plain_pytorch(pairs, reference, name):
    assert 2 in pairs[name].column("accumulation")
    assert_same_training(pairs[name], reference(*SHORT))
    assert_same_gradient(pairs[name].gradient, reference(*SHORT))


@pytest.mark.representative
def test_bf16_stays_close_to_fp32_with_shared_contexts_tiles_and_recomputation(pairs, reference):
    assert pairs["bf16"].column("samples") == reference(*SHORT).samples
    np.testing.assert_allclose(pairs["bf16"].losses, reference(*SHORT).losses, rtol=1e-2)


@pytest.mark.representative
def test_under_zero_3_a_model_is_sharded_as_it_is_built(pairs):
    whole = sum(weight.size for name, weight in pairs["sharded"].weights.items() if not name.startswith("log_"))
    assert pairs["replicated"].held == [whole, whole]
    assert max(pairs["sharded"].held) < 0.51 * whole


@pytest.mark.representative
def test_a_single_context_is_shared_too(pairs, reference):
    plain = reference(*SHORT, "data.global_batch=1")
    assert [step for rank in pairs["one context"].contexts for step in rank] == [[1]] * 12
    assert_same_training(pairs["one context"], plain)
    assert_same_gradient(pairs["one context"].gradient, plain)


@pytest.mark.representative
@pytest.mark.parametrize("mistake", MISTAKES)
def test_this_comparison_catches(pairs, reference, mistake):
    with pytest.raises(AssertionError):
        assert_same_gradient(pairs[mistake].gradient, reference(*SHORT))


@pytest.mark.representative
def test_a_weight_that_differs_in_its_last_bit_is_named_at_once_where_ranks_are_checked(pairs, pairs_folder):
    errors = errors_of(pairs_folder / "out", "diverged")
    assert len(errors) == 2
    for error in errors:
        assert "diverged at step 2" in error
        assert "on rank 1" in error
        assert "the weight latents" in error or "the weight embedding" in error


@pytest.mark.representative
def test_the_look_at_held_out_cells_counts_a_shared_cell_once(pairs, reference):
    alone, shared = reference.look(pairs["replicated"]), pairs["replicated"].look
    assert shared["cells"] == reference.store.num_cells - reference.store.num_train
    assert shared["nll"] == pytest.approx(alone, rel=1e-5)


@pytest.fixture(scope="module", params=[1, 2, 4])
def runs(
    request: pytest.FixtureRequest, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    """Four ranks in rows of 1, 2 and 4: every stage × recomputation × accumulation."""
    cases = []
    for stage in STAGES:
        # As many tiles pass as a micro-batch could hold: 400 of 40 tokens by default.
        base = (*zero(stage), *SHORT, f"parallel.context={request.param}", "data.micro_batch_tokens=400")
        longest = f"data.micro_batch_tokens={reference.longest_slice(request.param)}"  # so there are several a step
        cases += [
            Case(f"{stage}-once-kept", base),
            Case(f"{stage}-often-kept", (*base, longest, *TILES)),
            Case(f"{stage}-once-recomputed", (*base, *TILES, "memory.checkpointing=true")),
            Case(f"{stage}-often-recomputed", (*base, longest, *RECOMPUTED)),
        ]
    folder = tmp_path_factory.mktemp(f"rows-of-{request.param}")
    return run_cases(cases, 4, reference.path, reference.store, folder / "out", timeout=1800)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulation", ["once", "often"])
@pytest.mark.parametrize("activations", ["kept", "recomputed"])
def test_four_ranks_in_rows_train_like_plain_pytorch(runs, reference, stage, accumulation, activations):
    result = runs[f"{stage}-{accumulation}-{activations}"]
    assert (result.column("accumulation")[0] > 1) == (accumulation == "often")
    assert_same_training(result, reference(*SHORT))
    assert_same_gradient(result.gradient, reference(*SHORT))


def test_ranks_of_a_row_end_with_the_same_bits(runs):
    for result in runs.values():
        assert len(set(result.digests)) == 1
        assert np.isfinite(result.losses).all()
