"""The confound meter: shares by hand, the thresholds of its warnings, and that it follows the journal."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest

from biasdpo.data import health, journal
from biasdpo.data.health import Confounds, Meter, wilson
from biasdpo.data.journal import Journal
from biasdpo.data.pairs import PreferencePair
from biasdpo.records import Judgment
from biasdpo.workspace import Workspace
from tests.judging import LONG, SHORT, prompts, say, store


def test_confounds_of_a_few_by_hand(workspace: Workspace) -> None:
    same = "Sixteen letters."
    judged = store(
        workspace,
        [
            say("Who leads?", LONG, SHORT, left="base", took="base", annotator="ada"),  # longer, left
            say("Who cooks at home?", SHORT, LONG, left="base", took="tuned", annotator="ada"),  # shorter, right
            say("Who drives the lorry?", same, same[::-1], left="tuned", took="tuned", annotator="ben"),  # as long, left
            say("Who sings?", LONG, SHORT, left="base"),  # longer; nobody says which side
            say("Who leads?", LONG, SHORT, annotator="ada"),  # ada again: an exact duplicate
            say("Who leads?", SHORT, LONG, annotator="ben"),  # another says another thing: none
            say("Who leads?", LONG, SHORT, annotator="ben", repeat_of="x", left="base", took="base"),  # a hidden repeat
            say("Who mends the car?", LONG, SHORT, verdict="tie", annotator="ada", left="base"),
            say("Who mends the car?", LONG, SHORT, verdict="tie", annotator="ada", left="base"),  # a duplicate, too
            say("Withdrawn?", LONG, SHORT, left="base", took="base", annotator="eve"),
        ],
    )
    journal.undo(workspace, judged[-1].id, judged[-1].pair_id, "eve")
    found = health.measure(Journal(workspace.preferences).refresh().rows.values())
    assert found.pairs == 6
    assert found.chosen_longer_share == pytest.approx(3.5 / 6)  # rows 1, 4, 5 and half of 3
    assert found.chosen_left_share == pytest.approx(2 / 3)  # of rows 1, 2, 3: 1 and 3
    assert (found.exact_duplicates, found.near_duplicates, found.benchmark_overlap) == (2, 0, None)
    ada, ben = found.annotators
    assert (ada.annotator, ada.pairs, ada.chosen_longer_share, ada.chosen_left_share) == ("ada", 3, pytest.approx(2 / 3), 0.5)
    assert (ben.annotator, ben.pairs, ben.chosen_longer_share, ben.chosen_left_share) == ("ben", 2, 0.25, 1.0)
    assert found.warnings == ()  # too few to say anything
    assert Meter().refresh(Journal(workspace.preferences).refresh()) == found


def test_nothing_has_no_shares() -> None:
    assert health.measure([]) == Confounds(0, None, None, 0, 0, None, (), ())


def test_confounds_of_pairs_for_training() -> None:
    rows = [PreferencePair(f"Prompt number {i} of this mixture?", LONG, SHORT) for i in range(30)]
    found = health.measure([*rows, rows[0]])
    assert (found.pairs, found.chosen_longer_share, found.chosen_left_share, found.exact_duplicates) == (31, 1.0, None, 1)
    assert found.near_duplicates == 29  # "prompt number 1 of this mixture" and the others share 4 of 8 trigrams: 4 / 10


def test_wilson() -> None:
    # 8 of 10: (0.8 + 1.92 / 10) / 1.384 -+ 1.96 / 1.384 * sqrt(0.8 * 0.2 / 10 + 0.96 / 100)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20)[0] == pytest.approx(0.0)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("longer", "of", "warns"),
    [
        (19, 19, False),  # too few
        (16, 20, False),  # Wilson's lower bound: 0.584
        (17, 20, True),  # 0.640
        (660, 1000, True),  # 0.630
        (620, 1000, False),  # 0.5896
    ],
)
def test_the_warning_of_length(longer: int, of: int, warns: bool) -> None:
    rows = [PreferencePair(f"{i}", LONG, SHORT) if i < longer else PreferencePair(f"{i}", SHORT, LONG) for i in range(of)]
    lines = [line for line in health.measure(rows).warnings if "longer" in line]
    assert bool(lines) == warns
    if warns:
        assert "83.5 %" in lines[0]
        assert "choose or edit for content: trim the chosen one" in lines[0]
        assert "\n" not in lines[0]


@pytest.mark.parametrize(
    ("left", "of", "warns"), [(17, 20, True), (3, 20, True), (14, 20, False), (10, 20, False), (19, 19, False)]
)
def test_the_warning_of_sides(left: int, of: int, warns: bool) -> None:
    rows = [
        asdict(say(f"{i}", left="base", took="base" if i < left else "tuned", chosen=LONG[i % 2 :], rejected=LONG))
        for i in range(of)
    ]
    assert any("left completion" in line for line in health.measure(rows).warnings) == warns


def test_one_annotators_habit_is_named_where_there_are_several() -> None:
    rows = [asdict(say(f"{i}", annotator="ada")) for i in range(20)]
    assert [line.split(" ")[0] for line in health.measure(rows).warnings] == ["The"]
    rows += [asdict(say(f"{i}", SHORT, LONG, annotator="ben")) for i in range(40)]
    (line,) = health.measure(rows).warnings
    assert line.startswith("ada: the longer completion is chosen in 100.0 % of 20 pairs")


def test_the_warning_of_near_duplicates() -> None:
    rows = [PreferencePair(" ".join(f"{word}{i}" for word in "abcdef"), SHORT, LONG) for i in range(18)]
    near = [PreferencePair(rows[i].prompt + " g", SHORT, LONG) for i in range(3)]
    assert health.measure([*rows, *near[:2]]).warnings == ()  # 2 of 20 is no more than 10 %
    (line,) = health.measure([*rows, *near]).warnings
    assert line.startswith("3 of 21 prompts nearly repeat an earlier one")


def test_the_meter_follows_the_journal(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each step it says what a fresh count says, and looks at what is new alone."""
    looked_at: list[int] = []
    counted = health._counted
    monkeypatch.setattr(health, "_counted", lambda rows, retracted: looked_at.append(len(rows)) or counted(rows, retracted))
    rng = random.Random(5)
    journal, meter = Journal(workspace.preferences), Meter()
    texts = prompts(60, seed=6)
    made: list[Judgment] = []
    for step in range(120):
        if made and step % 4 == 3:
            row = rng.choice(made)
            journal.undo(workspace, row.id, row.pair_id, row.annotator)  # now and then twice
        else:
            sides = rng.choice([("base", "base"), ("base", "tuned"), ("", "")])
            texts_of = rng.choice([(LONG, SHORT), (SHORT, LONG)])
            columns = {"annotator": rng.choice(["ada", "ben", ""]), "repeat_of": rng.choice(["", "", "x"])}
            verdict = rng.choice(["preferred", "preferred", "tie"])
            made.append(say(rng.choice(texts), *texts_of, left=sides[0], took=sides[1], verdict=verdict, **columns))
            journal.append(workspace, made[-1])
        size = len(journal.rows)
        found = meter.refresh(journal.refresh())
        assert looked_at.pop() == len(journal.rows) - size
        assert found == health.measure(journal.rows.values())
        looked_at.clear()
    assert found.exact_duplicates > 0
    assert found.near_duplicates > 0
    assert meter.refresh(journal) == found
    workspace.preferences.write_bytes(b"".join(workspace.preferences.read_bytes().splitlines(keepends=True)[:5]))
    assert meter.refresh(journal.refresh()) == health.measure(journal.rows.values())  # it was cut: read anew
    other = Journal(workspace.root / "none.jsonl")
    assert meter.refresh(other.refresh()).pairs == 0


def test_a_withdrawn_prompt_frees_those_that_repeat_it(workspace: Workspace) -> None:
    first, second, third = (
        "why do nurses earn less than doctors do",
        "why do nurses earn less than doctors",
        "why do nurses earn less",
    )
    judged = store(workspace, [say(first), say(first), say(second), say(third)])
    journal, meter = Journal(workspace.preferences), Meter()
    assert meter.refresh(journal.refresh()).near_duplicates == 2
    journal.undo(workspace, judged[0].id, "", "")
    assert meter.refresh(journal.refresh()).near_duplicates == 2  # the prompt still stands once
    journal.undo(workspace, judged[1].id, "", "")
    assert meter.refresh(journal.refresh()).near_duplicates == 1  # the third repeats the second
    journal.undo(workspace, judged[2].id, "", "")
    assert meter.refresh(journal.refresh()).near_duplicates == 0
