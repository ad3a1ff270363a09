"""What every measurement is kept with, and where: a JSON file that says on which machine and commit it was taken."""

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from cctrain.code_version import code_commit


def add_out(parser: argparse.ArgumentParser, help: str = "a JSON file for the result", required: bool = False) -> None:
    """The option `--out`, a path whose folder exists; None if it is not given."""
    parser.add_argument("--out", type=_file, metavar="FILE", help=help, required=required)


def circumstances(*packages: str, **more: Any) -> dict[str, Any]:
    """`machine`, with the versions of these packages (None where one is missing) and what else there is to say; and
    `commit`."""
    return {
        "machine": {
            "cores": os.cpu_count(),
            "processor": platform.machine(),
            "bytes": psutil.virtual_memory().total,
            "python": platform.python_version(),
            **{package: _version(package) for package in packages},
            **more,
        },
        "commit": code_commit(),
    }


def keep(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def _file(text: str) -> Path:
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)  # now, not when all is done
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
