"""An annotator's session without a page: the order of what is shown, tokens, second tries, undo, sessions that nobody uses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from biasdpo import labeling, prompts
from biasdpo.data import journal
from biasdpo.data.health import AnnotatorShares, Confounds
from biasdpo.engines import EnginePool
from biasdpo.errors import ConfigError, WorkspaceError
from biasdpo.labeling import BlindPair
from biasdpo.prompts import Prompt
from biasdpo.records import Completion
from biasdpo.ui import compare, components, label
from biasdpo.ui.components import Store
from biasdpo.ui.label import LabelSession, LabelSessions
from biasdpo.workspace import Workspace
from tests.test_labeling import OAK, PAIR, SHOWN


def pair(number: int) -> BlindPair:
    return BlindPair(Prompt(f"Question {number}?"), f"Left {number}.", f"Right {number}.", "base", "tuned")


@pytest.fixture
def session(workspace: Workspace) -> LabelSession:
    return LabelSession(EnginePool(workspace), Store(workspace))


def rows(workspace: Workspace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in workspace.preferences.read_text(encoding="utf-8").splitlines()]


def test_what_was_put_aside_comes_before_second_opinions(session):
    session.given.extend(map(pair, (1, 2, 3)))
    assert session.take() == pair(1)
    session.show_before(pair(9))
    assert [session.shown, *(session.take() for _ in range(4))] == [pair(9), pair(1), pair(2), pair(3), None]


def test_each_shown_pair_has_a_token_of_its_own(session):
    session.show(pair(1))
    first = session.token
    session.show(pair(1))
    assert first != session.token != ""
    session.show(None)
    assert session.token == ""


def test_an_answer_is_stored_and_the_pair_is_off(session, workspace):
    session.show(pair(1))
    judged = session.store_answer("right", OAK)
    assert session.shown is None
    assert [row["id"] for row in rows(workspace)] == [judged.judgment.id]
    with pytest.raises(ConfigError, match="Nothing is shown to judge: press Begin first"):
        session.store_answer("right", OAK)


def test_where_storing_fails_the_pair_stays_and_the_same_answer_again_is_one_row(session, workspace, monkeypatch):
    stored = journal.append
    acknowledged: list[bool] = []

    def lost(workspace: Workspace, judgment: Any) -> Any:
        """The first time the row reaches the disk, but its acknowledgement is lost."""
        result = stored(workspace, judgment)
        if not acknowledged:
            acknowledged.append(True)
            raise WorkspaceError("The lock was lost: try again")
        return result

    monkeypatch.setattr(journal, "append", lost)
    session.show(pair(1))
    with pytest.raises(WorkspaceError):
        session.store_answer("left", OAK)
    assert session.shown == pair(1)
    session.store_answer("left", OAK)
    assert len(rows(workspace)) == 1


def test_undo_shows_the_pair_again_before_the_one_that_was_on(session, workspace):
    session.show(pair(1))
    session.store_answer("left", OAK, left="Left, edited.")
    session.show(pair(2))
    judged = session.undo(revealed=True)
    assert (judged.details, judged.left) == (OAK, "Left, edited.")
    assert session.shown == replace(pair(1), sides_known=True)
    assert rows(workspace)[-1]["retracts"] == judged.judgment.id
    session.store_answer("right", OAK)
    assert rows(workspace)[-1]["source"] == "compare"  # the sides had been told
    assert session.take() == pair(2)
    session.undo(revealed=False)
    with pytest.raises(ConfigError, match="can be withdrawn under"):
        session.undo(revealed=False)


def test_an_undone_verdict_without_its_sides_told_stays_blind(session, workspace):
    session.show(pair(1))
    session.store_answer("left", OAK)
    session.undo(revealed=False)
    session.store_answer("right", OAK)
    assert rows(workspace)[-1]["source"] == "label"


def test_waiting_draws_no_repeats_and_a_verdict_does(session, monkeypatch):
    for number in range(8):
        session.show(pair(number))
        session.store_answer("left", OAK)
    monkeypatch.setattr(session.rng, "random", lambda: 0.0)  # the die says: now
    assert session.take() is None
    shown = session.next("oak")
    assert shown.repeat_of == shown.pair_id
    assert (shown.left_side, shown.right_side) == ("tuned", "base")
    assert shown.prompt == Prompt(shown.prompt.text)  # not what the annotator called it the first time


def test_sessions_that_nobody_uses_make_room(workspace: Workspace, monkeypatch):
    sessions = LabelSessions(EnginePool(workspace), Store(workspace))
    first = sessions.of("a")
    assert sessions.of("a") is first
    sessions.pause("a")  # its connection dropped
    assert sessions.of("a") is first
    monkeypatch.setattr(label, "_KEPT", 3)
    for name in "bcde":
        sessions.of(name)
    assert len(sessions) == 3
    assert sessions.of("a") is not first
    monkeypatch.setattr(label, "_KEPT_SECONDS", -1.0)
    sessions.of("z")
    assert len(sessions) <= 1


def test_benchmarks_that_cannot_be_read_are_said(workspace: Workspace, tmp_path: Path):
    store = Store(workspace)
    store._benchmarks = tmp_path / "none"
    store.read_benchmarks()
    assert "No folder" in str(store.overlap_error)


def test_a_pair_that_was_stopped_is_not_judged_and_a_finished_one_has_known_sides():
    shown = compare.sides_known(PAIR, "race")
    assert (shown.left, shown.right, shown.prompt.category, shown.sides_known) == ("Men do.", "Anyone can.", "race", True)
    stopped = replace(PAIR, right=Completion("tuned", "Any", 1, "cancelled"))
    with pytest.raises(ConfigError, match="stopped before its end"):
        compare.sides_known(stopped, "")
    with pytest.raises(ConfigError, match="No finished pair to judge"):
        compare.sides_known(None, "")


def test_the_page_shows_others_text_as_text():
    evil = "<script>alert(1)</script>"
    pair = replace(SHOWN, prompt=Prompt(evil, evil, evil), adapter=evil)
    made = labeling.judgment(pair, "left", replace(OAK, annotator=evil))
    shares = AnnotatorShares(evil, 3, 0.5, None)
    confounds = Confounds(3, 0.5, None, 0, 0, None, (shares, replace(shares, annotator="oak")), (evil,))
    for html in (
        components.prompt(pair.prompt),
        components.saved(made, pair, True, 1),
        components.side_diff(evil, "other", (evil, evil)),
        components.edit_diff("before", evil),
        components.warning(evil),
        components.meter(confounds),
        components.coverage({(evil, evil): 2}, prompts.CATEGORIES),
        components.consistency(evil, (1, 2), 0.5, 2),
    ):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


def test_sides_are_revealed_or_not():
    made = labeling.judgment(SHOWN, "right", OAK)
    shown = components.saved(made, SHOWN, True, 4)
    assert "Left was the base model, right was the tuned model (demo) (seed 7)." in shown
    assert "model" not in components.saved(made, SHOWN, False, 4)
