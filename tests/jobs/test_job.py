"""A job's files as they are read while a process writes them, after one that was killed, and damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from biasdpo.errors import JobError
from biasdpo.jobs import job as jobs
from biasdpo.jobs.job import START_MARK, JobFolder, JobRecord, Progress, Status, read_job, shown_command
from biasdpo.jobs.store import delete_job, find_job, list_jobs, resume_job
from biasdpo.workspace import Workspace, write_json
from tests.run_folders import write_run
from tests.run_line import write_job
from training.status import cause_and_remedy

DEEP = "[" * 100_000


@pytest.fixture
def folder(workspace: Workspace) -> JobFolder:
    folder = JobFolder(workspace.runs / "run")
    folder.path.mkdir(parents=True)
    return folder


def test_partial_lines_are_left_out(folder: JobFolder) -> None:
    assert (folder.read_metrics(), folder.read_speed(), folder.read_probes()) == ([], [], [])
    folder.metrics.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n[3]\n' + DEEP.encode() + b'\n{"step": 4}\n{"step": 5}')
    assert folder.read_metrics() == [{"step": 1}, {"step": 4}]
    folder.probes.write_bytes('{"step": 1, "tuned": "Ä"}\n'.encode() + b'{"tuned": "\xc3')
    assert folder.read_probes() == [{"step": 1, "tuned": "Ä"}]


def test_of_a_huge_file_the_end_is_read(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_LINES_BYTES", 1000)
    folder.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1000)))
    read = folder.read_metrics()
    assert read[-1] == {"step": 999}
    assert 50 < len(read) < 100  # a line has 14 bytes


def test_the_tail_of_a_log(folder: JobFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.log_tail(5) == ""
    folder.log.write_bytes(b"one\ntwo\nstep 1\rstep 2\rstep 3\n\x1b[31mred\x1b[0m \xff bell\x07\n")
    assert folder.log_tail(3) == "two\nstep 3\nred � bell"
    assert folder.log_tail(0) == ""
    monkeypatch.setattr(jobs, "MAX_TAIL_BYTES", 100)
    folder.log.write_text("x" * 10_000 + "\nlast\n")
    assert folder.log_tail(10).splitlines()[-1] == "last"
    assert len(folder.log_tail(10)) <= 100


def test_a_status_of_another_version_is_read_and_a_deleted_folder_is_not_brought_back(folder: JobFolder) -> None:
    folder.write_status(Status("queued", waits_for="other", notes=("a", "b"), progress=(Progress("bbq", 1, 2),)))
    values = json.loads(folder.status_file.read_text())
    del values["waits_for"]  # as an earlier version wrote it
    folder.status_file.write_text(json.dumps(values | {"unheard_of": 1}))
    read = folder.read_status()
    assert (read.waits_for, read.notes, read.progress) == ("", ("a", "b"), (Progress("bbq", 1, 2),))
    shutil.rmtree(folder.path)
    with pytest.raises(FileNotFoundError):
        folder.write_status(read)
    assert not folder.path.exists()


# Damage: whatever is wrong with one job's folder, it is one row with one line, and the others are listed


def damage(workspace: Workspace, name: str, text: str | bytes | None) -> Path:
    """A run whose file NAME holds something else; None: it is gone."""
    path = write_run(workspace.root, "damaged").path / name
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


STATUSES = ["", "{", "[]", "null", DEEP, '{"a":' * 100_000, b"\xff\xfe", '{"state": "asleep"}', "{}", "NaN", None]
WRONG = ["x", 1.5, True, None, [], [1], {}, {"a": []}, -1, 1e400, 10**400]


@pytest.mark.parametrize("text", STATUSES, ids=[str(text)[:12] for text in STATUSES])
@pytest.mark.parametrize("name", ["status.json", "job.json", "config.json"])
def test_a_damaged_job_is_one_row_that_keeps_its_files(workspace: Workspace, name: str, text: str | bytes | None) -> None:
    damage(workspace, name, text)
    write_run(workspace.root, "whole")
    found = {job.id: job for job in list_jobs(workspace)}
    assert found["whole"].error == ""
    if (name, text) == ("config.json", "{}"):
        return  # all defaults
    row = found["damaged"]
    assert name in row.error
    assert "\n" not in row.error
    assert "delete" not in row.error.lower()
    assert row.state == ("failed" if name == "status.json" else "finished")
    json.dumps(row.to_json())
    assert (row.folder.adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("key", [*Status.__dataclass_fields__])
def test_wrong_types_at_any_key_of_a_status_are_no_exception(workspace: Workspace, key: str) -> None:
    status = write_run(workspace.root, "damaged").status_file
    values = json.loads(status.read_text())
    for wrong in WRONG:
        status.write_text(json.dumps(values | {key: wrong}))
        (row,) = list_jobs(workspace)
        assert row.state == "failed" or row.status == row.folder.read_status()
        assert row.state != "failed" or key in row.error
        json.dumps(row.to_json())


def test_a_copied_folder_a_newer_format_and_what_is_no_job(workspace: Workspace) -> None:
    good = write_run(workspace.root, "good")
    me = psutil.Process()
    good.write_status(Status("running", pid=me.pid, pid_created=me.create_time()))
    shutil.copytree(good.path, workspace.runs / "good (copy)")
    shutil.copytree(good.path, workspace.runs / "good-copy")
    newer = shutil.copytree(good.path, workspace.runs / "newer")
    write_json(newer / "job.json", {"format": 2, "kind": ["unheard of"]})
    (workspace.runs / "notes").mkdir()
    (workspace.runs / "notes" / "a.txt").touch()
    (workspace.runs / "list.txt").touch()
    for leftover in (".x.abc", ".deleted-abc"):
        shutil.copytree(good.path, workspace.runs / leftover)
    found = {job.id: (job.state, job.error) for job in list_jobs(workspace)}
    assert found.keys() == {"good", "good (copy)", "good-copy", "newer"}
    assert found["good"] == ("running", "")
    assert found["good (copy)"][0] == "failed"
    assert found["good (copy)"][1].endswith("to e.g. good-copy")
    assert found["good-copy"][0] == "interrupted"  # the process is the original's
    assert "has format 2, this version reads 1: update BiasDPO" in found["newer"][1]
    assert find_job("good (copy)", workspace).state == "failed"
    with pytest.raises(JobError, match="is not a job id: rename"):
        resume_job("good (copy)", workspace)
    write_job(JobFolder(newer), "stopped")
    with pytest.raises(JobError, match="update BiasDPO"):
        resume_job("newer", workspace)
    delete_job("good (copy)", workspace)
    assert good.path.is_dir()


def test_one_deleted_meanwhile_is_not_listed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id in ("whole", "vanishing"):
        write_run(workspace.root, run_id)
    read_status = JobFolder.read_status

    def read(self: JobFolder) -> Status:
        if self.id == "vanishing":
            shutil.rmtree(self.path)
        return read_status(self)

    monkeypatch.setattr(JobFolder, "read_status", read)
    assert [job.id for job in list_jobs(workspace)] == ["whole"]


# The process


def test_alive_means_pid_and_creation_time_and_no_zombie(folder: JobFolder) -> None:
    me = psutil.Process()
    folder.write_status(Status("running", pid=me.pid, pid_created=me.create_time()))
    assert read_job(folder).state == "running"
    folder.stop_request.touch()
    assert read_job(folder).state == "stopping"
    folder.stop_request.unlink()
    folder.write_status(Status("running", pid=me.pid, pid_created=me.create_time() - 60))  # the pid was given anew
    assert read_job(folder).state == "interrupted"
    child = subprocess.Popen([sys.executable, "-c", ""])
    created = psutil.Process(child.pid).create_time()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    folder.write_status(Status("running", pid=child.pid, pid_created=created))
    assert read_job(folder).state == "interrupted"
    child.wait()


def dead(folder: JobFolder, log: str, **more: object) -> str:
    """The error of a job whose process is gone, whose log ends so."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.log.write_text(f"MemoryError of an earlier start\n{START_MARK}now\ncommand\n{log}\n")
    folder.write_status(Status("running", pid=2**22 + 1, pid_created=1.0, step=7, **more))  # type: ignore[arg-type]
    job = read_job(folder)
    assert (job.state, "\n" in job.error) == ("interrupted", False)
    return job.error


