"""Kill a training at random moments, resume it by the same command, and compare it with an undisturbed one bit for bit.

    tools/chaos.sh --kills 100 [--seed S] [--steps N] [--out FILE]

For each of four kinds (ZeRO 2 and 3, fp32 and bf16; two ranks): one undisturbed run, then one that is killed with
SIGKILL until its share of the kills is done, each time resumed by the very command that started it. A seed decides at
which moments and whom: all processes of the run, one rank, or the launcher alone. Where a kill really fell is read
from what it left on the disk.

A kill is survived if every process of the run is gone soon after it, every checkpoint that is there is whole, the next
attempt goes on from the latest one, and in the end journal, weights and optimizer state are those of the undisturbed
run, to the last bit, and MLflow holds each step once. Times are not compared.
"""

import argparse
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from cctrain.errors import CheckpointError
from cctrain.run_directory import CHECKPOINTS
from cctrain.tracking.journal import history, read_journal
from cctrain.training.checkpoint_files import damaged_files, read_manifest
from cctrain.training.guards import read_outcome
from tools.chaos_attempt import (
    BEFORE_FIRST,
    BETWEEN,
    EVERY,
    IN_SAVE,
    LAUNCHER,
    NUM_RANKS,
    PHASES,
    RANKS,
    Attempt,
    Kind,
    attempt_of,
    cctrain,
    comparable,
    final_state,
    find_processes,
    is_alive,
    last_step,
    latest_step,
    latest_text,
    leftovers,
    lines_of,
    measured,
    phase_of,
    prepare,
    processes_of,
    tail,
)
from tools.record import add_out, circumstances, keep

KINDS = tuple(Kind(stage, precision) for stage in (2, 3) for precision in ("fp32", "bf16"))
STEPS = 120
MIN_KILLS = 2  # of a kind: one before the first checkpoint, one inside a save
SECONDS_TO_BE_GONE = 15.0  # for all processes of a run, after a kill; on an idle machine it takes them 3
SECONDS_OF_ATTEMPT = 600.0
EXIT_CODE_OF_LOST_RANK = 5
ALL = "all processes"
VICTIMS = (ALL, LAUNCHER, *RANKS)


@dataclass(frozen=True)
class Kill:
    """`moment`: start-up, step, save, saved (`latest` has moved) or end; all but the first wait for an attempt that
    has done `step`. `share` of the moment's usual duration passes before the kill."""

    moment: str
    step: int
    share: float
    victim: str


@dataclass(frozen=True)
class Killed:
    """What a kill did."""

    kind: Kind
    victim: str
    phase: str
    step: int  # the last one in the journal
    seconds: float  # from the start of the attempt to the kill
    gone_after: float


@dataclass(frozen=True)
class Undisturbed:
    """What the run comes to when nobody disturbs it, and how many seconds its parts take."""

    history: list[str]
    lines: dict[tuple[str, int], str]
    state: dict[str, str]
    start_up: float
    step: float
    save: float
    end: float


class Fault(Exception):
    """What a run must not do, in words."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of all four kinds together")
    parser.add_argument("--seed", type=int, help="of moments and victims; default: a new one")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    add_out(parser)
    arguments = parser.parse_args()
    if arguments.kills < MIN_KILLS * len(KINDS):
        parser.error(f"--kills: at least {MIN_KILLS * len(KINDS)}, {MIN_KILLS} of each kind")
    if arguments.steps < 3 * EVERY:
        parser.error(f"--steps: at least {3 * EVERY}, three checkpoints")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what was started, as ever
    folder = Path(tempfile.mkdtemp(prefix="cctrain-chaos-"))
    faults = None
    try:
        result = chaos(folder, KINDS, arguments.kills, arguments.steps, arguments.seed)
        faults = result["faults"]
    finally:
        if faults == []:
            shutil.rmtree(folder)
        else:
            say(f"the runs are kept in {folder}")
    keep(result, arguments.out)
    raise SystemExit(1 if faults else 0)


def chaos(folder: Path, kinds: Sequence[Kind], kills: int, steps: int, seed: int | None = None) -> dict[str, Any]:
    """Kill `kills` times, shared among the kinds; returns the result, with every fault in words."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    started = time.monotonic()
    say(f"seed {seed}: {kills} kills, {len(kinds)} kinds of training, {steps} steps each")
    config = prepare(folder, steps)
    done: list[Killed] = []
    faults: dict[Kind, list[str]] = {}
    for index, kind in enumerate(kinds):
        share = kills * (index + 1) // len(kinds) - kills * index // len(kinds)
        plan = plan_kills(share, steps, random.Random(f"{seed} {kind}"))
        undisturbed = train_undisturbed(folder / f"{kind} undisturbed", config, kind)
        say(f"{kind}: undisturbed, {undisturbed.start_up:.1f} s to the first step, {undisturbed.step:.3f} s a step")
        faults[kind] = []
        for event in disturb(folder / f"{kind} disturbed", config, kind, plan, undisturbed):
            if isinstance(event, Fault):
                faults[kind].append(str(event))
                say(f"FAULT: {event}")
                continue
            done.append(event)
            say(
                f"kill {len(done)} of {kills}: {event.victim}, {event.phase}, step {event.step}, {event.seconds:.1f} s "
                f"after the start; all gone after {event.gone_after:.2f} s"
            )
    result = summary(done, faults, kills, seed, time.monotonic() - started)
    say(f"{result['verdict']}, {result['seconds']['per_kill']:.1f} s a kill")
    return {**result, "steps": steps, "checkpoint_every": EVERY}


