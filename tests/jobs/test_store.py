"""Jobs by the command line, and what a user does to those that have ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from biasdpo import access
from biasdpo.config import EvaluationConfig, ExportConfig
from biasdpo.errors import ConfigError, JobError, RefusedError
from biasdpo.jobs import estimate, store
from biasdpo.jobs.job import JobFolder, Status
from biasdpo.jobs.worker import run_export
from biasdpo.workspace import Workspace
from tests.run_folders import write_run
from tests.run_line import CommandLine, write_job


@pytest.fixture
def several(workspace: Workspace) -> Workspace:
    """A run, and an evaluation and an export that have the same id."""
    write_run(workspace.root, "mine")
    for folder, job_id in (("evaluations", "same"), ("exports", "same")):
        write_job(JobFolder(workspace.root / folder / job_id), "stopped").log.write_text("one\ntwo\nthree\n")
    return workspace


def test_an_unknown_id_lists_the_known_and_an_ambiguous_one_its_kinds(several: Workspace) -> None:
    with pytest.raises(JobError, match=r"No run 'yours' .* there are mine"):
        store.find_job("yours", several, "train")
    with pytest.raises(JobError, match=r"No job 'yours' .* there are .*evaluate/same"):
        store.find_job("yours", several)
    with pytest.raises(JobError, match=r"name one of evaluate/same, export/same"):
        store.find_job("same", several)
    for name in ("evaluate/same", "evaluations/same", "evaluation/same"):
        assert store.find_job(name, several).kind == "evaluate"
    assert store.find_job("same", several, "export").kind == "export"


def test_the_commands(several: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    from biasdpo.__main__ import main

    def run(*arguments: str, status: int = 0) -> str:
        assert main([*arguments]) == status
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == (1 if status else 0)
        return captured.err if status else captured.out

    at = ("--workspace", str(several.root))
    names = {line.split(":")[0] for line in run("jobs", "list", *at).splitlines()}
    assert names == {"train/mine", "evaluate/same", "export/same"}
    assert run("jobs", *at) == run("jobs", "list", *at)
    listed = [json.loads(line) for line in run("jobs", "list", "--kind", "export", "--json", *at).splitlines()]
    assert [(job["id"], job["kind"], job["state"]) for job in listed] == [("same", "export", "stopped")]
    assert [json.loads(line)["id"] for line in run("runs", *at, "--json").splitlines()] == ["mine"]
    assert json.loads(run("runs", "show", "mine", "--json", *at))["kept"] == {}
    assert "adapter in" in run("runs", *at, "show", "mine")
    assert "name one of evaluate/same" in run("jobs", "show", "same", *at, status=2)
    assert "nothing to stop" in run("jobs", "stop", "export/same", *at, status=2)
    assert "job.json is missing" in run("jobs", "resume", "export/same", *at, status=2)
    assert run("jobs", "logs", "export/same", "--lines", "2", *at) == "two\nthree\n"
    assert json.loads(run("runs", "logs", "mine", "--lines", "1", "--json", *at)) == {"id": "mine", "log": ["step 40 of 40"]}
    assert json.loads(run("jobs", "delete", "export/same", "--json", *at)) == {"id": "export/same", "deleted": True}
    assert run("runs", "delete", "mine", *at) == "mine: deleted\n"
    assert [job.id for job in store.list_jobs(several)] == ["same"]
    assert "'frobnicate' is not one of" in run("jobs", "frobnicate", *at, status=2)
    assert "`show` takes an ID alone: got no ID" in run("jobs", "show", *at, status=2)
    assert "`note` takes an ID and a TEXT" in run("runs", "note", "mine", *at, status=2)
    assert "--kind" in run("jobs", "list", "--kind", "party", *at, status=2)
    assert "'mine'" in run("runs", "show", "mine", *at, status=2)


def test_notes_ids_and_deletion(command_line: CommandLine) -> None:
    workspace = command_line.workspace
    assert store.free_id("train", "smollm2", workspace) == "smollm2-1"
    assert store.free_id("train", "/some/where/phi-2.Q4_K_M.gguf", workspace) == "phi-2.Q4_K_M-1"
    folder = write_job(JobFolder(workspace.runs / "smollm2-1"), "stopped")
    assert store.free_id("train", "smollm2", workspace) == "smollm2-2"
    noted = command_line("runs", "note", "smollm2-1", " lower beta next time\n", "--json")
    assert json.loads(noted.stdout)["note"] == folder.read_note() == "lower beta next time"
    store.write_note("smollm2-1", workspace, "")
    assert (folder.read_note(), folder.note.exists()) == ("", False)
    store.write_note("smollm2-1", workspace, "as before")
    written = folder.note.stat().st_ino  # replaced by each writing
    store.write_note("smollm2-1", workspace, " as before\n")
    assert folder.note.stat().st_ino == written
    folder.note.write_bytes(b"\xff")
    store.write_note("smollm2-1", workspace, "anew")
    assert folder.read_note() == "anew"
    with pytest.raises(JobError, match="at most 10,000 characters: got 10,001"):
        store.write_note("smollm2-1", workspace, "x" * 10_001)
    store.delete_job("smollm2-1", workspace)
    assert (folder.path.exists(), store.list_jobs(workspace)) == (False, [])
    with pytest.raises(JobError, match="No run 'smollm2-1'"):
        store.delete_job("smollm2-1", workspace, "train")
    for bad in ("../x", "", "a b", "x" * 65):
        with pytest.raises(ConfigError, match="Run ids have" if bad else "No"):
            store.create_training(command_line.config(datasets=()), workspace, bad)


def test_a_public_space_refuses(
    command_line: CommandLine, evaluation: EvaluationConfig, lora: ExportConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = command_line.workspace
    write_run(workspace.root, "first")
    write_job(JobFolder(workspace.root / "exports" / "tiny"), "stopped")
    before = sorted(path for path in workspace.root.rglob("*") if ".lock" not in path.name)
    monkeypatch.setattr(access, "_source", lambda: access.Caller(access.Role.visitor))
    for act in (
        lambda: store.start_training(command_line.config(), workspace, "x"),
        lambda: store.resume_job("first", workspace),
        lambda: store.stop_job("first", workspace),
        lambda: store.delete_job("first", workspace),
        lambda: store.write_note("first", workspace, "note"),
        lambda: estimate.estimate_training(command_line.config(), workspace),
        lambda: store.start_evaluation(evaluation, workspace),
        lambda: estimate.estimate_evaluation(evaluation, workspace),
        lambda: store.start_export(lora, workspace),
        lambda: run_export(lora, workspace, lambda _share, _phase: None),
        lambda: store.resume_job("export/tiny", workspace),
        lambda: store.delete_job("export/tiny", workspace),
    ):
        with pytest.raises(RefusedError, match="only for this app"):
            act()
    assert sorted(path for path in workspace.root.rglob("*") if ".lock" not in path.name) == before


def test_a_resumed_run_starts_at_its_last_checkpoint(command_line: CommandLine) -> None:
    folder = command_line.create("killed", max_steps=60)
    (folder.checkpoints / "checkpoint-40").mkdir(parents=True)
    (folder.checkpoints / "checkpoint-40" / "trainer_state.json").write_text("{}")
    (folder.checkpoints / "checkpoint-50").mkdir()  # not written to its end
    folder.write_status(Status("interrupted", step=57, total_steps=60))
    resumed = store.resume_job("killed", command_line.workspace).status
    assert (resumed.step, resumed.total_steps) == (40, 60)


def test_a_damaged_status_is_recovered_by_resuming(command_line: CommandLine) -> None:
    """What the row's remedy says: the config is enough."""
    folder = command_line.create("damaged", max_steps=2)
    folder.status_file.write_text("{")
    (row,) = store.list_jobs(command_line.workspace)
    assert "`python -m biasdpo train --run-id damaged --resume`" in row.error
    assert store.resume_job("damaged", command_line.workspace).state == "queued"
    assert Path(row.folder.snapshot).is_file()
