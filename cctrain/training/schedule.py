"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

import math

from cctrain.config import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Learning rate of step `step`, counted from 1 to `training.steps`.

    Linear warm-up, then `cosine`: half a cosine from the peak to its final share; or `wsd` (warm-up, stable,
    decay; Hu et al. 2024): the peak until the last `decay` of the steps, then linear to the final share.
    """
    warmup = min(training.warmup, training.steps)
    if step <= warmup:
        return training.learning_rate * step / warmup
    floor = training.final_learning_rate
    if training.schedule == "cosine":
        progress = (step - warmup) / max(1, training.steps - warmup)
        share = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay_steps = max(1, min(round(training.decay * training.steps), training.steps - warmup))
        progress = max(0, step - (training.steps - decay_steps)) / decay_steps
        share = 1 - (1 - floor) * progress
    return training.learning_rate * share
