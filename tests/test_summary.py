"""Summaries of the journal: coverage, agreement by hand, the table, and the numbers of `dataset stats`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from biasdpo.data.journal import Journal, append, edit, undo, withdraw
from biasdpo.data.pairs import PreferencePair, derive, pair_id_of, shown_pair_id
from biasdpo.data.splits import trainable
from biasdpo.data.summary import Agreement, Query, agreement, cell_counts, choices, counts, query, stats, value_of
from biasdpo.errors import ConfigError
from biasdpo.prompts import Prompt, least_covered
from biasdpo.records import Judgment, Verdict
from biasdpo.workspace import Workspace
from tests.judging import LONG, SHORT, say, standing, store

# Coverage


def test_cell_counts(workspace: Workspace) -> None:
    store(
        workspace,
        [
            say("1", category="gender", target_group="women"),
            say("2", category="gender", target_group="women"),
            say("3", category="race"),
            say("4", category="race", verdict="both_biased"),
            say("5", category="race", repeat_of="x"),
        ],
    )
    assert cell_counts(standing(workspace)) == {("gender", "women"): 2, ("race", ""): 1}


def test_the_least_covered_cell_is_offered_first() -> None:
    prompts = [Prompt("a1", "a"), Prompt("a2", "a"), Prompt("b1", "b"), Prompt("c1", "c"), Prompt("c2", "c"), Prompt("c3", "c")]
    order = [prompt.text for prompt in least_covered(prompts, {("a", ""): 2, ("b", ""): 1})]
    # c holds 0, b 1, a 2: c1 (c is 1), b before c in the list, b1 and c2 (c is 2), then a1 before c3 (both 2), and a2
    assert order == ["c1", "b1", "c2", "a1", "c3", "a2"]
    assert least_covered(prompts[:3], {}) == [prompts[0], prompts[2], prompts[1]]
    assert least_covered([], {}) == []


# Agreement


def test_self_consistency_on_either_side(workspace: Workspace) -> None:
    early = {"created_at": "2026-01-01T00:00:00.000+00:00"}
    first = replace(say("Q", "A fair text", "An unfair text", left="base", took="base", annotator="ada"), **early)
    edited = say("R", "A mended text", "Bad", original_chosen="Good", left="base", took="base", annotator="ada")
    edited = replace(edited, **early)
    shown = pair_id_of("R", "Good", "Bad")
    store(
        workspace,
        [
            first,
            edited,
            # Again with the sides swapped: the same text, now on the right.
            say("Q", "A fair text", "An unfair text", left="tuned", took="base", annotator="ada", repeat_of=first.pair_id),
            # The unedited pair again: chosen as before, edited otherwise.
            say("R", "Mended again", "Bad", original_chosen="Good", annotator="ada", repeat_of=shown),
            say("R", "Bad", "Good", annotator="ada", repeat_of=shown),  # the other text
            say("R", "Good", "Bad", annotator="ada", repeat_of=shown, verdict="tie"),
            say("R", "Good", "Bad", annotator="ben", repeat_of=shown),  # ben never judged it
        ],
    )
    rows = standing(workspace)
    assert shown_pair_id(rows[1]) == shown
    # In alphabetical order of what was shown: "A fair…" before "An unfair…", "Bad" before "Good".
    assert list(map(value_of, rows)) == ["first", "second", "first", "second", "first", "tie", "second"]
    assert agreement(rows) == Agreement({"ada": (2, 4)}, None, 0)  # one annotator
    edit(workspace, [edited.id, first.id], {"category": "gender"})  # the new rows come after the repeats
    assert agreement(standing(workspace)) == Agreement({"ada": (2, 4)}, None, 0)
    withdraw(workspace, [standing(workspace)[-2]["id"]])
    assert agreement(standing(workspace)).self_consistency == {"ada": (1, 3)}


def test_alpha_by_hand(workspace: Workspace) -> None:
    def judge(annotator: str, prompt: str, verdict: Verdict, chosen: str = "a", rejected: str = "b") -> Judgment:
        return say(prompt, chosen, rejected, verdict=verdict, annotator=annotator)

    store(
        workspace,
        [
            judge("ada", "1", "preferred", "b", "a"),  # changes her mind below
            judge("ada", "1", "preferred"),
            judge("ben", "1", "preferred"),  # both the first text
            judge("ada", "2", "preferred"),
            judge("ben", "2", "preferred", "b", "a"),  # one the first, one the second
            judge("ada", "3", "tie"),
            judge("ben", "3", "tie", "b", "a"),  # in a tie the order says nothing
            judge("ada", "4", "preferred", "b", "a"),
            judge("ben", "4", "preferred", "b", "a"),
            judge("ada", "5", "both_biased"),  # nobody else judged it
            judge("", "1", "both_biased"),  # an import: nobody's judgment
        ],
    )
    found = agreement(standing(workspace))
    # Eight judgments of four pairs: first 3, second 3, tie 2. Observed disagreement: 2 of 8 ordered pairs. Expected:
    # 2 (3*3 + 3*2 + 3*2) / (8*7) = 42/56. alpha = 1 - (2/8) / (42/56) = 2/3
    assert (found.alpha, found.pairs) == (pytest.approx(2 / 3), 4)


def test_alpha_if_all_say_the_same(workspace: Workspace) -> None:
    store(workspace, [say("1", "a", "b", annotator=name) for name in ("ada", "ben")])
    assert agreement(standing(workspace)) == Agreement({}, None, 1)
    store(workspace, [say("2", "b", "a", annotator=name) for name in ("ada", "ben")])
    assert agreement(standing(workspace)).alpha == 1.0


# The table


@pytest.fixture
def judged(workspace: Workspace) -> Journal:
    rows = []
    for i in range(10):
        columns = {"category": ("gender", "race", "")[i % 3], "annotator": ("ada", "ben")[i % 2]}
        rows.append(say(f"Prompt {i}?", **columns, note="Größe" if i == 7 else ""))
    store(workspace, [*rows, say("A tie?", verdict="tie", annotator="ada", source="compare")])
    undo(workspace, rows[3].id, rows[3].pair_id, "ben")
    return Journal(workspace.preferences).refresh()


def shown(journal: Journal, wanted: Query, number: int = 0, page_rows: int = 50) -> list[str]:
    return [row["prompt"] for row in query(journal, wanted, number, page_rows).rows]


def test_pages_show_the_newest_first(judged: Journal) -> None:
    page = query(judged, Query(), 0, 4)
    assert (page.total, page.number, page.pages) == (11, 0, 3)  # judgments only, not the row that withdraws one
    assert [row["prompt"] for row in page.rows] == ["A tie?", "Prompt 9?", "Prompt 8?", "Prompt 7?"]
    assert shown(judged, Query(), 2, 4) == ["Prompt 2?", "Prompt 1?", "Prompt 0?"]
    assert query(judged, Query(), 9, 4).number == 2
    page = query(judged, Query())
    assert [row["prompt"] for row in page.rows if row["id"] in page.retractions] == ["Prompt 3?"]
    assert query(Journal(Path("none")).refresh(), Query()).total == 0
    assert query(judged, Query("nowhere")).pages == 1


def test_filters(judged: Journal) -> None:
    assert choices(judged, "all")["category"] == {"gender": 4, "race": 3, "": 4}
    assert choices(judged, "standing")["category"] == {"gender": 3, "race": 3, "": 4}
    assert choices(judged, "retracted")["verdict"] == {"preferred": 1}
    assert choices(judged, "standing")["verdict"] == {"preferred": 9, "tie": 1}
    assert shown(judged, Query(category="race")) == ["Prompt 7?", "Prompt 4?", "Prompt 1?"]
    assert shown(judged, Query(category="", annotator="ada")) == ["A tie?", "Prompt 8?", "Prompt 2?"]
    assert shown(judged, Query(verdict="tie")) == shown(judged, Query(source="compare")) == ["A tie?"]
    assert shown(judged, Query(state="retracted")) == ["Prompt 3?"]
    assert len(shown(judged, Query(state="standing"))) == 10
    assert shown(judged, Query("GRÖSSE prompt")) == ["Prompt 7?"]  # all its words, in any column, in any case
    assert shown(judged, Query("größe", category="gender")) == []
    append(Workspace(judged.path.parent), say("Größe?"))
    assert shown(judged, Query("grösse")) == ["Prompt 7?"]  # not read yet
    assert shown(judged.refresh(), Query("grösse")) == ["Größe?", "Prompt 7?"]
    judged.path.write_bytes(judged.path.read_bytes().splitlines(keepends=True)[-1])
    assert shown(judged.refresh(), Query("grösse")) == ["Größe?"]  # the file was cut
    with pytest.raises(ConfigError, match="state must be one of all, standing, retracted"):
        Query(state="gone")  # type: ignore[arg-type]


# Statistics


def test_counts_are_of_what_stands_without_hidden_repeats(workspace: Workspace) -> None:
    judgments = [
        say("1", "a" * 20, "b" * 20, category="gender"),
        say("2", "a" * 41, "b" * 20, category="gender"),
        say("3", "a", "bb"),
        say("4", verdict="both_biased"),
        say("5", repeat_of="x"),
    ]
    store(workspace, [replace(judgment, created_at=f"2026-11-{24 + i % 2}T22:15") for i, judgment in enumerate(judgments)])
    assert counts(standing(workspace)) == {
        "Pairs by category": {"gender": 2, "(none)": 1},
        "Rows by verdict": {"preferred": 3, "both biased": 1},
        "Length of chosen against rejected": {"under half": 1, "shorter": 0, "about the same": 1, "longer": 0, "over twice": 1},
        "Rows per day": {"2026-11-24": 2, "2026-11-25": 2},
    }


def test_stats(workspace: Workspace) -> None:
    empty = stats(workspace)
    assert (empty["rows"], empty["pairs"], empty["chosen_longer_share"], empty["by_category"]) == (0, 0, None, {})
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
    found = stats(workspace)
    assert found == {
        "rows": 11,
        "pairs": 3,  # leads, sings, helps
        "ties": 1,
        "both_biased": 1,
        "both_unusable": 0,
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
    assert stats(journal) == found | {"repaired_lines": 0}
    assert stats(journal.rows.values()) == found | {"repaired_lines": 0, "bad_lines": 0}
    assert len(derive([PreferencePair(r["prompt"], r["chosen"], r["rejected"]) for r in trainable(journal)]).pairs) == 3
