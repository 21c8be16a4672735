"""Backup, restore and verification of a workspace."""

from __future__ import annotations

import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from biasdpo.data.journal import opened, parse_row, repair
from biasdpo.errors import BiasDPOError, ConfigError, WorkspaceError
from biasdpo.jobs.job import FOLDERS, JobFolder
from biasdpo.migrations import VERSION_FILE, check_version
from biasdpo.workspace import Workspace, locked, read_json, replacing, sha256_of


def back_up(workspace: Workspace, file: Path, without: str = "cache") -> int:
    """Write a workspace's files, but no hidden ones, locks or the folder `without`, to a private .tar.gz; return the count."""
    if not file.name.endswith(".tar.gz") or file.resolve().is_relative_to(workspace.root):
        raise ConfigError(f"A backup is a .tar.gz outside of the workspace {workspace.root}: got {file}")
    repair(workspace)  # may write a file
    try:
        with replacing(file, mode=0o600) as scratch, tarfile.open(scratch, "w:gz", compresslevel=1, dereference=True) as archive:
            for path in _files(workspace.root, without):
                # The journal's whole lines are never changed in place, so its length is all that must be read under the lock.
                lock = opened(path) if path == workspace.preferences else nullcontext()
                with suppress(FileNotFoundError):
                    with lock:
                        content = path.open("rb")
                        member = archive.gettarinfo(arcname=str(path.relative_to(workspace.root)), fileobj=content)
                    with content:
                        archive.addfile(member, content)
            return len(archive.getmembers())
    except OSError as exc:
        raise WorkspaceError(f"Can't back up {workspace.root} to {file}: {exc.strerror or exc}; fix that and try again") from exc


def _files(root: Path, without: str) -> Iterator[Path]:
    for place, folders, names in os.walk(root, followlinks=True):
        here = Path(place)
        inner = [here / name for name in folders if name[0] != "." and here / name != root / without]
        folders[:] = [path.name for path in inner if not here.resolve().is_relative_to(path.resolve())]  # a link may lead back
        yield from (here / name for name in names if name[0] != "." and not name.endswith(".lock") and (here / name).is_file())


def restore(file: Path, root: Path) -> int:
    """Unpack a backup into a new or empty folder, which stays empty where that fails; return the number of files."""
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise WorkspaceError(f"{root} is not an empty folder: name a new one with --workspace")
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tarfile.open(file, "r:gz") as archive, tempfile.TemporaryDirectory(prefix=".restore-", dir=root) as scratch:
            outside = [member.name for member in archive if not member.isreg() or member.name.startswith("/")]
            if outside or VERSION_FILE not in archive.getnames():
                why = f"{outside[0]!r} is not a file inside it" if outside else f"it has no {VERSION_FILE}"
                raise WorkspaceError(f"{file} is no backup of a workspace: {why}; name another file")
            archive.extractall(scratch, filter="data")
            for path in sorted(Path(scratch).iterdir()):  # not the folder itself: it may be a volume's
                path.rename(root / path.name)
            return len(archive.getnames())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise WorkspaceError(f"Can't restore {file} to {root}: {reason}; nothing was written, try another file") from exc


def verify(root: Path) -> Iterator[str]:
    """The faults of a workspace, a line each, with the remedy. Changes nothing."""
    try:
        read_json(root / VERSION_FILE)  # which `check_version` would write
        check_version(root)
    except WorkspaceError as exc:
        yield str(exc)
    first: dict[str, int] = {}
    if (journal := Workspace(root).preferences).exists():
        try:
            with locked(journal):  # not while a line is being written
                *lines, rest = journal.read_bytes().split(b"\n")
        except OSError as exc:
            lines, rest = [], b""
            yield f"Can't read {journal} ({exc.strerror}): make it readable"
        for number, line in enumerate(lines, 1):
            try:
                if line.strip() and first.setdefault(name := parse_row(line)["id"], number) != number:
                    yield f"{journal}, line {number}: id {name!r} as in line {first[name]}, so it does not count; remove it"
            except ValueError as exc:
                yield f"{journal}, line {number}: {exc}; correct or remove it"
        if rest:
            yield f"{journal}, line {len(lines) + 1}: incomplete; the next verdict or import moves it to {journal.name}.torn"
    for path in sorted(path for name in FOLDERS.values() for path in (root / name).glob("[!.]*/")):
        yield from _job_faults(JobFolder(path))


def _job_faults(folder: JobFolder) -> Iterator[str]:
    try:
        record, _config, status = folder.read_record(), folder.read_config(), folder.read_status()
        if status.state != "finished" or folder.kind != "train":
            return
        provenance = read_json(folder.adapter / "provenance.json")
        weights = folder.adapter / "adapter_model.safetensors"
        recorded = {folder.snapshot: record.resolved.data.get("dataset_sha256"), weights: provenance.get("adapter_sha256")}
        for path, sha256 in recorded.items():
            if sha256_of(path) != sha256 and sha256:  # older versions recorded none
                yield f"{path} was changed since it was written (its SHA-256 is not the recorded one): restore it from a backup"
    except BiasDPOError as exc:
        yield str(exc)
    except (OSError, AttributeError) as exc:  # the second: JSON, but no object
        yield f"A file of the finished run {folder.path} is missing or damaged ({exc}): restore it from a backup"
