"""Backup, restore and verification of a workspace."""

from __future__ import annotations

import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from biasdpo.data.journal import opened, parse_row
from biasdpo.errors import BiasDPOError, ConfigError, JobError, WorkspaceError
from biasdpo.gguf.export import read_record
from biasdpo.jobs.job import FOLDERS, JobFolder
from biasdpo.migrations import VERSION_FILE, check_version
from biasdpo.workspace import Workspace, locked, read_json, replacing, sha256_of

PARTS = ("cache", *FOLDERS.values())
"""The folders that a backup may leave out."""
_REMEDY = "restore it from a backup"


# Backup


def back_up(workspace: Workspace, file: Path, without: Iterable[str] = ("cache",)) -> int:
    """Write a workspace's files to a .tar.gz that only its owner can read; return their number.

    Hidden files, locks and queues are left out; links are followed. The journal is as it was at one moment.
    Raises ConfigError for what can't be left out or a file inside the workspace, WorkspaceError where it can't be written.
    """
    without = {*without}
    if unknown := sorted(without - {*PARTS}):
        raise ConfigError(f"A backup may leave out {', '.join(PARTS)}: got {unknown[0]!r}")
    if not file.name.endswith(".tar.gz") or file.resolve().is_relative_to(workspace.root):
        raise ConfigError(f"A backup is a .tar.gz outside of the workspace {workspace.root}: got {file}")
    count = 0
    try:
        with (
            replacing(file, mode=0o600) as temporary,
            tarfile.open(temporary, "w:gz", compresslevel=1, dereference=True) as archive,
        ):
            for path in _files(workspace.root, without):
                name = str(path.relative_to(workspace.root))
                # Opened and measured at once, since files are replaced and grow; of the journal only whole lines count.
                with (
                    suppress(FileNotFoundError),
                    opened(path) if path == workspace.preferences else nullcontext(),
                    path.open("rb") as content,
                ):
                    archive.addfile(archive.gettarinfo(arcname=name, fileobj=content), content)
                    count += 1
    except OSError as exc:
        reason = exc.strerror or exc
        raise WorkspaceError(f"Can't back up {workspace.root} to {file}: {reason}; fix that, then try again") from exc
    return count


def _files(root: Path, without: set[str]) -> Iterator[Path]:
    seen = {root.resolve()}  # a link may lead back
    for place, folders, names in os.walk(root, followlinks=True):
        here, kept = Path(place), []
        for name in sorted(folders):
            real = (here / name).resolve()
            if not name.startswith(".") and real not in seen and not (here == root and name in without):
                kept.append(name)
                seen.add(real)
        folders[:] = kept
        paths = (here / name for name in sorted(names) if not name.startswith(".") and not name.endswith(".lock"))
        yield from filter(Path.is_file, paths)


# Restore


def restore(file: Path, root: Path) -> int:
    """Unpack a backup into a new or empty folder, whole or not at all; return the number of files.

    Raises WorkspaceError for a folder that is not empty, and for an archive that is damaged, is no backup, or holds anything but
    files that belong inside the folder.
    """
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise WorkspaceError(f"{root} is not an empty folder: name a new one with --workspace")
        root.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch,
            tarfile.open(file, "r:gz") as archive,
        ):
            draft = Path(scratch) / "workspace"
            draft.mkdir(mode=0o700)
            archive.extractall(draft, filter=_checked)
            if not (draft / VERSION_FILE).is_file():
                raise WorkspaceError(f"{file} is no backup of a workspace, since it has no {VERSION_FILE}: name another file")
            check_version(draft)
            draft.rename(root)
            return len(archive.getmembers())
    except (OSError, EOFError, zlib.error, tarfile.TarError) as exc:
        reason = getattr(exc, "strerror", None) or " ".join(str(exc).split())
        raise WorkspaceError(f"Can't restore {file} to {root}: {reason}; nothing was written") from exc


def _checked(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    if not member.isreg() or Path(member.name).is_absolute():  # which the filter would make relative
        raise tarfile.TarError(f"{member.name!r} is not a file inside the workspace")
    return tarfile.data_filter(member, folder)


# Verification


def verify(workspace: Workspace) -> Iterator[str]:
    """The faults of a workspace, a line each, with the remedy. Changes nothing."""
    try:
        if not (workspace.root / VERSION_FILE).is_file():
            yield f"{workspace.root} has no {VERSION_FILE}: name a workspace with --workspace, or restore one from a backup"
            return
        check_version(workspace.root)
    except BiasDPOError as exc:
        yield str(exc)
        return
    yield from _journal_faults(workspace.preferences)
    for kind in FOLDERS.values():
        for path in sorted((workspace.root / kind).glob("[!.]*/")):
            yield from _job_faults(JobFolder(path))


def _journal_faults(path: Path) -> Iterator[str]:
    try:
        with locked(path):  # not while a line is being written
            *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except (OSError, WorkspaceError) as exc:
        yield f"Can't read {path}: {exc}"
        return
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            if line.strip() and first.setdefault(id := parse_row(line)["id"], number) != number:
                yield f"{path}, line {number}: id {id!r} as in line {first[id]}, so this line does not count; remove it"
        except ValueError as exc:
            yield f"{path}, line {number}: {exc}; correct or remove it"
    if rest:
        yield f"{path}, line {len(lines) + 1}: cut off; the next verdict or import moves it to {path.name}.torn"


def _job_faults(folder: JobFolder) -> Iterator[str]:
    damaged = False
    for read in (folder.read_record, folder.read_config, folder.read_status):
        try:
            read()
        except JobError as exc:
            damaged = True
            yield str(exc)
    if damaged or folder.read_status().state != "finished":
        return
    try:
        hashes = dict(_recorded_hashes(folder))
    except (BiasDPOError, AttributeError) as exc:
        yield str(exc) if isinstance(exc, BiasDPOError) else f"{folder.path} has a damaged record: {_REMEDY}"
        return
    for path, recorded in hashes.items():
        try:
            if recorded and sha256_of(path) != recorded:
                yield f"{path} is not the file that was written (its SHA-256 differs from the recorded one): {_REMEDY}"
        except OSError as exc:
            yield f"Can't read {path}: {exc.strerror or exc}; {_REMEDY}"


def _recorded_hashes(folder: JobFolder) -> Iterator[tuple[Path, str]]:
    """The files of a finished job, and their SHA-256 as recorded; "" where an older version recorded none."""
    if folder.kind == "train":
        yield folder.snapshot, folder.read_record().resolved.data.get("dataset_sha256", "")
        yield (
            folder.adapter / "adapter_model.safetensors",
            read_json(folder.adapter / "provenance.json").get("adapter_sha256", ""),
        )
    elif folder.kind == "export":
        record = read_record(folder.path / folder.read_config().out.name)
        yield record.out, record.sha256
    else:
        read_json(folder.result)
