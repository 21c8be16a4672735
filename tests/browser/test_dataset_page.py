"""The Data set tab, as a workspace's owner uses it. Every test also fails on a console error or a request to another host."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biasdpo.data import journal, splits
from biasdpo.records import JudgmentMeta
from biasdpo.workspace import ASSETS, Workspace
from tests.app_process import running_app
from tests.browser.conftest import Visitor

EVIL = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> ${window.hacked = 3} {{value}} \"quoted\" & more"
)
SAMPLING = '{"max_new_tokens": 96, "temperature": 0.7, "seed": 7, "system": "", "strength": 1.0}'


def journal_rows() -> list[Any]:
    """Thirty judgments of oak, one a minute, then five that each have something of their own."""
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
        made = journal.new_judgment(f"To be withdrawn, the {name}", "Anyone.", "Nobody.")
        rows.append(replace(made, annotator="yew", created_at="2026-10-01T10:00:00.000+00:00"))
    return rows


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a known journal, in which the second of two was withdrawn."""
    workspace = Workspace(tmp_path_factory.mktemp("library"))
    rows = journal_rows()
    journal.append_all(workspace, rows)
    journal.retract(workspace, rows[-1].id)
    return workspace


@pytest.fixture(scope="module")
def library_app(browser, library: Workspace) -> Iterator[str]:  # noqa: ARG001 (no browser, no app)
    with running_app(library.root, "--model", "smollm2") as url:
        yield url


class Reader:
    """A visitor on the Data set tab."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.page = visitor.page

    def open(self) -> Reader:
        self.visitor.open(adapter="none")
        self.page.get_by_role("tab", name="Data set").click()
        self.page.wait_for_selector("#dataset-meter .bd-meter")
        return self

    def prompts(self) -> list[str]:
        return self.page.locator("#dataset-table tbody td:first-child").all_inner_texts()

    def wait_position(self, words: str) -> None:
        self.page.wait_for_selector(f"#dataset-position:has-text('{words}')")

    def pick(self, element: str, option: str) -> None:
        """Choose of a dropdown, by how the option begins."""
        self.page.click(f"#{element} input")
        self.page.locator(f"#{element}").get_by_role("option", name=re.compile(f"^{re.escape(option)}")).click()

    def search(self, words: str) -> None:
        self.page.fill("#dataset-search input, #dataset-search textarea", words)

    def read(self, prompt: str) -> str:
        """Choose a row by its prompt's beginning; the judgment in full, as text."""
        self.page.click(f"#dataset-table button:has-text({json.dumps(prompt)})")
        self.page.wait_for_selector(f"#dataset-detail .bd-text:has-text({json.dumps(prompt)})")
        return self.page.inner_text("#dataset-detail")

    def preview(self, file: Path) -> None:
        if not self.page.locator("#import-origin").is_visible():
            self.visitor.unfold("dataset-import")
        self.page.set_input_files("#import-file input[type=file]", str(file))
        self.page.wait_for_selector(f"#import-file:has([aria-label=Clear]):has-text({json.dumps(file.stem)})")
        self.page.click("#import-preview")
        self.page.wait_for_selector("#import-box")

    def import_(self) -> str:
        self.page.click("#import-button")
        self.page.wait_for_selector("#import-result .bd-done", timeout=60_000)
        return self.page.inner_text("#import-result")


@pytest.fixture
def reader(new_visitor, library_app: str) -> Reader:
    return Reader(new_visitor(library_app)).open()


def in_journal(workspace: Workspace, source: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in workspace.preferences.read_text().splitlines() if line.startswith("{")]
    return [row for row in rows if row["source"] == source]


def fact(reader: Reader, name: str) -> str:
    """A line of the provenance."""
    return str(reader.page.inner_text(f"#dataset-detail dt:text-is('{name}') + dd"))


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
    reader.search("no such words")
    reader.page.wait_for_selector("#dataset-table:has-text('No judgment is like that')")
    reader.search("")  # by deleting, as by typing
    reader.wait_position("1 to 15 of 15")
    reader.pick("dataset-filter-category", "All")
    reader.pick("dataset-filter-annotator", "All")
    reader.pick("dataset-filter-verdict", "tie (1)")
    reader.wait_position("1 to 1 of 1")
    assert reader.prompts() == ["A tie on rain?"]
    reader.pick("dataset-filter-verdict", "All")
    reader.pick("dataset-filter-state", "Withdrawn")
    # Its presence shows nothing: a withdrawn row stood among all, too.
    reader.page.wait_for_selector("#dataset-table tbody tr:not(.bd-withdrawn)", state="detached")
    assert "To be withdrawn, the second" in reader.prompts()


