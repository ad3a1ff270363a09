"""The chart page of a run, in a real browser: what a person sees."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_EVERY_CHART = {
    *(f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens", "targets", "contexts")),
    *(f"validation/{name}" for name in ("nll", "gene_mean_nll", "difference")),
    *(
        f"speed/{name}"
        for name in (
            "step_seconds",
            "data_seconds",
            "communication_seconds",
            "imbalance_seconds",
            "checkpoint_seconds",
            "attempt",
        )
    ),
    *(f"speed/{name}_per_second" for name in ("tokens", "contexts", "flops")),
    *(f"cost/{name}" for name in ("n", "M", "n_times_m", "attention_flops", "total_flops", "attention_share")),
}


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.representative
def test_the_page_of_a_run_draws_every_chart_and_its_restarts(
    make_run: Callable[..., Path], database: str, tmp_path: Path
) -> None:
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        reason = "no Chromium on this machine: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    run_dir = make_run((1, 130, None), (101, 220, "requeue"), (221, 300, "finished"))
    picture = tmp_path / "page.png"
    command = [sys.executable, "-m", "tools.screenshot", str(run_dir), str(picture), "--height=3100"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert set(shown["charts"]) == _EVERY_CHART
    assert len(shown["charts"]) == len(_EVERY_CHART)
    # The view for model training, not the one for traces of a language model.
    assert "Evaluation runs" not in shown["text"]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 50_000  # not a blank page
