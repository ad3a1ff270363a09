"""What a device reaches: by data sheets and assumed shares (the files in `devices/`), or measured (`calibrate`).

A profile is a YAML file of one of two forms. A data sheet has peaks, and the shares of them that are attained. What
`cctrain estimate --save-device` keeps has the rates themselves, as they were measured: the key `measured` says with
what.
"""

import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cctrain.errors import UsageError
from cctrain.run_directory import write_atomically

FOLDER = Path(__file__).parent / "devices"
USABLE = 0.9  # of a device's memory; assumed: fragmentation takes the rest from the allocator
_SHEET = {"name", "memory", "process", "peak", "bandwidth", "per_node", "inside", "between", "latency", "attained"}
_ATTAINED = {"products", "attention", "bandwidth", "network"}
_MAY_BE_ZERO = {"process", "growth", "latency"}
# Of AdamW and of what ZeRO copies, read and written; and of a target's loss in fp64, forward and backward.
_BYTES_OF_A_PARAMETER, _BYTES_OF_A_TARGET = 90, 1000
_CALL_ON_A_GPU = 2e-4  # seconds of starting the kernels of one stage, forward and backward
_OF_A_FILE = """\
# What `cctrain estimate --save-device` measured; `cctrain estimate CONFIG --device FILE` reads it and measures nothing.
# The rates are those of the model and of the ranks side by side that `measured` names; for others, measure again.
# FLOP/s, bytes/s, bytes, seconds; rehearsed_over_parts is how many times as long a real step took as its parts, and
# held_over_needed how many times as much memory a rank held as it needed.
"""


@dataclass(frozen=True)
class Measured:
    """When a device was measured, and with what; the file that it was read from, if it was."""

    date: str
    model: str
    precision: str
    ranks: int
    file: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Device:
    """One rank's device. FLOP/s, bytes/s, seconds.

    `products` and `attention` are what it reaches in products of matrices and in attention, `elementwise` in the rest
    of a layer; `call` is what a stage takes however little there is to do. A rank sends at `inside` within its node of
    `per_node` devices and at `between` to others; a collective takes `latency` at least. `process` is what a process
    holds beside the model and its work, `growth` what its heap will grow by, `kind` is cuda or cpu. A step takes
    `rehearsed_over_parts` times as long as its parts, and a rank holds `held_over_needed` times as much as model and
    work need. Without `measured` this is a model of a device.
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
    growth: float = 0.0
    kind: str = "cuda"
    rehearsed_over_parts: float = 1.0
    held_over_needed: float = 1.0
    measured: Measured | None = None


def known_devices() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def known_device(text: str) -> str | None:
    """The known device that a text names, such as PyTorch's name of a GPU or what Slurm is asked for."""
    words = set(re.findall("[a-z0-9]+", text.lower()))
    return next((name for name in known_devices() if name in words), None)


def load_device(name: str, precision: str) -> Device:
    """By its name in `devices/`, or of a file of either form. Raises UsageError naming what is wrong."""
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
    is_measured = isinstance(values, dict) and "measured" in values
    try:
        device = _of_measurement(values, str(path)) if is_measured else _of_data_sheet(values, precision)
    except (KeyError, TypeError, ValueError) as error:
        advice = "measure it again with --save-device" if is_measured else f"compare it with {FOLDER / 'h100.yaml'}"
        said = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UsageError(f"{path} is no device: {said}; {advice}") from error
    if device.measured and device.measured.precision != precision:
        raise UsageError(
            f"{path} was measured in {device.measured.precision}, and says nothing of training.precision={precision}: "
            "measure that precision too, with --save-device"
        )
    return device


def save_device(device: Device, path: Path) -> None:
    """Keep what was measured. Raises UsageError if the file cannot be written."""
    values = asdict(device)
    del values["measured"]["file"]
    try:
        write_atomically(path, (_OF_A_FILE + OmegaConf.to_yaml(OmegaConf.create(values))).encode())
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): choose another --save-device FILE") from error


def _of_data_sheet(values: Any, precision: str) -> Device:
    _check_keys(values, _SHEET)
    _check_keys(values["attained"], _ATTAINED, "attained.")
    numbers = {key: _number(key, values[key]) for key in _SHEET - {"name", "peak", "attained"}}
    attained = {key: _number(f"attained.{key}", share) for key, share in values["attained"].items()}
    peak = _number(f"peak.{precision}", values["peak"][precision])
    bandwidth = numbers["bandwidth"] * attained["bandwidth"]
    return Device(
        name=str(values["name"]),
        memory=numbers["memory"],
        peak=peak,
        products=peak * attained["products"],
        attention=peak * attained["attention"],
        elementwise=bandwidth,
        parameter_seconds=_BYTES_OF_A_PARAMETER / bandwidth,
        target_seconds=_BYTES_OF_A_TARGET / bandwidth,
        call=_CALL_ON_A_GPU,
        per_node=int(numbers["per_node"]),
        inside=numbers["inside"] * attained["network"],
        between=numbers["between"] * attained["network"],
        latency=numbers["latency"],
        process=numbers["process"],
    )


def _of_measurement(values: Any, file: str) -> Device:
    _check_keys(values, {field.name for field in fields(Device)})
    told = values["measured"]
    _check_keys(told, {field.name for field in fields(Measured)} - {"file"}, "measured.")
    if values["kind"] not in ("cuda", "cpu"):
        raise ValueError(f"kind: {values['kind']!r} is neither cuda nor cpu")
    numbers: dict[str, Any] = {key: _number(key, values[key]) for key in values.keys() - {"name", "kind", "measured"}}
    ranks = int(_number("measured.ranks", told["ranks"]))
    measured = Measured(str(told["date"]), str(told["model"]), str(told["precision"]), ranks, file)
    numbers["per_node"] = int(numbers["per_node"])
    return Device(name=str(values["name"]), kind=values["kind"], measured=measured, **numbers)


def _check_keys(values: Any, keys: set[str], section: str = "") -> None:
    there = set(map(str, values)) if isinstance(values, dict) else set()
    if wrong := sorted(section + key for key in there ^ keys):
        raise ValueError(f"these keys are missing or unknown: {', '.join(wrong)}")


def _number(key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 < number < math.inf or (number == 0 and key in _MAY_BE_ZERO)):
        raise ValueError(f"{key}: {value!r} is not a number above 0")
    return number
