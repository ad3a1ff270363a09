"""What surrounds the work of every command: the log, the results, errors as exit codes."""

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cctrain.errors import CctrainError, UsageError

log = logging.getLogger("cctrain")


def run_command(work: Callable[[], tuple[dict[str, Any], str]], as_json: bool, debug: bool) -> None:
    """Do a command's work: results on standard output, the log on standard error, errors as exit codes."""
    _log_to_terminal()
    try:
        result, text = work()
    except CctrainError as error:
        if debug:
            traceback.print_exc()
        elif is_first():
            print(f"cctrain: {error}", file=sys.stderr)
        else:
            log.error("%s", error)
        raise SystemExit(error.exit_code) from None
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"cctrain: {error.strerror}: {error.filename}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("cctrain: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if as_json:
        print(json.dumps(result, allow_nan=False))
    elif text:
        print(text)


def _log_to_terminal() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO if is_first() else logging.WARNING)


def log_to_file(run_dir: Path) -> None:
    """The first rank's log, beside the terminal; the others' standard error is such a file already, and under Slurm
    the first one's, too."""
    from cctrain.run_directory import log_file

    path = log_file(run_dir, 0)
    if not is_first() or (path.exists() and os.path.samestat(os.fstat(2), path.stat())):
        return
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def make_log_folder(run_dir: Path) -> None:
    """UsageError if nothing can be written there."""
    logs = run_dir / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        if not os.access(logs, os.W_OK):
            raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))
    except OSError as error:
        raise UsageError(f"{run_dir} cannot be written ({error.strerror}): choose another run.dir=DIR") from error


def is_first() -> bool:
    """Whether this process is rank 0, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"