def summary(done: list[Killed], faults: dict[Kind, list[str]], kills: int, seed: int, seconds: float) -> dict[str, Any]:
    # Which of the kills did it, nobody knows: where there is a fault, none of that kind counts.
    survived = sum(not faults[killed.kind] for killed in done)
    phases = {phase: Counter(killed.victim for killed in done if killed.phase == phase) for phase in PHASES}
    return {
        "question": f"killed at random moments and resumed by the same command on {NUM_RANKS} ranks: does the run end "
        "bit for bit as the undisturbed one?",
        "verdict": f"{survived} of {kills}",
        "seed": seed,
        "kills": len(done),
        "by_kind": {str(kind): sum(killed.kind == kind for killed in done) for kind in faults},
        "by_victim": {victim: sum(killed.victim == victim for killed in done) for victim in VICTIMS},
        "by_phase": {phase: {"kills": victims.total(), **victims} for phase, victims in phases.items()},
        "seconds": {
            "wall": round(seconds, 1),
            "per_kill": round(seconds / max(1, len(done)), 2),
            "allowed_until_all_gone": SECONDS_TO_BE_GONE,
            "longest_until_all_gone": round(max((killed.gone_after for killed in done), default=0.0), 2),
        },
        "faults": [f"{kind}: {fault}" for kind, found in faults.items() for fault in found],
        **circumstances("torch", "deepspeed"),
    }


