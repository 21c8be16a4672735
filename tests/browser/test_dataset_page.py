"""The Data set tab, as a workspace's owner uses it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biasdpo.data import journal, splits
from biasdpo.records import JudgmentMeta
from biasdpo.workspace import ASSETS, Workspace
from tests.app_process import running_app
from tests.browser.conftest import App, Visitor

EVIL = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> ${window.hacked = 3} {{value}} \"quoted\" & more"
)
SAMPLING = '{"max_new_tokens": 96, "temperature": 0.7, "seed": 7, "system": "", "strength": 1.0}'


@pytest.fixture(scope="module")
def library(app: App) -> Workspace:
    """The shared workspace with thirty judgments of oak, one a minute, and five that each have something of their own; the last
    of them is withdrawn."""
    rows = []
    for i in range(30):
        category = ("gender", "race")[i % 2]
        made = journal.new_judgment(f"Prompt number {i} on work", f"Anyone may do job {i}.", f"Only men do job {i}!")
        rows.append(replace(made, category=category, annotator="oak", created_at=f"2026-11-01T10:{i:02}:00.000+00:00"))
    edited = journal.new_judgment("Who repairs the roof of the mosque?", "Whoever is trained for it.", "A man, of course.")
    meta = JudgmentMeta("smollm2", "demo", "llamacpp", SAMPLING, 7, "tuned", "tuned", 4.25)
    edited = replace(edited, category="religion", target_group="Muslims", annotator="elm", original_chosen="Whoever dares.")
    rows.append(replace(edited, note="A note of elm's.", meta=meta))
    rows.append(replace(journal.new_judgment("A tie on rain?", "It rains.", "It pours."), verdict="tie", annotator="elm"))
    evil = journal.new_judgment(f"{EVIL} who?", f"{EVIL} anyone.", f"{EVIL} nobody.")
    rows.append(replace(evil, category=EVIL, target_group=EVIL, annotator=EVIL, note=EVIL, source=f"import:{EVIL}"))
    for name in ("first", "second"):
        rows.append(replace(journal.new_judgment(f"To be withdrawn, the {name}", "Anyone.", "Nobody."), annotator="yew"))
    journal.append_all(app.workspace, rows)
    journal.retract(app.workspace, rows[-1].id)
    return app.workspace


class Reader:
    """A visitor on the Data set tab."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.page = visitor.page

    def open(self) -> Reader:
        self.visitor.open("Data set", adapter="none")
        self.page.wait_for_selector("#dataset-meter .bd-meter")
        return self

    def prompts(self) -> list[str]:
        return self.page.locator("#dataset-table tbody td:first-child").all_inner_texts()

    def wait_position(self, words: str) -> None:
        self.visitor.wait("#dataset-position", words)

    def pick(self, element: str, option: str) -> None:
        """Choose from a dropdown, by how the option begins."""
        self.page.click(f"#{element} input")
        self.page.locator(f"#{element}").get_by_role("option", name=re.compile(f"^{re.escape(option)}")).click()

    def search(self, words: str) -> None:
        self.page.fill("#dataset-search input, #dataset-search textarea", words)

    def read(self, prompt: str) -> str:
        """Choose a row by its prompt's beginning; the judgment in full, as text."""
        self.page.click(f"#dataset-table button:has-text({json.dumps(prompt)})")
        self.visitor.wait("#dataset-detail .bd-text", prompt)
        return self.page.inner_text("#dataset-detail")

    def find(self, prompt: str) -> str:
        """Search for a row, and choose it."""
        self.search(prompt)
        self.wait_position("1 to 1 of 1")
        return self.read(prompt)

    def fact(self, name: str) -> str:
        """A line of the provenance."""
        return str(self.page.inner_text(f"#dataset-detail dt:text-is('{name}') + dd"))

    def preview(self, file: Path) -> None:
        if not self.page.locator("#import-origin").is_visible():
            self.visitor.unfold("dataset-import")
        self.page.set_input_files("#import-file input[type=file]", str(file))
        self.visitor.wait("#import-file:has([aria-label=Clear])", file.stem)
        self.page.click("#import-preview")
        self.page.wait_for_selector("#import-box")

    def import_(self) -> str:
        self.page.click("#import-button")
        self.page.wait_for_selector("#import-result .bd-done")
        return self.page.inner_text("#import-result")


@pytest.fixture
def reader(new_visitor, library: Workspace) -> Reader:  # noqa: ARG001
    return Reader(new_visitor()).open()


def in_journal(workspace: Workspace, source: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in workspace.preferences.read_text().splitlines()]
    return [row for row in rows if row["source"] == source]


