"""The batch script of a run: launchers/slurm.sbatch with its @WORDS@ filled in."""

import hashlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from cctrain.errors import UsageError
from cctrain.launch.profile import LAUNCHERS, Profile, gpus_of, with_gpus

TEMPLATE = LAUNCHERS / "slurm.sbatch"
SECONDS_TO_SAVE = 180
# Jobs of a chain wait for those of their name, and never start again: whatever the profile says.
CHAIN_DECIDES = ("requeue", "no-requeue", "job-name")


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm beside the profile. nodes is a number or a range, 1-4; None: as the profile says."""

    nodes: str | None = None
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    time: str | None = None
    chain: int = 0


def render(
    run_dir: Path, config: Path, profile: Profile, request: Request, python: str, code: str, options: list[str]
) -> str:
    """The script that trains `config` in `run_dir`; the paths are absolute, options are for `cctrain train`."""
    if not TEMPLATE.is_file():
        raise UsageError(
            f"the batch template {TEMPLATE} is not there: run cctrain from a checkout (tools/setup.sh installs it so)"
        )
    sbatch, ranks_per_node = resources(profile, request)
    if request.chain:
        sbatch = {name: value for name, value in sbatch.items() if name not in CHAIN_DECIDES}
    text, sbatch = _override_options(TEMPLATE.read_text(encoding="utf-8"), sbatch)
    words = {
        "ORIGIN": f"Written by `cctrain submit` from launchers/{TEMPLATE.name} and the profile {profile.name}.",
        "JOB_NAME": _sbatch_value(job_name(run_dir, request.chain)),
        "BATCH_LOG": _sbatch_value(f"{str(run_dir).replace('%', '%%')}/logs/slurm-%j.log"),
        "WHY_REQUEUE": (
            "One job of a chain: it starts when the one before has ended, and never again."
            if request.chain
            else "Slurm may start the job again by itself: after a preemption, and when a node fails."
        ),
        "REQUEUE": "--no-requeue\n#SBATCH --dependency=singleton" if request.chain else "--requeue",
        "SECONDS_TO_SAVE": str(SECONDS_TO_SAVE),
        "SBATCH": f"\n# From the profile {profile.name} and the command line.\n" + _sbatch_lines(sbatch),
        "RUN_DIR": shlex.quote(str(run_dir)),
        "CONFIG": shlex.quote(str(config)),
        "TRAIN_OPTIONS": shlex.join(options),
        "RANKS_PER_NODE": str(ranks_per_node),
        "LEAST_NODES": sbatch["nodes"].split("-")[0],
        "GPUS_PER_NODE": str(gpus_of(sbatch)),
        "CODE": code,
        "PYTHON": shlex.quote(python),
        "CHAIN": "1" if request.chain else "0",
        "SETUP": "\n".join([*profile.setup, *([f"prefix=({profile.prefix})"] if profile.prefix else [])]) or "# (none)",
    }
    return re.sub("@(" + "|".join(words) + ")@", lambda found: words[found[1]], text)


def resources(profile: Profile, request: Request) -> tuple[dict[str, str], int]:
    """All options of #SBATCH beside the template's own, and the ranks of a node."""
    sbatch = {"nodes": "1"} | profile.sbatch
    if request.nodes is not None:
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", request.nodes):
            raise UsageError(f"--nodes={request.nodes} is no number of nodes: write 4, or 1-4 for as many as are free")
        sbatch["nodes"] = request.nodes
    if request.gpus_per_node is not None:
        sbatch = with_gpus(sbatch, request.gpus_per_node)
    if request.time is not None:
        if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", request.time):
            raise UsageError(f"--time={request.time} is no time: write minutes, HH:MM:SS or DAYS-HH:MM:SS")
        sbatch["time"] = request.time
    ranks_per_node = request.ranks_per_node or gpus_of(sbatch) or 1
    if gpus_of(sbatch) and ranks_per_node > gpus_of(sbatch):
        raise UsageError(f"{ranks_per_node} ranks on a node need as many GPUs: {gpus_of(sbatch)} are asked for")
    return sbatch | {"ntasks-per-node": str(ranks_per_node)}, ranks_per_node


def job_name(run_dir: Path, chain: int) -> str:
    """Jobs of a chain wait for those of the same name, so that name must be the run's alone."""
    name = re.sub(r"[^\w.-]", "-", f"cctrain-{run_dir.name}")
    return f"{name}-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]}" if chain else name


def _override_options(text: str, sbatch: dict[str, str]) -> tuple[str, dict[str, str]]:
    """What the profile says of the template's own options goes in their place, under the reason they stand there."""
    rest = {}
    for name, value in sbatch.items():
        line = f"#SBATCH --{name}" + (f"={_sbatch_value(value)}" if value else "")
        pattern = "#SBATCH @REQUEUE@" if name in ("requeue", "no-requeue") else rf"#SBATCH --{name}(?:=.*)?"
        text, found = re.subn(rf"(?m)^{pattern}$", lambda _, line=line: line, text)  # type: ignore[misc]
        if not found:
            rest[name] = value
    return text, rest


def _sbatch_lines(sbatch: dict[str, str]) -> str:
    return "\n".join(
        f"#SBATCH --{name}" + (f"={_sbatch_value(value)}" if value else "") for name, value in sbatch.items()
    )


def _sbatch_value(value: str) -> str:
    """Slurm splits #SBATCH lines at blanks, outside of double quotes."""
    return value if re.fullmatch(r"[\w./:=,%@+\[\]-]+", value) else f'"{value}"'
