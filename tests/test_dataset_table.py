"""The table of the Data set tab, and the numbers of `dataset stats`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from biasdpo.data import pairs, splits, summary
from biasdpo.data.journal import Journal, append, undo
from biasdpo.data.pairs import PreferencePair
from biasdpo.data.summary import Query
from biasdpo.errors import ConfigError
from biasdpo.workspace import Workspace
from tests.judging import LONG, SHORT, say, store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def judged(workspace: Workspace) -> Journal:
    rows = store(
        workspace,
        [
            say(
                f"Prompt {i}?",
                category=("gender", "race", "")[i % 3],
                annotator=("ada", "ben")[i % 2],
                note="Größe" if i == 7 else "",
            )
            for i in range(10)
        ],
    )
    append(workspace, say("A tie?", verdict="tie", annotator="ada", source="compare"))
    undo(workspace, rows[3].id, rows[3].pair_id, "ben")
    return Journal(workspace.preferences).refresh()


def shown(journal: Journal, wanted: Query, number: int = 0, page_rows: int = 50) -> list[str]:
    return [row["prompt"] for row in summary.query(journal, wanted, number, page_rows).rows]


def test_the_table_pages_the_newest_first(judged: Journal) -> None:
    page = summary.query(judged, Query(), 0, 4)
    assert (page.total, page.number, page.pages) == (11, 0, 3)  # judgments alone, not the row that takes one back
    assert [row["prompt"] for row in page.rows] == ["A tie?", "Prompt 9?", "Prompt 8?", "Prompt 7?"]
    assert shown(judged, Query(), 2, 4) == ["Prompt 2?", "Prompt 1?", "Prompt 0?"]
    assert summary.query(judged, Query(), 9, 4).number == 2
    assert {
        row["prompt"] for row in summary.query(judged, Query()).rows if row["id"] in summary.query(judged, Query()).retracted
    } == {"Prompt 3?"}
    assert (summary.query(Journal(Path("none")).refresh(), Query()).total, summary.query(judged, Query("nowhere")).pages) == (
        0,
        1,
    )


def test_the_tables_filters(judged: Journal) -> None:
    assert summary.choices(judged)["category"] == {"gender": 4, "race": 3, "": 4}
    assert summary.choices(judged)["verdict"] == {"preferred": 10, "tie": 1}
    assert shown(judged, Query(category="race")) == ["Prompt 7?", "Prompt 4?", "Prompt 1?"]
    assert shown(judged, Query(category="", annotator="ada")) == ["A tie?", "Prompt 8?", "Prompt 2?"]
    assert shown(judged, Query(verdict="tie")) == shown(judged, Query(source="compare")) == ["A tie?"]
    assert shown(judged, Query(state="retracted")) == ["Prompt 3?"]
    assert len(shown(judged, Query(state="standing"))) == 10
    assert shown(judged, Query("GRÖSSE prompt")) == ["Prompt 7?"]  # all its words, in any column, in any case
    assert shown(judged, Query("größe", category="gender")) == []
    other = Workspace(judged.path.parent)
    append(other, say("Größe?"))
    assert shown(judged, Query("grösse")) == ["Prompt 7?"]  # not read yet
    assert shown(judged.refresh(), Query("grösse")) == ["Größe?", "Prompt 7?"]
    judged.path.write_bytes(judged.path.read_bytes().splitlines(keepends=True)[-1])
    assert shown(judged.refresh(), Query("grösse")) == ["Größe?"]  # the file was cut
    with pytest.raises(ConfigError, match="state must be one of all, standing, retracted"):
        Query(state="gone")  # type: ignore[arg-type]


# The numbers


def test_stats(workspace: Workspace) -> None:
    both = say("Who leads?", LONG, SHORT, left="base", took="base", category="gender", annotator="ada")
    judgments = [
        both,
        say("Who leads?", LONG, SHORT, left="base", took="tuned", category="gender", annotator="ben"),  # the same pair
        say("Who cooks at home?", SHORT, LONG, category="race", annotator="ada"),
        say("Who cooks at home?", LONG, SHORT, category="race", annotator="ben"),  # one to one: training leaves it out
        say("Who sings?", SHORT, LONG),
        say("Who mends it?", verdict="tie", annotator="ada"),
        say("Who drives?", verdict="both_biased"),
        say("Who leads?", LONG, SHORT, annotator="ada", repeat_of=both.pair_id),
        say("Withdrawn?", category="religion"),
    ]
    store(workspace, judgments)
    undo(workspace, judgments[-1].id, "", "")
    with workspace.preferences.open("ab") as file:
        file.write(b"no row\n{}\n{")
    append(workspace, say("Who helps?", category="gender", annotator="ada"))
    found = summary.stats(workspace)
    assert list(found)[:10] == [
        "rows", "pairs", "ties", "both_biased", "retracted", "by_category", "chosen_longer_share", "chosen_left_share",
        "near_duplicates", "repaired_lines",
    ]  # fmt: skip
    assert found == {
        "rows": 11,
        "pairs": 3,  # leads, sings, helps
        "ties": 1,
        "both_biased": 1,
        "retracted": 1,
        "by_category": {"": 1, "gender": 3, "race": 2},
        "chosen_longer_share": pytest.approx(4 / 6),
        "chosen_left_share": 0.5,
        "near_duplicates": 0,
        "repaired_lines": 1,
        "bad_lines": 2,
        "exact_duplicates": 0,
        "benchmark_overlap": None,
        "annotators": [
            {"annotator": "ada", "pairs": 3, "chosen_longer_share": pytest.approx(2 / 3), "chosen_left_share": 1.0},
            {"annotator": "ben", "pairs": 2, "chosen_longer_share": 1.0, "chosen_left_share": 0.0},
        ],
        # leads: both the longer, which comes first ("A f…" < "A s…"); cooks: one each. 4 judgments, first 3, second 1:
        # alpha = 1 - (2/4) / (2*3*1 / (4*3)) = 0
        "agreement": {"alpha": pytest.approx(0.0), "pairs": 2, "self_consistency": {"ada": {"agreed": 1, "total": 1}}},
        "warnings": [],
    }
    json.dumps(found)
    journal = Journal(workspace.preferences).refresh()
    assert summary.stats(journal) == found | {"repaired_lines": 0}
    assert summary.stats(journal.rows.values()) == found | {"repaired_lines": 0, "bad_lines": 0}
    assert (
        len(pairs.derive([PreferencePair(r["prompt"], r["chosen"], r["rejected"]) for r in splits.trainable(journal)]).pairs) == 3
    )


def test_stats_of_nothing(workspace: Workspace) -> None:
    found = summary.stats(workspace)
    assert (found["rows"], found["pairs"], found["chosen_longer_share"], found["by_category"]) == (0, 0, None, {})
