"""`cctrain estimate`: what a training of a configuration will need, on its store or before there is one, here or on
other devices."""

import logging
from dataclasses import replace
from pathlib import Path

from cctrain.config import Config, load_config
from cctrain.cost.devices import load_device
from cctrain.cost.estimate import Estimate, estimate
from cctrain.cost.work import Contexts
from cctrain.data.store.store import open_store
from cctrain.training.data import DEFAULT_MICRO_BATCH_TOKENS, look_at_store

log = logging.getLogger(__name__)


def estimate_configuration(
    path: Path, overrides: list[str], ranks: int, device_name: str | None, tokens: int | None, genes: int
) -> Estimate:
    """Of a configuration file, on its store's contexts or on such of `tokens` tokens; on this machine, measured now,
    or on the device of that name."""
    unused = ["data.store=unused"] if tokens else []
    config = load_config(path, [*overrides, *unused])
    if tokens:
        config, contexts = without_store(config, tokens, genes)
    else:
        config, contexts = look_at_store(config, open_store(Path(config.data.store), config.data.digest))
    ranks = max(ranks, config.parallel.context)
    if device_name is not None:
        return estimate(config, contexts, load_device(device_name, config.training.precision), ranks)
    return estimate_here(config, contexts, ranks)


def estimate_here(config: Config, contexts: Contexts, ranks: int) -> Estimate:
    """The parts by the closed form, from rates measured now, times what a rehearsal took beside its own parts."""
    from cctrain.apply.calibrate import calibrate
    from cctrain.apply.rehearse import rehearse, smaller

    log.info("measuring the parts of a step with %d rank(s), about 15 s", ranks)
    device = calibrate(config.model, config.training.precision, ranks)
    small, short = smaller(config, contexts, ranks, device)
    log.info("rehearsing steps of %s contexts of %s tokens", small.data.global_batch, f"{short.tokens:,.0f}")
    rehearsed, parts = rehearse(small, short, ranks), estimate(small, short, device, ranks)
    beside = max(0.0, rehearsed.memory - parts.needs.memory)
    found = estimate(config, contexts, replace(device, process=beside), ranks)
    factor = rehearsed.seconds / parts.seconds.total
    return replace(found, seconds=found.seconds.scaled(factor), rehearsed_over_parts=factor)


def without_store(config: Config, tokens: int, genes: int) -> tuple[Config, Contexts]:
    """As if every context had so many tokens, of which the objective's share are targets."""
    held = -(-tokens // config.parallel.context)
    config.data.micro_batch_tokens = config.data.micro_batch_tokens or max(DEFAULT_MICRO_BATCH_TOKENS, held)
    if config.model.cell_encoding is None:
        config.model.cell_encoding = 0
    return config, Contexts(tokens, tokens * config.objective.target_rate, genes)
