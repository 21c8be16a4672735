"""The journal under kills: eight processes, torn lines, second tries. Nothing acknowledged is lost, nothing is there twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from biasdpo import data as dataset
from biasdpo.data import Journal, journal
from biasdpo.records import Judgment
from biasdpo.workspace import Workspace
from tests.journal_worker import ids_in_file, judgment, worker

ROOT = Path(__file__).resolve().parent.parent
PROCESSES, APPENDS, KILLS = 8, 200, 16

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
    (note,) = map(json.loads, journal.torn_file(workspace.preferences).read_text().splitlines())
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
    with journal.torn_file(workspace.preferences).open("ab") as file:
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
