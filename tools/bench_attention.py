"""How long read and write take, beside what bounds them and beside the alternatives, all timed in one run.

    python -m tools.bench_attention [--tokens N ...] [--latents M ...] [--head-width D ...] [--out FILE]

For one context of n tokens, M latents and width d = heads · head width, it times forward and backward of

    read, write          by cctrain's backend, and by PyTorch's SDPA on the same tensors without folding
    read and write       cctrain's two beside bidirectional attention with one shared score matrix (BiXT, Hiller
                         et al. 2024) in plain PyTorch
    with projections     read and write with their eight linear maps, beside the criss-cross attention of
                         simpler-flash, if that is installed (see tools/compare_simpler_flash.py)
    dense                SDPA self-attention over the n tokens, up to --dense-up-to tokens, beside read and write

The floor is the larger of FLOPs over the matrix-multiply rate and bytes over the copy rate, both measured in the
same run on the same device: read or write cost 4·n·M·d FLOPs forward and 10·n·M·d backward, and move 2·n·d
elements forward and 4·n·d backward (keys and values, or queries and outputs, and their gradients; the latents come
on top). `of floor` is floor / measured: 100 % is the roofline.

The alternatives take turns, round by round, and medians are compared: ratios are trustworthy on a noisy machine,
times are not. On a GPU the defaults are 1,048,576 tokens, 64 to 512 latents, width 1,024, bf16; on a CPU 4,096 to
65,536 tokens, 64 latents, width 256, fp32, one thread, minutes.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cctrain.model import attention
from cctrain.training.engine import DTYPES
from tools.compare_simpler_flash import INSTALL, load_simpler_flash
from tools.record import add_out, circumstances, keep

GPU_SDPA = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


@dataclass(frozen=True)
class Shape:
    tokens: int
    latents: int
    heads: int
    head_width: int
    dtype: str

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes that cannot be avoided."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Candidate:
    """forward() computes outputs from inputs; the costs are None where no floor is claimed."""

    operation: str
    name: str
    forward: Callable[[], tuple[Tensor, ...]]
    inputs: list[Tensor]
    costs: tuple[Cost, Cost] | None = None


@dataclass(frozen=True)
class Ceilings:
    flops_per_second: float
    bytes_per_second: float

    def best(self, other: "Ceilings") -> "Ceilings":
        return Ceilings(
            max(self.flops_per_second, other.flops_per_second), max(self.bytes_per_second, other.bytes_per_second)
        )

    def floor(self, cost: Cost) -> float:
        """Seconds that the cost takes at least."""
        return max(cost.flops / self.flops_per_second, cost.bytes / self.bytes_per_second)


def main() -> None:
    arguments = parsed()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"{device_name(device)}, torch {torch.__version__}")
    results = []
    for shape in shapes(arguments):
        # Before and after, because the device may be busy with something else at either time.
        before = measured_ceilings(device, DTYPES[shape.dtype], arguments.repeats)
        rows = list(measure(candidates(shape, device, arguments.dense_up_to), device, arguments.repeats))
        ceilings = before.best(measured_ceilings(device, DTYPES[shape.dtype], arguments.repeats))
        rows = with_floors(rows, ceilings)
        print(table(shape, rows, ceilings), flush=True)
        results.append({**asdict(shape), "ceilings": asdict(ceilings), "rows": rows})
    machine = {"device": device_name(device), "threads": torch.get_num_threads(), "load_average": os.getloadavg()}
    found = circumstances("torch", cuda=torch.version.cuda, **machine)
    keep(found | {"repeats": arguments.repeats, "results": results}, arguments.out)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_gpu else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="n, of one context")
    parser.add_argument("--latents", type=int, nargs="+", help="M")
    parser.add_argument("--width", type=int, help="heads · head width")
    parser.add_argument("--head-width", type=int, nargs="+")
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--dense-up-to", type=int, help="tokens; dense attention costs their square")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that the medians are of")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    add_out(parser)
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        defaults = {
            "tokens": [2**20],
            "latents": [64, 128, 256, 512],
            "width": 1024,
            "head_width": [64, 128],
            "dtype": "bf16",
            "dense_up_to": 2**17,
        }
    else:
        defaults = {
            "tokens": [4096, 16384, 65536],
            "latents": [64],
            "width": 256,
            "head_width": [64],
            "dtype": "fp32",
            "dense_up_to": 4096,
        }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for head_width in arguments.head_width:
        if arguments.width % head_width:
            parser.error(f"--width {arguments.width} is not a multiple of --head-width {head_width}")
    return arguments


def shapes(arguments: argparse.Namespace) -> Iterator[Shape]:
    for tokens in arguments.tokens:
        for latents in arguments.latents:
            for head_width in arguments.head_width:
                yield Shape(tokens, latents, arguments.width // head_width, head_width, arguments.dtype)


# What is compared


def candidates(shape: Shape, device: torch.device, dense_up_to: int) -> Iterator[list[Candidate]]:
    """Groups of candidates that do the same; the first of each is what the others are compared with."""
    dtype = DTYPES[shape.dtype]

    def rows(*lengths: int) -> Tensor:
        size = (*lengths, shape.heads, shape.head_width)
        return torch.randn(size, device=device, dtype=dtype).requires_grad_()

    n, offsets = shape.tokens, [0, shape.tokens]
    few, many = partial(rows, 1, shape.latents), partial(rows, n)
    read_inputs, write_inputs = [few(), many(), many()], [many(), few(), few()]
    read_costs, write_costs = costs(shape), costs(shape, written=True)
    both_costs = tuple(
        Cost(read.flops + write.flops, read.bytes + write.bytes)
        for read, write in zip(read_costs, write_costs, strict=True)
    )

    def read() -> tuple[Tensor, ...]:
        return (attention.read(*read_inputs, offsets)[0],)

    def write() -> tuple[Tensor, ...]:
        return (attention.write(*write_inputs, offsets),)

    yield [
        Candidate("read", "cctrain", read, read_inputs, read_costs),
        *sdpa("read", read_inputs, read_costs, device),
    ]
    yield [
        Candidate("write", "cctrain", write, write_inputs, write_costs),
        *sdpa("write", write_inputs, write_costs, device),
    ]
    shared = [few(), many(), few(), many()]
    yield [
        Candidate("read and write", "cctrain", lambda: (*read(), *write()), [*read_inputs, *write_inputs], both_costs),
        Candidate("read and write", "shared scores", lambda: shared_scores(*shared), shared),
        *(sdpa("dense", [many(), many(), many()], None, device) if n <= dense_up_to else ()),
    ]
    yield list(with_projections(shape, device))


def costs(shape: Shape, written: bool = False) -> tuple[Cost, Cost]:
    """Of the forward and the backward of a read, or of a write."""
    size = torch.empty((), dtype=DTYPES[shape.dtype]).element_size()
    pairs = shape.tokens * shape.latents * shape.width
    many, few = shape.tokens * shape.width * size, shape.latents * shape.width * size
    # Queries and outputs on one side, keys and values on the other. Backward reads those (all but the read's
    # outputs are many or few alike) and the gradient of the output, and writes the gradients of the inputs.
    forward = Cost(4 * pairs, 2 * many + 2 * few)
    backward = Cost(10 * pairs, 4 * many + 4 * few)
    # lse, fp32, for every query and head: written forward, read backward.
    lse = 4 * shape.heads * (shape.tokens if written else shape.latents)
    return Cost(forward.flops, forward.bytes + lse), Cost(backward.flops, backward.bytes + lse)


def sdpa(
    operation: str, inputs: list[Tensor], costs: tuple[Cost, Cost] | None, device: torch.device
) -> Iterator[Candidate]:
    """PyTorch's own attention on the same tensors, by each of its fused backends."""
    batched = [x if x.ndim == 4 else x.unsqueeze(0) for x in inputs]

    def forward(backend: SDPBackend | None) -> tuple[Tensor, ...]:
        with sdpa_kernel(backend) if backend else nullcontext():
            return (scaled_dot_product_attention(*(x.transpose(1, 2) for x in batched)),)

    for backend in GPU_SDPA if device.type == "cuda" else (None,):
        name = "SDPA" if backend is None else f"SDPA {backend.name.split('_')[0].lower()}"
        yield Candidate(operation, name, partial(forward, backend), inputs, costs)


