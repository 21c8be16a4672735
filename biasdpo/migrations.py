"""Opens a workspace, and upgrades one of version 0.1 to the layout of `biasdpo.jobs.job`.

Version 0.1 had no version.json and three layouts:

    runs/ID/{origin.json,train.log}                      -> runs/ID/{job.json,log.txt,split.json}; the other files stay
    evaluations/ID.{request.json,status.json,log,json}   -> evaluations/ID/{job.json,config.json,status.json,log.txt,result.json}
    {exports,runs/ID/export}/NAME.gguf{,.json,.Modelfile} -> exports/ID/, with job.json, config.json and status.json
    {exports,runs/ID/export}/.export-NAME.gguf/          an unfinished or failed export: exports/ID/, without a partial GGUF

The old files are read once, into a list of operations, which is stored with copies of what will be removed and then carried
out in order. Each may be repeated, so after a kill the stored list is carried out again from its start.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from biasdpo.errors import BiasDPOError, WorkspaceError
from biasdpo.jobs.job import ACTIVE, NOUNS, JobRecord, Kind, Resolved, Status, is_alive
from biasdpo.workspace import Workspace, locked, read_json, write_json

FORMAT = 2  # of a workspace; version 0.1 had no version file
VERSION_FILE = "version.json"
_log = logging.getLogger(__name__)
_PLAN, _DONE = "plan.json", "done.json"
_STATUS = TypeAdapter(Status)
_Json = dict[str, Any]


def open_workspace(folder: str | os.PathLike[str] | None = None) -> Workspace:
    """The workspace at `folder`, else $BIASDPO_WORKSPACE, else ./workspace; made if missing, upgraded if old.

    Raises WorkspaceError if it can't be written, was made by a newer version, or is of version 0.1 with an active job.
    """
    root = workspace_root(folder)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what people said
        with tempfile.TemporaryFile(dir=root):
            pass
        check_version(root)
    except OSError as exc:
        reason = exc.strerror or exc
        raise WorkspaceError(f"Can't write to the workspace {root}: {reason}; name a writable folder with --workspace") from exc
    return Workspace(root)


def workspace_root(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder that `open_workspace` opens."""
    return Path(folder or os.environ.get("BIASDPO_WORKSPACE") or "workspace").expanduser().resolve()


def check_version(root: Path) -> None:
    """Raise WorkspaceError for a workspace that this version can't open; write a new one's version.json."""
    file = root / VERSION_FILE
    if not file.exists():
        if any((root / name).is_dir() for name in ("runs", "evaluations", "exports")):
            upgrade(root)
        else:
            write_json(file, {"format": FORMAT})
        return
    value = read_json(file)
    written = value.get("format") if isinstance(value, dict) else None
    if type(written) is not int or written < FORMAT:
        raise WorkspaceError(f"{file} is damaged (format: {written!r:.40}): restore it from a backup or delete it")
    if written > FORMAT:
        raise WorkspaceError(
            f"The workspace {root} has format {written}, and this version of BiasDPO reads up to {FORMAT}: update BiasDPO, or "
            "name another folder with --workspace"
        )


def upgrade(root: Path) -> None:
    """Upgrade a workspace without version.json. Raises WorkspaceError while one of its jobs is active, or on a full disk."""
    with locked(root / ".jobs" / "upgrade", timeout_seconds=600):
        if (root / VERSION_FILE).exists():  # another process was faster
            return
        try:
            backup = next((plan.parent for plan in root.glob(f"backup-0.1-*/{_PLAN}")), None) or _prepare(root)
            if backup is not None:
                for operation in read_json(backup / _PLAN):
                    _carry_out(root, operation)
                (backup / _PLAN).rename(backup / _DONE)
                # A warning, since it must be seen where no logging is configured.
                _log.warning("Upgraded the workspace %s from version 0.1; the files that it replaced are in %s", root, backup)
            _write(root / VERSION_FILE, {"format": FORMAT})
        except OSError as exc:
            reason = f"{exc.strerror or exc}: {exc.filename}"
            raise WorkspaceError(f"Can't upgrade the workspace {root} ({reason}): fix that, then open it again") from exc


# Carrying out


