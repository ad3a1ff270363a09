"""One training run from configuration to weights: open, build, train, look, save."""

import hashlib
import logging
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cctrain import __version__
from cctrain.config import Config, to_yaml
from cctrain.data.contexts import ContextRule, target_probability
from cctrain.data.hashing import hash64
from cctrain.data.loader import Loader
from cctrain.data.order import Order
from cctrain.data.store import TokenStore, open_store
from cctrain.errors import CctrainError, DataError, UsageError
from cctrain.model.saved import save_weights
from cctrain.model.transformer import Transformer, initialize
from cctrain.parallel.mesh import Mesh, join_mesh
from cctrain.run_directory import CONFIG, WEIGHTS, take_run_directory, write_atomically, write_vocabulary
from cctrain.tracking.journal import Journal
from cctrain.tracking.projection import LiveProjection, check_uri, default_uri
from cctrain.training.engine import build_engine, full_weights
from cctrain.training.loop import evaluate_held_out, run_steps
from cctrain.training.report import Report

log = logging.getLogger(__name__)

DEFAULT_MICRO_BATCH_TOKENS = 16_384
LONGEST_QUANTILE = 0.99


def train(config: Config) -> None:
    """Train the run that `config` describes, on as many ranks as the environment says; all ranks call this."""
    if config.tracking.uri is not None:
        check_uri(config.tracking.uri)
    run_dir = Path(config.run.dir or "")
    with join_mesh() as mesh:
        store = open_store(Path(config.data.store), config.data.digest)
        if store.num_train == 0 or store.num_train == store.num_cells:
            raise DataError(
                f"{store.path} has no {'training' if store.num_train == 0 else 'held-out'} cells: prepare again"
            )
        config = resolve(config, store)
        rule = training_rule(config, store)
        loader = Loader(store, rule, mesh.rank, mesh.num_ranks, config.data.micro_batch_tokens or 0)
        config.data.micro_batch_tokens = loader.micro_batch_tokens = resolve_micro_batch(config, loader)
        order = Order(store.num_train, store.digest, config.run.seed, config.data.block, config.data.window)
        model = build_model(config, store)
        engine = build_engine(model, config, mesh)
        held_out = held_out_batches(config, store, loader) if config.evaluation.every else []
        with recorded(run_dir, config, store, mesh) as journal:
            report = Report(config, mesh, store, model, loader)
            with report.progress():
                follow(engine, config, mesh, loader, order, held_out, journal, report)
            save_run(engine, run_dir, mesh)
            if journal is not None:
                journal.write("stop", config.training.steps, status="finished")
                log.info("weights: %s", run_dir / WEIGHTS)


def follow(
    engine: Any,
    config: Config,
    mesh: Mesh,
    loader: Loader,
    order: Order,
    held_out: list,
    journal: Journal | None,
    report: "Report",
) -> None:
    """Run all steps; write and show each one, and look at the held-out cells when it is time."""
    every = config.evaluation.every

    def look(step: int) -> None:
        started = time.perf_counter()
        values = evaluate_held_out(engine, mesh, held_out)
        report.look(values)
        if journal is not None:
            journal.write("evaluate", step, **values, seconds=time.perf_counter() - started)

    if every:
        look(0)
    for values in run_steps(engine, config, mesh, loader, order):
        step = values.pop("step")
        report.step(step, values)
        if journal is not None:
            journal.write("step", step, **values)
        if every and (step % every == 0 or step == config.training.steps):
            look(step)


def resolve(config: Config, store: TokenStore) -> Config:
    """Fill in the defaults that depend on the store."""
    longest = int(np.ceil(np.quantile(store.num_tokens[: store.num_train], LONGEST_QUANTILE)))
    data = replace(
        config.data,
        store=str(Path(config.data.store).resolve()),
        digest=store.digest,
        max_tokens=config.data.max_tokens or max(1, longest),
    )
    return replace(config, data=data)


