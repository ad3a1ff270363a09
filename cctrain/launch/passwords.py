"""Keep passwords out of what is written for a job. They reach it through the environment, which Slurm hands on."""

import os
import re
from collections.abc import Mapping

from cctrain.errors import UsageError
from cctrain.tracking.address import strip_credentials

_SECRET_NAME = re.compile(r"(?i)(password|passwd|token|secret|api_?key|access_?key|credential)")
# `export NAME=value`, where the value is written out; $(cat file) and $OTHER are not.
_ASSIGNMENT = re.compile(r"(?m)^\s*(?:export\s+)?(\w+)=(?![\s$\"']*\$)[\"']?[^\s\"']")
_SHORTEST = 6


def check_no_secrets(text: str, where: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError, without showing it, if a password stands in what is about to be written."""
    if strip_credentials(text) != text:
        raise UsageError(
            f"{where} holds an address with a user or a password in it, which would be written into the run "
            "directory. Take them out: for an MLflow server, set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD in the environment, which Slurm hands on to the job; for a database, leave "
            "tracking.uri unset and send the run with `cctrain sync RUN --uri URI` afterwards"
        )
    for name in _ASSIGNMENT.findall(text):
        if _SECRET_NAME.search(name):
            raise UsageError(
                f"{where} sets {name}, which would be written into the run directory: set it in the environment that "
                f"you submit from, or read it from a file of yours ({name}=$(cat FILE))"
            )
    for name in _environment_secrets(environment):
        if environment[name] in text:
            raise UsageError(
                f"{where} holds the value of the environment variable {name}, which would be written into the run "
                "directory: take it out; the job finds it in its environment"
            )


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with `…` for passwords in addresses and for the values of the environment's secrets."""
    for name in _environment_secrets(environment):
        text = text.replace(environment[name], "…")
    return strip_credentials(text)


def _environment_secrets(environment: Mapping[str, str]) -> list[str]:
    """Names of variables that hold secrets long enough to be told from other words."""
    found = (name for name, value in environment.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST)
    return [name for name in found if not os.path.exists(environment[name])]  # the path of a secret is none
