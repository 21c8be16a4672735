"""Jobs in tests: by the command line, and training runs in this process, which is faster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from biasdpo.config import TrainConfig
from biasdpo.jobs import store
from biasdpo.jobs.job import Device, Job, JobFolder, Status, read_job
from biasdpo.jobs.worker import join_queue
from biasdpo.workspace import Workspace
from tests import commands

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 120
SMALL = ("max_steps=6", "batch_size=2", "gradient_accumulation=1", "rank=2", "save_steps=2", "threads=1", "beta=0.5")


@dataclass
class CommandLine:
    """The command line in a workspace of its own. Jobs that are still active at the end of a test are killed by their pid."""

    workspace: Workspace
    model: Path
    rows: Path

    def __call__(self, *arguments: str) -> commands.Done:
        return commands.run(*arguments, "--workspace", self.workspace.root)

    def train(self, run_id: str, *settings: str, arguments: tuple[str, ...] = ()) -> commands.Done:
        sets = [part for setting in SMALL + settings for part in ("--set", setting)]
        files = ("--model", str(self.model), "--dataset", str(self.rows))
        return self("train", *files, "--run-id", run_id, *sets, "--json", *arguments)

    def config(self, **settings: Any) -> TrainConfig:
        small: dict[str, Any] = {"max_steps": 6, "batch_size": 2, "gradient_accumulation": 1, "rank": 2, "save_steps": 2}
        values = {"model": str(self.model), "datasets": (str(self.rows),), "threads": 1, **small, **settings}
        return TrainConfig(**values)

    def start(self, run_id: str, **settings: Any) -> JobFolder:
        """Start a run without waiting for it."""
        return store.start_training(self.config(**settings), self.workspace, run_id).folder

    def create(self, run_id: str, **settings: Any) -> JobFolder:
        """A run's folder, without a process."""
        return store.create_training(self.config(**settings), self.workspace, run_id)

    def train_here(self, run_id: str, **settings: Any) -> JobFolder:
        """A run's whole training, in this process: no launch, no queue."""
        return self.go_on_here(self.create(run_id, **settings))

    def go_on_here(self, folder: JobFolder) -> JobFolder:
        from training.__main__ import main

        main(folder)
        return folder

    def kill_all(self) -> None:
        kill_jobs(self.workspace)


def kill_jobs(workspace: Workspace) -> None:
    """End all active jobs of a workspace, but for this process and its parents."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    for job in store.list_jobs(workspace):
        if job.is_active and job.status.pid not in own:
            kill(job.status)
    for child in store._children:  # or it is reported as still running when this process ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(20)


def kill(status: Status, sent: signal.Signals = signal.SIGKILL) -> None:
    """End a job's process and those below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(status.pid)
        if abs(process.create_time() - status.pid_created) < 1:
            for one in (*process.children(recursive=True), process):
                one.send_signal(sent)


def wait_for(folder: JobFolder, condition: Callable[[Job], bool]) -> Job:
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        job = read_job(folder)
        if condition(job):
            return job
        time.sleep(0.05)
    raise AssertionError(f"still {job.status} after {TIMEOUT_SECONDS} s; {folder.log_tail(30)}")


def checkpoints(folder: JobFolder) -> list[Path]:
    """A run's checkpoints by step, without one that was not written to its end."""
    whole = [state.parent for state in folder.checkpoints.glob("checkpoint-*/trainer_state.json")]
    return sorted(whole, key=lambda path: int(path.name.rpartition("-")[2]))


def ended(job: Job) -> bool:
    return not job.is_active


def pretend(workspace: Workspace, entry: str, device: Device = "cpu") -> JobFolder:
    """A job that has a device, or waits for it, and that this process pretends to do."""
    me = psutil.Process()
    folder = write_job(JobFolder(workspace.root / entry), "running", pid=me.pid, pid_created=me.create_time())
    join_queue(folder, device)
    return folder


def write_job(folder: JobFolder, state: str = "finished", **status: Any) -> JobFolder:
    """A job's folder with a status and nothing else."""
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_status(Status(state, **status))  # type: ignore[arg-type]
    return folder
