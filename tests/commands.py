"""Commands in the process of the test, for all tests but those of the process itself: imports take it seconds."""

from typer.testing import CliRunner, Result

from cctrain.cli import app

NO_RANK = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID"))


def cctrain(*arguments: object, code: int = 0) -> Result:
    """`cctrain ARGUMENTS`, which ends with this exit code."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={**NO_RANK, "CUDA_VISIBLE_DEVICES": ""})
    assert done.exit_code == code, done.output
    return done
