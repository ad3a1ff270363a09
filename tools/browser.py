"""A page of headless Chromium, driven by Playwright.

The Chromium is the machine's own (Debian: apt-get install chromium); Playwright brings the driver alone and downloads
no browser.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
NO_CHROMIUM = 3
_FLAGS = ["--disable-gpu", "--disable-sync"]  # beside those that Playwright gives every headless Chromium
# On a first visit MLflow opens its assistant by itself.
_PREPARE = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');
"""


class ChromiumMissingError(Exception):
    """There is no Chromium on this machine."""


def find_chromium() -> str:
    """The path of the first that is there; raises ChromiumMissingError."""
    found = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found is None:
        raise ChromiumMissingError(
            f"no Chromium here (looked for {', '.join(CHROMIUM_NAMES)}): on Debian, apt-get install chromium"
        )
    return found


@contextmanager
def open_page(width: int = 1600, height: int = 1200, seconds: float = 120.0) -> Iterator[Page]:
    """An empty page; whatever is waited for in it, is waited for so many seconds at most."""
    chromium = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS)
        try:
            context = browser.new_context(viewport={"width": width, "height": height})
            context.set_default_timeout(1000 * seconds)
            context.add_init_script(_PREPARE)
            yield context.new_page()
        finally:
            browser.close()
