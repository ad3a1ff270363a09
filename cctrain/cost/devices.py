"""What a device reaches: by data sheets and assumed shares (the files in `devices/`), or measured (`calibrate`)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cctrain.errors import UsageError

FOLDER = Path(__file__).parent / "devices"
_KEYS = {"name", "memory", "peak", "bandwidth", "per_node", "inside", "between", "latency", "attained"}
# Of AdamW and of what ZeRO copies, read and written; and of a target's loss in fp64, forward and backward.
_BYTES_OF_A_PARAMETER, _BYTES_OF_A_TARGET = 90, 1000
_CALL_ON_A_GPU = 2e-4  # seconds of starting the kernels of one stage, forward and backward


@dataclass(frozen=True)
class Device:
    """One rank's device. FLOP/s, bytes/s, seconds.

    `products` and `attention` are what it reaches in products of matrices and in attention, `elementwise` in the rest
    of a layer; `call` is what a stage takes however little there is to do. A rank sends at `inside` within its node of
    `per_node` devices and at `between` to others; a collective takes `latency` at least. `process` is what a process
    holds beside the model and its work, `kind` is cuda or cpu. `measured` says whether this was
    taken here, or is a model of a device elsewhere.
    """

    name: str
    memory: float
    peak: float
    products: float
    attention: float
    elementwise: float
    parameter_seconds: float
    target_seconds: float
    call: float
    per_node: int
    inside: float
    between: float
    latency: float
    process: float = 0.0
    kind: str = "cuda"
    measured: bool = False


def known_devices() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def known_device(text: str) -> str | None:
    """The known device that a text names, such as PyTorch's name of a GPU or what Slurm is asked for."""
    words = set(re.findall("[a-z0-9]+", text.lower()))
    return next((name for name in known_devices() if name in words), None)


def load_device(name: str, precision: str) -> Device:
    """By its name in `devices/`, or of a file of the same form. Raises UsageError naming what is wrong."""
    path = FOLDER / f"{name.lower()}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(known_devices())
        raise UsageError(f"there is no device {name!r}: choose one of {known}, or a YAML file of the form of these")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML parser and OmegaConf have many error types, all the user's
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict) or values.keys() != _KEYS:
        wrong = sorted(map(str, set(values) ^ _KEYS)) if isinstance(values, dict) else sorted(_KEYS)
        raise UsageError(f"{path} is no device: these keys are missing or unknown: {', '.join(wrong)}")
    try:
        peak, attained = float(values["peak"][precision]), {k: float(v) for k, v in values["attained"].items()}
        bandwidth = float(values["bandwidth"]) * attained["bandwidth"]
        return Device(
            name=str(values["name"]),
            memory=float(values["memory"]),
            peak=peak,
            products=peak * attained["products"],
            attention=peak * attained["attention"],
            elementwise=bandwidth,
            parameter_seconds=_BYTES_OF_A_PARAMETER / bandwidth,
            target_seconds=_BYTES_OF_A_TARGET / bandwidth,
            call=_CALL_ON_A_GPU,
            per_node=int(values["per_node"]),
            inside=float(values["inside"]) * attained["network"],
            between=float(values["between"]) * attained["network"],
            latency=float(values["latency"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is no device: {error!r}; compare it with {FOLDER / 'h100.yaml'}") from error
