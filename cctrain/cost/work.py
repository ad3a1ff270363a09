"""What one rank does in a training step: which part of which contexts, in how many micro-batches, and how."""

from dataclasses import dataclass

from cctrain.config import Config, MemoryConfig
from cctrain.cost.traffic import DEEPSPEEDS_OWN, Gathering, gathering_of

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Contexts:
    """The contexts of a training, on average: tokens in all, targets among them; the genes of its vocabulary."""

    tokens: float
    targets: float
    genes: int


@dataclass(frozen=True)
class Load:
    """What a rank holds of one micro-batch: its tokens, of how many contexts, and how many of them are targets."""

    tokens: float
    contexts: float
    targets: float


@dataclass(frozen=True)
class Work:
    """One step: ranks, C of them for each context, and what a rank does of it in each of its micro-batches."""

    ranks: int
    context_ranks: int
    micro_batches: int
    load: Load
    zero_stage: int
    element_bytes: int
    memory: MemoryConfig
    tile_tokens: int
    gathering: Gathering = DEEPSPEEDS_OWN


def work_of(config: Config, contexts: Contexts, ranks: int, tile_tokens: int) -> Work:
    """Of the rank that has most to do. The micro-batch of the configuration must have been resolved."""
    context_ranks, together = config.parallel.context, config.data.micro_batch_tokens
    assert together is not None
    contexts_in_all = -(-config.data.global_batch * context_ranks // ranks)
    held = contexts.tokens / context_ranks
    micro_batches = -(-contexts_in_all // max(1, int(together // held)))
    contexts_each = contexts_in_all / micro_batches
    return Work(
        ranks,
        context_ranks,
        micro_batches,
        Load(contexts_each * held, contexts_each, contexts_each * contexts.targets / context_ranks),
        config.parallel.zero_stage,
        ELEMENT_BYTES[config.training.precision],
        config.memory,
        config.memory.tile_tokens or tile_tokens,
        gathering_of(config),
    )
