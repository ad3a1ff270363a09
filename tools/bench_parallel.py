"""What the ranks that share a context send each other, counted, beside ring attention and Ulysses.

    python -m tools.bench_parallel [--ranks 1 2 4] [--lengths 4096 65536 262144] [--latents 64] [--out FILE]

Starts C real processes (gloo, on this machine's cores), runs one criss-cross layer forward and backward on a context
of n tokens whose slices they hold, and counts the bytes of every collective as PyTorch dispatches it. The layer runs
with recomputation in backward, which must repeat no collective. Bytes are of one rank, one layer and one context;
every rank sends as many as it receives. The formulas, of ring attention and Ulysses too: cctrain/cost/traffic.py.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cctrain.config import ModelConfig
from cctrain.cost.traffic import (
    READ,
    READ_GRADIENT,
    Collective,
    exchange_of_a_layer,
    ring_of_a_layer,
    ulysses_of_a_layer,
)
from cctrain.launch.local import free_port, rank_environment
from cctrain.model.activations import Activations
from cctrain.model.layer import CrissCrossLayer
from cctrain.model.tiles import TILE_TOKENS, cut_into_tiles
from cctrain.parallel.exchange import context_exchange
from cctrain.parallel.mesh import Mesh, join_mesh
from tools.record import add_out, circumstances, keep

MINUTES = 30  # that a start of ranks may take


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends, and as many that it receives, for one layer and one context."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def traffic_of(exchange: list[Collective]) -> Traffic:
    forward = sum(collective.sent for collective in exchange if collective.purpose == READ)
    return Traffic(forward, sum(collective.sent for collective in exchange) - forward)


class CollectiveCounter(TorchDispatchMode):
    """Within it, `made` grows by the collectives that this rank, one of `num_ranks`, makes among all of them.

    It sees what PyTorch dispatches, through whichever function and in backward too, so nothing goes by uncounted:
    a collective that it cannot count raises ValueError.
    """

    def __init__(self, purpose: str, num_ranks: int):
        super().__init__()
        self.purpose, self.num_ranks = purpose, num_ranks
        self.made: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            operation, payload = self._operation_and_payload(func.overloadpacket.__name__, args)
            self.made.append(Collective(self.purpose, operation, payload, self.num_ranks))
        return func(*args, **(kwargs or {}))

    def _operation_and_payload(self, name: str, args: Any) -> tuple[str, int]:
        if name == "allreduce_":
            tensors, *_ = args
            return "all_reduce", sum(tensor.nbytes for tensor in tensors)
        if name == "allgather_":
            _, mine, *_ = args
            return "all_gather", self.num_ranks * sum(tensor.nbytes for tensor in mine)
        raise ValueError(f"what a rank sends in {name} is not known here: add its payload")


def count_layer(model: ModelConfig, tokens: int, mesh: Mesh) -> list[Collective]:
    """Run a layer on this rank's slice of a context of `tokens` tokens; all ranks of `mesh` call this, one row."""
    torch.manual_seed(0)
    layer = CrissCrossLayer(model.width, model.width, model.heads)
    latents = torch.randn(1, model.latents, model.width, requires_grad=True)
    bounds = [tokens * rank // mesh.num_ranks for rank in (mesh.rank, mesh.rank + 1)]
    held = bounds[1] - bounds[0]
    cuts = cut_into_tiles([0, held], -(-tokens // TILE_TOKENS["cpu"]))
    tiles = [torch.randn(cut.stop - cut.start, model.width, requires_grad=True) for cut in cuts]
    with CollectiveCounter(READ, mesh.num_ranks) as forward:
        new_tiles, new_latents = layer(tiles, latents, cuts, Activations(checkpointing=True), context_exchange(mesh))
    with CollectiveCounter(READ_GRADIENT, mesh.num_ranks) as backward:
        torch.stack([new_latents.sum(), *(tile.sum() for tile in new_tiles)]).sum().backward()
    return [*forward.made, *backward.made]


def count_collectives(model: ModelConfig, lengths: list[int], num_ranks: int) -> list[list[list[Collective]]]:
    """For each length, what each rank made for a layer; in one start of `num_ranks` processes."""
    port = free_port()
    plan = json.dumps({"model": asdict(model), "lengths": lengths})
    command = [sys.executable, "-m", "tools.bench_parallel", plan]
    ranks = [
        subprocess.Popen(
            command,
            env=rank_environment(rank, num_ranks, port) | {"CUDA_VISIBLE_DEVICES": ""},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [rank.communicate(timeout=60 * MINUTES)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"the ranks ended with {[rank.returncode for rank in ranks]}; what they said is above")
    by_rank = [[[Collective(**one) for one in made] for made in json.loads(output)] for output in outputs]
    return [list(made) for made in zip(*by_rank, strict=True)]


def be_a_rank(plan: dict[str, Any]) -> None:
    model = ModelConfig(**plan["model"])
    with join_mesh(num_context_ranks=int(os.environ["WORLD_SIZE"])) as mesh:
        by_length = [count_layer(model, tokens, mesh) for tokens in plan["lengths"]]
        print(json.dumps([[asdict(collective) for collective in made] for made in by_length]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="C, how many share the context")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 65_536, 262_144], help="n, its tokens")
    parser.add_argument("--width", type=int, default=256, help="d")
    parser.add_argument("--heads", type=int, default=4, help="H")
    parser.add_argument("--latents", type=int, default=64, help="M")
    parser.add_argument("--element-bytes", type=int, default=2, help="b, of ring and Ulysses; 2 is bf16")
    add_out(parser)
    arguments = parser.parse_args()
    shape = {key: getattr(arguments, key) for key in ("width", "heads", "latents")}
    model = ModelConfig(**shape)
    print(
        f"Bytes that a rank sends for one layer, forward and backward; width {model.width}, {model.heads} heads, "
        f"{model.latents} latents\n"
        f"{'C':>3} {'n':>10} {'criss-cross':>14} {'computed':>14} {'ring':>16} {'Ulysses':>16}",
        flush=True,
    )
    rows = []
    for num_ranks in arguments.ranks:
        by_length = count_collectives(model, arguments.lengths, num_ranks)
        for tokens, by_rank in zip(arguments.lengths, by_length, strict=True):
            counted = [traffic_of(made) for made in by_rank]
            busiest = max(counted, key=lambda traffic: traffic.total)
            computed = traffic_of(exchange_of_a_layer(model, 1, num_ranks))
            others = [
                Traffic(*law(tokens, model.width, num_ranks, arguments.element_bytes))
                for law in (ring_of_a_layer, ulysses_of_a_layer)
            ]
            print(
                f"{num_ranks:>3} {tokens:>10,} {busiest.total:>14,.0f} {computed.total:>14,.0f} "
                f"{others[0].total:>16,.0f} {others[1].total:>16,.0f}",
                flush=True,
            )
            rows.append(
                {
                    "ranks": num_ranks,
                    "tokens": tokens,
                    "counted_by_rank": [asdict(traffic) for traffic in counted],
                    "computed": asdict(computed),
                    "ring": asdict(others[0]),
                    "ulysses": asdict(others[1]),
                }
            )
    result = {
        "bytes_sent_by_a_rank_for_a_layer": rows,
        "shape": shape,
        "element_bytes_of_ring_and_ulysses": arguments.element_bytes,
        **circumstances("torch"),
    }
    keep(result, arguments.out)


if __name__ == "__main__":
    if "RANK" in os.environ:
        be_a_rank(json.loads(sys.argv[1]))
    else:
        main()
