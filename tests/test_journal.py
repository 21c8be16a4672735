"""The journal under kills, full disks and concurrent readers: nothing acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from filelock import FileLock

from biasdpo import access
from biasdpo.data import journal
from biasdpo.data.journal import Appended, Journal, append, append_all, edit, repair, repaired_lines, undo, withdraw
from biasdpo.data.pairs import pair_id_of
from biasdpo.errors import DatasetError, RefusedError, WorkspaceError
from biasdpo.records import Judgment, JudgmentMeta
from biasdpo.workspace import Workspace
from tests.journal_worker import ids_in_file, judgment, worker

ROOT = Path(__file__).resolve().parent.parent
PROCESSES, APPENDS, KILLS = 4, 80, 8


def ids(reader: Journal) -> list[str]:
    return list(reader.refresh().rows)


def add_bytes(workspace: Workspace, data: bytes) -> None:
    with workspace.preferences.open("ab") as file:
        file.write(data)


# Kills


def test_processes_killed_at_random_lose_nothing(workspace: Workspace) -> None:
    rng = random.Random(3)
    acks = {f"p{i}": workspace.root / f"p{i}.acks" for i in range(PROCESSES)}

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(worker(workspace, name, APPENDS, acks[name]), cwd=ROOT)

    running = {name: start(name) for name in acks}
    killed = 0
    while running:
        time.sleep(rng.uniform(0.01, 0.1))
        for name, process in list(running.items()):
            if process.poll() is not None:
                assert process.returncode == 0, name
                del running[name]
        appending = [name for name in running if acks[name].exists() and acks[name].stat().st_size]
        if appending and killed < KILLS:
            name = rng.choice(appending)
            running[name].send_signal(signal.SIGKILL)
            if running[name].wait() == -signal.SIGKILL:
                killed += 1
                running[name] = start(name)
    acknowledged = [line for path in acks.values() for line in path.read_text().split()]
    stored = Counter(ids_in_file(workspace.preferences))
    assert killed > 0
    assert len(acknowledged) == len(stored) == PROCESSES * APPENDS
    assert set(stored.values()) == {1}
    assert set(acknowledged) == set(stored)
    found = Journal(workspace.preferences).refresh()
    assert found.bad_lines == []
    for row in found.standing():
        name, number = row["id"].split("-")
        assert row["chosen"] == judgment(name, int(number)).chosen


@pytest.mark.parametrize("at", ["write", "half a write", "fsync"])
def test_a_process_killed_within_an_append(workspace: Workspace, at: str) -> None:
    append(workspace, judgment("a", 1))
    before = workspace.preferences.read_bytes()
    script = f"""
import os, signal
from pathlib import Path
from biasdpo.data.journal import append
from biasdpo.workspace import Workspace
from tests.journal_worker import judgment
write, die = os.write, lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if {at!r} == "write":
    os.write = die
elif {at!r} == "fsync":
    os.fsync = die
