"""The errors a user can cause or meet, each with the exit code that the command line ends with.

A message says what is wrong, where (file, key, row), and what to do. Anything else that is raised is a
defect of cctrain and ends with a traceback.
"""


class CctrainError(Exception):
    exit_code = 1


class UsageError(CctrainError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class DataError(CctrainError):
    """A file of cells or a token store is not what it should be."""

    exit_code = 3


class CheckpointError(CctrainError):
    """Saved weights are missing, damaged or do not fit."""

    exit_code = 4


class TrainingError(CctrainError):
    """Training diverged, hung or lost a process."""

    exit_code = 5
