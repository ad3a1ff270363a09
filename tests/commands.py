"""Commands in the process of the test, for all tests but those of the process itself: imports take one seconds.

No training may get as far as its engine here: DeepSpeed leaves much behind in its process.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from typer.testing import CliRunner, Result

from cctrain.cli import app

NO_RANK = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID"))


def cctrain(*arguments: object, code: int = 0) -> Result:
    """`cctrain ARGUMENTS`, which ends with this exit code."""
    with log_and_hook_restored():
        done = CliRunner().invoke(app, [*map(str, arguments)], env={**NO_RANK, "CUDA_VISIBLE_DEVICES": ""})
    assert done.exit_code == code, done.output
    return done


def refusal(code: int, *arguments: object) -> str:
    """What a command that ends with this exit code says, which is no traceback."""
    done = cctrain(*arguments, code=code)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@contextmanager
def log_and_hook_restored() -> Iterator[None]:
    """A training writes the log to a file, too, and errors that nobody catches."""
    root, hook = logging.getLogger(), sys.excepthook
    before = list(root.handlers)
    try:
        yield
    finally:
        sys.excepthook = hook
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
            handler.close()
