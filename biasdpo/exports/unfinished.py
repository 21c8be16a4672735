"""The folder in which an export lies until it is proven: `.export-NAME` beside the file that it will be, with its status."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from biasdpo.errors import BiasDPOError, ExportError, WorkspaceError
from biasdpo.run_folder import Status
from biasdpo.run_state import is_alive
from biasdpo.workspace import read_json, write_json

State = Literal["running", "failed", "interrupted", "finished"]
PREFIX = ".export-"
_GONE = ".gone-export-"
_WRITE_SECONDS = 0.25  # between two status files of one phase


@dataclass(frozen=True)
class ExportStatus:
    """status.json of an export that is under way or has failed.

    pid, pid_created  the process that does the work, and its creation time (seconds since 1970), since pids are reused
    phase, share      what it does now, for people, and how much of all is done, from 0 to 1
    error             one line of cause and remedy, "" where all is well
    is_job            started by `start`: a failure stays to be seen
    request           what was asked for
    proof             of one that failed its proof
    """

    state: State
    pid: int = 0
    pid_created: float = 0.0
    phase: str = ""
    share: float = 0.0
    error: str = ""
    started_at: str = ""
    is_job: bool = False
    request: dict[str, Any] = field(default_factory=dict)
    proof: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unfinished:
    """The folder, and what is in it."""

    path: Path

    @classmethod
    def of(cls, out: Path) -> Unfinished:
        return cls(out.parent / f"{PREFIX}{out.name}")

    @property
    def out(self) -> Path:
        """The file that it will be."""
        return self.path.parent / self.path.name.removeprefix(PREFIX)

    @property
    def file(self) -> Path:
        """The file, not yet proven."""
        return self.path / self.out.name

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def log(self) -> Path:
        return self.path / "export.log"

    def read_status(self) -> ExportStatus | None:
        """status.json, corrected by what can be seen: where the process is gone, the export is interrupted. None: no export."""
        status = self._read()
        if status is not None and status.state == "running" and not _lives(status):
            status = self._read()  # it may have ended well in between
            if status is not None and status.state == "running" and not _lives(status):
                return replace(status, state="interrupted", phase="", error=self._why(status))
        return status

    def _read(self) -> ExportStatus | None:
        try:
            values = read_json(self.status_file)
        except WorkspaceError:
            return None
        known = {one.name for one in fields(ExportStatus)}
        if not isinstance(values, dict) or values.get("state") not in get_args(State):
            return None
        try:
            return ExportStatus(**{name: value for name, value in values.items() if name in known})
        except TypeError:
            return None

    def _why(self, status: ExportStatus) -> str:
        """Why a process ended that could not say so in its status: as its log says, else as such processes end."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
        except OSError:
            lines = []
        said = next((line for line in reversed(lines) if line.startswith(("biasdpo: ", "MemoryError"))), "")
        reason = f": {said[:300]}" if said else ", as it does when it is killed or the machine runs out of memory"
        return f"The export's process (pid {status.pid}) ended{reason}; nothing is left under its name: export it again"

    def write_status(self, status: ExportStatus) -> None:
        """Replace status.json."""
        write_json(self.status_file, asdict(status))

    def remove(self) -> None:
        """The folder goes at once, so that nobody sees a half of it; then what was in it."""
        if not self.path.is_dir():
            return
        with suppress(OSError):
            gone = tempfile.mkdtemp(prefix=_GONE, dir=self.path.parent)
            self.path.rename(gone)  # onto an empty folder: allowed
            shutil.rmtree(gone, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)  # where no other could be made


@dataclass
class Progress:
    """Tells the status file, and whoever listens, how far an export is. A full disk keeps no export from going on."""

    unfinished: Unfinished
    status: ExportStatus
    proof: dict[str, Any] = field(default_factory=dict)  # shown with a failure
    _written: float = 0.0

    def __call__(self, share: float, phase: str) -> None:
        now = time.monotonic()
        if phase == self.status.phase and now - self._written < _WRITE_SECONDS:
            return
        self._written = now
        self.status = replace(self.status, share=min(max(share, 0.0), 1.0), phase=phase)
        with suppress(OSError):
            self.unfinished.write_status(self.status)


@contextmanager
def unfinished_export(out: Path, request: dict[str, Any]) -> Iterator[Progress]:
    """The folder of an export, while the block writes and proves it. The leftovers of others that were killed go first.

    At the end the folder is gone; of a job that failed the status stays. ExportError where the same file is being exported.
    """
    folder = Unfinished.of(out)
    try:
        progress = _begin(folder, request)
    except OSError as exc:
        raise WorkspaceError(f"Can't write to {out.parent}: {exc.strerror or exc}; make it writable, or make room there") from exc
    try:
        yield progress
    except BaseException as exc:
        _fail(progress, exc)
        raise
    folder.remove()


def _begin(folder: Unfinished, request: dict[str, Any]) -> Progress:
    me = psutil.Process()
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    for other in all_in(folder.path.parent):
        _sweep(other)
    for gone in folder.path.parent.glob(f"{_GONE}*"):  # by a process that was killed while it removed it
        shutil.rmtree(gone, ignore_errors=True)
    status = folder.read_status()
    if status is None or status.pid != me.pid:  # else `start` made the folder, for this process
        status = begin(folder, ExportStatus("running", me.pid, me.create_time(), request=request))
    return Progress(folder, status)


def begin(folder: Unfinished, status: ExportStatus) -> ExportStatus:
    """Make the folder, with its status in it from its first moment. Raises ExportError where another process has it."""
    known = folder.read_status()
    if known is not None and known.state != "running":
        folder.remove()
    status = replace(status, started_at=datetime.now(UTC).isoformat(timespec="seconds"))
    made = Unfinished(Path(tempfile.mkdtemp(prefix=".begin-export-", dir=folder.path.parent)))
    try:
        made.write_status(status)
        made.path.rename(folder.path)
    except OSError as exc:
        made.remove()
        if folder.path.is_dir():
            raise ExportError(f"{folder.out.name} is being exported already: wait for it, or choose another name") from exc
        raise
    return status


def all_in(folder: Path) -> list[Unfinished]:
    """The exports of a folder that are under way or have failed."""
    return [Unfinished(path) for path in sorted(folder.glob(f"{PREFIX}*/"))]


def _sweep(other: Unfinished) -> None:
    """Free what a killed export holds: gigabytes, of which only its status says something."""
    status = other.read_status()
    if status is not None and status.state == "running":
        return
    if status is None or not status.is_job:
        other.remove()
        return
    _keep_status_only(other)


def _keep_status_only(folder: Unfinished) -> None:
    for path in folder.path.iterdir():
        if path not in (folder.status_file, folder.log):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _fail(progress: Progress, exc: BaseException) -> None:
    folder = progress.unfinished
    if not progress.status.is_job:
        folder.remove()
        return
    with suppress(OSError):
        _keep_status_only(folder)  # first, since the disk may be full of it
        if isinstance(exc, BiasDPOError):
            error = str(exc)
        else:
            error = f"The export failed ({type(exc).__name__}: {exc}); {folder.log} says where"
        folder.write_status(replace(progress.status, state="failed", error=error, phase="", proof=progress.proof))


def _lives(status: ExportStatus) -> bool:
    return is_alive(Status("running", pid=status.pid, pid_created=status.pid_created))
