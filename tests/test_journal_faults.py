"""What can fail while a judgment is stored: a full disk, a read-only folder, a lock that is held, a value no column takes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from biasdpo import data
from biasdpo.data import Journal, journal
from biasdpo.errors import DatasetError, WorkspaceError
from biasdpo.records import Judgment, JudgmentMeta
from biasdpo.workspace import Workspace
from tests.journal_worker import ids_in_file, judgment, worker

ROOT = Path(__file__).resolve().parent.parent


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
        data.append(workspace, judgment("a", 1))
        filler = folder / "filler"
        filler.write_bytes(bytes(100 * 1024))
        before = workspace.preferences.read_bytes()
        with pytest.raises(WorkspaceError) as caught:
            data.append(workspace, judgment("a", 10))
        assert_one_line(caught.value, "Not stored", str(workspace.preferences), "No space left", "try again")
        with pytest.raises(WorkspaceError, match="No space left"):  # all of them or none
            data.append_all(workspace, [judgment("a", 2), judgment("a", 10)])
        assert workspace.preferences.read_bytes() == before
        filler.unlink()
        small = judgment("a", 3)
        assert data.append(workspace, small).written == 1
        assert ids_in_file(workspace.preferences) == ["a-1", "a-3"]


def test_a_torn_line_on_a_full_disk_waits_for_its_repair(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, "-t", "tmpfs", "-o", "size=64k", "tmpfs"):
        workspace = Workspace(folder)
        data.append(workspace, judgment("a", 1))
        with workspace.preferences.open("ab") as file:
            file.write(b'{"id": "b')
        before = workspace.preferences.read_bytes()
        (folder / "filler").write_bytes(b"")
        with pytest.raises(OSError, match="No space"):
            (folder / "filler").write_bytes(bytes(64 * 1024))
        with pytest.raises(WorkspaceError, match=r"preferences\.jsonl"):
            data.append(workspace, judgment("a", 2))
        assert workspace.preferences.read_bytes() == before
        (folder / "filler").unlink()
        assert data.append(workspace, judgment("a", 2)).repaired
        assert ids_in_file(workspace.preferences) == ["a-1", "a-2"]
        assert data.repaired_lines(workspace) == 1


def test_a_write_that_stops_half_way_is_taken_back(workspace: Workspace) -> None:
    data.append(workspace, judgment("a", 1))
    before = workspace.preferences.read_bytes()
    command = worker(workspace, "late", 1, "-", len(before) + 100)  # 100 bytes more, and the rest is refused
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "File too large" in output[0]
    assert output[1:] == [str(len(before)), "1"]  # nothing of it in the file; then it is stored
    assert ids_in_file(workspace.preferences) == ["a-1", "late-10"]


def test_read_only_folder(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    data.append(workspace, judgment("a", 1))
    before = workspace.preferences.read_bytes()
    with mounted(workspace.root, "--bind", str(workspace.root)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(workspace.root)], check=True)
        with pytest.raises(WorkspaceError) as caught:
            data.append(workspace, judgment("a", 2))
        assert_one_line(caught.value, str(workspace.preferences), "Read-only")
        assert [row["id"] for row in Journal(workspace.preferences).refresh().standing()] == ["a-1"]  # reading needs no lock
    assert workspace.preferences.read_bytes() == before
    assert data.append(workspace, judgment("a", 2)).written == 1


@pytest.mark.parametrize("name", ["preferences.jsonl", "preferences.jsonl.lock"])
def test_a_folder_in_a_files_place(workspace: Workspace, name: str) -> None:
    (workspace.root / name).mkdir()
    with pytest.raises(WorkspaceError) as caught:
        data.append(workspace, judgment("a", 1))
    assert_one_line(caught.value, str(workspace.preferences), "directory")
    (workspace.root / name).rmdir()
    assert data.append(workspace, judgment("a", 1)).written == 1


def test_a_file_in_the_workspaces_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError) as caught:
        data.append(Workspace(tmp_path / "file" / "workspace"), judgment("a", 1))
    assert_one_line(caught.value, "Not a directory")


def test_a_lock_that_is_held_too_long(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.2)
    data.append(workspace, judgment("a", 1))
    before = workspace.preferences.read_bytes()
    with FileLock(f"{workspace.preferences}.lock"), pytest.raises(WorkspaceError) as caught:
        data.append(workspace, judgment("a", 2))
    assert_one_line(caught.value, "locked by another process for 0.2 s", "try again")
    assert workspace.preferences.read_bytes() == before
    assert data.append(workspace, judgment("a", 2)).written == 1


def test_times_are_stored_with_their_milliseconds(workspace: Workspace) -> None:
    """Else pyarrow takes a file whose times all lack them for one of timestamps."""
    given = ("2024-07-18T02:00:00+02:00", "2024-07-18T00:00:00.123456Z", "2024-07-18T00:00", "long ago")
    for number, created_at in enumerate(given):
        data.append(workspace, replace(judgment("a", number), created_at=created_at))
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
    for store in (lambda: data.append(workspace, spoilt), lambda: data.append_all(workspace, [judgment("a", 2), spoilt])):
        with pytest.raises(DatasetError, match=reason):
            store()
    assert not workspace.preferences.exists()