else:
    os.write = lambda file, data: (write(file, data[: len(data) // 2]), die())
append(Workspace(Path({str(workspace.root)!r})), judgment("a", 2))
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL
    after = workspace.preferences.read_bytes()
    state = "nothing" if after == before else "whole" if after.endswith(b"\n") else "truncated"
    assert state == {"write": "nothing", "half a write": "truncated", "fsync": "whole"}[at]
    again = append(workspace, judgment("a", 2))
    assert (again.written, again.repaired) == {"write": (1, False), "half a write": (1, True), "fsync": (0, False)}[at]
    assert ids_in_file(workspace.preferences) == ["a-1", "a-2"]
    assert repaired_lines(workspace) == (at == "half a write")


def test_a_repeated_append_is_synced_before_it_is_acknowledged(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that wrote the row may have been killed before its fsync."""
    append(workspace, judgment("a", 1))
    synced: list[int] = []
    monkeypatch.setattr(journal.os, "fsync", synced.append)
    assert append(workspace, judgment("a", 1)).known == 1
    assert synced


# Truncated lines


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_truncated_line_is_set_aside(workspace: Workspace, share: float) -> None:
    append(workspace, judgment("a", 1))
    whole = workspace.preferences.read_bytes()
    append(workspace, judgment("a", 2))
    line = workspace.preferences.read_bytes()[len(whole) :]
    rest = line[: max(1, int(share * (len(line) - 2)))]
    workspace.preferences.write_bytes(whole + rest)
    reader = Journal(workspace.preferences).refresh()
    assert (list(reader.rows), reader.bad_lines) == (["a-1"], [])  # it may still be being written
    assert append(workspace, judgment("a", 3)) == Appended(1, 0, repaired=True)
    assert ids_in_file(workspace.preferences) == ids(reader) == ["a-1", "a-3"]
    (entry,) = map(json.loads, (workspace.root / "preferences.jsonl.torn").read_text().splitlines())
    assert (entry["text"], entry["kept"], entry["offset"]) == (rest.decode(), False, len(whole))
    assert not append(workspace, judgment("a", 4)).repaired


def test_a_row_that_only_lacks_its_line_end_is_kept(workspace: Workspace) -> None:
    append(workspace, judgment("a", 10))  # 150 KB: longer than the first block read of a line
    workspace.preferences.write_bytes(workspace.preferences.read_bytes()[:-1])
    assert append(workspace, judgment("a", 10)) == Appended(0, 1, repaired=True)
    assert ids_in_file(workspace.preferences) == ["a-10"]
    assert repaired_lines(workspace) == 1


def test_a_line_whose_middle_never_reached_the_disk(workspace: Workspace) -> None:
    append_all(workspace, [judgment("a", 1), judgment("a", 2)])
    data = workspace.preferences.read_bytes()
    workspace.preferences.write_bytes(data[:-60] + bytes(50) + data[-10:])  # zeros for the block; the line end is there
    reader = Journal(workspace.preferences).refresh()
    assert len(reader.bad_lines) == 1
    assert append(workspace, judgment("a", 3)).repaired
    assert ids_in_file(workspace.preferences) == ids(reader) == ["a-1", "a-3"]
    assert reader.bad_lines == []


def test_repair_without_an_append(workspace: Workspace) -> None:
    assert not repair(workspace)
    assert not workspace.preferences.exists()
    workspace.preferences.write_bytes(b'{"id": "a')
    assert repair(workspace)
    assert workspace.preferences.read_bytes() == b""
    append(workspace, judgment("a", 1))
    assert not repair(workspace)


def test_a_killed_repair_is_done_again_and_counted_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    append(workspace, judgment("a", 1))
    add_bytes(workspace, b'{"id": "b')

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", lambda *_: 1 / 0)  # not an OSError, which an append handles
        with pytest.raises(ZeroDivisionError):
            append(workspace, judgment("a", 2))
    assert append(workspace, judgment("a", 2)).repaired
    assert ids_in_file(workspace.preferences) == ["a-1", "a-2"]
    assert repaired_lines(workspace) == 1
    with (workspace.root / "preferences.jsonl.torn").open("ab") as file:
        file.write(b'{"at": "2')  # the record itself can be truncated
    add_bytes(workspace, b'{"id": "c')
    append(workspace, judgment("a", 3))
    assert repaired_lines(workspace) == 2


# Second tries


def test_the_same_id_twice_is_one_row(workspace: Workspace) -> None:
    append_all(workspace, [judgment("a", number) for number in range(1, 40)])
    assert append(workspace, judgment("a", 1)) == Appended(0, 1, repaired=False)
    # An id elsewhere in a row is not a row of that id.
    append(workspace, Judgment("x", "", "", "p", 'says "id":"y"', "b", note="y", retracts="y"))
    assert append(workspace, Judgment("y", "", "", "p", "a", "b")).written == 1
    undo(workspace, "y", "", "ada")
    assert withdraw(workspace, ["y"]) == 0
    again = append_all(workspace, [judgment("a", 40), judgment("a", 2), judgment("a", 40)])
    assert again == Appended(written=1, known=2, repaired=False)
    assert len(set(ids_in_file(workspace.preferences))) == len(ids_in_file(workspace.preferences)) == 43
    # Another program's lines: one that is not a row does not count, one with an escaped id does.
    add_bytes(workspace, b'{"id":"bad","verdict":"none"}\n{"verdict": "tie", "id": "g\\u0061"}\n')
    assert append(workspace, Judgment("bad", "", "", "p", "a", "b")).written == 1
    assert append(workspace, Judgment("bad", "", "", "p", "a", "b")).known == 1
    assert append(workspace, Judgment("ga", "", "", "p", "a", "b")).known == 1
    workspace.preferences.unlink()
    assert append(workspace, judgment("a", 1)).written == 1  # another file: what was known no longer counts


def test_processes_that_store_the_same_judgments_at_once(workspace: Workspace) -> None:
    processes = [subprocess.Popen(worker(workspace, "same", 9, workspace.root / f"{i}.acks"), cwd=ROOT) for i in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert ids_in_file(workspace.preferences) == [f"same-{i}" for i in range(9)]
    # A process that starts later knows the ids, too.
    subprocess.run(worker(workspace, "same", 10, workspace.root / "late.acks"), cwd=ROOT, check=True)
    assert ids_in_file(workspace.preferences) == [f"same-{i}" for i in range(10)]


# Changes


def test_an_edit_supersedes_and_a_withdrawal_takes_what_stands(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    append_all(workspace, [replace(judgment("a", number), annotator="ada") for number in range(3)])
    before = workspace.preferences.read_bytes()
    old = Journal(workspace.preferences).refresh().rows["a-1"]
    for bad, reason in (
        ({"chosen": " "}, "chosen is empty"),
        ({"rejected": old["chosen"]}, "the same text"),
        ({"category": "x" * 201}, "at most 200"),
        ({"annotator": "eve"}, "Only prompt, chosen.* can be edited"),
    ):
        with pytest.raises(DatasetError, match=reason):
            edit(workspace, ["a-0", "a-1"], bad)
    assert workspace.preferences.read_bytes() == before  # all of them or none
    (new_id,) = edit(workspace, ["a-1"], {"chosen": "Mended.", "note": "why"}, "ben")
    assert edit(workspace, ["a-1"], {"chosen": "Too late."}) == []  # of two edits of one judgment, the first counts
    assert edit(workspace, [new_id], {"chosen": "Mended."}) == []  # nothing to change
    assert workspace.preferences.read_bytes().startswith(before)
    reader = Journal(workspace.preferences).refresh()
    assert [row["id"] for row in reader.standing()] == ["a-0", "a-2", new_id]
    changed = {"id": new_id, "chosen": "Mended.", "note": "why", "original_chosen": old["chosen"]}
    new = reader.rows[new_id]
    assert new == old | changed | {"pair_id": pair_id_of(new["prompt"], "Mended.", new["rejected"])}
    retraction = reader.rows["retracts-a-1"]
    assert (journal.replacement(retraction), retraction["annotator"]) == (new_id, "ben")
    (back,) = edit(workspace, [new_id], {"chosen": old["chosen"]})
    assert Journal(workspace.preferences).refresh().rows[back]["original_chosen"] == ""
    assert withdraw(workspace, ["a-0", "a-1", back], "ben") == 2
    assert withdraw(workspace, ["a-0"]) == 0
    with pytest.raises(DatasetError, match="No judgment 'nope'"):
        withdraw(workspace, ["a-2", "nope"])
    monkeypatch.setattr(access, "_source", lambda: access.Caller(access.Role.visitor))
    for action in (
        lambda: edit(workspace, ["a-2"], {"note": "x"}),
        lambda: withdraw(workspace, ["a-2"]),
        lambda: journal.undo_import(workspace, "import:x"),
    ):
        with pytest.raises(RefusedError):
            action()
    assert [row["id"] for row in Journal(workspace.preferences).refresh().standing()] == ["a-2"]


def test_edits_of_one_judgment_at_the_same_time_leave_one(workspace: Workspace) -> None:
    append(workspace, judgment("a", 1))
    threads = [threading.Thread(target=edit, args=(workspace, ["a-1"], {"note": f"by {i}"})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Journal(workspace.preferences).refresh().standing()) == 1


# Failures


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount a file system at `folder`, if that is allowed."""
    command = ["mount", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip() if done else 'needs root'}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def refused(workspace: Workspace, *judgments: Judgment) -> str:
    """The one line of an append that fails."""
    with pytest.raises(WorkspaceError) as caught:
        append_all(workspace, judgments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "-t", "tmpfs", "-o", "size=128k", "tmpfs"):
        workspace = Workspace(folder)
        append(workspace, judgment("a", 1))
        filler = folder / "filler"
        filler.write_bytes(bytes(100 * 1024))
        before = workspace.preferences.read_bytes()
        for judgments in ([judgment("a", 10)], [judgment("a", 2), judgment("a", 10)]):  # all of them or none
            message = refused(workspace, *judgments)
            assert all(part in message for part in ("Not stored", str(workspace.preferences), "No space left", "try again"))
        assert workspace.preferences.read_bytes() == before
        filler.unlink()
        assert append(workspace, judgment("a", 3)).written == 1
        add_bytes(workspace, b'{"id": "b')  # a truncated line waits for its repair until there is room
        before = workspace.preferences.read_bytes()
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(128 * 1024))
        refused(workspace, judgment("a", 4))
        assert workspace.preferences.read_bytes() == before
        filler.unlink()
        assert append(workspace, judgment("a", 4)).repaired
        assert ids_in_file(workspace.preferences) == ["a-1", "a-3", "a-4"]


def test_a_write_that_stops_half_way_is_undone(workspace: Workspace) -> None:
    append(workspace, judgment("a", 1))
    size = workspace.preferences.stat().st_size
    command = worker(workspace, "late", 1, "-", size + 100)  # 100 bytes more, and the rest is refused
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "File too large" in output[0]
    assert output[1:] == [str(size), "1"]  # nothing of it in the file; then it is stored
    assert ids_in_file(workspace.preferences) == ["a-1", "late-10"]


def test_read_only_folder(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    append(workspace, judgment("a", 1))
    with mounted(workspace.root, "--bind", str(workspace.root)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(workspace.root)], check=True)
        assert "Read-only" in refused(workspace, judgment("a", 2))
        assert ids(Journal(workspace.preferences)) == ["a-1"]  # reading needs no lock
    assert append(workspace, judgment("a", 2)).written == 1


@pytest.mark.parametrize("name", ["preferences.jsonl", "preferences.jsonl.lock"])
def test_a_folder_in_a_files_place(workspace: Workspace, name: str) -> None:
    (workspace.root / name).mkdir()
    assert "directory" in refused(workspace, judgment("a", 1))
    (workspace.root / name).rmdir()
    assert append(workspace, judgment("a", 1)).written == 1


def test_a_lock_held_too_long(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.2)
    with FileLock(f"{workspace.preferences}.lock"):
        assert "locked by another process for 0.2 s" in refused(workspace, judgment("a", 2))
    assert append(workspace, judgment("a", 2)).written == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"note": None}, "note must be a string, got NoneType"),
        ({"note": "half \ud800"}, "surrogates"),
        ({"verdict": "maybe"}, "verdict must be one of"),
        ({"id": ""}, "no id"),
        ({"meta": JudgmentMeta(seconds=float("nan"))}, "seconds must be a number"),
        ({"meta": JudgmentMeta(seconds="soon")}, "float"),  # type: ignore[arg-type]
        ({"meta": JudgmentMeta(model=None)}, "wrong type"),  # type: ignore[arg-type]
        ({"meta": JudgmentMeta(seed=2**64)}, "64-bit"),
    ],
)
def test_what_would_spoil_a_column_is_not_stored(workspace: Workspace, change: dict[str, object], reason: str) -> None:
    spoiled = Judgment(**{**vars(judgment("a", 1)), **change})
    with pytest.raises(DatasetError, match=reason):
        append_all(workspace, [judgment("a", 2), spoiled])
    assert not workspace.preferences.exists()


