"""What tracking costs: its share of the time of a step, and how long MLflow takes to receive a long journal.

    python -m tools.bench_tracking [--store data/retina-store] [--steps 100000] [--attempts 5] [--every-step]
                                   [--out FILE]

First the quick start trains --trained-steps steps. Their lines, in turn, are those of every journal here, and their
median time is that of a step.

The share: a process does every step what the first rank of a training does for tracking: it works out what the step
cost, how it was packed and which samples it took, observes itself and its node and writes the line, with the live
projection beside it. All its processor time counts, that of the projection's thread too, which a training lacks where
all cores are its own. What happens once, before the first step and behind the last, is told apart.

The long journal has so many steps and attempts, each of which repeats the last 100 steps of the one before. It is sent
to a new SQLite database as `cctrain sync` does, twice; the second time nothing may be added. With --every-step a third
time, as `cctrain sync --all` does.
"""

import argparse
import sqlite3
import statistics
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from cctrain.parallel.mesh import join_mesh
from cctrain.run_directory import open_run
from cctrain.tracking.content import metrics_of
from cctrain.tracking.journal import Journal, read_journal
from cctrain.tracking.projection import LiveProjection, project
from cctrain.training.loop import load_of_step
from cctrain.training.observations import Observer
from tools.journals import prolong, train, values
from tools.record import add_out, circumstances, keep

