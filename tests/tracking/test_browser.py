"""MLflow's own pages in a real browser: what one sees of runs, of a scaling sweep, and of two runs side by side."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from cctrain.apply.scaling.analysis import analyse
from cctrain.apply.scaling.command import write_results
from cctrain.apply.scaling.tracking import track
from cctrain.data.store.store import TokenStore
from cctrain.tracking.content import ATTEMPT_MARKER, metrics_of
from cctrain.tracking.journal import read_journal
from cctrain.tracking.projection import sync
from cctrain.tracking.ui import find_page, run_page, running_server
from tests.apply.scaling.sweeps import a_plan, rows_of, settings
from tests.trainer import CELL_YAML, SMALL
from tools.browser import ChromiumMissingError, find_chromium, open_page
from tools.journals import prolong, train
from tools.mlflow_pages import (
    ALL_CHARTS,
    child_runs,
    comparison_address,
    row_of_run,
    runs_address,
    unfold_description,
    wait_for_charts,
    wait_for_comparison,
    wait_for_figure,
)

pytestmark = [pytest.mark.slow, pytest.mark.browser]

SECONDS = 180.0
ROWS = rows_of(a_plan([4096, 8192], [32, 64]))


@dataclass(frozen=True)
class Served:
    """A server's address, the experiment, the MLflow runs in it by name, and what a training has charts of."""

    server: str
    experiment: str
    runs: dict[str, str]
    charts: set[str]

    def page(self, run: str, tab: str) -> str:
        return run_page(self.server, self.experiment, self.runs[run], tab)


