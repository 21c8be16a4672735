"""Coverage of category and group, and how annotators agree with themselves and with each other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from biasdpo.data import journal, pairs, summary
from biasdpo.data.summary import value_of
from biasdpo.records import Judgment, Verdict
from biasdpo.workspace import Workspace
from tests.judging import say, standing, store


@dataclass(frozen=True)
class Prompt:
    text: str
    category: str = ""
    target_group: str = ""


def test_coverage(workspace: Workspace) -> None:
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
    counts = summary.cell_counts(standing(workspace))
    assert counts == {("gender", "women"): 2, ("race", ""): 1}
    matrix = summary.coverage(counts, [Prompt("", "gender", "men"), Prompt("", "", "men")])
    assert matrix.categories == ("gender", "race", "")
    assert matrix.groups == ("men", "women", "")
    assert matrix.counts == ((0, 2, 0), (0, 0, 1), (0, 0, 0))
    cells = matrix.cells()
    assert len(cells) == 9
    assert cells[0] == ("gender", "men", 0)
    assert cells[-2:] == [("race", "", 1), ("gender", "women", 2)]


def test_the_thinnest_cell_is_offered_first() -> None:
    prompts = [Prompt("a1", "a"), Prompt("a2", "a"), Prompt("b1", "b"), Prompt("c1", "c"), Prompt("c2", "c"), Prompt("c3", "c")]
    order = [prompt.text for prompt in summary.thinnest(prompts, {("a", ""): 2, ("b", ""): 1})]
    # c holds 0, b 1, a 2: c1 (c is 1), b before c in the list, b1 and c2 (c is 2), then a1 before c3 (both 2), and a2
    assert order == ["c1", "b1", "c2", "a1", "c3", "a2"]
    assert summary.thinnest(prompts[:3], {}) == [prompts[0], prompts[2], prompts[1]]
    assert summary.thinnest([], {}) == []


# Agreement


def test_self_consistency_whichever_side(workspace: Workspace) -> None:
    first = say("Q", "A fair text", "An unfair text", left="base", took="base", annotator="ada")
    edited = say("R", "A mended text", "Bad", original_chosen="Good", left="base", took="base", annotator="ada")
    shown = pairs.pair_id_of("R", "Good", "Bad")
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
    assert pairs.shown_pair_id(standing(workspace)[1]) == shown
    # In alphabetical order of what was shown: "A fair…" before "An unfair…", "Bad" before "Good".
    said = [value_of(row) for row in standing(workspace)]
    assert said == ["first", "second", "first", "second", "first", "tie", "second"]
    found = summary.agreement(standing(workspace))
    assert found.self_consistency == {"ada": (2, 4)}
    assert (found.alpha, found.pairs) == (None, 0)  # one annotator
    journal.undo(workspace, first.id, first.pair_id, "ada")
    assert summary.self_consistency(standing(workspace)) == {"ada": (1, 3)}


def test_alpha_by_hand(workspace: Workspace) -> None:
    def judge(annotator: str, prompt: str, verdict: Verdict, chosen: str = "a", rejected: str = "b") -> Judgment:
        return say(prompt, chosen, rejected, verdict=verdict, annotator=annotator)

    store(
        workspace,
        [
            judge("ada", "1", "preferred", "b", "a"),  # thinks better of it below
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
    found = summary.agreement(standing(workspace))
    # Eight judgments of four pairs: first 3, second 3, tie 2. Observed disagreement: 2 of 8 ordered pairs. Expected:
    # 2 (3*3 + 3*2 + 3*2) / (8*7) = 42/56. alpha = 1 - (2/8) / (42/56) = 2/3
    assert found.alpha == pytest.approx(2 / 3)
    assert found.pairs == 4


def test_alpha_of_those_who_all_say_the_same(workspace: Workspace) -> None:
    store(workspace, [say("1", "a", "b", annotator=name) for name in ("ada", "ben")])
    assert summary.agreement(standing(workspace)) == summary.Agreement({}, None, 1)
    store(workspace, [say("2", "b", "a", annotator=name) for name in ("ada", "ben")])
    assert summary.agreement(standing(workspace)).alpha == 1.0
