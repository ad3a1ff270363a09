"""What every measurement is kept with, and where: a JSON file that says on which machine and commit it was taken."""

import argparse
import json
from pathlib import Path
from typing import Any

from cctrain.circumstances import circumstances
from cctrain.run_directory import write_atomically

__all__ = ["add_out", "circumstances", "keep"]


def add_out(parser: argparse.ArgumentParser, help: str = "a JSON file for the result", required: bool = False) -> None:
    """The option `--out`, a path whose folder exists; None if it is not given."""
    parser.add_argument("--out", type=_file, metavar="FILE", help=help, required=required)


def keep(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        write_atomically(out, f"{json.dumps(result, indent=1)}\n".encode())


def _file(text: str) -> Path:
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)  # now, not when all is done
    return path
