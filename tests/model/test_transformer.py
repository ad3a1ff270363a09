from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from cctrain.apply.baselines import gene_mean
from cctrain.apply.metrics import nll_per_cell
from cctrain.apply.predict import predict_targets
from cctrain.apply.targets import TargetSet
from cctrain.config import MemoryConfig
from cctrain.data.loading.contexts import ContextRule, build_context
from cctrain.model.activations import Activations
from cctrain.model.tiles import cut_into_tiles
from cctrain.model.transformer import Inputs, Transformer, initialize
from cctrain.training.objective import negative_log_likelihood
from tests.model.conftest import (
    ATTENTIONS,
    NUM_GENES,
    in_fp32,
    random_inputs,
    random_model,
    randomize,
    relative_error,
    small_config,
)

pytestmark = pytest.mark.parametrize("attention", ATTENTIONS)


def everything(model: Transformer, inputs: Inputs) -> dict[str, Tensor]:
    """All that comes out of the model, without gradients. Predictions are fp32, the rest float64."""
    with torch.no_grad():
        tokens, latents = model.encode(inputs)
        log_mu, log_theta = model(inputs)
        results = {"tokens": tokens, "log_mu": log_mu, "log_theta": log_theta, "embedding": model.embed(inputs)}
        return results if latents is None else results | {"latents": latents}


# A context is a set


def permuted(inputs: Inputs, seed: int) -> tuple[Inputs, Tensor]:
    """The same contexts with their tokens in another order, and the order."""
    draws = torch.Generator().manual_seed(seed)
    bounds = pairwise(inputs.offsets)
    order = torch.cat([start + torch.randperm(stop - start, generator=draws) for start, stop in bounds])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    moved = {name: getattr(inputs, name)[order] for name in ("genes", "counts", "log_size_factors")}
    # Targets may be listed in any order too; this keeps theirs.
    return Inputs(**moved, targets=place[inputs.targets], offsets=inputs.offsets), order


@pytest.mark.parametrize("lengths", [[20], [7, 0, 25, 1]])
def test_permuting_the_tokens_of_contexts_permutes_the_new_tokens_and_nothing_else(attention, lengths):
    model, inputs = random_model(small_config(attention)), random_inputs(lengths)
    for seed in range(3):
        other, order = permuted(inputs, seed)
        ours, theirs = everything(model, inputs), everything(model, other)
        torch.testing.assert_close(theirs["tokens"], ours["tokens"][order], rtol=0, atol=1e-12)
        if attention == "criss_cross":
            torch.testing.assert_close(theirs["latents"], ours["latents"], rtol=0, atol=1e-12)
        for name in ("log_mu", "log_theta", "embedding"):
            torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=5e-6)


# Contexts of a pack do not see each other


def of_context(inputs: Inputs, results: dict[str, Tensor], context: int) -> dict[str, Tensor]:
    start, stop = inputs.offsets[context : context + 2]
    inside = (inputs.targets >= start) & (inputs.targets < stop)
    mine = {
        "tokens": results["tokens"][start:stop],
        "log_mu": results["log_mu"][inside],
        "log_theta": results["log_theta"][inside],
        "embedding": results["embedding"][context],
    }
    return mine | ({"latents": results["latents"][context]} if "latents" in results else {})


def test_what_another_context_holds_has_exactly_zero_influence(attention):
    model, inputs = random_model(small_config(attention)), random_inputs([8, 11, 0, 6])
    start, stop = inputs.offsets[1:3]
    genes, counts, sizes = inputs.genes.clone(), inputs.counts.clone(), inputs.log_size_factors.clone()
    genes[start:stop] = (genes[start:stop] + 7) % NUM_GENES
    counts[start:stop] *= 50
    sizes[start:stop] += 2
    changed = replace(inputs, genes=genes, counts=counts, log_size_factors=sizes)
    ours, theirs = everything(model, inputs), everything(model, changed)
    for context in (0, 2, 3):
        mine = of_context(inputs, ours, context)
        for name, value in of_context(changed, theirs, context).items():
            assert torch.equal(value, mine[name]), name
    assert not torch.equal(ours["tokens"][start:stop], theirs["tokens"][start:stop])


