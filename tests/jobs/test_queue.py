"""One job at a time on a device, whatever its kind: others wait, can be stopped meanwhile, and start whatever ended the first."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from biasdpo.config import EvaluationConfig, ExportConfig
from biasdpo.errors import JobError
from biasdpo.jobs import store
from biasdpo.jobs.job import Job, JobFolder, Status, read_job
from biasdpo.jobs.worker import jobs_ahead, jobs_on
from biasdpo.workspace import Workspace
from tests.run_line import ROOT, CommandLine, ended, kill, pretend, wait_for


def waits(job: Job) -> bool:
    return bool(job.status.waits_for)


@contextmanager
def locked_device(workspace: Workspace) -> Iterator[None]:
    with (workspace.root / ".jobs" / "device-cpu").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_jobs_of_all_kinds_wait_in_one_queue(workspace: Workspace, evaluation: EvaluationConfig, lora: ExportConfig) -> None:
    run = pretend(workspace, "runs/first")
    second = store.start_evaluation(evaluation, workspace, "second").folder
    third = store.start_export(lora, workspace).folder
    fourth = store.start_evaluation(evaluation, workspace, "fourth").folder
    waiting = wait_for(second, waits)
    assert (waiting.state, waiting.status.waits_for, waiting.status.phase) == ("queued", "first", "waits for run first")
    assert wait_for(third, waits).status.waits_for == "first"

    # A waiting process is a light one.
    process = psutil.Process(waiting.status.pid)
    assert "biasdpo.jobs.worker" in process.cmdline()
    assert process.memory_info().rss < 120e6
    assert not any("torch" in file.path or "llama" in file.path for file in process.memory_maps())

    # The fourth is stopped while it waits, and resumed: it stands at the end again. Another is killed, and another's folder is
    # deleted under it: they block nobody, and nothing brings the folder back.
    store.stop_job("fourth", workspace)
    assert wait_for(fourth, ended).state == "stopped"
    assert not fourth.result.exists()
    store.resume_job("fourth", workspace)
    wait_for(fourth, waits)
    killed = store.start_evaluation(evaluation, workspace, "killed").folder
    deleted = store.start_evaluation(evaluation, workspace, "deleted").folder
    kill(wait_for(killed, waits).status)
    status = wait_for(deleted, waits).status
    shutil.rmtree(deleted.path)
    gone = wait_for(killed, ended)
    assert (gone.state, gone.status.waits_for) == ("interrupted", "")
    assert "ended unexpectedly before it started" in gone.error
    psutil.wait_procs([psutil.Process(status.pid)] if psutil.pid_exists(status.pid) else [], timeout=20)
    assert not deleted.path.exists()
    assert jobs_on(workspace, "cpu") == ["runs/first", "evaluations/second", "exports/tiny", "evaluations/fourth"]

    # Not even where the order is lost do two have the device: its lock is held.
    with locked_device(workspace):
        (workspace.root / ".jobs" / "queue-cpu").write_text("evaluations/second\nexports/tiny\nevaluations/fourth\n")
        assert wait_for(second, lambda job: job.status.phase == "waits for the device").state == "queued"
        run.write_status(Status("finished"))
        assert wait_for(third, lambda job: job.status.waits_for == "second").status.phase == "waits for evaluation second"
    for folder in (second, third, fourth):
        assert wait_for(folder, ended).state == "finished", read_job(folder).error
    finished = [folder.status_file.stat().st_mtime_ns for folder in (second, third, fourth)]
    assert finished == sorted(finished)


def test_the_order_is_that_of_arrival_and_passes_over_the_ended(workspace: Workspace) -> None:
    a, b, c = (pretend(workspace, entry) for entry in ("runs/a", "evaluations/b", "exports/c"))
    pretend(workspace, "runs/elsewhere", "gpu")

    def ahead() -> list[list[str]]:
        return [jobs_ahead(folder, "cpu") for folder in (a, b, c)]

    assert ahead() == [[], ["runs/a"], ["runs/a", "evaluations/b"]]
    a.write_status(Status("finished"))
    assert jobs_ahead(c, "cpu") == ["evaluations/b"]
    pretend(workspace, "runs/a")  # resumed: at the end
    assert ahead() == [["evaluations/b", "exports/c"], [], ["evaluations/b"]]
    b.write_status(Status("queued", pid=os.getpid(), pid_created=1.0))  # dead
    assert jobs_ahead(a, "cpu") == ["exports/c"]
    c.status_file.write_text("{")  # damaged
    assert jobs_ahead(a, "cpu") == []


@pytest.mark.slow
def test_the_lock_outlives_the_launcher(command_line: CommandLine) -> None:
    """The launcher is killed, and what trains goes on: the device is not free until that has ended, too."""
    first = command_line.start("first", max_steps=5000)
    training = wait_for(first, lambda run: run.status.step > 0 or ended(run)).status
    launcher = psutil.Process(training.pid).parent()
    assert launcher is not None
    assert "accelerate.commands.launch" in launcher.cmdline()
    launcher.kill()
    second = command_line.start("second", max_steps=2)
    assert wait_for(second, waits).status.waits_for == "first"
    (command_line.workspace.root / ".jobs" / "queue-cpu").write_text("runs/second\n")
    assert wait_for(second, lambda run: run.status.phase == "waits for the device").state == "queued"
    assert read_job(first).state == "running"
    psutil.Process(training.pid).kill()
    assert wait_for(second, ended).state == "finished"


def test_the_app_that_started_it_may_be_killed(command_line: CommandLine) -> None:
    """The app dies between two lines of `start`, as late as can be: its run is started, or seen to be interrupted."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from biasdpo.jobs import store\n"
        "from biasdpo.config import TrainConfig\n"
        "from biasdpo.workspace import Workspace\n"
        "if sys.argv[4] == 'before': store._launch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = TrainConfig(model=sys.argv[1], datasets=(sys.argv[2],), threads=1, max_steps=3, batch_size=2)\n"
        "store.start_training(config, Workspace(Path(sys.argv[3])), sys.argv[4])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    pretend(command_line.workspace, "exports/other")  # so that what is started waits
    for when in ("before", "after"):
        arguments = [str(command_line.model), str(command_line.rows), str(command_line.workspace.root), when]
        done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_job(JobFolder(command_line.workspace.runs / "before")).state == "interrupted"
    assert wait_for(JobFolder(command_line.workspace.runs / "after"), lambda run: waits(run) or ended(run)).state == "queued"