def shared_scores(latents: Tensor, tokens: Tensor, latent_values: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both directions from one score matrix: what the latents give each other's tokens is its transpose."""
    scores = torch.einsum("bmhd,nhd->hmn", latents, tokens) * latents.shape[-1] ** -0.5
    read = torch.einsum("hmn,nhd->mhd", scores.softmax(dim=-1), values)
    write = torch.einsum("hmn,bmhd->nhd", scores.softmax(dim=-2), latent_values)
    return read, write


def with_projections(shape: Shape, device: torch.device) -> Iterator[Candidate]:
    dtype, heads = DTYPES[shape.dtype], (shape.heads, shape.head_width)
    tokens = torch.randn(shape.tokens, shape.width, device=device, dtype=dtype)
    latents = torch.randn(1, shape.latents, shape.width, device=device, dtype=dtype)
    offsets = [0, shape.tokens]
    maps = nn.ModuleList(nn.Linear(shape.width, shape.width) for _ in range(8)).to(device, dtype)

    def ours() -> tuple[Tensor, ...]:
        query, key, value = (
            linear(x).unflatten(-1, heads) for linear, x in zip(maps[:3], (latents, tokens, tokens), strict=True)
        )
        read = maps[3](attention.read(query, key, value, offsets)[0].flatten(-2))
        sides = (tokens, read, read)
        query, key, value = (linear(x).unflatten(-1, heads) for linear, x in zip(maps[4:7], sides, strict=True))
        return read, maps[7](attention.write(query, key, value, offsets).flatten(-2))

    yield Candidate("with projections", "cctrain", ours, list(maps.parameters()))
    try:
        package = load_simpler_flash()
    except ModuleNotFoundError as error:
        print(f"Left out: simpler-flash. {error}; {INSTALL}")
        return
    module = package.MHA(shape.width, shape.heads, attn_type="criss-cross", sketcher_dim=shape.width)
    module = module.to(device, dtype)

    def theirs() -> tuple[Tensor, ...]:
        return module(tokens.unsqueeze(0), x_kv=latents)

    yield Candidate("with projections", "simpler-flash", theirs, list(module.parameters()))


# How it is measured


def measure(groups: Iterable[list[Candidate]], device: torch.device, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of medians, group by group; the candidates of a group take turns."""
    for group in groups:
        timings: list[list[tuple[float, float]]] = [[] for _ in group]
        failed: dict[int, str] = {}
        for turn in range(repeats + 1):
            for i, candidate in enumerate(group):
                if i in failed:
                    continue
                try:
                    timing = timed(candidate, device)
                except RuntimeError as error:  # out of memory, or no such kernel for this shape
                    failed[i] = str(error).splitlines()[0]
                    continue
                if turn > 0:  # the first warms up
                    timings[i].append(timing)
        first: float | None = None
        for i, candidate in enumerate(group):
            row: dict[str, Any] = {"operation": candidate.operation, "name": candidate.name}
            if i in failed:
                yield row | {"failed": failed[i]}
                continue
            forward, backward = (statistics.median(seconds) for seconds in zip(*timings[i], strict=True))
            row |= {"forward_seconds": forward, "backward_seconds": backward}
            if candidate.costs is not None:
                row["forward_cost"], row["backward_cost"] = map(asdict, candidate.costs)
            if i == 0:
                first = forward + backward
            if first is not None:
                row["times_the_first"] = (forward + backward) / first
            yield row


def with_floors(rows: list[dict[str, Any]], ceilings: Ceilings) -> list[dict[str, Any]]:
    floors = [
        {
            f"{direction}_floor_seconds": ceilings.floor(Cost(**row[f"{direction}_cost"]))
            for direction in ("forward", "backward")
            if f"{direction}_cost" in row
        }
        for row in rows
    ]
    return [row | floor for row, floor in zip(rows, floors, strict=True)]


def timed(candidate: Candidate, device: torch.device) -> tuple[float, float]:
    """Seconds of a forward and of its backward."""
    started = now(device)
    outputs = candidate.forward()
    between = now(device)
    grads = [torch.ones_like(output) for output in outputs]
    ready = now(device)
    torch.autograd.grad(outputs, candidate.inputs, grads, allow_unused=True)
    return between - started, now(device) - ready


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured_ceilings(device: torch.device, dtype: torch.dtype, repeats: int) -> Ceilings:
    """The best of several square matrix products and of several copies: what this device can do now."""
    side, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**25)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, device=device)
    target = torch.zeros_like(source)
    multiply = best(lambda: torch.matmul(a, b), device, repeats)
    copy = best(lambda: target.copy_(source), device, repeats)
    return Ceilings(2 * side**3 / multiply, 2 * source.nbytes / copy)


def best(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        started = now(device)
        work()
        seconds.append(now(device) - started)
    return min(seconds[1:])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores)"


def table(shape: Shape, rows: list[dict[str, Any]], ceilings: Ceilings) -> str:
    lines = [
        "",
        f"n = {shape.tokens:,}, M = {shape.latents}, {shape.heads} heads of {shape.head_width}, {shape.dtype}; ms. "
        f"Matrix multiply {ceilings.flops_per_second / 1e12:,.3g} TFLOP/s, "
        f"copy {ceilings.bytes_per_second / 1e9:,.4g} GB/s",
        f"{'':32}{'forward':>10}{'floor':>9}{'of floor':>9}{'backward':>11}{'floor':>9}{'of floor':>9}{'time':>8}",
    ]
    operation = ""
    for row in rows:
        shown = "" if row["operation"] == operation else row["operation"]
        operation = row["operation"]
        line = f"{shown:17}{row['name']:14} "
        if "failed" in row:
            lines.append(f"{line}  {row['failed'][:70]}")
            continue
        for direction, space in (("forward", 10), ("backward", 11)):
            seconds = row[f"{direction}_seconds"]
            line += f"{1e3 * seconds:{space}.3f}"
            floor = row.get(f"{direction}_floor_seconds")
            line += f"{1e3 * floor:9.3f}{floor / seconds:9.0%}" if floor else " " * 18
        ratio = row.get("times_the_first")
        lines.append(line + (f"{ratio:7.2f}×" if ratio else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
