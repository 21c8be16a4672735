"""Damaged files of the workspace are one line that says what to do, and one bad item never hides the healthy ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from biasdpo import workspace as workspaces
from biasdpo.errors import BiasDPOError, WorkspaceError
from biasdpo.evaluation.run import AnswerCache
from biasdpo.migrations import open_workspace
from biasdpo.model_files import ForeignJson, read_json_as
from biasdpo.records import Completion, Likelihood
from biasdpo.workspace import Workspace, read_json
from tests.run_folders import write_run
from tests.run_line import CommandLine

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", DEEP, b"\xff", "{}", '{"format": "2"}', '{"format": true}', '{"format": 1}']
)
def test_a_damaged_version_file_is_one_line(tmp_path: Path, text: str | bytes) -> None:
    (tmp_path / "version.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WorkspaceError, match=r"version\.json.*: .*restore it from a backup or delete it$") as raised:
        open_workspace(tmp_path)
    assert "\n" not in str(raised.value)
    (tmp_path / "version.json").unlink()
    open_workspace(tmp_path)
    assert read_json(tmp_path / "version.json") == {"format": 2}


def test_a_workspace_of_a_newer_version_is_refused_and_nothing_written(command_line: CommandLine) -> None:
    root = command_line.workspace.root
    root.mkdir()
    (root / "version.json").write_text('{"format": 3}')
    done = command_line("jobs", "list")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"The workspace {root} has format 3, and this version of BiasDPO reads up to 2: update BiasDPO" in done.stderr
    assert [path.name for path in root.iterdir()] == ["version.json"]


def test_json_too_deep_or_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a":' * 100_000)
    with pytest.raises(WorkspaceError, match="nested too deeply; restore it"):
        read_json(file)
    file.write_text("1" * 10_000)  # more digits than Python converts
    with pytest.raises(WorkspaceError, match="as JSON"):
        read_json(file)
    monkeypatch.setattr(workspaces, "MAX_JSON_BYTES", 2**20)
    monkeypatch.setattr("biasdpo.model_files.MAX_JSON_BYTES", 2**20)
    file.write_text("{}" + " " * 2**20)
    with pytest.raises(WorkspaceError, match="more than 1 MiB; restore it"):
        read_json(file)
    with pytest.raises(BiasDPOError, match="more than 1 MiB; fetch it again"):
        read_json_as(file, ForeignJson)
    file.write_text("{}" + " " * (2**20 - 2))
    assert read_json(file) == {}


def test_the_command_line_lists_the_healthy_ones(command_line: CommandLine) -> None:
    workspace = open_workspace(command_line.workspace.root)
    good = write_run(workspace.root, "good").path
    for copy in ("good (copy)", "no-status", "no-provenance"):
        shutil.copytree(good, workspace.runs / copy)
    (workspace.runs / "no-status" / "status.json").write_text(DEEP)
    (workspace.runs / "no-provenance" / "adapter" / "provenance.json").write_text(DEEP)
    (workspace.root / "evaluations").mkdir()
    (workspace.root / "evaluations" / "foreign.json").write_text(DEEP)
    done = command_line("jobs", "list", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row["id"]: row for row in map(json.loads, done.stdout.splitlines())}
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        "good": "finished", "good (copy)": "failed", "no-status": "failed", "no-provenance": "finished", "foreign": "failed",
    }  # fmt: skip
    assert "rename" in rows["good (copy)"]["error"]
    assert "foreign.json" in rows["foreign"]["error"]
    done = command_line("models", "smollm2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert {"good", "smollm2-biasdpo"} <= {*json.loads(done.stdout)["adapters"]}
    assert "no-provenance" not in json.loads(done.stdout)["adapters"]


def test_damaged_lines_of_a_cache_are_passed_over(workspace: Workspace) -> None:
    cache = workspace.root / "scores.jsonl"
    cache.write_text(f'["a", -1.5, 1]\n{DEEP}\n{{}}\n["b", "Yes.", 2, "limit"]\n["c", "x", 2]\n["d')
    assert AnswerCache("base", cache)._answers == {"a": Likelihood(-1.5, 1), "b": Completion("base", "Yes.", 2, "limit")}
