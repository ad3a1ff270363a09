"""A plausible run without a trainer: directory, configuration, journal."""

import math
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cctrain.config import Config, to_yaml
from cctrain.tracking.journal import Journal

Attempt = tuple[int, int, str | None]  # first step, last step, the stop line's status or None for a crash


@pytest.fixture(autouse=True)
def _outside_slurm_in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not list(folder.iterdir()), "something was written to the current directory"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes `tmp_path/runs/NAME` with the given attempts; called again, adds attempts to the same run."""

    def make(*attempts: Attempt, name: str = "cell", uri: str | None = None, rate: float = 1e-3) -> Path:
        return write_run(tmp_path / "runs" / name, *attempts, uri=uri, rate=rate)

    return make


@pytest.fixture
def write_attempt() -> Callable[..., None]:
    """Appends one attempt to a journal: run directory, first step, last step, status or None for a crash."""
    return _write_attempt


def write_run(run_dir: Path, *attempts: Attempt, uri: str | None = None, rate: float = 1e-3) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.data.store = "stores/pbmc3k"
    config.training.steps = max((last for _, last, _ in attempts), default=100)
    config.training.learning_rate = rate
    config.tracking.uri = uri
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    for attempt in attempts:
        _write_attempt(run_dir, *attempt, rate=rate)
    return run_dir


def _write_attempt(run_dir: Path, first: int, last: int, status: str | None, rate: float = 1e-3) -> None:
    """Lines such as the trainer writes; values depend on the step and slightly on the attempt, as they do on
    another number of ranks.
    """
    journal = Journal(run_dir)
    shift = 1e-6 * journal.attempt
    journal.write(
        "start",
        first - 1,
        run=str(uuid.uuid5(uuid.NAMESPACE_OID, run_dir.name)),
        commit="0123456789abcdef0123456789abcdef01234567",
        store="sha256:feed",
        world_size=2 * journal.attempt,
        zero_stage=1,
        precision="fp32",
    )
    for step in range(first, last + 1):
        n = 2000 + 37 * (step % 11)
        journal.write(
            "step",
            step,
            loss=0.7 + 1.6 * math.exp(-step / 60) + 0.02 * math.sin(3 * step) + shift,
            learning_rate=rate * min(step / 100, 1),
            grad_norm=0.5 + 2 * math.exp(-step / 40) + 0.1 * math.cos(5 * step),
            tokens=16 * n,
            contexts=16,
            targets=9000 + step % 7,
            step_seconds=0.31 + 0.01 * math.sin(step),
            data_seconds=0.004,
            communication_seconds=0.02,
            imbalance_seconds=0.01,
            samples=f"{step:064x}",
            **({"checkpoint_seconds": 0.75} if step % 50 == 1 and step > first else {}),
            **{
                "cost/n": n,
                "cost/M": 64,
                "cost/n_times_M": n * 64,
                "cost/attention_flops": 8.0 * n * 64 * 256 * 6,
                "cost/total_flops": 8.0 * n * 64 * 256 * 6 * 14,
                "cost/attention_share": 1 / 14,
            },
        )
        if step % 25 == 0:
            nll = 0.72 + 1.5 * math.exp(-step / 60) + shift
            journal.write("evaluate", step, nll=nll, gene_mean_nll=0.9, difference=nll - 0.9)
        if step % 50 == 0:
            journal.write("checkpoint", step, path=f"checkpoints/step-{step:08d}", bytes=123456, seconds=0.75)
    if status is not None:
        journal.write("stop", last, status=status, reason="time_limit" if status == "requeue" else None)
    journal.close()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
