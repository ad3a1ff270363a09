"""Prepare an atlas as a laboratory would, and check what it then relies on: memory, bytes, resuming, mixing.

    python -m tools.synthetic_atlas ATLAS.h5ad
    python -m tools.check_atlas ATLAS.h5ad --work DIR [--out FILE]

`cctrain prepare ATLAS --workers N` runs with two workers, with one, and once more with two, killed and continued. The
exit code is 1 if a bound is broken:

    memory     2 GiB (--memory) for all processes of the command together. Five times a second, the peaks of those that
               live (VmHWM, kept by the kernel, so no moment is missed) are added up; what processes share counts once
               for each of them. The sum of their proportional shares (PSS), which counts it once, is shown beside it.
    bytes      Every file of the three stores has the same SHA-256.
    resuming   SIGKILL to all processes at half of the work (--kill-at), that is, of the processor time that the
               undisturbed run took, for a busy machine changes the other time. There is no store then; the same command
               says that it goes on from what is there, and needs less processor time than the undisturbed run.
    mixing     Batches of consecutive samples of a training epoch (cctrain.data.loading.order, with the defaults of
               data.block and data.mixed_blocks) have a mean entropy of `cell_type` within 1 % of a random
               permutation's. To show that the check can fail: the atlas's own order, and the order of training
               applied to the atlas's own order, that is, block reads of what was never shuffled.

Entropy is in bits, of the shares of the labels inside a batch, averaged over the whole batches of an epoch. The first
store stays in DIR/undisturbed until the next check there, those that equal it are removed. The logs of `prepare` stay.
"""

import argparse
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import psutil

from cctrain.config import DataConfig
from cctrain.data.loading.order import Order
from cctrain.data.store.store import TokenStore, open_store
from cctrain.errors import CctrainError, DataError
from tools.record import add_out, circumstances, keep

GIB = 2**30
UNDISTURBED, ONE_WORKER, KILLED, CONTINUED = "undisturbed", "one-worker", "killed", "continued"
STORE = "store"
MEMORY_BOUND_GIB, ENTROPY_BOUND = 2.0, 0.01
LABEL = "cell_type"
SECONDS_BETWEEN_LOOKS, LOOKS_PER_DISK_LOOK = 0.2, 10
SECONDS_TO_BE_GONE = 15.0
GOES_ON = re.compile(r"continu|resum|reus|goes on", re.IGNORECASE)


@dataclass(frozen=True)
class Watched:
    """A command and what all its processes took: seconds, and bytes of memory and disk at the worst moment seen."""

    seconds: float
    cpu_seconds: float  # of processes that ended by themselves
    killed: bool
    processes: int  # at once
    peak_bytes: int  # sum of VmHWM
    shared_once_bytes: int  # sum of PSS
    disk_bytes: int
    messages: list[str]


