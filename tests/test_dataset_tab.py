"""The Data set tab without a page: counts, what a page may ask, handlers."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from biasdpo.data import importing, journal
from biasdpo.data.importing import ColumnMapping, Imported, Preview
from biasdpo.data.summary import Query, count, length_class
from biasdpo.engines import EnginePool
from biasdpo.errors import ConfigError
from biasdpo.ui import components
from biasdpo.ui.components import Store
from biasdpo.ui.dataset import DatasetActions, FileActions, View
from biasdpo.ui.label import Judged, LabelSessions
from biasdpo.workspace import Workspace


def row(prompt: str = "Who?", chosen: str = "Anyone may.", rejected: str = "Men may.", **columns: Any) -> dict[str, Any]:
    made = asdict(replace(journal.new_judgment(prompt, chosen, rejected), created_at="2026-11-24T22:15:59.123+00:00"))
    return made | {name: asdict(value) if name == "meta" else value for name, value in columns.items()}


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
