"""What a rank sends over the network in a training step, by collective, from the configuration alone: README.md,
"Bytes over the network".

What a collective sends follows from its payload by the bandwidth-optimal algorithms (Thakur, Rabenseifner and Gropp
2005; Patarasuk and Yuan 2009), whatever gloo or NCCL do in detail; a rank receives as many bytes as it sends. The
payload of an all-gather is what every rank has in the end, of a reduce-scatter what every rank had before, and of an
all-reduce both.

Context ranks exchange what their latents read, however many its tokens, in fp32; up to 8 of them gather it, more of
them reduce the largest log-sum-exp and then the sums. ZeRO 3 gathers small tensors once a step, each by itself. Large
ones are fetched ahead, with every module that is called 50 million numbers more, and stay from forward to backward if
they are a thousand million numbers at most. Otherwise, or if nothing is fetched ahead, they are gathered one by one for
both, the last ones less often. DeepSpeed 0.19 did so on two ranks, with a model of 80 million numbers, too.

Not counted: the few numbers about a step that ranks tell each other, and what fills tensors up to a multiple of the
ranks. Ring attention and Ulysses, which share a context by sending its tokens, are here to be compared with.
"""

import math
from dataclasses import dataclass, fields

from cctrain.config import Config, ModelConfig
from cctrain.cost.parameters import parameter_tensors

READ, READ_GRADIENT = "read", "gradient of the read"  # purposes
SENT = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}  # times s · (W − 1) / W
MOST_RANKS_TO_GATHER = 8  # as model/merge has it


@dataclass(frozen=True)
class Gathering:
    """How ZeRO 3 gathers weights: DeepSpeed's options of these names and its own values for them, in numbers."""

    stage3_param_persistence_threshold: int = 100_000
    stage3_prefetch_bucket_size: int = 50_000_000
    stage3_max_live_parameters: int = 1_000_000_000


DEEPSPEEDS_OWN = Gathering()


def gathering_of(config: Config) -> Gathering:
    options = config.deepspeed.get("zero_optimization", {})
    return Gathering(**{one.name: int(options[one.name]) for one in fields(Gathering) if one.name in options})


@dataclass(frozen=True)
class Collective:
    """`times` an operation in SENT among `ranks` ranks, each with a payload of so many bytes, in so many calls."""

    purpose: str
    operation: str
    payload: float
    ranks: int
    times: int = 1
    calls: int = 1

    @property
    def sent(self) -> float:
        return self.times * sent(self.operation, self.payload, self.ranks)


def sent(operation: str, payload: float, ranks: int) -> float:
    """Bytes that a rank sends in one call."""
    return SENT[operation] * payload * (ranks - 1) / ranks


def exchange_of_a_layer(model: ModelConfig, contexts: float, ranks: int) -> list[Collective]:
    """Of a micro-batch of so many contexts, each shared by `ranks` ranks, forward and backward; none if that is 1."""
    if ranks == 1 or model.attention == "dense":
        return []
    read, logs = (4 * contexts * model.latents * numbers for numbers in (model.width, model.heads))
    forward = (
        [Collective(READ, "all_gather", ranks * (read + logs), ranks)]
        if ranks <= MOST_RANKS_TO_GATHER
        else [Collective(READ, "all_reduce", logs, ranks), Collective(READ, "all_reduce", read + logs, ranks)]
    )
    return [*forward, Collective(READ_GRADIENT, "all_reduce", read, ranks)]


def zero(
    model: ModelConfig,
    num_genes: int,
    stage: int,
    element_bytes: int,
    ranks: int,
    micro_batches: int,
    gathering: Gathering = DEEPSPEEDS_OWN,
) -> list[Collective]:
    """Of one step, among all ranks; `element_bytes` of weights and gradients, 2 in half precision."""
    if ranks == 1:
        return []
    tensors = parameter_tensors(model, num_genes)
    total = element_bytes * sum(size * number for _, size, number in tensors)
    if stage < 3:
        gradients = Collective("gradients", "all_reduce", total, ranks, micro_batches if stage == 2 else 1)
        return [gradients] if stage == 0 else [gradients, Collective("parameters", "all_gather", total, ranks)]
    small = [one for one in tensors if one.size <= gathering.stage3_param_persistence_threshold]
    num_large = sum(one.number for one in tensors) - sum(one.number for one in small)
    large = total // element_bytes - sum(one.size * one.number for one in small)
    fetched = gathering.stage3_prefetch_bucket_size
    if fetched and large <= gathering.stage3_max_live_parameters:
        passes, calls = 1, min(num_large, math.ceil(large / fetched))
    else:
        passes, calls = 2, num_large
    return [
        Collective("gradients", "reduce_scatter", total, ranks, micro_batches),
        Collective("parameters", "all_gather", element_bytes * large, ranks, passes * micro_batches, calls),
        *(Collective("small parameters", "all_gather", element_bytes * one.size, ranks, one.number) for one in small),
    ]


def never_partitioned(model: ModelConfig, num_genes: int, up_to: int) -> int:
    """Parameters, in numbers, of tensors that every rank has whole under ZeRO 3, too."""
    tensors = parameter_tensors(model, num_genes)
    return sum(size * number for _, size, number in tensors if size <= up_to)


def ring_of_a_layer(tokens: int, width: int, ranks: int, element_bytes: int) -> tuple[float, float]:
    """Bytes sent forward and backward: K and V travel round (Liu, Zaharia and Abbeel 2023), then with dK and dV.

    The least: dK and dV set out one rank after K and V, so that they end at home; often they make a hop more.
    """
    keys = element_bytes * tokens / ranks * width * (ranks - 1)
    return 2 * keys, 4 * keys


def ulysses_of_a_layer(tokens: int, width: int, ranks: int, element_bytes: int) -> tuple[float, float]:
    """Bytes sent forward and backward: Q, K, V and the result change hands (Jacobs et al. 2023), then gradients."""
    queries = element_bytes * tokens / ranks * width * (ranks - 1) / ranks
    return 4 * queries, 4 * queries
