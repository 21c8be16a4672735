"""The Export tab: a file is written, proven, downloaded, used and deleted; what fails is one line."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from biasdpo.jobs import store
from biasdpo.model_files import gguf_value, open_gguf
from biasdpo.workspace import sha256_of
from tests.browser.conftest import App, Visitor
from tests.run_line import kill_jobs


class Exporter:
    """A visitor on the Export tab."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.page = visitor.page

    def open(self) -> Exporter:
        self.visitor.open("Export", adapter="none")
        self.page.wait_for_selector("#gguf-start, #gguf-head .bd-run")
        return self

    def new(self, adapter: str, **fields: str) -> None:
        """Fill the panel for a new export."""
        if not self.page.locator("#gguf-start").is_visible():
            self.page.click("#gguf-new-button")
            self.page.wait_for_selector("#gguf-start")
        for picker, value in {"gguf-adapter": adapter, "gguf-model": fields.pop("model", "")}.items():
            if value:
                self.visitor.choose(picker, value)
                self.page.keyboard.press("Tab")
                self.page.wait_for_timeout(500)  # until the panel has answered: a list that is filled while open fails in Gradio
        for field, value in fields.items():
            self.page.click(f"#gguf-{field} label:has-text('{value}')")

    def wait_name(self, start: str) -> str:
        self.page.wait_for_function(
            "(start) => document.querySelector('#gguf-name :is(input, textarea)').value.startsWith(start)", arg=start
        )
        return self.visitor.value("gguf-name")

    def wait_state(self, name: str, state: str) -> None:
        self.visitor.wait(f"#gguf-head section[aria-label='Export {name}'] .bd-state-{state}", slow=True)


@pytest.fixture
def exporter(new_visitor, app: App) -> Iterator[Exporter]:
    """Afterwards no export is left, so that the next test finds the tab empty."""
    yield Exporter(new_visitor())
    kill_jobs(app.workspace)
    for export in store.list_jobs(app.workspace, "export"):
        store.delete_job(export.id, app.workspace, "export")


def test_a_run_is_exported_merged_proven_downloaded_used_and_deleted(exporter, app, tiny_run):
    visitor, page = exporter.visitor, exporter.page
    visitor.open(adapter="none", run=tiny_run)
    page.click("#train-export-gguf")
    visitor.wait("#gguf-plan", "About")
    assert visitor.value("gguf-adapter") == f"run {tiny_run}"
    assert visitor.value("gguf-model").startswith("tiny-llama")
    page.click("#gguf-format label:has-text('Merged')")
    page.wait_for_selector("#gguf-quantization label:has-text('Q8_0')")
    page.click("#gguf-quantization label:has-text('F32')")
    assert exporter.wait_name("tiny-F32") == "tiny-F32.gguf"
    page.click("#gguf-start")
    exporter.wait_state("tiny-F32.gguf", "finished")
    out = app.workspace.root / "exports" / "tiny-F32" / "tiny-F32.gguf"
    assert gguf_value(open_gguf(out), "general.architecture") == "llama"
    visitor.wait("#gguf-proof .bd-proof-good", "Equal to the original")
    assert sha256_of(visitor.save("#gguf-download")) == sha256_of(out)
    assert f"llama-server -m {out}" in page.inner_text("#gguf-elsewhere")
    visitor.unfold("gguf-modelfile")
    assert "FROM ./tiny-F32.gguf" in page.inner_text("#gguf-modelfile")
    page.click("#gguf-use")
    visitor.wait_proof("tiny-F32.gguf")
    visitor.tab("Export")
    page.click("#gguf-delete")
    visitor.wait("#gguf-confirm-text", "Delete tiny-F32.gguf?")
    page.click("#gguf-really-delete")
    visitor.wait("#gguf-empty", "No exports yet")
    assert not out.parent.exists()


def test_a_lora_file_opens_its_base_model_with_the_adapter(exporter, tiny_run):
    visitor, page = exporter.visitor, exporter.page
    visitor.open(adapter="none", run=tiny_run)
    page.click("#train-export-gguf")
    visitor.wait("#gguf-plan", "About")
    name = visitor.value("gguf-name")
    page.click("#gguf-start")
    exporter.wait_state(name, "finished")
    assert "--lora" in page.inner_text("#gguf-elsewhere")
    page.click("#gguf-use")
    visitor.wait_proof(f"run {tiny_run}")


@pytest.mark.slow
def test_an_export_goes_on_without_the_page_is_cancelled_from_another_and_survives_a_kill(exporter, new_visitor, app):
    page = exporter.open().page
    exporter.new("none", model="smollm2", format="Merged")
    page.wait_for_selector("#gguf-quantization label:has-text('as the base GGUF')")
    name = exporter.wait_name("smollm2-Q8_0")
    page.click("#gguf-start")
    exporter.wait_state(name, "running")
    page.goto("about:blank")
    other = Exporter(new_visitor()).open()
    other.wait_state(name, "running")
    other.page.click("#gguf-cancel")
    other.wait_state(name, "stopped")
    assert list((app.workspace.root / "exports").rglob("*.gguf")) == []

    other.page.click("#gguf-again")
    other.page.wait_for_selector("#gguf-start")
    assert other.wait_name("smollm2-Q8_0") == name
    assert other.visitor.value("gguf-adapter") == "none: the model alone"
    assert other.page.locator("#gguf-format label:has-text('Merged') input").is_checked()
    other.page.click("#gguf-start")
    other.wait_state(name, "running")
    (export,) = [one for one in store.list_jobs(app.workspace, "export") if one.is_active]
    os.kill(export.status.pid, signal.SIGKILL)
    other.wait_state(name, "interrupted")
    other.visitor.wait("#gguf-head .bd-error", "it was probably killed")
    assert not export.file.exists()


def test_what_can_not_be_exported_is_one_line(exporter, tiny_run, tiny_phi_adapter: Path):
    visitor, page = exporter.visitor, exporter.open().page
    for adapter, fields, line in (
        ("/no/such/adapter", {}, "Unknown adapter '/no/such/adapter'"),
        (tiny_run, {"model": "gpt9"}, "Unknown model 'gpt9'"),
        ("none", {"format": "LoRA"}, "A LoRA file is an adapter, and none is chosen"),
    ):
        exporter.new(adapter, **fields)
        visitor.wait("#gguf-new-notice .bd-error", line)
    exporter.new(str(tiny_phi_adapter), model="smollm2")
    visitor.wait("#gguf-plan", "About")
    page.click("#gguf-start")
    visitor.wait("#gguf-new-notice .bd-error", "was made for another base model")
    exporter.new("none", format="Merged")
    exporter.wait_name("smollm2-Q8_0")
    page.fill("#gguf-name :is(input, textarea)", "no name.gguf")
    page.click("#gguf-start")
    visitor.wait("#gguf-new-notice .bd-error", "An export's name is")
    assert page.locator("#gguf-list").count() == 0
