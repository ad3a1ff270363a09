"""`cctrain estimate`: what a training of a configuration will need, on its store or before there is one, here or on
other devices."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from cctrain.config import Config, load_config
from cctrain.cost.devices import Device, load_device, save_device
from cctrain.cost.estimate import Estimate, estimate, needs_of
from cctrain.cost.work import Contexts
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import UsageError
from cctrain.launch.local import default_ranks
from cctrain.parallel.mesh import find_device_kind
from cctrain.training.data import DEFAULT_MICRO_BATCH_TOKENS, look_at_store
from cctrain.words import duration

log = logging.getLogger(__name__)


def estimate_configuration(
    path: Path,
    overrides: list[str],
    ranks: int | None,
    device_name: str | None,
    tokens: int | None,
    genes: int,
    kept_in: Path | None = None,
) -> Estimate:
    """Of a configuration file, on its store's contexts or on such of `tokens` tokens; on the device of that name or
    file, or on this machine, measured now and kept in `kept_in`. Without `ranks` they are those of this machine, or
    those that the file was measured with. Raises UsageError if `kept_in` cannot be a new file."""
    if kept_in is not None:
        check_file_to_save(kept_in, device_name)
    unused = ["data.store=unused"] if tokens else []
    config = load_config(path, [*overrides, *unused])
    device = None if device_name is None else load_device(device_name, config.training.precision)
    if tokens:
        config = without_store(config, tokens)
        contexts_of = partial(contexts_without_store, genes=genes)
    else:
        store = open_store(Path(config.data.store), config.data.digest)
        config, _ = look_at_store(config, store)
        contexts_of = partial(contexts_from_store, store=store)
    contexts = contexts_of(config)
    if ranks is None:
        measured = device and device.measured
        ranks = measured.ranks if measured else default_ranks() if device is None else 1
    ranks = max(ranks, config.parallel.context)
    if device is None:
        device = measure_here(config, contexts_of, ranks)
        if kept_in is not None:
            save_device(device, kept_in)
            log.info("kept in %s: --device %s reads it in place of measuring", kept_in, kept_in)
    return estimate(config, contexts, device, ranks)


def check_file_to_save(path: Path, device_name: str | None) -> None:
    """Before a minute of measuring. Raises UsageError."""
    if device_name is not None:
        raise UsageError(f"--save-device keeps what is measured here, and --device {device_name} measures nothing")
    if path.exists():
        raise UsageError(f"{path} exists already: choose another --save-device FILE, or move it away")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to write {path.name} to")


def measure_here(config: Config, contexts_of: Callable[[Config], Contexts], ranks: int) -> Device:
    """The rates of the parts of a step, and what a rehearsal takes and holds beside its own parts."""
    from cctrain.apply.calibrate import calibrate
    from cctrain.apply.rehearse import expected_seconds, few_tokens, rehearse, smaller
    from cctrain.training.engine import check_precision

    kind = find_device_kind()
    check_precision(config.training.precision, kind)
    needs_of(config, contexts_of(config), ranks, kind)  # what it refuses is refused before anything is measured
    log.info("measuring the parts of a step with %d rank(s), about 15 s", ranks)
    device = calibrate(config.model, config.training.precision, ranks)
    small, short = smaller(config, contexts_of, ranks, device)
    tokens = f"{short.tokens:,.0f}"
    parts = estimate(small, short, device, ranks)
    took = duration(expected_seconds(parts.seconds.total))
    log.info("rehearsing steps of %d contexts of about %s tokens, about %s", small.data.global_batch, tokens, took)
    rehearsed = rehearse(small, short, ranks)
    process = max(0.0, rehearsed.memory_of_few_tokens - needs_of(small, few_tokens(short), ranks, device.kind).memory)
    return replace(
        device,
        process=process,
        growth=rehearsed.growth,
        held_over_needed=max(1.0, (rehearsed.memory - process) / parts.needs.memory),
        rehearsed_over_parts=rehearsed_over_parts(rehearsed.steps, small, device, ranks),
    )


def rehearsed_over_parts(steps: list[tuple[float, Contexts]], config: Config, device: Device, ranks: int) -> float:
    """How many times as long as its own parts a step takes. A few steps have contexts of other lengths than those of
    the whole training; what a step takes beyond its parts is much the same."""
    return median(seconds / estimate(config, contexts, device, ranks).seconds.total for seconds, contexts in steps)


def contexts_from_store(config: Config, store: TokenStore) -> Contexts:
    return look_at_store(config, store)[1]


def without_store(config: Config, tokens: int) -> Config:
    """As if every context had so many tokens; the configuration may be of a run, which had a store."""
    held = -(-tokens // config.parallel.context)
    encoding = config.model.cell_encoding or 0
    micro_batch = config.data.micro_batch_tokens or max(DEFAULT_MICRO_BATCH_TOKENS, held)
    data = replace(config.data, digest=None, max_tokens=tokens, micro_batch_tokens=micro_batch)
    return replace(config, data=data, model=replace(config.model, cell_encoding=encoding))


def contexts_without_store(config: Config, genes: int) -> Contexts:
    """All of `data.max_tokens` tokens, of which the objective's share are targets."""
    tokens = config.data.max_tokens or 0
    return Contexts(tokens, tokens * config.objective.target_rate, genes)
