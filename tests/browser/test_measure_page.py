"""The Measure tab: a tiny random model measured without network, stopped and resumed; what is done with results."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psutil
import pytest

from biasdpo.jobs import store
from tests.browser.conftest import ITEMS, App, Visitor
from tests.evaluating import stop_midway
from tests.evaluation_results import result, with_curve, write_result
from tests.run_line import kill_jobs


class Measurer:
    """A visitor on the Measure tab."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.page = visitor.page

    def open(self, job: str = "") -> Measurer:
        self.page.goto(f"{self.visitor.url}?tab=measure" + (f"&job={job}" if job else ""))
        self.visitor.wait("#measure-adapters .token")  # the pickers are filled
        if job:
            self.visitor.wait(f"#evaluate-head:has(h3:text-is({job!r}))")
        return self

    def select(self, *benchmarks: str) -> None:
        """Exactly these."""
        for box in self.page.locator("#measure-bias label, #measure-quality label").all():
            box.locator("input").set_checked(box.inner_text().strip() in benchmarks)

    def choose(self, picker: str, choice: str) -> None:
        self.page.click(f"#{picker} input")
        self.page.get_by_role("option", name=choice).click()

    def click_cell(self, table: str, text: str) -> None:
        """Dataframes have hidden cells beside those that can be seen."""
        self.page.locator(f"#{table} [role=gridcell]", has_text=text).first.click()

    def wait_state(self, state: str) -> None:
        self.visitor.wait("#evaluate-head", state, slow=True)

    def cells(self, table: str) -> list[str]:
        return self.page.locator(f"#{table} [role=gridcell]").all_inner_texts()


@pytest.fixture
def measurer(new_visitor, app: App) -> Iterator[Measurer]:
    """Afterwards no evaluation is left, so that the next test finds the tab empty."""
    yield Measurer(new_visitor())
    kill_jobs(app.workspace)
    for one in store.list_jobs(app.workspace, "evaluate"):
        store.delete_job(one.id, app.workspace, "evaluate")


@pytest.mark.slow
def test_a_run_is_measured_offline_with_one_benchmark_missing(measurer, app, tiny_run, tiny_llama_gguf):
    visitor, page = measurer.visitor, measurer.open().page
    visitor.wait("#measure-empty", "less biased")  # the shipped adapter's, while there is none of one's own
    visitor.choose("measure-model", str(tiny_llama_gguf))
    visitor.wait("#measure-adapters .token", tiny_run)
    measurer.select("Quick check", "BBQ", "Perplexity of neutral text")
    visitor.wait("#measure-plan", "BBQ")
    visitor.set("measure-limit", "12")
    page.click("#measure-estimate")
    visitor.wait("#measure-plan", "Time: about", slow=True)
    page.click("#measure-start")
    measurer.wait_state("Finished")
    visitor.wait("#evaluate-head", "not scored: BBQ")
    visitor.unfold("measure-notes")
    visitor.wait("#measure-notes", "get them with `git clone")
    assert any(cell.startswith("Quick check") for cell in measurer.cells("measure-table"))
    (job,) = store.list_jobs(app.workspace, "evaluate")
    written = json.loads(job.file.read_text())
    assert (list(written["benchmarks"]), list(written["missing"])) == (["quick_check", "utility"], ["bbq"])
    assert "stereotype_percent" in visitor.save("#measure-csv").read_text()
    assert json.loads(visitor.save("#measure-json").read_text()) == written
    page.click("#measure-card")
    visitor.wait(".toast-body", "Evaluation")
    assert "## Evaluation" in (app.workspace.run_folder(tiny_run) / "adapter" / "README.md").read_text(encoding="utf-8")
    page.reload()
    visitor.wait("#evaluate-head", "not scored: BBQ")
    page.click("#evaluate-delete")
    page.click("#evaluate-keep")
    page.click("#evaluate-delete")
    page.click("#evaluate-confirm-delete")
    visitor.wait("#measure-empty", "Nothing measured yet")
    assert store.list_jobs(app.workspace, "evaluate") == []


