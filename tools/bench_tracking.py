"""What tracking costs: its share of the time of a step, and how long MLflow takes to receive a long journal.

    python -m tools.bench_tracking [--steps 100000] [--metrics 20] [--attempts 5] [--every-step] [--out FILE]

The journal is of a training with so many steps, metrics a step and attempts, each of which repeats the last 100 steps
of the one before. It is sent to a new SQLite database as `cctrain sync` does, twice; the second time nothing may be
added. With --every-step a third time, as `cctrain sync --all` does.

The share: a process writes a line of that many metrics every --step-seconds (default: what a step of the quick start
takes on two cores), with the live projection beside it, as a training does at one log a step. What it costs is the
time that the writing takes, for the training waits for it, and the processor time of the projection's thread, which
the training lacks where all cores are its own.
"""

import argparse
import math
import sqlite3
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from cctrain.config import Config, to_yaml
from cctrain.tracking.content import metrics_of
from cctrain.tracking.journal import Journal
from cctrain.tracking.projection import LiveProjection, project
from tools.record import add_out, circumstances, keep

REPEATED = 100
EXPERIMENT = "bench"
SYNC_BOUND_SECONDS, SHARE_BOUND = 300.0, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--metrics", type=int, default=20, help="of a step (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=5)
    parser.add_argument("--every-step", action="store_true", help="also send every step")
    parser.add_argument("--step-seconds", type=float, default=0.4, help="of a step (default: %(default)s)")
    parser.add_argument("--live-steps", type=int, default=200, help="to follow live (default: %(default)s)")
    add_out(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tracking-") as folder:
        synced = sync_long(Path(folder) / "long", arguments)
        followed = follow_live(Path(folder) / "live", arguments)
    result = {
        "question": "what does tracking cost a training, and how long does a long journal take to sync?",
        "steps": arguments.steps,
        "metrics": arguments.metrics,
        "attempts": arguments.attempts,
        "sync": synced,
        "live": followed,
        **circumstances("mlflow"),
    }
    print(summary(result))
    keep(result, arguments.out)
    kept = followed["share"] < SHARE_BOUND and synced["added_by_second"] == 0
    raise SystemExit(0 if kept and synced["seconds"] < SYNC_BOUND_SECONDS else 1)


def sync_long(run_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    begin(run_dir)
    each = arguments.steps // arguments.attempts
    for attempt in range(arguments.attempts):
        journal = Journal(run_dir)
        first = max(1, attempt * each + 1 - REPEATED)
        journal.write("start", first - 1, run="bench", commit="", world_size=1)
        last = arguments.steps if attempt == arguments.attempts - 1 else (attempt + 1) * each
        for step in range(first, last + 1):
            journal.write("step", step, **values(step, arguments.metrics))
        if attempt == arguments.attempts - 1:
            journal.write("stop", last, status="finished")
        journal.close()
    uri = f"sqlite:///{run_dir.parent / 'long.db'}"

    def send(every_step: bool) -> tuple[float, int]:
        started = time.perf_counter()
        project(run_dir, uri, EXPERIMENT, every_step=every_step)
        return time.perf_counter() - started, num_points(uri)

    seconds, points = send(False)
    again_seconds, again_points = send(False)
    found = {"seconds": seconds, "points": points, "again_seconds": again_seconds}
    found["added_by_second"] = again_points - points
    if arguments.every_step:
        found["every_step_seconds"], found["every_step_points"] = send(True)
    return found


def follow_live(run_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of the projection and seconds of the journal, by step, once the database is there."""
    begin(run_dir)
    journal = Journal(run_dir)
    journal.write("start", 0, run="live", commit="", world_size=1)
    live = LiveProjection(run_dir, f"sqlite:///{run_dir.parent / 'live.db'}", EXPERIMENT)
    live.start()
    [thread] = [t.native_id for t in threading.enumerate() if t.name == "mlflow-projection"]
    time.sleep(10 * arguments.step_seconds + 10)  # the database is made, which happens once
    writing, before = 0.0, processor_seconds(thread)
    for step in range(1, arguments.live_steps + 1):
        started = time.perf_counter()
        journal.write("step", step, **values(step, arguments.metrics))
        took = time.perf_counter() - started
        writing += took
        time.sleep(max(0.0, arguments.step_seconds - took))
    projecting = processor_seconds(thread) - before
    journal.write("stop", arguments.live_steps, status="finished")
    live.close()
    cost = (writing + projecting) / arguments.live_steps
    return {
        "steps": arguments.live_steps,
        "step_seconds": arguments.step_seconds,
        "journal_seconds_a_step": writing / arguments.live_steps,
        "projection_processor_seconds_a_step": projecting / arguments.live_steps,
        "share": cost / arguments.step_seconds,
    }


def begin(run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    config = Config()
    config.data.store = "stores/none"
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")


def values(step: int, num_metrics: int) -> dict[str, Any]:
    """A step line's, with so many metrics for MLflow."""
    told: dict[str, Any] = {
        "loss": 0.7 + math.exp(-step / 1000),
        "learning_rate": 1e-3,
        "tokens": 30_000 + step % 100,
        "step_seconds": 0.4,
        "samples": f"{step:064x}",
    }
    missing = num_metrics - len(metrics_of({"event": "step", "step": step, **told}))
    return told | {f"cost/number_{i}": step * 0.5 + i for i in range(missing)}


def num_points(uri: str) -> int:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as connection:
        return connection.execute("select count(*) from metrics").fetchone()[0]


def processor_seconds(thread: int | None) -> float:
    [times] = [t for t in psutil.Process().threads() if t.id == thread]
    return times.user_time + times.system_time


def summary(result: dict[str, Any]) -> str:
    synced, live = result["sync"], result["live"]
    lines = [
        f"journal of {result['steps']:,} steps, {result['metrics']} metrics, {result['attempts']} attempts: "
        f"{synced['points']:,} points sent in {synced['seconds']:.1f} s (asked: under {SYNC_BOUND_SECONDS:.0f}); "
        f"again in {synced['again_seconds']:.1f} s, {synced['added_by_second']} added",
        f"at a step of {live['step_seconds']} s: the journal takes {live['journal_seconds_a_step'] * 1e6:.0f} µs, the "
        f"projection {live['projection_processor_seconds_a_step'] * 1e3:.2f} ms of a processor, {live['share']:.2%} of "
        f"the step (asked: under {SHARE_BOUND:.0%})",
    ]
    if "every_step_seconds" in synced:
        lines.insert(1, f"every step: {synced['every_step_points']:,} points in {synced['every_step_seconds']:.0f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
