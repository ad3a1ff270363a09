"""The whole configuration of a run: every key typed, documented and defaulted here, and nowhere else.

A YAML file holds only what differs from these defaults; `key=value` on the command line comes last. Each
field says in its metadata what a resumed run may do with it: `fixed` (the science of the run), `schedule`
(changed only on purpose) or `free` (where and how it runs).
"""

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cctrain.errors import UsageError

MISSING_VALUE = "???"


def _declare(resume: str, help: str, default: Any) -> Any:
    metadata = {"resume": resume, "help": help}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def fixed(help: str, default: Any) -> Any:
    """A field that a resumed run must keep."""
    return _declare("fixed", help, default)


def scheduled(help: str, default: Any) -> Any:
    """A field that a resumed run may change on purpose."""
    return _declare("schedule", help, default)


def free(help: str, default: Any) -> Any:
    """A field that changes nothing about the mathematics of the run."""
    return _declare("free", help, default)


@dataclass
class RunConfig:
    dir: str | None = free("Run directory. Default: runs/<name of the configuration file>.", None)
    seed: int = fixed("Seed of everything random: initial weights, order, targets, truncation.", 0)


@dataclass
class DataConfig:
    store: str = free("Token store, a directory written by `cctrain prepare`.", MISSING_VALUE)
    digest: str | None = fixed(
        "Content digest that the store must have. Default: taken from the store at the first start.", None
    )
    context: str = fixed(
        "What one context holds: a `cell`, or the cells of a `group` (of a store prepared with --group-by).",
        "cell",
    )
    window: int | None = fixed(
        "With data.context=group: so many consecutive cells of a group at most, instead of all of them.", None
    )
    max_tokens: int | None = fixed(
        "Most visible tokens of a cell (its targets come on top); a longer cell is represented by a "
        "seeded sample. Default: the 99th percentile of the store's cells.",
        None,
    )
    weights: str | None = fixed(
        "An obs column that says how often training samples come, drawn with replacement: its numbers are weights; of "
        "its names (cell types, say) each comes equally often. Default: every sample once an epoch.",
        None,
    )
    weights_digest: str | None = fixed(
        "SHA-256 that these weights must have: obs is not part of the store's content digest. Default: taken from the "
        "store at the first start.",
        None,
    )
    global_batch: int = fixed("Contexts that one optimizer step consumes, whatever the number of ranks.", 16)
    micro_batch_tokens: int | None = free(
        "Most tokens a rank holds at once (memory); accumulation follows. Default: 16,384, or the longest "
        "context if that is longer.",
        None,
    )
    workers: int | None = free(
        "Background processes of each rank that make the next batches while it trains on this one; 0: none. The steps "
        "are the same. Raise it if `data_seconds` in metrics.jsonl is a visible part of `step_seconds`; a worker takes "
        "0.1 GB, and up to 0.5 GB for decoded cells. Default: 2 on GPUs; 0 on CPUs, where training needs the cores.",
        None,
    )
    block: int = fixed("Consecutive samples of the store that stay together when the order is shuffled.", 64)
    mixed_blocks: int = fixed("Blocks that are mixed with each other sample by sample.", 64)


@dataclass
class ObjectiveConfig:
    target_rate: float = fixed("Probability that a gene at or above `detection_cap` is a target.", 0.05)
    detection_cap: float = fixed(
        "Detection rate from which on a gene is a target as often as any; below, in proportion.", 0.25
    )


@dataclass
class ModelConfig:
    attention: str = fixed(
        "`criss_cross` (cost n·M) or `dense` (cost n²: the control for speed and quality).", "criss_cross"
    )
    width: int = fixed("Width d of a token.", 256)
    depth: int = fixed("Number of layers.", 6)
    heads: int = fixed("Attention heads; each has width / heads dimensions.", 4)
    latents: int = fixed("Number of learned latents M.", 64)
    latent_width: int | None = fixed("Width of a latent. Default: `model.width`.", None)
    backend: str = free(
        "Attention kernels: `auto` (by device, dtype and shape), or `flash_cuda`, `cutlass_cuda`, `flash_cpu`, or "
        "`reference`: plain PyTorch, slow.",
        "auto",
    )
    cell_encoding: int | None = fixed(
        "Random signs that tell the cells of a context apart. Default: 128 with data.context=group, else 0: none.", None
    )
    init_from: str | None = fixed("A run whose weights to start from; genes are matched by id.", None)