def test_a_job_resumed_twice_at_once_has_one_process(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = command_line.workspace
    folder = command_line.create("once", max_steps=5000)
    folder.write_status(Status("stopped"))
    pretend(workspace, "exports/other")
    popen, started = subprocess.Popen, []

    def start(command: list[str], **more: Any) -> Any:
        process = popen(command, **more)
        if "biasdpo.jobs.worker" in command:
            started.append(process.pid)
            time.sleep(0.5)  # the other one has long looked by then
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    at_once = threading.Barrier(2)

    def act(action: Callable[..., object]) -> str:
        at_once.wait()
        try:
            action("once", workspace)
        except JobError as exc:
            return str(exc)
        return ""

    with ThreadPoolExecutor(2) as threads:
        errors = sorted(threads.map(act, (store.resume_job, store.resume_job)))
    assert len(started) == 1
    assert errors[0] == ""
    assert re.match(r"Run 'once' is (queued|running): only a stopped", errors[1])
    store.stop_job("once", workspace)
    wait_for(folder, ended)

    # Resumed and deleted at once: one of both.
    with ThreadPoolExecutor(2) as threads:
        resumed, deleted = threads.map(act, (store.resume_job, store.delete_job))
    assert bool(resumed) != bool(deleted)
    assert folder.path.exists() == (not resumed)

    # Started twice at once: one of both.
    def begin(_: int) -> str:
        at_once.wait()
        try:
            command_line.create("twice")
        except JobError as exc:
            return str(exc)
        return ""

    with ThreadPoolExecutor(2) as threads:
        errors = sorted(threads.map(begin, range(2)))
    assert errors[0] == ""
    assert "Run 'twice' already exists" in errors[1]
    assert (workspace.runs / "twice" / "config.json").is_file()