def test_a_judgment_in_full_with_its_provenance(reader):
    text = reader.read("Who repairs the roof")
    for part in ("preferred", "religion", "Muslims", "Whoever is trained for it.", "A man, of course.", "A note of elm's."):
        assert part in text
    assert "only chosen" in text
    edit = reader.page.locator("#dataset-detail section:has-text('Chosen was edited') .bd-diff")
    assert edit.locator("del").all_inner_texts() == ["dares"]
    assert edit.locator("ins").all_inner_texts() == ["is trained for it"]
    facts = {"Model": "smollm2", "Adapter": "demo", "Backend": "llamacpp", "Seed": "7", "Stood left": "tuned", "In": "4.2 s"}
    for name, value in (facts | {"Was chosen": "tuned", "By": "elm", "Source": "label"}).items():
        assert fact(reader, name) == value
    assert "temperature 0.7" in fact(reader, "Sampling")
    assert len(fact(reader, "Judgment")) == 32

    text = reader.read("A tie on rain?")
    assert "Left\nIt rains." in text
    assert "Chosen" not in text
    text = reader.read("To be withdrawn, the second")
    assert "withdrawn" in text
    assert fact(reader, "Withdrawn").endswith("UTC by yew")
    assert reader.page.locator("#dataset-withdraw").count() == 0


def test_what_others_wrote_is_text_and_never_runs(reader):
    text = reader.read(EVIL[:40])
    for part in (f"{EVIL} who?", f"{EVIL} anyone.", f"{EVIL} nobody.", f"import:{EVIL}"):
        assert part in text
    table = reader.page.inner_text("#dataset-table")
    assert "<script>window.hacked = 1</script>" in table
    assert "${window.hacked = 3} {{value}}" in table
    reader.page.click("#dataset-filter-category input")
    reader.page.get_by_role("option", name="<script>").wait_for()
    reader.page.get_by_role("option", name="<script>").click()
    reader.wait_position("1 to 1 of 1")
    reader.visitor.unfold("dataset-charts")
    reader.page.wait_for_selector("#dataset-charts .bd-chart:has-text('<script>')")
    assert reader.page.evaluate("() => window.hacked") is None
    assert reader.page.locator("#dataset-panes :is(script, img), #dataset-charts :is(script, img)").count() == 0


def test_withdrawing_asks_first(reader, library):
    reader.read("To be withdrawn, the first")
    reader.page.click("#dataset-withdraw")
    reader.page.click("#dataset-keep")
    reader.page.wait_for_selector("#dataset-really-withdraw", state="detached")
    before = library.preferences.read_text()
    reader.page.click("#dataset-withdraw")
    reader.page.wait_for_selector("#dataset-really-withdraw")
    assert library.preferences.read_text() == before
    reader.page.click("#dataset-really-withdraw")
    reader.page.wait_for_selector("#dataset-detail-notice:has-text('Withdrawn')")
    row = json.loads(library.preferences.read_text().splitlines()[-1])
    assert row["verdict"] == "retracted"
    assert row["retracts"] == fact(reader, "Judgment")
    reader.page.wait_for_selector("#dataset-table tr.bd-withdrawn:has-text('To be withdrawn, the first')")
    reader.page.wait_for_selector("#dataset-withdraw", state="detached")
    reader.page.wait_for_function("() => document.activeElement?.id === 'dataset-close'")  # the focus is not lost


def test_the_table_with_the_keyboard_alone(reader):
    reader.pick("dataset-filter-annotator", "oak")
    reader.wait_position("of 30")
    reader.page.focus("#dataset-next")
    reader.page.keyboard.press("Tab")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "ArrowDown"):
        reader.page.keyboard.press(key)
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_selector("#dataset-detail .bd-text:has-text('Prompt number 27 on work')")
    assert reader.page.locator("#dataset-table tr[aria-current]").all_inner_texts()[0].startswith("Prompt number 27")
    reader.page.keyboard.press("Tab")  # out of the table at once, whatever its length
    assert reader.page.evaluate("() => document.activeElement.id") == "dataset-withdraw"
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_selector("#dataset-keep")
    reader.page.focus("#dataset-keep")
    reader.page.keyboard.press("Enter")
    reader.page.wait_for_function("() => document.activeElement?.id === 'dataset-withdraw'")
    reader.page.keyboard.press("Tab")
    reader.page.keyboard.press("Enter")  # Close
    reader.page.wait_for_function("() => document.activeElement?.innerText === 'Prompt number 27 on work'")
    assert reader.page.locator("#dataset-detail").count() == 0


