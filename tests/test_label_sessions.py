"""An annotator's session without a page: the order of pairs, tokens, retries, undo, own judgments, unused sessions."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from biasdpo import access, labeling
from biasdpo.data import journal
from biasdpo.data.reader import DatasetReader
from biasdpo.engines import EnginePool
from biasdpo.errors import ConfigError, RefusedError, WorkspaceError
from biasdpo.labeling import BlindPair, LabelSession, LabelSessions
from biasdpo.prompts import Prompt
from biasdpo.workspace import Workspace
from tests.judging import say, standing, store
from tests.test_labeling import OAK


def pair(number: int) -> BlindPair:
    return BlindPair(Prompt(f"Question {number}?"), f"Left {number}.", f"Right {number}.", "base", "tuned")


@pytest.fixture
def session(workspace: Workspace) -> LabelSession:
    return LabelSession(EnginePool(workspace), DatasetReader(workspace))


def judge(session: LabelSession, number: int, details: labeling.Details = OAK, **edits: str) -> labeling.Judged:
    session.show(pair(number))
    return session.store_answer("left", details, **edits)


def test_what_was_put_aside_comes_before_second_opinions(session):
    session.given.extend(map(pair, (1, 2, 3)))
    assert session.take() == pair(1)
    session.show_before(pair(9))
    assert [session.shown, *(session.take() for _ in range(4))] == [pair(9), pair(1), pair(2), pair(3), None]


def test_an_answer_is_stored_once_and_each_shown_pair_has_its_own_token(session, workspace):
    session.show(pair(1))
    first = session.token
    session.show(pair(1))
    assert first != session.token != ""
    judged = session.store_answer("right", OAK)
    assert (session.shown, session.token) == (None, "")
    assert [row["id"] for row in standing(workspace)] == [judged.judgment.id]
    with pytest.raises(ConfigError, match="no pair to judge: press Start"):
        session.store_answer("right", OAK)


def test_if_storing_fails_the_pair_stays_and_the_same_answer_again_is_one_row(session, workspace, monkeypatch):
    stored = journal.append
    acknowledged: list[bool] = []

    def lost(workspace: Workspace, judgment: Any) -> Any:
        """The first time the row reaches the disk, but its acknowledgment is lost."""
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
    assert len(standing(workspace)) == 1


@pytest.mark.parametrize(("revealed", "source"), [(True, "compare"), (False, "label")])
def test_undo_shows_the_pair_again_and_knows_whether_its_sides_were_told(session, workspace, revealed, source):
    judge(session, 1, left="Left, edited.", right="Right 1.")
    session.show(pair(2))
    judged = session.undo(revealed=revealed)
    assert (judged.details, judged.left) == (OAK, "Left, edited.")
    assert session.shown == replace(pair(1), sides_known=revealed)
    assert standing(workspace) == []
    session.store_answer("right", OAK)
    assert [row["source"] for row in standing(workspace)] == [source]
    assert session.take() == pair(2)
    session.undo(revealed=False)
    with pytest.raises(ConfigError, match="withdraw earlier ones under"):
        session.undo(revealed=False)


def test_waiting_draws_no_repeats_and_a_verdict_does(session, monkeypatch):
    for number in range(8):
        judge(session, number)
    monkeypatch.setattr(session.rng, "random", lambda: 0.0)
    assert session.take() is None
    shown = session.next(session._reader.own("", "oak"))
    assert shown.repeat_of == shown.pair_id
    assert (shown.left_side, shown.right_side) == ("tuned", "base")
    assert shown.prompt == Prompt(shown.prompt.text)  # not what the annotator called it the first time


def test_judgments_belong_to_their_browser_and_old_ones_to_their_nickname_except_on_a_space(session, workspace, monkeypatch):
    """Nicknames prove nothing among strangers; the browser's secret does, also after a restart of browser and app."""
    ada = replace(OAK, annotator="ada", browser="a" * 16)
    mine = judge(session, 1, ada).judgment.id
    (old, imported) = store(workspace, [say(annotator="ada"), say("Who cooks?", annotator="ada", source="import:file")])
    other = LabelSession(EnginePool(workspace), DatasetReader(workspace))
    reader = other._reader
    assert [row["id"] for row in reader.own("a" * 16, "ada")] == [mine, old.id]
    assert [row["id"] for row in reader.own("a" * 16, "renamed")] == [mine]
    assert [row["id"] for row in reader.own("", "ada")] == [old.id]
    for judgment_id in (mine, imported.id):
        with pytest.raises(RefusedError, match="this browser"):
            other.withdraw(judgment_id, "b" * 16, "ada")
    monkeypatch.setattr(access, "_source", lambda: access.Caller(access.Role.visitor))
    assert [row["id"] for row in reader.own("a" * 16, "ada")] == [mine]
    with pytest.raises(RefusedError, match="this browser"):
        other.withdraw(old.id, "a" * 16, "ada")
    other.withdraw(mine, "a" * 16, "renamed")
    assert [row["id"] for row in standing(workspace)] == [old.id, imported.id]
    with pytest.raises(ConfigError, match="select one"):
        other.withdraw(mine, "a" * 16, "ada")


def test_second_opinions_are_the_pairs_that_only_others_judged(session, workspace):
    shared, new = say("Who cooks?", annotator="ada"), say("Who drives?", annotator="ada")
    store(workspace, [shared, new, say("Who drives?", annotator="ben"), say("Who cooks?", annotator="oak")])
    assert session.start_second_opinions("", "oak") == 1
    shown = session.take()
    assert (shown.prompt.text, {shown.left, shown.right}) == ("Who drives?", {new.chosen, new.rejected})
    store(workspace, [say("Who drives?", annotator="oak")])
    with pytest.raises(ConfigError, match="nobody else has judged"):
        session.start_second_opinions("", "oak")


def test_the_latest_call_waits_and_leaving_ends_it(session, monkeypatch):
    monkeypatch.setattr(LabelSession, "goes_on", True)
    first = session.wait_for_pair()
    assert next(first) is None
    second = session.wait_for_pair()
    assert next(second) is None
    assert list(first) == []
    timer = threading.Timer(0.2, session.leave)
    timer.start()
    assert set(second) <= {None}
    session.first.append(pair(1))
    assert list(session.wait_for_pair()) == [pair(1)] == [session.shown]
    assert list(session.wait_for_pair()) == []


def test_unused_sessions_make_room(workspace: Workspace, monkeypatch):
    sessions = LabelSessions(EnginePool(workspace), DatasetReader(workspace))
    first = sessions.of("a")
    sessions.leave("a")  # its connection dropped
    assert sessions.of("a") is first
    monkeypatch.setattr(labeling, "_KEPT", 3)
    for name in "bcde":
        sessions.of(name)
    assert len(sessions) == 3
    assert sessions.of("a") is not first
    worker = sessions.of("worker")
    worker.judged.append(None)  # type: ignore[arg-type]
    for i in range(9):
        sessions.of(f"stranger {i}")
    assert sessions.of("worker") is worker
    monkeypatch.setattr(labeling, "_KEPT_SECONDS", -1.0)
    sessions.of("z")
    assert len(sessions) <= 1
