"""The Export tab: a file is written, verified, downloaded, used and deleted; what fails says why. A run is published."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from biasdpo.data import journal, splits
from biasdpo.data.pairs import PreferencePair
from biasdpo.jobs import store
from biasdpo.workspace import Workspace, sha256_of
from tests.app_process import running_app
from tests.browser.conftest import App, Visitor
from tests.gguf_files import metadata_of
from tests.hub import running_hub
from tests.run_folders import write_run
from tests.run_line import kill_jobs


class Exporter:
    """A visitor on the Export tab."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor, self.page = visitor, visitor.page

    def open(self) -> Exporter:
        self.page.goto(self.visitor.url + "?tab=export")
        self.wait_plan("about")
        return self

    def wait_plan(self, text: str) -> None:
        self.visitor.wait("#export-plan", text)

    def pick(self, field: str, label: str) -> None:
        self.page.click(f"#export-{field} label:has-text('{label}')")

    def adapter(self, name: str) -> None:
        self.visitor.choose("export-adapter", name)
        self.page.keyboard.press("Tab")

    def start(self) -> str:
        name = self.visitor.value("export-name")
        self.page.click("#export-start")
        return name.removesuffix(".gguf")

    def wait_state(self, export_id: str, state: str) -> None:
        self.visitor.wait("#export-head h3", export_id)
        self.visitor.wait("#export-head strong", state, slow=True)


@pytest.fixture
def exporter(new_visitor, app: App) -> Iterator[Exporter]:
    """Afterwards no export is left, so that the next test finds the tab empty."""
    yield Exporter(new_visitor())
    kill_jobs(app.workspace)
    for export in store.list_jobs(app.workspace, "export"):
        store.delete_job(export.id, app.workspace, "export")


@pytest.mark.slow
def test_a_run_is_exported_merged_proven_downloaded_used_and_deleted(exporter, app, tiny_run):
    visitor, page = exporter.visitor, exporter.open().page
    visitor.wait("#export-empty", "No exports yet")
    exporter.adapter(tiny_run)
    exporter.wait_plan(f"{tiny_run} for tiny-llama")
    exporter.pick("format", "Merged")
    visitor.wait_value("export-name", f"{tiny_run}-Q8_0.gguf")
    page.click("#export-quantization input")
    page.get_by_role("option", name="F32 ·").click()
    visitor.wait_value("export-name", f"{tiny_run}-F32.gguf")
    export_id = exporter.start()
    exporter.wait_state(export_id, "Finished")
    out = app.workspace.root / "exports" / export_id / f"{export_id}.gguf"
    assert metadata_of(out)["general.architecture"] == "llama"
    visitor.wait("#export-head", "✓ Equal to the original")
    visitor.wait("#export-files", sha256_of(out))
    assert sha256_of(visitor.save("#export-download")) == sha256_of(out)
    visitor.unfold("export-elsewhere")
    commands = [field.input_value() for field in page.locator("#export-elsewhere textarea").all()]
    assert commands[0].startswith(f"llama-server -m {out}")
    assert f"FROM ./{out.name}" in commands[3]
    visitor.unfold("export-details")
    visitor.wait("#export-figures", "at most 1e-05")
    page.click("#export-delete")
    page.click("#export-confirm-delete")
    visitor.wait("#export-empty", "No exports yet")
    assert not out.parent.exists()


@pytest.mark.slow
def test_a_lora_without_a_proof_is_recorded_as_not_verified(exporter, app, tiny_run):
    exporter.open().adapter(tiny_run)
    exporter.wait_plan(f"{tiny_run} for tiny-llama")
    exporter.visitor.unfold("export-advanced")
    exporter.visitor.set("export-threads", "1")
    exporter.pick("proof", "None")
    export_id = exporter.start()
    exporter.wait_state(export_id, "Finished")
    exporter.visitor.wait("#export-head", "⚠ Not verified")
    exporter.visitor.wait("#export-jobs", "not verified")
    out = app.workspace.root / "exports" / export_id / f"{export_id}.gguf"
    record = json.loads(out.with_name(f"{out.name}.json").read_text())
    assert (record["proof"]["verdict"], record["request"]["threads"], record["request"]["pairs"]) == ("not verified", 1, 64)
    assert "Not verified" in out.with_name(f"{out.name}.md").read_text()
    exporter.page.click("#export-compare")
    exporter.page.wait_for_selector("[role=tab][data-tab-id=compare][aria-selected=true]")