QUICK_START = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
STEPS_ALONE = ("evaluation.every=0", "checkpoint.every=0")
REPEATED = 100
EXPERIMENT = "bench"
FLOPS_PER_SECOND = 1e11  # of a machine
SYNC_BOUND_SECONDS, SHARE_BOUND = 300.0, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="data/retina-store", help="of the quick start (default: %(default)s)")
    parser.add_argument("--trained-steps", type=int, default=40, help="of the quick start (default: %(default)s)")
    parser.add_argument("--step-seconds", type=float, help="of a step, instead of what the trained ones took")
    parser.add_argument("--live-steps", type=int, default=200, help="to follow live (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100_000, help="of the long journal (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=5, help="of the long journal (default: %(default)s)")
    parser.add_argument("--every-step", action="store_true", help="also send every step of the long journal")
    add_out(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tracking-") as name:
        folder = Path(name)
        overrides = (f"data.store={arguments.store}", f"training.steps={arguments.trained_steps}", *STEPS_ALONE)
        lines = train(folder / "trained", QUICK_START, *overrides)
        steps = [line for line in lines if line["event"] == "step"]
        seconds = arguments.step_seconds or statistics.median(line["step_seconds"] for line in steps)
        followed = follow_live(folder / "live", folder / "trained", steps, seconds, arguments.live_steps)
        synced = sync_long(folder / "long", folder / "trained", arguments)
    result = {
        "question": "what does tracking cost a training, and how long does a long journal take to sync?",
        "metrics": max(len(metrics_of(line)) for line in steps),
        "live": followed,
        "sync": synced,
        **circumstances("mlflow"),
    }
    print(summary(result))
    keep(result, arguments.out)
    kept = followed["share"] < SHARE_BOUND and synced["added_by_second"] == 0
    raise SystemExit(0 if kept and synced["seconds"] < SYNC_BOUND_SECONDS else 1)


def follow_live(
    run_dir: Path, trained: Path, lines: list[dict[str, Any]], step_seconds: float, num_steps: int
) -> dict[str, Any]:
    """Processor seconds of tracking a step, once the database is there, and those that it takes once.

    Raises RuntimeError if a step has not arrived after two minutes.
    """
    database, run = run_dir.parent / "live.db", open_run(trained)
    prolong(run_dir, trained, (1, 0, None))
    journal = Journal(run_dir, attempt=1)
    live = LiveProjection(run_dir, f"sqlite:///{database}", EXPERIMENT)
    seconds: dict[str, list[float]] = {"load": [], "processor": [], "elapsed": []}
    with join_mesh() as mesh:
        observer = Observer(mesh.device)
        live.start()
        [thread] = [thread for thread in threading.enumerate() if thread.name == "mlflow-projection"]
        wait_until_idle(thread, run_dir / "mlflow.json")
        begun = processor_seconds(thread)
        for step in range(1, num_steps + 1):
            line = trained_values(lines[(step - 1) % len(lines)])
            slices, accumulation = slices_of(line), line["accumulation"]
            counts = slices[:, :4]  # which a step works out to weigh its loss
            started, started_processor = time.perf_counter(), time.thread_time()
            line |= load_of_step(run.config, slices, counts, len(run.gene_ids), accumulation, mesh.num_ranks)
            line["utilisation"] = line["cost/total_flops"] / line["step_seconds"] / FLOPS_PER_SECOND
            seconds["load"].append(time.thread_time() - started_processor)
            observed = observer.observe(line["data_seconds"], 0.0)
            journal.write("step", step, **line | observed)
            seconds["processor"].append(time.thread_time() - started_processor)
            seconds["elapsed"].append(time.perf_counter() - started)
            time.sleep(max(0.0, step_seconds - seconds["elapsed"][-1]))
        points = sum(len(metrics_of(line)) for line in read_journal(run_dir))
        wait_for_points(database, points)
        followed = processor_seconds(thread)
    journal.write("stop", num_steps, status="finished")
    before = time.process_time()
    live.close()
    ending = time.process_time() - before
    training, projection = statistics.fmean(seconds["processor"]), (followed - begun) / num_steps
    return {
        "steps": num_steps,
        "step_seconds": step_seconds,
        "points_a_step": points / num_steps,
        "training_thread_median_seconds_a_step": statistics.median(seconds["elapsed"]),
        "training_thread_processor_seconds_a_step": training,
        "of_these_for_what_the_step_cost": statistics.fmean(seconds["load"]),
        "projection_processor_seconds_a_step": projection,
        "share": (training + projection) / step_seconds,
        "processor_seconds_before_the_first_step": begun,
        "processor_seconds_behind_the_last_step": ending,
    }


def trained_values(line: dict[str, Any]) -> dict[str, Any]:
    """Of a trained step, without what its rank saw of the node: it is looked at anew."""
    return {key: value for key, value in values(line).items() if not key.startswith("system/")}


def slices_of(line: dict[str, Any]) -> torch.Tensor:
    """int64 (contexts, 6), as the ranks of a training, here one, tell each other of a step with as many contexts."""
    number = torch.arange(line["contexts"])
    tokens, targets = ((line[of] + number) // len(number) for of in ("tokens", "targets"))  # in equal parts
    micro_batch = number * line["accumulation"] // len(number)
    return torch.stack((number, number, tokens, targets, micro_batch, torch.zeros_like(number)), dim=1)


def sync_long(run_dir: Path, trained: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    each = arguments.steps // arguments.attempts
    begins = [max(1, attempt * each + 1 - REPEATED) for attempt in range(arguments.attempts)]
    ends = [attempt * each for attempt in range(1, arguments.attempts)] + [arguments.steps]
    statuses = [None] * (arguments.attempts - 1) + ["finished"]
    prolong(run_dir, trained, *zip(begins, ends, statuses, strict=True))
    database = run_dir.parent / "long.db"

    def send(every_step: bool) -> tuple[float, int]:
        started = time.perf_counter()
        project(run_dir, f"sqlite:///{database}", EXPERIMENT, every_step=every_step)
        return time.perf_counter() - started, num_points(database)

    seconds, points = send(False)
    again_seconds, again_points = send(False)
    found = {"steps": arguments.steps, "attempts": arguments.attempts, "seconds": seconds, "points": points}
    found |= {"again_seconds": again_seconds, "added_by_second": again_points - points}
    if arguments.every_step:
        found["every_step_seconds"], found["every_step_points"] = send(True)
    return found


def processor_seconds(thread: threading.Thread) -> float:
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def wait_until_idle(thread: threading.Thread, identity: Path) -> None:
    """Until the projection has named its run, and has nothing more to do."""
    before = -1.0
    while not identity.is_file() or processor_seconds(thread) > before:
        before = processor_seconds(thread)
        time.sleep(3)


def wait_for_points(database: Path, wanted: int) -> None:
    deadline = time.monotonic() + 120
    while num_points(database) < wanted:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{num_points(database):,} of {wanted:,} points have arrived: see what the log says")
        time.sleep(1)


def num_points(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("select count(*) from metrics").fetchone()[0]


def summary(result: dict[str, Any]) -> str:
    synced, live = result["sync"], result["live"]
    lines = [
        f"{result['metrics']} metrics, {live['points_a_step']:.1f} points a step of {live['step_seconds']:.3f} s: the "
        f"training's thread takes "
        f"{live['training_thread_processor_seconds_a_step'] * 1e3:.2f} ms of a processor "
        f"({live['of_these_for_what_the_step_cost'] * 1e3:.2f} for what the step cost; "
        f"{live['training_thread_median_seconds_a_step'] * 1e3:.2f} ms pass), the projection's "
        f"{live['projection_processor_seconds_a_step'] * 1e3:.2f} ms, together {live['share']:.2%} of the step "
        f"(asked: under {SHARE_BOUND:.0%})",
        f"once: {live['processor_seconds_before_the_first_step']:.1f} s of a processor beside the first steps, "
        f"{live['processor_seconds_behind_the_last_step']:.1f} s behind the last",
        f"journal of {synced['steps']:,} steps and {synced['attempts']} attempts: {synced['points']:,} points sent in "
        f"{synced['seconds']:.1f} s (asked: under {SYNC_BOUND_SECONDS:.0f}); again in {synced['again_seconds']:.1f} s, "
        f"{synced['added_by_second']} added",
    ]
    if "every_step_seconds" in synced:
        lines.append(f"every step: {synced['every_step_points']:,} points in {synced['every_step_seconds']:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
