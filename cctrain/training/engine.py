"""The DeepSpeed engine, its configuration derived from ours: the one place where the two meet.

Accumulation is ours: how many micro-batches a step has follows from its contexts, so the engine is told which
one is the last, and scales no loss. ZeRO averages gradients over ranks; the loss undoes that (see `loop`).
"""

from typing import Any

import torch
from torch import nn

from cctrain.config import Config
from cctrain.errors import UsageError
from cctrain.parallel.mesh import Mesh


def build_engine(model: nn.Module, config: Config, mesh: Mesh) -> Any:
    """Wrap the model; every parameter is trained. The model must hold the same weights on every rank."""
    import deepspeed

    # The shared-memory all-reduce is compiled at first use, for a minute, and training dies without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.training.precision == "fp16" and mesh.device.type != "cuda":
        raise UsageError("training.precision=fp16 needs a GPU: use bf16 or fp32 on CPUs")
    model.to(mesh.device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(model, config),
        config=deepspeed_config(config),
        dist_init_required=False,
    )
    return engine


def deepspeed_config(config: Config) -> dict[str, Any]:
    """What DeepSpeed is told. Keys of the `deepspeed:` section win."""
    precision = config.training.precision
    derived: dict[str, Any] = {
        # DeepSpeed insists on batch sizes; ours vary from step to step and are counted by us.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.training.clip,
        "zero_optimization": {"stage": config.parallel.zero_stage, "overlap_comm": False},
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


def set_learning_rate(engine: Any, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer in fp32 on the host, by its name in the plain model; all ranks must call this."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in engine.module.named_parameters():
        # Stage 0 in fp32 has no sharded master copy to ask for.
        full = (
            safe_get_full_fp32_param(parameter)
            if engine.zero_optimization_stage() or parameter.dtype != torch.float32
            else parameter
        )
        full = parameter if full is None else full
        weights[name] = full.detach().float().cpu().clone()
    for name, buffer in engine.module.named_buffers():
        weights[name] = buffer.detach().cpu().clone()
    return weights


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW; matrices decay towards zero, vectors and embedding tables do not."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        decays = parameter.ndim > 1 and id(parameter) not in tables
        (matrices if decays else others).append(parameter)
    training = config.training
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
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
