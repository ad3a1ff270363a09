"""What a training will need, before any of it is spent: memory, FLOPs, traffic, checkpoints, time."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cctrain.config import Config, load_config
from cctrain.cost.devices import Device, load_device
from cctrain.cost.memory import ActivationMemory, State, activations, peak, state
from cctrain.cost.parameters import num_parameters, parameters_by_component
from cctrain.cost.step_time import StepSeconds, Work, collectives, rank_flops, step_seconds, work_of
from cctrain.data.loading.contexts import ContextRule
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import UsageError
from cctrain.model.tiles import TILE_TOKENS
from cctrain.training.data import DEFAULT_MICRO_BATCH_TOKENS, resolve, resolve_micro_batch, training_rule

log = logging.getLogger(__name__)

REDUCE_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in numbers
CHECKPOINT_BYTES = 12  # a parameter: weight and both moments in fp32
ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Contexts:
    """The contexts of a training, on average: tokens in all, targets among them; the genes of its vocabulary."""

    tokens: float
    targets: float
    genes: int


@dataclass(frozen=True)
class Estimate:
    config: Config
    contexts: Contexts
    device: Device
    work: Work
    state: State
    activations: ActivationMemory
    seconds: StepSeconds

    @property
    def memory(self) -> float:
        """Bytes of a rank at most."""
        return self.device.process + peak(self.state, self.activations, self.work.micro_batches)


def contexts_of_store(rule: ContextRule, store: TokenStore, loader: Loader) -> Contexts:
    measured = (store.measured * rule.target_probability).sum(axis=1)[store.source_of_cell[: store.num_train]]
    visible = np.minimum(store.num_tokens[: store.num_train], rule.max_tokens)
    cells_each = store.num_train / loader.samples.num_train
    targets = cells_each * float(measured.mean())
    return Contexts(cells_each * float(visible.mean()) + targets, targets, len(store.genes.ids))


def look_at_store(config: Config) -> tuple[Config, Contexts]:
    """The configuration with the defaults that its store decides, and what its contexts are like."""
    store = open_store(Path(config.data.store), config.data.digest)
    config = resolve(config, store)
    rule = training_rule(config, store)
    loader = Loader(store, rule, Share(0, 1, 0, config.parallel.context), 0)
    config.data.micro_batch_tokens = resolve_micro_batch(config, loader)
    return config, contexts_of_store(rule, store, loader)


def without_store(config: Config, tokens: int, genes: int) -> tuple[Config, Contexts]:
    """As if every context had so many tokens, of which the objective's share are targets."""
    held = -(-tokens // config.parallel.context)
    config.data.micro_batch_tokens = config.data.micro_batch_tokens or max(DEFAULT_MICRO_BATCH_TOKENS, held)
    if config.model.cell_encoding is None:
        config.model.cell_encoding = 0
    return config, Contexts(tokens, tokens * config.objective.target_rate, genes)


def estimate(config: Config, contexts: Contexts, device: Device, ranks: int) -> Estimate:
    """Of a resolved configuration. Raises UsageError if its context ranks do not divide the ranks."""
    if ranks % config.parallel.context:
        raise UsageError(f"parallel.context={config.parallel.context} does not divide {ranks} ranks")
    element_bytes, stage = ELEMENT_BYTES[config.training.precision], config.parallel.zero_stage
    tile_tokens = config.memory.tile_tokens or TILE_TOKENS[device.kind]
    work = work_of(
        contexts.tokens,
        contexts.targets,
        config.data.global_batch,
        config.data.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS,
        ranks,
        config.parallel.context,
        stage,
        element_bytes,
        config.memory,
        tile_tokens,
    )
    bucket = config.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", REDUCE_BUCKET)
    if device.kind == "cpu":  # which takes no memory for what is never written
        bucket = min(bucket, num_parameters(config.model, contexts.genes))
    return Estimate(
        config,
        contexts,
        device,
        work,
        state(config.model, contexts.genes, stage, element_bytes, ranks, bucket),
        activations(config.model, contexts.genes, work.load, config.memory, tile_tokens, element_bytes),
        step_seconds(config.model, contexts.genes, work, device),
    )


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
        config, contexts = look_at_store(config)
    ranks = max(ranks, config.parallel.context)
    if device_name is not None:
        return estimate(config, contexts, load_device(device_name, config.training.precision), ranks)
    from cctrain.apply.calibrate import calibrate

    log.info("measuring this machine with %d rank(s), about 20 s", ranks)
    measured = calibrate(config.model, config.training.precision, config.parallel.zero_stage, ranks)
    return estimate(config, contexts, measured, ranks)


def as_json(found: Estimate) -> dict[str, Any]:
    model, work, seconds = found.config.model, found.work, found.seconds
    flops = rank_flops(model, work)
    exchanged, of_zero = collectives(model, found.contexts.genes, work)
    tokens = found.config.data.global_batch * found.contexts.tokens
    parameters = num_parameters(model, found.contexts.genes)
    return {
        "device": asdict(found.device),
        "measured": found.device.measured,
        "ranks": work.ranks,
        "context_ranks": work.context_ranks,
        "micro_batches": work.micro_batches,
        "contexts": asdict(found.contexts),
        "parameters": parameters,
        "parameters_by_component": parameters_by_component(model, found.contexts.genes),
        "memory_bytes": found.memory,
        "device_memory_bytes": found.device.memory,
        "fits": found.memory <= found.device.memory,
        "memory_by_component": {
            "process": found.device.process,
            "state": asdict(found.state),
            "activations": asdict(found.activations),
        },
        "flops_of_a_rank": flops.total,
        "flops_by_component": flops.by_component(),
        "attention_share": flops.attention / flops.total,
        "sent_bytes_of_a_rank": {
            "context ranks": sum(one.sent for one in exchanged),
            "ZeRO": sum(one.sent for one in of_zero),
        },
        "checkpoint_bytes": CHECKPOINT_BYTES * parameters,
        "step_seconds": seconds.total,
        "step_seconds_by_component": asdict(seconds),
        "tokens_per_second": tokens / seconds.total,
        "utilisation": flops.total / seconds.total / found.device.peak,
        "hours": seconds.total * found.config.training.steps / 3600,
        "device_hours": seconds.total * found.config.training.steps * work.ranks / 3600,
        "device_hours_per_billion_tokens": seconds.total / tokens * 1e9 * work.ranks / 3600,
    }


def as_text(found: Estimate) -> str:
    told, config, work = as_json(found), found.config, found.work
    seconds, kept = told["step_seconds_by_component"], found.state
    largest = sorted(seconds.items(), key=lambda item: -item[1])[:4]
    of_components = ", ".join(f"{name} {share:.0%}" for name, share in _shares(told["flops_by_component"]))
    many = f"{work.ranks:,} × {found.device.name}" if work.ranks > 1 else found.device.name
    m = f", {config.model.latents} latents" if config.model.attention == "criss_cross" else ""
    state_of = (kept.weights, kept.masters, kept.moments, kept.gradients, kept.bucket)
    names = ("weights", "masters", "moments", "gradients", "bucket")
    lines = [
        f"on        {many}" + (f", {work.context_ranks} for each context" if work.context_ranks > 1 else ""),
        f"model     {config.model.attention}, {config.model.depth} layers, width {config.model.width}{m}: "
        f"{told['parameters']:,} parameters",
        f"step      {config.data.global_batch:,} contexts of about {found.contexts.tokens:,.0f} tokens, "
        f"{found.contexts.targets:,.0f} of them targets; {work.micro_batches} micro-batch(es) a rank",
        f"memory    {size(found.memory)} of {size(found.device.memory)} a rank: "
        + ("fits" if told["fits"] else "DOES NOT FIT"),
        "          state "
        + ", ".join(f"{name} {size(part)}" for name, part in zip(names, state_of, strict=True) if part)
        + f"; in backward {size(kept.backward)}, in the optimizer's step {size(kept.step)}",
        f"          activations {size(found.activations.total)}"
        + (f", and {size(found.activations.offloaded)} elsewhere" if found.activations.offloaded else "")
        + (f"; the process itself {size(found.device.process)}" if found.device.process else ""),
        f"FLOPs     {told['flops_of_a_rank']:.3g} a step and rank: {of_components}; attention "
        f"{told['attention_share']:.1%}",
        f"traffic   {size(told['sent_bytes_of_a_rank']['ZeRO'])} a step and rank for ZeRO, "
        f"{size(told['sent_bytes_of_a_rank']['context ranks'])} between context ranks",
        f"time      {told['step_seconds']:.3g} s a step: "
        + ", ".join(f"{name} {part / found.seconds.total:.0%}" for name, part in largest)
        + f"; {told['tokens_per_second']:,.0f} tokens/s, {told['utilisation']:.0%} of the peak",
        f"training  {config.training.steps:,} steps: {told['hours']:,.1f} h, {told['device_hours']:,.1f} device-hours; "
        f"{told['device_hours_per_billion_tokens']:,.1f} for a billion tokens",
        f"saving    {size(told['checkpoint_bytes'])} a checkpoint",
        "its parts measured on this machine just now; trainings have taken up to three times as long as their parts, "
        "small ones most, and up to a fifth more memory"
        if found.device.measured
        else "a model of devices that are not here, from data sheets and assumed shares: not a measurement",
    ]
    return "\n".join(lines)


def _shares(parts: dict[str, float]) -> list[tuple[str, float]]:
    total = sum(parts.values())
    return sorted(((name, part / total) for name, part in parts.items() if part), key=lambda item: -item[1])


def size(number: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:,.3g} {unit}"
    return f"{number / 1e3:,.0f} kB"
