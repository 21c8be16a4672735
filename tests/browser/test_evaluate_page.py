"""The Evaluate tab: measured on a tiny random model, cancelled and resumed on SmolLM2, and what is done with results. Every test
also fails on a console error or a request to another host."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from biasdpo.jobs import store
from biasdpo.workspace import Workspace
from tests.app_process import running_app
from tests.browser.conftest import Visitor
from tests.evaluation_results import result, with_curve, write_result
from tests.run_folders import write_run
from tests.run_line import kill_jobs
from tests.test_train_space import REFUSED, Poster

GROUPS = ("Old people", "Young people", "Poor people", "Rich people")


@dataclass
class Evaluator:
    """A visitor on the Evaluate tab."""

    visitor: Visitor
    workspace: Workspace

    @property
    def page(self):
        return self.visitor.page

    def open(self, evaluation: str = "") -> Evaluator:
        """By a link that names the evaluation, or by the tab."""
        if evaluation:
            self.page.goto(f"{self.visitor.app}?adapter=none&evaluation={evaluation}")
            self.page.wait_for_selector(f"#eval-head section[aria-label='Evaluation {evaluation}']")
        else:
            self.visitor.open(adapter="none")
            self.page.get_by_role("tab", name="Evaluate").click()
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
            wanted = box.inner_text().startswith(benchmarks)
            box.locator("input").set_checked(wanted)

    def wait_state(self, state: str) -> None:
        self.page.wait_for_selector(f"#eval-head .bd-state-{state}", timeout=90_000)

    def id(self) -> str:
        return self.page.inner_text("#eval-head h2")

    def save(self, kind: str) -> str:
        with self.page.expect_download() as download:
            self.page.locator(f"button[data-save={kind}]:visible").click()
        return Path(download.value.path()).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benchmark files of the tests' own, in the upstream formats."""
    folder = tmp_path_factory.mktemp("items")
    (folder / "crows_pairs").mkdir()
    with (folder / "crows_pairs" / "crows_pairs_anonymized.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", "sent_more", "sent_less", "bias_type"])
        for i in range(400):
            one, other = GROUPS[i % 4], GROUPS[(i + 1) % 4]
            writer.writerow([i, f"{one} never manage task {i}.", f"{other} never manage task {i}.", ("age", "religion")[i % 2]])
    (folder / "real_toxicity_prompts").mkdir()
    with (folder / "real_toxicity_prompts" / "nontoxic.jsonl").open("w", encoding="utf-8") as file:
        for i in range(40):
            file.write(json.dumps({"prompt": {"text": f"The train of {i} o'clock is late", "toxicity": 0.01}}) + "\n")
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_llama_gguf: Path, tiny_llama_adapter: Path) -> Workspace:
    """A workspace with one finished run of the tiny Llama."""
    workspace = Workspace(tmp_path_factory.mktemp("lab"))
    folder = write_run(workspace.root, "first", model=str(tiny_llama_gguf))
    shutil.rmtree(folder.adapter)
    shutil.copytree(tiny_llama_adapter, folder.adapter)
    (folder.adapter / "provenance.json").write_text(json.dumps({"model": str(tiny_llama_gguf), "run_id": "first"}))
    return workspace


@pytest.fixture(scope="module")
def lab_app(browser, lab: Workspace, items: Path) -> Iterator[str]:  # noqa: ARG001 (no browser, no app)
    with running_app(lab.root, "--model", "smollm2", "--data-dir", str(items)) as url:
        yield url


@pytest.fixture(scope="module")
def drawn() -> dict[str, object]:
    """Results of drawn numbers, made once."""
    return {"strong": result(40, n_failed=2), "gentle": result(40, shift=-0.3, adapter="gentle"), "curve": with_curve(20)}


@pytest.fixture
def evaluator(new_visitor, lab_app: str, lab: Workspace) -> Iterator[Evaluator]:
    """Afterwards no evaluation of this test is left, so that the next finds the tab empty."""
    yield Evaluator(new_visitor(lab_app), lab)
    kill_jobs(lab)
    for one in store.list_jobs(lab, "evaluate"):
        store.delete_job(one.id, lab, "evaluate")


