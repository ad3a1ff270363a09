"""The public data sets that measurements are taken on: fetched, and made token stores, where they are missing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cctrain.data.fetch import DATASETS


def cctrain(*words: Any) -> None:
    subprocess.run([sys.executable, "-m", "cctrain", *map(str, words)], check=True)


def fetched(name: str, work: Path) -> Path:
    """What `cctrain prepare` takes of the data set, in the folder `work`/NAME."""
    source = work / name / DATASETS[name].to_prepare
    if not source.exists():
        cctrain("fetch", name, "--out", work / name)
    return source


def prepared(store: Path, source: Callable[[], Path], *options: Any) -> Path:
    """The token store. Only where it is missing is `source` called, for what `cctrain prepare` is to take."""
    if not (store / "manifest.json").is_file():
        cctrain("prepare", source(), "--out", store, *options)
    return store


def whole_cells(name: str, work: Path) -> Path:
    """The token store of the data set as `cctrain prepare` makes it without options."""
    return prepared(work / f"{name}-store", lambda: fetched(name, work))
