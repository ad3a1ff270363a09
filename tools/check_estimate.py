"""Does `cctrain estimate` say what a training then takes? Drawn configurations, estimated, trained, none left out.

    python -m tools.check_estimate [--configurations 12] [--seed S] [--work data] [--out FILE]

Each configuration is drawn by the seed, which is printed: width, depth, heads, latents, attention, precision, length
of contexts, batch, micro-batch, checkpointing, ZeRO stage, one rank or two, shared contexts or not. Its parts are
measured on this machine as `cctrain estimate` does; then it is trained for 40 seconds, and 12 steps at least, on retina
with `cctrain train`. Of the training comes the mean of the later half of the steps' times (data_seconds taken off),
and the most anonymous memory of any rank (RssAnon of /proc, ten times a second). Told beside it: the time that the
parts alone would take, without a rehearsal, and how much of the memory is that of the process and what it grows by,
and no tensor's. It trains without evaluation and checkpoints, which an estimate knows nothing of.
The exit code is 1 unless every step time is within 30 % of the measured one, and every memory within 15 %.
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

from cctrain.apply.estimate import estimate_configuration
from cctrain.tracking.journal import history, read_journal
from tools.peak_memory import watch
from tools.public_data import whole_cells
from tools.record import add_out, circumstances, keep

SECONDS, FEWEST_STEPS, MOST_STEPS = 40, 12, 400
TIME_TOLERANCE, MEMORY_TOLERANCE = 0.30, 0.15
CONFIG = "configs/cell.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=12, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="draws them (default: a new one)")
    parser.add_argument("--work", type=Path, default=Path("data"), help="folder of all files (default: data)")
    add_out(parser)
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    store, draws = whole_cells("retina", arguments.work), random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(arguments.configurations):
        rows.append(compare(draw(draws), store, arguments.work))
        print(line(number + 1, rows[-1]), flush=True)
        keep({"seed": seed, "rows": rows, **circumstances("torch", "deepspeed")}, arguments.out)
    failed = [row for row in rows if not row["within"]]
    inside = len(rows) - len(failed)
    print(f"{inside} of {len(rows)} within {TIME_TOLERANCE:.0%} of time and {MEMORY_TOLERANCE:.0%} of memory")
    raise SystemExit(1 if failed else 0)


def draw(draws: random.Random) -> dict[str, Any]:
    """Overrides of a configuration, and `ranks`."""
    ranks = draws.choice([1, 2])
    attention = draws.choice(["criss_cross", "criss_cross", "dense"])
    heads, max_tokens = draws.choice([2, 4]), draws.choice([500, 1000, 2000, 4000, 8000])
    return {
        "ranks": ranks,
        "model.attention": attention,
        "model.width": draws.choice([64, 128, 256, 512]),
        "model.depth": draws.choice([1, 2, 3, 4]),
        "model.heads": heads,
        "model.latents": draws.choice([16, 64, 128, 256]),
        "training.precision": draws.choice(["fp32", "fp32", "bf16"]),
        "data.max_tokens": max_tokens,
        "data.global_batch": draws.choice([2, 4, 8]),
        "data.micro_batch_tokens": draws.choice(
            [tokens for tokens in (6000, 12_000, 24_000) if tokens > 1.2 * max_tokens]
        ),
        "memory.checkpointing": str(draws.random() < 0.5).lower(),
        "parallel.zero_stage": draws.choice([0, 1, 2, 3]),
        "parallel.context": draws.choice([1, ranks]) if attention == "criss_cross" else 1,
    }


def compare(drawn: dict[str, Any], store: Path, work: Path) -> dict[str, Any]:
    ranks = drawn["ranks"]
    with tempfile.TemporaryDirectory(dir=work, prefix="estimate-") as folder:
        overrides = [f"{key}={value}" for key, value in drawn.items() if key != "ranks"] + [
            f"data.store={store}",
            "evaluation.every=0",
            "checkpoint.every=0",
        ]
        estimated = estimate_configuration(Path(CONFIG), overrides, ranks, None, None, 0)
        num_steps = round(min(max(SECONDS / estimated.seconds.total, FEWEST_STEPS), MOST_STEPS))
        steps, memory = train(overrides, ranks, num_steps, Path(folder) / "run")
    # Later steps: in the first ones MLflow is imported and makes its database, beside the training.
    seconds = mean(step["step_seconds"] - step["data_seconds"] for step in steps[num_steps // 2 :])
    ratios = {"time": estimated.seconds.total / seconds, "memory": estimated.memory / memory}
    return {
        **drawn,
        "tokens": estimated.needs.contexts.tokens,
        "step_seconds": seconds,
        "estimated_seconds": estimated.seconds.total,
        "memory_bytes": memory,
        "estimated_bytes": estimated.memory,
        "process_bytes": estimated.device.process + estimated.device.growth,
        "rehearsed_over_parts": estimated.device.rehearsed_over_parts,
        "ratios": ratios,
        "within": abs(ratios["time"] - 1) <= TIME_TOLERANCE and abs(ratios["memory"] - 1) <= MEMORY_TOLERANCE,
    }


def train(overrides: list[str], ranks: int, num_steps: int, run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of its steps, and the most memory of a process."""
    words = [
        *overrides,
        f"training.steps={num_steps}",
        f"run.dir={run_dir}",
        f"tracking.uri=sqlite:///{run_dir.resolve()}.db",
        "--ranks",
        str(ranks),
    ]
    with open(f"{run_dir}.log", "w") as said:
        process = psutil.Popen(
            [sys.executable, "-m", "cctrain", "train", CONFIG, *words],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdout=said,
            stderr=said,
        )
        peaks, _ = watch(process)
    if process.returncode != 0:
        raise SystemExit(f"{Path(f'{run_dir}.log').read_text()}this training failed: {' '.join(words)}")
    return [one for one in history(read_journal(run_dir)) if one["event"] == "step"], max(peaks.values())


def line(number: int, row: dict[str, Any]) -> str:
    shape = f"{row['model.attention']:<11} d {row['model.width']:>3} L {row['model.depth']} M {row['model.latents']:>3}"
    ranks = f"{row['ranks']} rank(s), C {row['parallel.context']}"
    how = f"{row['training.precision']} ZeRO {row['parallel.zero_stage']}, {ranks}"
    return (
        f"{number:>2}  {shape}  {how}, checkpointing {row['memory.checkpointing']:<5} n {row['tokens']:>6,.0f}: "
        f"{row['estimated_seconds']:.2f} s for {row['step_seconds']:.2f} ({row['ratios']['time']:.2f}; by parts alone "
        f"{row['estimated_seconds'] / row['rehearsed_over_parts']:.2f}), {row['estimated_bytes'] / 1e9:.2f} GB for "
        f"{row['memory_bytes'] / 1e9:.2f} ({row['ratios']['memory']:.2f}; of the process "
        f"{row['process_bytes'] / 1e9:.2f})" + ("" if row["within"] else "  OUTSIDE")
    )


if __name__ == "__main__":
    main()
