"""What the Data set tab shows and asks: pure functions of rows, and handlers without a page."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from biasdpo.data import importing, journal
from biasdpo.data.importing import ColumnMapping, ForeignPair, Imported, Preview
from biasdpo.data.journal import BadLine
from biasdpo.data.summary import Counts, Page, Query, count, length_class
from biasdpo.engines import EnginePool
from biasdpo.errors import ConfigError
from biasdpo.records import JudgmentMeta
from biasdpo.ui import components, dataset
from biasdpo.ui.components import Store
from biasdpo.ui.dataset import DatasetActions, FileActions, View
from biasdpo.ui.label import Judged, LabelSessions
from biasdpo.workspace import Workspace

EVIL = "<script>alert(1)</script>\"'`&"
SAMPLING = '{"max_new_tokens": 96, "temperature": 0.7, "seed": 7, "system": ""}'


def row(prompt: str = "Who?", chosen: str = "Anyone may.", rejected: str = "Men may.", **columns: Any) -> dict[str, Any]:
    made = asdict(replace(journal.new_judgment(prompt, chosen, rejected), created_at="2026-11-24T22:15:59.123+00:00"))
    return made | {name: asdict(value) if name == "meta" else value for name, value in columns.items()}


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def page_of(*rows: dict[str, Any], total: int = 60, number: int = 1, retracted: frozenset[str] = frozenset()) -> Page:
    return Page(tuple(rows), retracted, total, number, 3)


# The table and one judgment


def test_position_in_plain_numbers():
    told = words(dataset.position(page_of(row(), row(), total=1227), 25))
    assert told == "26 to 27 of 1,227 , the newest first · page 2 of 3"  # the second page of 25
    assert "Nothing found" in dataset.position(Page((), frozenset(), 0, 0, 1), 25)


def test_a_table_marks_what_is_chosen_and_what_was_withdrawn():
    rows = [row(f"Prompt {i}") for i in range(3)]
    html = dataset.table(page_of(*rows, retracted=frozenset({rows[2]["id"]})), rows[1]["id"])
    lines = re.findall(r"<tr data-id.*?</tr>", html)
    assert [("aria-current" in line, "bd-withdrawn" in line) for line in lines] == [(False, False), (True, False), (False, True)]
    # One row takes the focus from outside: the chosen one, else the first.
    assert re.findall(r'tabindex="(-?\d)"', html) == ["-1", "0", "-1"]
    assert re.findall(r'tabindex="(-?\d)"', dataset.table(page_of(*rows), "")) == ["0", "-1", "-1"]
    assert "clear the search" in dataset.table(page_of(), "")


def test_a_judgment_says_where_it_comes_from():
    meta = JudgmentMeta("smollm2", "demo", "llamacpp", SAMPLING, 0, "tuned", "base", 4.25)
    judged = row(annotator="oak", category="gender", original_rejected="Only men may.", note="hm", meta=meta)
    retraction = row(annotator="elm")
    html = dataset.detail(judged, retraction)
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert facts == {
        "Judged": "2026-11-24 22:15 UTC",
        "By": "oak",
        "In": "4.2 s",
        "Source": "label",
        "Withdrawn": "2026-11-24 22:15 UTC by elm",
        "Model": "smollm2",
        "Adapter": "demo",
        "Backend": "llamacpp",
        "Sampling": "max new tokens 96, temperature 0.7",
        "Seed": "0",  # a seed like any other
        "Stood left": "tuned",
        "Was chosen": "base",
        "Judgment": judged["id"],
        "Pair": judged["pair_id"],
    }
    assert "<del>Men</del><ins>Anyone</ins>" in html  # rejected against chosen
    assert "<del>Only men</del><ins>Men</ins>" in html  # the edit
    assert "Rejected was edited" in html


def test_a_tie_has_a_left_and_a_right():
    html = dataset.detail(row(verdict="tie"), None)
    assert "<h4>Left</h4>" in html
    assert "Chosen" not in html
    assert "Seed" not in html  # nothing was generated here


def test_texts_too_long_to_compare_are_shown_all_the_same():
    long = "word " * 1000  # 5,000 characters
    html = dataset.detail(row(chosen=long, original_chosen=long + "more"), None)
    assert html.count("Only texts of up to 4,000 characters") == 2
    assert long + "more" in html
    assert "<ins>" not in html


# Counts


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((49, 100), 0),
        ((1, 2), 1),
        ((3, 4), 2),
        ((99, 100), 2),
        ((7, 7), 3),
        ((4, 3), 4),
        ((2, 1), 5),
        ((201, 100), 6),
        ((5, 0), 6),
    ],
)
def test_length_classes_are_symmetric_around_the_same_length(lengths, expected):
    assert length_class(*lengths) == expected
    if min(lengths) > 0:
        assert length_class(*reversed(lengths)) == 6 - expected


def test_counts_are_of_what_stands_without_hidden_repeats():
    rows = [
        row(category="gender", chosen="aa", rejected="b"),  # 2 times as long: class 5
        row(category="gender", chosen="aaa", rejected="b", created_at="no time"),
        row(verdict="tie", source="compare"),
        row(repeat_of="x" * 32),
    ]
    counts = count(rows)
    assert counts.judgments == 3
    assert counts.by_category == {"gender": 2}
    assert counts.by_verdict == {"preferred": 2, "tie": 1}
    assert counts.by_source == {"label": 2, "compare": 1}
    assert counts.by_day == {date(2026, 11, 24): 2}
    assert counts.by_length == (0, 0, 0, 0, 0, 1, 1)
    assert (counts.shorter, counts.longer) == (0, 2)


def test_charts_count_the_rest_together_and_show_pauses():
    sources = Counter({f"source {i:02}": 20 - i for i in range(12)})
    days = Counter({date(2026, 11, 1): 3, date(2026, 11, 4): 6, date(2026, 9, 1): 5})
    html = dataset.charts(Counts(14, Counter({"": 14}), Counter({"preferred": 14}), sources, days, (1, 0, 0, 1, 0, 0, 2)))
    assert "2 others" in html
    assert re.search(r"2 others</th>.*?<td>19</td>", html)  # 20 - 10 + 20 - 11
    assert "no category" in html
    heights = re.findall(r'height: ([\d.]+)%" title="(\S+):', html)
    assert len(heights) == 30
    assert heights[-4:] == [("50.0", "2026-11-01"), ("0.0", "2026-11-02"), ("0.0", "2026-11-03"), ("100.0", "2026-11-04")]
    assert "5 before that" in html
    assert "longer one in 50.0%, the shorter one in 25.0%" in html
    assert "Nothing to count" in dataset.charts(count([]))


# Files


def test_bad_rows_are_listed_up_to_a_limit_and_the_others_counted():
    html = dataset.bad_rows([BadLine(i, f"reason {i}") for i in range(1, 1235)], "Bad rows")
    assert html.count("<tr>") == 500
    assert "and 734 more" in html
    assert "more" not in dataset.bad_rows([BadLine(1, "reason")], "Bad rows")
    assert dataset.bad_rows([], "Bad rows") == ""


def test_a_preview_says_what_is_taken_over_and_what_not():
    mapping = ColumnMapping(prompt="instruction", chosen="good", rejected="bad", input="context")
    pair = ForeignPair("p" * 400, "c", "r")
    seen = Preview(("instruction", "context", "good", "bad", "score"), mapping, (pair,), (BadLine(7, "no JSON"),))
    told = words(dataset.preview(seen, "mine"))
    assert told.startswith("The first pairs, as they would be stored with the source import:mine")
    assert "Also taken over: context (as input). Not taken over: score." in told
    assert "p" * 299 + "…" in told
    assert "p" * 300 not in told
    assert "line 7 no JSON" in told
    assert "Say which columns" in dataset.preview(replace(seen, mapping=ColumnMapping(prompt="instruction")), "mine")


def test_nothing_of_others_becomes_markup():
    evil = row(
        EVIL,
        f"{EVIL} a",
        f"{EVIL} b",
        original_chosen=f"{EVIL} c",
        **dict.fromkeys(("category", "target_group", "annotator", "note", "source", "created_at", "repeat_of"), EVIL),
        meta=JudgmentMeta(EVIL, EVIL, EVIL, EVIL, 1, EVIL, EVIL, 1.0),
    )
    evil["id"] = evil["pair_id"] = EVIL
    mapping = ColumnMapping(EVIL, "good", "bad", input=EVIL)
    counted = Counter({EVIL: 1})
    imported = Imported(1, 1, (BadLine(1, EVIL),), (EVIL,), mapping, f"import:{EVIL}", (EVIL,))
    for html in (
        dataset.table(page_of(evil), EVIL),
        dataset.detail_head(evil, None),
        dataset.detail(evil, evil),
        dataset.charts(Counts(1, counted, Counter(preferred=1), counted, Counter(), (1,) * 7)),
        dataset.preview(Preview((EVIL, "x" + EVIL), mapping, (ForeignPair(EVIL, EVIL, EVIL, EVIL, EVIL),), ()), EVIL),
        dataset.bad_rows([BadLine(1, EVIL)], "Bad rows"),
        dataset.imported(imported),
    ):
        assert "<script>" not in html
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
        assert not re.search(r'="[^"]*<', html)  # no attribute was broken open


# What a page may ask


def test_a_view_is_checked_and_empty_is_a_choice_of_its_own():
    view = View(0, "", False, "rain sun", "=", "=tie", "", None, "standing")
    assert view.query() == Query("rain sun", category="", verdict="tie", annotator=None, source=None, state="standing")
    assert View(0, "", False, None).query() == Query()
    for bad, told in (
        (replace(view, search="x" * 201), "at most 200"),
        (replace(view, search=5), "A search is text"),
        (replace(view, state="gone"), "got 'gone'"),
        (replace(view, state=["all"]), "choose one"),
        (replace(view, source="label"), "The filter source"),
        (replace(view, annotator={}), "The filter annotator"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            bad.query()


class Handlers(DatasetActions, FileActions):
    """The tab's handlers over a store, in no page: instead of a component there is the name that it goes by."""

    def __init__(self, workspace: Workspace) -> None:
        self.store = Store(workspace)
        self.pickers = ["prompt", "chosen", "rejected", "category", "group"]

    def __getattr__(self, name: str) -> str:
        return name


