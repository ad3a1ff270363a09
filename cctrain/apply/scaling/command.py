"""`cctrain scaling`: measure what is missing, then fit, draw, write and track what is there.

    DIR/settings.json, points.jsonl     what was measured, and how (see points)
    DIR/config.yaml                     the configuration, resolved
    DIR/report.md, points.csv           the sweep in words, and every number of it
    DIR/fits.json, figures/             what the fits found, and the pictures, as PNG and SVG
    DIR/mlflow.json                     where it is in MLflow

Everything but the first line is made again from the points by every call.
"""

import json
import logging
import os
import platform
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cctrain.apply.processes import in_new_processes
from cctrain.apply.scaling.analysis import FIT_FROM, THEORY, analyse
from cctrain.apply.scaling.measure import depth_of_as_many_parameters, seconds_of
from cctrain.apply.scaling.points import Row, adopt_settings, digest_of, points_of, read_points
from cctrain.apply.scaling.report import crossover_in_words, csv_text, exponent_in_words, report_text
from cctrain.apply.scaling.sweep import REPEATS_OF_A_ROUND, ROUNDS, Plan, forecast, seconds_to_go, sweep
from cctrain.apply.scaling.tracking import track
from cctrain.apply.scaling.work import PRECISIONS, TARGET_SHARE, Setting, matrix_product
from cctrain.config import Config, ModelConfig, load_config, to_yaml
from cctrain.errors import UsageError
from cctrain.parallel.mesh import find_device_kind
from cctrain.run_directory import CONFIG, write_atomically
from cctrain.run_lock import hold_run
from cctrain.tracking.address import check_configured_uri, default_uri, strip_credentials
from cctrain.words import duration

log = logging.getLogger(__name__)

LENGTHS = {"cpu": "1024,2048,4096,8192,16384,32768,65536", "cuda": "4096,8192,16384,32768,65536,131072,262144"}
LATENTS = "32,64,128,256"
BUDGET = {"cpu": 900.0, "cuda": 300.0}
NUM_GENES = 2000
MODEL_KEYS = ("width", "depth", "heads", "latents", "latent_width", "backend")
MEMORY_KEYS = ("checkpointing", "offload", "tile_tokens")
HELD = "another sweep measures into {directory}: {holder}. Wait for its end, or choose another --out"
MIB = 2**20


@dataclass(frozen=True)
class Grid:
    """Numbers as `1024,4096`; None: the default."""

    lengths: str | None = None
    latents: str | None = None
    context: str | None = None


def scaling(
    config_file: Path,
    overrides: list[str] | None = None,
    grid: Grid | None = None,
    out: Path | None = None,
    budget: float | None = None,
    rounds: int | None = None,
    repeats: int | None = None,
    genes: int | None = None,
    fit_from: int | None = None,
    dry_run: bool = False,
) -> tuple[dict[str, Any], str]:
    """What was found, and a text that says it. Raises UsageError for a sweep that cannot be made."""
    # Contexts are random: whatever store the configuration names, or none, makes no difference.
    config = load_config(config_file, [*(overrides or []), "data.store=none"])
    check_scalable(config)
    grid, device = grid or Grid(), find_device_kind()
    model = replace(config.model, cell_encoding=0, init_from=None)
    setting = Setting(device, config.training.precision, genes or NUM_GENES, config.memory)
    settings = settings_of(model, setting)
    context_ranks = numbers("--context", grid.context or f"1,{config.parallel.context}")
    if device == "cuda" and max(context_ranks) > torch.cuda.device_count():
        raise UsageError(f"--context {max(context_ranks)} needs as many GPUs; here are {torch.cuda.device_count()}")
    points = points_of(
        model,
        depth_of_as_many_parameters(model, setting.num_genes),
        numbers("--lengths", grid.lengths or LENGTHS[device]),
        numbers("--latents", grid.latents or LATENTS),
        context_ranks,
    )
    rate = in_new_processes(product_rate, (setting,)) if device == "cuda" else product_rate(setting)
    plan = Plan(
        list(points),
        setting,
        BUDGET[device] if budget is None else budget,
        rounds or ROUNDS,
        repeats or REPEATS_OF_A_ROUND,
        rate["flops_per_second"],
        digest_of(settings),
        command_text(config_file, overrides or [], grid, budget, rounds, repeats, genes),
    )
    folder = out or Path(f"{config.run.dir}-scaling")
    if dry_run:
        if folder.is_dir():
            adopt_settings(folder, settings, write=False)
        return _forecast(folder, plan, read_points(folder, plan.digest))
    with hold_run(folder, HELD):
        identifier = adopt_settings(folder, settings)
        write_atomically(folder / CONFIG, strip_credentials(to_yaml(config)).encode())
        rows = read_points(folder, plan.digest)
        sweep(folder, plan, rows)
        found = analyse(rows.values(), fit_from or FIT_FROM)
        artifacts = write_results(folder, rows, found, settings)
        identity = _track(folder, identifier, rows, found, artifacts, config)
    result = {
        "out": str(folder),
        "points": [{key: value for key, value in row.items() if key != "timings"} for row in rows.values()],
        "fits": found,
        "mlflow": identity,
    }
    where = [f"MLflow: cctrain ui {shlex.quote(str(folder))}"] if identity else []
    return result, "\n".join([summary(folder, rows, found), *where])


