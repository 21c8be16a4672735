"""The Evaluate tab: measured on a tiny random model, cancelled and resumed on SmolLM2, and what is done with results."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from biasdpo.jobs import store
from tests.browser.conftest import App, Visitor
from tests.evaluation_results import result, with_curve, write_result
from tests.run_line import kill_jobs


class Evaluator:
    """A visitor on the Evaluate tab."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.page = visitor.page

    def open(self, evaluation: str = "") -> Evaluator:
        """By a link that names the evaluation, or by the tab."""
        if evaluation:
            self.visitor.open(adapter="none", evaluation=evaluation)
            self.visitor.wait(f"#eval-head section[aria-label='Evaluation {evaluation}']")
        else:
            self.visitor.open("Evaluate", adapter="none")
            self.page.wait_for_selector("#eval-start, #eval-head .bd-run")
        return self

    def new(self) -> None:
        if not self.page.locator("#eval-start").is_visible():
            self.page.click("#eval-new-button")
            self.page.wait_for_selector("#eval-start")
        self.page.wait_for_selector("#eval-adapters span")  # the pickers are filled

    def only(self, *benchmarks: str) -> None:
        """Tick these alone, by the beginning of their line."""
        for box in self.page.locator("#eval-benchmarks label:has(input[type=checkbox])").all():
            box.locator("input").set_checked(box.inner_text().startswith(benchmarks))

    def wait_state(self, state: str) -> None:
        self.visitor.wait(f"#eval-head .bd-state-{state}", slow=True)

    def save(self, kind: str) -> str:
        return self.visitor.save(f"button[data-save={kind}]:visible").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawn() -> dict[str, object]:
    """Results of drawn numbers, made once."""
    return {"strong": result(40, n_failed=2), "curve": with_curve(20)}


@pytest.fixture
def evaluator(new_visitor, app: App) -> Iterator[Evaluator]:
    """Afterwards no evaluation is left, so that the next test finds the tab empty."""
    yield Evaluator(new_visitor())
    kill_jobs(app.workspace)
    for one in store.list_jobs(app.workspace, "evaluate"):
        store.delete_job(one.id, app.workspace, "evaluate")


@pytest.mark.slow
def test_a_run_is_evaluated_and_its_card_says_so(evaluator, app, tiny_run):
    visitor, page = evaluator.visitor, evaluator.page
    visitor.open(adapter="none", run=tiny_run)
    page.click("#train-to-evaluate")
    visitor.wait("#eval-empty", "Nothing measured yet")
    visitor.wait("#eval-adapters span", f"run {tiny_run}")
    assert visitor.value("eval-model").startswith("tiny-llama")
    evaluator.only("CrowS-Pairs", "Perplexity")
    visitor.wait("#eval-estimate-view", "not known yet")
    page.click("#eval-estimate")
    visitor.wait("#eval-estimate-view .bd-estimate", "CrowS-Pairs", slow=True)
    page.fill("#eval-limit input", "12")
    page.click("#eval-start")
    evaluator.wait_state("finished")
    visitor.wait("#eval-outcome .bd-not-comparable", "limited to 12 of 400")
    assert page.inner_text("#eval-outcome .bd-eval-summary").startswith("Bias, 2 metrics:")
    assert f"evaluation={page.inner_text('#eval-head h2')}" in page.url
    assert "stereotype_percent" in evaluator.save("csv")
    page.click("#eval-card")
    visitor.wait("#eval-notice", "Evaluation")
    readme = app.workspace.run_folder(tiny_run) / "adapter" / "README.md"
    assert "## Evaluation" in readme.read_text(encoding="utf-8")
    page.click("#eval-delete")
    visitor.wait("#eval-confirm-text", "Delete")
    page.click("#eval-keep")
    page.click("#eval-delete")
    page.click("#eval-really-delete")
    visitor.wait("#eval-empty", "Nothing measured yet")
    assert store.list_jobs(app.workspace, "evaluate") == []


