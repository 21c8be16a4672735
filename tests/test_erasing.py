"""Erasing what one annotator stored: nothing else changes, readers notice, and a kill leaves the old journal or the new one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from biasdpo import access
from biasdpo.data.erasing import erase
from biasdpo.data.exporting import export_file
from biasdpo.data.journal import Journal, append, append_all, edit, new_judgment, truncated_file, withdraw
from biasdpo.data.pairs import PreferencePair
from biasdpo.data.splits import write_dataset
from biasdpo.errors import DatasetError, RefusedError
from biasdpo.records import Judgment, JudgmentMeta
from biasdpo.workspace import Workspace, sha256_of, write_json
from tests.commands import run
from tests.journal_worker import judgment, worker

ROOT = Path(__file__).resolve().parent.parent


def by(annotator: str, number: int, browser: str = "") -> Judgment:
    return replace(judgment(annotator, number), annotator=annotator, meta=JudgmentMeta(browser=browser))


def lines(workspace: Workspace) -> list[bytes]:
    return workspace.preferences.read_bytes().splitlines(keepends=True)


def stored(workspace: Workspace) -> list[str]:
    return [row["id"] for row in Journal(workspace.preferences).refresh().standing()]


def test_the_others_lines_stay_byte_for_byte(workspace: Workspace) -> None:
    append_all(workspace, [judgment_ for n in range(1, 4) for judgment_ in (by("kim", n, f"b{n}"), by("lee", n))])
    with workspace.preferences.open("ab") as file:
        file.write(b'not a row\n\n{ "id":"odd", "verdict": "tie","annotator" :"lee"}\n')
    withdraw(workspace, ["kim-1"], "lee")  # goes with what it withdraws
    edited = edit(workspace, ["kim-2"], {"note": "seen"}, "lee")
    before = lines(workspace)
    withdraw(workspace, ["lee-1"], "kim")  # stays, or lee-1 would count again
    workspace.preferences.chmod(0o660)
    kept = [line for line in before if b"kim" not in line and edited[0].encode() not in line]

    removed, remaining = erase(workspace, "kim")

    *others, last = lines(workspace)
    assert others == kept
    assert b"kim" not in workspace.preferences.read_bytes()
    assert (json.loads(last)["retracts"], json.loads(last)["annotator"]) == ("lee-1", "")
    assert removed == len(before) - len(kept) == 6  # three, the edited one, and two retractions
    assert remaining == []
    assert stored(workspace) == ["lee-2", "lee-3", "odd"]
    assert workspace.preferences.stat().st_mode & 0o777 == 0o660
    with pytest.raises(DatasetError, match="Nothing by 'kim'"):
        erase(workspace, "kim")


def test_one_browser_of_a_shared_name_and_who_may(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    append_all(workspace, [by("kim", 1, "aa"), by("kim", 2, "bb"), by("kim", 3, "aa")])
    with monkeypatch.context() as visit:
        visit.setattr(access, "_source", lambda: access.Caller(access.Role.annotator))
        with pytest.raises(RefusedError):
            erase(workspace, "kim")
    with pytest.raises(DatasetError, match="browser: cc"):
        erase(workspace, "kim", "cc")
    assert erase(workspace, "kim", "aa", dry_run=True)[0] == 2
    assert stored(workspace) == ["kim-1", "kim-2", "kim-3"]
    assert erase(workspace, "kim", "aa")[0] == 2
    assert stored(workspace) == ["kim-2"]


def test_readers_and_appends_go_on_with_the_new_file(workspace: Workspace, tmp_path: Path) -> None:
    append_all(workspace, [by("kim", 1), by("lee", 1), by("kim", 2), by("lee", 2)])
    reader = Journal(workspace.preferences).refresh()
    _rows, mark = reader.since((0, 0))
    erase(workspace, "kim")
    # As many bytes as were erased, and more: the old offset lies within the new file.
    subprocess.run(worker(workspace, "new", 12, tmp_path / "acks"), cwd=ROOT, check=True)
    append(workspace, by("lee", 1))  # this process's list of known ids is of the old file
    append(workspace, by("lee", 3))
    expected = ["lee-1", "lee-2", *(f"new-{n}" for n in range(12)), "lee-3"]
    assert list(reader.refresh().rows) == expected
    assert [row["id"] for row in reader.since(mark)[0]] == expected  # all anew
    assert reader.bad_lines == []
    erase(workspace, "lee")  # the new file may get the inode of the first
    assert list(reader.refresh().rows) == expected[2:-1]
    append(workspace, by("lee", 1))
    assert list(reader.refresh().rows) == [*expected[2:-1], "lee-1"]


@pytest.mark.parametrize("at", ["write_bytes", "chmod", "replace", "sync_folder"])
def test_killed_within(workspace: Workspace, at: str) -> None:
    append_all(workspace, [by("kim", 1), by("lee", 10), by("kim", 2)])
    before, (_, kept, _) = workspace.preferences.read_bytes(), lines(workspace)
    script = f"""