@pytest.fixture
def tab(tmp_path: Path) -> Handlers:
    return Handlers(Workspace(tmp_path))


def test_the_store_gives_a_judgment_with_what_takes_it_back(tab):
    kept, withdrawn = (journal.new_judgment(f"Who {i}?", "Anyone.", "Nobody.") for i in range(2))
    journal.append_all(tab.store.workspace, [kept, withdrawn])
    taken_back = journal.retract(tab.store.workspace, withdrawn.id, "elm")
    row_, retraction = tab.store.judgment(withdrawn.id)
    assert (row_["prompt"], retraction["id"], retraction["annotator"]) == ("Who 1?", taken_back.id, "elm")
    assert tab.store.judgment(kept.id)[1] is None
    assert tab.store.judgment(taken_back.id) is None  # no judgment: it takes one back
    assert tab.store.judgment("no such id") is None
    assert [r["prompt"] for r in tab.store.page(Query(), 0, 1).rows] == ["Who 1?"]
    assert tab.store.choices()["verdict"] == {"preferred": 2}


def test_a_long_import_tells_how_far_it_is(tab, tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "Who?", "chosen": "Anyone.", "rejected": "Nobody."}) + "\n")
    named = "file", {"path": str(file)}, ""
    *_, previewed = tab.show_preview(*named)
    go_on = threading.Event()
    real = importing.import_file

    def slow(workspace: Workspace, source: str, mapping: ColumnMapping, name: str, on_row: Any) -> Imported:
        for _ in range(1234):
            on_row()
        assert go_on.wait(10)
        return real(workspace, source, mapping, name, on_row)

    monkeypatch.setattr(importing, "import_file", slow)
    events = tab.import_rows(*named, previewed[tab.previewed], "prompt", "chosen", "rejected", "", "")
    assert "Importing …" in next(events)[tab.import_notice]
    assert "1,234 rows read" in next(events)[tab.import_notice]
    go_on.set()
    *_, last = events
    assert "<b>1</b> new" in last[tab.imported]
    assert last[tab.previewed] is None