@pytest.mark.parametrize("kind", ["runs", "evaluations", "exports"])
def test_a_process_that_ended_unexpectedly_names_memory_where_there_is_evidence(workspace: Workspace, kind: str) -> None:
    folder, counter = JobFolder(workspace.root / kind / "first"), workspace.root / "memory.events"
    remedy = {
        "runs": "`python -m biasdpo train --run-id first --resume`",
        "evaluations": "`python -m biasdpo jobs resume evaluate/first`",
        "exports": "`python -m biasdpo jobs resume export/first`",
    }[kind]
    counter.write_text("oom_kill 2\n")
    before = {str(counter): 2}
    unknown = dead(folder, "step 7", memory_kills=before)
    assert "it was probably killed, or the machine ran out of memory" in unknown
    assert ("at step 7" in unknown) == (kind == "runs")
    aborted = dead(folder, "terminate called after throwing an instance of 'std::bad_alloc'\nFatal Python error: Aborted")
    assert "memory probably ran out (its log says \"terminate called after throwing an instance of 'std::bad_alloc'\")" in aborted
    counter.write_text("oom_kill 3\n")
    killed = dead(folder, "step 7", memory_kills=before)
    assert "memory probably ran out (since it began, the kernel has killed a process for lack of memory)" in killed
    counter.unlink()
    assert "probably ran out" not in dead(folder, "step 7", memory_kills=before)
    assert all(remedy in error for error in (unknown, aborted, killed))


