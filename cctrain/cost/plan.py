"""Training past the machines at hand: criss-cross with context parallelism beside dense attention, computed.

    python -m cctrain.cost.plan [--device h100] [--gpus 8 64 512 4096]

prints the table of `README.md` in this folder. A step holds 100 million tokens, in contexts of 100 thousand to 100
million. A context is shared by as few GPUs as hold it, a power of two, and by more where there are more GPUs than
contexts; ZeRO 3 among all. Dense attention shares it by ring attention, which overlaps what it sends with attention, or
by Ulysses, on as many ranks as there are heads. A model, not a measurement.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cctrain.config import Config, MemoryConfig, ModelConfig
from cctrain.cost.devices import USABLE, Device, load_device
from cctrain.cost.memory import peak, rank_memory
from cctrain.cost.parameters import num_parameters
from cctrain.cost.step_time import collectives, seconds_of, step_seconds
from cctrain.cost.traffic import Collective, ring_of_a_layer, ulysses_of_a_layer
from cctrain.cost.work import Load, Work
from cctrain.words import duration, model_in_words

TOKENS_OF_A_STEP = 100_000_000
LENGTHS, GPUS = (100_000, 1_000_000, 10_000_000, 100_000_000), (8, 64, 512, 4096)
GENES, TARGET_SHARE, TILE_TOKENS, ELEMENT_BYTES = 60_000, 0.05, 65_536, 2
MODEL = ModelConfig(width=1024, depth=24, heads=16, latents=256)
# At the same number of parameters dense has about twice the layers.
DENSE = replace(MODEL, attention="dense", depth=2 * MODEL.depth)
MEMORY = MemoryConfig(checkpointing=True)
KINDS = ("criss-cross", "dense, ring", "dense, Ulysses")


@dataclass(frozen=True)
class Row:
    """`seconds` of a step, `sent` bytes of a GPU, `efficiency` against as many GPUs that need not speak to each other;
    None where no number of them holds a context."""

    kind: str
    tokens: int
    gpus: int
    context_ranks: int | None = None
    seconds: float = float("nan")
    sent: float = float("nan")
    efficiency: float = float("nan")


def rows(device: Device, all_gpus: tuple[int, ...] = GPUS) -> Iterator[Row]:
    for tokens in LENGTHS:
        for gpus in all_gpus:
            for kind in KINDS:
                yield row(kind, tokens, gpus, device)


def row(kind: str, tokens: int, gpus: int, device: Device) -> Row:
    model = MODEL if kind == KINDS[0] else DENSE
    contexts = TOKENS_OF_A_STEP // tokens
    most = MODEL.heads if kind == KINDS[2] else gpus
    sharing = [2**k for k in range(gpus.bit_length()) if gpus % 2**k == 0 and 2**k <= most and gpus // 2**k <= contexts]
    for context_ranks in sharing:
        work = work_of_a_step(tokens, contexts, gpus, context_ranks)
        if device.process + memory_of(model, work) <= USABLE * device.memory:
            return planned(kind, model, work, tokens, device)
    return Row(kind, tokens, gpus)


def work_of_a_step(tokens: int, contexts: int, gpus: int, context_ranks: int) -> Work:
    micro_batches = -(-contexts * context_ranks // gpus)
    held = tokens / context_ranks
    load = Load(held, 1, TARGET_SHARE * held)
    return Work(gpus, context_ranks, micro_batches, load, 3, ELEMENT_BYTES, MEMORY, TILE_TOKENS)


def memory_of(model: ModelConfig, work: Work) -> float:
    held, made = rank_memory(Config(model=model), GENES, work)
    return peak(held, made, work.micro_batches)


def planned(kind: str, model: ModelConfig, work: Work, tokens: int, device: Device) -> Row:
    taken = step_seconds(model, GENES, work, device)
    exchanged, of_zero = collectives(model, GENES, work)
    sent = sum(one.sent for one in (*exchanged, *of_zero))
    seconds = taken.total
    if kind != KINDS[0] and work.context_ranks > 1:
        attention_sends, waits = dense_traffic(kind, model, work, tokens, device, taken.attention)
        sent, seconds = sent + attention_sends, seconds + waits
    alone = replace(work, context_ranks=1, load=Load(tokens, 1, TARGET_SHARE * tokens))
    computing = step_seconds(model, GENES, alone, device)
    ideal = (computing.total - computing.zero) / work.context_ranks
    return Row(kind, tokens, work.ranks, work.context_ranks, seconds, sent, ideal / seconds)


def dense_traffic(
    kind: str, model: ModelConfig, work: Work, tokens: int, device: Device, attention_seconds: float
) -> tuple[float, float]:
    """Bytes that a GPU sends in a step for its attention, forward, recomputed and backward; and how long it waits."""
    law = ring_of_a_layer if kind == KINDS[1] else ulysses_of_a_layer
    forward, backward = law(tokens, model.width, work.context_ranks, ELEMENT_BYTES)
    sent = work.micro_batches * model.depth * (2 * forward + backward)
    hops = (work.context_ranks - 1 if kind == KINDS[1] else 4) * 3 * model.depth * work.micro_batches
    as_collective = Collective(kind, "all_gather", 0, work.context_ranks, hops)
    rate = device.inside if work.context_ranks <= device.per_node else device.between
    seconds = sent / rate + seconds_of(as_collective, device)
    return sent, max(0.0, seconds - attention_seconds) if kind == KINDS[1] else seconds


def subject() -> str:
    """What the table is about, in Markdown."""
    models = [f"- {model_in_words(model)}: {num_parameters(model, GENES):,} parameters" for model in (MODEL, DENSE)]
    step = f"{TOKENS_OF_A_STEP:,} tokens a step, {TARGET_SHARE:.0%} of them targets, {GENES:,} genes"
    return "\n".join([*models, f"- {step}; bf16, checkpointing, ZeRO 3"])


def table(found: Iterator[Row]) -> str:
    """Markdown."""
    lines = [
        "| tokens of a context | GPUs | | GPUs a context | a step | sent by a GPU | efficiency |",
        "|--:|--:|---|--:|--:|--:|--:|",
    ]
    for one in found:
        where = f"| {one.tokens:,} | {one.gpus:,} | {one.kind} |"
        if one.context_ranks is None:
            lines.append(f"{where} does not fit | | | |")
            continue
        sent = f"{one.sent / 1e9:,.0f} GB"
        lines.append(f"{where} {one.context_ranks:,} | {duration(one.seconds)} | {sent} | {one.efficiency:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h100", help="a name in devices/, or a YAML file (default: %(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    arguments = parser.parse_args()
    print(subject() + "\n")
    print(table(rows(load_device(arguments.device, "bf16"), tuple(arguments.gpus))))