def test_a_fault_of_ours_is_one_line_on_the_page_and_a_trace_in_the_terminal(tab, monkeypatch, capsys):
    def broken(*_args: object, **_kinds: object) -> Preview:
        raise KeyError("a fault")

    monkeypatch.setattr(importing, "preview", broken)
    *_, last = tab.show_preview("seed", None, "")
    assert "the app failed (KeyError: &#x27;a fault&#x27;)" in last[tab.import_notice]
    assert "Traceback" in capsys.readouterr().err


def test_a_column_that_no_file_has_and_a_source_that_is_none_are_refused(tab):
    *_, previewed = tab.show_preview("seed", None, "")
    told = tab.map_columns(previewed[tab.previewed], "prompt", "no such column", "rejected", "", "")[tab.import_notice]
    assert "The column for chosen is none of this file" in told
    for named, words_ in (
        (("paste", None, ""), "got &#x27;paste&#x27;"),
        (("file", "/etc/passwd", ""), "No file yet"),  # a path as it is was not uploaded
        (("hub", None, "a/b/c"), "OWNER/NAME"),
    ):
        *_, last = tab.show_preview(*named)
        assert words_ in last[tab.import_notice]


def test_what_is_withdrawn_is_what_was_asked_about(tab):
    first, second = (journal.new_judgment(f"Who {i}?", "Anyone.", "Nobody.", annotator="oak") for i in range(2))
    journal.append_all(tab.store.workspace, [first, second])
    tab.sessions = LabelSessions(EnginePool(tab.store.workspace), tab.store)
    request = gr.Request(session_hash="mine")
    asked = tab.ask(first.id)[tab.asked]
    chosen = tab.choose(gr.EventData(None, {"id": second.id}))  # another row, before the answer
    assert (chosen[tab.chosen], chosen[tab.asked]) == (second.id, "")
    assert "No judgment is chosen" in tab.withdraw(None, chosen[tab.asked], request)[tab.detail_notice]
    assert tab.store.judgment(second.id)[1] is None
    assert "Withdrawn" in tab.withdraw(components.agreed("elm"), asked, request)[tab.detail_notice]
    assert tab.store.judgment(first.id)[1]["annotator"] == "elm"


def test_on_a_public_space_only_what_this_page_has_stored_is_withdrawn(tab, monkeypatch):
    mine, other = (journal.new_judgment(f"Who {i}?", "Anyone.", "Nobody.", annotator="oak") for i in range(2))
    journal.append_all(tab.store.workspace, [mine, other])
    tab.sessions = LabelSessions(EnginePool(tab.store.workspace), tab.store)
    session = tab.sessions.of("mine")
    session.judged.append(Judged(mine, None, None))
    monkeypatch.setenv("SPACE_ID", "someone/biasdpo")
    for session_hash, judgment, told in (
        ("mine", other, "public Space"),
        ("theirs", mine, "public Space"),
        ("mine", mine, "Withdrawn"),
    ):
        answer = tab.withdraw(components.agreed("oak"), judgment.id, gr.Request(session_hash=session_hash))
        assert told in answer[tab.detail_notice]
    assert tab.store.judgment(mine.id)[1] is not None
    assert tab.store.judgment(other.id)[1] is None
    assert session.judged == []  # undo leaves it alone