def test_gradients_with_respect_to_another_context_are_exactly_zero(attention):
    model, inputs = random_model(small_config(attention)), random_inputs([8, 11, 0, 6])
    draws = torch.Generator().manual_seed(5)
    first = torch.randn(25, 16, generator=draws, dtype=torch.float64).requires_grad_()
    first_latents = torch.randn(4, 5, 12, generator=draws, dtype=torch.float64).requires_grad_()
    starts = [first] if attention == "dense" else [first, first_latents]
    cuts = cut_into_tiles(inputs.offsets, 4)
    tiles, latents = list(first.split([cut.stop - cut.start for cut in cuts])), first_latents
    for layer in model.layers:
        if attention == "dense":
            tiles = layer(tiles, inputs.offsets, Activations())
        else:
            tiles, latents = layer(tiles, latents, cuts, Activations())
    start, stop = inputs.offsets[1:3]
    outcome = torch.cat(tiles)[start:stop].square().sum()
    outcome = outcome + (latents[1].square().sum() if attention == "criss_cross" else 0)
    grads = torch.autograd.grad(outcome, starts)
    others = [*range(start), *range(stop, 25)]
    assert torch.count_nonzero(grads[0][others]) == 0
    assert torch.all(grads[0][start:stop].abs().sum(dim=1) > 0)
    if attention == "criss_cross":
        assert torch.count_nonzero(grads[1][[0, 2, 3]]) == 0
        assert torch.all(grads[1][1].abs().sum(dim=1) > 0)


def test_every_token_of_a_context_influences_every_other(attention):
    model, inputs = random_model(small_config(attention)), random_inputs([9])
    before = everything(model, inputs)["tokens"]
    visible = next(i for i in range(9) if i not in inputs.targets.tolist())
    counts = inputs.counts.clone()
    counts[visible] += 5
    after = everything(model, replace(inputs, counts=counts))["tokens"]
    assert torch.all((before - after).abs().sum(dim=1) > 0)


def test_a_pack_with_nothing_but_empty_contexts_is_legal(attention):
    results = everything(random_model(small_config(attention)), random_inputs([0, 0]))
    assert results["tokens"].shape == (0, 16)
    assert results["log_mu"].shape == results["log_theta"].shape == (0,)
    assert torch.isfinite(results["embedding"]).all()


# Gradients


def gradients(model: Transformer, inputs: Inputs) -> dict[str, Tensor | None]:
    counts = torch.poisson(torch.full((len(inputs.targets),), 2.0), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    negative_log_likelihood(counts, *model(inputs)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lengths", [[30], [12, 0, 30, 1]])
def test_every_parameter_has_a_gradient(attention, checkpointing, lengths):
    model = random_model(small_config(attention), memory=MemoryConfig(checkpointing=checkpointing))
    grads = gradients(model, random_inputs(lengths))
    assert any(name.startswith("layers.2.") for name in grads)
    for name, gradient in grads.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        assert torch.count_nonzero(gradient) > 0, name


def test_every_parameter_has_a_gradient_in_fp32_too(attention):
    inputs = in_fp32(random_inputs([12, 30]))
    for name, gradient in gradients(random_model(small_config(attention)).float(), inputs).items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        assert torch.count_nonzero(gradient) > 0, name


def test_checkpointing_changes_no_gradient_and_keeps_no_activation_of_a_layer(attention):
    inputs, kept = random_inputs([12, 0, 30]), []
    results = []
    for checkpointing in (False, True):
        sizes = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        model = random_model(small_config(attention), memory=MemoryConfig(checkpointing=checkpointing))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(inputs)
        kept.append(sum(sizes))
        results.append(gradients(model, inputs))
    plain, recomputed = results
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-12, atol=1e-14)
    assert kept[1] < kept[0] / 2


def test_gradients_are_those_of_finite_differences(attention):
    """Through the layers, where float64 reaches; the head is fp32."""
    model, inputs = random_model(small_config(attention)), random_inputs([6, 4])

    def outcome() -> Tensor:
        tokens, latents = model.encode(inputs)
        return tokens.sin().sum() + (0 if latents is None else latents.cos().sum())

    outcome().backward()
    draws = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            continue
        direction = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = outcome()
            parameter -= 2e-6 * direction
            below = outcome()
            parameter += 1e-6 * direction
        slope = float((parameter.grad * direction).sum())
        assert float(above - below) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-6), name


