"""How long a training step takes on given devices: FLOPs, bytes and collectives, each over the rate it gets; README.md,
"Time of a step".

The parts are added: on these devices nothing is assumed to overlap. All are multiplied by what a rehearsal took beyond
its parts, where there was one. What moves through memory beside the products counts what every operation reads and
writes: three norms, two residuals and GELU of every token and layer, the embedding of every token, and, in every
micro-batch, what it takes to make, fill and add the gradient of the gene vectors, for tokens and for targets. The token
stream has 4 bytes a number, whatever the precision.
"""

from dataclasses import dataclass, fields

from cctrain.config import ModelConfig
from cctrain.cost.devices import Device
from cctrain.cost.flops import Flops, step_flops
from cctrain.cost.parameters import num_parameters
from cctrain.cost.traffic import Collective, exchange_of_a_layer, zero
from cctrain.cost.work import Work

SMALL_COLLECTIVES = 8  # a step: which slices there are, the loss, the norm of the gradient


@dataclass(frozen=True)
class StepSeconds:
    products: float
    attention: float
    elementwise: float
    targets: float
    optimizer: float
    calls: float
    exchange: float
    zero: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def scaled(self, factor: float) -> "StepSeconds":
        return StepSeconds(**{field.name: factor * getattr(self, field.name) for field in fields(self)})


def rank_flops(model: ModelConfig, work: Work) -> Flops:
    """Of one rank in a step: its part of the tokens, and the latents' part, which every context rank repeats."""
    load, ranks = work.load, work.context_ranks
    whole = [load.tokens * ranks / load.contexts]
    of_context = step_flops(
        model, whole, load.targets * ranks / load.contexts, work.memory.checkpointing, work.zero_stage
    ).by_component()
    of_context["self_attention"] *= work.unevenness
    contexts = work.micro_batches * load.contexts
    return Flops(**{k: v * contexts / (1 if k == "latents" else ranks) for k, v in of_context.items()})


def parameters_updated(model: ModelConfig, num_genes: int, work: Work) -> float:
    """By the optimizer of one rank: without ZeRO each updates all."""
    return num_parameters(model, num_genes) / (work.ranks if work.zero_stage else 1)


def collectives(model: ModelConfig, num_genes: int, work: Work) -> tuple[list[Collective], list[Collective]]:
    """Of a step: those of the context ranks, and those of ZeRO."""
    layer = exchange_of_a_layer(model, work.load.contexts, work.context_ranks)
    return (
        [
            Collective(c.purpose, c.operation, c.payload, c.ranks, c.times * model.depth * work.micro_batches)
            for c in layer
        ],
        zero(model, num_genes, work.zero_stage, work.element_bytes, work.ranks, work.micro_batches, work.gathering),
    )


def step_seconds(model: ModelConfig, num_genes: int, work: Work, device: Device) -> StepSeconds:
    flops = rank_flops(model, work)
    d, e, depth = model.width, work.element_bytes, model.depth
    tokens, passes = work.micro_batches * work.load.tokens, 2 if work.memory.checkpointing else 1
    moved = tokens * depth * d * (passes * (28 + 13 * e) + 48 + 18 * e) + tokens * d * (28 + 14 * e)
    moved += work.micro_batches * 6 * num_genes * d * e
    stages = num_stages(model, -(-work.load.tokens // work.tile_tokens)) * (1 + passes) / 2
    exchanged, of_zero = collectives(model, num_genes, work)
    parts = StepSeconds(
        products=(flops.total - flops.attention) / device.products,
        attention=flops.attention / device.attention,
        elementwise=moved / device.elementwise,
        targets=work.micro_batches * work.load.targets * device.target_seconds,
        optimizer=parameters_updated(model, num_genes, work) * device.parameter_seconds,
        calls=work.micro_batches * stages * device.call,
        exchange=sum(seconds_of(one, device) for one in exchanged),
        zero=sum(seconds_of(one, device) for one in of_zero)
        + (SMALL_COLLECTIVES * device.latency if work.ranks > 1 else 0.0),
    )
    return parts.scaled(device.rehearsed_over_parts)


def num_stages(model: ModelConfig, tiles: float) -> float:
    """Of a micro-batch: embedding and head of every tile, and in every layer read and write, or self-attention."""
    return model.depth * (2 * tiles + 2 if model.attention == "criss_cross" else tiles) + 2 * tiles


def seconds_of(collective: Collective, device: Device) -> float:
    """A group that fits into a node is in one."""
    rate = device.inside if collective.ranks <= device.per_node else device.between
    return collective.sent / rate + collective.times * collective.calls * device.latency
