"""Evaluations of a workspace: those under way, those that ended before their time, those that are done."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from biasdpo import detached
from biasdpo.errors import BiasDPOError, EvaluationError, WorkspaceError
from biasdpo.evaluation import results
from biasdpo.evaluations.estimate import known_seconds
from biasdpo.evaluations.request import EvaluationConfig
from biasdpo.evaluations.resolving import resolved
from biasdpo.evaluations.status import EvaluationFiles, EvaluationStatus, Progress, State
from biasdpo.workspace import Workspace, locked, read_json, refuse_on_public_space, write_json

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_FILE = re.compile(rf"({_ID.pattern}?)(\.request|\.status)?\.json")
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Evaluation:
    """WORKSPACE/evaluations/ID.* as they are now.

    request        None of a result that the command line wrote there
    phase          what it does now, for people: "waits for ID", "loading the model", "scoring", "stopping"; "" where it has ended
    seconds_left   None before it is known
    error          one line of cause and remedy, "" where all is well
    started_at     UTC, ISO 8601
    """

    id: str
    folder: Path
    request: EvaluationConfig | None
    state: State
    progress: tuple[Progress, ...] = ()
    seconds_left: float | None = None
    error: str = ""
    started_at: str = ""
    phase: str = ""

    @property
    def is_active(self) -> bool:
        return self.state == "running"

    @property
    def files(self) -> EvaluationFiles:
        return EvaluationFiles(self.folder, self.id)

    @property
    def result_file(self) -> Path:
        return self.files.result

    @property
    def has_result(self) -> bool:
        """Whether there is one to load: the whole, or of a cancelled evaluation what was scored."""
        return self.result_file.is_file()

    def load(self) -> dict[str, Any]:
        """The result. Raises EvaluationError where there is none, or where it is damaged."""
        if not self.has_result:
            raise EvaluationError(f"Evaluation {self.id!r} is {self.state} and has no result: wait for it, or resume it")
        return results.load(self.result_file)


# Reading


def list_evaluations(workspace: Workspace) -> list[Evaluation]:
    """All evaluations of a workspace, the newest first; results that the command line wrote there are among them."""
    folder = folder_of(workspace)
    names = {match[1] for path in folder.glob("*.json") if (match := _FILE.fullmatch(path.name))}
    found = [one for name in names if (one := _poll(EvaluationFiles(folder, name))) is not None]
    return sorted(found, key=lambda one: (one.started_at, one.id), reverse=True)


def find(evaluation_id: str, workspace: Workspace) -> Evaluation:
    """The evaluation of that id, as it is now. Raises EvaluationError where there is none: an id is never opened as a path."""
    found = _poll(EvaluationFiles(folder_of(workspace), evaluation_id)) if _ID.fullmatch(evaluation_id) else None
    if found is None:
        raise EvaluationError(f"No evaluation {evaluation_id!r} in {workspace.root}: it was deleted; choose another")
    return found


def folder_of(workspace: Workspace) -> Path:
    """Where the evaluations of a workspace lie."""
    return workspace.root / "evaluations"


def _poll(files: EvaluationFiles) -> Evaluation | None:
    status = files.read_status()
    request = None
    with suppress(BiasDPOError):
        request = EvaluationConfig.from_json(read_json(files.request))
    if status is not None:
        return Evaluation(
            files.id,
            files.folder,
            request,
            status.state,
            status.progress,
            status.seconds_left,
            status.error,
            status.started_at,
            status.phase,
        )
    with suppress(FileNotFoundError):  # deleted meanwhile
        if files.result.is_file():
            written = files.result.stat()
            interrupted, error = results.summary(files.result, written.st_mtime_ns)
            state: State = "failed" if error else "cancelled" if interrupted else "finished"
            return Evaluation(files.id, files.folder, request, state, error=error, started_at=_iso(written.st_mtime))
        if files.request.is_file():
            error = "Its status is lost, and nothing was written: resume it"
            return Evaluation(
                files.id, files.folder, request, "interrupted", error=error, started_at=_iso(files.request.stat().st_mtime)
            )
    return None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


# Start, cancel, resume, delete


def start(request: EvaluationConfig, workspace: Workspace) -> Evaluation:
    """Start an evaluation in a process of its own, return at once. It waits where another has the device.

    Raises RefusedError on a public Space, ConfigError, ModelError or AdapterError for what can't be evaluated, WorkspaceError
    where nothing can be written. What is wrong with the data shows in the evaluation, which fails at once.
    """
    refuse_on_public_space("Evaluation")
    request, device = resolved(request, workspace)
    with _changing(workspace):
        files = EvaluationFiles(folder_of(workspace), _free_id(request, workspace))
        try:
            write_json(files.request, request.to_json())
            _launch(files, request, device, workspace)
        except BaseException:
            _remove(files)
            raise
    return find(files.id, workspace)


def cancel(evaluation: Evaluation) -> None:
    """Ask an evaluation to end: what it has scored becomes its result, not comparable. Returns at once; one that was asked
    already is killed. Raises EvaluationError where it is not under way."""
    status = evaluation.files.read_status()
    if status is None or status.state != "running":
        state = evaluation.state if status is None else status.state
        raise EvaluationError(f"Evaluation {evaluation.id!r} is {state}: there is nothing to cancel")
    if not evaluation.files.stop_request.exists():
        try:
            evaluation.files.stop_request.touch()
        except OSError as exc:
            raise WorkspaceError(f"Can't write in {evaluation.folder}: {exc.strerror or exc}; make it writable") from exc
        return
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(status.pid)
        if abs(process.create_time() - status.pid_created) < 1.0:  # else its pid is another's by now
            process.kill()
            psutil.wait_procs([process], timeout=_KILL_SECONDS)


def resume(evaluation: Evaluation, workspace: Workspace) -> Evaluation:
    """Go on with an evaluation that was cancelled, interrupted or failed: what it has scored is not scored again.

    Raises what `start` raises, EvaluationError where it is under way, finished, or nobody knows what was asked for.
    """
    refuse_on_public_space("Evaluation")
    with _changing(workspace):
        now = find(evaluation.id, workspace)
        if now.state in ("running", "finished"):
            raise EvaluationError(
                f"Evaluation {now.id!r} is {now.state}: only one that was cancelled, interrupted or failed goes on"
            )
        if now.request is None:
            raise EvaluationError(f"Nobody knows what was asked of {now.id!r}: start another evaluation")
        request, device = resolved(now.request, workspace)
        now.files.stop_request.unlink(missing_ok=True)
        _launch(now.files, request, device, workspace)
    return find(evaluation.id, workspace)


def delete(evaluation: Evaluation) -> None:
    """Delete an evaluation's files. Raises RefusedError on a public Space, EvaluationError while it is under way."""
    refuse_on_public_space("Deleting an evaluation")
    with _changing(Workspace(evaluation.folder.parent)):
        status = evaluation.files.read_status()
        if status is not None and status.state == "running":
            raise EvaluationError(f"Evaluation {evaluation.id!r} is running: cancel it first")
        _remove(evaluation.files)