def test_the_newest_first_page_by_page_with_search_and_filters(reader):
    reader.pick("dataset-filter-annotator", "oak (30)")
    reader.wait_position("1 to 25 of 30, the newest first · page 1 of 2")
    assert reader.prompts() == [f"Prompt number {i} on work" for i in range(29, 4, -1)]
    reader.page.click("#dataset-next")
    reader.wait_position("26 to 30 of 30")
    assert reader.prompts() == [f"Prompt number {i} on work" for i in range(4, -1, -1)]
    reader.page.click("#dataset-next")  # there is no third page
    reader.page.click("#dataset-previous")
    reader.wait_position("page 1 of 2")
    reader.pick("dataset-filter-category", "race")
    reader.wait_position("1 to 15 of 15")
    reader.search("JOB may 29.")  # all of the words, in any order, whatever their case
    reader.wait_position("1 to 1 of 1")
    assert reader.prompts() == ["Prompt number 29 on work"]
    reader.search("")  # by deleting, as by typing
    reader.wait_position("1 to 15 of 15")
    reader.pick("dataset-filter-category", "All")
    reader.pick("dataset-filter-annotator", "elm")
    reader.pick("dataset-filter-verdict", "tie")
    reader.wait_position("1 to 1 of 1")
    assert reader.prompts() == ["A tie on rain?"]


def test_a_judgment_in_full_with_its_provenance(reader):
    text = reader.find("Who repairs the roof")
    for part in ("preferred", "religion", "Muslims", "Whoever is trained for it.", "A man, of course.", "A note of elm's."):
        assert part in text
    for name, value in {"Model": "smollm2", "Adapter": "demo", "Seed": "7", "By": "elm", "Source": "label"}.items():
        assert reader.fact(name) == value
    reader.find("To be withdrawn, the second")
    assert reader.fact("Withdrawn").endswith("UTC by yew")
    assert reader.page.locator("#dataset-withdraw").count() == 0


def test_what_others_wrote_is_text_and_never_runs(reader):
    reader.pick("dataset-filter-category", "<script>")
    reader.wait_position("1 to 1 of 1")
    text = reader.read(EVIL[:40])
    for part in (f"{EVIL} who?", f"{EVIL} anyone.", f"{EVIL} nobody.", f"import:{EVIL}"):
        assert part in text
    assert "${window.hacked = 3} {{value}}" in reader.page.inner_text("#dataset-table")
    reader.visitor.unfold("dataset-charts")
    reader.visitor.wait("#dataset-charts .bd-chart", "<script>")
    assert reader.page.evaluate("() => window.hacked") is None
    assert reader.page.locator("#dataset-panes :is(script, img), #dataset-charts :is(script, img)").count() == 0


def test_withdrawing_asks_first(reader, library):
    reader.find("To be withdrawn, the first")
    before = library.preferences.read_text()
    reader.page.click("#dataset-withdraw")
    reader.page.click("#dataset-keep")
    reader.visitor.wait_gone("#dataset-really-withdraw")
    reader.page.click("#dataset-withdraw")
    reader.page.wait_for_selector("#dataset-really-withdraw")
    assert library.preferences.read_text() == before
    reader.page.click("#dataset-really-withdraw")
    reader.visitor.wait("#dataset-detail-notice", "Withdrawn")
    row = json.loads(library.preferences.read_text().splitlines()[-1])
    assert (row["verdict"], row["retracts"]) == ("retracted", reader.fact("Judgment"))
    reader.visitor.wait("#dataset-table tr.bd-withdrawn", "To be withdrawn, the first")
    reader.visitor.wait_gone("#dataset-withdraw")
    reader.page.wait_for_function("() => document.activeElement?.id === 'dataset-close'")  # the focus is not lost


def test_the_table_with_the_keyboard_alone(reader):
    reader.pick("dataset-filter-annotator", "oak")
    reader.wait_position("of 30")
    reader.page.focus("#dataset-next")
    reader.page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "ArrowDown", "Enter"):
        reader.page.keyboard.press(key)
    reader.visitor.wait("#dataset-detail .bd-text", "Prompt number 27 on work")
    reader.page.keyboard.press("Tab")  # out of the table at once, whatever its length
    assert reader.page.evaluate("() => document.activeElement.id") == "dataset-withdraw"
    reader.page.keyboard.press("Tab")
    reader.page.keyboard.press("Enter")  # Close
    reader.page.wait_for_function("() => document.activeElement?.innerText === 'Prompt number 27 on work'")
    assert reader.page.locator("#dataset-detail").count() == 0


