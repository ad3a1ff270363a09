"""What a step costs, as every line of the journal says it, and MLflow under `cost/`."""

from cctrain.config import ModelConfig
from cctrain.cost.flops import step_flops


def step_cost(
    model: ModelConfig, tokens: list[int], targets: int, checkpointing: bool = False, zero_stage: int = 0
) -> dict[str, float]:
    """The `cost/…` values of one training step over contexts with these numbers of tokens.

    n is the mean number of tokens of a context; FLOPs are of forward, backward and recomputation together.
    """
    flops = step_flops(model, tokens, targets, checkpointing, zero_stage)
    n = sum(tokens) / len(tokens)
    cost = {
        "cost/n": n,
        "cost/attention_flops": flops.attention,
        "cost/total_flops": flops.total,
        "cost/attention_share": flops.attention / flops.total,
    }
    if model.attention == "criss_cross":
        cost |= {"cost/M": model.latents, "cost/n_times_M": n * model.latents}
    return cost