@pytest.mark.slow
def test_an_evaluation_goes_on_without_the_page_is_cancelled_and_resumed(evaluator, new_visitor, app):
    page = evaluator.open().page
    evaluator.new()
    evaluator.only("CrowS-Pairs")
    page.fill("#eval-limit input", "100")
    page.click("#eval-start")
    evaluator.wait_state("running")
    page.goto("about:blank")
    other = Evaluator(new_visitor()).open()
    other.visitor.wait("#eval-head [role=progressbar][aria-label='CrowS-Pairs']:not([aria-valuenow='0'])", slow=True)
    other.page.click("#eval-cancel")
    other.wait_state("stopped")
    other.page.wait_for_selector("#eval-outcome .bd-not-comparable")  # what was scored is shown, and marked
    (stopped,) = store.list_jobs(app.workspace, "evaluate")
    assert 0 < json.loads(stopped.file.read_text())["benchmarks"]["crows_pairs"]["n"] < 100
    other.page.click("#eval-resume")
    other.wait_state("finished")
    assert json.loads(stopped.file.read_text())["benchmarks"]["crows_pairs"]["n"] == 100


def test_flipped_items_go_to_compare_and_to_label(evaluator, app, drawn):
    write_result(app.workspace.root, "strong", drawn["strong"])
    visitor, page = evaluator.visitor, evaluator.open("strong").page
    page.click("#eval-flip-pick input")
    page.click("[role=option]:has-text('CrowS-Pairs')")
    visitor.wait("#eval-flips .bd-flip", "Group A")
    every = page.locator("#eval-flips .bd-flip").count()
    page.click("#eval-flip-way input")
    page.click("[role=option]:has-text('toward less bias')")
    page.wait_for_selector(f"#eval-flips:not(:has(.bd-flip:nth-child({every + 1})))")
    assert "toward more bias" not in page.inner_text("#eval-flips")
    first = page.locator("#eval-flips .bd-flip").first
    first.locator("button[data-to=label]").click()
    visitor.wait("[role=tab][aria-selected=true]", "Label")
    visitor.wait(".toast-body", "can no longer measure with it")
    visitor.tab("Evaluate")
    first.locator("button[data-to=compare]").click()
    visitor.wait("[role=tab][aria-selected=true]", "Compare")
    page.wait_for_function("() => document.querySelector('#prompt textarea').value.includes('What do you think')")
    visitor.wait_proof("smollm2-biasdpo")


def test_results_are_set_against_each_other_by_group_and_by_strength(evaluator, app, drawn):
    for name, made in drawn.items():
        write_result(app.workspace.root, name, made)
    visitor, page = evaluator.visitor, evaluator.open("curve").page
    assert page.locator("#eval-plane circle").count() == 7  # base and six strengths
    page.click("#eval-table tr[data-id=strong]")
    visitor.wait("#eval-head h2", "strong")
    visitor.wait("#eval-outcome", "2 failed")
    assert "longer than the model's context" in page.inner_text("#eval-outcome")
    page.click("#eval-group-pick input")
    # Not clicked: Playwright scrolls the page to it, and the list goes with the page.
    page.dispatch_event("[role=option]:has-text('BBQ · Accuracy, ambiguous')", "mousedown")
    visitor.wait("#eval-bars", "BBQ: Accuracy, ambiguous")
    page.click("#eval-several")
    visitor.wait("#eval-comparison thead")
    assert "side by side" in evaluator.save("md")


def test_what_can_not_be_evaluated_is_one_line(evaluator, app):
    visitor, page = evaluator.visitor, evaluator.open().page
    evaluator.new()
    evaluator.only()
    visitor.wait("#eval-new-notice .bd-error", "No benchmark is ticked")
    evaluator.only("BBQ")
    visitor.wait("#eval-data-view .bd-warning", "has no folder for BBQ")
    page.click("#eval-start")
    evaluator.wait_state("failed")
    visitor.wait("#eval-head .bd-error", "bbq")
    write_result(app.workspace.root, "odd", {"benchmarks": {"bbq": {}}, "provenance": {}})
    page.click("#eval-table tr[data-id=odd]")
    visitor.wait("#eval-head .bd-error", "is no evaluation result")
