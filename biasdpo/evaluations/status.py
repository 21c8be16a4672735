"""The files of one evaluation, and the status among them: replaced as a whole by the process that evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from biasdpo.errors import WorkspaceError
from biasdpo.run_endings import why_memory
from biasdpo.run_folder import Status
from biasdpo.run_state import is_alive
from biasdpo.workspace import read_json, write_json

State = Literal["running", "finished", "cancelled", "failed", "interrupted"]

_STATUS = ".status.json"
_MAX_LOG_BYTES = 64 * 1024


@dataclass(frozen=True)
class Progress:
    """Items of one benchmark: scored so far, and in all (of every strength); `total` 0 until its items are read."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class EvaluationStatus:
    """ID.status.json.

    pid, pid_created  the process that evaluates, and its creation time (seconds since 1970), since pids are reused
    phase             what it does now, for people
    device            "cpu" or "gpu": one evaluation at a time on each
    queued            seconds since 1970: its place in the queue
    seconds_left      None before it is known
    expected          seconds by benchmark, where earlier measurements tell
    error             one line of cause and remedy, "" where all is well
    started_at        UTC, ISO 8601
    """

    state: State
    pid: int = 0
    pid_created: float = 0.0
    phase: str = ""
    device: str = "cpu"
    queued: float = 0.0
    progress: tuple[Progress, ...] = ()
    seconds_left: float | None = None
    expected: dict[str, float] = field(default_factory=dict)
    error: str = ""
    started_at: str = ""


@dataclass(frozen=True)
class EvaluationFiles:
    """FOLDER/ID.*; the result is under its name at the end alone."""

    folder: Path
    id: str

    @classmethod
    def of_status(cls, status_file: Path) -> EvaluationFiles:
        return cls(status_file.parent, status_file.name.removesuffix(_STATUS))

    @property
    def result(self) -> Path:
        return self.folder / f"{self.id}.json"

    @property
    def request(self) -> Path:
        return self.folder / f"{self.id}.request.json"

    @property
    def status(self) -> Path:
        return self.folder / f"{self.id}{_STATUS}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.id}.log"

    @property
    def stop_request(self) -> Path:
        """There while the evaluation is asked to end."""
        return self.folder / f"{self.id}.stop"

    def read_status(self) -> EvaluationStatus | None:
        """The status, corrected by what can be seen: where the process is gone, the evaluation is interrupted, or, where it was
        asked to end, cancelled. None where there is none, or one that can't be read."""
        status = self._read()
        if status is not None and status.state == "running" and not _lives(status):
            status = self._read()  # it may have ended well in between
            if status is not None and status.state == "running" and not _lives(status):
                ended = replace(status, phase="", seconds_left=None)
                if self.stop_request.exists():
                    return replace(ended, state="cancelled")
                return replace(ended, state="interrupted", error=self._why(status))
        if status is not None and status.state == "running" and self.stop_request.exists():
            return replace(status, phase="stopping", seconds_left=None)
        return status

    def write_status(self, status: EvaluationStatus) -> None:
        """Replace the status. Raises OSError on a full disk."""
        write_json(self.status, asdict(status))

    def _read(self) -> EvaluationStatus | None:
        try:
            values: Any = read_json(self.status)
            if values["state"] not in get_args(State):
                return None
            known = {one.name for one in fields(EvaluationStatus)}
            kept = {name: value for name, value in values.items() if name in known}
            return EvaluationStatus(**{**kept, "progress": tuple(Progress(**one) for one in values["progress"])})
        except (WorkspaceError, AttributeError, KeyError, TypeError):
            return None

    def _why(self, status: EvaluationStatus) -> str:
        """Why a process ended that could not say so itself: as its log says, else as such processes end."""
        try:
            log = self.log.read_bytes()[-_MAX_LOG_BYTES:].decode("utf-8", "replace")
        except OSError:
            log = ""
        memory = why_memory(log, {})
        why = f"; {memory}: free memory" if memory else ", as it does when it is killed or the machine runs out of memory"
        return f"The evaluation's process (pid {status.pid}) ended{why}; resume it: what is scored is not scored again"


def ahead(files: EvaluationFiles, mine: EvaluationStatus) -> list[str]:
    """The ids of the evaluations that have this one's device, or wait for it, before it; in their order."""
    before = [
        (other.queued, name)
        for name, other in _all_statuses(files.folder)
        if name != files.id and other.state == "running" and other.device == mine.device
    ]
    return [name for queued, name in sorted(before) if (queued, name) < (mine.queued, files.id)]


def _all_statuses(folder: Path) -> Iterator[tuple[str, EvaluationStatus]]:
    for path in folder.glob(f"*{_STATUS}"):
        files = EvaluationFiles.of_status(path)
        status = files.read_status()
        if status is not None:
            yield files.id, status


def _lives(status: EvaluationStatus) -> bool:
    return is_alive(Status("running", pid=status.pid, pid_created=status.pid_created))
