"""A real Chromium before a real app: one app a session (and a worker), with SmolLM2, over a workspace that all tests share.

Each test names its own runs, annotators and rows. Skipped where there is no Chromium; with BIASDPO_REQUIRE_BROWSER=1 that is a
failure instead. Every test also fails on a console error or a request to another host.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from biasdpo.ui.compare import TEXT
from biasdpo.workspace import Workspace, write_json
from tests.app_process import free_port, start_app, wait_for_page
from tests.evaluating import write_items
from tests.run_folders import write_run
from tests.run_line import kill_jobs

FLAGS = [
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    "--disable-gpu",
]
SHORT = {"adapter": "demo", "temperature": "0", "max_new_tokens": "16"}  # greedy: the same text every time
ITEMS = 1500  # of one benchmark, in so many batches that an evaluation can be stopped between two
SIZE = {"width": 1280, "height": 900}
TIMEOUT_MS = 60_000  # two tests may share two cores with a training
SLOW_MS = 240_000  # for a process that loads PyTorch first

# What is no fault: a stream cut by leaving the page, a validator's refusal (HTTP 422), and a fault of Gradio's list of options
# where its panel goes away within the 10 ms after a scroll.
NO_TROUBLE = (
    "AbortError: ",
    "Connection errored out",
    "the server responded with a status of 422",
    "Cannot read properties of null (reading 'getBoundingClientRect')",
)


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


@dataclass
class App:
    """An app that can be killed and started again at the same address."""

    workspace: Workspace
    flags: tuple[str, ...]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> App:
        root = self.workspace.root
        self.process = start_app(root, self.port, *self.flags, GRADIO_TEMP_DIR=str(root / "uploads"))
        wait_for_page(self.url, self.process, root / "app.log", 180)
        return self

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def app(browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:  # noqa: ARG001 (no browser, no app)
    """The shared app; its one run, "demo", has a random adapter of SmolLM2."""
    workspace = Workspace(tmp_path_factory.mktemp("workspace"))
    write_run(workspace.root, "demo")
    items = write_items(workspace.root / "items", ITEMS)
    app = App(workspace, ("--model", "smollm2", "--data-dir", str(items)), free_port()).start()
    yield app
    app.kill()
    kill_jobs(workspace)


@pytest.fixture(scope="session")
def tiny_run(app: App, tiny_llama_gguf: Path, tiny_llama_adapter: Path) -> str:
    """The id of a finished run of a tiny Llama, in the shared workspace."""
    folder = write_run(app.workspace.root, "tiny", model=str(tiny_llama_gguf))
    shutil.rmtree(folder.adapter)
    shutil.copytree(tiny_llama_adapter, folder.adapter)
    provenance = {"model": str(tiny_llama_gguf), "run_id": "tiny", "dataset_sha256": "3fa9c1d2" * 8}
    write_json(folder.adapter / "provenance.json", provenance)
    return "tiny"


class Visitor:
    """One visitor's page, by the names of what is on it."""

    def __init__(self, page, url: str) -> None:
        self.page = page
        self.url = url
        self.seen: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda m: self.seen.append(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda e: self.seen.append(f"script: {e}"))
        page.on("request", self._look_at)

    def _look_at(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != urlsplit(self.url).netloc:
            self.seen.append(f"request to another host: {request.url}")

    @property
    def trouble(self) -> list[str]:
        return [text for text in self.seen if not any(part in text for part in NO_TROUBLE)]

    def open(self, tab: str = "", **query: str) -> Visitor:
        self.page.goto(self.url + "?" + urlencode(SHORT | query))
        self.page.wait_for_selector("#generate", state="attached")
        if tab:
            self.tab(tab)
        return self

    def open_ready(self, **query: str) -> Visitor:
        """Open the Compare tab, wait for its model, and show the completions as plain text."""
        self.open(**query)
        self.wait_proof()
        if query.get("adapter") != "none":  # else there is one answer, as plain text
            self.view("Side by side")
        return self

    def view(self, name: str) -> None:
        self.page.get_by_role("radio", name=name).check()
        shown = {"Side by side": "#base-text", "Word differences": "#base-words", "Token scores": "#base-tokens"}
        self.wait(shown[name])

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_selector("#generate", state="attached")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).first.click()

    def wait(self, selector: str, text: str | re.Pattern[str] = "", *, slow: bool = False) -> None:
        """Until an element is there (with this text)."""
        found = self.page.locator(selector, has_text=text) if text else self.page.locator(selector)
        found.first.wait_for(timeout=SLOW_MS if slow else TIMEOUT_MS)

    def wait_gone(self, selector: str) -> None:
        self.page.wait_for_selector(selector, state="detached")

    def wait_proof(self, text: str = "") -> None:
        """Until a model is verified (whose chip has this text)."""
        self.wait("#proof", re.compile(f"Verified.*{re.escape(text)}"), slow=True)

    def generate(self, prompt: str) -> None:
        self.page.fill("#prompt textarea", prompt)
        self.run("#generate")

    def run(self, button: str) -> None:
        """Click what generates. `wait_written` then knows this pair from the one that was there."""
        self.page.evaluate(
            "() => { window.started = false; const stop = document.getElementById('stop');"
            " new MutationObserver(() => { window.started ||= !stop.disabled; }).observe(stop, {attributes: true}); }"
        )
        self.page.click(button)

    def wait_written(self) -> None:
        """Until the pair is finished, or what there is of a stopped one is shown."""
        self.page.wait_for_function("() => window.started && document.getElementById('stop').disabled")

    def wait_writing(self) -> None:
        """Until the first token is there: another visitor may have overtaken before it."""
        self.page.wait_for_function("() => window.started && document.querySelector('#base-text textarea')?.value")

    def text(self, side: str) -> str:
        """A completion, in the view "Side by side"; a pair that differs enough is first shown by its words."""
        from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

        box = self.page.locator(f"#{side}-text textarea")
        for _ in range(60):
            if not box.is_visible():
                self.page.locator("#view label", has_text=TEXT).click()
            with suppress(PlaywrightTimeoutError):  # the view changed meanwhile
                return box.input_value(timeout=1000)
        raise AssertionError(f"no text of {side}")

    def status(self, side: str) -> str:
        return self.page.inner_text(f"#{side}-status").replace("\n", " ")

    def field(self, element: str):
        return self.page.locator(f"#{element} :is(input, textarea)").first

    def value(self, element: str) -> str:
        return self.field(element).input_value()

    def set(self, element: str, value: str) -> None:
        """Fill a field and leave it."""
        field = self.page.locator(f"#{element} :is(input[type=number], input, textarea)").first
        field.fill(value)
        field.press("Tab")

    def choose(self, picker: str, value: str) -> None:
        """Type or paste into a dropdown. Enter takes it."""
        self.page.fill(f"#{picker} input", value)
        self.page.keyboard.press("Enter")

    def wait_value(self, element: str, value: str | None = None) -> None:
        """Until a field has this value; None: any. Gradio writes a field's value a moment after it can be seen, over what was
        typed meanwhile."""
        self.page.wait_for_function(
            "([id, value]) => { const is = document.querySelector(`#${id} :is(input, textarea)`)?.value;"
            " return value === null ? Boolean(is) : is === value; }",
            arg=[element, value],
        )

    def unfold(self, element: str) -> None:
        """Open an accordion. Gradio builds its fields only now, and writes their values a moment after they can be seen."""
        self.page.click(f"#{element} button.label-wrap")
        self.page.wait_for_timeout(300)

    def save(self, button: str) -> Path:
        """The file that a click downloads."""
        with self.page.expect_download() as download:
            self.page.click(button)
        return Path(download.value.path())


@pytest.fixture(scope="session")
def profiles() -> list[Any]:
    """Browser profiles that tests share, since an empty cache takes seconds to fill; their storage is emptied before each use."""
    return []


@pytest.fixture
def new_visitor(browser, app: App, profiles: list[Any]):
    """Make visitors, each with a browser profile of its own; afterwards none may have seen trouble."""
    made: list[Visitor] = []
    others = []

    def make(url: str = "", **options: object) -> Visitor:
        url = url or app.url
        if options:
            context = browser.new_context(**{"viewport": SIZE} | options)
            others.append(context)
        else:
            used = len(made) - len(others)
            if used == len(profiles):
                profiles.append(browser.new_context(viewport=SIZE))
            context = profiles[used]
        page = context.new_page()
        if not options:
            page.goto(url + "gradio_api/app_id")
            page.evaluate("() => localStorage.clear()")
        made.append(Visitor(page, url))
        return made[-1]

    yield make
    trouble = [trouble for visitor in made for trouble in visitor.trouble]  # before closing, which aborts what is under way
    for visitor in made:
        visitor.page.close()
    for context in others:
        context.close()
    assert trouble == []


@pytest.fixture
def visitor(new_visitor) -> Visitor:
    return new_visitor()