@pytest.mark.slow
def test_an_evaluation_goes_on_without_the_page_is_stopped_and_resumed(measurer, new_visitor, app, tiny_run, tiny_llama_gguf):
    visitor, page = measurer.visitor, measurer.open().page
    visitor.choose("measure-model", str(tiny_llama_gguf))
    visitor.wait("#measure-adapters .token", tiny_run)
    measurer.select("CrowS-Pairs")
    visitor.set("measure-limit", "0")
    page.click("#measure-start")
    while not (jobs := store.list_jobs(app.workspace, "evaluate")):
        page.wait_for_timeout(20)
    job = stop_midway(jobs[0].folder)  # at once: it takes a second or two
    worker = psutil.Process(job.status.pid)
    visitor.wait("#evaluate-stop")
    page.goto("about:blank")
    other = Measurer(new_visitor()).open(job.id)
    other.visitor.wait("#evaluate-head", "CrowS-Pairs")
    other.page.click("#evaluate-stop")
    other.wait_state("Stopping")
    worker.resume()
    other.wait_state("Stopped")
    other.visitor.unfold("measure-notes")
    other.visitor.wait("#measure-notes", "interrupted after")  # what was scored is shown, and marked
    assert 0 < json.loads(job.file.read_text())["benchmarks"]["crows_pairs"]["n"] < ITEMS
    other.page.click("#evaluate-resume")
    other.wait_state("Finished")
    assert json.loads(job.file.read_text())["benchmarks"]["crows_pairs"]["n"] == ITEMS


def test_groups_flipped_items_and_evaluations_side_by_side(measurer, app):
    strong = result(40, n_failed=2)
    write_result(app.workspace.root, "strong", strong)
    write_result(app.workspace.root, "curve", with_curve(20))
    visitor, page = measurer.visitor, measurer.open("curve").page
    visitor.wait("#measure-forest .js-plotly-plot")
    visitor.wait("#measure-by-strength-plot .js-plotly-plot", "ideal: 50")
    measurer.click_cell("evaluate-jobs", "strong")
    visitor.wait("#measure-details [role=tab][aria-selected=true]", "By group")
    visitor.unfold("measure-notes")
    visitor.wait("#measure-notes", "longer than the model's context")
    measurer.choose("measure-by-group", "CrowS-Pairs: Stereotype preferred")
    visitor.wait("#measure-by-group-table [role=gridcell]", "race-color")
    page.get_by_role("tab", name="Flipped items").click()
    measurer.choose("measure-flip-benchmark", "CrowS-Pairs")
    visitor.wait("#measure-flips [role=gridcell]", "Group A")
    measurer.choose("measure-flip-way", "Toward less bias")
    page.wait_for_function("() => !document.querySelector('#measure-flips').innerText.includes('less stereotypical sentence →')")
    measurer.click_cell("measure-flips", "Group A")
    visitor.wait("#measure-flip-texts", "Group")
    measurer.choose("measure-others", "curve")
    visitor.wait("#measure-table [role=columnheader]", "curve")
    assert "side by side" in visitor.save("#measure-md").read_text()
    page.click("#measure-flip-try")
    visitor.wait("[role=tab][aria-selected=true]", "Compare")


def test_what_can_not_be_measured_is_one_line_and_names_from_a_result_are_text(measurer, app):
    visitor, page = measurer.visitor, measurer.open().page
    measurer.select()
    visitor.wait("#measure-plan", "No benchmark is selected")
    page.click("#measure-start")
    visitor.wait(".toast-body", "No benchmark is selected")
    hostile = "<img src=x id=injected>"
    made = result(12, benchmarks=("crows_pairs",), adapter=hostile, model=hostile, pairs_source=hostile)
    part = made["benchmarks"][hostile] = made["benchmarks"].pop("crows_pairs")
    part["groups"] = {hostile: part["groups"]["gender"]}
    part["items"] = [item | {"category": hostile, "more": hostile} for item in part["items"]]
    write_result(app.workspace.root, "hostile", made | {"missing": {"bbq": hostile}})
    write_result(app.workspace.root, "damaged", {"benchmarks": {"bbq": {}}, "provenance": {}})
    measurer.open("hostile")
    visitor.wait("#evaluate-head", "not scored: BBQ")
    visitor.wait("#measure-facts", hostile)
    page.get_by_role("tab", name="Flipped items").click()
    visitor.wait("#measure-flips [role=gridcell]", hostile)
    measurer.click_cell("measure-flips", hostile)
    visitor.wait("#measure-flip-texts", "img")
    assert page.locator("#injected").count() == 0
    measurer.click_cell("evaluate-jobs", "damaged")
    visitor.wait("#evaluate-head", "is no evaluation result")
    page.wait_for_selector("#measure-result", state="hidden")