def test_a_run_is_evaluated_and_its_card_says_so(evaluator, lab, items):
    evaluator.visitor.open(adapter="none")
    page = evaluator.page
    page.get_by_role("tab", name="Train").click()
    page.click("#train-to-evaluate")
    page.wait_for_selector("#eval-empty:has-text('Nothing measured yet')")
    page.wait_for_selector("#eval-adapters span:has-text('run first')")
    assert page.input_value("#eval-model input").startswith("tiny-llama")
    assert page.locator("#eval-likelihood label:has-text('Preference') input").is_checked()
    evaluator.only("CrowS-Pairs", "Perplexity")
    page.wait_for_selector(f"#eval-data-view:has-text('{items}')")
    page.wait_for_selector("#eval-estimate-view:has-text('not known yet')")
    page.click("#eval-estimate")
    page.wait_for_selector("#eval-estimate-view .bd-estimate:has-text('CrowS-Pairs')", timeout=90_000)
    page.fill("#eval-limit input", "12")
    page.click("#eval-start")
    evaluator.wait_state("finished")
    page.wait_for_selector("#eval-outcome .bd-not-comparable:has-text('limited to 12 of 400')")
    assert page.inner_text("#eval-outcome .bd-eval-summary").startswith("Bias, 2 metrics:")
    assert page.locator("#eval-outcome tbody tr:not(.bd-eval-head)").count() == 4
    assert page.locator("#eval-forest .bd-forest-cell b").count() == 3  # the change in per cent restates perplexity
    assert page.locator("#eval-bars tbody tr").count() == 3  # all, age, religion
    assert f"evaluation={evaluator.id()}" in page.url
    assert "stereotype_percent" in evaluator.save("csv")
    page.click("#eval-card")
    page.wait_for_selector("#eval-notice:has-text('Evaluation')")
    assert "## Evaluation" in (lab.root / "runs" / "first" / "adapter" / "README.md").read_text(encoding="utf-8")
    page.click("#eval-delete")
    page.wait_for_selector("#eval-confirm-text:has-text('Delete')")
    page.click("#eval-keep")
    page.click("#eval-delete")
    page.click("#eval-really-delete")
    page.wait_for_selector("#eval-empty:has-text('Nothing measured yet')")
    assert store.list_jobs(lab, "evaluate") == []


def test_an_evaluation_goes_on_without_the_page_is_cancelled_and_resumed(evaluator, new_visitor, lab_app, lab):
    page = evaluator.open().page
    evaluator.new()
    evaluator.only("CrowS-Pairs")
    page.fill("#eval-limit input", "200")
    page.click("#eval-start")
    evaluator.wait_state("running")
    page.goto("about:blank")
    other = Evaluator(new_visitor(lab_app), lab).open()
    some = "#eval-head [role=progressbar][aria-label='CrowS-Pairs']:not([aria-valuenow='0'])"
    other.page.wait_for_selector(some, timeout=90_000)
    other.page.click("#eval-cancel")
    other.wait_state("stopped")
    other.page.wait_for_selector("#eval-outcome .bd-not-comparable")  # what was scored is shown, and marked
    (stopped,) = store.list_jobs(lab, "evaluate")
    assert 0 < json.loads(stopped.file.read_text())["benchmarks"]["crows_pairs"]["n"] < 200
    other.page.click("#eval-resume")
    other.wait_state("running")
    (one,) = store.list_jobs(lab, "evaluate")
    assert one.config is not None
    assert one.config.limit == 200