def plan_kills(kills: int, steps: int, draw: random.Random) -> list[Kill]:
    """Moments over the whole life of a run, in the order of its steps.

    The first kill comes before the first checkpoint, with steps to spare; one hits all processes at the beginning of a
    save; of more than three, the last comes after the last step.
    """
    victims = (ALL, *VICTIMS)
    steps_of_others = sorted(draw.randrange(EVERY - 1, steps) for _ in range(kills - 1))
    plan = [Kill("step", draw.randint(1, EVERY - 3), draw.random(), draw.choice(victims))]
    for step in steps_of_others:
        moment = draw.choices(("start-up", "step", "save", "saved"), weights=(4, 6, 3, 1))[0]
        plan.append(Kill(moment, step, draw.random(), draw.choice(victims)))
    if kills > 3:
        plan[-1] = replace(plan[-1], moment="end", step=steps)
    certain = draw.randrange(1, max(2, kills - 1))
    # With saves to spare, should the first one be over before it is noticed.
    plan[certain] = replace(into_save(plan[certain]), step=min(plan[certain].step, steps // 2))
    return plan


def into_save(kill: Kill) -> Kill:
    return replace(kill, moment="save", share=0.0, victim=ALL)


def train_undisturbed(folder: Path, config: Path, kind: Kind) -> Undisturbed:
    with attempt_of(folder, config, kind) as attempt:
        try:
            wait_for_end(attempt)
        except Fault as fault:
            raise SystemExit(f"{kind}: the undisturbed run failed: {fault}") from fault
    lines = read_journal(attempt.run_dir)
    times = [datetime.fromisoformat(line["time"]).timestamp() for line in lines]
    steps = [moment for line, moment in zip(lines, times, strict=True) if line["event"] == "step"]
    return Undisturbed(
        history=comparable(history(lines)),
        lines={(line["event"], line["step"]): comparable([line])[0] for line in measured(lines)},
        state=final_state(attempt.run_dir),
        start_up=steps[0] - attempt.started,
        step=(steps[-1] - steps[0]) / (len(steps) - 1),
        save=statistics.median(line["seconds"] for line in lines if line["event"] == "checkpoint"),
        end=times[-1] - steps[-1],
    )


def disturb(
    folder: Path, config: Path, kind: Kind, plan: list[Kill], undisturbed: Undisturbed
) -> Iterator[Killed | Fault]:
    """Start, kill, and start again until the plan is done; then to the end. Stops at the first fault."""
    queue = list(plan)
    last = max(step for _, step in undisturbed.lines)
    try:
        while queue:
            kill = queue.pop(0)
            latest = latest_step(folder / "run")
            with attempt_of(folder, config, kind) as attempt:
                processes = wait_for_moment(attempt, kill, undisturbed)
                killed = None if processes is None else strike(attempt, kill, kind, processes, last)
                if killed is None:
                    # It was done before its kill. The next attempt finds nothing to do, and is killed as it starts.
                    wait_for_end(attempt)
                    queue.insert(0, replace(kill, moment="start-up", share=kill.share / 2))
                else:
                    if queue and kill == into_save(kill) and killed.phase != IN_SAVE:
                        queue[0] = into_save(queue[0])  # the save was faster: once more
                    yield killed
            check_attempt(attempt, latest, undisturbed)
        latest = latest_step(folder / "run")
        with attempt_of(folder, config, kind) as attempt:
            wait_for_end(attempt)
        check_attempt(attempt, latest, undisturbed)
        check_end(attempt, undisturbed)
        check_tracking(attempt, last)
    except Fault as fault:
        yield fault


def wait_for_moment(attempt: Attempt, kill: Kill, usual: Undisturbed) -> dict[str, psutil.Process] | None:
    """Return at the kill's moment, with the processes there are; None if the attempt ended before."""
    if kill.moment == "start-up":
        time.sleep(kill.share * usual.start_up)
        # A victim must exist; the launcher starts its ranks after a while.
        return until(attempt, lambda: found if kill.victim in {ALL, *(found := find_processes(attempt))} else None)
    if until(attempt, lambda: last_step(attempt) >= kill.step) is None:
        return None
    found = find_processes(attempt)  # now, for it takes longer than some moments last
    folder = attempt.run_dir / CHECKPOINTS
    seen = latest_text(folder)
    delay = 0.0
    if kill.moment == "step":
        delay = kill.share * usual.step
    elif kill.moment == "end":
        delay = kill.share * 1.5 * usual.end
    elif kill.moment == "save":
        if until(attempt, lambda: leftovers(folder, "partial"), pause=0.0005) is None:
            return None
        delay = kill.share * usual.save
    elif until(attempt, lambda: latest_text(folder) != seen, pause=0.0005) is None:
        return None
    time.sleep(delay)
    return found if attempt.launcher.poll() is None else None


def until(attempt: Attempt, look: Callable[[], Any], pause: float = 0.005) -> Any:
    """What `look` returns, once that is true; None if the attempt ends before."""
    deadline = time.monotonic() + SECONDS_OF_ATTEMPT
    while not (seen := look()):
        if attempt.launcher.poll() is not None:
            return None
        if time.monotonic() > deadline:
            raise Fault(f"attempt {attempt.number} stands still after step {last_step(attempt)}:\n{tail(attempt)}")
        time.sleep(pause)
    return seen


def strike(attempt: Attempt, kill: Kill, kind: Kind, processes: dict[str, psutil.Process], last: int) -> Killed | None:
    """Kill the victim; see where that fell, and that nothing of the run goes on or is half there.

    None if all had ended in order before the kill had any effect.
    """
    # After the last step a rank may have left already.
    victim = kill.victim if kill.victim in processes and is_alive(processes[kill.victim]) else ALL
    seconds, struck = time.time() - attempt.started, time.monotonic()
    for process in processes.values() if victim == ALL else [processes[victim]]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if victim == ALL:
        gone_after = wait_until_gone(attempt, processes, struck)  # nobody writes any more: the phase is certain
        phase, step = phase_of(attempt, last), last_step(attempt)
    else:
        phase, step = phase_of(attempt, last), last_step(attempt)
        gone_after = wait_until_gone(attempt, processes, struck)
    what = f"{victim} killed {phase}, step {step}"
    code = attempt.launcher.wait()
    if code == 0 and read_outcome(attempt.run_dir) == "finished":
        return None
    if code != (EXIT_CODE_OF_LOST_RANK if victim in RANKS else -signal.SIGKILL):
        raise Fault(f"{what}: the launcher ended with exit code {code}:\n{tail(attempt)}")
    outcome = read_outcome(attempt.run_dir)
    if outcome is not None and (outcome != "finished" or phase in (BEFORE_FIRST, BETWEEN)):
        raise Fault(f"{what}: the outcome says {outcome!r}:\n{tail(attempt)}")
    for path in sorted((attempt.run_dir / CHECKPOINTS).glob("step-*")):
        try:
            damage = damaged_files(path, read_manifest(path))
        except CheckpointError as error:
            damage = [str(error)]
        if damage:
            raise Fault(f"{what}: {path.name} is not whole: {'; '.join(damage)}")
    return Killed(kind, victim, phase, step, seconds, gone_after)


def wait_until_gone(attempt: Attempt, processes: dict[str, psutil.Process], struck: float) -> float:
    """Seconds until none of these processes, nor any other that the attempt started, is left."""
    while attempt.launcher.poll() is None or any(map(is_alive, processes.values())) or processes_of(attempt.mark):
        if time.monotonic() - struck > SECONDS_TO_BE_GONE:
            left = [" ".join(process.cmdline()) for process in processes_of(attempt.mark)]
            raise Fault(f"{SECONDS_TO_BE_GONE:g} s after a kill there is still {left}:\n{tail(attempt)}")
        time.sleep(0.02)
    return time.monotonic() - struck


def wait_for_end(attempt: Attempt) -> None:
    """The attempt ends by itself, in order, and leaves no process behind."""
    try:
        code = attempt.launcher.wait(SECONDS_OF_ATTEMPT)
    except subprocess.TimeoutExpired as error:
        raise Fault(
            f"attempt {attempt.number} did not end within {SECONDS_OF_ATTEMPT:g} s:\n{tail(attempt)}"
        ) from error
    if code != 0:
        raise Fault(f"attempt {attempt.number} ended by itself with exit code {code}:\n{tail(attempt)}")
    wait_until_gone(attempt, {}, time.monotonic())


def check_attempt(attempt: Attempt, latest: int, undisturbed: Undisturbed) -> None:
    """It went on after the latest checkpoint, and every line that it wrote is that of the undisturbed run."""
    lines = lines_of(attempt)
    if lines and lines[0]["step"] != latest:
        raise Fault(f"attempt {attempt.number} began after step {lines[0]['step']}; the latest checkpoint was {latest}")
    for line, text in zip(measured(lines), comparable(lines), strict=True):
        expected = undisturbed.lines.get((line["event"], line["step"]))
        if text != expected:
            raise Fault(f"attempt {attempt.number} wrote {text}, the undisturbed run {expected}")


def check_end(attempt: Attempt, undisturbed: Undisturbed) -> None:
    if (outcome := read_outcome(attempt.run_dir)) != "finished":
        raise Fault(f"the run has ended, and its outcome is {outcome!r}")
    if comparable(history(read_journal(attempt.run_dir))) != undisturbed.history:
        raise Fault("the history is not that of the undisturbed run")
    state = final_state(attempt.run_dir)
    if state != undisturbed.state:
        differing = sorted(
            name for name in state.keys() | undisturbed.state if state.get(name) != undisturbed.state.get(name)
        )
        raise Fault(f"other bytes than in the undisturbed run: {', '.join(differing)}")


def check_tracking(attempt: Attempt, last: int) -> None:
    """After all the restarts MLflow holds one run, with each step once."""
    folder = attempt.run_dir.parent
    done = cctrain(folder, "sync", "run")  # a kill may have come between the journal's last line and MLflow
    if done.returncode != 0:
        raise Fault(f"cctrain sync failed:\n{done.stderr}")
    with closing(sqlite3.connect(folder / "mlflow.db")) as store:
        runs = store.execute("select count(*) from runs").fetchone()[0]
        steps = [step for (step,) in store.execute("select step from metrics where key = 'train/loss' order by step")]
    if runs != 1 or steps != list(range(1, last + 1)):
        raise Fault(f"MLflow holds {runs} runs, and in them the steps {steps}")


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
