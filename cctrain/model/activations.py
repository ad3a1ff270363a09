"""What of a forward is kept for its backward: everything, or only what each stage began with, here or elsewhere.

A stage is a function of tensors: what happens to one tile of tokens in one layer, say. With checkpointing its inputs
are kept and the rest is computed again in backward. Then all that grows with depth are the tokens at the start of
each layer, 4 bytes × tokens × width, and these may wait in host memory, or in files: then no memory of the process
grows with depth.
"""

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from cctrain.errors import TrainingError

LARGE = 2**20  # bytes; what is smaller stays on the device
MUCH = 2**29  # bytes; after so many, what was freed is given back to the system


class Activations:
    """How the stages of one forward are run; each forward makes its own.

    What is kept lies on the `device`, in `host` memory, or on `disk`: in files in `folder`, by default the system's for
    temporary files. `progress` is called at every stage, also where it is computed again in backward.
    """

    def __init__(
        self,
        checkpointing: bool = False,
        offload: str = "device",
        folder: str | None = None,
        progress: Callable[[], object] | None = None,
    ):
        self.checkpointing = checkpointing
        self.progress = progress
        self.store: ActivationStore | None = None
        if checkpointing and offload != "device":
            self.store = ActivationStore(in_memory if offload == "host" else lambda tensor: in_file(tensor, folder))

    def run(self, stage: Callable[..., Any], *inputs: Any) -> Any:
        """stage(*inputs), all of it kept or its inputs alone."""
        if self.progress is not None:
            stage = _after(self.progress, stage)
        if not (self.checkpointing and torch.is_grad_enabled()):
            return stage(*inputs)
        if self.store is None:
            return checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=False)
        with saved_tensors_hooks(self.store.put, self.store.take):
            return checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=False)

    def rooms(self, like: list[Tensor]) -> list["Room | None"]:
        """A room for each tile of a token stream that will be kept, shaped like these, all in one piece of memory.

        Allocated one by one among the short-lived tensors of the stages, they would lie scattered, and a CPU's
        allocator gives back no memory between them: three times as much was in use.
        """
        if not (self.checkpointing and torch.is_grad_enabled()):
            return [None] * len(like)
        lengths = [len(tile) for tile in like]
        return [Room(piece) for piece in like[0].new_empty(sum(lengths), like[0].shape[-1]).split(lengths)]

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Stages within it may begin with the same tensors, which live until its end: each is put away once."""
        yield
        if self.store is not None:
            self.store.parked.clear()


def _after(call: Callable[[], object], stage: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        call()
        return stage(*inputs)

    return run


class Room:
    """Memory for one tensor."""

    def __init__(self, piece: Tensor):
        # Of the same memory, but no view: to autograd a tensor of its own.
        self.tensor = torch.empty(0, dtype=piece.dtype, device=piece.device).set_(
            piece.untyped_storage(), piece.storage_offset(), piece.shape, piece.stride()
        )


def place(tensor: Tensor, room: Room | None) -> Tensor:
    """The same tensor, in that room."""
    return tensor if room is None else _Place.apply(tensor, room)


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, room: Room) -> Tensor:  # type: ignore[override]
        return room.tensor.copy_(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def in_memory(like: Tensor) -> Tensor:
    """A place in host memory for a tensor."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def in_file(like: Tensor, folder: str | None) -> Tensor:
    """A place in a file that is mapped into memory, and goes with the tensor: what has been written is not the
    process's but the kernel's to keep, which puts it on the disk where memory is short.

    Raises TrainingError where there is no room.
    """
    try:
        with tempfile.NamedTemporaryFile(prefix="cctrain-activations-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, like.nbytes)  # a full disk would kill the process later
            return torch.from_file(file.name, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
    except OSError as error:
        raise TrainingError(
            f"activations cannot be written to {folder or tempfile.gettempdir()} ({error}): name a folder with more "
            "room with memory.offload_dir"
        ) from error


def give_back_freed_memory() -> None:
    """What tiles have freed lies between what is still in use, and the C library would keep it: 0.8 GiB more with every
    layer of 1.8 million tokens, until memory ran out. Libraries other than glibc have no such call."""
    if _trim is not None:
        _trim(0)


_trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)


class Parked:
    """A tensor off the device; `copied` is its copy on the device while one is on its way."""

    def __init__(self, source: Tensor, make_place: Callable[[Tensor], Tensor]):
        self.device = source.device
        self.host = make_place(source)
        self.copied: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None


class ActivationStore:
    """Tensors that leave the device in forward and come back in backward, in the opposite order.

    On a GPU they are copied on a stream of their own, and while one is used the next is on its way. On a CPU there is
    no other memory than the host's: the copies are made all the same, so that a training takes the same path.
    """

    def __init__(self, make_place: Callable[[Tensor], Tensor]) -> None:
        self.make_place = make_place
        self.parked: dict[tuple[int, torch.Size], Parked] = {}
        self.order: list[Parked] = []
        self.stream: torch.cuda.Stream | None = None
        self.moved = 0  # bytes since freed memory was last given back

    def put(self, tensor: Tensor) -> Tensor | Parked:
        if tensor.nbytes < LARGE or not tensor.is_floating_point():
            return tensor
        self._count(tensor)
        key = (tensor.data_ptr(), tensor.shape)
        parked = self.parked.get(key)
        if parked is None:
            parked = self.parked[key] = Parked(tensor, self.make_place)
            with self._copying(tensor.device):
                parked.host.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        self.order.append(parked)
        return parked

    def take(self, kept: Tensor | Parked) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        while self.order and self.order.pop() is not kept:
            pass  # what nothing needed a gradient of
        self._fetch(kept)
        if self.order:
            self._fetch(self.order[-1])
        tensor, kept.copied = kept.copied, None
        assert tensor is not None
        self._count(tensor)
        if kept.arrived is not None:
            now = torch.cuda.current_stream(kept.device)
            now.wait_event(kept.arrived)
            tensor.record_stream(now)
        return tensor

    def _count(self, tensor: Tensor) -> None:
        self.moved += tensor.nbytes
        if self.moved >= MUCH:
            self.moved = 0
            give_back_freed_memory()

    def _fetch(self, parked: Parked) -> None:
        if parked.copied is not None:
            return
        with self._copying(parked.device):
            parked.copied = torch.empty(parked.host.shape, dtype=parked.host.dtype, device=parked.device)
            parked.copied.copy_(parked.host, non_blocking=True)
            if parked.device.type == "cuda":
                parked.arrived = torch.cuda.current_stream(parked.device).record_event()

    @contextmanager
    def _copying(self, device: torch.device) -> Iterator[None]:
        """What is started within runs beside the computation, after what was started before."""
        if device.type != "cuda":
            yield
            return
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            yield
