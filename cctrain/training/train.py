"""A run from its configuration to its weights: open, build, resume, train, leave. Control flow; details elsewhere."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch

from cctrain.config import Config
from cctrain.data.loading.loader import Loader
from cctrain.data.store.store import GeneTable, open_store
from cctrain.errors import DataError, TrainingError, UsageError
from cctrain.model.transformer import Transformer, initialize
from cctrain.parallel.exchange import context_exchange
from cctrain.parallel.mesh import Mesh, agree_on_errors, first_rank_says, join_mesh
from cctrain.run_directory import WEIGHTS, log_file
from cctrain.run_lock import hold_run
from cctrain.tracking.address import check_configured_uri
from cctrain.training.activation_files import check_room_for_activations
from cctrain.training.attempt import FINISHED, Attempt, Start, follow, recorded, tell_ending
from cctrain.training.checkpoint import load_checkpoint
from cctrain.training.checkpoint_files import latest_checkpoint, step_of
from cctrain.training.data import (
    held_out_batches,
    resolve,
    resolve_micro_batch,
    share_of,
    training_order,
    training_rule,
    weights_digest,
)
from cctrain.training.engine import build_engine, sharded_if_wanted, whole
from cctrain.training.guards import Ending, StopRequests, Watchdog, clear_outcome, record_crashes, write_outcome
from cctrain.training.initial_weights import start_from
from cctrain.training.report import Report
from cctrain.training.resume import check_changes, check_checkpoints_are_there, read_past

log = logging.getLogger(__name__)


def train(config: Config, accept_changes: bool = False) -> int:
    """Train the run that `config` describes, or resume it if its directory holds a checkpoint.

    All ranks call this, on as many as the environment says. Returns the exit code: 0 when all steps are done or the
    run was asked to stop, 130 after Ctrl-C; RUN/outcome tells these apart.
    """
    if config.tracking.uri is not None:
        check_configured_uri(config.tracking.uri)
    run_dir, patience = Path(config.run.dir or ""), config.training.hang_seconds
    rank = int(os.environ.get("RANK", "0"))
    record_crashes(log_file(run_dir, rank))
    with (
        StopRequests(run_dir, is_first=rank == 0) as requests,
        join_mesh(patience + 60, config.parallel.context, config.training.precision) as mesh,
        run_held(run_dir, mesh),  # which may wait for a lease to run out
        Watchdog(patience, [log_file(run_dir, rank)], rank=rank) as watchdog,
        ending_told(run_dir, mesh, watchdog),
    ):
        return run_attempt(config, accept_changes, mesh, requests, watchdog).exit_code


def run_attempt(config: Config, accept_changes: bool, mesh: Mesh, requests: StopRequests, watchdog: Watchdog) -> Ending:
    """From where the run stands to its last step, or to where it is asked to stop."""
    run_dir = Path(config.run.dir or "")
    store = open_store(Path(config.data.store), config.data.digest)
    if store.num_train == 0:
        raise DataError(f"{store.path} has no training cells: prepare again")
    if store.num_train == store.num_cells and config.evaluation.every:
        raise DataError(
            f"{store.path} has no held-out cells: prepare again, or train without a look, evaluation.every=0"
        )
    config = resolve(config, store)
    loader = Loader(store, training_rule(config, store), share_of(mesh), config.data.micro_batch_tokens or 0)
    config.data.micro_batch_tokens = loader.micro_batch_tokens = resolve_micro_batch(config, loader)
    check_room_for_activations(config, mesh)
    order = training_order(config, loader)
    config.data.weights_digest = config.data.weights_digest or weights_digest(order)
    if config.data.weights_digest != weights_digest(order):
        raise DataError(
            f"{store.path}: obs column '{config.data.weights}' holds other weights than those asked for "
            "(data.weights_digest): point data.store to the store with these weights"
        )
    past = read_past(run_dir)
    has_begun = past.attempts > 0 or latest_checkpoint(run_dir) is not None
    changes = check_changes(run_dir, config, accept_changes) if has_begun else []
    check_checkpoints_are_there(run_dir, past)
    if first_rank_says(is_finished(run_dir, config), mesh):
        log.info("%s has finished: all %s steps are done", run_dir, f"{config.training.steps:,}")
        if mesh.is_first:
            write_outcome(run_dir, FINISHED.outcome)
        return FINISHED
    if mesh.is_first:
        clear_outcome(run_dir)

    model = build_model(config, store.genes, mesh)
    model.progress = watchdog.beat  # a hung collective is between two stages; a step may take longer than patience
    facts = {"changes": [str(change) for change in changes]} if changes else {}
    if config.model.init_from is not None and latest_checkpoint(run_dir) is None:
        facts |= start_from(model, store.genes.ids.tolist(), Path(config.model.init_from))
    watchdog.beat("building the engine")
    engine = build_engine(model, config, mesh)
    watchdog.beat("loading the checkpoint")
    manifest = load_checkpoint(engine, run_dir, mesh)
    step, position = (0, 0) if manifest is None else (manifest["step"], manifest["position"])
    start = Start(step, position, past, facts)
    held_out = held_out_batches(config, store, loader) if config.evaluation.every else []
    attempt = Attempt(config, run_dir, mesh, store, engine, loader, order, held_out, requests, watchdog, start)
    report = Report(config, mesh, store, loader, step)  # measures this machine: before MLflow is imported beside it
    with recorded(attempt) as journal:
        return follow(attempt, journal, report)


def is_finished(run_dir: Path, config: Config) -> bool:
    latest = latest_checkpoint(run_dir)
    return latest is not None and step_of(latest) >= config.training.steps and (run_dir / WEIGHTS).is_file()


@contextmanager
def run_held(run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """The first rank holds the run's lock; the others wait until it does, and all raise UsageError if it cannot."""
    with ExitStack() as stack:
        refusal = None
        if mesh.is_first:
            try:
                stack.enter_context(hold_run(run_dir))
            except UsageError as error:
                refusal = str(error)
        if said := agree_on_errors(refusal, mesh):
            raise UsageError(said[0])
        yield


@contextmanager
def ending_told(run_dir: Path, mesh: Mesh, watchdog: Watchdog) -> Iterator[None]:
    """RUN/outcome where no attempt could write it: an error or a hang before the first step.

    What the attempt before has left stands until `run_attempt` has found nothing to refuse.
    """
    if not mesh.is_first:
        yield
        return

    def tell_hang(reason: str) -> None:
        clear_outcome(run_dir)
        tell_ending(run_dir, TrainingError(reason))

    watchdog.last_words = tell_hang
    try:
        yield
    except BaseException as error:
        tell_ending(run_dir, error)
        raise
    finally:
        watchdog.last_words = None


def build_model(config: Config, genes: GeneTable, mesh: Mesh | None = None) -> Transformer:
    share, theta = torch.from_numpy(genes.share), torch.from_numpy(genes.theta)
    exchange = None if mesh is None else context_exchange(mesh)
    capacity = config.data.micro_batch_tokens or 0
    with sharded_if_wanted(config) if mesh is not None else nullcontext():
        model = Transformer(config.model, share, theta, config.memory, capacity, exchange)
    initialize(model, torch.from_numpy(genes.loadings), config.run.seed, whole)
    if config.training.compile:
        model.compile_token_local()
    return model