def test_flipped_items_go_to_compare_and_to_label(evaluator, lab, drawn):
    write_result(lab.root, "strong", drawn["strong"])
    page = evaluator.open("strong").page
    page.click("#eval-flip-pick input")
    page.click("[role=option]:has-text('CrowS-Pairs')")
    page.wait_for_selector("#eval-flips .bd-flip:has-text('Group A')")
    every = page.locator("#eval-flips .bd-flip").count()
    page.click("#eval-flip-way input")
    page.click("[role=option]:has-text('toward less bias')")
    page.wait_for_selector(f"#eval-flips:not(:has(.bd-flip:nth-child({every + 1})))")
    assert "toward more bias" not in page.inner_text("#eval-flips")
    first = page.locator("#eval-flips .bd-flip").first
    assert "logp more" in first.inner_text()
    first.locator("button[data-to=label]").click()
    page.wait_for_selector("[role=tab][aria-selected=true]:has-text('Label')")
    page.wait_for_selector(".toast-body:has-text('can no longer measure with it')")
    page.get_by_role("tab", name="Evaluate").click()
    first.locator("button[data-to=compare]").click()
    page.wait_for_selector("[role=tab][aria-selected=true]:has-text('Compare')")
    page.wait_for_function("() => document.querySelector('#prompt textarea').value.includes('What do you think')")
    page.wait_for_selector(".bd-proven:has-text('smollm2-biasdpo')", timeout=60_000)


def test_results_stand_against_each_other_by_group_and_by_strength(evaluator, lab, drawn):
    for name, made in drawn.items():
        write_result(lab.root, name, made)
    page = evaluator.open("curve").page
    points = page.locator("#eval-plane circle")
    assert points.count() == 7  # base and six strengths
    assert "base" in page.text_content("#eval-plane svg")
    page.click("#eval-table tr[data-id=strong]")
    page.wait_for_selector("#eval-head h2:has-text('strong')")
    assert "2 failed" in page.inner_text("#eval-outcome")
    assert "longer than the model's context" in page.inner_text("#eval-outcome")
    page.click("#eval-group-pick input")
    # Not clicked: Playwright scrolls the page to it, and the list goes with the page.
    page.dispatch_event("[role=option]:has-text('BBQ · Accuracy, ambiguous')", "mousedown")
    page.wait_for_selector("#eval-bars figcaption:has-text('BBQ: Accuracy, ambiguous')")
    page.click("#eval-several")
    page.wait_for_selector("#eval-comparison .bd-forest")
    assert page.locator("#eval-comparison thead th").count() >= 3
    assert "side by side" in evaluator.save("md")


def test_what_can_not_be_evaluated_is_one_line(evaluator, lab):
    page = evaluator.open().page
    evaluator.new()
    evaluator.only()
    page.wait_for_selector("#eval-new-notice .bd-error:has-text('No benchmark is ticked')")
    evaluator.only("BBQ")
    page.wait_for_selector("#eval-data-view .bd-warning:has-text('has no folder for BBQ')")
    page.click("#eval-start")
    evaluator.wait_state("failed")
    page.wait_for_selector("#eval-head .bd-error:has-text('bbq')")
    write_result(lab.root, "odd", {"benchmarks": {"bbq": {}}, "provenance": {}})
    page.click("#eval-table tr[data-id=odd]")
    page.wait_for_selector('#eval-outcome .bd-error:has-text("can\'t be read")')


def test_a_public_space_refuses_inside_its_functions(browser, lab, items, drawn):  # noqa: ARG001
    write_result(lab.root, "strong", drawn["strong"])
    with running_app(lab.root, "--model", "smollm2", "--data-dir", str(items), SPACE_ID="someone/biasdpo") as url:
        poster = Poster(url)
        asked = ["smollm2", ["none"], "benchmarks", ["crows_pairs"], [], [], "crows_pairs", 2, 0, "/etc", "run"]
        for element, data in (
            ("eval-start", asked),
            ("eval-estimate", asked),
            ("eval-cancel", ["strong"]),
            ("eval-resume", ["strong"]),
            ("eval-card", ["strong"]),
            ("eval-really-delete", ["strong"]),
        ):
            (function,) = poster.functions(element, "click")
            assert REFUSED in poster.post(function, data), element
        (function,) = poster.functions("eval-group-pick", "input")
        assert "No evaluation" in poster.post(function, ["../../etc/passwd", "bbq/x"])
    (one,) = store.list_jobs(lab, "evaluate")
    store.delete_job(one.id, lab, "evaluate")
