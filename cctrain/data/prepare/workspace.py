"""The folder in which a store is prepared: held by one process, continued after a kill, renamed at the end.

    OUT.partial/lock         who prepares there (see run_lock: it outlives nobody)
    OUT.partial/inputs.json  which files and options what lies here is for
    OUT.partial/scratch/     what tasks left behind
    OUT.partial/store/       becomes OUT

So OUT is complete or absent, and the same command continues where an earlier one was killed. Input that is
refused leaves nothing.
"""

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cctrain.data.files import flush_to_disk, publish_text, sync_to_disk
from cctrain.data.prepare.tasks import WorkerError
from cctrain.errors import CctrainError, DataError
from cctrain.run_lock import LOCK, hold_run

INPUTS = "inputs.json"
_BEING_EMPTIED = {"being emptied": True}
_HELD = "another prepare is writing {directory}: {holder}. Wait for its end, or choose another --out"


@contextmanager
def workspace(out: Path, inputs: dict[str, Any], report: Callable[[str], None]) -> Iterator[Path]:
    """OUT.partial, whose `store` becomes OUT when the block ends; an OUT that is there is replaced.

    `inputs` is JSON that says what the work depends on. Raises UsageError if another process is at it,
    DataError when the disk is full.
    """
    partial = partial_folder(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{partial}: this folder cannot be made ({error.strerror}): choose another --out.") from error
    try:
        with _terminate_as_interrupt(), hold_run(partial, held=_HELD):
            _take_up(partial, inputs, report)
            with _outcome(partial, report):
                yield partial
                flush_to_disk(partial / "store")
                _replace(out, partial / "store")
            _empty(partial)
    finally:
        with suppress(OSError):  # not empty: it is kept
            partial.rmdir()


@contextmanager
def _outcome(partial: Path, report: Callable[[str], None]) -> Iterator[None]:
    """What becomes of the folder when the work fails: input that is refused takes it along, all else keeps it."""
    try:
        yield
    except KeyboardInterrupt:
        report(f"stopped; {partial} keeps what was done: the same command continues there")
        raise
    except WorkerError:
        raise
    except CctrainError:
        _empty(partial)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{partial.parent}: the disk or quota is full. Free some space, and the same command continues; or "
            f"remove {partial}."
        ) from error


def partial_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _take_up(partial: Path, inputs: dict[str, Any], report: Callable[[str], None]) -> None:
    """Continue if what is there was made from the same inputs, else begin with an empty folder."""
    inputs = json.loads(json.dumps(inputs))  # as it will be read: tuples are lists
    found = _read_inputs(partial / INPUTS)
    if found == inputs:
        report(f"continuing in {partial}, where an earlier prepare was stopped")
        return
    if found is None and any(not _is_ours(path.name) for path in partial.iterdir()):
        raise DataError(
            f"{partial} holds files that no prepare has left there: they would be lost. Move them away, or choose "
            "another --out."
        )
    if found not in (None, _BEING_EMPTIED):
        differs = ", ".join(sorted(key for key in found.keys() | inputs.keys() if found.get(key) != inputs.get(key)))
        report(f"{partial} was for other inputs or options ({differs}): beginning anew")
    _empty(partial)
    publish_text(partial / INPUTS, json.dumps(inputs, indent=1) + "\n")


def _read_inputs(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _empty(partial: Path) -> None:
    """All but the lock. Inputs that say nothing come first, so that a kill in between leaves nothing to be continued,
    and go last, so that what is left is known to be ours."""
    publish_text(partial / INPUTS, json.dumps(_BEING_EMPTIED) + "\n")
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not _is_ours(path.name):
            path.unlink()
    (partial / INPUTS).unlink()


def _is_ours(name: str) -> bool:
    return name.startswith((LOCK, f".{LOCK}.", INPUTS, f".{INPUTS}."))


def _replace(out: Path, store: Path) -> None:
    if out.exists():
        old = out.with_name(f"{out.name}.old-{os.getpid()}")
        out.rename(old)
        store.rename(out)
        shutil.rmtree(old)
    else:
        store.rename(out)
    sync_to_disk(out.parent)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM, which clusters send before they kill, stops like Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
