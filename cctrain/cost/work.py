"""What one rank does in a training step: which part of which contexts, in how many micro-batches, and how."""

import math
from dataclasses import dataclass

from cctrain.config import Config, MemoryConfig
from cctrain.cost.traffic import DEEPSPEEDS_OWN, Gathering, gathering_of

DEVIATIONS = 3.0  # of the tokens of a step from their mean: what one step in 740 exceeds
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Contexts:
    """The contexts of a training, on average: tokens in all, targets among them; the genes of its vocabulary. And the
    tokens of the longest; None: all are alike. `unevenness`: the mean of the squares of their tokens over the square of
    the mean."""

    tokens: float
    targets: float
    genes: int
    longest: float | None = None
    unevenness: float = 1.0


@dataclass(frozen=True)
class Load:
    """What a rank holds of one micro-batch: its tokens, of how many contexts, and how many of them are targets."""

    tokens: float
    contexts: float
    targets: float


@dataclass(frozen=True)
class Work:
    """One step: ranks, C of them for each context, and what a rank does of it in each of its micro-batches.

    `fullest` is the most that one is expected to hold in any step, which memory follows; None: no more than others.
    """

    ranks: int
    context_ranks: int
    micro_batches: int
    load: Load
    zero_stage: int
    element_bytes: int
    memory: MemoryConfig
    tile_tokens: int
    gathering: Gathering = DEEPSPEEDS_OWN
    fullest: Load | None = None
    unevenness: float = 1.0  # of contexts, see `Contexts`

    @property
    def most(self) -> Load:
        return self.fullest or self.load


def work_of(config: Config, contexts: Contexts, ranks: int, tile_tokens: int) -> Work:
    """Of the rank that has most to do. The micro-batch of the configuration must have been resolved."""
    context_ranks, together, longest = config.parallel.context, config.data.micro_batch_tokens, contexts.longest
    assert together is not None
    contexts_in_all = -(-config.data.global_batch * context_ranks // ranks)
    held = contexts.tokens / context_ranks
    micro_batches = -(-contexts_in_all // max(1, int(together // held)))
    contexts_each = contexts_in_all / micro_batches
    load = Load(contexts_each * held, contexts_each, contexts_each * contexts.targets / context_ranks)
    return Work(
        ranks,
        context_ranks,
        micro_batches,
        load,
        config.parallel.zero_stage,
        ELEMENT_BYTES[config.training.precision],
        config.memory,
        config.memory.tile_tokens or tile_tokens,
        gathering_of(config),
        None
        if longest is None
        else fullest(load, contexts_in_all, longest / context_ranks, contexts.unevenness, together),
        contexts.unevenness,
    )


def fullest(load: Load, contexts: int, longest: float, unevenness: float, micro_batch_tokens: int) -> Load:
    """Of so many contexts, in the longest step of a thousand, as many as a micro-batch takes. The longest context comes
    some day; that all of them are as long at once is not to be expected."""
    mean = load.tokens / load.contexts
    spread = DEVIATIONS * mean * math.sqrt(contexts * max(0.0, unevenness - 1))  # rounded, equal ones may be below 1
    of_step = min(contexts * longest, max(contexts * mean + spread, longest + (contexts - 1) * mean))
    more = max(1.0, min(of_step, micro_batch_tokens) / load.tokens)
    together = min(contexts, more * load.contexts)
    return Load(more * load.tokens, together, together * load.targets / load.contexts)
