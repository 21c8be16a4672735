"""A workspace of version 0.1 is upgraded when it is opened: everything in it is there afterwards, whatever happens meanwhile."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

from biasdpo.data import splits
from biasdpo.errors import WorkspaceError
from biasdpo.gguf.export import load_record
from biasdpo.jobs.job import START_MARK, Job
from biasdpo.jobs.store import find_job, list_jobs, load_result, resume_job
from biasdpo.migrations import open_workspace
from biasdpo.models import list_adapters
from biasdpo.workspace import Workspace
from tests import old_workspace
from tests.old_workspace import AT, DEAD, tree
from tests.run_line import CommandLine, ended, kill_jobs, wait_for

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "old-workspace" / "workspace-0.1"
BENCHMARKS = ROOT.parent / "shared" / "benchmarks"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return old_workspace.write_workspace(tmp_path / "workspace")


def jobs_of(workspace: Workspace) -> dict[str, Job]:
    return {f"{job.kind}/{job.id}": job for job in list_jobs(workspace)}


def test_everything_is_there_afterwards(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, split = tree(old), splits.read_snapshot(old / "runs" / "done").split  # derived as version 0.1 did it
    with caplog.at_level(logging.WARNING):
        workspace = open_workspace(old)
    assert json.loads((old / "version.json").read_text()) == {"format": 2}
    found = jobs_of(workspace)
    assert {name: (job.state, job.config is not None) for name, job in found.items()} == {
        "train/done": ("finished", True),
        "train/halted": ("stopped", True),
        "evaluate/crows-1": ("finished", True),
        "evaluate/crows-2": ("stopped", True),
        "evaluate/crows-3": ("failed", True),
        "evaluate/crows-4": ("interrupted", True),
        "evaluate/by-hand": ("finished", False),  # a result alone stays where it was written
        "export/smol": ("finished", True),
        "export/smol-2": ("finished", True),
        "export/lost": ("finished", True),
        "export/foreign": ("finished", False),
        "export/big": ("interrupted", True),
    }
    for name, job in found.items():
        assert not job.error or job.state in ("failed", "interrupted"), name
        assert job.started_at == AT or not job.config, name
        json.dumps(job.to_json())
        assert find_job(name, workspace).id == job.id
    assert (old / "preferences.jsonl").read_bytes() == before["preferences.jsonl"]
    assert found["train/done"].record.origin() == json.loads(before["runs/done/origin.json"] or b"")
    assert (old / "runs" / "done" / "split.json").is_file()
    assert splits.read_snapshot(old / "runs" / "done").split == split
    assert 0 < len(split.held_out) < 20
    assert found["train/done"].to_json()["note"] == "the good one"
    assert found["train/halted"].log_tail(9).startswith(START_MARK)
    assert load_result(found["evaluate/crows-1"])["provenance"]["code_version"] == "0.1.0"
    assert found["evaluate/crows-3"].error == "No data: get it"
    assert found["evaluate/crows-4"].status.progress[0].done == 3
    assert found["evaluate/crows-2"].config.model == str(found["export/smol"].file)  # moved, and named by its new path
    for name in ("smol", "smol-2"):
        job = found[f"export/{name}"]
        assert job.file.read_text() == "GGUF"
        record = load_record(job.file)
        assert record is not None
        assert (record.out, record.adapter) == (job.file, "smollm2-biasdpo")
        assert (job.folder.path / "smol.gguf.Modelfile").is_file()
    assert "lost.gguf was not in the workspace" in found["export/lost"].status.notes[0]
    assert {path.name for path in found["export/big"].folder.path.iterdir()} == {
        "job.json", "config.json", "status.json", "log.txt",
    }  # fmt: skip
    left = {path.name for path in old.rglob("*") if "backup" not in str(path)}
    assert not left & {"origin.json", "train.log", "export", ".queue-cpu", ".lock-cpu", ".changing.lock", ".export-typed.gguf"}
    (backup,) = old.glob("backup-0.1-*")
    assert str(backup) in caplog.text
    for name in ("runs/done/origin.json", "evaluations/crows-1.status.json", "evaluations/crows-2.request.json"):
        assert (backup / name).read_bytes() == before[name]
    assert {path.suffix for path in backup.rglob("*") if path.is_file()} == {".json"}  # no adapter, no GGUF


def test_opened_again_nothing_changes_and_two_at_once_upgrade_once(old: Path) -> None:
    script = f"from biasdpo.migrations import open_workspace; open_workspace({str(old)!r})"
    processes = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate(timeout=60)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert said.count("Upgraded the workspace") == 1
    assert len(list(old.glob("backup-*"))) == 1
    before = tree(old)
    open_workspace(old)
    assert tree(old) == before


@pytest.mark.slow  # about a hundred upgrades
def test_killed_between_any_two_file_operations_the_end_is_the_same(old: Path, tmp_path: Path) -> None:
    in_memory = Path("/dev/shm")  # where nothing waits for a disk
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else tmp_path) as folder:
        command = [sys.executable, "-m", "tests.old_workspace", str(old), f"{folder}/copy"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 80


def make_active(root: Path, kind: str) -> None:
    me = psutil.Process()
    alive = {"state": "running", "pid": me.pid, "pid_created": me.create_time()}
    if kind == "run":
        old_workspace.write_run(root / "runs" / "busy", **alive, model="smollm2")
    elif kind == "evaluation":
        old_workspace.write_evaluation(root, "busy", **alive)
    else:
        old_workspace.write_unfinished(root / "exports" / ".export-busy", is_job=True, **alive)


@pytest.mark.parametrize("kind", ["run", "evaluation", "export"])
def test_an_active_job_is_named_and_nothing_changes(old: Path, kind: str) -> None:
    make_active(old, kind)
    before = tree(old)
    with pytest.raises(WorkspaceError, match=f"its {kind} busy is running .*: stop {kind} busy first") as raised:
        open_workspace(old)
    assert "\n" not in str(raised.value)
    assert tree(old) == before


DAMAGE = ["", "{", "[]", '{"state": 7, "request": 3, "out": [], "started_at": {}, "model": 1}', "[" * 100_000, b"\xff"]


@pytest.mark.parametrize("content", DAMAGE, ids=[str(text)[:8] for text in DAMAGE])
def test_damaged_files_of_version_01_keep_no_other_from_being_upgraded(old: Path, content: str | bytes) -> None:
    damaged = ["runs/halted/origin.json", "runs/halted/status.json", "runs/halted/dataset.jsonl", "exports/lost.gguf.json"]
    damaged += ["evaluations/crows-1.status.json", "evaluations/crows-3.request.json", "evaluations/crows-4.status.json"]
    damaged += ["runs/done/export/.export-big.gguf/status.json", "runs/done/export/smol.gguf.json"]
    for name in damaged:
        (old / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    workspace = open_workspace(old)
    found = jobs_of(workspace)
    assert {"train/halted", "evaluate/crows-3", "evaluate/crows-4", "export/smol-2"} <= found.keys()
    assert (found["evaluate/crows-1"].state, found["evaluate/crows-4"].state) == ("finished", "interrupted")
    assert found["train/done"].error == found["evaluate/crows-2"].error == found["export/smol"].error == ""
    for job in found.values():
        assert "\n" not in job.error
        json.dumps(job.to_json())


def test_a_stopped_run_is_resumed_to_its_end(tmp_path: Path, tiny_bytes: Path) -> None:
    line = CommandLine(open_workspace(old_workspace.write_workspace(tmp_path / "w", str(tiny_bytes))), tiny_bytes, tmp_path)
    folder = find_job("train/halted", line.workspace).folder
    folder.stop_request.unlink()
    line.go_on_here(folder)
    assert folder.read_status().state == "finished"
    provenance = json.loads((folder.adapter / "provenance.json").read_text())
    assert provenance["started_at"] == AT
    assert provenance["dataset_files"] == ["pairs.jsonl"]
    assert "halted" in {adapter.id for adapter in list_adapters(line.workspace) if not adapter.problem}


# The workspace that version 0.1 itself wrote


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    if not SHARED.is_dir():
        pytest.skip(f"no {SHARED}")
    root = tmp_path_factory.mktemp("shared") / "workspace"
    shutil.copytree(SHARED, root)
    for path in (root, *root.rglob("*")):
        path.chmod(0o755)
    return CommandLine(open_workspace(root), root, root)


def command(line: CommandLine, *arguments: str) -> Any:
    done = line(*arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(row) for row in done.stdout.splitlines()] if "--json" in arguments else done.stdout


@pytest.mark.slow
def test_what_version_01_wrote_shows(shared: CommandLine) -> None:
    states = {f"{row['kind']}/{row['id']}": row["state"] for row in command(shared, "jobs", "list", "--json")}
    assert states == {
        "train/smollm2-1": "stopped",
        "train/smollm2-2": "finished",
        "evaluate/smollm2-biasdpo-1": "failed",
        "evaluate/smollm2-biasdpo-2": "finished",
        "export/smollm2-biasdpo-lora": "finished",
    }
    (shown,) = command(shared, "jobs", "show", "train/smollm2-2", "--json")
    assert shown["metrics"]["held_out"]["pairs"] == 26
    folder = shared.workspace.runs / "smollm2-2"
    assert len(splits.read_snapshot(folder).split.held_out) == 26
    assert (shared.workspace.preferences).read_bytes() == (SHARED / "preferences.jsonl").read_bytes()
    (stats,) = command(shared, "dataset", "stats", "--json")
    assert stats["rows"] > 0
    assert stats["bad_lines"] == 0
    result = load_result(find_job("evaluate/smollm2-biasdpo-2", shared.workspace))
    assert result["benchmarks"]["crows_pairs"]["n"] == 12
    record = load_record(find_job("export/smollm2-biasdpo-lora", shared.workspace).file)
    assert record is not None
    assert record.bytes == 3703040


@pytest.mark.slow
def test_what_version_01_trained_still_works(shared: CommandLine, tmp_path: Path) -> None:
    short = ("--model", "smollm2", "--adapter", "smollm2-2")
    (pair,) = command(shared, "compare", *short, "--prompt", "Who leads?", "--max-new-tokens", "4", "--json")
    assert pair["tuned"]["tokens"] > 0
    out = ("--benchmark", "crows_pairs,preference", "--limit", "2", "--dataset", "run", "--out", str(tmp_path / "result.json"))
    command(shared, "evaluate", *short, "--data-dir", str(BENCHMARKS), *out)
    assert json.loads((tmp_path / "result.json").read_text())["benchmarks"]["preference"]["n"] == 2
    job = resume_job("smollm2-1", shared.workspace)
    try:
        started = wait_for(job.folder, lambda now: ended(now) or now.log_tail(200).count(START_MARK) > 1)
        assert started.is_active, started.error
    finally:
        kill_jobs(shared.workspace)
    assert DEAD["pid"] != started.status.pid