@contextmanager
def _changing(workspace: Workspace) -> Iterator[None]:
    """While nobody else starts, resumes or deletes one."""
    with locked(folder_of(workspace) / ".changing"):
        yield


def _free_id(request: EvaluationConfig, workspace: Workspace) -> str:
    """A readable id: smollm2-biasdpo-1, smollm2-biasdpo-2, …"""
    name = (request.model if request.adapter == "none" else request.adapter).rstrip("/").rpartition("/")[2]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", name.removesuffix(".gguf")).strip("-_")[:48] or "evaluation"
    number = 1
    while _poll(EvaluationFiles(folder_of(workspace), f"{stem}-{number}")) is not None:
        number += 1
    return f"{stem}-{number}"


def _launch(files: EvaluationFiles, request: EvaluationConfig, device: str, workspace: Workspace) -> None:
    now = time.time()
    expected = {name: seconds for name, seconds in known_seconds(request, workspace).items() if seconds is not None}
    progress = tuple(Progress(name, 0, 0) for name in request.parts())
    status = EvaluationStatus(
        "running",
        phase="starting",
        device=device,
        queued=now,
        progress=progress,
        seconds_left=sum(expected.values()) if len(expected) == len(progress) else None,
        expected=expected,
        started_at=_iso(now),
    )
    command = [*request.command(files.result, workspace.root), f"--status={files.status}"]
    try:
        with detached.started(command, files.log) as process:
            files.write_status(replace(status, pid=process.pid, pid_created=process.create_time()))
    except OSError as exc:
        raise WorkspaceError(f"Can't start an evaluation in {files.folder}: {exc.strerror or exc}; make room there") from exc


def _remove(files: EvaluationFiles) -> None:
    for path in (files.status, files.stop_request, files.log, files.request, files.result):
        with suppress(OSError):
            path.unlink(missing_ok=True)
