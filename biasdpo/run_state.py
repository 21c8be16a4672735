"""What a run's folder shows now: its status, corrected by what can be seen of its process."""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

import psutil

from biasdpo.config import load_json
from biasdpo.errors import BiasDPOError, RunError
from biasdpo.run_endings import why_memory
from biasdpo.run_folder import ACTIVE, RunFolder, Status
from biasdpo.workspace import Workspace, read_json

# Kept so that a finished child is reaped, and not left a zombie, for as long as its parent lives.
_children: list[subprocess.Popen[bytes]] = []

STARTING = "starting"
"""The phase of a run that has the device, until its training process speaks for itself."""

START_MARK = "=== start: "
"""Begins the line of train.log that a (re)start writes before its command."""

_ERROR_LINE = re.compile(
    r"^(?:\[[^\]]*\]:? ?)?"  # torchrun's prefix
    r"((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt)\b.*|.*: error: .*|\S+: No module named .*)$"
)
_LAUNCHERS_OWN = ("CalledProcessError", "ChildFailedError")  # say only that the process below them failed


@dataclass(frozen=True)
class Run:
    """A run as its folder shows it now."""

    folder: RunFolder
    status: Status

    def to_json(self) -> dict[str, Any]:
        """The object of `runs show --json`."""
        origin = read_json(self.folder.origin) if self.folder.origin.is_file() else {}
        provenance = read_json(self.folder.adapter / "provenance.json") if self.has_adapter else {}
        metrics = self.folder.read_metrics()
        return {
            "id": self.folder.id,
            "folder": str(self.folder.path),
            **asdict(self.status),
            "notes": list(self.status.notes),
            "note": self.folder.read_note(),
            "started_at": origin.get("started_at", ""),
            "dataset_sha256": origin.get("dataset_sha256", ""),
            "config": load_json(self.folder.config).to_json() if self.folder.config.is_file() else {},
            "adapter": str(self.folder.adapter) if provenance else "",
            "kept": provenance.get("kept", {}),
            "metrics": provenance.get("metrics", {}),
            "last_logged": metrics[-1] if metrics else {},
        }

    @property
    def has_adapter(self) -> bool:
        return (self.folder.adapter / "provenance.json").is_file()


def show(run_id: str, workspace: Workspace) -> Run:
    """One run now. Raises RunError where there is none of that name."""
    folder = RunFolder(workspace.run_folder(run_id))
    if not folder.status_file.is_file():
        known = ", ".join(run.folder.id for run in list_runs(workspace)) or "none yet"
        raise RunError(f"No run {run_id!r} in {workspace.root}: there are {known}")
    return poll(folder)


def list_runs(workspace: Workspace) -> list[Run]:
    """All runs, newest first. One whose status.json is damaged is shown as failed, with that as its error."""
    found = []
    for file in workspace.runs.glob("*/status.json"):
        folder = RunFolder(file.parent)
        if folder.id.startswith("."):
            continue
        try:
            found.append(poll(folder))
        except BiasDPOError as exc:
            if file.exists():  # else it was deleted meanwhile
                found.append(Run(folder, Status("failed", error=str(exc))))
    return sorted(found, key=lambda run: _started(run.folder), reverse=True)


def _started(folder: RunFolder) -> tuple[float, float]:
    """When a run was first started, seconds since 1970: as origin.json says, to the second, and as config.json was written."""
    written = 0.0
    with suppress(OSError):
        written = folder.config.stat().st_mtime
    with suppress(BiasDPOError, KeyError, TypeError, ValueError):
        return datetime.fromisoformat(read_json(folder.origin)["started_at"]).timestamp(), written
    return written, written


def poll(folder: RunFolder) -> Run:
    """What status.json says, corrected by what can be seen: a run whose process is gone is `interrupted`, or `failed` where its
    log says why it never began."""
    for child in _children:
        child.poll()
    status = folder.read_status()
    if status.state in ACTIVE and not is_alive(status):
        status = folder.read_status()  # it may have ended well in between
        if status.state in ACTIVE and not is_alive(status):
            return Run(folder, _ended_without_a_word(folder, status))
    if status.state in ("queued", "running") and folder.stop_request.exists():
        status = replace(status, state="stopping")
    return Run(folder, status)


def is_alive(status: Status) -> bool:
    """Alive means pid and creation time, since pids are reused; a zombie is dead."""
    try:
        process = psutil.Process(status.pid)
        # 1 s: psutil derives creation times from the boot time, which a clock correction may shift.
        return bool(abs(process.create_time() - status.pid_created) < 1.0 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def reap(process: subprocess.Popen[bytes]) -> None:
    """Have `poll` collect a child when it has ended."""
    _children.append(process)


def _ended_without_a_word(folder: RunFolder, status: Status) -> Status:
    resume = f"resume with `python -m biasdpo train --run-id {folder.id} --resume`"
    ended = replace(status, phase="", eta_seconds=None, waits_for="", tokens_per_second=None)
    log = log_of_last_start(folder)
    if status.state == "queued" and status.phase == STARTING and (cause := last_error(log)):
        error = f"The training process could not start: {cause}; mend that (train.log has more), then {resume}"
        return replace(ended, state="failed", error=error)
    queued = status.state == "queued"
    if memory := why_memory("" if queued and status.phase != STARTING else log, status.memory_kills):
        why = f"memory was the likely cause ({memory}): free memory, then {resume}, or start a new run with a lower batch_size"
    else:
        why = f"as it does when it is killed or the machine runs out of memory: {resume}"
    if queued:
        error = f"The process (pid {status.pid}) ended before it began to train, {why}"
    else:
        error = f"The training process (pid {status.pid}) ended without a word at step {status.step}, {why}"
    return replace(ended, state="interrupted", error=error)


def log_of_last_start(folder: RunFolder) -> str:
    """The end of train.log, without what was written before the last start and the line that marks it."""
    return "\n".join(folder.log_tail(400).rpartition(START_MARK)[2].split("\n")[1:])


def last_error(log: str) -> str:
    """The last line that reads as an error; "" where there is none."""
    for line in reversed(log.split("\n")):
        match = _ERROR_LINE.match(line.strip())
        if match and not any(name in match[1].split(":")[0] for name in _LAUNCHERS_OWN):
            return match[1][:300]
    return ""