@pytest.mark.slow
def test_an_export_goes_on_without_the_page_is_stopped_from_another_and_survives_a_kill(exporter, new_visitor, app):
    exporter.open().adapter("none")
    exporter.pick("format", "Merged")
    exporter.wait_plan("alone")
    export_id = exporter.start()
    exporter.wait_state(export_id, "Running")
    exporter.page.goto("about:blank")
    other = Exporter(new_visitor()).open()
    other.wait_state(export_id, "Running")
    other.page.click("#export-stop")
    other.wait_state(export_id, "Stopped")
    assert list((app.workspace.root / "exports").rglob("*.gguf")) == []
    other.page.click("#export-resume")
    other.wait_state(export_id, "Running")
    (export,) = [one for one in store.list_jobs(app.workspace, "export") if one.is_active]
    os.kill(export.status.pid, signal.SIGKILL)
    other.wait_state(export_id, "Interrupted")
    other.visitor.wait("#export-head", "it was probably killed")
    assert not export.file.exists()


@pytest.mark.slow
def test_a_run_is_published_as_previewed(new_visitor, tmp_path):
    workspace = Workspace(tmp_path / "workspace")
    folder = write_run(workspace.root, "demo", datasets=("workspace",))
    (folder.adapter / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: owner/base\n---\n\n# demo\n")
    made = journal.new_judgment("Who leads?", "Anyone.", "Only they.", annotator="Wilhelmina-Q")
    journal.append(workspace, made)
    splits.write_dataset([PreferencePair("Who leads?", "Anyone.", "Only they.")], folder.snapshot)
    with running_hub(tmp_path / "hub") as hub, running_app(workspace.root, "--model", "smollm2", **hub.environment()) as url:
        visitor = new_visitor(url)
        page = visitor.page
        Exporter(visitor).open()
        visitor.unfold("publish-box")
        visitor.set("publish-to", "ben/less-biased")
        visitor.set("publish-dataset_to", "ana/verdicts")
        page.click("#publish-preview")
        visitor.wait("#publish-summary", "Dataset ana/verdicts: 2 files")
        visitor.wait("#publish-summary", "1 annotator as numbers")
        visitor.wait("#publish-files", "adapter_model.safetensors")
        assert "Not evaluated on benchmarks." in visitor.value("publish-model-card")
        assert "Wilhelmina-Q" not in visitor.value("publish-dataset-card")
        page.click("#publish-send")
        visitor.wait(".toast-body", "ben/less-biased is somebody else's")
        page.click(".toast-close")
        visitor.set("publish-to", "ana/less-biased")
        page.click("#publish-send")
        visitor.wait(".toast-body", "press Preview again")
        page.click(".toast-close")
        assert hub.repositories == {}
        page.click("#publish-preview")
        visitor.wait("#publish-summary", "Model ana/less-biased")
        page.click("#publish-send")
        visitor.wait("#publish-result", "✓ Model ana/less-biased: commit")
        links = [link.get_attribute("href") for link in page.locator("#publish-result a").all()]
        assert links == [f"{hub.endpoint}/datasets/ana/verdicts", f"{hub.endpoint}/ana/less-biased"]
        assert hub.repository("model", "ana/less-biased").private
        assert b"Wilhelmina-Q" not in hub.read("dataset", "ana/verdicts", "pairs.jsonl")
        page.click("#publish-send")
        visitor.wait("#publish-result", "nothing changed")
        page.close()


def test_what_can_not_be_exported_says_so_before_and_after_the_click(exporter, tiny_run, tiny_phi_adapter):
    visitor, page = exporter.visitor, exporter.open().page
    exporter.adapter("/no/such/<b>adapter")
    exporter.wait_plan("Unknown adapter '/no/such/<b>adapter'")
    exporter.adapter("none")
    exporter.wait_plan("format lora needs an adapter")
    exporter.adapter(tiny_run)
    exporter.wait_plan(f"{tiny_run} for tiny-llama")
    page.fill("#export-name input, #export-name textarea", "no name")
    page.click("#export-start")
    visitor.wait(".toast-body", "An export's name is letters")
    page.click(".toast-close")
    exporter.adapter(str(tiny_phi_adapter))
    exporter.wait_plan("does not say which model it was made for")
    assert page.locator("#export-jobs").count() == 0
