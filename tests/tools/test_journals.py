from pathlib import Path

import pytest

from cctrain.tracking.journal import Journal, history, read_journal
from tools.journals import prolong


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A training of two steps with a look behind the second."""
    folder = tmp_path / "trained"
    journal = Journal(folder)
    journal.write("start", 0, run="a", world_size=4)
    journal.write("step", 1, loss=0.9, samples="one")
    journal.write("step", 2, loss=0.8, samples="two")
    journal.write("evaluate", 2, nll=0.7)
    journal.write("stop", 2, status="finished")
    journal.close()
    (folder / "config.yaml").write_text("model: {latents: 8}\n")
    return folder


def test_a_longer_run_repeats_the_steps_of_the_trained_one_in_turn(trained, tmp_path):
    prolong(tmp_path / "long", trained, (1, 5, "finished"))
    lines = [(line["event"], line["step"], line.get("loss")) for line in read_journal(tmp_path / "long")]
    assert lines == [
        ("start", 0, None),
        *[("step", 1, 0.9), ("step", 2, 0.8), ("evaluate", 2, None)],
        *[("step", 3, 0.9), ("step", 4, 0.8), ("evaluate", 4, None)],
        ("step", 5, 0.9),
        ("stop", 5, None),
    ]
    assert (tmp_path / "long" / "config.yaml").read_text() == "model: {latents: 8}\n"


def test_a_step_that_two_attempts_take_is_the_same_in_both(trained, tmp_path):
    prolong(tmp_path / "long", trained, (1, 4, None), (4, 6, "requeue"))
    lines = read_journal(tmp_path / "long")
    fourth = [(line["attempt"], line["samples"]) for line in lines if line["event"] == "step" and line["step"] == 4]
    assert fourth == [(1, "two"), (2, "two")]
    assert [line["step"] for line in history(lines) if line["event"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_two_runs_made_of_one_are_two(trained, tmp_path):
    for name in ("long", "longer"):
        prolong(tmp_path / name, trained, (1, 4, None))
    starts = [read_journal(tmp_path / name)[0] for name in ("long", "longer")]
    assert starts[0]["run"] != starts[1]["run"]
    assert [start["world_size"] for start in starts] == [4, 4]