@pytest.mark.parametrize(
    ("file", "content", "count"),
    [
        ("vmstat", "pgfault 7\noom_kill 3\n", 3),
        ("memory.events", "low 0\noom 5\noom_kill 2\noom_group_kill 9\n", 2),
        ("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\noom_kill 4\n", 4),
        ("without", "pgfault 7\n", None),
    ],
)
def test_kills_are_counted_in_each_of_the_kernels_files(tmp_path: Path, file: str, content: str, count: int | None) -> None:
    (tmp_path / file).write_text(content)
    assert jobs._kills_in(tmp_path / file) == count
    assert jobs._kills_in(tmp_path / "missing") is None
    counted = jobs.memory_kills()
    assert all(one >= 0 for one in counted.values())
    assert jobs.why_memory("", counted) == ""
    assert jobs.why_memory("", dict.fromkeys(counted, -1)) or not counted


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried", "Out of memory: "),
        ("std::bad_alloc", "Out of memory: "),
        ("Cannot allocate memory (os error 12)", "Out of memory: "),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "Out of memory: "),
        ("can't start new thread", "Out of memory or of processes"),
        ("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41", "Another of the run's"),
    ],
)
def test_messages_about_memory_and_lost_processes(text: str, line: str) -> None:
    error = cause_and_remedy(RuntimeError(text))
    assert error.startswith(line)
    assert "resume" in error


# Order and provenance


def test_jobs_are_listed_by_their_start_whatever_was_written_since(workspace: Workspace) -> None:
    for kind, job_id, at in (("runs", "old", "2026-11-01"), ("exports", "new", "2026-11-03"), ("evaluations", "bare", "")):
        folder = write_job(JobFolder(workspace.root / kind / job_id), "stopped")
        write_json(folder.config, {})
        if at:
            write_json(folder.record, JobRecord(id=job_id, created_at=f"{at}T09:00:00+00:00").model_dump())
        else:
            os.utime(folder.config, (1793610000, 1793610000))  # 2026-11-02T09:00:00Z
    write_job(JobFolder(workspace.runs / "old"))
    assert [job.id for job in list_jobs(workspace)] == ["new", "bare", "old"]
    assert [job.id for job in list_jobs(workspace, "train")] == ["old"]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--dataset", "/x/y.jsonl", "--model", "~/m"], "--dataset y.jsonl --model m"),
        (["--dataset=/x/a=b.jsonl", "--config=rel/c.toml"], "--dataset=a=b.jsonl --config=rel/c.toml"),
        (["--set", "model=/x/y", "--set=model=/x/y.gguf"], "--set model=y --set=model=y.gguf"),
        (["--set", 'datasets=["/x/y.jsonl", "hub:a/b"]'], """--set 'datasets=["y.jsonl", "hub:a/b"]'"""),
        (["--dataset", "hub:a/b", "--set", "beta=0.2"], "--dataset hub:a/b --set beta=0.2"),
    ],
)
def test_a_shown_command_names_no_folder_of_this_machine(arguments: list[str], shown: str) -> None:
    assert shown_command(["train", *arguments]) == f"python -m biasdpo train {shown}"