def test_an_import_keeps_the_good_rows_and_lists_the_bad_ones(reader, library, tmp_path):
    good = [{"q": f"Question {i}?", "better": f"Anyone, {i}.", "worse": EVIL, "about": "age"} for i in range(3)]
    bad = ['{"q": "", "better": "a", "worse": "b"}', f'{{"q": "same?", "better": "{"a" * 9}", "worse": "{"a" * 9}"}}', "no JSON"]
    file = tmp_path / "my own pairs.jsonl"
    file.write_text("\n".join([json.dumps(good[0]), *bad, json.dumps(good[1]), json.dumps(good[2])]) + "\n")
    reader.preview(file)
    assert "Say which columns hold the chosen and the rejected" in reader.page.inner_text("#import-first-rows")
    reader.page.click("#import-button")
    reader.page.wait_for_selector("#import-notice .bd-error:has-text('No column is chosen')")
    reader.pick("import-column-prompt", "q")
    reader.pick("import-column-chosen", "better")
    reader.pick("import-column-rejected", "worse")
    reader.page.wait_for_selector("#import-first-rows .bd-preview")
    assert "Not taken over: about." in reader.page.inner_text("#import-first-rows")
    reader.pick("import-column-category", "about")
    reader.page.wait_for_selector("#import-first-rows td:has-text('age')")
    assert reader.page.locator("#import-first-rows .bd-preview tbody tr").count() == 3
    assert "<script>" in reader.page.inner_text("#import-first-rows .bd-preview")
    listed = reader.page.inner_text("#import-first-rows .bd-bad-box")
    assert [line for line in (2, 3, 4) if f"line {line}" in listed] == [2, 3, 4]
    assert in_journal(library, "import:my own pairs") == []  # so far it was a preview

    told = reader.import_()
    assert "import:my own pairs: 3 new, 0 known already, 3 bad rows left out" in told
    assert re.search(r"line 2\s+q is empty", told)
    assert re.search(r"line 3\s+chosen and rejected are the same text", told)
    assert re.search(r"line 4\s+not JSON", told)
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
    for column, name in (("prompt", "q"), ("chosen", "better"), ("rejected", "worse"), ("category", "about")):
        reader.pick(f"import-column-{column}", name)
    assert "0 new, 3 known already" in reader.import_()


def test_a_file_without_a_good_row_and_no_file_and_no_hub_are_one_line_each(reader, tmp_path):
    reader.visitor.unfold("dataset-import")
    reader.page.click("#import-preview")
    reader.page.wait_for_selector("#import-notice .bd-error:has-text('No file yet')")
    file = tmp_path / "bad.csv"
    file.write_text("prompt,chosen,rejected\n,a,b\n")
    reader.preview(file)
    reader.page.click("#import-button")
    reader.page.wait_for_selector("#import-notice .bd-error")
    assert reader.page.inner_text("#import-notice") == (
        "No good row in bad.csv, 1 bad ones, the first in line 2: prompt is empty; fix the file, or choose other columns"
    )
    reader.page.click("#import-origin label:has-text('Hub')")  # not what was previewed
    reader.page.click("#import-button")
    reader.page.wait_for_selector("#import-notice .bd-error:has-text('is OWNER/NAME')")
    reader.page.click("#import-origin label:has-text('seed set')")
    reader.page.click("#import-button")
    reader.page.wait_for_selector("#import-notice .bd-error:has-text('press Preview again')")
    reader.page.click("#import-origin label:has-text('Hub')")
    reader.page.fill("#import-hub input, #import-hub textarea", "hub:../../etc/passwd")
    reader.page.click("#import-preview")
    reader.page.wait_for_selector("#import-notice .bd-error:has-text('is OWNER/NAME')")