def _carry_out(root: Path, operation: _Json) -> None:
    path = root / operation["path"]
    match operation["do"]:
        case "write":
            _write(path, operation["value"])
        case "move" if os.path.lexists(path):
            path.rename(root / operation["to"])
        case "remove":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        case "remove if empty":
            with suppress(OSError):
                path.rmdir()
        case "split":
            _write_split(path)


def _write(path: Path, value: Any) -> None:
    """Replace a file by way of a temporary one, whose name is always the same so that a kill leaves no litter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")  # ASCII: old names may be no UTF-8
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_split(folder: Path) -> None:
    from biasdpo.data import splits

    for left in folder.glob(f".{splits.SPLIT}.*"):
        left.unlink()
    try:
        splits.write_split(folder)
    except BiasDPOError as exc:  # damaged data: the run is still listed, and says so when its data is needed
        _log.warning("%s has no stored split: %s", folder, exc)


# Planning


def _prepare(root: Path) -> Path | None:
    """Store the plan with copies of the files that it removes; None where there is nothing of version 0.1."""
    plan = _Plan(root)
    plan.add_exports()  # first, since evaluations may name an exported GGUF as their model
    plan.add_evaluations()
    plan.add_runs()
    if not plan.operations:
        return None
    for pattern in ("runs/.queue-*", "*/.lock-*", "*/.changing*", "exports/.*-export-*", "runs/*/export/.*-export-*"):
        for path in root.glob(pattern):  # which nobody holds
            plan.add("remove", path)
    draft = root / ".backup-0.1"
    shutil.rmtree(draft, ignore_errors=True)
    for path in filter(Path.is_file, plan.copies):
        target = draft / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    _write(draft / _PLAN, plan.operations)
    return draft.rename(plan.free_path(root / f"backup-0.1-{datetime.now(UTC):%Y-%m-%d}"))


class _Plan:
    """Operations in order, with paths relative to the workspace. `copies`: files to back up."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.operations: list[_Json] = []
        self.copies: list[Path] = []
        self._new_paths: set[Path] = set()
        self._moved: dict[str, str] = {}

    def add_runs(self) -> None:
        for folder in sorted((self.root / "runs").glob("[!.]*/")):
            origin_file, log, status_file = (folder / name for name in ("origin.json", "train.log", "status.json"))
            if (folder / "job.json").exists() or not any(path.exists() for path in (origin_file, log, status_file)):
                continue
            origin = _read(origin_file)
            hashes = {name: origin.pop(name) for name in ("base_sha256", "counterfactuals_sha256") if _text(origin, name)}
            data = {name: value for name, value in origin.items() if name not in ("command", "code_version", "started_at")}
            status = self._status("train", folder.name, status_file)
            self._add_job(folder, "train", origin, _read(folder / "config.json"), status, data=data, hashes=hashes)
            if not (folder / "log.txt").exists():
                self._move(log, folder / "log.txt")
            self.add("split", folder)
            self.add("remove", origin_file)

    def add_evaluations(self) -> None:
        place, ends = self.root / "evaluations", (".request.json", ".status.json")
        for name in sorted({path.name.removesuffix(end) for end in ends for path in place.glob(f"[!.]*{end}")}):
            request_file, status_file, result = (place / f"{name}{end}" for end in (*ends, ".json"))
            request = _read(request_file)
            if model := _text(request, "model"):
                request["model"] = self._moved.get(model, model)
            status = self._status("evaluate", name, status_file, is_finished=result.is_file())
            data = {key: _text(request, key) for key in ("data_dir", "dataset")}
            new = self.free_path(place / name[:60])
            self._add_job(new, "evaluate", _read(status_file), request, status, data=data)
            for old, target in ((f"{name}.log", "log.txt"), (f"{name}.stop", "stop"), (result.name, "result.json")):
                self._move(place / old, new / target)
            self.add("remove", request_file)
            self.add("remove", status_file)

    def add_exports(self) -> None:
        exports = self.root / "exports"
        for place in (exports, *sorted((self.root / "runs").glob("*/export/"))):
            records = {path.with_suffix("") for path in place.glob("[!.]*.gguf.json")}
            for gguf in sorted(records | set(place.glob("[!.]*.gguf"))):
                record = _read(gguf.with_name(f"{gguf.name}.json"))
                if record.get("out") == gguf.name or place != exports:  # else it stays, and is listed by its name
                    self._add_finished_export(gguf, record)
            for unfinished in sorted(place.glob(".export-*/")):
                self._add_unfinished_export(unfinished)
            if place != exports:
                self.add("remove if empty", place)

    def _add_finished_export(self, gguf: Path, record: _Json) -> None:
        new = self.free_path(self.root / "exports" / gguf.stem[:60])
        request = record.get("request")
        config = {**(request if isinstance(request, dict) else {}), "out": gguf.name}
        missing = f"{gguf.name} was not in the workspace when it was upgraded from version 0.1: export it again where you need it"
        status = Status("finished", share=1.0, updated_at=_text(record, "created_at"), notes=() if gguf.exists() else (missing,))
        self._add_job(new, "export", record, config, status)
        for path in (gguf, gguf.with_name(f"{gguf.name}.Modelfile"), gguf.with_name(f"{gguf.name}.json")):
            self._move(path, new / path.name)

    def _add_unfinished_export(self, folder: Path) -> None:
        name, values = folder.name.removeprefix(".export-"), _read(folder / "status.json")
        status = self._status("export", name, folder / "status.json")
        if values.get("is_job") and isinstance(values.get("request"), dict):  # else the command line showed its error
            new = self.free_path(self.root / "exports" / name.removesuffix(".gguf")[:60])
            self.copies.append(folder / "status.json")
            self._add_job(new, "export", values, values["request"] | {"out": name}, status)
            self._move(folder / "export.log", new / "log.txt")
        self.add("remove", folder)

    def _status(self, kind: Kind, name: str, file: Path, *, is_finished: bool = False) -> Status:
        """A status, whose fields had today's names; where it can't be read, what the other files show. Refuses an active job."""
        values = _read(file)
        if values.get("state") == "cancelled":
            values["state"] = "stopped"
        try:
            status = _STATUS.validate_json(json.dumps(values))
        except ValidationError:
            lost = "Its status could not be read when the workspace was upgraded from version 0.1: resume it"
            return Status("finished") if is_finished else Status("interrupted", error=lost)
        if status.state in ACTIVE and is_alive(status):
            raise WorkspaceError(
                f"The workspace {self.root} is of version 0.1, and its {NOUNS[kind]} {name} is {status.state} (process "
                f"{status.pid}): stop {NOUNS[kind]} {name} first, or wait for its end; then open the workspace again"
            )
        return status

    def _add_job(self, folder: Path, kind: Kind, old: _Json, config: _Json, status: Status, **resolved: Any) -> None:
        """Write job.json, and except for a run, which has them, config.json and status.json."""
        resolved["model"] = _text(config, "model") or _text(old, "model")
        resolved["adapter"] = _text(config, "adapter") or _text(config, "run") or "none"
        resolved["device"] = "cpu" if status.device in ("", "cpu") else "gpu"
        record = JobRecord(
            id=folder.name,
            kind=kind,
            created_at=_text(old, "started_at") or _text(old, "created_at"),
            command=_text(old, "command"),
            code_version=_text(old, "code_version") or "0.1.0",
            resolved=Resolved(**resolved),
        )
        self.add("write", folder / "job.json", value=record.model_dump())
        if kind != "train":
            self.add("write", folder / "status.json", value=asdict(status))
            self.add("write", folder / "config.json", value=config)

    def free_path(self, path: Path) -> Path:
        """PATH, or else PATH-2, PATH-3, ..."""
        candidates = (path.with_name(f"{path.name}-{number}" if number > 1 else path.name) for number in count(1))
        found = next(path for path in candidates if not path.exists() and path not in self._new_paths)
        self._new_paths.add(found)
        return found

    def add(self, do: str, path: Path, **more: Any) -> None:
        if do == "remove" and path.suffix == ".json":
            self.copies.append(path)
        self.operations.append({"do": do, "path": str(path.relative_to(self.root)), **more})

    def _move(self, path: Path, target: Path) -> None:
        if os.path.lexists(path):
            self._moved[str(path)] = str(target)
            self.add("move", path, to=str(target.relative_to(self.root)))


def _read(path: Path) -> _Json:
    """The object in a JSON file; {} where it is missing or damaged."""
    with suppress(WorkspaceError):
        if isinstance(value := read_json(path), dict):
            return value
    return {}


def _text(values: _Json, name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""
