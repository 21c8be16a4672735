"""What others wrote is text on the page, never markup; the browser tests of each tab try it with a whole page."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import gradio as gr
import pytest

from biasdpo.errors import ConfigError
from biasdpo.jobs import store
from biasdpo.ui import components, jobs
from biasdpo.workspace import Workspace
from tests.run_folders import write_run

EVIL = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a link](https://example.org)",
    "![](https://example.org/x.png)",
    "https://example.org/tracked",
    "# not a heading",
    "$$x^2$$ **bold** `code` &lt;b&gt;",
)


class Elements(HTMLParser):
    """The elements of some HTML, but for paragraphs, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if tag not in ("p", "br"):
            self.found.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("evil", EVIL)
def test_markdown_shows_a_text_as_it_is(evil):
    import markdown_it

    elements = Elements()
    elements.feed(markdown_it.MarkdownIt("commonmark", {"html": True}).render(components.escape(evil)))
    assert elements.found == []
    assert elements.text.strip() == evil


@pytest.mark.parametrize("evil", EVIL)
def test_an_error_message_is_text(evil):
    def refuse() -> None:
        raise ConfigError(f"No model {evil}: choose another")

    with pytest.raises(gr.Error) as caught:
        components.handles(refuse)()
    elements = Elements()
    elements.feed(caught.value.message)
    assert elements.found == []
    assert elements.text == f"No model {evil}: choose another"


def test_a_failed_run_says_why_as_text(tmp_path: Path):
    write_run(tmp_path, "first", "failed", status={"error": f"The disk is full {EVIL[0]}"})
    head = jobs.head(store.find_job("first", Workspace(tmp_path), "train"))
    assert "The disk is full" in head
    assert "<script>" not in head