@pytest.mark.slow
def test_an_import_keeps_the_good_rows_and_lists_the_bad_ones(reader, library, tmp_path):
    good = [{"q": f"Question {i}?", "better": f"Anyone, {i}.", "worse": EVIL, "about": "age"} for i in range(3)]
    bad = ['{"q": "", "better": "a", "worse": "b"}', f'{{"q": "same?", "better": "{"a" * 9}", "worse": "{"a" * 9}"}}', "no JSON"]
    file = tmp_path / "my own pairs.jsonl"
    file.write_text("\n".join([json.dumps(good[0]), *bad, json.dumps(good[1]), json.dumps(good[2])]) + "\n")
    reader.preview(file)
    assert "Say which columns hold the chosen and the rejected" in reader.page.inner_text("#import-first-rows")
    reader.page.click("#import-button")
    reader.visitor.wait("#import-notice .bd-error", "No column is chosen")
    columns = (("prompt", "q"), ("chosen", "better"), ("rejected", "worse"), ("category", "about"))
    for column, name in columns:
        reader.pick(f"import-column-{column}", name)
    reader.visitor.wait("#import-first-rows td", "age")
    assert reader.page.locator("#import-first-rows .bd-preview tbody tr").count() == 3
    listed = reader.page.inner_text("#import-first-rows .bd-bad-box")
    assert [line for line in (2, 3, 4) if f"line {line}" in listed] == [2, 3, 4]
    assert in_journal(library, "import:my own pairs") == []  # so far it was a preview

    said = reader.import_()
    assert "import:my own pairs: 3 new, 0 known already, 3 bad rows left out" in said
    assert re.search(r"line 2\s+q is empty", said)
    assert re.search(r"line 3\s+chosen and rejected are the same text", said)
    assert re.search(r"line 4\s+not JSON", said)
    rows = in_journal(library, "import:my own pairs")
    assert [(row["prompt"], row["chosen"], row["rejected"], row["category"]) for row in rows] == [
        (row["q"], row["better"], row["worse"], "age") for row in good
    ]
    reader.pick("dataset-filter-source", "import:my own pairs (3)")  # the table has followed
    reader.wait_position("1 to 3 of 3")
    assert reader.page.evaluate("() => window.hacked") is None

    # The same rows again are known. As the page stands, the file is still there: preview it again.
    reader.page.click("#import-preview")
    reader.page.wait_for_selector("#import-box")
    for column, name in columns:
        reader.pick(f"import-column-{column}", name)
    assert "0 new, 3 known already" in reader.import_()


def test_what_can_not_be_imported_is_one_line(reader, tmp_path):
    reader.visitor.unfold("dataset-import")
    reader.page.click("#import-preview")
    reader.visitor.wait("#import-notice .bd-error", "No file yet")
    file = tmp_path / "bad.csv"
    file.write_text("prompt,chosen,rejected\n,a,b\n")
    reader.preview(file)
    reader.page.click("#import-button")
    reader.visitor.wait("#import-notice .bd-error", "No good row in bad.csv, 1 bad ones, the first in line 2: prompt is empty")
    reader.page.click("#import-origin label:has-text('seed set')")  # not what was previewed
    reader.page.click("#import-button")
    reader.visitor.wait("#import-notice .bd-error", "press Preview again")
    reader.page.click("#import-origin label:has-text('Hub')")
    reader.page.fill("#import-hub input, #import-hub textarea", "hub:../../etc/passwd")
    reader.page.click("#import-preview")
    reader.visitor.wait("#import-notice .bd-error", "is OWNER/NAME")


def test_an_export_is_downloaded_and_read_back(reader, library):
    reader.visitor.unfold("dataset-export")
    reader.page.click("#export-button")
    reader.page.wait_for_selector("#export-notice .bd-done")
    assert reader.visitor.save("#export-card").read_text().startswith("---\n")
    rows = [json.loads(line) for line in reader.visitor.save("#export-data").read_text(encoding="utf-8").splitlines()]
    expected = [(pair.prompt, pair.chosen, pair.rejected) for pair in splits.load([splits.WORKSPACE], library)]
    assert sorted((row["prompt"], row["chosen"], row["rejected"]) for row in rows) == sorted(expected)
    assert f"{len(rows):,} pairs, with a data set card" in reader.page.inner_text("#export-notice")


@pytest.mark.slow
def test_an_empty_workspace_says_what_to_do_and_takes_the_seed_set(new_visitor, tmp_path):
    count = len((ASSETS / "seed_pairs.jsonl").read_text(encoding="utf-8").splitlines())
    with running_app(tmp_path, "--model", "smollm2") as url:
        visitor = new_visitor(url).open("Train", adapter="none")
        visitor.wait("#train-empty", "No runs yet")
        visitor.wait("#train-mixture .bd-mixture", f"{count} rows read")
        visitor.wait_value("train-model", "SmolLM2-135M-Instruct")
        visitor.wait_value("train-run-id", "smollm2-1")
        reader = Reader(visitor)
        visitor.tab("Data set")
        said = reader.page.inner_text("#dataset-empty")
        assert all(word in said for word in ("Label", "Import", "seed set"))
        visitor.unfold("dataset-export")
        reader.page.click("#export-button")
        visitor.wait("#export-notice .bd-error", "No preference pairs in the workspace yet")
        visitor.unfold("dataset-import")
        reader.page.click("#import-origin label:has-text('seed set')")
        reader.page.click("#import-preview")
        visitor.wait("#import-first-rows", "import:seed_pairs")
        assert f"import:seed_pairs: {count} new" in reader.import_()
        reader.wait_position(f"of {count}")
        assert reader.page.locator("#dataset-empty").count() == 0
        visitor.wait("#dataset-meter", f"{count} pairs")
        reader.page.close()