import os, signal
from pathlib import Path
from biasdpo.data import erasing
from biasdpo.workspace import Workspace
write, die = Path.write_bytes, lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if {at!r} == "write_bytes":
    Path.write_bytes = lambda path, data: (write(path, data[: len(data) // 2]), die())
else:
    setattr(erasing if {at!r} == "sync_folder" else Path, {at!r}, die)
erasing.erase(Workspace(Path({str(workspace.root)!r})), "kim")
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL
    assert workspace.preferences.read_bytes() == (kept if at == "sync_folder" else before)
    if at != "sync_folder":
        assert erase(workspace, "kim")[0] == 2
    assert workspace.preferences.read_bytes() == kept
    assert [*workspace.root.glob(".preferences*")] == []


def test_the_command_names_what_it_does_not_reach(workspace: Workspace, tmp_path: Path) -> None:
    kim = new_judgment('Who "leads"?', "Both.", "Men – of course.", annotator="kim")
    append_all(workspace, [kim, new_judgment("Who cooks?", "All.", "Women.", annotator="lee")])
    pair = PreferencePair(kim.prompt, kim.chosen, kim.rejected)
    root, exported = workspace.root, [tmp_path / f"pairs{suffix}" for suffix in (".jsonl", ".csv", ".parquet")]
    for file in exported:
        export_file(workspace, file)
    (root / "runs/old/adapter").mkdir(parents=True)
    write_dataset([pair], root / "runs/old/dataset.jsonl")
    write_json(root / "exports/old/m.gguf.json", {"parents": {"dataset.jsonl": sha256_of(root / "runs/old/dataset.jsonl")}})
    write_json(
        root / "evaluations/e/result.json", {"items": [{name: getattr(kim, name) for name in ("prompt", "chosen", "rejected")}]}
    )
    write_json(root / "runs/named/job.json", {"confounds": {"annotators": [{"annotator": "kim"}]}})
    (root / "runs/other").mkdir()
    write_dataset([PreferencePair("Who cooks?", "All.", "Women.")], root / "runs/other/dataset.jsonl")
    truncated_file(workspace.preferences).write_text("{}\n")

    asked = run("dataset", "erase", "--annotator", "kim", "--workspace", root)
    assert "1 row by 'kim'" in asked.error
    done = run("dataset", "erase", "--annotator", "kim", "--yes", "--json", "--workspace", root)
    inside = ("evaluations/e/result.json", "exports/old/m.gguf", "preferences.jsonl.torn", "runs/named/job.json")
    inside += ("runs/old/adapter", "runs/old/dataset.jsonl")
    assert json.loads(done.stdout)["removed"] == 1
    assert sorted(json.loads(done.stdout)["remaining"]) == sorted(map(str, (*(root / name for name in inside), *exported)))
    assert [row["annotator"] for row in Journal(workspace.preferences).refresh().standing()] == ["lee"]
    logged = json.loads((root / "audit.jsonl").read_text().splitlines()[-1])
    assert (logged["action"], logged["rows"]) == ("erase", "1")
    assert "kim" not in (root / "audit.jsonl").read_text().replace(str(tmp_path), "")
    assert "Nothing by 'kim'" in run("dataset", "erase", "--annotator", "kim", "--yes", "--workspace", root).error
