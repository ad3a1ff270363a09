"""The DeepSpeed engine, its configuration derived from ours: the one place where the two meet.

Accumulation is ours: how many micro-batches a step has follows from its contexts, so the engine is told which
one is the last, and scales no loss. ZeRO averages gradients over ranks; the loss undoes that (see `loop`).
"""

import io
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch

from cctrain.config import Config
from cctrain.cost.memory import LARGEST_BUCKET, reduce_bucket
from cctrain.cost.parameters import parameters_of_a_layer
from cctrain.errors import UsageError
from cctrain.model.kernels.choice import choose
from cctrain.model.transformer import Transformer, gene_tables, last_of_each_branch
from cctrain.parallel.mesh import Mesh
from cctrain.training.sharded_state import unsharded_masters

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_engine(model: Transformer, config: Config, mesh: Mesh) -> Any:
    """Wrap the model; every parameter is trained. The model must hold the same weights on every rank."""
    check_precision(config.training.precision, mesh.device.type)
    shape = config.model.heads, config.model.width // config.model.heads
    choose(config.model.backend, torch.empty(1, *shape, dtype=DTYPES[config.training.precision], device=mesh.device))
    model.to(mesh.device)
    with redirect_stdout(io.StringIO()) as said:  # dozens of lines about memory, on standard output
        engine, *_ = _deepspeed().initialize(
            model=model,
            optimizer=_optimizer(model, config),
            config=deepspeed_config(config, sum(math.prod(full_shape(p)) for p in model.parameters())),
            dist_init_required=False,
        )
    log.debug("DeepSpeed: %s", said.getvalue())
    if not engine.zero_optimization():
        _undo_step_of_zeros(engine)
    return engine


def check_precision(precision: str, device_kind: str) -> None:
    """Raises UsageError where devices of this kind, cuda or cpu, do not train in it."""
    if precision == "fp16" and device_kind != "cuda":
        raise UsageError("training.precision=fp16 needs a GPU: use bf16 or fp32 on CPUs")


def deepspeed_config(config: Config, parameters: int = LARGEST_BUCKET) -> dict[str, Any]:
    """What DeepSpeed is told for a model of so many parameters. Keys of the `deepspeed:` section win."""
    precision = config.training.precision
    derived: dict[str, Any] = {
        # DeepSpeed insists on batch sizes; ours vary from step to step and are counted by us.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.training.clip,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": reduce_bucket(parameters),
            # Stage 3: a layer's weights stay whole while its tiles pass, and no longer. By default they would all stay
            # that come again within a billion numbers, and every call of every module looks that far ahead: with 400
            # tiles, most of a step's time.
            "stage3_max_reuse_distance": parameters_of_a_layer(config.model),
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if precision == "bf16":
        derived["bf16"] = {"enabled": True}
        if config.parallel.zero_stage > 0:
            derived["data_types"] = {"grad_accum_dtype": "fp32"}
    elif precision == "fp16":
        derived["fp16"] = {"enabled": True, "loss_scale": 0}
    return _overlay(derived, config.deepspeed)


@contextmanager
def sharded_if_wanted(config: Config) -> Iterator[None]:
    """Under ZeRO 3, what is built within is sharded over ranks as it is made: a model may be larger than a device."""
    if config.parallel.zero_stage < 3:
        yield
        return
    with redirect_stdout(io.StringIO()), _deepspeed().zero.Init(config_dict_or_path=deepspeed_config(config)):
        yield


def whole(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager[object]:
    """Within it each rank has all of these parameters, sharded or not. What the first rank makes of them stays."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return _deepspeed().zero.GatheredParameters(sharded, modifier_rank=0) if sharded else nullcontext()


def _deepspeed() -> Any:
    import deepspeed

    # The shared-memory all-reduce is compiled at first use, for a minute, and training dies without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Of its own calls, at every step of every rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    return deepspeed


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Of a parameter of which this rank may hold but a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value * group["rate"]


def take_step(engine: Any) -> tuple[float | None, bool]:
    """Let the engine step. Returns the norm of the whole gradient before clipping, and whether a step was taken: it
    is not where the gradient is not finite. Both mean something at an accumulation boundary only.
    """
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        engine.step()
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm), engine.was_step_applied()
    # Without ZeRO, in fp32, DeepSpeed steps the plain optimizer, keeps no norm and takes NaN as it comes.
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None, False
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not math.isfinite(norm):
        for parameter in engine.module.parameters():
            parameter.grad = None  # AdamW passes over what has no gradient
    engine.step()
    return norm, math.isfinite(norm)


def _undo_step_of_zeros(engine: Any) -> None:
    """Without ZeRO, DeepSpeed lets the optimizer of half-precision weights step once, with gradients of zero, to
    make its state: AdamW would count that step, and has decayed the weights."""
    for half, master in unsharded_masters(engine):
        master.data.copy_(half.data)
        engine.optimizer.optimizer.state.pop(master, None)


def _optimizer(model: Transformer, config: Config) -> torch.optim.Optimizer:
    """AdamW, in which `rate` is what a group's learning rate is multiplied by.

    Depth: Adam's steps have one size whatever a weight's scale, and the changes of all layers add up. So that the
    same learning rate serves at any depth, the matrix that ends a branch learns at 1/depth and the rest of a layer
    at 1/√depth, relative to a model of two layers (Depth-μP, Yang et al. 2023, in our parametrisation). Tables with
    a row per gene, of which a step touches few rows, learn faster. Matrices decay towards zero; vectors and tables
    do not.
    """
    training = config.training
    relative_depth = len(model.layers) / 2
    lasts = {id(last.weight) for last in last_of_each_branch(model)}
    tables = {id(table) for table in gene_tables(model).values()}
    in_layers = {id(parameter) for parameter in model.layers.parameters()}

    def rate(parameter: torch.Tensor) -> float:
        if id(parameter) in tables:
            return training.table_rate
        if id(parameter) in lasts:
            return 1 / relative_depth
        return relative_depth**-0.5 if id(parameter) in in_layers else 1.0

    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        decays = len(full_shape(parameter)) > 1 and id(parameter) not in tables
        key = (rate(parameter), training.weight_decay if decays else 0.0)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "rate": factor, "weight_decay": decay} for (factor, decay), members in groups.items()],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
    )


def _overlay(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if nested else value
    return merged