def test_times_are_stored_with_their_milliseconds(workspace: Workspace) -> None:
    """Else pyarrow takes a file whose times all lack them for one of timestamps."""
    given = ("2024-07-18T02:00:00+02:00", "2024-07-18T00:00:00.123456Z", "2024-07-18T00:00", "long ago")
    append_all(workspace, [replace(judgment("a", i), created_at=created_at) for i, created_at in enumerate(given)])
    stored = [row["created_at"] for row in Journal(workspace.preferences).refresh().standing()]
    midnight = "2024-07-18T00:00:00.000+00:00"
    assert stored == [midnight, "2024-07-18T00:00:00.123+00:00", midnight, "long ago"]


# Reading


def test_a_reader_follows_while_lines_are_truncated_and_repaired(workspace: Workspace) -> None:
    count, done = 60, threading.Event()
    line = orjson.dumps(vars(judgment("truncated", 10)) | {"meta": {}})

    def write() -> None:
        for number in range(count):
            append(workspace, judgment("a", number))
            if number % 3 == 0:
                add_bytes(workspace, line[: 1 + number * 977 % (len(line) - 2)])
        append(workspace, judgment("a", count))
        done.set()

    reader = Journal(workspace.preferences)
    thread = threading.Thread(target=write)
    thread.start()
    lengths = []
    while not done.is_set():
        lengths.append(len(ids(reader)))
    thread.join()
    assert ids(reader) == [f"a-{number}" for number in range(count + 1)]
    assert reader.bad_lines == []
    assert lengths == sorted(lengths)
    assert repaired_lines(workspace) == count / 3


