"""Exports of a workspace: those that are under way, those that failed, those that are done. Whoever reads one reads its files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from biasdpo import detached
from biasdpo.errors import ConfigError, ExportError, WorkspaceError
from biasdpo.exports.record import ExportRecord, load_record, remove_files
from biasdpo.exports.request import ExportConfig
from biasdpo.exports.unfinished import ExportStatus, State, Unfinished, all_in, begin
from biasdpo.models import AdapterSpec
from biasdpo.workspace import Workspace, refuse_on_public_space

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\.gguf")
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Export:
    """One file of the workspace as it is now: under way, failed (`status`), or finished (`record`, where it has one)."""

    out: Path
    status: ExportStatus | None
    record: ExportRecord | None

    @property
    def state(self) -> State:
        return "finished" if self.status is None else self.status.state

    @property
    def is_active(self) -> bool:
        return self.state == "running"

    @property
    def unfinished(self) -> Unfinished:
        return Unfinished.of(self.out)

    @property
    def started_at(self) -> str:
        """UTC, ISO 8601: when it was begun, or (finished) written; "" where unknown."""
        return self.status.started_at if self.status is not None else self.record.created_at if self.record is not None else ""


def folder_for(adapter: AdapterSpec | None, workspace: Workspace) -> Path:
    """Where an export of this adapter lies: with its run, else with the workspace's other exports."""
    if adapter is not None and adapter.folder.parent.parent == workspace.runs:
        return adapter.folder.parent / "export"
    return workspace.root / "exports"


def free_name(stem: str, folder: Path) -> str:
    """A name that no export of this folder has: STEM.gguf, STEM-2.gguf, …"""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:80] or "model"
    number = 1
    while True:
        name = f"{stem}.gguf" if number == 1 else f"{stem}-{number}.gguf"
        if not (folder / name).exists() and not Unfinished.of(folder / name).path.exists():
            return name
        number += 1


def check_name(name: str) -> str:
    """A file's name as the page may write it: never a path. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"An export's name is letters, digits, '.', '_' or '-', then .gguf: got {name!r}; choose such a name")
    return name


# Reading


def list_exports(workspace: Workspace) -> list[Export]:
    """All exports of a workspace, the newest first."""
    found = {}
    for folder in _folders(workspace):
        for path in [*folder.glob("*.gguf"), *(one.out for one in all_in(folder))]:
            export = poll(path)
            if export is not None:
                found[path] = export
    return sorted(found.values(), key=lambda export: (export.started_at, export.out.name), reverse=True)


def poll(out: Path) -> Export | None:
    """One export now; None where there is nothing of that name."""
    status = Unfinished.of(out).read_status()
    record = load_record(out) if out.is_file() else None
    if status is None and not out.is_file():
        return None
    return Export(out, status, record)


def id_of(export: Export, workspace: Workspace) -> str:
    """Its path in the workspace: what the page calls it by."""
    return export.out.relative_to(workspace.root).as_posix()


def find(export_id: str, workspace: Workspace) -> Export:
    """The export of that id. Raises ExportError where there is none: an id is looked up, never opened as a path."""
    for export in list_exports(workspace):
        if id_of(export, workspace) == export_id:
            return export
    raise ExportError(f"No export {export_id!r} in {workspace.root}: it was deleted or renamed; choose another")


def _folders(workspace: Workspace) -> Iterator[Path]:
    yield workspace.root / "exports"
    yield from workspace.runs.glob("*/export")


# Start, cancel, delete


def start(request: ExportConfig, workspace: Workspace) -> Export:
    """Start an export in a process of its own, return at once.

    Raises RefusedError on a public Space, what `export` raises for a bad request, ExportError where the name is taken or another
    export is under way (each needs the memory of a whole model), WorkspaceError where nothing can be written.
    """
    refuse_on_public_space("Export")
    request = request.absolute()
    request.resolved(workspace)
    if request.out.exists():
        raise ExportError(f"{request.out.name} exists already: choose another name, or delete it first")
    active = next((other for other in list_exports(workspace) if other.is_active), None)
    if active is not None:
        raise ExportError(f"{active.out.name} is being exported: wait for it, or cancel it, then start this one")
    folder = Unfinished.of(request.out)
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        me = psutil.Process()
        status = ExportStatus("running", me.pid, me.create_time(), "starting", is_job=True, request=request.to_json())
        status = begin(folder, status)
        try:
            _start_process(folder, status, request.command(workspace))
        except BaseException:
            folder.remove()
            raise
    except OSError as exc:
        raise WorkspaceError(f"Can't start an export in {request.out.parent}: {exc.strerror or exc}; make room there") from exc
    export = poll(request.out)
    assert export is not None  # its folder was made
    return export


def _start_process(folder: Unfinished, status: ExportStatus, command: list[str]) -> None:
    with detached.started(command, folder.log) as process:
        folder.write_status(replace(status, pid=process.pid, pid_created=process.create_time()))


def cancel(export: Export) -> None:
    """End an export that is under way: its process, and all that it has written. Raises ExportError where it is not under way."""
    if export.status is None or not export.is_active:
        raise ExportError(f"{export.out.name} is {export.state}: there is nothing to cancel")
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(export.status.pid)
        if abs(process.create_time() - export.status.pid_created) < 1.0:  # else its pid is another's by now
            family = [process, *process.children(recursive=True)]
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(family, timeout=_KILL_SECONDS)
    export.unfinished.remove()


def delete(export: Export) -> None:
    """Delete a file with what lies beside it, or what is left of an export that failed. ExportError while it is under way."""
    refuse_on_public_space("Deleting an export")
    if export.is_active:
        raise ExportError(f"{export.out.name} is being exported: cancel it first")
    export.unfinished.remove()
    remove_files(export.out)