@pytest.mark.parametrize(("title", "suffix"), [("JSONL", ".jsonl"), ("CSV", ".csv"), ("Parquet", ".parquet")])
def test_an_export_is_downloaded_and_read_back(reader, library, tmp_path, title, suffix):
    reader.visitor.unfold("dataset-export")
    reader.page.click(f"#export-format label:has-text('{title}')")
    reader.page.click("#export-button")
    reader.page.wait_for_selector("#export-notice .bd-done", timeout=60_000)
    files = {}
    for button in ("export-data", "export-card"):
        with reader.page.expect_download() as download:
            reader.page.click(f"#{button}")
        files[button] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[button])
    assert files["export-data"].name == f"biasdpo_pairs{suffix}"
    assert files["export-card"].read_text().startswith("---\n")
    if suffix == ".parquet":
        from pyarrow import parquet

        rows = parquet.read_table(files["export-data"]).to_pylist()
    elif suffix == ".csv":
        with files["export-data"].open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = [json.loads(line) for line in files["export-data"].read_text(encoding="utf-8").splitlines()]
    expected = [(pair.prompt, pair.chosen, pair.rejected) for pair in splits.load([splits.WORKSPACE], library)]
    assert sorted((row["prompt"], row["chosen"], row["rejected"]) for row in rows) == sorted(expected)
    assert f"{len(rows):,} pairs, with a data set card" in reader.page.inner_text("#export-notice")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_400_px_has_no_sideways_scrolling(new_visitor, library_app, scheme, tmp_path):
    narrow = Reader(new_visitor(library_app, viewport={"width": 400, "height": 800}, color_scheme=scheme)).open()
    narrow.read("Who repairs the roof")
    narrow.page.wait_for_function(  # it comes into view, since it stands under the table
        "() => Math.abs(document.getElementById('dataset-detail').getBoundingClientRect().top - 300) < 310"
    )
    for box in ("dataset-charts", "dataset-export"):
        narrow.visitor.unfold(box)
    narrow.page.wait_for_selector(".bd-charts")
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "w" * 300, "chosen": "a" * 300, "rejected": "b" * 300}) + "\n{}\n")
    narrow.preview(file)
    narrow.page.wait_for_selector("#import-first-rows .bd-preview")
    assert narrow.page.evaluate("() => document.documentElement.scrollWidth") <= 400
    wide = narrow.page.evaluate(
        "() => [...document.querySelectorAll('[role=tabpanel] :is(button, textarea, input, section, figure, .block)')]"
        ".filter(e => e.offsetParent && !e.closest('.bd-rows-box') && e.getBoundingClientRect().right > 400)"
        ".map(e => e.id + '.' + e.className)"
    )
    assert wide == []
    colours = narrow.page.evaluate(
        "() => ['.bd-text', '.bd-rows button', '.bd-provenance dd', '.bd-chart th', '.bd-bad-box td'].map((name) => "
        "getComputedStyle(document.querySelector(name)).color)"
    )
    for colour in colours:  # light text in the dark, dark text in the light
        assert (sum(map(float, re.findall(r"[\d.]+", colour)[:3])) > 380) == (scheme == "dark"), colours


def test_an_empty_workspace_says_how_to_get_pairs_and_takes_the_seed_set(new_visitor, tmp_path):
    with running_app(tmp_path, "--model", "smollm2") as url:
        reader = Reader(new_visitor(url)).open()
        told = reader.page.inner_text("#dataset-empty")
        assert all(word in told for word in ("Label", "Import", "seed set"))
        assert reader.page.locator("#dataset-browse").count() == 0
        reader.visitor.unfold("dataset-export")
        reader.page.click("#export-button")
        reader.page.wait_for_selector("#export-notice .bd-error:has-text('No preference pairs in the workspace yet')")
        reader.visitor.unfold("dataset-import")
        reader.page.click("#import-origin label:has-text('seed set')")
        reader.page.click("#import-preview")
        reader.page.wait_for_selector("#import-first-rows:has-text('import:seed_pairs')")
        count = len((ASSETS / "seed_pairs.jsonl").read_text(encoding="utf-8").splitlines())
        assert f"import:seed_pairs: {count} new" in reader.import_()
        reader.wait_position(f"of {count}")
        assert reader.page.locator("#dataset-empty").count() == 0
        reader.page.wait_for_selector(f"#dataset-meter:has-text('{count} pairs')")
        reader.visitor.unfold("dataset-charts")
        reader.page.wait_for_selector("#dataset-charts .bd-chart:has-text('religion')")
        reader.page.close()


def test_a_public_space_refuses_in_place_and_hides_nothing(new_visitor, tmp_path):
    workspace = Workspace(tmp_path)
    workspace.preferences.write_text('{"no": "row"}\n')
    journal.append(workspace, journal.new_judgment("Whose judgment is it?", "Anyone's.", "Nobody's."))
    before = workspace.preferences.read_text()
    with running_app(tmp_path, "--model", "smollm2", SPACE_ID="someone/biasdpo") as url:
        reader = Reader(new_visitor(url)).open()
        assert "1 line of preferences.jsonl is no judgment" in reader.page.inner_text("#dataset-trouble")
        reader.read("Whose judgment is it?")
        reader.page.click("#dataset-withdraw")
        reader.page.click("#dataset-really-withdraw")
        reader.page.wait_for_selector("#dataset-detail-notice .bd-error:has-text('on a public Space')")
        reader.visitor.unfold("dataset-import")
        reader.page.click("#import-preview")
        reader.page.wait_for_selector("#import-notice .bd-error:has-text('Import is switched off on a public Space')")
        reader.visitor.unfold("dataset-export")
        reader.page.click("#export-button")
        reader.page.wait_for_selector("#export-notice .bd-error:has-text('Export is switched off on a public Space')")
        assert workspace.preferences.read_text() == before
        reader.page.close()
