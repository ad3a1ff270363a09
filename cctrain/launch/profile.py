"""A cluster profile: the things in which clusters differ, in a YAML file.

sbatch:   options of #SBATCH, as a dictionary
setup:    lines of shell before anything runs: modules, an environment
prefix:   words before the command of every rank: a container
device:   which GPU it has, for the estimate: a name in cctrain/cost/devices, or a file of that form. Default: the kind
          that sbatch asks for (gpus-per-node: h100:4)
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import cctrain
from cctrain.cost.devices import known_device
from cctrain.errors import UsageError

LAUNCHERS = Path(cctrain.__file__).parents[1] / "launchers"
KEYS = ("sbatch", "setup", "prefix", "device")
# What the batch script needs to be as it is, and what to do instead.
RESERVED = {
    "output": "the logs are in RUN/logs",
    "error": "the logs are in RUN/logs",
    "open-mode": "logs are always appended to",
    "chdir": "the job works in the run directory",
    "array": "submit each run by itself",
    "dependency": "use --chain N",
    "ntasks": "use --gpus-per-node or --ranks-per-node",
    "ntasks-per-node": "use --gpus-per-node or --ranks-per-node",
    "gpus": "use gpus-per-node",
    "gpus-per-task": "use gpus-per-node: each rank chooses among the node's GPUs by its number",
}


@dataclass(frozen=True)
class Profile:
    """An option without a value ("") is a switch, such as exclusive."""

    name: str
    sbatch: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    prefix: str = ""
    device: str = ""


def load_profile(name: str) -> Profile:
    """A profile of launchers/profiles by its name, or any by the path of its file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = LAUNCHERS / "profiles" / f"{name}.yaml"
        if not path.is_file():
            raise UsageError(f"there is no profile {name} in {path.parent}{_known(path.parent)}, or give a YAML file")
    if not path.is_file():
        raise UsageError(f"there is no profile {path}: give a YAML file, or a name{_known(LAUNCHERS / 'profiles')}")
    try:
        # Every value as it is written: YAML would read 24:00:00 as a number of seconds.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    return _read(path, content)


def gpus_of(sbatch: dict[str, str]) -> int:
    """The GPUs per node that the options ask for: gpus-per-node=4, =a100:4, or gres=gpu:a100:4."""
    if "gpus-per-node" in sbatch:
        return int(_count(sbatch["gpus-per-node"]) or 1)
    found = _gres_of_gpus(sbatch)
    return int(_count(found) or 1) if found else 0


def device_of(profile: Profile, sbatch: dict[str, str]) -> str | None:
    """The GPU by the name of its device file; None where nothing says which one it is."""
    if profile.device:
        return profile.device
    return known_device(f"{sbatch.get('gpus-per-node', '')} {_gres_of_gpus(sbatch) or ''}")


def with_gpus(sbatch: dict[str, str], num: int) -> dict[str, str]:
    """The same options with another number of GPUs per node, asked for in the same way."""
    if (found := _gres_of_gpus(sbatch)) is not None:
        wanted = f"{re.sub(r':[0-9]+$', '', found)}:{num}"
        return sbatch | {"gres": ",".join(wanted if part == found else part for part in sbatch["gres"].split(","))}
    kind = re.sub(r":?[0-9]*$", "", sbatch.get("gpus-per-node", ""))
    return sbatch | {"gpus-per-node": f"{kind}:{num}" if kind else str(num)}


def _read(path: Path, content: Any) -> Profile:
    if not isinstance(content, dict) or not content.keys() <= set(KEYS):
        unknown = sorted(set(content) - set(KEYS)) if isinstance(content, dict) else []
        what = f"has the unknown key {unknown[0]}" if unknown else "is no mapping"
        raise UsageError(f"{path} {what}: a profile has the keys {', '.join(KEYS)} and no others")
    sbatch = content.get("sbatch") or {}
    if not isinstance(sbatch, dict) or not all(isinstance(value, str) for value in sbatch.values()):
        raise UsageError(f"{path}: sbatch must be a mapping of options, such as `partition: gpu`")
    setup = content.get("setup") or []
    setup = setup.splitlines() if isinstance(setup, str) else setup
    if not isinstance(setup, list) or not all(isinstance(line, str) for line in setup):
        raise UsageError(f"{path}: setup must be lines of shell, as a list or as a block of text")
    prefix = content.get("prefix") or ""
    if not isinstance(prefix, str) or "\n" in prefix.strip():
        raise UsageError(f"{path}: prefix must be one line, the words before a command")
    device = content.get("device") or ""
    if not isinstance(device, str):
        raise UsageError(f"{path}: device must be a name, such as h100, or a file")
    return Profile(path.stem, _options(path, sbatch), setup, prefix.strip(), device)


def _options(path: Path, sbatch: dict[str, str]) -> dict[str, str]:
    options = {}
    for written, value in sbatch.items():
        name = written.removeprefix("--").replace("_", "-")
        if name in RESERVED:
            raise UsageError(f"{path}: sbatch.{written} cannot be set: {RESERVED[name]}")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", name) or "\n" in value or '"' in value:
            raise UsageError(f"{path}: sbatch.{written}: write the long name of an option, and a value of one line")
        if value.lower() != "false":
            options[name] = "" if value.lower() in ("true", "null", "~") else value
    for name in ("gpus-per-node", "gres"):
        if name in options and not re.fullmatch(r"[\w:,.\-]+", options[name]):
            raise UsageError(f"{path}: sbatch.{name}={options[name]} is not understood: write NUMBER or TYPE:NUMBER")
    return options


def _gres_of_gpus(sbatch: dict[str, str]) -> str | None:
    parts = sbatch.get("gres", "").split(",")
    return next((part for part in parts if part == "gpu" or part.startswith("gpu:")), None)


def _count(text: str) -> str | None:
    found = re.search(r"(?:^|:)([0-9]+)$", text)
    return found[1] if found else None


def _known(folder: Path) -> str:
    if not folder.is_dir():
        return f" (no such folder: cctrain was not installed from a checkout; looked for {folder})"
    return f": choose one of {', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}"