def test_what_is_written_during_a_read_is_read_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a truncated line, cut off after its first block was read, and the row in its place would make one line."""
    path = tmp_path / "lines"
    path.write_bytes(b"first line\ntorn li")
    pread = os.pread

    def repair_between(file: int, size: int, offset: int) -> bytes:
        data = pread(file, size, offset)
        path.write_bytes(b"first line\na whole new line, and longer\n")
        return data

    lines = journal.GrowingLines()
    with path.open("rb") as file:
        monkeypatch.setattr(journal.os, "pread", repair_between)
        assert list(lines.read(file.fileno())) == [b"first line"]
        assert list(lines.read(file.fileno())) == [b"a whole new line, and longer"]


def test_a_doubtful_line_is_read_again_under_the_lock(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be two halves, read while a writer repaired and appended."""
    append(workspace, judgment("a", 1))
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
    meta = {"seconds": 3, "seed": True, "model": None, "left_side": "base", "more": [1]}  # what has a wrong type is dropped
    good = [orjson.dumps({"id": str(i), "verdict": "preferred", "meta": meta}) for i in range(3)]
    deep = b"[" * 100_000 + b"]" * 100_000
    lines = [b"\xef\xbb\xbf" + good[0], b"{", b"", good[1] + b"\r", b'{"id": 7}', b'["id"]', b'{"verdict": "tie"}', deep]
    lines += [b'{"id": "x", "verdict": "tie", "meta": ' + deep + b"}", good[2], b""]
    workspace.preferences.write_bytes(b"\n".join(lines))
    reader = Journal(workspace.preferences).refresh()
    assert list(reader.rows) == ["0", "1", "2"]
    assert reader.rows["2"]["meta"] == vars(JudgmentMeta(left_side="base", seconds=3.0))
    assert [bad.line for bad in reader.bad_lines] == [2, 5, 6, 7, 8, 9]
    reasons = ["id must be a string, got int", "expected an object, got list", "no id"]
    assert [bad.reason for bad in reader.bad_lines][1:4] == reasons
    assert len(reader.refresh().bad_lines) == 6
    assert append(workspace, judgment("a", 1)).written == 1


