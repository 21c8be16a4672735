"""Imports into the journal: nothing twice, nothing silently left out, nothing believed of a stranger's journal."""

from __future__ import annotations

import json

import pytest

from biasdpo.data import importing, journal, pairs, splits
from biasdpo.data.journal import BadLine, Journal
from biasdpo.errors import ConfigError, DatasetError, RefusedError
from biasdpo.workspace import Workspace
from tests.foreign_rows import GOOD, texts, write_lines


def test_rows_are_judgments_of_this_source_and_never_twice(workspace, tmp_path):
    row = GOOD | {"category": "gender", "target_group": "women", "annotator": "ana", "note": "n"}
    other = GOOD | {"chosen": "Whoever is fit.", "category": None}
    path = write_lines(tmp_path / "my set.jsonl", row, other, row)
    done = importing.import_file(workspace, path)
    assert (done.written, done.known, done.source) == (3, 0, "import:my set")  # the same row twice is two judgments
    first, second, third = Journal(workspace.preferences).refresh().standing()
    assert {k: first[k] for k in row} == row
    assert (first["verdict"], first["source"], first["repeat_of"]) == ("preferred", "import:my set", "")
    assert first["pair_id"] == pairs.pair_id_of(*GOOD.values())
    assert (second["category"], third["pair_id"]) == ("", first["pair_id"])
    grown = write_lines(tmp_path / "grown.jsonl", GOOD | {"prompt": "New?"}, other, row, row)
    done = importing.import_file(workspace, grown, name="other name")
    assert (done.written, done.known) == (1, 3)
    journal.retract(workspace, first["id"])
    assert importing.import_file(workspace, path).written == 0  # what was withdrawn stays withdrawn
    assert len(Journal(workspace.preferences).refresh().standing()) == 3


def test_a_trial_stores_nothing_and_says_what_an_import_would(workspace, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", GOOD, {"chosen": "b"}, GOOD | {"prompt": "p"})
    importing.import_file(workspace, write_lines(tmp_path / "some.jsonl", GOOD))
    trial = importing.import_file(workspace, path, dry_run=True)
    assert (trial.written, trial.known, len(trial.bad)) == (1, 1, 1)
    assert texts(workspace) == ["Who leads?"]
    assert importing.import_file(workspace, path) == trial


def test_another_workspaces_journal(workspace, tmp_path):
    other = Workspace(tmp_path / "other")
    made = [
        journal.new_judgment(f"Question {i}?", "fair", "unfair", annotator="ana", note=f"n{i}", category="race", **more)
        for i, more in enumerate([{}, {"original_chosen": "before"}, {"verdict": "tie"}, {"repeat_of": "a" * 16}, {}])
    ]
    journal.append_all(other, made)
    journal.retract(other, made[4].id)
    with other.preferences.open("a") as file:
        file.write(json.dumps({"id": "1", "pair_id": "", "verdict": "maybe", "retracts": ""}) + "\n")
    done = importing.import_file(workspace, other.preferences, name="ana's")
    assert (done.written, done.notes) == (3, ("left out of the journal: 1 tie, 1 withdrawn",))
    assert [line.line for line in done.bad] == [7]
    rows = Journal(workspace.preferences).refresh().rows
    assert list(rows) == [made[i].id for i in (0, 1, 3)]
    row = rows[made[1].id]
    assert (row["original_chosen"], row["annotator"], row["note"], row["source"]) == ("before", "ana", "n1", "import:ana's")
    assert row["created_at"] == made[1].created_at
    with pytest.raises(DatasetError, match=r"preferences\.jsonl:7: verdict must be one of"):
        splits.load([str(other.preferences)], other)
    assert len(splits.load_journal(workspace)) == 2  # the hidden repeat stays one
    assert importing.import_file(workspace, workspace.preferences).known == 3  # into itself


def test_what_a_strangers_journal_claims_is_checked(workspace, tmp_path):
    row = GOOD | {"id": "retracts-" + "a" * 32, "pair_id": "x", "verdict": "preferred", "retracts": "", "created_at": "soon"}
    meta = {"seed": 10**30, "seconds": "long", "model": "m", "left_side": None, "evil": [1]}
    importing.import_file(workspace, write_lines(tmp_path / "rows.jsonl", row | {"meta": meta}))
    (stored,) = Journal(workspace.preferences).refresh().standing()
    assert stored["id"] != row["id"]  # else it would stand in for a withdrawal that is yet to come
    assert stored["created_at"].startswith("20")
    assert (stored["meta"]["model"], stored["meta"]["seed"], stored["meta"]["seconds"]) == ("m", 0, 0.0)
    assert "evil" not in stored["meta"]
    bad = write_lines(tmp_path / "bad.jsonl", row | {"original_chosen": "a\ud800"}, GOOD)
    assert importing.import_file(workspace, bad).bad == (
        BadLine(1, "original_chosen holds half a surrogate pair, which is no text"),
    )


def test_an_imports_name(workspace, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", GOOD)
    for name in ("two\nlines", "x" * 101):
        with pytest.raises(ConfigError, match="An import's name"):
            importing.import_file(workspace, path, name=name)


def test_a_public_space_imports_nothing(workspace, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", GOOD)
    monkeypatch.setenv("SPACE_ID", "someone/space")
    for dry_run in (False, True):
        with pytest.raises(RefusedError):
            importing.import_file(workspace, path, dry_run=dry_run)
    with pytest.raises(RefusedError):
        importing.preview(path)
    assert not workspace.preferences.exists()


# Validation


def test_validate_a_file_and_a_journal(workspace, tmp_path):
    assert importing.validate(workspace).rows == 0
    path = write_lines(tmp_path / "rows.jsonl", GOOD, {"chosen": "b"}, GOOD | {"prompt": "p", "system": "s"})
    found = importing.validate(path)
    assert (found.rows, found.good, [line.line for line in found.bad]) == (3, 2, [2])
    assert found.notes == ("1 rows have a system text, which now stands before the prompt",)
    importing.import_file(workspace, path)
    ids = list(Journal(workspace.preferences).refresh().rows)
    journal.retract(workspace, ids[0])
    assert importing.validate(workspace).by_verdict == {"preferred": 2, "retracted": 1}
    row = GOOD | {"verdict": "preferred", "retracts": "", "pair_id": ""}
    with workspace.preferences.open("ab") as file:
        file.write(b'{"id": \n\n')
        for bad in (
            row,
            row | {"id": "1", "chosen": " "},
            row | {"id": ids[0]},
            row | {"id": "2", "verdict": "retracted", "retracts": "?"},
        ):
            file.write(json.dumps(bad).encode() + b"\n")
        file.write(json.dumps(row | {"id": "3"}).encode()[:-9])
    found = importing.validate(workspace)
    assert (found.rows, found.good) == (9, 3)
    starts = ["", "no id", "chosen is empty", "its id was there before, in line 1", "it takes back '?'", "it has no line end"]
    assert [line.line for line in found.bad] == [4, 6, 7, 8, 9, 10]
    assert all(line.reason.startswith(start) for line, start in zip(found.bad, starts, strict=True)), found.bad
    assert importing.validate(workspace.preferences) == found
