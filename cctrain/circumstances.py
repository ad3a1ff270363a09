"""What every measurement is kept with: the machine, the versions and the commit that it was taken on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from cctrain.code_version import code_commit


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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
