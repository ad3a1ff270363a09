"""One attempt of a run: follow its steps, look at held-out cells, save, and leave when asked; all of it recorded."""

import logging
import math
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cctrain import __version__
from cctrain.code_version import code_commit
from cctrain.config import Config, to_yaml
from cctrain.data.loading.batches import Batch
from cctrain.data.loading.loader import Loader
from cctrain.data.loading.order import Order
from cctrain.data.store.store import TokenStore
from cctrain.errors import CctrainError, TrainingError
from cctrain.model.saved import save_weights
from cctrain.parallel.mesh import Mesh, first_rank_says
from cctrain.run_directory import CHECKPOINTS, CONFIG, WEIGHTS, write_atomically, write_vocabulary
from cctrain.tracking.journal import Journal
from cctrain.tracking.projection import LiveProjection, default_uri
from cctrain.training.checkpoint import save_checkpoint
from cctrain.training.checkpoint_files import checkpoint_name, discard_leftovers, prune, read_weights
from cctrain.training.guards import ENDINGS, Ending, SkippedSteps, StopRequests, Watchdog, read_outcome, write_outcome
from cctrain.training.loop import StepResult, evaluate_held_out, run_steps
from cctrain.training.report import Report
from cctrain.training.resume import Past

log = logging.getLogger(__name__)

FINISHED = Ending("finished", 0)


@dataclass(frozen=True)
class Start:
    """Where an attempt begins: after `step`, with `position` samples consumed."""

    step: int
    position: int
    past: Past
    facts: dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """What an attempt is made of, on one rank."""

    config: Config
    run_dir: Path
    mesh: Mesh
    store: TokenStore
    engine: Any
    loader: Loader
    order: Order
    held_out: list[Batch]
    requests: StopRequests
    watchdog: Watchdog
    start: Start


def follow(attempt: Attempt, journal: Journal | None, report: Report) -> Ending:
    """Take one step after another until all are done or the ranks agree to stop.

    The journal is the first rank's. After a step: its line, a look at the held-out cells, a checkpoint, in this order.
    """
    config, start = attempt.config, attempt.start
    looks, checkpoint = config.evaluation, config.checkpoint
    skipped = SkippedSteps(config.training.max_skipped)
    ending, reason = FINISHED, None
    results = run_steps(
        attempt.engine,
        config,
        attempt.mesh,
        attempt.loader,
        attempt.order,
        start.step,
        start.position,
        attempt.requests.local,
    )
    with report.progress(), closing(results):
        # An attempt that was asked to stop at a step may not have had the time to look.
        is_due = looks.every and start.step % looks.every == 0 and start.step not in start.past.looks
        if first_rank_says(bool(is_due), attempt.mesh):
            look(attempt, journal, report, start.step)
        saved, stood_still = start.step, 0.0
        for result in results:
            step, is_last = result.step, result.step == config.training.steps
            attempt.watchdog.beat(f"after step {step}")
            report.step(step, result.values)
            result.values["utilisation"] = report.utilisation(result.values)
            if stood_still:
                result.values["checkpoint_seconds"], stood_still = stood_still, 0.0
            note_step(journal, result)
            took = result.applied or (config.training.precision == "fp16" and math.isfinite(result.values["loss"]))
            skipped.check(step, took, result.samples)
            decision = attempt.requests.agreed(result.requests)
            nll = None
            if looks.every and (step % looks.every == 0 or is_last) and (is_last or decision.stop is None):
                nll = look(attempt, journal, report, step)
            is_due = checkpoint.every and step % checkpoint.every == 0
            if is_last or is_due or decision.save:
                stood_still = save(attempt, journal, result, nll)
                saved = step
            if decision.save:
                attempt.requests.obeyed()
            if decision.stop is not None and not is_last:
                ending, reason = ENDINGS[decision.stop], decision.stop
                break
    if attempt.mesh.is_first:
        if ending is FINISHED:
            last = attempt.run_dir / CHECKPOINTS / checkpoint_name(saved)
            save_weights(read_weights(last), attempt.run_dir / WEIGHTS)
            log.info("weights: %s", attempt.run_dir / WEIGHTS)
        if journal is not None:
            journal.write("stop", saved, status=ending.outcome, reason=reason)
        write_outcome(attempt.run_dir, ending.outcome)
    return ending


def tell_ending(run_dir: Path, error: BaseException) -> None:
    """RUN/outcome for an attempt that an error or a second Ctrl-C ends.

    Anything but an error of ours leaves no word, as a kill does: a lost rank or node breaks the connections of the
    others, and starting again may well be right.
    """
    word = "failed" if isinstance(error, CctrainError) else "stopped" if isinstance(error, KeyboardInterrupt) else None
    with suppress(OSError):  # the disk may be what failed
        # An interruption while MLflow is sent the rest takes nothing back.
        if word is not None and read_outcome(run_dir) is None:
            write_outcome(run_dir, word)


