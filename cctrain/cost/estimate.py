"""What a training will need, before any of it is spent: memory, FLOPs, traffic, checkpoints, time."""

from dataclasses import asdict, dataclass
from typing import Any

from cctrain.config import Config
from cctrain.cost.devices import Device
from cctrain.cost.flops import Flops, optimizer_flops
from cctrain.cost.memory import ActivationMemory, State, peak, rank_memory
from cctrain.cost.parameters import num_parameters, parameters_by_component
from cctrain.cost.step_time import StepSeconds, collectives, parameters_updated, rank_flops, step_seconds
from cctrain.cost.work import Contexts, Work, work_of
from cctrain.errors import UsageError
from cctrain.model.tiles import TILE_TOKENS

CHECKPOINT_BYTES = 12  # a parameter: weight and both moments in fp32


@dataclass(frozen=True)
class Needs:
    """Of a training, on whatever devices of one kind."""

    config: Config
    contexts: Contexts
    work: Work
    state: State
    activations: ActivationMemory

    @property
    def memory(self) -> float:
        """Bytes of a rank at most, beside the process itself."""
        return peak(self.state, self.activations, self.work.micro_batches)

    @property
    def parameters(self) -> int:
        return num_parameters(self.config.model, self.contexts.genes)

    @property
    def flops(self) -> Flops:
        """Of a step on one rank, in products."""
        return rank_flops(self.config.model, self.work)

    @property
    def optimizer_flops(self) -> float:
        """Of a step on one rank, elementwise."""
        return optimizer_flops(parameters_updated(self.config.model, self.contexts.genes, self.work))

    @property
    def sent_bytes(self) -> dict[str, float]:
        """By one rank in a step."""
        exchanged, of_zero = collectives(self.config.model, self.contexts.genes, self.work)
        return {"context ranks": sum(one.sent for one in exchanged), "ZeRO": sum(one.sent for one in of_zero)}

    @property
    def checkpoint_bytes(self) -> int:
        return CHECKPOINT_BYTES * self.parameters


@dataclass(frozen=True)
class Estimate:
    """The same on one kind of device: whether it fits, and how long a step takes."""

    needs: Needs
    device: Device
    seconds: StepSeconds
    rehearsed_over_parts: float | None = None  # by which the parts' seconds were multiplied, where steps were rehearsed

    @property
    def memory(self) -> float:
        """Bytes of a rank at most."""
        return self.device.process + self.needs.memory

    @property
    def fits(self) -> bool:
        return self.memory <= self.device.memory

    @property
    def hours(self) -> float:
        return self.seconds.total * self.needs.config.training.steps / 3600


def needs_of(config: Config, contexts: Contexts, ranks: int, device_kind: str) -> Needs:
    """Of a resolved configuration; the kind is cuda or cpu. Raises UsageError if its context ranks do not divide the
    ranks."""
    if ranks % config.parallel.context:
        raise UsageError(f"parallel.context={config.parallel.context} does not divide {ranks} ranks")
    work = work_of(config, contexts, ranks, TILE_TOKENS[device_kind])
    return Needs(config, contexts, work, *rank_memory(config, contexts.genes, work))


def estimate(config: Config, contexts: Contexts, device: Device, ranks: int) -> Estimate:
    """As `needs_of`."""
    needs = needs_of(config, contexts, ranks, device.kind)
    return Estimate(needs, device, step_seconds(config.model, contexts.genes, needs.work, device))


def as_json(found: Estimate) -> dict[str, Any]:
    needs, seconds = found.needs, found.seconds.total
    model, work, flops = needs.config.model, needs.work, needs.flops
    tokens = needs.config.data.global_batch * needs.contexts.tokens
    return {
        "device": asdict(found.device),
        "measured": found.device.measured,
        "ranks": work.ranks,
        "context_ranks": work.context_ranks,
        "micro_batches": work.micro_batches,
        "contexts": asdict(needs.contexts),
        "parameters": needs.parameters,
        "parameters_by_component": parameters_by_component(model, needs.contexts.genes),
        "memory_bytes": found.memory,
        "device_memory_bytes": found.device.memory,
        "fits": found.fits,
        "memory_by_component": {
            "process": found.device.process,
            "state": asdict(needs.state),
            "activations": asdict(needs.activations),
        },
        "product_flops_of_a_rank": flops.total,
        "flops_by_component": {**flops.by_component(), "optimizer": needs.optimizer_flops},
        "attention_share": flops.attention / flops.total,
        "sent_bytes_of_a_rank": needs.sent_bytes,
        "checkpoint_bytes": needs.checkpoint_bytes,
        "step_seconds": seconds,
        "step_seconds_by_component": asdict(found.seconds),
        "rehearsed_over_parts": found.rehearsed_over_parts,
        "tokens_per_second": tokens / seconds,
        "utilisation": flops.total / seconds / found.device.peak,
        "hours": found.hours,
        "device_hours": found.hours * work.ranks,
        "device_hours_per_billion_tokens": seconds / tokens * 1e9 * work.ranks / 3600,
    }