def resolve_micro_batch(config: Config, loader: Loader) -> int:
    """Raises UsageError now if any context of the store would be too long for it, some day."""
    longest = int(loader.sizes.max())
    micro_batch = config.data.micro_batch_tokens or max(DEFAULT_MICRO_BATCH_TOKENS, longest)
    if micro_batch < longest:
        raise UsageError(
            f"a context of up to {longest:,} tokens does not fit data.micro_batch_tokens={micro_batch:,}: "
            "raise it, or lower data.max_tokens"
        )
    return micro_batch


def training_rule(config: Config, store: TokenStore) -> ContextRule:
    return context_rule(config, store, "training", config.data.max_tokens or 0)


def context_rule(config: Config, store: TokenStore, purpose: str, max_tokens: int) -> ContextRule:
    probability = target_probability(store.genes, config.objective)
    return ContextRule(config.run.seed, purpose, probability, store.genes.share, max_tokens)


def build_model(config: Config, store: TokenStore) -> Transformer:
    share, theta = torch.from_numpy(store.genes.share), torch.from_numpy(store.genes.theta)
    model = Transformer(config.model, share, theta, config.memory.checkpointing)
    initialize(model, torch.from_numpy(store.genes.loadings), config.run.seed)
    return model


def held_out_batches(config: Config, store: TokenStore, loader: Loader) -> list:
    """This rank's part of the fixed look: `evaluation.cells` held-out cells by hash, each with targets for ever."""
    cells = np.arange(store.num_train, store.num_cells)
    draws = hash64(store.digest, config.run.seed, "held-out subset", cells)
    chosen = np.sort(cells[np.argsort(draws, kind="stable")[: config.evaluation.cells]])
    look = Loader(
        store,
        replace(loader.rule, purpose="validation"),
        loader.rank,
        loader.num_ranks,
        loader.micro_batch_tokens,
    )
    return look.batches(chosen, np.zeros(len(chosen), dtype=np.int64))


def save_run(engine: Any, run_dir: Path, mesh: Mesh) -> None:
    weights = full_weights(engine)
    if mesh.is_first:
        save_weights(weights, run_dir / WEIGHTS)


@contextmanager
def recorded(run_dir: Path, config: Config, store: TokenStore, mesh: Mesh) -> Iterator[Journal | None]:
    """The run's directory, journal and MLflow projection, on the first rank; None on the others."""
    if not mesh.is_first:
        yield None
        return
    take_run_directory(run_dir)
    write_atomically(run_dir / CONFIG, to_yaml(config).encode())
    write_vocabulary(run_dir, store.genes.ids.tolist(), store.genes.names.tolist())
    journal = Journal(run_dir)
    journal.write("start", 0, **start_facts(config, store, mesh))
    uri = config.tracking.uri or default_uri(run_dir)
    projection = LiveProjection(run_dir, uri, config.tracking.experiment) if uri else None
    if projection is None:
        log.info("tracking: the journal only; `cctrain sync %s` sends it to MLflow later", run_dir)
    else:
        projection.start()
    try:
        yield journal
    except BaseException as error:
        status = "failed" if isinstance(error, Exception) else "interrupted"
        reason = str(error) if isinstance(error, CctrainError) else repr(error)
        journal.write("stop", journal.last_step, status=status, reason=reason)
        raise
    finally:
        journal.close()
        if projection is not None:
            projection.close()


def start_facts(config: Config, store: TokenStore, mesh: Mesh) -> dict[str, Any]:
    return {
        "run": uuid.uuid4().hex,
        "cctrain": __version__,
        "torch": torch.__version__,
        "commit": code_commit(),
        "store_digest": store.digest,
        "world_size": mesh.num_ranks,
        "device": mesh.device.type,
        "zero_stage": config.parallel.zero_stage,
        "precision": config.training.precision,
        "threads": torch.get_num_threads(),
    }


def code_commit() -> str | None:
    """The commit of the checkout that cctrain runs from, with a digest of what differs; None if there is none."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return None

    commit, changes = git("rev-parse", "HEAD"), git("diff", "HEAD")
    # An installed cctrain may lie inside somebody else's checkout.
    if commit is None or git("ls-files", "--error-unmatch", __file__) is None:
        return None
    return commit.strip() + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:12]}" if changes else "")
