"""Quality against cost: criss-cross beside dense attention at equal parameters, equal FLOPs and equal time.

    tools/quality.sh [--datasets retina pbmc3k] [--seeds 0 1 2] [--steps S ...] [--learning-rates R ...]
                     [--dry-run] [--out PATH]

tools/quality_plan.py says what is trained and for how many steps, which follows from what steps cost; that is measured
first (tools/quality_cost.py). `cctrain train` trains, tools/quality_judge.py judges. Writes OUT.json with a row for
each model and way of judging it, OUT.md with the tables, and OUT.png.

It may be stopped at any time: the same command goes on, in the middle of a training too. What has a row is not made
again, so once all is there it only writes the tables. Data sets, seeds and --learning-rates may be added later; other
steps, another configuration or another store need another --out.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cctrain.data.fetch import DATASETS
from cctrain.run_directory import WEIGHTS
from cctrain.tracking.journal import history, read_journal
from cctrain.words import duration
from tools.quality_data import Dataset, costs, measured_seconds, open_dataset, peak_learning_rate, variants_in
from tools.quality_figure import draw
from tools.quality_judge import baselines, judge
from tools.quality_plan import (
    Cost,
    Training,
    at_learning_rates,
    budgets_of,
    plan,
    predicted_seconds,
    warmup_steps,
)
from tools.quality_report import plan_text, report_text
from tools.record import circumstances, keep

STEPS_OF_REFERENCE = {"pbmc3k": 100, "retina": 200}
SECONDS_AROUND = 12.0  # what a training and its judging take beside steps and forwards, on two idle cores


def main() -> None:
    arguments = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training ends with whoever waits for it
    table, figure, file = (arguments.out.with_name(f"{arguments.out.name}.{end}") for end in ("md", "png", "json"))
    datasets = {
        name: open_dataset(name, number, arguments.work, arguments.config)
        for name, number in zip(arguments.datasets, arguments.steps, strict=True)
    }
    result = kept(file) if file.is_file() else begun()
    for dataset in datasets.values():
        adopt(result, dataset, file)
    trainings = planned(result, datasets, arguments.seeds, arguments.learning_rates)
    if arguments.dry_run:
        left = without_rows(result, trainings)
        print(plan_text(left, [predicted(result, training) for training in left]))
        print(f"{len(trainings) - len(left)} of {len(trainings)} trainings are there already")
        return
    for dataset in datasets.values():
        judge_baselines(result, dataset)
    keep(result, file)
    follow(result, trainings, datasets, file, arguments.runs)
    draw(result, figure)
    table.write_text(report_text(result, figure.name))
    print(table.read_text())


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS), choices=list(DATASETS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    defaults = ", ".join(f"{steps} on {name}" for name, steps in STEPS_OF_REFERENCE.items())
    parser.add_argument(
        "--steps", nargs="+", type=int, metavar="S", help=f"of the reference; one number, or by data set ({defaults})"
    )
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"), help="shape and schedule")
    parser.add_argument("--work", type=Path, default=Path("data"), help="folder of data sets and stores")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the trainings")
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=[],
        metavar="R",
        help="train the reference and dense for S steps at these peaks too, of the first of --seeds",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="measure steps, print what is to be trained and how long it takes"
    )
    parser.add_argument("--out", type=Path, default=Path("tools/results/quality"), help="a path without ending")
    arguments = parser.parse_args()
    if arguments.steps is None:
        arguments.steps = [STEPS_OF_REFERENCE[name] for name in arguments.datasets]
    elif len(arguments.steps) == 1:
        arguments.steps *= len(arguments.datasets)
    if len(arguments.steps) != len(arguments.datasets) or min(arguments.steps) < 1:
        parser.error("--steps takes one number, or one for each of --datasets, and none below 1")
    if min(arguments.learning_rates, default=1.0) <= 0.0:
        parser.error("--learning-rates takes numbers above 0")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    return arguments


def begun() -> dict[str, Any]:
    return {
        "question": "is criss-cross attention as good as dense attention at equal parameters, FLOPs and time?",
        **circumstances("torch", "deepspeed", "scikit-learn"),
        "datasets": {},
        "rows": [],
    }


def kept(file: Path) -> dict[str, Any]:
    """What there is already. Rows that do not say their learning rate are older than --learning-rates: their
    configuration's. Which budgets a row serves is what the plan says now: rows may be older than a budget."""
    result = json.loads(file.read_text())
    result.pop("seconds", None)  # of older results: it left out what interrupted trainings took
    for name, known in result["datasets"].items():
        facts, cost = known["facts"], costs(known["facts"], known["seconds_a_step"])
        peak, variants = peak_learning_rate(facts), {variant.name: variant for variant in variants_in(facts)}
        for row in (row for row in result["rows"] if row["dataset"] == name):
            row.setdefault("learning_rate", peak)
            if row["learning_rate"] == peak:
                row["equal"] = list(budgets_of(variants[row["model"]], cost, facts["steps"], row["steps"]))
    return result


def adopt(result: dict[str, Any], dataset: Dataset, file: Path) -> None:
    """Measure what the steps of a new data set take. Raises SystemExit where its results were made otherwise."""
    known = result["datasets"].get(dataset.name)
    if known is None:
        print(f"{dataset.name}: measuring steps", file=sys.stderr, flush=True)
        result["datasets"][dataset.name] = {
            "facts": dataset.facts,
            "seconds_a_step": measured_seconds(dataset),
            "baselines": {},
        }
        return
    changed = [key for key, value in dataset.facts.items() if known["facts"].get(key) != value]
    if changed:
        raise SystemExit(
            f"{file} holds results on {dataset.name} with other {', '.join(changed)}: give what they were made with, "
            "or choose another --out"
        )


