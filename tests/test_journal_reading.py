"""Reading the journal while others write it, and with what others read it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

from biasdpo import data as dataset
from biasdpo.data import Journal, journal
from biasdpo.records import JudgmentMeta
from biasdpo.workspace import Workspace
from tests.journal_worker import judgment

ROOT = Path(__file__).resolve().parent.parent


def test_a_reader_follows_while_lines_are_torn_and_mended(workspace: Workspace) -> None:
    count, done = 150, threading.Event()
    line = orjson.dumps(vars(judgment("torn", 10)) | {"meta": {}})

    def write() -> None:
        for number in range(count):
            dataset.append(workspace, judgment("a", number))
            if number % 3 == 0:
                with workspace.preferences.open("ab") as file:
                    file.write(line[: 1 + number * 977 % (len(line) - 2)])
        dataset.append(workspace, judgment("a", count))
        done.set()

    reader = Journal(workspace.preferences)
    thread = threading.Thread(target=write)
    thread.start()
    lengths = []
    while not done.is_set():
        lengths.append(len(reader.refresh().rows))
    thread.join()
    assert list(reader.refresh().rows) == [f"a-{number}" for number in range(count + 1)]
    assert reader.bad_lines == []
    assert lengths == sorted(lengths)
    assert dataset.repaired_lines(workspace) == count / 3


def test_what_is_written_while_it_is_read_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a torn line, cut off after its first block was read, and the row in its place would make one line."""
    path = tmp_path / "lines"
    path.write_bytes(b"first line\ntorn li")
    pread = os.pread

    def mend_between(file: int, size: int, offset: int) -> bytes:
        data = pread(file, size, offset)
        path.write_bytes(b"first line\na whole new line, and longer\n")
        return data

    lines = journal.GrowingLines()
    with path.open("rb") as file:
        monkeypatch.setattr(journal.os, "pread", mend_between)
        assert list(lines.read(file.fileno())) == [b"first line"]
        assert list(lines.read(file.fileno())) == [b"a whole new line, and longer"]


def test_a_line_in_doubt_is_read_again_under_the_lock(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two halves, read while a writer mended and appended: under the lock the writer is done."""
    dataset.append(workspace, judgment("a", 1))
    whole = workspace.preferences.read_bytes()
    workspace.preferences.write_bytes(b'{"id": "torn' + whole[12:])

    @contextmanager
    def locked(*_: object) -> Iterator[None]:
        workspace.preferences.write_bytes(whole)
        yield

    monkeypatch.setattr(journal, "locked", locked)
    reader = Journal(workspace.preferences).refresh()
    assert (list(reader.rows), reader.bad_lines) == (["a-1"], [])


def test_bad_lines_are_named_and_the_others_read(workspace: Workspace) -> None:
    good = [orjson.dumps({"id": str(i), "verdict": "preferred"}) for i in range(3)]
    lines = [b"\xef\xbb\xbf" + good[0], b"{", b"", good[1] + b"\r", b'{"id": 7}', b'["id"]', b'{"verdict": "tie"}', good[2], b""]
    workspace.preferences.write_bytes(b"\n".join(lines))
    reader = Journal(workspace.preferences).refresh()
    assert list(reader.rows) == ["0", "1", "2"]
    assert [bad.line for bad in reader.bad_lines] == [2, 5, 6, 7]
    assert [bad.reason for bad in reader.bad_lines][1:] == [
        "id must be a string, got int",
        "expected an object, got list",
        "no id",
    ]
    assert len(reader.refresh().bad_lines) == 4


def test_what_meta_has_of_another_type_is_not_given(workspace: Workspace) -> None:
    meta = {"seconds": 3, "seed": True, "model": None, "left_side": "base", "more": [1]}
    workspace.preferences.write_bytes(orjson.dumps({"id": "1", "verdict": "tie", "meta": meta}) + b"\n")
    (row,) = Journal(workspace.preferences).refresh().standing()
    assert row["meta"] == vars(JudgmentMeta(left_side="base", seconds=3.0))


@pytest.mark.parametrize("how", ["renamed", "in place", "shorter", "gone"])
def test_another_file_in_its_place_is_read_from_its_start(workspace: Workspace, how: str) -> None:
    for number in (1, 2):
        dataset.append(workspace, judgment("a", number))
    reader = Journal(workspace.preferences).refresh()
    first, mark = reader.since((0, 0))
    assert [row["id"] for row in first] == ["a-1", "a-2"]
    assert reader.since(mark) == ([], mark)
    other = Workspace(workspace.root / "other")
    dataset.append_all(other, [judgment("b", number) for number in range(1, 2 if how == "shorter" else 6)])
    if how == "renamed":
        other.preferences.replace(workspace.preferences)
    elif how == "gone":
        workspace.preferences.unlink()
    else:
        workspace.preferences.write_bytes(other.preferences.read_bytes())
    expected = [] if how == "gone" else [f"b-{number}" for number in range(1, 2 if how == "shorter" else 6)]
    assert list(reader.refresh().rows) == expected
    found, later = reader.since(mark)
    assert [row["id"] for row in found] == expected
    assert later[0] != mark[0]


# As others read it


def test_load_dataset_on_the_live_file(workspace: Workspace, tmp_path: Path) -> None:
    import datasets

    path = str(workspace.preferences)
    text = datasets.Value("string")
    meta = dict.fromkeys(vars(JudgmentMeta()), text) | {"seed": datasets.Value("int64"), "seconds": datasets.Value("float64")}
    columns = dict.fromkeys(vars(judgment("a", 1)), text) | {"meta": meta}
    done = threading.Event()
    dataset.append(workspace, judgment("a", 0))

    def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            dataset.append(workspace, judgment("a", number))
            time.sleep(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    lengths = []
    try:
        for attempt in range(3):
            cache = tmp_path / f"cache{attempt}"
            table = datasets.load_dataset("json", data_files=path, split="train", cache_dir=str(cache))
            assert table.features == datasets.Features(columns)
            assert table["id"][:] == [f"a-{number}" for number in range(len(table))]
            assert set(table["note"]) == {""}  # an all-empty column is text, never null
            lengths.append(len(table))
    finally:
        done.set()
        thread.join()
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