@dataclass
class TrainingConfig:
    steps: int = scheduled("Optimizer steps in all.", 10_000)
    precision: str = scheduled("`fp32`, `bf16`, or `fp16` (with loss scaling, on GPUs only).", "fp32")
    clip: float = scheduled("Largest gradient norm; 0 clips nothing.", 1.0)
    learning_rate: float = scheduled(
        "Peak learning rate of AdamW for two layers; deeper layers learn at 1/√depth of it and slower.", 1e-3
    )
    schedule: str = scheduled(
        "`cosine` (to final_learning_rate) or `wsd` (warm-up, stable, then a linear decay).", "cosine"
    )
    warmup: int = scheduled("Steps of linear warm-up.", 100)
    decay: float = scheduled("Share of the steps that `wsd` spends on its decay.", 0.2)
    final_learning_rate: float = scheduled("Where the schedule ends, as a share of the peak.", 0.05)
    weight_decay: float = fixed(
        "AdamW weight decay of matrices, latents among them; vectors and tables have none.", 0.05
    )
    table_rate: float = fixed("Learning rate of the tables with a row per gene, as a multiple of the rest's.", 3.0)
    beta1: float = fixed("AdamW's decay of the first moment.", 0.9)
    beta2: float = fixed("AdamW's decay of the second moment.", 0.98)
    epsilon: float = fixed("AdamW's denominator.", 1e-8)
    compile: bool = free(
        "Let torch.compile fuse what follows attention in each layer. It needs a C++ compiler, gains nothing on CPUs, "
        "and does not know ZeRO 3.",
        False,
    )
    max_skipped: int = free(
        "Steps in a row that may be skipped because the loss or the gradient is not finite; one more ends the run.", 10
    )
    hang_seconds: float = free(
        "Seconds without progress, not even of a layer, after which a rank counts as hung: it writes its stacks to its "
        "log and ends.",
        900.0,
    )


@dataclass
class EvaluationConfig:
    every: int = free("Optimizer steps between looks at the held-out cells while training; 0: never.", 250)
    cells: int = free("Held-out cells of such a look: a fixed subset with fixed targets.", 64)
    draws: int = free("Fixed draws of targets per held-out cell in `cctrain evaluate`.", 4)


@dataclass
class ParallelConfig:
    zero_stage: int = free("DeepSpeed ZeRO stage, 0 to 3: what is sharded over ranks.", 1)
    context: int = free("Context ranks C: ranks that share each context, each holding 1/C of its tokens.", 1)
    check_ranks: bool = free(
        "For debugging: compare parameters, latents and samples of all ranks at every step; stop where they differ.",
        False,
    )


@dataclass
class MemoryConfig:
    checkpointing: bool = free("Recompute each layer's activations in backward instead of keeping them.", False)
    offload: str = free(
        "Where checkpoints of activations wait for backward: `device`, `host` memory (on GPUs), or `disk`: temporary "
        "files of 4 bytes × tokens × width × (depth + 1) in all.",
        "device",
    )
    offload_dir: str | None = free(
        "Folder on a fast local disk for memory.offload=disk. Default: the system's folder for temporary files.", None
    )
    tile_tokens: int | None = free(
        "Tokens that go through a criss-cross layer at a time; its peak memory follows. Default: 4,096 on CPUs, where "
        "a tile then stays in the cache, and 65,536 on GPUs. In bf16, many tiles round a weight's gradient more.",
        None,
    )


@dataclass
class CheckpointConfig:
    every: int = free("Optimizer steps between checkpoints; 0: only when the run stops or ends.", 500)
    keep: int = free("The last so many checkpoints are kept.", 3)
    keep_every: int = free("Checkpoints whose step is a multiple of this are kept for good; 0: none.", 0)
    keep_best: bool = free(
        "Also keep the checkpoint with the lowest held-out NLL. Counted are those at whose step one looked: make "
        "checkpoint.every a multiple of evaluation.every.",
        True,
    )


