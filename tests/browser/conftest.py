"""A real Chromium before a real app with the embedded model and a random adapter.

Skipped where there is no Chromium; with BIASDPO_REQUIRE_BROWSER=1 that is a failure instead.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from tests.app_process import running_app
from tests.lora_factory import write_lora

FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    "--disable-gpu",
]
SHORT = {"adapter": "demo", "temperature": "0", "max_new_tokens": "16"}  # greedy: what is written does not change

ON_THE_WAY_OUT = ("AbortError: signal is aborted", "Connection errored out")


def chromium_path() -> str | None:
    """$BIASDPO_CHROMIUM, else the system's; None for the one that `playwright install chromium` brings."""
    named = os.environ.get("BIASDPO_CHROMIUM")
    return named or next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


@pytest.fixture(scope="session")
def browser():
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        _without_browser("playwright is not installed")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        except Error as exc:
            _without_browser(f"Chromium could not be started: {str(exc).splitlines()[0]}")
        yield browser
        browser.close()


def _without_browser(why: str) -> None:
    if os.environ.get("BIASDPO_REQUIRE_BROWSER") == "1":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one finished run, "demo", whose adapter is random and brings measurements."""
    root = tmp_path_factory.mktemp("workspace")
    folder = write_lora(root / "runs" / "demo" / "adapter", base_model="smollm2", size=0.05)
    provenance = {
        "model": "smollm2",
        "run_id": "demo",
        "dataset_sha256": "3fa9c1d2" * 8,
        "metrics": {"reward_accuracy": {"before": 0.5, "after": 0.97}, "not known to the page": 3},
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return root


@pytest.fixture(scope="session")
def app(browser, workspace: Path) -> Iterator[str]:  # noqa: ARG001 (no browser, no app)
    with running_app(workspace, "--model", "smollm2") as url:
        yield url


class Visitor:
    """One visitor's tab, with the words of the page's own labels."""

    def __init__(self, page, app: str) -> None:
        self.page = page
        self.app = app
        self.trouble: list[str] = []
        page.set_default_timeout(20_000)
        page.on("console", lambda m: self.trouble.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: self.trouble.append(f"script: {e}"))
        page.on("request", self._look_at)

    def _look_at(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != urlsplit(self.app).netloc:
            self.trouble.append(f"request to another host: {request.url}")

    def open(self, **query: str) -> Visitor:
        self.page.goto(self.app + "?" + urlencode(SHORT | query))
        self.page.wait_for_selector("#generate")
        return self

    def open_ready(self, **query: str) -> Visitor:
        self.open(**query)
        self.page.wait_for_selector(".bd-proven", timeout=60_000)
        return self

    def reload(self) -> None:
        """Leave the page and open it again; what Gradio's own client says of a stream cut on its way out is no trouble."""
        self.page.reload()
        self.page.wait_for_selector("#generate")
        self.trouble = [t for t in self.trouble if not any(said in t for said in ON_THE_WAY_OUT)]

    def generate(self, prompt: str) -> None:
        self.page.fill("#prompt textarea", prompt)
        self.page.click("#generate")

    def wait_written(self) -> None:
        """Until both sides have said why they stopped."""
        self.page.wait_for_selector("#base-status:has-text('stopped')", timeout=60_000)
        self.page.wait_for_function("() => !document.querySelector('.bd-busy')", timeout=60_000)

    def wait_writing(self) -> None:
        """Until the first token is there: the page says "writing" before the engine does, and another may overtake."""
        self.page.wait_for_selector("#base-status:has-text('writing')", timeout=60_000)
        self.page.wait_for_function("() => document.querySelector('#base-text textarea').value", timeout=60_000)

    def text(self, side: str) -> str:
        return self.page.input_value(f"#{side}-text textarea")

    def status(self, side: str) -> str:
        return self.page.inner_text(f"#{side}-status").replace("\n", " ")

    def value(self, element: str) -> str:
        return self.page.input_value(f"#{element} input")

    def set_number(self, element: str, value: str) -> None:
        field = self.page.locator(f"#{element} input[type=number]")
        field.fill(value)
        field.press("Tab")

    def unfold(self, element: str) -> None:
        """Open an accordion. Gradio builds its fields only now, and writes their values a moment after they can be seen."""
        self.page.click(f"#{element} button.label-wrap")
        self.page.wait_for_timeout(300)


@pytest.fixture
def new_visitor(browser, app: str):
    """Make visitors, each with a browser profile of its own; afterwards none may have seen trouble."""
    made: list[Visitor] = []
    contexts = []

    def make(url: str = app, **options: object) -> Visitor:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        made.append(Visitor(context.new_page(), url))
        return made[-1]

    yield make
    trouble = [trouble for visitor in made for trouble in visitor.trouble]  # before closing, which aborts what is under way
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture
def visitor(new_visitor) -> Visitor:
    return new_visitor()
