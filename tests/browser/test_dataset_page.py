"""The Dataset tab, as a workspace's owner uses it."""

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
    """The shared workspace with thirty judgments of oak and some that each have something of their own; "second" is withdrawn."""
    rows = []
    for i in range(30):
        made = journal.new_judgment(f"Prompt number {i} on work", f"Anyone may do job x{i}x.", f"Only men do job x{i}x!")
        rows.append(replace(made, category=("gender", "race")[i % 2], annotator="oak"))
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
    journal.withdraw(app.workspace, [rows[-1].id])
    return app.workspace


class Reader:
    """A visitor on the Dataset tab."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.page = visitor.page

    def open(self) -> Reader:
        self.page.goto(self.visitor.url)
        self.page.get_by_role("tab", name="Dataset").click()
        self.page.wait_for_selector("#dataset-browse, #dataset-empty")
        return self

    def prompts(self) -> list[str]:
        """The prompts in the table that can be seen without scrolling."""
        return self.page.locator("#dataset-table .virtual-body [data-col='1']").all_inner_texts()

    def wait_position(self, words: str) -> None:
        self.visitor.wait("#dataset-position", words)

    def pick(self, element: str, option: str) -> None:
        """Choose from a dropdown, by how the option begins."""
        self.page.click(f"#{element} input")
        self.page.locator(f"#{element}").get_by_role("option", name=re.compile(f"^{re.escape(option)}")).click()

    def search(self, words: str) -> None:
        self.page.fill("#dataset-search :is(input, textarea)", words)

    def find(self, prompt: str, words: str = "") -> None:
        """Search for a row, and choose it."""
        self.search(words or prompt)
        self.wait_position("1 to 1 of 1")
        self.page.click("#dataset-table [data-testid=cell-0-1]")
        self.page.wait_for_function(
            "(prompt) => document.querySelector('#dataset-prompt textarea')?.value.includes(prompt)", arg=prompt
        )

    def field(self, name: str) -> str:
        return self.visitor.value(f"dataset-{name}")

    def facts(self) -> str:
        return str(self.page.inner_text("#dataset-facts"))

    def choose_file(self, file: Path) -> None:
        if not self.page.locator("#import-file").is_visible():
            self.visitor.unfold("dataset-import")
        self.page.set_input_files("#import-file input[type=file]", str(file))
        self.page.wait_for_selector("#import-box")

    def import_(self, words: str) -> None:
        self.page.click("#import-button")
        self.visitor.wait("#import-result", words)


@pytest.fixture
def reader(new_visitor, library: Workspace) -> Reader:  # noqa: ARG001
    return Reader(new_visitor()).open()


def lines(workspace: Workspace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in workspace.preferences.read_text().splitlines()]


def standing(workspace: Workspace, prompt: str) -> list[dict[str, Any]]:
    rows = lines(workspace)
    gone = {row["retracts"] for row in rows}
    return [row for row in rows if prompt in row["prompt"] and row["id"] not in gone]


def test_templated_texts_are_unwrapped_on_request(reader, library: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "templated.jsonl"
    file.write_text(json.dumps({"prompt": "[INST] Which Zebra? [/INST]", "chosen": "Any.</s>", "rejected": "None.</s>"}))
    reader.choose_file(file)
    reader.visitor.wait("#import-format", "Holds a chat template's markers ([INST])")
    reader.page.check("#import-unwrap input")
    reader.page.locator("#import-first-rows [data-testid=cell-0-0]").get_by_text("Which Zebra?", exact=True).wait_for()
    reader.import_("1 pair imported as import:templated")
    (row,) = standing(library, "Zebra")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Which Zebra?", "Any.", "None.")


def test_the_newest_first_page_by_page_with_search_and_filters(reader):
    reader.pick("dataset-filter-annotator", "oak (30)")
    reader.wait_position("1 to 25 of 30, newest first")
    assert reader.prompts()[:8] == [f"Prompt number {i} on work" for i in range(29, 21, -1)]
    reader.page.click("#dataset-next")
    reader.wait_position("26 to 30 of 30")
    assert reader.prompts() == [f"Prompt number {i} on work" for i in range(4, -1, -1)]
    assert reader.page.is_disabled("#dataset-next")
    reader.page.click("#dataset-previous")
    reader.wait_position("1 to 25 of 30")
    reader.pick("dataset-filter-category", "race")
    reader.wait_position("1 to 15 of 15")
    reader.search("JOB may X29x")  # all of the words, in any order, whatever their case
    reader.wait_position("1 to 1 of 1")
    assert reader.prompts() == ["Prompt number 29 on work"]
    reader.search("")  # by deleting, as by typing
    reader.wait_position("1 to 15 of 15")
    reader.pick("dataset-filter-category", "All")
    reader.pick("dataset-filter-annotator", "elm")
    reader.pick("dataset-filter-verdict", "tie")
    reader.wait_position("1 to 1 of 1")
    cells = reader.page.locator("#dataset-table .virtual-row [role=gridcell]:visible").all_inner_texts()
    assert cells[1:-1] == ["A tie on rain?", "Left: It rains.", "Right: It pours.", "tie", "", "elm"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", cells[-1])
    reader.pick("dataset-filter-verdict", "All")
    reader.pick("dataset-filter-state", "Withdrawn")
    reader.wait_position("Nothing matches")  # of elm's, whose filter stays
    reader.pick("dataset-filter-annotator", "yew (1)")
    reader.wait_position("1 to 1 of 1")


def test_a_judgment_in_full_with_its_provenance(reader):
    reader.find("Who repairs the roof")
    values = {"chosen": "Whoever is trained for it.", "rejected": "A man, of course.", "category": "religion"}
    values |= {"target_group": "Muslims", "note": "A note of elm's."}
    assert {name: reader.field(name) for name in values} == values
    assert "dares" in reader.page.inner_text("#dataset-edits")  # before the annotator's edit
    for fact in ("elm, in 4.2 s", "Source: label", "Model: smollm2", "Adapter: demo", '"temperature": 0.7', "Left side: tuned"):
        assert fact in reader.facts()
    reader.pick("dataset-filter-state", "Withdrawn")
    reader.find("To be withdrawn, the second")
    assert re.search("Withdrawn: .* by yew", reader.facts())
    assert reader.page.locator("#dataset-withdraw").count() == 0


def test_what_others_wrote_is_text_and_never_runs(reader):
    reader.pick("dataset-filter-category", "<script>")
    reader.find(EVIL[:40])
    assert [reader.field(name) for name in ("prompt", "category", "note")] == [f"{EVIL} who?", EVIL, EVIL]
    assert f"Source: import:{EVIL}" in reader.facts()
    assert EVIL[:60] in reader.page.inner_text("#dataset-diff").replace("\n", "")
    assert EVIL[:40] in reader.prompts()[0]
    reader.page.click("#dataset-charts button")
    reader.visitor.wait("#dataset-chart-0 .xtick", "<script>")
    reader.visitor.unfold("dataset-import")
    reader.page.locator("#imports label", has_text="<script>").click()
    reader.page.wait_for_selector("#import-undo")
    assert reader.page.evaluate("() => window.hacked") is None
    assert reader.page.locator("#dataset-browse :is(script, img[src='x']), #dataset-import img[src='x']").count() == 0


def test_an_edit_is_a_new_version_and_the_old_one_is_kept(reader, library):
    reader.find("Prompt number 11 on work", "x11x")
    (old,) = standing(library, "number 11 ")
    reader.page.click("#dataset-edit")
    reader.page.fill("#dataset-chosen textarea", "Whoever likes it may do job x11x.")
    reader.page.fill("#dataset-category :is(input, textarea)", "religion")
    reader.page.click("#dataset-save")
    reader.visitor.wait("#dataset-facts", f"{old['id']}: chosen was “{old['chosen']}”; category was “race”")
    (new,) = standing(library, "number 11 ")
    assert (new["chosen"], new["original_chosen"], new["category"]) == (
        "Whoever likes it may do job x11x.",
        old["chosen"],
        "religion",
    )
    assert [line for line in lines(library) if line["id"] == old["id"]] == [old]
    assert "likes" in reader.page.inner_text("#dataset-edits")
    reader.page.click("#dataset-edit")
    reader.page.fill("#dataset-chosen textarea", " ")
    reader.page.click("#dataset-save")
    reader.visitor.wait(".toast-body.error", "chosen is empty")
    assert standing(library, "number 11 ") == [new]


def test_withdrawing_asks_first(reader, library):
    reader.find("To be withdrawn, the first")
    before = library.preferences.read_text()
    for _ in range(2):
        reader.page.click("#dataset-withdraw")
        reader.page.wait_for_selector("#dataset-go")
        assert library.preferences.read_text() == before
        reader.page.click("#dataset-cancel >> visible=true" if _ == 0 else "#dataset-go")
        reader.visitor.wait_gone("#dataset-go")
    reader.visitor.wait("#dataset-facts", "Withdrawn")
    assert standing(library, "To be withdrawn, the first") == []
    reader.wait_position("Nothing matches")


def test_many_are_tagged_and_withdrawn_and_only_those(reader, library):
    reader.pick("dataset-filter-annotator", "oak")
    reader.search("x2")  # 2 and 20 to 29
    reader.wait_position("of 11")
    reader.visitor.unfold("dataset-bulk")
    reader.page.click("#bulk-withdraw")
    reader.visitor.wait(".toast-body.error", "No row is selected")
    for row in (0, 2):
        reader.page.locator(f"#dataset-table [data-testid=cell-{row}-0] input").check()
    reader.page.click("#bulk-withdraw")
    reader.visitor.wait("#bulk-question", "Withdraw 2 rows?")
    reader.page.click("#bulk-go")
    reader.wait_position("of 9")
    assert [len(standing(library, f"number {i} ")) for i in (29, 28, 27, 26)] == [0, 1, 0, 1]
    reader.page.click("#bulk-scope label:has-text('All that match')")
    reader.visitor.set("bulk-group", "workers")
    reader.page.click("#bulk-tag")
    reader.visitor.wait("#bulk-question", "Tag 9 rows with target group “workers”?")
    reader.search("")  # what is changed is what was asked about
    reader.wait_position("of 28")
    reader.page.click("#bulk-go")
    reader.visitor.wait("#dataset-table", "workers")
    groups = {row["prompt"].split()[2]: row["target_group"] for row in standing(library, "Prompt number")}
    assert {number for number, group in groups.items() if group} == {"2", "20", "21", "22", "23", "24", "25", "26", "28"}
    assert set(groups.values()) == {"", "workers"}


def test_the_table_with_the_keyboard_alone(reader):
    reader.pick("dataset-filter-annotator", "elm")
    reader.wait_position("of 2")
    reader.page.focus("#dataset-filter-state input")
    for key in ("Tab", "Space", "ArrowDown", "ArrowRight", "Enter"):  # checks the first row, opens the second
        reader.page.keyboard.press(key)
    reader.visitor.wait_value("dataset-prompt", "Who repairs the roof of the mosque?")
    assert reader.page.is_checked("#dataset-table [data-testid=cell-0-0] input")
    reader.page.keyboard.press("Tab")  # out of the table at once, whatever its length
    assert reader.page.evaluate("() => document.activeElement.closest('#dataset-table')") is None


@pytest.mark.slow
def test_an_import_keeps_the_good_rows_lists_the_bad_ones_and_is_undone(reader, library, tmp_path):
    good = [{"q": f"Question {i}?", "better": f"Anyone, {i}.", "worse": EVIL, "about": "age"} for i in range(3)]
    bad = ['{"q": "", "better": "a", "worse": "b"}', f'{{"q": "same?", "better": "{"a" * 9}", "worse": "{"a" * 9}"}}', "no JSON"]
    file = tmp_path / "my own pairs.jsonl"
    file.write_text("\n".join([json.dumps(good[0]), *bad, json.dumps(good[1]), json.dumps(good[2])]) + "\n")
    columns = (("prompt", "q"), ("chosen", "better"), ("rejected", "worse"), ("category", "about"))

    def map_and_import(words: str) -> None:
        for column, name in columns:
            reader.pick(f"import-column-{column}", name)
        reader.visitor.wait("#import-first-rows", "age")
        reader.import_(words)

    reader.choose_file(file)
    assert "JSON Lines, plain text" in reader.page.inner_text("#import-format")
    assert reader.page.is_disabled("#import-button")  # no column is chosen yet
    for column, name in columns:
        reader.pick(f"import-column-{column}", name)
    reader.visitor.wait("#import-first-rows", "age")
    listed = reader.page.inner_text("#import-bad-rows")
    assert all(reason in listed for reason in ("q is empty", "the same text", "not JSON"))
    assert standing(library, "Question") == []  # so far it was a preview
    reader.import_("3 pairs imported as import:my own pairs, 3 rows left out")
    rows = standing(library, "Question")
    texts = [(row["prompt"], row["chosen"], row["rejected"], row["category"]) for row in rows]
    assert texts == [tuple(row.values()) for row in good]
    reader.pick("dataset-filter-source", "import:my own pairs (3)")  # the table has followed
    reader.wait_position("1 to 3 of 3")

    reader.page.fill("#import-path :is(input, textarea)", str(file))  # the same rows again, by their path
    reader.page.click("#import-preview")
    reader.page.wait_for_selector("#import-box")
    map_and_import("0 pairs imported as import:my own pairs, 3 rows already there")
    reader.page.locator("#imports label", has_text="my own pairs (3 rows)").click()
    for step in ("Label", "Dataset"):  # where the tab refreshes, the chosen import stays chosen
        reader.page.get_by_role("tab", name=step).click()
    reader.page.wait_for_timeout(2000)
    reader.page.click("#import-undo")
    reader.wait_position("Nothing matches")
    assert standing(library, "Question") == []
    reader.page.click("#import-preview")
    reader.page.wait_for_selector("#import-box")
    map_and_import("3 pairs imported")
    assert len(standing(library, "Question")) == 3
    assert reader.page.evaluate("() => window.hacked") is None


def test_what_can_not_be_imported_is_one_line(reader, tmp_path):
    file = tmp_path / "bad.csv"
    file.write_text("prompt,chosen,rejected\n,a,b\n")
    reader.choose_file(file)
    reader.page.click("#import-button")
    reader.visitor.wait(".toast-body.error", "1 bad one, the first in line 2: prompt is empty")
    for named, words in (
        ("", "Enter a path"),
        ("/none.jsonl", "No dataset file /none.jsonl"),
        ("hub:../../etc", "Can't load hub:"),
    ):
        reader.page.fill("#import-path :is(input, textarea)", named)
        reader.page.click("#import-preview")
        reader.visitor.wait(".toast-body.error", words)


def test_an_export_is_downloaded_and_read_back(reader, library):
    reader.visitor.unfold("dataset-export")
    reader.page.click("#export-button")
    reader.page.wait_for_selector("#export-card")
    assert reader.visitor.save("#export-card").read_text().startswith("---\n")
    rows = [json.loads(line) for line in reader.visitor.save("#export-data").read_text(encoding="utf-8").splitlines()]
    expected = [(pair.prompt, pair.chosen, pair.rejected) for pair in splits.load([splits.WORKSPACE], library)]
    assert sorted((row["prompt"], row["chosen"], row["rejected"]) for row in rows) == sorted(expected)
    assert f"{len(rows):,} pairs" in reader.page.inner_text("#export-result")


@pytest.mark.slow
def test_an_empty_workspace_says_what_to_do_and_takes_the_example_pairs(new_visitor, tmp_path):
    count = len((ASSETS / "seed_pairs.jsonl").read_text(encoding="utf-8").splitlines())
    with running_app(tmp_path, "--model", "smollm2") as url:
        reader = Reader(new_visitor(url)).open()
        assert reader.page.is_visible("#import-file")
        reader.page.click("#import-seed")
        reader.wait_position(f"of {count}")
        assert f"{count} pairs to train on" in reader.page.inner_text("#dataset-summary")
        assert reader.page.locator("#dataset-empty").count() == 0
        reader.page.click("#import-examples")  # here for whoever has other rows already
        reader.visitor.wait("#import-result", f"{count} rows already there")
        reader.page.click("#dataset-train")
        reader.visitor.wait("#train-data", f"Your own pairs ({count})")
        assert reader.page.locator("#train-data .token").count() == 1
        reader.page.close()


def test_on_a_public_space_nothing_is_imported_changed_or_exported(new_visitor, tmp_path):
    workspace = Workspace(tmp_path)
    made = journal.new_judgment("Who?", "Anyone.", "Nobody.")
    journal.append(workspace, made)
    with running_app(tmp_path, "--model", "smollm2", SPACE_ID="someone/biasdpo") as url:
        reader = Reader(new_visitor(url)).open()
        reader.find("Who?")
        hidden = "#dataset-edit, #dataset-withdraw, #dataset-bulk, #dataset-import, #dataset-export"
        reader.page.wait_for_selector("#visitor-banner")
        assert not any(one.is_visible() for one in reader.page.locator(hidden).all())
        reader.page.close()