def judge_baselines(result: dict[str, Any], dataset: Dataset) -> None:
    """Those that the result does not have: it may be older than they are."""
    known = result["datasets"][dataset.name]["baselines"]
    reference, base = dataset.variants[0], dataset.held_out.config.model
    known |= baselines(dataset.held_out, reference.model(base), known)


def planned(
    result: dict[str, Any],
    datasets: dict[str, Dataset],
    seeds: list[int],
    learning_rates: Sequence[float] = (),
) -> list[Training]:
    """Seed by seed, so that what there is after some time is complete for some seeds."""
    trainings = []
    for seed in seeds:
        for dataset in datasets.values():
            known = result["datasets"][dataset.name]
            steps, cost = known["facts"]["steps"], costs(known["facts"], known["seconds_a_step"])
            trainings += plan(dataset.name, dataset.variants, cost, steps, [seed])
            if seed == seeds[0]:
                others = [peak for peak in dict.fromkeys(learning_rates) if peak != peak_learning_rate(known["facts"])]
                trainings += at_learning_rates(dataset.name, dataset.variants, steps, seed, others)
    return trainings


def cost_of(result: dict[str, Any], training: Training) -> Cost:
    known = result["datasets"][training.dataset]
    return costs(known["facts"], known["seconds_a_step"])[training.variant.name]


def predicted(result: dict[str, Any], training: Training) -> float:
    return predicted_seconds(training, cost_of(result, training), SECONDS_AROUND)


def without_rows(result: dict[str, Any], trainings: list[Training]) -> list[Training]:
    done = {row["run"] for row in result["rows"]}
    return [training for training in trainings if training.folder not in done]


def follow(
    result: dict[str, Any], trainings: list[Training], datasets: dict[str, Dataset], file: Path, runs: Path
) -> None:
    """Train and judge whatever has no row yet. Time to go is as predicted, times how far predictions were off."""
    left = without_rows(result, trainings)
    expected = {training: predicted(result, training) for training in left}
    took, foreseen = 0.0, 0.0
    for done, training in enumerate(left, 1):
        print(f"{training.title}: {training.steps:,} steps", file=sys.stderr, flush=True)
        started = time.monotonic()
        dataset = datasets[training.dataset]
        run = train(training, dataset, runs)
        rows = [
            judged(run, training, cost_of(result, training), dataset, cut)
            for cut in dict.fromkeys((training.variant.max_tokens, None))
        ]
        seconds = time.monotonic() - started
        result["rows"] += rows
        keep(result, file)
        took, foreseen = took + seconds, foreseen + expected[training]
        to_go = sum(expected[later] for later in left[done:])
        print(
            f"{training.title}: NLL {rows[-1]['nll']:.4f} after {duration(seconds)}; {len(result['rows']):,} rows, "
            f"about {duration(to_go * took / foreseen)} to go",
            file=sys.stderr,
            flush=True,
        )


def train(training: Training, dataset: Dataset, runs: Path) -> Path:
    """The run directory. One rank, as steps were measured; what is there already is resumed."""
    run = runs / training.folder
    settings = {
        "run.dir": run,
        "run.seed": training.seed,
        "training.steps": training.steps,
        "training.warmup": warmup_steps(training.steps, dataset.held_out.config.training),
        "checkpoint.every": max(1, training.steps // 4),
        "checkpoint.keep": 1,
        "checkpoint.keep_best": "false",
    }
    if training.learning_rate is not None:
        settings["training.learning_rate"] = training.learning_rate
    words = [*dataset.settings(training.variant), *(f"{key}={value}" for key, value in settings.items())]
    command = [sys.executable, "-m", "cctrain", "train", str(dataset.config_file), *words, "--ranks", "1"]
    code = ended(command)
    if code or not (run / WEIGHTS).is_file():
        raise SystemExit(f"{training.title}: the training stopped (exit code {code}); the same command goes on with it")
    return run


def ended(command: list[str]) -> int:
    """The exit code. Whoever stops this process stops that one too, which may save what it has first."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def judged(run: Path, training: Training, cost: Cost, dataset: Dataset, max_tokens: int | None) -> dict[str, Any]:
    """A row; `judged_on` is None where nothing was cut. `flops` and `seconds` are of all training steps, the seconds as
    they were measured while the machine had nothing else to do: a training of hours may have to share it."""
    steps = [line for line in history(read_journal(run)) if line["event"] == "step"]
    return {
        "dataset": training.dataset,
        "model": training.variant.name,
        "equal": list(training.equal),
        "seed": training.seed,
        "run": training.folder,
        "trained_on": training.variant.max_tokens,
        "judged_on": max_tokens,
        "steps": len(steps),
        "learning_rate": training.learning_rate or peak_learning_rate(dataset.facts),
        "flops": sum(line["cost/total_flops"] for line in steps),
        "seconds": len(steps) * cost.seconds,
        "tokens": sum(line["tokens"] for line in steps),
        "commit": circumstances()["commit"],
        **judge(run, dataset.held_out, dataset.config_file, max_tokens),
    }


if __name__ == "__main__":
    main()