def as_text(found: Estimate) -> str:
    told, needs, work = as_json(found), found.needs, found.needs.work
    config, kept, made = needs.config, needs.state, needs.activations
    largest = _shares(told["step_seconds_by_component"])[:4]
    of_components = ", ".join(f"{name} {share:.0%}" for name, share in _shares(needs.flops.by_component()))
    many = f"{work.ranks:,} × {found.device.name}" if work.ranks > 1 else found.device.name
    m = f", {config.model.latents} latents" if config.model.attention == "criss_cross" else ""
    state_of = (kept.weights, kept.masters, kept.moments, kept.gradients, kept.bucket)
    names = ("weights", "masters", "moments", "gradients", "bucket")
    lines = [
        f"on        {many}" + (f", {work.context_ranks} for each context" if work.context_ranks > 1 else ""),
        f"model     {config.model.attention}, {config.model.depth} layers, width {config.model.width}{m}: "
        f"{needs.parameters:,} parameters",
        f"step      {config.data.global_batch:,} contexts of about {needs.contexts.tokens:,.0f} tokens, "
        f"{needs.contexts.targets:,.0f} of them targets; {work.micro_batches} micro-batch(es) a rank",
        f"memory    {size(found.memory)} of {size(found.device.memory)} a rank: "
        + ("fits" if found.fits else "DOES NOT FIT"),
        "          state "
        + ", ".join(f"{name} {size(part)}" for name, part in zip(names, state_of, strict=True) if part)
        + f"; in backward {size(kept.backward)}, in the optimizer's step {size(kept.step)}",
        f"          activations {size(made.total)}"
        + (f", and {size(made.offloaded)} elsewhere" if made.offloaded else "")
        + (f"; the process itself {size(found.device.process)}" if found.device.process else ""),
        f"FLOPs     {needs.flops.total:.3g} a step and rank: {of_components}; attention {told['attention_share']:.1%}",
        f"          and {needs.optimizer_flops:.3g} of the optimizer, elementwise: "
        "attention's share and that of the peak are without them",
        f"traffic   {size(needs.sent_bytes['ZeRO'])} a step and rank for ZeRO, "
        f"{size(needs.sent_bytes['context ranks'])} between context ranks",
        f"time      {told['step_seconds']:.3g} s a step: "
        + ", ".join(f"{name} {share:.0%}" for name, share in largest)
        + f"; {told['tokens_per_second']:,.0f} tokens/s, {told['utilisation']:.0%} of the peak",
        f"training  {config.training.steps:,} steps: {told['hours']:,.1f} h, {told['device_hours']:,.1f} device-hours; "
        f"{told['device_hours_per_billion_tokens']:,.1f} for a billion tokens",
        f"saving    {size(needs.checkpoint_bytes)} a checkpoint",
        "measured on this machine just now: the steps that were rehearsed took "
        f"{found.rehearsed_over_parts:.2f} times as long as their parts, and so will these"
        if found.rehearsed_over_parts
        else "a model of devices that are not here, from data sheets and assumed shares: not a measurement",
    ]
    return "\n".join(lines)


def summary(needs: Needs, device: Device | None = None) -> str:
    """Two lines: what each rank needs; on such a device, whether it fits and how long it takes."""
    work, flops = needs.work, needs.flops
    first = (
        f"needs {size(needs.memory)} on each of {work.ranks:,} rank(s), {flops.total:.3g} FLOPs a step there "
        f"(attention {flops.attention / flops.total:.0%}), {size(sum(needs.sent_bytes.values()))} sent, "
        f"{size(needs.checkpoint_bytes)} a checkpoint"
    )
    if device is None:
        return first
    config = needs.config
    found = Estimate(needs, device, step_seconds(config.model, needs.contexts.genes, work, device))
    verdict = "fits" if found.fits else "DOES NOT FIT"
    return (
        f"{first}\n{verdict} into the {size(device.memory)} of {device.name}; "
        f"about {found.seconds.total:.3g} s a step, "
        f"{found.hours:,.1f} h for {config.training.steps:,} steps (a model, not a measurement)"
    )


def _shares(parts: dict[str, float]) -> list[tuple[str, float]]:
    total = sum(parts.values())
    return sorted(((name, part / total) for name, part in parts.items() if part), key=lambda item: -item[1])


def size(number: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:,.3g} {unit}"
    return f"{number / 1e3:,.0f} kB"