@dataclass
class TrackingConfig:
    uri: str | None = free(
        "MLflow tracking URI: a server, or a database such as sqlite:///path/mlflow.db. Default: mlflow.db "
        "beside the run directory; on a network file system or under Slurm, the journal only.",
        None,
    )
    experiment: str = free("MLflow experiment.", "cctrain")


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deepspeed: dict[str, Any] = scheduled(
        "Further DeepSpeed keys, passed through; they win over what cctrain derives.", {}
    )


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read defaults, then the YAML file, then `key=value` overrides.

    Raises UsageError naming the file or the override, the key, and the nearest key that exists.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no configuration file {path}: pass a YAML file, for example configs/cell.yaml")
    try:
        values = OmegaConf.load(path)
    except Exception as error:  # the YAML parser and OmegaConf have many error types, all the user's
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, DictConfig):
        raise UsageError(f"{path} holds no keys: a configuration is a mapping such as `data: {{store: ...}}`")
    merged = _merge(OmegaConf.structured(Config), values, f"in {path}")
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise UsageError(
                f"cannot read {override!r} as an override: write key=value, for example training.steps=500"
            )
        try:
            if key in _text_keys() and value not in ("", "null"):
                # As it stands: YAML would read a directory named 2024_01 as a number.
                change = OmegaConf.create()
                OmegaConf.update(change, key, value)
            else:
                change = OmegaConf.from_dotlist([override])
        except Exception as error:  # as above
            raise UsageError(f"cannot read the override {override!r}: {error}") from error
        merged = _merge(merged, change, f"in the override {override!r}")
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise UsageError(f"{key} is missing: set it in {path}, or pass {key}=VALUE. {field_help()[key][0]}") from error
    except OmegaConfBaseException as error:  # an interpolation, ${...}
        reason = str(error).splitlines()[0]
        raise UsageError(f"{error.full_key}, from {path} or an override, cannot be resolved: {reason}") from error
    assert isinstance(config, Config)
    if config.run.dir is None:
        config.run.dir = f"runs/{path.stem}"
    check_config(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, readable by `load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def check_config(config: Config) -> None:
    """Raise UsageError for values that no type can exclude."""
    _one_of("data.context", config.data.context, ["cell", "group"])
    _one_of("model.attention", config.model.attention, ["criss_cross", "dense"])
    _one_of("training.precision", config.training.precision, ["fp32", "bf16", "fp16"])
    _one_of("training.schedule", config.training.schedule, ["cosine", "wsd"])
    _one_of("parallel.zero_stage", config.parallel.zero_stage, [0, 1, 2, 3])
    _one_of("model.backend", config.model.backend, ["auto", "flash_cuda", "cutlass_cuda", "flash_cpu", "reference"])
    _one_of("memory.offload", config.memory.offload, ["device", "host", "disk"])
    positive = {
        "data.max_tokens": config.data.max_tokens,
        "data.global_batch": config.data.global_batch,
        "data.micro_batch_tokens": config.data.micro_batch_tokens,
        "data.block": config.data.block,
        "data.mixed_blocks": config.data.mixed_blocks,
        "data.window": config.data.window,
        "model.width": config.model.width,
        "model.depth": config.model.depth,
        "model.heads": config.model.heads,
        "model.latents": config.model.latents,
        "model.latent_width": config.model.latent_width,
        "parallel.context": config.parallel.context,
        "memory.tile_tokens": config.memory.tile_tokens,
        "training.steps": config.training.steps,
        "training.learning_rate": config.training.learning_rate,
        "training.epsilon": config.training.epsilon,
        "training.table_rate": config.training.table_rate,
        "training.max_skipped": config.training.max_skipped,
        "training.hang_seconds": config.training.hang_seconds,
        "checkpoint.keep": config.checkpoint.keep,
        "evaluation.cells": config.evaluation.cells,
        "evaluation.draws": config.evaluation.draws,
    }
    for key, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{key}={value} must be above 0, and finite")
    not_negative = {
        "data.workers": config.data.workers,
        "training.clip": config.training.clip,
        "training.warmup": config.training.warmup,
        "training.weight_decay": config.training.weight_decay,
        "evaluation.every": config.evaluation.every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "run.seed": config.run.seed,
        "model.cell_encoding": config.model.cell_encoding or 0,
    }
    for key, value in not_negative.items():
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{key}={value} must be 0 or above, and finite")
    shares = {  # the value, and whether it may be 0 or 1
        "objective.target_rate": (config.objective.target_rate, False, False),
        "objective.detection_cap": (config.objective.detection_cap, False, True),
        "training.decay": (config.training.decay, False, True),
        "training.final_learning_rate": (config.training.final_learning_rate, True, True),
        "training.beta1": (config.training.beta1, True, False),
        "training.beta2": (config.training.beta2, True, False),
    }
    for key, (share, may_be_0, may_be_1) in shares.items():
        if not 0 <= share <= 1 or (share == 0 and not may_be_0) or (share == 1 and not may_be_1):
            low, high = ("" if may_be_0 else " (excluded)"), ("" if may_be_1 else " (excluded)")
            raise UsageError(f"{key}={share} must lie between 0{low} and 1{high}")
    if config.data.window is not None and config.data.context != "group":
        raise UsageError(
            f"data.window={config.data.window} cuts groups and needs data.context=group: set it, or drop the window"
        )
    if config.memory.offload != "device" and not config.memory.checkpointing:
        raise UsageError(
            f"memory.offload={config.memory.offload} moves the checkpoints of memory.checkpointing, which is off: set "
            "it too"
        )
    if config.training.compile and config.parallel.zero_stage == 3:
        raise UsageError("training.compile does not know the sharded weights of parallel.zero_stage=3: switch one off")
    if config.parallel.context > 1 and config.model.attention == "dense":
        raise UsageError("parallel.context above 1 needs model.attention=criss_cross: dense attention is not sharded")
    if config.model.width % config.model.heads:
        raise UsageError(
            f"model.width={config.model.width} is not a multiple of model.heads={config.model.heads}: "
            "each head takes an equal share of the width"
        )


def field_help() -> dict[str, tuple[str, str, Any]]:
    """Every dotted key with (help, resume class, default): what the documentation and errors print."""
    table: dict[str, tuple[str, str, Any]] = {}

    def visit(prefix: str, node: Any) -> None:
        for entry in fields(node):
            value = getattr(node, entry.name)
            if is_dataclass(value):
                visit(f"{prefix}{entry.name}.", value)
            else:
                table[f"{prefix}{entry.name}"] = (entry.metadata["help"], entry.metadata["resume"], value)

    visit("", Config())
    return table


def _one_of(key: str, value: Any, allowed: list[Any]) -> None:
    if value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed)
        raise UsageError(f"{key}={value} is not known: choose one of {choices}")


def _merge(base: DictConfig, change: DictConfig, where: str) -> DictConfig:
    _reject_unknown_keys(base, change, "", where)
    try:
        return OmegaConf.merge(base, change)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        reason = str(error).splitlines()[0]
        raise UsageError(f"{key} {where} has the wrong type: {reason}") from error


def _reject_unknown_keys(base: DictConfig, change: Any, prefix: str, where: str) -> None:
    if not isinstance(change, DictConfig):
        return
    known = field_help()
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}
    for name in map(str, change):
        key = f"{prefix}{name}"
        if key in known:
            continue
        if key in sections:
            value = change._get_node(name)
            if not isinstance(value, DictConfig):
                raise UsageError(f"{key} {where} is a section: give keys below it, such as {_first_below(key, known)}")
            _reject_unknown_keys(base, value, f"{key}.", where)
            continue
        slip = _first_leaf(key, change._get_node(name))
        near = difflib.get_close_matches(slip, [*known, *sections], n=1, cutoff=0.0)
        # A key typed without its section is the commonest slip: `steps` for `training.steps`.
        tails = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == name]
        nearest = (tails or near)[0]
        raise UsageError(f"unknown key {key} {where}: did you mean {nearest}?")


def _text_keys() -> set[str]:
    """The dotted keys whose values are text."""
    sections = {entry.name: entry.type for entry in fields(Config) if is_dataclass(entry.type)}
    return {
        f"{name}.{entry.name}"
        for name, section in sections.items()
        for entry in fields(section)  # type: ignore[arg-type]
        if entry.type in (str, str | None)
    }


def _first_below(section: str, known: dict[str, Any]) -> str:
    return next(key for key in known if key.startswith(f"{section}."))


def _first_leaf(key: str, node: Any) -> str:
    while isinstance(node, DictConfig) and len(node):
        name = str(next(iter(node)))
        key, node = f"{key}.{name}", node._get_node(name)
    return key
