"""`cctrain scaling` as a user starts it: real points, killed and resumed, refusals; and processes that fail."""

import json
from pathlib import Path

import pytest

from cctrain.apply.scaling import command
from cctrain.apply.scaling.command import numbers
from cctrain.apply.scaling.measure import medians
from cctrain.apply.scaling.points import CRISS_CROSS, Point
from cctrain.apply.scaling.sweep import measure_point, sweep
from cctrain.apply.scaling.work import Setting
from cctrain.cli import app
from cctrain.config import MemoryConfig, ModelConfig
from cctrain.errors import UsageError
from tests.apply.scaling.sweeps import timings


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        app(["scaling", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.fixture
def arguments(tmp_path: Path, database: str) -> list[str]:
    config = tmp_path / "tiny.yaml"
    config.write_text(f"model: {{width: 16, depth: 2, heads: 2, latents: 4}}\ntracking: {{uri: '{database}'}}\n")
    return [str(config), f"run.dir={tmp_path / 'runs' / 'tiny'}", "--latents=4,8", "--rounds=2", "--repeats=2"]


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points take no time, nor do pictures."""
    lawful = lambda point, *_: timings(point)  # noqa: E731
    monkeypatch.setattr(command, "sweep", lambda folder, plan, rows: sweep(folder, plan, rows, lawful))
    monkeypatch.setattr("cctrain.apply.scaling.figures.draw_figures", lambda *_: [])


@pytest.mark.slow
@pytest.mark.processes
def test_a_small_sweep_is_measured_and_its_second_call_measures_nothing(arguments, tmp_path, capfd):
    arguments += ["--lengths=64", "--fit-from=1", "--json"]
    assert run(*arguments) == 0
    first = json.loads(capfd.readouterr().out)
    folder = tmp_path / "runs" / "tiny-scaling"
    points = (folder / "points.jsonl").read_bytes()
    assert len(first["points"]) == 4
    assert len(points.splitlines()) == 8, "a line of each point in each round"
    assert all(0 < point["attention_share_of_time"] < 1 and point["memory_bytes"] >= 0 for point in first["points"])
    assert first["fits"]["attention"]["n·M"]["points"] == 2
    assert len(first["mlflow"]["children"]) == 4
    for name in ("report.md", "points.csv", "fits.json", "mlflow.json", "figures/cost.png", "figures/collapse.svg"):
        assert (folder / name).stat().st_size, name
    assert run(*arguments) == 0
    assert json.loads(capfd.readouterr().out) == first
    assert (folder / "points.jsonl").read_bytes() == points


def test_a_sweep_prints_its_exponents_and_where_the_report_is(arguments, tmp_path, capfd, caplog, quick_machine):
    assert run(*arguments, "--lengths=4096,8192,16384", f"--out={tmp_path / 'other'}") == 0
    shown = capfd.readouterr().out
    assert "attention, exponent of n·M: 1.000 (1.000 to 1.000)" in shown
    assert f"report: {tmp_path / 'other' / 'report.md'}" in shown
    assert "% of the time" in caplog.text


def test_the_report_has_the_commands_that_made_its_points(arguments, tmp_path, quick_machine):
    folder = tmp_path / "runs" / "tiny-scaling"
    for options in (["--lengths=4096,8192"], ["--lengths=16384", "--budget=1200"]):
        assert run(*arguments, *options) == 0
    said = f"`cctrain scaling {arguments[0]} {arguments[1]} --lengths="
    report = (folder / "report.md").read_text()
    assert f"- 8: {said}4096,8192 --latents=4,8 --rounds=2 --repeats=2`\n" in report
    assert f"- 4: {said}16384 --latents=4,8 --budget=1200.0 --rounds=2 --repeats=2`\n" in report


def test_other_settings_in_the_same_folder_are_refused(arguments, capfd, quick_machine):
    assert run(*arguments, "--lengths=32") == 0
    assert run(*arguments, "--lengths=32", "model.depth=3") == 2
    assert "model.depth: 2 → 3" in capfd.readouterr().err


def test_a_tracking_store_that_fails_is_a_warning_and_the_points_are_kept(arguments, tmp_path, caplog, quick_machine):
    nowhere = tmp_path / "file"
    nowhere.write_text("no folder")
    assert run(*arguments, "--lengths=32", f"tracking.uri=sqlite:///{nowhere}/mlflow.db") == 0
    assert "MLflow tracking failed" in caplog.text
    assert len((tmp_path / "runs" / "tiny-scaling" / "points.jsonl").read_text().splitlines()) == 8


def test_a_dry_run_shows_points_and_time_and_writes_nothing(arguments, tmp_path, capfd):
    assert run(*arguments, "--lengths=1024", "--context=1,2", "--dry-run") == 0
    shown = capfd.readouterr().out
    assert "criss-cross, M = 8, 2 context ranks, n = 1024" in shown
    assert "6 of 6 points to measure" in shown
    assert not (tmp_path / "runs" / "tiny-scaling").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.attention=dense", "set model.attention=criss_cross"),
        ("training.precision=fp16", "choose fp32 or bf16"),
        ("--lengths=1k", "--lengths '1k' is no list of numbers"),
        ("tracking.uri=folder", "MLflow's file store"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(arguments, tmp_path, capfd, change, said):
    assert run(*arguments, change) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "runs" / "tiny-scaling").exists()


def test_the_ranks_that_the_configuration_shares_contexts_among_are_measured_beside_one(arguments, capfd):
    assert run(*arguments, "--lengths=1024", "parallel.context=2", "--dry-run") == 0
    shown = capfd.readouterr().out
    assert "criss-cross, M = 4, n = 1024" in shown
    assert "criss-cross, M = 4, 2 context ranks, n = 1024" in shown


def test_numbers_stand_between_commas_or_spaces():
    assert numbers("--lengths", "1024, 4096 65536") == [1024, 4096, 65536]
    for text in ("", "0", "-4", "a"):
        with pytest.raises(UsageError, match="--lengths"):
            numbers("--lengths", text)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_context_is_measured_on_as_many_ranks_as_share_it(num_ranks):
    model, setting = ModelConfig(width=16, depth=2, heads=2, latents=4), Setting("cpu", "fp32", 50, MemoryConfig())
    point = Point(CRISS_CROSS, model, 41, num_ranks)
    found = measure_point(point, setting, 2)
    assert len(found["steps"]) == len(found["attention_of_a_layer"]) == 2
    assert found["flops_of_matrix_products"] == num_ranks * 2 * 2048**3
    assert medians(found, model.depth)["attention_seconds"] > 0