@pytest.mark.parametrize("how", ["renamed", "in place", "shorter", "gone"])
def test_another_file_in_its_place_is_read_from_its_start(workspace: Workspace, how: str) -> None:
    append_all(workspace, [judgment("a", 1), judgment("a", 2)])
    reader = Journal(workspace.preferences).refresh()
    first, mark = reader.since((0, 0))
    assert [row["id"] for row in first] == ["a-1", "a-2"]
    assert reader.since(mark) == ([], mark)
    other = Workspace(workspace.root / "other")
    expected = [f"b-{number}" for number in range(1, 2 if how == "shorter" else 6)]
    append_all(other, [judgment("b", number) for number in range(1, len(expected) + 1)])
    if how == "renamed":
        other.preferences.replace(workspace.preferences)
    elif how == "gone":
        workspace.preferences.unlink()
        expected = []
    else:
        workspace.preferences.write_bytes(other.preferences.read_bytes())
    assert ids(reader) == expected
    found, later = reader.since(mark)
    assert [row["id"] for row in found] == expected
    assert later[0] != mark[0]


def test_load_dataset_reads_the_live_file(workspace: Workspace, tmp_path: Path) -> None:
    import datasets

    text = datasets.Value("string")
    meta = dict.fromkeys(vars(JudgmentMeta()), text) | {"seed": datasets.Value("int64"), "seconds": datasets.Value("float64")}
    columns = dict.fromkeys(vars(judgment("a", 1)), text) | {"meta": meta}
    done = threading.Event()
    append(workspace, judgment("a", 0))

    def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            append(workspace, judgment("a", number))
            time.sleep(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    lengths = []
    try:
        for attempt in range(2):
            cache = str(tmp_path / f"cache{attempt}")
            table = datasets.load_dataset("json", data_files=str(workspace.preferences), split="train", cache_dir=cache)
            assert table.features == datasets.Features(columns)
            assert table["id"][:] == [f"a-{number}" for number in range(len(table))]
            assert set(table["note"]) == {""}  # an all-empty column is text, never null
            lengths.append(len(table))
    finally:
        done.set()
        thread.join()
    assert lengths[0] < lengths[1]
