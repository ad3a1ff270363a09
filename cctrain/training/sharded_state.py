"""Which stretch of each parameter's training state lives on this rank, under every ZeRO stage.

AdamW's state of a parameter is its fp32 master weight and two moments. DeepSpeed keeps them in other places and
shapes at each stage; here they become one thing, a list of fragments: a parameter's name in the plain model, where
the fragment starts in the flattened parameter, and views of the live tensors. Whoever writes into the views and then
calls `weights_from_masters` has restored the training state. This is the only module that knows DeepSpeed's layouts.

    stage 0     every rank holds everything; it *owns* an equal stretch of it
    stage 1, 2  a parameter group is flattened, with padding, and cut into one partition a rank
    stage 3     each parameter is flattened and cut into one partition a rank, the last ones padded
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cctrain.parallel.mesh import Mesh

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)


@dataclass(frozen=True)
class Fragment:
    """`tensors` has, for each of KINDS, a live fp32 view (length,)."""

    name: str
    start: int
    length: int
    tensors: dict[str, Tensor]


def held_fragments(engine: Any, mesh: Mesh) -> list[Fragment]:
    """All state that this rank holds: what it must restore."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(_replicated(engine))
    return list(_flattened_groups(engine) if stage < 3 else _flattened_parameters(engine, mesh))


def owned_fragments(engine: Any, mesh: Mesh) -> list[Fragment]:
    """The part of it that this rank saves: over all ranks, every element exactly once."""
    held = held_fragments(engine, mesh)
    if engine.zero_optimization_stage():
        return held
    total = sum(fragment.length for fragment in held)
    begin, end = (total * rank // mesh.num_ranks for rank in (mesh.rank, mesh.rank + 1))
    owned, offset = [], 0
    for fragment in held:
        first, last = max(begin - offset, 0), min(end - offset, fragment.length)
        if first < last:
            owned.append(_narrow(fragment, first, last - first))
        offset += fragment.length
    return owned


def weights_from_masters(engine: Any) -> None:
    """Make the weights that the model computes with from the restored master weights."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for half, master in unsharded_masters(engine):
            half.data.copy_(master.data)
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer._post_step(set())  # gathers the small parameters that stay whole on every rank


def unsharded_masters(engine: Any) -> list[tuple[Tensor, Tensor]]:
    """Without ZeRO: each half-precision parameter with its fp32 copy in the optimizer; fp32 training has none."""
    halves, masters = (getattr(engine.optimizer, name, []) for name in ("fp16_groups", "fp32_groups"))
    return [pair for groups in zip(halves, masters, strict=True) for pair in zip(*groups, strict=True)]


def applied_steps(engine: Any) -> int:
    """How many steps AdamW has taken: skipped ones are not among them."""
    steps = {int(state["step"]) for state in _adamw(engine).state.values() if "step" in state}
    assert len(steps) <= 1, f"the parameters have taken different numbers of steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_applied_steps(engine: Any, steps: int) -> None:
    for state in _adamw(engine).state.values():
        state["step"].fill_(float(steps))


def loss_scale_state(engine: Any) -> dict[str, float | int]:
    """The state of fp16's dynamic loss scaling, as plain numbers; empty for the other precisions."""
    scaler = _loss_scaler(engine)
    return {key: getattr(scaler, key) for key in _SCALER_KEYS if isinstance(getattr(scaler, key, None), (int, float))}


def set_loss_scale_state(engine: Any, values: dict[str, float | int]) -> None:
    scaler = _loss_scaler(engine)
    for key, value in values.items():
        if key in _SCALER_KEYS and hasattr(scaler, key):
            setattr(scaler, key, value)


_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _loss_scaler(engine: Any) -> Any:
    if engine.fp16_enabled():
        return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
    return None


def _replicated(engine: Any) -> Iterator[Fragment]:
    masters = {id(half): master for half, master in unsharded_masters(engine)}
    for name, parameter in engine.module.named_parameters():
        master = masters.get(id(parameter), parameter)
        state = _state(engine, master)
        tensors = {MASTER: master.data} | {key: state[key] for key in MOMENTS}
        flat = {kind: tensor.view(-1) for kind, tensor in tensors.items()}
        yield Fragment(name, 0, parameter.numel(), flat)


def _flattened_groups(engine: Any) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    # In bf16, stage 1 has an optimizer of its own, with other names for the same things.
    is_bf16 = hasattr(optimizer, "bf16_groups")
    groups = optimizer.bf16_groups if is_bf16 else optimizer.bit16_groups
    flats = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    partition = {id(parameter): flat for group, flat in zip(groups, flats, strict=True) for parameter in group}
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        if mapping is None:
            continue  # wholly in other ranks' partitions
        flat = partition[id(parameter)]
        state = _state(engine, flat)
        place, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        tensors = {MASTER: flat.data} | {key: state[key] for key in MOMENTS}
        views = {kind: tensor.narrow(0, place, length) for kind, tensor in tensors.items()}
        yield Fragment(name, mapping.lp_fragment_address.start, length, views)


def _flattened_parameters(engine: Any, mesh: Mesh) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        group, place, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = mesh.rank * padded
        length = min(padded, parameter.ds_numel - start)
        if length <= 0:
            continue  # this rank's partition is all padding
        flat = optimizer.fp32_partitioned_groups_flat[group]
        state = _state(engine, flat)
        tensors = {MASTER: flat.data} | {key: state[key] for key in MOMENTS}
        views = {kind: tensor.narrow(0, place, length) for kind, tensor in tensors.items()}
        yield Fragment(name, start, length, views)


def _state(engine: Any, master: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor; made as AdamW itself would make it if no step has been taken yet."""
    state = _adamw(engine).state[master]
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for key in MOMENTS:
            state[key] = torch.zeros_like(master, memory_format=torch.preserve_format)
    return state


def _adamw(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer if isinstance(engine.optimizer, torch.optim.Optimizer) else engine.optimizer.optimizer


def _narrow(fragment: Fragment, first: int, length: int) -> Fragment:
    views = {kind: tensor.narrow(0, first, length) for kind, tensor in fragment.tensors.items()}
    return Fragment(fragment.name, fragment.start + first, length, views)