class Broken(Exception):
    """A check that cannot go on, in words."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("atlas", type=Path, help=f"an .h5ad sorted by its obs column `{LABEL}`")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and logs")
    parser.add_argument("--workers", type=int, default=2, help="of the first run; the second has one (default: 2)")
    parser.add_argument("--memory", type=float, default=MEMORY_BOUND_GIB, help="GiB for all processes (default: 2)")
    parser.add_argument("--kill-at", type=float, default=0.5, help="share of the work (default: 0.5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024], help="cells of a batch")
    parser.add_argument(
        "--epochs", type=int, default=1, help="over which entropy is averaged; a small atlas needs many"
    )
    add_out(parser)
    arguments = parser.parse_args()
    if arguments.workers < 2 or not 0 < arguments.kill_at < 1 or arguments.epochs < 1:
        parser.error("--workers is at least 2, --kill-at lies between 0 and 1, --epochs is at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what was started, as ever
    try:
        result = check(arguments)
    except (CctrainError, Broken) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    print(table(result))
    keep(result, arguments.out)
    raise SystemExit(1 if result["failures"] else 0)


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    atlas, work, workers = arguments.atlas, arguments.work, arguments.workers
    work.mkdir(parents=True, exist_ok=True)
    labels, num_counts = read_atlas(atlas)

    say(f"preparing {atlas} with {workers} workers")
    whole = prepare(atlas, work / UNDISTURBED, workers)
    say(f"{whole.seconds:,.0f} s; and with one")
    alone = prepare(atlas, work / ONE_WORKER, 1)
    say(f"{alone.seconds:,.0f} s; and with {workers}, killed")
    killed = prepare(atlas, work / KILLED, workers, kill_after=arguments.kill_at * whole.cpu_seconds)
    say(f"after {killed.seconds:,.0f} s; continuing")
    continued = prepare(atlas, work / KILLED, workers, fresh=False)
    say(f"{continued.seconds:,.0f} s; comparing, and looking at the order")

    store = open_store(work / UNDISTURBED / STORE)
    digests = file_digests(store.path)
    differences = {kind: differing(digests, file_digests(work / kind / STORE)) for kind in (ONE_WORKER, KILLED)}
    result: dict[str, Any] = {
        "question": "is an atlas prepared in bounded memory, to the same bytes whatever happens, and well mixed?",
        "atlas": {"bytes": atlas.stat().st_size, "cells": len(labels), "counts": num_counts},
        "store": {
            "bytes": sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
            "cells": store.num_cells,
            "tokens": int(store.num_tokens.sum()),
            "digest": store.digest,
            "files": len(digests),
        },
        "runs": {
            UNDISTURBED: asdict(whole),
            ONE_WORKER: asdict(alone),
            KILLED: asdict(killed),
            CONTINUED: asdict(continued),
        },
        "workers": workers,
        "kill_at": arguments.kill_at,
        "differing_files": differences,
        "mixing": mixing(store, labels, arguments.batches, arguments.epochs),
        "bounds": {"memory_bytes": int(arguments.memory * GIB), "entropy": ENTROPY_BOUND},
        **circumstances("numpy", "anndata", "zarr", "h5py"),
    }
    for kind in (ONE_WORKER, KILLED):
        if not differences[kind]:
            shutil.rmtree(work / kind)
    return result | {"failures": failures(result)}


def read_atlas(path: Path) -> tuple[np.ndarray, int]:
    """Codes of the labels in the atlas's order, int64 (cells,), and how many counts there are. Raises DataError."""
    try:
        with h5py.File(path, "r") as file:
            obs = anndata.io.read_elem(file["obs"])
            num_counts = len(file["X/data"])
    except (OSError, KeyError) as error:
        raise DataError(f"{path}: not an .h5ad with X in CSR and obs: {error}") from error
    if not isinstance(obs, pd.DataFrame) or LABEL not in obs:
        raise DataError(f"{path}: no column {LABEL} in obs, which entropy is about")
    return obs[LABEL].astype("category").cat.codes.to_numpy(np.int64), num_counts


def prepare(atlas: Path, folder: Path, workers: int, *, kill_after: float | None = None, fresh: bool = True) -> Watched:
    """`cctrain prepare` of FOLDER/store, of which nothing is there before if `fresh`.

    Broken if it fails; if it is to be killed after so many seconds of processors and needs fewer; if after that a store
    is there, or a process left.
    """
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / STORE
    command = [sys.executable, "-m", "cctrain", "prepare", str(atlas), "--out", str(out), "--workers", str(workers)]
    log = folder.parent / f"{folder.name if fresh else CONTINUED}.log"
    watched, exit_code = watch(command, log, folder, kill_after)
    if kill_after is None and exit_code != 0:
        raise Broken(f"`{' '.join(command)}` ended with exit code {exit_code}: {last_words(log)}")
    if kill_after is not None and not watched.killed:
        raise Broken(f"{out} was prepared in less than {kill_after:.1f} s of processors: lower --kill-at")
    if kill_after is not None and out.exists():
        raise Broken(f"{out} is there although its making was killed: it was never half, or the kill came too late")
    return watched


