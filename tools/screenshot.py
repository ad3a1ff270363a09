"""Photograph MLflow's pages as a person sees them.

    python -m tools.screenshot charts RUN OUT.png [--only 'train/|cost/']
    python -m tools.screenshot compare RUN RUN OUT.png
    python -m tools.screenshot sweep FOLDER OUT.png

Serves what is tracked, opens its page in headless Chromium, waits until what it shows is there, writes the picture and
prints one JSON object that says what was seen. Exit code 3 if there is no Chromium (Debian: apt-get install chromium),
1 if it is not seen in time.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page as BrowserPage
from playwright.sync_api import TimeoutError as NotSeenError

from cctrain.tracking.ui import Page, find_page, run_page, running_server
from tools.browser import NO_CHROMIUM, ChromiumMissingError, open_page
from tools.mlflow_pages import (
    ALL_CHARTS,
    child_runs,
    comparison_address,
    search_charts,
    unfold_description,
    wait_for_charts,
    wait_for_comparison,
    wait_for_figure,
)

NOT_SEEN = 1
HEIGHTS = {"charts": 2650, "compare": 1150, "sweep": 900}
FIGURE = "figures/cost.png"
_BUTTONS_OVER_A_CHART = ".modebar-container { visibility: hidden !important; }"  # which a mouse brings up


def main() -> int:
    options = parse_options()
    page = find_page(options.run)
    try:
        with open_page(options.width, options.height, options.seconds) as browser, running_server(page) as (server, _):
            seen = options.photograph(browser, server, page, options)
    except ChromiumMissingError as error:
        print(error, file=sys.stderr)
        return NO_CHROMIUM
    except NotSeenError as error:
        print(f"not seen within {options.seconds:.0f} s: {error}", file=sys.stderr)
        return NOT_SEEN
    print(json.dumps(seen, ensure_ascii=False))
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, photograph: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help)
        command.add_argument("run", type=Path, help="folder of the run" if name != "sweep" else "folder of the sweep")
        command.set_defaults(photograph=photograph)
        command.add_argument("--width", type=int, default=1600)
        command.add_argument("--height", type=int, default=HEIGHTS[name])
        command.add_argument("--seconds", type=float, default=120.0, help="patience with each thing to be seen")
        return command

    charts = add("charts", photograph_charts, "the charts of a run")
    charts.add_argument("--only", default="", help="charts whose metric matches this regular expression")
    compare = add("compare", photograph_comparison, "two runs side by side")
    compare.add_argument("other", type=Path, help="folder of the other run")
    add("sweep", photograph_sweep, "a scaling sweep: what its page says, and its figures")
    for command in commands.choices.values():
        command.add_argument("out", type=Path, help="picture to write, a .png")
    return parser.parse_args()


def photograph_charts(browser: BrowserPage, server: str, page: Page, options: argparse.Namespace) -> dict[str, Any]:
    if not options.only:
        browser.set_viewport_size({"width": options.width, "height": max(options.height, ALL_CHARTS)})
    browser.goto(page.address(server))
    charts = search_charts(browser, options.only) if options.only else wait_for_charts(browser)
    options.out.write_bytes(picture(browser))
    return {"address": browser.url, "charts": charts}


def photograph_comparison(browser: BrowserPage, server: str, page: Page, options: argparse.Namespace) -> dict[str, Any]:
    other = find_page(options.other, page.uri)
    pages = [page, other]
    experiments = list(dict.fromkeys(p.experiment_id for p in pages))
    browser.goto(comparison_address(server, experiments, [p.run_id for p in pages]))
    names, metrics = wait_for_comparison(browser)
    options.out.write_bytes(picture(browser))
    return {"address": browser.url, "runs": names, "metrics": metrics}


def photograph_sweep(browser: BrowserPage, server: str, page: Page, options: argparse.Namespace) -> dict[str, Any]:
    """Two pages of MLflow, one above the other."""
    browser.goto(run_page(server, page.experiment_id, page.run_id, "overview"))
    child_runs(browser).first.wait_for()
    children = child_runs(browser).all_inner_texts()
    unfold_description(browser)
    words = picture(browser)
    browser.goto(run_page(server, page.experiment_id, page.run_id, f"artifacts/{FIGURE}"))
    width = wait_for_figure(browser, FIGURE)
    browser.get_by_text("Path: ").evaluate("path => path.parentElement.style.visibility = 'hidden'")  # of this machine
    # Of 256 colours, so that a README can show it.
    one_above_the_other([words, picture(browser)]).quantize(256).save(options.out, optimize=True)
    return {"address": browser.url, "children": children, "figure": FIGURE, "figure_width": width}


def picture(browser: BrowserPage) -> bytes:
    browser.add_style_tag(content=_BUTTONS_OVER_A_CHART)
    browser.mouse.move(0, 0)
    return browser.screenshot(animations="disabled")


def one_above_the_other(pictures: list[bytes]) -> Image.Image:
    parts = [Image.open(io.BytesIO(content)).convert("RGB") for content in pictures]
    whole = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)))
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


if __name__ == "__main__":
    sys.exit(main())
