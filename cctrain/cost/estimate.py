"""What a training will need, before any of it is spent: memory, FLOPs, traffic, checkpoints, time."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from cctrain.config import Config
from cctrain.cost.devices import USABLE, Device
from cctrain.cost.flops import Flops, optimizer_flops
from cctrain.cost.memory import ActivationMemory, State, peak, rank_memory
from cctrain.cost.parameters import num_parameters, parameters_by_component
from cctrain.cost.step_time import StepSeconds, collectives, parameters_updated, rank_flops, step_seconds
from cctrain.cost.work import Contexts, Work, work_of
from cctrain.errors import UsageError
from cctrain.model.tiles import TILE_TOKENS
from cctrain.words import model_in_words

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
    def tokens_of_a_step(self) -> float:
        return self.config.data.global_batch * self.contexts.tokens

    @property
    def checkpoint_bytes(self) -> int:
        return CHECKPOINT_BYTES * self.parameters


@dataclass(frozen=True)
class Estimate:
    """The same on one kind of device: whether it fits, and how long a step takes."""

    needs: Needs
    device: Device
    seconds: StepSeconds

    @property
    def memory(self) -> float:
        """Bytes of a rank at most."""
        return self.device.process + self.device.growth + self.device.held_over_needed * self.needs.memory

    @property
    def usable(self) -> float:
        """Bytes of a rank's device."""
        return USABLE * self.device.memory

    @property
    def fits(self) -> bool:
        return self.memory <= self.usable

    @property
    def offloaded_of_a_node(self) -> float:
        """Bytes of activations that wait in a node's memory, or on its disk."""
        return min(self.needs.work.ranks, self.device.per_node) * self.needs.activations.offloaded

    def hours_of(self, steps: int) -> float:
        return self.seconds.total * steps / 3600


def needs_of(config: Config, contexts: Contexts, ranks: int, device_kind: str) -> Needs:
    """Of a resolved configuration; the kind is cuda or cpu. Raises UsageError if its context ranks do not divide the
    ranks."""
    if ranks % config.parallel.context:
        raise UsageError(f"parallel.context={config.parallel.context} does not divide {ranks} ranks")
    work = work_of(config, contexts, ranks, TILE_TOKENS[device_kind])
    return Needs(config, contexts, work, *rank_memory(config, contexts.genes, work))


def estimate(config: Config, contexts: Contexts, device: Device, ranks: int) -> Estimate:
    """As `needs_of`."""
    return on_device(needs_of(config, contexts, ranks, device.kind), device)


def on_device(needs: Needs, device: Device) -> Estimate:
    return Estimate(needs, device, step_seconds(needs.config.model, needs.contexts.genes, needs.work, device))


def as_json(found: Estimate, token_budget: float | None = None) -> dict[str, Any]:
    """With what it takes to train on so many tokens, if that is asked."""
    needs, seconds = found.needs, found.seconds.total
    model, work, flops = needs.config.model, needs.work, needs.flops
    tokens, hours = needs.tokens_of_a_step, found.hours_of(needs.config.training.steps)
    return {
        "device": asdict(found.device),
        "measured": found.device.measured is not None,
        "ranks": work.ranks,
        "context_ranks": work.context_ranks,
        "micro_batches": work.micro_batches,
        "contexts": asdict(needs.contexts),
        "parameters": needs.parameters,
        "parameters_by_component": parameters_by_component(model, needs.contexts.genes),
        "memory_bytes": found.memory,
        "device_memory_bytes": found.device.memory,
        "usable_memory_bytes": found.usable,
        "fits": found.fits,
        "memory_by_component": {
            "process": found.device.process,
            "growth": found.device.growth,
            "state": asdict(needs.state),
            "activations": asdict(needs.activations),
            "held_beyond_need": (found.device.held_over_needed - 1) * needs.memory,
        },
        "offloaded_bytes_of_a_node": found.offloaded_of_a_node,
        "product_flops_of_a_rank": flops.total,
        "flops_by_component": {**flops.by_component(), "optimizer": needs.optimizer_flops},
        "attention_share": flops.attention / flops.total,
        "sent_bytes_of_a_rank": needs.sent_bytes,
        "checkpoint_bytes": needs.checkpoint_bytes,
        "step_seconds": seconds,
        "step_seconds_by_component": asdict(found.seconds),
        "rehearsed_over_parts": found.device.rehearsed_over_parts if found.device.measured else None,
        "held_over_needed": found.device.held_over_needed if found.device.measured else None,
        "tokens_per_second": tokens / seconds,
        "utilisation": flops.total / seconds / found.device.peak,
        "tokens": tokens * needs.config.training.steps,
        "hours": hours,
        "device_hours": hours * work.ranks,
        "device_hours_per_billion_tokens": seconds / tokens * 1e9 * work.ranks / 3600,
        "token_budget": None if token_budget is None else of_budget(found, token_budget),
    }


def check_budget(tokens: float | None) -> None:
    """Raises UsageError."""
    if tokens is not None and not 0 < tokens < math.inf:
        raise UsageError(f"--token-budget {tokens:g}: give a number of tokens above 0, such as 10e9")


def of_budget(found: Estimate, tokens: float) -> dict[str, float]:
    steps = math.ceil(tokens / found.needs.tokens_of_a_step)
    hours = found.hours_of(steps)
    return {"tokens": tokens, "steps": steps, "hours": hours, "device_hours": hours * found.needs.work.ranks}


