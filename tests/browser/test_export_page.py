"""The Export tab on tiny random models: a file is written, proven, downloaded, used and deleted; what fails is one line. Every
test also fails on a console error or a request to another host."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from biasdpo.config import ExportConfig
from biasdpo.jobs import store
from biasdpo.jobs.worker import run_export
from biasdpo.model_files import gguf_value, open_gguf
from biasdpo.workspace import Workspace, sha256_of
from tests.app_process import running_app
from tests.browser.conftest import Visitor
from tests.run_folders import write_run
from tests.run_line import kill_jobs
from tests.test_train_space import REFUSED, Poster


@dataclass
class Exporter:
    """A visitor on the Export tab."""

    visitor: Visitor
    workspace: Workspace

    @property
    def page(self):
        return self.visitor.page

    def open(self) -> Exporter:
        self.visitor.open(adapter="none")
        self.page.get_by_role("tab", name="Export").click()
        self.page.wait_for_selector("#gguf-start, #gguf-head .bd-run")
        return self

    def new(self, adapter: str, **fields: str) -> str:
        """The panel for a new export, filled; returns the proposed name."""
        if not self.page.locator("#gguf-start").is_visible():
            self.page.click("#gguf-new-button")
            self.page.wait_for_selector("#gguf-start")
        self.page.fill("#gguf-adapter input", adapter)
        self.page.keyboard.press("Enter")
        self.page.keyboard.press("Tab")
        self.page.wait_for_timeout(500)  # until the panel has answered: a list that is filled while it is open fails in Gradio
        for field, value in fields.items():
            if field == "model":
                self.page.fill("#gguf-model input", value)
                self.page.keyboard.press("Enter")
                self.page.keyboard.press("Tab")
            else:
                self.page.click(f"#gguf-{field} label:has-text('{value}')")
        return self.page.input_value("#gguf-name :is(input, textarea)")

    def wait_plan(self, words: str = "About") -> None:
        self.page.wait_for_selector(f"#gguf-plan:has-text('{words}')")

    def wait_name(self, start: str) -> str:
        self.page.wait_for_function(
            "(start) => document.querySelector('#gguf-name :is(input, textarea)').value.startsWith(start)", arg=start
        )
        return self.page.input_value("#gguf-name :is(input, textarea)")

    def wait_state(self, name: str, state: str) -> None:
        self.page.wait_for_selector(f"#gguf-head section[aria-label='Export {name}'] .bd-state-{state}", timeout=90_000)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_adapter: Path) -> Workspace:
    """A workspace with one finished run of the tiny Llama."""
    workspace = Workspace(tmp_path_factory.mktemp("exports"))
    folder = write_run(workspace.root, "first", model=str(tiny_llama))
    shutil.rmtree(folder.adapter)
    shutil.copytree(tiny_llama_adapter, folder.adapter)
    provenance = {"model": str(tiny_llama), "run_id": "first", "dataset_sha256": "3fa9c1d2" * 8}
    (folder.adapter / "provenance.json").write_text(json.dumps(provenance))
    return workspace


@pytest.fixture(scope="module")
def library_app(browser, library: Workspace) -> Iterator[str]:  # noqa: ARG001 (no browser, no app)
    with running_app(library.root, "--model", "smollm2") as url:
        yield url


@pytest.fixture
def exporter(new_visitor, library_app: str, library: Workspace) -> Iterator[Exporter]:
    """Afterwards no export of this test is left, so that the next finds the tab empty."""
    yield Exporter(new_visitor(library_app), library)
    kill_jobs(library)
    for export in store.list_jobs(library, "export"):
        store.delete_job(export.id, library, "export")


def test_a_run_is_exported_merged_proven_downloaded_used_and_deleted(exporter, library, tiny_llama):
    exporter.visitor.open(adapter="none")
    page = exporter.page
    page.get_by_role("tab", name="Train").click()
    page.click("#train-export-gguf")
    exporter.wait_plan()
    assert page.input_value("#gguf-adapter input") == "run first"
    assert page.input_value("#gguf-model input").startswith(tiny_llama.name)
    assert page.locator("#gguf-quantization").count() == 0
    page.click("#gguf-format label:has-text('Merged')")
    page.wait_for_selector("#gguf-quantization label:has-text('Q8_0')")
    page.click("#gguf-quantization label:has-text('F32')")
    assert exporter.wait_name("first-F32") == "first-F32.gguf"
    page.click("#gguf-start")
    exporter.wait_state("first-F32.gguf", "finished")
    out = library.root / "exports" / "first-F32" / "first-F32.gguf"
    assert gguf_value(open_gguf(out), "general.architecture") == "llama"
    page.wait_for_selector("#gguf-proof .bd-proof-good:has-text('Equal to the original')")
    for words in ("Tokenizer", "all alike", "Mean KL", "at most 1e-05", "100.00%"):
        assert words in page.inner_text("#gguf-proof")
    with page.expect_download() as download:
        page.click("#gguf-download")
    assert sha256_of(Path(download.value.path())) == sha256_of(out)
    assert f"llama-server -m {out}" in page.inner_text("#gguf-elsewhere")
    exporter.visitor.unfold("gguf-modelfile")
    assert "FROM ./first-F32.gguf" in page.inner_text("#gguf-modelfile")
    page.click("#gguf-use")
    page.wait_for_selector(".bd-proven:has-text('first-F32.gguf')", timeout=60_000)
    page.get_by_role("tab", name="Export").click()
    page.click("#gguf-delete")
    page.wait_for_selector("#gguf-confirm-text:has-text('Delete first-F32.gguf?')")
    page.click("#gguf-really-delete")
    page.wait_for_selector("#gguf-empty:has-text('No exports yet')")
    assert not out.parent.exists()


def test_a_lora_file_opens_its_base_model_with_the_adapter(exporter, library, tiny_llama_gguf):
    out = library.root / "exports" / "mine.gguf"
    run_export(ExportConfig(out=out, format="lora", run="first", model=str(tiny_llama_gguf), threads=1), library, lambda *_: None)
    page = exporter.open().page
    exporter.wait_state("mine.gguf", "finished")
    assert "--lora" in page.inner_text("#gguf-elsewhere")
    page.click("#gguf-use")
    page.wait_for_selector("#proof:has-text('run first')", timeout=60_000)
    page.wait_for_selector(".bd-proven:has-text('tuned differs')", timeout=60_000)


def test_an_export_goes_on_without_the_page_and_is_cancelled_from_another(exporter, new_visitor, library_app, library):
    page = exporter.open().page
    exporter.new("none", model="smollm2", format="Merged")
    page.wait_for_selector("#gguf-quantization label:has-text('as the base GGUF')")
    page.click("#gguf-quantization label:has-text('F16')")
    name = exporter.wait_name("smollm2-F16")
    page.click("#gguf-start")
    exporter.wait_state(name, "running")
    page.goto("about:blank")
    other = Exporter(new_visitor(library_app), library).open()
    other.wait_state(name, "running")
    other.page.click("#gguf-cancel")
    other.wait_state(name, "stopped")
    assert list((library.root / "exports").rglob("*.gguf")) == []


def test_a_killed_export_is_shown_as_interrupted_and_is_asked_for_again(exporter, library):
    page = exporter.open().page
    exporter.new("none", model="smollm2", format="Merged")
    page.wait_for_selector("#gguf-quantization label:has-text('as the base GGUF')")
    name = exporter.wait_name("smollm2-Q8_0")
    page.click("#gguf-start")
    exporter.wait_state(name, "running")
    (export,) = store.list_jobs(library, "export")
    os.kill(export.status.pid, signal.SIGKILL)
    exporter.wait_state(name, "interrupted")
    page.wait_for_selector("#gguf-head .bd-error:has-text('it was probably killed')")
    assert not export.file.exists()
    page.click("#gguf-again")
    page.wait_for_selector("#gguf-start")
    assert exporter.wait_name("smollm2-Q8_0") == name
    assert page.input_value("#gguf-adapter input") == "none: the model alone"
    assert page.locator("#gguf-format label:has-text('Merged') input").is_checked()
    assert not export.folder.path.exists()


def test_what_can_not_be_exported_is_one_line(exporter, tiny_phi_adapter):
    page = exporter.open().page
    for adapter, fields, line in (
        ("/no/such/adapter", {}, "Unknown adapter '/no/such/adapter'"),
        ("first", {"model": "gpt9"}, "Unknown model 'gpt9'"),
        ("none", {"format": "LoRA"}, "A LoRA file is an adapter, and none is chosen"),
    ):
        exporter.new(adapter, **fields)
        page.wait_for_selector(f"#gguf-new-notice .bd-error:has-text({json.dumps(line)})")
    exporter.new(str(tiny_phi_adapter), model="smollm2")
    exporter.wait_plan()
    page.click("#gguf-start")
    page.wait_for_selector("#gguf-new-notice .bd-error:has-text('was made for another base model')")
    page.fill("#gguf-name :is(input, textarea)", "../../x.gguf")
    page.click("#gguf-start")
    page.wait_for_selector('#gguf-new-notice .bd-error:has-text("An export\'s name is")')
    assert page.locator("#gguf-list").count() == 0


def test_a_public_space_refuses_inside_its_functions(browser, library):  # noqa: ARG001
    with running_app(library.root, "--model", "smollm2", SPACE_ID="someone/biasdpo") as url:
        poster = Poster(url)
        plan = ["first", "/etc/passwd.gguf", "lora", None, "auto", "x.gguf"]
        for element, event, data in (
            ("gguf-start", "click", [*plan, 0, 0]),
            ("gguf-adapter", "input", [*plan, None]),
            ("gguf-cancel", "click", ["x"]),
            ("gguf-again", "click", ["x"]),
            ("gguf-use", "click", ["x"]),
        ):
            (function,) = poster.functions(element, event)
            assert REFUSED in poster.post(function, data), element
    assert store.list_jobs(library, "export") == []