def watch(command: list[str], log: Path, folder: Path, kill_after: float | None) -> tuple[Watched, int]:
    """Run a command in a session of its own, its output into `log`, and look at all processes of the session.

    After `kill_after` seconds of processors all get SIGKILL; Broken if one outlives it. The exit code comes beside what
    was seen.
    """
    peak = shared_once = disk = processes = looks = 0
    started, cpu_before = time.perf_counter(), cpu_seconds_of_children()
    with log.open("w") as output:
        leader = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while leader.poll() is None:
                members = session_members(leader.pid)
                if kill_after is not None and sum(map(cpu_seconds_of, members)) > kill_after:
                    break
                memory = [memory_of(pid) for pid in members]
                processes = max(processes, len(members))
                peak = max(peak, sum(high_water for high_water, _ in memory))
                shared_once = max(shared_once, sum(share for _, share in memory))
                if looks % LOOKS_PER_DISK_LOOK == 0:
                    disk = max(disk, disk_bytes(folder))
                looks += 1
                time.sleep(SECONDS_BETWEEN_LOOKS)
            seconds = time.perf_counter() - started
            killed = leader.poll() is None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(leader.pid, signal.SIGKILL)
            exit_code = leader.wait()
    until = time.monotonic() + SECONDS_TO_BE_GONE
    while session_members(leader.pid):
        if time.monotonic() > until:
            raise Broken(f"processes {session_members(leader.pid)} are left of `{' '.join(command)}`")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    said = log.read_text(errors="replace").replace(str(folder), folder.name)  # results name no folder of a machine
    messages = [line for line in said.splitlines() if GOES_ON.search(line)]
    cpu_seconds = cpu_seconds_of_children() - cpu_before
    return Watched(seconds, cpu_seconds, killed, processes, peak, shared_once, disk, messages), exit_code


def cpu_seconds_of(pid: int) -> float:
    """Of a process and of those that it started and waited for; 0 if it is gone."""
    try:
        return sum(psutil.Process(pid).cpu_times()[:4])  # user, system, and both of the children
    except psutil.NoSuchProcess:
        return 0.0


def cpu_seconds_of_children() -> float:
    """Of all descendants of this process that ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def session_members(leader: int) -> list[int]:
    """Ids of the processes of a session that are alive, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes: the highest resident memory that a process ever had, and its proportional share now; 0 if it is gone."""
    values = []
    for name, key in (("status", "VmHWM:"), ("smaps_rollup", "Pss:")):
        try:
            lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            lines = []
        values.append(next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0))
    return values[0], values[1]


def disk_bytes(folder: Path) -> int:
    """What the files below a folder take; those that vanish meanwhile do not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total


