"""The formulas beside what PyTorch ran: exactly, component by component, and of whole steps."""

from collections.abc import Callable

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor
from torch.nn import functional

from cctrain.config import ModelConfig
from cctrain.cost.flops import ADAMW_FLOPS, Flops, forward_flops, optimizer_flops, step_flops
from cctrain.model import attention
from cctrain.model.layer import CrissCrossLayer, DenseLayer
from cctrain.model.transformer import Transformer
from tests.cost.counting import BACKENDS, MODELS, OperatorsGiving, built, counted, inputs_of

every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
LENGTHS, NUM_TARGETS = [40, 7, 25], 12
TOKENS = sum(LENGTHS)
LINEAR = torch._C._nn.linear


def random(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def heads_of(model: Transformer, config: ModelConfig, rows: int) -> list[Tensor]:
    return [random(rows, config.heads, config.width // config.heads) for _ in range(3)]


def components(model: Transformer, config: ModelConfig, backend: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Each component of the law as a call of the model's own parts: what it gives, to go backward from."""
    inputs, tokens = inputs_of(LENGTHS, NUM_TARGETS), random(TOKENS, config.width)
    is_target = torch.zeros(TOKENS, dtype=torch.bool)
    chosen, zeros = random(NUM_TARGETS, config.width), torch.zeros(NUM_TARGETS)
    gene_vectors = random(NUM_TARGETS, config.width)
    found: dict[str, Callable[[], list[Tensor]]] = {
        "embedding": lambda: [model.embedding(inputs.counts, inputs.log_size_factors, is_target)],
        "token_mlp": lambda: [layer.token_mlp(tokens) for layer in model.layers],
        "head": lambda: [model.head(chosen, gene_vectors, inputs.genes[:NUM_TARGETS], zeros, zeros)[0]],
    }
    queries, keys, values = heads_of(model, config, TOKENS)
    if config.attention == "dense":
        layers: list[DenseLayer] = list(model.layers)
        attended = lambda: attention.self_attention(queries, keys, values, inputs.offsets, backend=backend)  # noqa: E731
        return found | {
            "self_attention": lambda: [attended() for _ in layers],
            "token_projections": lambda: [
                made
                for layer in layers
                for made in (*layer.attention.queries_keys_and_values(tokens), layer.attention.out(tokens))
            ],
        }
    crossed: list[CrissCrossLayer] = list(model.layers)
    num_contexts, latent_width = len(LENGTHS), config.latent_width or config.width
    latents, read_out = (
        random(num_contexts, config.latents, latent_width),
        random(num_contexts, config.latents, config.width),
    )
    asking, showing, shown = (
        random(num_contexts, config.latents, config.heads, config.width // config.heads) for _ in range(3)
    )
    return found | {
        "read": lambda: [attention.read(asking, keys, values, inputs.offsets, backend=backend)[0] for _ in crossed],
        "write": lambda: [attention.write(queries, showing, shown, inputs.offsets, backend=backend) for _ in crossed],
        "token_projections": lambda: [
            made
            for layer in crossed
            for made in (*layer.read.keys_and_values(tokens), layer.write.queries(tokens), layer.write.out(tokens))
        ],
        "latents": lambda: [
            made
            for layer in crossed
            for made in (
                layer.read.queries(latents),
                layer.read.out(read_out),
                *layer.write.keys_and_values(latents),
                layer.latent_mlp(latents),
            )
        ],
    }


@every_model
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_component_takes_forward_and_backward_what_pytorch_counts(config, backend):
    model = built(config, backend=backend)
    law = step_flops(config, LENGTHS, NUM_TARGETS)
    calls = components(model, config, backend)
    assert calls.keys() == {name for name, flops in law.forward.by_component().items() if flops}
    for name, call in calls.items():
        made: list[Tensor] = []
        assert counted(lambda call=call, made=made: made.extend(call()))[0] == getattr(law.forward, name), name
        loss = sum(tensor.sum() for tensor in made)
        assert counted(loss.backward)[0] == getattr(law.backward, name), name


@every_model
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("checkpointing", "zero_stage"), [(False, 2), (True, 2), (True, 3)])
@pytest.mark.parametrize("lengths", [[60], [40, 7, 0, 25], [300]])
def test_a_whole_step_takes_what_pytorch_counts(config, backend, checkpointing, zero_stage, lengths, monkeypatch):
    # DeepSpeed leaves its own linear layer behind in the process; without its partitioned weights it computes the same.
    monkeypatch.setattr(functional, "linear", zero3_linear_wrap if zero_stage == 3 else LINEAR)
    num_targets = sum(lengths) // 10
    model, inputs = built(config, checkpointing=checkpointing, backend=backend), inputs_of(lengths, num_targets)
    law = step_flops(config, lengths, num_targets, checkpointing, zero_stage)

    def step() -> None:
        log_mu, log_theta = model(inputs)
        (log_mu + log_theta).sum().backward()

    assert counted(lambda: model(inputs)) == (law.forward.total, law.forward.attention)
    assert counted(step) == (law.total, law.attention)


@every_model
def test_checkpointing_adds_the_recomputation_and_nothing_else(config):
    without, with_it = (step_flops(config, LENGTHS, NUM_TARGETS, checkpointing) for checkpointing in (False, True))
    assert with_it.forward == without.forward
    assert with_it.backward == without.backward
    assert without.recomputation == Flops()
    assert with_it.recomputation.read == 0
    summed = {
        name: sum(getattr(part, name) for part in (with_it.forward, with_it.backward, with_it.recomputation))
        for name in with_it.by_component()
    }
    assert with_it.by_component() == summed


def test_adamw_takes_as_many_operations_a_parameter_as_it_is_made_of():
    """Counted in the plain implementation: decay; both moments; the root, its division and epsilon; the step."""
    per_element = {"mul_": 1, "lerp_": 3, "addcmul_": 3, "sqrt": 1, "div": 1, "add_": 1, "addcdiv_": 3, "zeros_like": 0}
    weights = torch.nn.Parameter(torch.ones(7))
    weights.grad = torch.ones(7)
    optimizer = torch.optim.AdamW([weights], foreach=False, fused=False)
    # The optimizer counts its steps too, once for all elements.
    with OperatorsGiving(weights.shape) as operators:
        optimizer.step()
    assert sum(times * per_element[name] for name, times in operators.times.items()) == ADAMW_FLOPS
    assert optimizer_flops(10) == 10 * ADAMW_FLOPS


def test_criss_cross_attention_is_exactly_linear_in_tokens_and_in_latents():
    def attention_flops(n: int, num_latents: int) -> float:
        return forward_flops(ModelConfig(latents=num_latents), [n], 0).attention

    assert attention_flops(2_000, 64) == 2 * attention_flops(1_000, 64)
    assert attention_flops(1_000, 128) == 2 * attention_flops(1_000, 64)
    assert attention_flops(3_000, 64) - attention_flops(2_000, 64) == attention_flops(1_000, 64)
    config = ModelConfig()
    assert attention_flops(1_000, 64) == 8 * 1_000 * 64 * config.width * config.depth


def test_dense_attention_is_exactly_quadratic_in_tokens():
    config = ModelConfig(attention="dense")
    assert forward_flops(config, [2_000], 0).attention == 4 * forward_flops(config, [1_000], 0).attention
    assert forward_flops(config, [1_000], 0).attention == 4 * 1_000**2 * config.width * config.depth
    assert forward_flops(config, [1_000, 500], 0).attention == sum(
        forward_flops(config, [n], 0).attention for n in (1_000, 500)
    )


def test_latents_cost_the_same_whatever_the_length_of_the_context():
    config = ModelConfig()
    assert forward_flops(config, [10], 0).latents == forward_flops(config, [10_000], 0).latents
    assert forward_flops(config, [10, 20, 30], 0).latents == 3 * forward_flops(config, [10], 0).latents
    assert forward_flops(ModelConfig(attention="dense"), [10], 0).latents == 0
