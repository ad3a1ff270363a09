"""What a step costs, as every line of the journal says it, and MLflow under `cost/`: README.md has these names."""

from collections.abc import Sequence

from cctrain.config import Config, ModelConfig
from cctrain.cost.flops import step_flops
from cctrain.cost.traffic import exchange_of_a_layer, gathering_of, zero
from cctrain.cost.work import ELEMENT_BYTES


def step_cost(
    model: ModelConfig, tokens: Sequence[float], targets: int, checkpointing: bool = False, zero_stage: int = 0
) -> dict[str, float]:
    """The `cost/…` values of one training step over contexts with these numbers of tokens.

    n is the mean number of tokens of a context; FLOPs are of forward, backward and recomputation together.
    """
    flops = step_flops(model, tokens, targets, checkpointing, zero_stage)
    n, attention, total = sum(tokens) / len(tokens), flops.attention, flops.total
    cost = {
        "cost/n": n,
        "cost/attention_flops": attention,
        "cost/total_flops": total,
        "cost/attention_share": attention / total,
    }
    if model.attention == "criss_cross":
        cost |= {"cost/M": model.latents, "cost/n_times_M": n * model.latents}
    return cost


def step_traffic(config: Config, num_genes: int, contexts: int, micro_batches: int, ranks: int) -> dict[str, float]:
    """`cost/sent_bytes`, that a rank sends in a step over so many contexts in all, for context ranks and ZeRO together;
    on average, where ranks have unequal numbers of contexts. Nothing of one rank, which sends none."""
    if ranks == 1:
        return {}
    model, context_ranks = config.model, config.parallel.context
    of_layer = exchange_of_a_layer(model, contexts * context_ranks / ranks, context_ranks)
    element_bytes = ELEMENT_BYTES[config.training.precision]
    stage, gathering = config.parallel.zero_stage, gathering_of(config)
    of_zero = zero(model, num_genes, stage, element_bytes, ranks, micro_batches, gathering)
    return {"cost/sent_bytes": model.depth * sum(one.sent for one in of_layer) + sum(one.sent for one in of_zero)}