def last_words(log: Path) -> str:
    """The last line that is not a frame of a box."""
    lines = [line.strip(" │╭╰─╮╯") for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path relative to it."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Files whose bytes differ, and those that only one of both has."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def mixing(store: TokenStore, labels: np.ndarray, batches: Sequence[int], epochs: int) -> list[dict[str, Any]]:
    """For each size of batch, the mean entropy in each order; `labels` are the atlas's, in its own order."""
    defaults = DataConfig()
    in_store = store.obs()[LABEL].iloc[: store.num_train].astype("category").cat.codes.to_numpy(np.int64)
    order = Order(store.num_train, store.digest, 0, defaults.block, defaults.mixed_blocks)
    of_atlas = Order(len(labels), store.digest, 0, defaults.block, defaults.mixed_blocks)
    rows = []
    for size in batches:
        if size > store.num_train:
            raise Broken(f"no batch of {size:,} cells among {store.num_train:,} training cells: lower --batches")
        orders = {
            "random": [np.random.default_rng(epoch).permutation(in_store) for epoch in range(epochs)],
            "training": [in_store[epoch_ids(order, epoch)] for epoch in range(epochs)],
            "unshuffled": [labels],
            "block_reads_of_unshuffled": [labels[epoch_ids(of_atlas, epoch)] for epoch in range(epochs)],
        }
        entropies = {name: float(np.mean([mean_entropy(x, size) for x in seen])) for name, seen in orders.items()}
        against = {f"{name}_against_random": entropies[name] / entropies["random"] - 1 for name in list(orders)[1:]}
        rows.append({"batch": size, **entropies, **against})
    return rows


def epoch_ids(order: Order, epoch: int) -> np.ndarray:
    return order.batch(epoch * order.num_samples, order.num_samples)


def mean_entropy(labels: np.ndarray, batch: int) -> float:
    """Bits, of the shares of the labels (int64, from 0) in each whole batch of consecutive ones, averaged."""
    num_batches, num_labels = len(labels) // batch, int(labels.max()) + 1
    in_batch = np.repeat(np.arange(num_batches), batch)
    cells = np.bincount(in_batch * num_labels + labels[: num_batches * batch], minlength=num_batches * num_labels)
    shares = cells[cells > 0] / batch
    return float(-(shares * np.log2(shares)).sum() / num_batches)


def failures(result: dict[str, Any]) -> list[str]:
    """One line for every bound that is broken; NaN breaks each."""
    found = []
    runs, bounds = result["runs"], result["bounds"]
    for kind, run in runs.items():
        if not run["peak_bytes"] < bounds["memory_bytes"]:
            found.append(f"memory, {kind}: {run['peak_bytes'] / GIB:.2f} GiB in {run['processes']} processes")
    for kind, files in result["differing_files"].items():
        if files:
            found.append(f"bytes, {kind}: {len(files)} files differ from {UNDISTURBED}'s, the first is {files[0]}")
    if not runs[CONTINUED]["messages"]:
        found.append("resuming: the continued run did not say that it goes on from what was there")
    whole, continued = runs[UNDISTURBED]["cpu_seconds"], runs[CONTINUED]["cpu_seconds"]
    if not continued < whole:
        found.append(f"resuming: the continued run took {continued:.1f} s of processors, a whole one {whole:.1f} s")
    for row in result["mixing"]:
        if not abs(row["training_against_random"]) < bounds["entropy"]:
            found.append(f"mixing, batches of {row['batch']}: {row['training_against_random']:+.2%} against random")
        if not abs(row["unshuffled_against_random"]) > bounds["entropy"]:
            found.append(f"mixing, batches of {row['batch']}: the atlas is not sorted, so nothing was shown")
    return found


def table(result: dict[str, Any]) -> str:
    atlas, store, runs = result["atlas"], result["store"], result["runs"]
    lines = [
        f"atlas {atlas['cells']:,} cells, {atlas['counts']:,} counts, {atlas['bytes'] / 1e9:.2f} GB; store "
        f"{store['cells']:,} cells, {store['tokens']:,} tokens, {store['bytes'] / 1e9:.2f} GB "
        f"({store['bytes'] / store['tokens']:.2f} bytes a token) in {store['files']} files",
        "",
        f"{'':<12} {'seconds':>8} {'CPU s':>8} {'cells/s':>9} {'counts/s':>11} {'memory':>10} {'(PSS)':>10} "
        f"{'processes':>9} {'disk':>9}",
    ]
    for kind, run in runs.items():
        rates = [f"{atlas[what] / run['seconds']:,.0f}" for what in ("cells", "counts")]
        cells, counts = rates if kind in (UNDISTURBED, ONE_WORKER) else ("", "")
        memory, shared_once = (f"{run[name] / 2**20:,.0f} MiB" for name in ("peak_bytes", "shared_once_bytes"))
        lines.append(
            f"{kind:<12} {run['seconds']:>8,.1f} {run['cpu_seconds']:>8,.1f} {cells:>9} {counts:>11} {memory:>10} "
            f"{shared_once:>10} {run['processes']:>9} {run['disk_bytes'] / 1e9:>6.2f} GB"
        )
    lines += ["", *(f"{CONTINUED}: {message.strip()}" for message in runs[CONTINUED]["messages"][:3]), ""]
    lines.append(f"{'batch':>6} {'random':>8} {'training':>18} {'unshuffled':>18} {'its block reads':>18}   (bits)")
    for row in result["mixing"]:
        columns = ("training", "unshuffled", "block_reads_of_unshuffled")
        compared = " ".join(f"{row[name]:>8.4f} {row[f'{name}_against_random']:>+8.2%} " for name in columns)
        lines.append(f"{row['batch']:>6} {row['random']:>8.4f}  {compared}")
    return "\n".join([*lines, "", *(result["failures"] or ["every bound holds"])])


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