def command_text(
    config_file: Path,
    overrides: list[str],
    grid: Grid,
    budget: float | None = None,
    rounds: int | None = None,
    repeats: int | None = None,
    genes: int | None = None,
) -> str:
    """What decides which points are measured, and how; the folder does not."""
    options = {**asdict(grid), "budget": budget, "rounds": rounds, "repeats": repeats, "genes": genes}
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return strip_credentials(shlex.join(["cctrain", "scaling", str(config_file), *overrides, *given]))


def check_scalable(config: Config) -> None:
    if config.model.attention != "criss_cross":
        raise UsageError(
            "a sweep measures criss-cross models, and dense controls anyway: set model.attention=criss_cross"
        )
    if config.training.precision not in PRECISIONS:
        raise UsageError(
            f"training.precision={config.training.precision} cannot be measured: choose {' or '.join(PRECISIONS)}"
        )
    if config.tracking.uri is not None:
        check_configured_uri(config.tracking.uri)  # now, not after hours of measuring


def settings_of(model: ModelConfig, setting: Setting) -> dict[str, Any]:
    """What all points must have in common."""
    gpu = torch.cuda.get_device_name() if setting.device == "cuda" else None
    return {
        "model": {key: getattr(model, key) for key in MODEL_KEYS},
        "precision": setting.dtype,
        "genes": setting.num_genes,
        "target_share": TARGET_SHARE,
        "memory": {key: getattr(setting.memory, key) for key in MEMORY_KEYS},
        "machine": {
            "device": setting.device,
            "gpu": gpu,
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def numbers(option: str, text: str) -> list[int]:
    """Of `1024,4096`; commas or spaces stand between them."""
    try:
        found = [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UsageError(f"{option} {text!r} is no list of numbers above 0: write them as 1024,4096")
    return found


def product_rate(setting: Setting) -> dict[str, float]:
    multiply, flops = matrix_product(setting)
    multiply()
    return {"flops_per_second": flops / min(seconds_of(multiply, setting.device) for _ in range(3))}


def write_results(folder: Path, rows: dict[str, Row], found: dict[str, Any], settings: dict[str, Any]) -> list[Path]:
    """Fits, figures, table and report; returns all their paths."""
    from cctrain.apply.scaling.figures import draw_figures

    figures = draw_figures(rows.values(), found, settings["machine"], folder / "figures")
    shown = [path.relative_to(folder).as_posix() for path in figures]
    texts = {
        "fits.json": json.dumps(found, indent=1, allow_nan=False) + "\n",
        "points.csv": csv_text(rows.values()),
        "report.md": report_text(rows.values(), found, settings, shown),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    return [*(folder / name for name in texts), *figures, *(path.with_suffix(".svg") for path in figures)]


def summary(folder: Path, rows: dict[str, Row], found: dict[str, Any]) -> str:
    left_out = sum("left_out" in row for row in rows.values())
    lines = [f"{len(rows) - left_out} points measured, {left_out} left out"]
    lines += [f"attention, exponent of {name}: {exponent_in_words(found['attention'][name])}" for name in THEORY]
    lines += [
        f"M = {entry['latents']}, {entry['against'].replace('_', ' ')}: {crossover_in_words(entry)}"
        for entry in found["crossovers"]
    ]
    return "\n".join([*lines, f"report: {folder / 'report.md'}"])


def _forecast(folder: Path, plan: Plan, rows: dict[str, Row]) -> tuple[dict[str, Any], str]:
    found = forecast(plan, rows)
    seconds = seconds_to_go(found, plan.budget)
    lines = [f"{'point':<52} {'FLOPs':>9} {'attention':>9} {'about s':>9} {'about MiB':>9}"]
    for row in found:
        note = "" if row["missing"] else "  there"
        if row["missing"] and row["predicted_seconds"] > plan.budget:
            note = "  over --budget"
        lines.append(
            f"{row['key']:<52} {row['flops']:>9.2e} {row['attention_share_of_flops']:>9.1%} "
            f"{row['predicted_seconds']:>9,.0f} {row['predicted_bytes'] / MIB:>9,.0f}{note}"
        )
    missing = sum(row["missing"] for row in found)
    lines.append(f"{missing} of {len(found)} points to measure in {folder}, about {duration(seconds)} in all")
    return {"out": str(folder), "points": found, "predicted_seconds": seconds}, "\n".join(lines)


def _track(
    folder: Path, identifier: str, rows: dict[str, Row], found: dict[str, Any], artifacts: list[Path], config: Config
) -> dict[str, Any] | None:
    """Whatever goes wrong there, the measurements are on the disk, and the same call sends them later."""
    uri = config.tracking.uri or default_uri(folder)
    if uri is None:
        log.warning("not in MLflow: a database beside %s is not safe here; name a server with tracking.uri", folder)
        return None
    try:
        return track(folder, identifier, rows, found, artifacts, uri, config.tracking.experiment)
    except Exception as error:  # MLflow, SQLAlchemy, requests and the file system have many error types
        reason = strip_credentials(f"{type(error).__name__}: {error}")
        log.warning(
            "MLflow tracking failed; the points are in %s, and the same command sends them (%s)", folder, reason
        )
        return None


def _processor() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text()
        return next(line.split(":", 1)[1].strip() for line in facts.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
