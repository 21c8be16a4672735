"""Training runs in tests: as a user has them, by the command line, and in this process, which is faster."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from biasdpo import runs
from biasdpo.config import TrainConfig
from biasdpo.run_folder import RunFolder, Status
from biasdpo.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 120
SMALL = ("max_steps=6", "batch_size=2", "gradient_accumulation=1", "rank=2", "save_steps=2", "threads=1", "beta=0.5")


@dataclass
class CommandLine:
    """`python -m biasdpo` in a workspace of its own. Runs that still train at the end of a test are killed by their pid."""

    workspace: Workspace
    model: Path
    rows: Path
    run_ids: list[str] = field(default_factory=list)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "biasdpo", *arguments, "--workspace", str(self.workspace.root)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)

    def train(self, run_id: str, *settings: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        self.run_ids.append(run_id)
        sets = [part for setting in SMALL + settings for part in ("--set", setting)]
        files = ("--model", str(self.model), "--dataset", str(self.rows))
        return self("train", *files, "--run-id", run_id, *sets, "--json", *arguments)

    def config(self, **settings: Any) -> TrainConfig:
        small: dict[str, Any] = {"max_steps": 6, "batch_size": 2, "gradient_accumulation": 1, "rank": 2, "save_steps": 2}
        values = {"model": str(self.model), "datasets": (str(self.rows),), "threads": 1, **small, **settings}
        return TrainConfig(**values)

    def start(self, run_id: str, **settings: Any) -> RunFolder:
        """Start a run without waiting for it."""
        self.run_ids.append(run_id)
        return runs.start(self.config(**settings), run_id, self.workspace)

    def train_here(self, run_id: str, **settings: Any) -> RunFolder:
        """A run's whole training, in this process: no launch, no queue."""
        folder = runs.make_folder(self.config(**settings), run_id, self.workspace)
        return self.go_on_here(folder)

    def go_on_here(self, folder: RunFolder) -> RunFolder:
        from training.__main__ import main

        main(folder)
        return folder

    def kill_all(self) -> None:
        for run_id in self.run_ids:
            folder = RunFolder(self.workspace.run_folder(run_id))
            if folder.status_file.is_file():
                kill(folder.read_status())


def kill(status: Status) -> None:
    """End a run's process and those below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(status.pid)
        if abs(process.create_time() - status.pid_created) < 1:
            for child in process.children(recursive=True):
                child.kill()
            process.kill()


def wait_for(folder: RunFolder, condition: Callable[[runs.Run], bool]) -> runs.Run:
    end = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < end:
        run = runs.poll(folder)
        if condition(run):
            return run
        time.sleep(0.05)
    log = folder.log.read_text()[-2000:] if folder.log.is_file() else "no log"
    raise AssertionError(f"still {run.status} after {TIMEOUT_SECONDS} s; {log}")


def ended(run: runs.Run) -> bool:
    return run.status.state not in ("queued", "running", "stopping")
