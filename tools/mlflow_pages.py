"""The pages of the MLflow UI, for a browser: their addresses, and what they show, waited for.

What is looked for are roles, texts and test ids; where MLflow 3.17 has none, a class of Plotly, which draws its charts.
"""

import json
import re

from playwright.sync_api import Locator, Page, expect
from playwright.sync_api import TimeoutError as NotSeenError

from cctrain.tracking.ui import MODEL_TRAINING

# A chart is a Plotly graph; the legend below it ends with the metric's whole name in brackets. Charts come late, and
# are drawn when they are in sight; the heading of each section tells how many it has.
_CHARTS = """
() => {
  const graphs = [...document.querySelectorAll('.js-plotly-plot')];
  const metrics = graphs.filter(graph =>
    [...graph.querySelectorAll('.trace path')].some(path => (path.getAttribute('d') || '').length > 1)
  ).map(graph => {
    let card = graph;
    while (card && !/ \\([^()]+\\)\\s*$/.test(card.innerText)) card = card.parentElement;
    return card ? card.innerText.trim().match(/ \\(([^()]+)\\)$/)[1] : '';
  });
  const sections = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-section-header"]')];
  const wanted = sections.reduce((sum, section) => sum + Number(section.innerText.match(/\\((\\d+)\\)/)?.[1]), 0);
  return wanted > 0 && metrics.length === wanted ? metrics : null;
}
"""
ALL_CHARTS = 5000  # pixels: high enough for all charts of a run, for MLflow draws what is in sight
_IS_DRAWN = "image => image.complete && image.naturalWidth > 0"


def runs_address(server: str, experiment: str) -> str:
    """The list of an experiment's runs."""
    return f"{server}/#/experiments/{experiment}/runs?{MODEL_TRAINING}"


def comparison_address(server: str, experiments: list[str], runs: list[str]) -> str:
    return f"{server}/#/compare-runs?runs={json.dumps(runs)}&experiments={json.dumps(experiments)}&{MODEL_TRAINING}"


def wait_for_charts(page: Page) -> list[str]:
    """The metrics of all charts of a run's page, once every one is drawn. The page must be high enough for them."""
    return page.wait_for_function(_CHARTS).json_value()


def search_charts(page: Page, pattern: str) -> list[str]:
    """Leave only the charts whose metric matches, and wait for these."""
    page.get_by_test_id("experiment-view-compare-runs-section-header").first.wait_for()
    page.get_by_placeholder("Search metric charts").fill(pattern)
    page.wait_for_function(
        f"pattern => ({_CHARTS})()?.every(metric => new RegExp(pattern, 'i').test(metric))", arg=pattern
    )
    return [metric for metric in wait_for_charts(page) if re.search(pattern, metric)]


def unfold_description(page: Page) -> None:
    """On the overview of a run; MLflow shows the first lines of a long one."""
    button = page.get_by_role("button", name="Expand description")
    try:
        button.wait_for(timeout=20_000)
    except NotSeenError:  # MLflow 3.17 left it out twice, on a busy machine
        page.reload()
    button.click()
    expect(page.get_by_role("button", name="Collapse description")).to_be_visible()


def child_runs(page: Page) -> Locator:
    """On the overview of a parent run, the links to its children."""
    return page.get_by_test_id("key-value-Child runs").get_by_role("link")


def row_of_run(page: Page, name: str) -> Locator:
    """In the list of runs; the button in it shows and hides the run's children."""
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))


def wait_for_figure(page: Page, path: str) -> int:
    """The width in pixels of an image among a run's artifacts, once it is drawn."""
    image = page.get_by_role("img", name=path)
    expect(image).to_be_visible()
    page.wait_for_function(_IS_DRAWN, arg=image.element_handle())
    return image.evaluate("image => image.naturalWidth")


def wait_for_comparison(page: Page) -> tuple[list[str], list[str]]:
    """The names of the compared runs, and the values of the first metrics, those of `cost/`; parameters that are the
    same in all runs are folded away.

    Nothing is scrolled: in MLflow 3.17 the metrics' names do not always follow their values.
    """
    page.get_by_role("button", name="Visualizations").click()
    page.get_by_role("switch", name="Parameters").click()
    expect(page.get_by_role("link", name="cost/n", exact=True)).to_be_visible()
    names = page.get_by_role("row", name="Run Name:").get_by_role("cell").all_inner_texts()
    return names, page.get_by_role("grid").last.inner_text().split()