def note_step(journal: Journal | None, result: StepResult) -> None:
    if journal is None:
        return
    journal.write("step", result.step, **result.values)
    if not result.applied:
        reason = "gradient" if math.isfinite(result.values["loss"]) else "loss"
        journal.write("skip", result.step, reason=reason, sample_ids=result.samples)
        log.warning("step %d was skipped: its %s is not finite", result.step, reason)


def look(attempt: Attempt, journal: Journal | None, report: Report, step: int) -> float:
    """Write down the NLL of the held-out cells; returns it."""
    started = time.perf_counter()
    values = evaluate_held_out(attempt.engine, attempt.mesh, attempt.held_out, attempt.watchdog.beat)
    report.look(values)
    if journal is not None:
        journal.write("evaluate", step, **values, seconds=time.perf_counter() - started)
    return values["nll"]


def save(attempt: Attempt, journal: Journal | None, result: StepResult, nll: float | None) -> float:
    """Write a checkpoint, then remove the ones that need not be kept; returns how many seconds both took."""
    started = time.perf_counter()
    attempt.watchdog.beat(f"saving the checkpoint of step {result.step}")
    facts = {
        "position": result.position,
        "held_out_nll": nll if nll is not None and math.isfinite(nll) else None,
        "precision": attempt.config.training.precision,
        "store_digest": attempt.store.digest,
        "attempt": attempt.start.past.attempts + 1,
        "config": to_yaml(attempt.config),
    }
    saved = save_checkpoint(attempt.engine, attempt.run_dir, attempt.mesh, result.step, facts)
    if journal is not None:
        journal.write("checkpoint", result.step, **saved)
        keep = attempt.config.checkpoint
        prune(attempt.run_dir, keep.keep, keep.keep_every, keep.keep_best)
        log.debug("checkpoint: %s", saved["path"])
    attempt.watchdog.beat(f"after saving the checkpoint of step {result.step}")
    return time.perf_counter() - started


@contextmanager
def recorded(attempt: Attempt) -> Iterator[Journal | None]:
    """The run's directory, journal and MLflow projection, on the first rank; None on the others."""
    if not attempt.mesh.is_first:
        yield None
        return
    run_dir, config, start = attempt.run_dir, attempt.config, attempt.start
    discard_leftovers(run_dir)
    (run_dir / WEIGHTS).unlink(missing_ok=True)  # of a run that goes on; its checkpoint has them
    write_atomically(run_dir / CONFIG, to_yaml(config).encode())
    write_vocabulary(run_dir, attempt.store.genes.ids.tolist(), attempt.store.genes.names.tolist())
    journal = Journal(run_dir, start.past.attempts + 1)
    journal.write("start", start.step, **start_facts(attempt))
    if start.past.attempts:
        log.info("attempt %d: resuming after step %s", journal.attempt, f"{start.step:,}")
    uri = config.tracking.uri or default_uri(run_dir)
    patience = min(60.0, config.training.hang_seconds / 2)  # shorter than the watchdog's
    projection = LiveProjection(run_dir, uri, config.tracking.experiment, close_within=patience) if uri else None
    if projection is None:
        log.info("tracking: the journal only; `cctrain sync %s` sends it to MLflow later", run_dir)
    else:
        projection.start()

    def last_words(error: BaseException) -> None:
        status = "failed" if isinstance(error, Exception) else "stopped"
        reason = str(error) if isinstance(error, CctrainError) else repr(error)
        with suppress(TrainingError):  # the disk may be what failed
            journal.write("stop", journal.last_step, status=status, reason=reason)
        tell_ending(run_dir, error)  # before MLflow, for which the scheduler may not leave the time

    attempt.watchdog.last_words = lambda reason: last_words(TrainingError(reason))
    try:
        yield journal
    except BaseException as error:
        if not attempt.watchdog.is_ending:  # or it has said why
            last_words(error)
        raise
    finally:
        attempt.watchdog.last_words = None
        journal.close()
        if projection is not None:
            projection.close()


def start_facts(attempt: Attempt) -> dict[str, Any]:
    config, mesh = attempt.config, attempt.mesh
    return {
        "run": attempt.start.past.run or uuid.uuid4().hex,
        "cctrain": __version__,
        "torch": torch.__version__,
        "commit": code_commit(),
        "store_digest": attempt.store.digest,
        "world_size": mesh.num_ranks,
        "device": mesh.device.type,
        "context_ranks": mesh.num_context_ranks,
        "zero_stage": config.parallel.zero_stage,
        "precision": config.training.precision,
        "threads": torch.get_num_threads(),
        **attempt.start.facts,
    }