def as_text(found: Estimate, token_budget: float | None = None) -> str:
    told, needs, work, held = as_json(found, token_budget), found.needs, found.needs.work, found.device.held_over_needed
    config, kept, made = needs.config, needs.state, needs.activations
    largest = _shares(told["step_seconds_by_component"])[:4]
    of_components = ", ".join(f"{name} {share:.0%}" for name, share in _shares(needs.flops.by_component()))
    many = f"{work.ranks:,} × {found.device.name}" if work.ranks > 1 else found.device.name
    state_of = (kept.weights, kept.masters, kept.moments, kept.gradients, kept.bucket)
    names = ("weights", "masters", "moments", "gradients", "bucket")
    lines = [
        f"on        {many}" + (f", {work.context_ranks} for each context" if work.context_ranks > 1 else ""),
        f"model     {model_in_words(config.model)}: {needs.parameters:,} parameters",
        f"step      {config.data.global_batch:,} contexts of about {needs.contexts.tokens:,.0f} tokens, "
        f"{needs.contexts.targets:,.0f} of them targets; {work.micro_batches} micro-batch(es) a rank, "
        f"of up to {work.most.tokens:,.0f} tokens",
        f"memory    {size(found.memory)} a rank: {verdict(found)}",
        f"          the other {size(found.device.memory - found.usable)} are left to the allocator's fragmentation",
        "          state "
        + ", ".join(f"{name} {size(part)}" for name, part in zip(names, state_of, strict=True) if part)
        + f"; in backward {size(kept.backward)}, in the optimizer's step {size(kept.step)}",
        f"          activations {size(made.total)}"
        + (f"; the process itself {size(found.device.process)}" if found.device.process else "")
        + (f"; it will grow by {size(found.device.growth)}" if found.device.growth else "")
        + (f"; a rehearsal held {held:.2f} times what is needed" if held != 1 else ""),
        *([offloaded(found)] if made.offloaded else []),
        f"FLOPs     {needs.flops.total:.3g} a step and rank: {of_components}; attention {told['attention_share']:.1%}",
        f"          and {needs.optimizer_flops:.3g} of the optimizer, elementwise: "
        "attention's share and that of the peak are without them",
        f"traffic   {size(needs.sent_bytes['ZeRO'])} a step and rank for ZeRO, "
        f"{size(needs.sent_bytes['context ranks'])} between context ranks",
        f"time      {told['step_seconds']:.3g} s a step: "
        + ", ".join(f"{name} {share:.0%}" for name, share in largest)
        + f"; {told['tokens_per_second']:,.0f} tokens/s, {told['utilisation']:.0%} of the peak",
        "training  " + in_hours({**told, "steps": config.training.steps}),
        *(["budget    " + in_hours(told["token_budget"])] if told["token_budget"] else []),
        f"          {told['device_hours_per_billion_tokens']:,.1f} device-hours for a billion tokens",
        f"saving    {size(needs.checkpoint_bytes)} a checkpoint",
        source(found),
    ]
    return "\n".join(lines)


def in_hours(told: dict[str, Any]) -> str:
    return (
        f"{told['steps']:,} steps, {told['tokens']:,.0f} tokens: {told['hours']:,.1f} h, "
        f"{told['device_hours']:,.1f} device-hours"
    )


def verdict(found: Estimate) -> str:
    return (
        f"{'fits' if found.fits else 'DOES NOT FIT'} into {size(found.usable)} of the {size(found.device.memory)} of "
        f"{found.device.name}"
    )


def offloaded(found: Estimate) -> str:
    config, needs = found.needs.config, found.needs
    where = "the memory of a node's host" if config.memory.offload == "host" else "files of a node"
    return (
        f"          offloaded {size(needs.activations.offloaded)} a rank: {size(found.offloaded_of_a_node)} in {where}"
    )


def source(found: Estimate) -> str:
    """How far the times can be believed."""
    device, measured = found.device, found.device.measured
    if measured is None:
        return "a model of devices that are not here, from data sheets and assumed shares: not a measurement"
    when = "measured on this machine just now"
    if measured.file is not None:
        when = (
            f"measured on {device.name} on {measured.date} with {measured.ranks} rank(s) and {measured.model} in "
            f"{measured.precision}, and kept in {measured.file}"
        )
    if (measured.model, measured.ranks) != (model_in_words(found.needs.config.model), found.needs.work.ranks):
        return f"{when}; of another model or number of ranks, as here, this is no measurement"
    factor = f"{device.rehearsed_over_parts:.2f} times as long as their parts, and so will these"
    return f"{when}: the steps that were rehearsed took {factor}"


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
    found, steps = on_device(needs, device), needs.config.training.steps
    return (
        f"{first}\na rank comes to hold {size(found.memory)}, the process and all, and {verdict(found)}; "
        f"about {found.seconds.total:.3g} s a step, {found.hours_of(steps):,.1f} h for {steps:,} steps "
        + ("(by rates measured on such a machine)" if device.measured else "(a model, not a measurement)")
    )


def _shares(parts: dict[str, float]) -> list[tuple[str, float]]:
    total = sum(parts.values())
    return sorted(((name, part / total) for name, part in parts.items() if part), key=lambda item: -item[1])


def size(number: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= factor:
            return f"{number / factor:,.3g} {unit}"
    return f"{number / 1e3:,.0f} kB"
