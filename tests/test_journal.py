"""The journal loses nothing: kills, torn lines, full disks, locks, second tries; and it reads as it grows."""

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

from biasdpo import dataset
from biasdpo.dataset import Journal, growing, journal, rows, torn
from biasdpo.errors import DatasetError, WorkspaceError
from biasdpo.records import Judgment, JudgmentMeta
from biasdpo.workspace import Workspace
from tests.journal_worker import judgment

ROOT = Path(__file__).resolve().parent.parent
PROCESSES, APPENDS, KILLS = 8, 200, 16


def worker(workspace: Workspace, name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.journal_worker", str(workspace.root), name, *map(str, arguments)]


def ids_in_file(path: Path) -> list[str]:
    """Ids line by line, as anyone reads JSON lines: every line must be whole."""
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


# Kills


def test_eight_processes_killed_at_random_lose_nothing(workspace: Workspace) -> None:
    rng = random.Random(3)
    acks = {f"p{i}": workspace.root / f"p{i}.acks" for i in range(PROCESSES)}

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(worker(workspace, name, APPENDS, acks[name]), cwd=ROOT)

    running = {name: start(name) for name in acks}
    killed = 0
    while running:
        time.sleep(rng.uniform(0.02, 0.3))
        for name, process in list(running.items()):
            if process.poll() is not None:
                assert process.returncode == 0, name
                del running[name]
        under_way = [name for name in running if acks[name].exists() and acks[name].stat().st_size]
        if under_way and killed < KILLS:
            name = rng.choice(under_way)
            running[name].send_signal(signal.SIGKILL)
            if running[name].wait() == -signal.SIGKILL:
                killed += 1
                running[name] = start(name)
    acknowledged = [line for path in acks.values() for line in path.read_text().split()]
    stored = Counter(ids_in_file(workspace.preferences))
    assert killed > 0
    assert len(acknowledged) == len(stored) == PROCESSES * APPENDS  # 1,600
    assert set(stored.values()) == {1}
    assert set(acknowledged) == set(stored)
    found = Journal(workspace.preferences).refresh()
    assert found.bad_lines == []
    assert all(
        row["chosen"] == judgment(*row["id"].split("-")[:1], int(row["id"].split("-")[1])).chosen for row in found.standing()
    )


@pytest.mark.parametrize("at", ["write", "half a write", "fsync"])
def test_a_process_killed_within_an_append(workspace: Workspace, at: str) -> None:
    dataset.append(workspace, judgment("a", 1))
    before = workspace.preferences.read_bytes()
    script = f"""
import os, signal
from pathlib import Path
from biasdpo import dataset
from biasdpo.workspace import Workspace
from tests.journal_worker import judgment
write, die = os.write, lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if {at!r} == "write":
    os.write = die
elif {at!r} == "fsync":
    os.fsync = die
else:
    os.write = lambda file, data: (write(file, data[: len(data) // 2]), die())
dataset.append(Workspace(Path({str(workspace.root)!r})), judgment("a", 2))
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL
    after = workspace.preferences.read_bytes()
    state = "nothing" if after == before else "whole" if after.endswith(b"\n") else "torn"
    assert state == {"write": "nothing", "half a write": "torn", "fsync": "whole"}[at]
    again = dataset.append(workspace, judgment("a", 2))  # the second try
    assert (again.written, again.repaired) == {"write": (1, False), "half a write": (1, True), "fsync": (0, False)}[at]
    assert ids_in_file(workspace.preferences) == ["a-1", "a-2"]
    assert dataset.repaired_lines(workspace) == (at == "half a write")


# Torn lines


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_torn_line_is_set_aside_and_reported(workspace: Workspace, share: float) -> None:
    dataset.append(workspace, judgment("a", 1))
    whole = workspace.preferences.read_bytes()
    dataset.append(workspace, judgment("a", 2))
    line = workspace.preferences.read_bytes()[len(whole) :]
    rest = line[: max(1, int(share * (len(line) - 2)))]
    workspace.preferences.write_bytes(whole + rest)
    waiting = Journal(workspace.preferences).refresh()
    assert (list(waiting.rows), waiting.bad_lines) == (["a-1"], [])  # it may still be being written
    assert dataset.append(workspace, judgment("a", 3)) == dataset.Appended(1, 0, repaired=True)
    assert ids_in_file(workspace.preferences) == ["a-1", "a-3"]
    (note,) = map(json.loads, torn.torn_file(workspace.preferences).read_text().splitlines())
    assert (note["text"], note["kept"], note["offset"]) == (rest.decode(), False, len(whole))
    assert list(waiting.refresh().rows) == ["a-1", "a-3"]
    assert dataset.repaired_lines(workspace) == 1
    assert not dataset.append(workspace, judgment("a", 4)).repaired


def test_a_row_that_lacks_its_line_end_alone_is_kept(workspace: Workspace) -> None:
    dataset.append(workspace, judgment("a", 10))  # 150 KB: longer than what is read of a line at first
    workspace.preferences.write_bytes(workspace.preferences.read_bytes()[:-1])
    assert dataset.append(workspace, judgment("a", 10)) == dataset.Appended(0, 1, repaired=True)
    assert ids_in_file(workspace.preferences) == ["a-10"]
    assert dataset.repaired_lines(workspace) == 1


def test_a_line_whose_middle_never_reached_the_disk_is_torn_too(workspace: Workspace) -> None:
    for number in (1, 2):
        dataset.append(workspace, judgment("a", number))
    data = bytearray(workspace.preferences.read_bytes())
    data[-60:-10] = bytes(50)  # zeros where the block is missing; the line end is there
    workspace.preferences.write_bytes(data)
    reader = Journal(workspace.preferences).refresh()
    assert len(reader.bad_lines) == 1
    assert dataset.append(workspace, judgment("a", 3)).repaired
    assert ids_in_file(workspace.preferences) == ["a-1", "a-3"]
    assert (list(reader.refresh().rows), reader.bad_lines) == (["a-1", "a-3"], [])  # the file is not what it was: read anew


def test_mending_without_an_append(workspace: Workspace) -> None:
    assert not dataset.mend(workspace)
    assert not workspace.preferences.exists()
    dataset.append(workspace, judgment("a", 1))
    assert not dataset.mend(workspace)
    with workspace.preferences.open("ab") as file:
        file.write(b'{"id": "b')
    assert dataset.mend(workspace)
    assert ids_in_file(workspace.preferences) == ["a-1"]


def test_a_file_of_one_torn_line(workspace: Workspace) -> None:
    workspace.preferences.write_bytes(b'{"id": "a')
    assert dataset.append(workspace, judgment("a", 1)).repaired
    assert ids_in_file(workspace.preferences) == ["a-1"]


def test_a_repair_that_is_killed_is_done_again_and_counted_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.append(workspace, judgment("a", 1))
    with workspace.preferences.open("ab") as file:
        file.write(b'{"id": "b')

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", die)
        with pytest.raises(Killed):
            dataset.append(workspace, judgment("a", 2))
    assert dataset.append(workspace, judgment("a", 2)).repaired
    assert ids_in_file(workspace.preferences) == ["a-1", "a-2"]
    assert dataset.repaired_lines(workspace) == 1
    with torn.torn_file(workspace.preferences).open("ab") as file:
        file.write(b'{"at": "2')  # the note itself can be torn
    with workspace.preferences.open("ab") as file:
        file.write(b'{"id": "c')
    dataset.append(workspace, judgment("a", 3))
    assert dataset.repaired_lines(workspace) == 2


# Second tries


def test_the_same_id_twice_is_one_row(workspace: Workspace) -> None:
    one = judgment("a", 1)
    assert dataset.append(workspace, one).written == 1
    for number in range(2, 60):
        dataset.append(workspace, judgment("a", number))
    assert dataset.append(workspace, one) == dataset.Appended(0, 1, repaired=False)
    # An id that stands elsewhere in a row is no row of that id.
    dataset.append(workspace, Judgment("x", "", "", "p", 'says "id":"y"', "b", note="y", retracts="y"))
    assert dataset.append(workspace, Judgment("y", "", "", "p", "a", "b")).written == 1
    assert dataset.undo(workspace, "y", "", "ada") == dataset.retract(workspace, "y")
    assert len(set(ids_in_file(workspace.preferences))) == len(ids_in_file(workspace.preferences)) == 62


def test_a_second_try_is_known_however_late(workspace: Workspace) -> None:
    dataset.append_all(workspace, [judgment("a", number) for number in range(1, 40)])
    script = f"""
from pathlib import Path
from biasdpo import dataset
from biasdpo.workspace import Workspace
from tests.journal_worker import judgment
print(dataset.append(Workspace(Path({str(workspace.root)!r})), judgment("a", 1)).known)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout == "1\n"
    again = dataset.append_all(workspace, [judgment("a", 40), judgment("a", 2), judgment("a", 40)])
    assert again == dataset.Appended(written=1, known=2, repaired=False)
    # The same id in a line that is no row, written by nobody here, is no such row; one written otherwise is.
    with workspace.preferences.open("ab") as file:
        file.write(b'{"id":"bad","verdict":"none"}\n{"verdict": "tie", "id": "g\\u0061"}\n')
    assert dataset.append(workspace, Judgment("bad", "", "", "p", "a", "b")).written == 1
    assert dataset.append(workspace, Judgment("ga", "", "", "p", "a", "b")).known == 1
    workspace.preferences.unlink()
    assert dataset.append(workspace, judgment("a", 1)).written == 1  # another file: what was known counts no more


def test_processes_that_store_the_same_judgments_at_once(workspace: Workspace) -> None:
    processes = [subprocess.Popen(worker(workspace, "same", 9, workspace.root / f"{i}.acks"), cwd=ROOT) for i in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert ids_in_file(workspace.preferences) == [f"same-{i}" for i in range(9)]


# What can fail


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own at `folder`, where that is allowed."""
    command = ["mount", *options, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip() if done else 'needs root'}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def assert_one_line(error: WorkspaceError, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def test_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "-t", "tmpfs", "-o", "size=128k", "tmpfs"):
        workspace = Workspace(folder)
        dataset.append(workspace, judgment("a", 1))
        filler = folder / "filler"
        filler.write_bytes(bytes(100 * 1024))
        before = workspace.preferences.read_bytes()
        with pytest.raises(WorkspaceError) as caught:
            dataset.append(workspace, judgment("a", 10))
        assert_one_line(caught.value, "Not stored", str(workspace.preferences), "No space left", "try again")
        with pytest.raises(WorkspaceError, match="No space left"):  # all of them or none
            dataset.append_all(workspace, [judgment("a", 2), judgment("a", 10)])
        assert workspace.preferences.read_bytes() == before
        filler.unlink()
        small = judgment("a", 3)
        assert dataset.append(workspace, small).written == 1
        assert ids_in_file(workspace.preferences) == ["a-1", "a-3"]


def test_a_torn_line_on_a_full_disk_waits_for_its_repair(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        workspace = Workspace(folder)
        dataset.append(workspace, judgment("a", 1))
        with workspace.preferences.open("ab") as file:
            file.write(b'{"id": "b')
        before = workspace.preferences.read_bytes()
        (folder / "filler").write_bytes(b"")
        with pytest.raises(OSError, match="No space"):
            (folder / "filler").write_bytes(bytes(64 * 1024))
        with pytest.raises(WorkspaceError, match=r"preferences\.jsonl"):
            dataset.append(workspace, judgment("a", 2))
        assert workspace.preferences.read_bytes() == before
        (folder / "filler").unlink()
        assert dataset.append(workspace, judgment("a", 2)).repaired
        assert ids_in_file(workspace.preferences) == ["a-1", "a-2"]
        assert dataset.repaired_lines(workspace) == 1


def test_a_write_that_stops_half_way_is_taken_back(workspace: Workspace) -> None:
    dataset.append(workspace, judgment("a", 1))
    before = workspace.preferences.read_bytes()
    command = worker(workspace, "late", 1, "-", len(before) + 100)  # 100 bytes more, and the rest is refused
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "File too large" in output[0]
    assert output[1:] == [str(len(before)), "1"]  # nothing of it in the file; then it is stored
    assert ids_in_file(workspace.preferences) == ["a-1", "late-10"]


def test_read_only_folder(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    dataset.append(workspace, judgment("a", 1))
    before = workspace.preferences.read_bytes()
    with mounted(workspace.root, "--bind", str(workspace.root)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(workspace.root)], check=True)
        with pytest.raises(WorkspaceError) as caught:
            dataset.append(workspace, judgment("a", 2))
        assert_one_line(caught.value, str(workspace.preferences), "Read-only")
        assert [row["id"] for row in Journal(workspace.preferences).refresh().standing()] == ["a-1"]  # reading needs no lock
    assert workspace.preferences.read_bytes() == before
    assert dataset.append(workspace, judgment("a", 2)).written == 1


@pytest.mark.parametrize("name", ["preferences.jsonl", "preferences.jsonl.lock"])
def test_a_folder_in_a_files_place(workspace: Workspace, name: str) -> None:
    (workspace.root / name).mkdir()
    with pytest.raises(WorkspaceError) as caught:
        dataset.append(workspace, judgment("a", 1))
    assert_one_line(caught.value, str(workspace.preferences), "directory")
    (workspace.root / name).rmdir()
    assert dataset.append(workspace, judgment("a", 1)).written == 1


def test_a_file_in_the_workspaces_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError) as caught:
        dataset.append(Workspace(tmp_path / "file" / "workspace"), judgment("a", 1))
    assert_one_line(caught.value, "Not a directory")


def test_a_lock_that_is_held_too_long(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.2)
    dataset.append(workspace, judgment("a", 1))
    before = workspace.preferences.read_bytes()
    with FileLock(f"{workspace.preferences}.lock"), pytest.raises(WorkspaceError) as caught:
        dataset.append(workspace, judgment("a", 2))
    assert_one_line(caught.value, "locked by another process for 0.2 s", "try again")
    assert workspace.preferences.read_bytes() == before
    assert dataset.append(workspace, judgment("a", 2)).written == 1


def test_times_are_stored_with_their_milliseconds(workspace: Workspace) -> None:
    """Else pyarrow takes a file whose times all lack them for one of timestamps."""
    given = ("2024-07-18T02:00:00+02:00", "2024-07-18T00:00:00.123456Z", "2024-07-18T00:00", "long ago")
    for number, created_at in enumerate(given):
        dataset.append(workspace, replace(judgment("a", number), created_at=created_at))
    stored = [row["created_at"] for row in Journal(workspace.preferences).refresh().standing()]
    midnight = "2024-07-18T00:00:00.000+00:00"
    assert stored == [midnight, "2024-07-18T00:00:00.123+00:00", midnight, "long ago"]


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
    spoilt = Judgment(**{**vars(judgment("a", 1)), **change})
    for store in (lambda: dataset.append(workspace, spoilt), lambda: dataset.append_all(workspace, [judgment("a", 2), spoilt])):
        with pytest.raises(DatasetError, match=reason):
            store()
    assert not workspace.preferences.exists()


# Reading


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

    lines = growing.GrowingLines()
    with path.open("rb") as file:
        monkeypatch.setattr(growing.os, "pread", mend_between)
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

    monkeypatch.setattr(rows, "locked", locked)
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
