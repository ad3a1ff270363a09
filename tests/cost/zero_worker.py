"""One of several ranks: takes training steps under every ZeRO stage, and tells what they sent.

Argument: a JSON object with the store, the model's configuration, and kinds of training, each a stage, a precision and
DeepSpeed's options of ZeRO.
Prints for each the operation and the payload of every collective of a step.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cctrain.config import Config, ModelConfig
from cctrain.data.loading.loader import Loader
from cctrain.data.store.store import open_store
from cctrain.parallel.mesh import Mesh, join_mesh
from cctrain.training.data import resolve, share_of, training_order, training_rule
from cctrain.training.engine import build_engine
from cctrain.training.loop import train_step
from cctrain.training.train import build_model

# DeepSpeed's, and which argument holds the payload as cctrain.cost.traffic counts it.
OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
}
# Numbers about a step: how many targets it has, whether its gradient is finite, its norm.
ABOUT_A_STEP, LARGEST_ABOUT_A_STEP = "allgather_", 8  # an operation; bytes of others
GLOBAL_BATCH, MICRO_BATCH_TOKENS = 8, 500


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func.overloadpacket.__name__ != ABOUT_A_STEP:
            name = func.overloadpacket.__name__
            operation, which = OPERATIONS.get(name, (name, 0))  # the test knows none but these
            if (payload := size_of(args[which])) > LARGEST_ABOUT_A_STEP:
                self.seen.append((operation, payload))
        return func(*args, **(kwargs or {}))


def size_of(argument: Any) -> int:
    return argument.nbytes if isinstance(argument, Tensor) else sum(map(size_of, argument))


Kind = tuple[int, str, dict[str, int]]


def steps(store_path: str, model: dict[str, Any], kinds: list[Kind], mesh: Mesh) -> Iterator[dict[str, Any]]:
    for stage, precision, options in kinds:
        training = Training(store_path, model, stage, precision, mesh)
        training.config.deepspeed = {"zero_optimization": options}
        training.build()
        training.step()
        with Recorder() as recorder:
            training.step()
        yield {
            "stage": stage,
            "precision": precision,
            "options": options,
            "micro_batches": len(training.batches),
            "collectives": recorder.seen,
            "reduce_bucket": getattr(training.engine.optimizer, "reduce_bucket_size", None),  # not without ZeRO
        }


class Training:
    def __init__(self, store_path: str, model: dict[str, Any], stage: int, precision: str, mesh: Mesh):
        self.store, self.mesh = open_store(store_path), mesh
        config = Config(model=ModelConfig(**model))
        config.data.store, config.data.micro_batch_tokens = store_path, MICRO_BATCH_TOKENS
        config.training.precision, config.parallel.zero_stage = precision, stage
        self.config = resolve(config, self.store)
        self.loader = Loader(self.store, training_rule(self.config, self.store), share_of(mesh), MICRO_BATCH_TOKENS)
        self.order = training_order(self.config, self.loader)
        self.number = 0

    def build(self) -> None:
        self.engine = build_engine(build_model(self.config, self.store.genes, self.mesh), self.config, self.mesh)

    def step(self) -> None:
        rank_step = self.loader.step(self.order, GLOBAL_BATCH, GLOBAL_BATCH * self.number)
        self.number += 1
        self.batches = rank_step.batches
        train_step(self.engine, self.config, self.mesh, rank_step, self.number, list)


if __name__ == "__main__":
    plan = json.loads(sys.argv[1])
    with join_mesh() as mesh:
        found = list(steps(plan["store"], plan["model"], plan["kinds"], mesh))
        if mesh.is_first:
            print(json.dumps(found))