# The untrained model


def untrained(attention: str, share: np.ndarray, theta: np.ndarray, seed: int = 0) -> Transformer:
    model = Transformer(small_config(attention), torch.from_numpy(share), torch.from_numpy(theta))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # so that what initialisation forgets is seen
    loadings = np.random.default_rng(seed).normal(size=(len(share), 4)) / 2
    initialize(model, torch.from_numpy(loadings), seed)
    return model


def some_shares(num_genes: int) -> np.ndarray:
    return np.random.default_rng(2).dirichlet(np.full(num_genes, 0.5)) * 0.999 + 0.001 / num_genes


def test_an_untrained_model_is_the_gene_mean(attention):
    num_genes, num_cells = 60, 12
    rng = np.random.default_rng(0)
    share, theta = some_shares(num_genes), rng.permutation(np.geomspace(1e-3, 1e4, num_genes))
    rule = ContextRule(0, "validation", np.full(num_genes, 0.4), share, 1_000)
    measured = np.ones(num_genes, dtype=bool)
    contexts = []
    for sample in range(num_cells):
        mean = rng.uniform(50, 500) * share
        counts = rng.poisson(mean * rng.gamma(np.minimum(theta, 1e3)) / np.minimum(theta, 1e3))
        expressed = np.flatnonzero(counts)
        contexts.append(build_context(rule, 0, sample, expressed, counts[expressed], measured))
    nothing = np.zeros(0, dtype=np.int64)
    targets = TargetSet(
        contexts=np.repeat(np.arange(num_cells), [len(context.targets) for context in contexts]),
        genes=np.concatenate([context.genes[context.targets] for context in contexts]),
        counts=np.concatenate([context.target_counts for context in contexts]).astype(np.int64),
        cell_of_context=np.arange(num_cells),
        log_size_factor=np.array([context.log_size_factors[0] for context in contexts]),
        visible_offsets=np.zeros(num_cells + 1, dtype=np.int64),
        visible_genes=nothing,
        visible_counts=nothing,
        source_of_context=np.zeros(num_cells, dtype=np.int64),
    )
    ours = nll_per_cell(targets, *predict_targets(untrained(attention, share, theta), contexts))
    gene_means = nll_per_cell(targets, *gene_mean(targets, share, theta))
    np.testing.assert_allclose(ours, gene_means, rtol=1e-6, atol=1e-6)
    assert targets.counts.max() > 20


def test_initial_weights_follow_from_the_seed_alone(attention):
    share, theta = some_shares(NUM_GENES), np.ones(NUM_GENES)
    models = []
    for seed, of_torch in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(of_torch)
        models.append(untrained(attention, share, theta, seed).state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
        assert torch.isfinite(value).all(), name
    assert any(not torch.equal(value, models[2][name]) for name, value in models[0].items())


# What stays fp32


def test_stream_and_predictions_of_a_bf16_model_are_fp32_and_near_those_of_the_exact_one(attention):
    inputs = random_inputs([12, 0, 30])
    exact = everything(random_model(small_config(attention)), inputs)
    low = random_model(small_config(attention)).float()
    for parameter in low.parameters():
        parameter.data = parameter.data.bfloat16()
    results = everything(low, in_fp32(inputs))
    assert results["tokens"].dtype == torch.float32  # the stream, however deep the model
    for name in ("log_mu", "log_theta", "embedding"):
        assert results[name].dtype == torch.float32
        assert 0 < relative_error(results[name], exact[name].float()) < 0.05, name


def test_weights_of_another_seed_give_other_predictions(attention):
    """The comparisons above would be worth nothing if the outputs were constant."""
    inputs = random_inputs([12, 30])
    model = random_model(small_config(attention))
    before = everything(model, inputs)
    randomize(model, seed=1)
    for name, value in everything(model, inputs).items():
        assert relative_error(value, before[name]) > 0.05, name
        assert value.std() > 0.05, name
