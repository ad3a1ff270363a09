"""What a run feeds its model: the defaults that its store decides, the rule of its contexts, their order, the look."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from cctrain.config import Config
from cctrain.cost.work import Contexts
from cctrain.data.hashing import hash64
from cctrain.data.loading.batches import Batch
from cctrain.data.loading.contexts import ContextRule, expected_size, target_probability
from cctrain.data.loading.loader import Loader, Share
from cctrain.data.loading.order import Order
from cctrain.data.loading.weights import sample_weights
from cctrain.data.store.store import TokenStore
from cctrain.errors import UsageError
from cctrain.parallel.mesh import Mesh

DEFAULT_MICRO_BATCH_TOKENS = 16_384
LONGEST_QUANTILE = 0.99
CELL_ENCODING = 128


def resolve(config: Config, store: TokenStore) -> Config:
    """Fill in the defaults that depend on the store."""
    longest = int(np.ceil(np.quantile(store.num_tokens[: store.num_train], LONGEST_QUANTILE)))
    data = replace(
        config.data,
        store=str(Path(config.data.store).resolve()),
        digest=store.digest,
        max_tokens=config.data.max_tokens or max(1, longest),
    )
    model = config.model
    if model.init_from is not None:
        model = replace(model, init_from=str(Path(model.init_from).resolve()))
    if model.cell_encoding is None:
        model = replace(model, cell_encoding=CELL_ENCODING if data.context == "group" else 0)
    return replace(config, data=data, model=model)


def resolve_micro_batch(config: Config, loader: Loader) -> int:
    """Raises UsageError now if any context of the store would be too long for it, some day."""
    longest, sharing = loader.largest_size(), loader.share.num_context_ranks
    micro_batch = config.data.micro_batch_tokens or max(DEFAULT_MICRO_BATCH_TOKENS, longest)
    if micro_batch < longest:
        raise UsageError(
            f"a context of up to {longest:,} tokens {'a rank ' if sharing > 1 else ''}does not fit "
            f"data.micro_batch_tokens={micro_batch:,}: raise it, or lower data.max_tokens"
            + (" or data.window" if config.data.context == "group" else "")
        )
    return micro_batch


def contexts_of_store(loader: Loader) -> Contexts:
    store, rule = loader.store, loader.rule
    targets = (store.measured * rule.target_probability).sum(axis=1)[store.source_of_cell]
    visible = np.minimum(store.num_tokens, rule.max_tokens)
    of_contexts = loader.samples.sums(visible + targets)[: loader.samples.num_train]
    tokens = float(of_contexts.mean())
    targets_each = float(loader.samples.sums(targets)[: loader.samples.num_train].mean())
    of_cells = expected_size(rule, store.num_tokens, store.measured, store.source_of_cell)
    uneven = float((of_contexts**2).mean()) / tokens**2
    return Contexts(tokens, targets_each, len(store.genes.ids), loader.samples.most(of_cells), uneven)


def look_at_store(config: Config, store: TokenStore) -> tuple[Config, Contexts]:
    """The configuration with the defaults that its store decides, and what its contexts are like."""
    config = resolve(config, store)
    loader = Loader(store, training_rule(config, store), Share(0, 1, 0, config.parallel.context), 0)
    config.data.micro_batch_tokens = resolve_micro_batch(config, loader)
    return config, contexts_of_store(loader)


def share_of(mesh: Mesh) -> Share:
    return Share(mesh.data_rank, mesh.num_data_ranks, mesh.context_rank, mesh.num_context_ranks)


def training_rule(config: Config, store: TokenStore) -> ContextRule:
    return context_rule(config, store, "training", config.data.max_tokens or 0)


def context_rule(config: Config, store: TokenStore, purpose: str, max_tokens: int) -> ContextRule:
    return ContextRule(
        seed=config.run.seed,
        purpose=purpose,
        target_probability=target_probability(store.genes, config.objective),
        share=store.genes.share,
        max_tokens=max_tokens,
        kind=config.data.context,
        window=config.data.window,
        cell_encoding=config.model.cell_encoding or 0,
    )


def training_order(config: Config, loader: Loader) -> Order:
    store, samples, data = loader.store, loader.samples, config.data
    kind, weights = data.context, None
    if data.weights is not None:
        kind, weights = f"{kind} by {data.weights}", sample_weights(store, samples, data.weights)
    return Order(samples.num_train, store.digest, config.run.seed, data.block, data.mixed_blocks, kind, weights)


def weights_digest(order: Order) -> str | None:
    """SHA-256 of the weights, float64 little endian."""
    return None if order.weights is None else hashlib.sha256(order.weights.astype("<f8").tobytes()).hexdigest()


def held_out_batches(config: Config, store: TokenStore, loader: Loader) -> list[Batch]:
    """This rank's part of the fixed look: samples by hash, with targets for ever, of `evaluation.cells` held-out cells
    or as few more as complete the last sample."""
    look = Loader(store, replace(loader.rule, purpose="validation"), loader.share, loader.micro_batch_tokens)
    held_out = np.arange(look.samples.num_train, len(look.samples))
    draws = hash64(store.digest, config.run.seed, "held-out subset", held_out)
    ordered = held_out[np.argsort(draws, kind="stable")]
    num_cells = np.cumsum(look.samples.num_cells(ordered))
    chosen = np.sort(ordered[: int(np.searchsorted(num_cells, config.evaluation.cells)) + 1])
    return look.batches(chosen, np.zeros(len(chosen), dtype=np.int64))
