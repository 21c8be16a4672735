"""A run's folder: the files through which the page, the command line and the training process talk, and nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from biasdpo.errors import RunError
from biasdpo.workspace import read_json, write_json

State = Literal["queued", "running", "stopping", "stopped", "finished", "failed", "interrupted"]
ACTIVE: tuple[State, ...] = ("queued", "running", "stopping")


@dataclass(frozen=True)
class Status:
    """status.json, replaced as a whole.

    pid, pid_created   the process that does the work, and its creation time (seconds since 1970), since pids are reused
    phase              what it does now, for people: "loading the model", "training", …
    step, total_steps  of the optimizer
    eta_seconds        until the last step, None before the first
    error              one line of cause and remedy, "" where all is well
    notes              what the user should know of the data or the machine
    """

    state: State
    pid: int = 0
    pid_created: float = 0.0
    phase: str = ""
    step: int = 0
    total_steps: int = 0
    eta_seconds: float | None = None
    error: str = ""
    notes: tuple[str, ...] = ()
    updated_at: str = ""


@dataclass(frozen=True)
class RunFolder:
    """WORKSPACE/runs/ID and the files in it."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def snapshot(self) -> Path:
        return self.path / "dataset.jsonl"

    @property
    def origin(self) -> Path:
        """The data's hash and counts, the command, the code's version: what the config does not say."""
        return self.path / "origin.json"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def stop_request(self) -> Path:
        """Its presence asks the process to stop."""
        return self.path / "stop"

    def read_status(self) -> Status:
        """status.json as written; `runs.poll` also looks whether the process still lives."""
        values = read_json(self.status_file)
        known = {field.name for field in fields(Status)}
        if not isinstance(values, dict) or "state" not in values:
            raise RunError(f"{self.status_file} holds no run status: restore it from a backup, or delete the run's folder")
        clean: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known
        }
        return Status(**clean)

    def write_status(self, status: Status) -> None:
        """Replace status.json; the time of writing is added."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(self.status_file, {**asdict(status), "updated_at": now})

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that is half written is left out."""
        if not self.metrics.is_file():
            return []
        *lines, _unfinished = self.metrics.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines]

    def last_checkpoint(self) -> Path | None:
        """The latest whole checkpoint, or None. The trainer writes trainer_state.json last."""
        whole = [file.parent for file in self.checkpoints.glob("checkpoint-*/trainer_state.json")]
        return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