@pytest.fixture(scope="module")
def chromium() -> str:
    try:
        return find_chromium()
    except ChromiumMissingError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def runs(chromium: str, empty_database: Path, tiny_store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two trainings, one of them restarted twice, and a sweep, all in its database."""
    trained, folder = (tmp_path_factory.mktemp("browser") / name for name in ("trained", "runs"))
    folder.mkdir()
    database = folder / "mlflow.db"
    shutil.copyfile(empty_database, database)
    for name, rate in (("cell", 1e-3), ("fast", 2e-3)):
        options = (f"data.store={tiny_store.path}", "training.steps=7", f"training.learning_rate={rate}")
        train(trained / name, CELL_YAML, *SMALL, *options)
    prolong(folder / "cell", trained / "cell", (1, 130, None), (101, 220, "requeue"), (221, 300, "finished"))
    prolong(folder / "fast", trained / "fast", (1, 98, "finished"))  # whose last step is the small one of an epoch
    sync([folder / "cell", folder / "fast"])
    sweep, found = folder / "cell-scaling", analyse(ROWS.values())
    sweep.mkdir()
    shutil.copyfile(folder / "cell" / "config.yaml", sweep / "config.yaml")
    artifacts = write_results(sweep, ROWS, found, settings())
    track(sweep, "sweep", ROWS, found, artifacts, f"sqlite:///{database}", "cctrain")
    return folder


@pytest.fixture(scope="module")
def served(runs: Path) -> Iterator[Served]:
    pages = {name: find_page(runs / name) for name in ("cell", "fast", "cell-scaling")}
    with running_server(pages["cell"]) as (server, _):
        run_ids = {name: str(page.run_id) for name, page in pages.items()}
        metrics = {name for line in read_journal(runs / "cell") for name in metrics_of(line)} | {ATTEMPT_MARKER}
        charts = {name for name in metrics if not name.startswith("system/")}  # which have a tab of their own
        yield Served(server, str(pages["cell"].experiment_id), run_ids, charts)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Page]:
    expect.set_options(timeout=1000 * SECONDS)
    with open_page(height=ALL_CHARTS, seconds=SECONDS) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """A tab of its own."""
    tab = browser.context.new_page()
    yield tab
    tab.close()


@pytest.mark.representative
def test_the_page_of_a_run_draws_all_that_a_training_writes_and_its_restarts(page: Page, served: Served) -> None:
    page.goto(served.page("cell", "model-metrics"))
    charts = wait_for_charts(page)
    assert sorted(charts) == sorted(served.charts)


def test_from_a_run_one_comes_to_the_list_of_runs_in_the_view_for_model_training(page: Page, served: Served) -> None:
    page.goto(served.page("cell", "model-metrics"))
    page.get_by_role("navigation").get_by_role("link", name="Runs", exact=True).click()
    expect(row_of_run(page, "fast")).to_be_visible()
    expect(page.get_by_role("button", name="New run")).to_be_visible()
    expect(page.get_by_text("Evaluation runs")).to_have_count(0)


def test_an_experiment_lists_its_runs_and_of_a_sweep_the_parent(page: Page, served: Served) -> None:
    page.goto(runs_address(served.server, served.experiment))
    for name in served.runs:
        expect(row_of_run(page, name)).to_be_visible()
    expect(row_of_run(page, next(iter(ROWS)))).to_have_count(0)


def test_in_the_list_of_runs_a_sweep_unfolds_to_its_points(page: Page, served: Served) -> None:
    page.goto(runs_address(served.server, served.experiment))
    row_of_run(page, "cell-scaling").get_by_role("button").click()
    for point in ROWS:
        expect(row_of_run(page, point)).to_be_visible()


def test_the_page_of_a_sweep_links_to_its_points_and_theirs_back(page: Page, served: Served) -> None:
    page.goto(served.page("cell-scaling", "overview"))
    expect(child_runs(page)).to_have_count(len(ROWS))
    assert set(child_runs(page).all_inner_texts()) == set(ROWS)
    child_runs(page).first.click()
    expect(page.get_by_test_id("key-value-Parent run").get_by_role("link", name="cell-scaling")).to_be_visible()


@pytest.mark.parametrize("figure", ["cost.png", "collapse.png", "memory.png", "time.svg"])
def test_the_figures_of_a_sweep_are_shown(page: Page, served: Served, figure: str) -> None:
    page.goto(served.page("cell-scaling", f"artifacts/figures/{figure}"))
    assert wait_for_figure(page, f"figures/{figure}") > 500


def test_two_runs_are_compared_by_name_and_metrics(page: Page, served: Served) -> None:
    import mlflow

    page.goto(comparison_address(served.server, [served.experiment], [served.runs["cell"], served.runs["fast"]]))
    names, metrics = wait_for_comparison(page)
    assert set(names) == {"cell", "fast"}
    client = mlflow.MlflowClient(served.server)
    for name in names:
        assert f"{client.get_run(served.runs[name]).data.metrics['cost/attention_flops']:.0f}" in metrics
    expect(page.get_by_role("row", name="training.learning_rate")).to_be_visible()


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("cell", ["criss-cross transformer (cost n·M)", "How to read it", "attempt 2 from step 100"]),
        ("cell-scaling", ["a scaling sweep", "attention, exponent of n·M", "How to read it"]),
    ],
)
def test_the_page_of_a_run_says_in_words_what_it_is_and_how_to_read_it(
    page: Page, served: Served, run: str, said: list[str]
) -> None:
    page.goto(served.page(run, "overview"))
    unfold_description(page)
    for words in said:
        expect(page.get_by_text(words).first).to_be_visible()


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["charts", "cell", "--only=validation/"], {"charts": ["validation/difference", "validation/nll"]}),
        (["compare", "cell", "fast"], {"runs": ["cell", "fast"]}),
        (["sweep", "cell-scaling"], {"figure": "figures/cost.png"}),
    ],
)
def test_a_page_is_photographed(runs: Path, tmp_path: Path, arguments: list[str], seen: dict[str, object]) -> None:
    picture, (command, *names) = tmp_path / "page.png", arguments
    options = [name for name in names if name.startswith("-")]
    folders = [str(runs / name) for name in names if name not in options]
    done = subprocess.run(
        [sys.executable, "-m", "tools.screenshot", command, *folders, str(picture), *options],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for key, value in seen.items():
        assert said[key] == value or set(value) <= set(said[key])
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 30_000  # not a blank page


def test_without_chromium_the_tools_say_so(runs: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.screenshot", "charts", str(runs / "cell"), str(tmp_path / "page.png")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 3
    assert "no Chromium here" in done.stderr
