"""Cells a second that our loader delivers, beside what users would pick instead, from the same file.

    python -m tools.synthetic_atlas ATLAS.h5ad --cells 25000
    python -m tools.bench_data ATLAS.h5ad --work DIR [--rounds 5] [--out FILE]

Which loaders, with which settings, and what they deliver is said in `data_loaders.py`. DIR receives the atlas in every
form that one of them reads: four to five times its size. All of it is read once before, so that storage plays no part
as long as memory holds it. Then the loaders take turns, each turn in a process of its own: some batches that do not
count, then whole epochs for at least --seconds. Opening does not count, and what a loader keeps in memory is gone with
each epoch. The figures are medians of the rounds; trust their ratios. Cells per second of processor time, of all
threads of the process, tell more where the machine is busy, and whether a loader needs more than one core.

Those that are not installed are listed as missing. They can be added beside everything else,

    pip install --target LIBRARIES --no-deps scDataset zarrs==0.2.3
    PYTHONPATH=LIBRARIES python -m tools.bench_data …

and `annbatch` with its dependencies in an environment of Python 3.12. The targets, for batches of 1,024 cells:

    ours uncompressed, beside the memmap read in such blocks                    at least 60 %
    ours as `prepare` writes it, beside the same                                at least 45 %
    the latter beside the fastest of scDataset, AnnLoader and annbatch          at least 2 times

`contexts with targets` is what training waits for: cells read, targets drawn and packed, by the one process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.data_loaders import (
    COMPRESSED,
    MEMMAP,
    SINGLE_CELL_LOADERS,
    UNCOMPRESSED,
    Cells,
    Competitor,
    Files,
    competitors,
    make_files,
)
from tools.record import add_out, circumstances, keep

PACKAGES = ("numpy", "torch", "anndata", "zarr", "zarrs", "webdataset", "scDataset", "annbatch", "h5py")
SHARE_UNCOMPRESSED, SHARE_COMPRESSED, TIMES_OTHERS = 0.60, 0.45, 2.0
BATCHES_BEFORE = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("atlas", type=Path, help="an .h5ad with X in CSR")
    parser.add_argument("--work", type=Path, required=True, help="folder for its other forms; what is there is used")
    parser.add_argument("--batch", type=int, default=1024, help="cells of a batch, a multiple of 64 (default: 1024)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="that a turn takes at least (default: 2)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="loaders, by their names in the table")
    add_out(parser)
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.batch < 64 or arguments.batch % 64:
        parser.error("--batch is a multiple of 64")
    files, loaders = Files(arguments.atlas, arguments.work), competitors(arguments.batch)
    if arguments.turn:
        turn = json.loads(arguments.turn)
        print(json.dumps(take_turn(loaders[turn["name"]], files, arguments.batch, turn["seed"], arguments.seconds)))
        return
    if unknown := [name for name in arguments.only or [] if name not in loaders]:
        parser.error(f"--only {unknown[0]!r}: there are {', '.join(map(repr, loaders))}")
    result = compare(files, {name: loaders[name] for name in arguments.only or loaders}, arguments)
    print(table(result))
    keep(result, arguments.out)


def compare(files: Files, loaders: dict[str, Competitor], arguments: argparse.Namespace) -> dict[str, Any]:
    files.work.mkdir(parents=True, exist_ok=True)
    make_files(files, say)
    sizes = {path.name: read_all(path) for path in sorted([files.atlas, *files.work.iterdir()])}
    missing = {name: loader.missing for name, loader in loaders.items() if loader.missing}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in loaders if name not in missing}
    for number in range(arguments.rounds):
        say(f"round {number + 1} of {arguments.rounds}")
        names = list(turns)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            turns[name].append(in_a_process(name, number, arguments))
    rates = {name: summary(measured) for name, measured in turns.items()}
    return {
        "question": "does the loader keep up with a plain file, and is it faster than other loaders of cells?",
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "bytes": sizes,
        "rates": rates,
        "missing": missing,
        "targets": targets({name: rate["cells_per_second"] for name, rate in rates.items()}),
        **circumstances(*PACKAGES),
    }


def in_a_process(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "tools.bench_data", arguments.atlas.resolve(), "--work", arguments.work.resolve()]
    command += ["--batch", str(arguments.batch), "--seconds", str(arguments.seconds)]
    command += ["--turn", json.dumps({"name": name, "seed": seed})]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: its process ended with exit code {done.returncode}; what it said is above")
    return json.loads(done.stdout.splitlines()[-1])


def take_turn(loader: Competitor, files: Files, batch: int, seed: int, least_seconds: float) -> dict[str, float]:
    """Cells and tokens that came in so many seconds, in this process."""
    warnings.simplefilter("ignore")  # of deprecations and sparse formats, in packages that we only measure
    for _, _cells in zip(range(BATCHES_BEFORE), loader.open(files, batch, seed), strict=False):
        pass
    total = {"cells": 0, "tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0}
    epoch = 0
    while total["seconds"] < least_seconds:
        epoch += 1
        opened = loader.open(files, batch, seed + 1000 * epoch)
        measure(opened, loader.fetches, least_seconds, total)
    return total


def measure(batches: Iterator[Cells], fetches: int | None, least_seconds: float, total: dict[str, float]) -> None:
    """Add an epoch to `total`; it ends early where enough seconds are full, but not inside a fetch."""
    before, seen = total["seconds"], 0
    started, cpu_started = time.perf_counter(), time.process_time()
    for cells in batches:
        seen += num_cells(cells)
        total["tokens"] += len(cells.genes)
        total["seconds"] = before + time.perf_counter() - started
        if fetches is not None and total["seconds"] > least_seconds and seen % fetches == 0:
            break
    total["cells"] += seen
    total["cpu_seconds"] += time.process_time() - cpu_started


def num_cells(cells: Cells) -> int:
    return len(cells.offsets) - 1


def summary(turns: list[dict[str, float]]) -> dict[str, Any]:
    rates = [turn["cells"] / turn["seconds"] for turn in turns]
    return {
        "cells_per_second": statistics.median(rates),
        "tokens_per_second": statistics.median(turn["tokens"] / turn["seconds"] for turn in turns),
        "cells_per_cpu_second": statistics.median(turn["cells"] / turn["cpu_seconds"] for turn in turns),
        "spread": (max(rates) - min(rates)) / statistics.median(rates),
        "turns": turns,
    }


def targets(rates: dict[str, float]) -> list[dict[str, Any]]:
    """Each with what was reached, or None where a loader of it was not measured."""
    others = [rates[name] for name in SINGLE_CELL_LOADERS if name in rates]
    wanted = [
        (f"{UNCOMPRESSED} / {MEMMAP}", UNCOMPRESSED, rates.get(MEMMAP), SHARE_UNCOMPRESSED),
        (f"{COMPRESSED} / {MEMMAP}", COMPRESSED, rates.get(MEMMAP), SHARE_COMPRESSED),
        (f"{COMPRESSED} / the fastest loader of cells", COMPRESSED, max(others, default=None), TIMES_OTHERS),
    ]
    return [
        {"what": what, "least": least, "reached": rates[ours] / other if ours in rates and other else None}
        for what, ours, other, least in wanted
    ]


def table(result: dict[str, Any]) -> str:
    ceiling = result["rates"].get(MEMMAP, {}).get("cells_per_second")
    width = max(map(len, [*result["rates"], *result["missing"]]))
    lines = [f"{'':<{width}} {'cells/s':>10} {'tokens/s':>14} {'of memmap':>10} {'spread':>7} {'cells/CPU s':>12}"]
    for name, rate in result["rates"].items():
        share = f"{rate['cells_per_second'] / ceiling:.1%}" if ceiling else ""
        lines.append(
            f"{name:<{width}} {rate['cells_per_second']:>10,.0f} {rate['tokens_per_second']:>14,.0f} {share:>10} "
            f"{rate['spread']:>7.0%} {rate['cells_per_cpu_second']:>12,.0f}"
        )
    lines += [f"{name:<{width}} missing: {', '.join(needed)}" for name, needed in result["missing"].items()]
    lines += ["", *(f"{size / 1e6:>10,.0f} MB  {name}" for name, size in result["bytes"].items()), ""]
    for target in result["targets"]:
        reached, least = target["reached"], target["least"]
        verdict = "not measured" if reached is None else f"{reached:.2f}, {'met' if reached >= least else 'missed'}"
        lines.append(f"{target['what']}: {verdict} (at least {least:.2f})")
    return "\n".join(lines)


def read_all(path: Path) -> int:
    """Read every file there, so that it lies in memory afterwards; their bytes."""
    total = 0
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                while read := len(stream.read(2**24)):
                    total += read
    return total


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
