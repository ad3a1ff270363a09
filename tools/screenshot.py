"""Photograph the chart page of a run as a person sees it: python -m tools.screenshot RUN OUT.png

Serves the run through `cctrain.tracking.ui`, opens its page in headless Chromium, waits until every chart is
drawn, writes the picture and prints one JSON object: the address, the metrics of the charts, the page's text.
Exit code 3 if there is no Chromium (Debian: apt-get install chromium), 1 if the charts do not appear.

Chromium is driven over a pipe by the DevTools protocol, so nothing needs to be installed for Python, no port
is opened, and the page is waited for instead of a number of seconds.
"""

import argparse
import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cctrain.tracking.ui import find_page, running_server

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
NO_CHROMIUM = 3
_FLAGS = [
    "--headless=new",
    "--no-sandbox",  # there is none for root, as in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]

Call = Callable[..., Any]

# Before the page's own scripts: what opens by itself on a first visit stays closed, and the buttons over a
# chart, which a mouse brings up, stay hidden.
_PREPARE = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
document.addEventListener('DOMContentLoaded', () => {
  const style = document.createElement('style');
  style.textContent = '.modebar-container { display: none !important; }';
  document.head.append(style);
});
"""

# A chart of the page is a plotly graph; the legend below it ends with the metric's whole name in brackets.
_CHARTS = """
[...document.querySelectorAll('.js-plotly-plot')].map(graph => {
  let card = graph;
  while (card && !/ \\([^()]+\\)\\s*$/.test(card.innerText)) card = card.parentElement;
  return {
    drawn: [...graph.querySelectorAll('.trace path')].some(path => (path.getAttribute('d') || '').length > 1),
    metric: card ? card.innerText.trim().match(/ \\(([^()]+)\\)$/)[1] : '',
  };
})
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("out", type=Path, help="picture to write, a .png")
    parser.add_argument("--charts", default="", help="only charts whose metric matches this regular expression")
    parser.add_argument("--width", type=int, default=1600)
    parser.add_argument("--height", type=int, default=2650)
    parser.add_argument("--seconds", type=float, default=120.0, help="patience with the page")
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if chromium is None:
        print(f"no Chromium here (looked for {', '.join(CHROMIUM_NAMES)})", file=sys.stderr)
        return NO_CHROMIUM

    page = find_page(options.run)
    with running_server(page) as (server, _), browser(chromium) as call:
        address = page.address(server)
        call(
            "Emulation.setDeviceMetricsOverride",
            width=options.width,
            height=options.height,
            deviceScaleFactor=1,
            mobile=False,
        )
        call("Page.addScriptToEvaluateOnNewDocument", source=_PREPARE)
        call("Page.navigate", url=address)
        if options.charts:
            wait_for_charts(call, options.seconds)
            evaluate(call, "document.querySelector('input[placeholder=\"Search metric charts\"]').focus()")
            call("Input.insertText", text=options.charts)
        charts = wait_for_charts(call, options.seconds)
        text = evaluate(call, "document.body.innerText")
        picture = call("Page.captureScreenshot", format="png")["data"]
    options.out.write_bytes(base64.b64decode(picture))
    print(json.dumps({"address": address, "charts": charts, "text": text}, ensure_ascii=False))
    return 0 if charts else 1


def wait_for_charts(call: Call, seconds: float) -> list[str]:
    """The metrics whose charts are in sight, once all are drawn and no more have come for two seconds."""
    deadline = time.monotonic() + seconds
    metrics: list[str] = []
    since = time.monotonic()
    while time.monotonic() < deadline:
        found = evaluate(call, _CHARTS) or []
        now = [chart["metric"] for chart in found if chart["drawn"]]
        if now != metrics or len(now) < len(found) or not now:
            metrics, since = now, time.monotonic()
        elif time.monotonic() - since > 2.0:
            return metrics
        time.sleep(0.3)
    return metrics


def evaluate(call: Call, expression: str) -> Any:
    """The value of a JavaScript expression in the page."""
    return call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")


@contextmanager
def browser(chromium: str) -> Iterator[Call]:
    """A Chromium with one empty page; yields `call(method, **parameters)` of the DevTools protocol."""
    to_browser_read, to_browser = os.pipe()
    from_browser, from_browser_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="cctrain-chromium-", ignore_cleanup_errors=True) as profile:
        # The protocol lives on descriptors 3 and 4 of the browser; a shell puts ours there.
        command = [chromium, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" 3<&{to_browser_read} 4>&{from_browser_write}', "sh", *command],
            pass_fds=(to_browser_read, from_browser_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser_read)
        os.close(from_browser_write)
        with open(to_browser, "wb", buffering=0) as requests, open(from_browser, "rb") as answers:
            try:
                yield _attach(requests, answers)
            finally:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _attach(requests: Any, answers: Any) -> Call:
    numbers = itertools.count(1)
    session: dict[str, str] = {}

    def call(method: str, **parameters: Any) -> Any:
        number = next(numbers)
        message = {"id": number, "method": method, "params": parameters, **session}
        requests.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(_next_message(answers))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    targets = call("Target.getTargets")["targetInfos"]
    target = next(item["targetId"] for item in targets if item["type"] == "page")
    session["sessionId"] = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    call("Page.enable")
    return call


def _next_message(answers: Any) -> bytes:
    message = bytearray()
    while (byte := answers.read(1)) != b"\0":
        if not byte:
            raise RuntimeError("Chromium ended before it answered")
        message += byte
    return bytes(message)


if __name__ == "__main__":
    sys.exit(main())
