"""The journal of judgments, WORKSPACE/preferences.jsonl: append-only, one JSON object a line, nothing lost.

A row is acknowledged (the function returns) only when it is on the disk. A line that a power loss tore is set aside before the
next append (see `torn`); a row that was torn was never acknowledged.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from biasdpo.dataset.known_ids import known_ids
from biasdpo.dataset.pairs import TEXTS, check_text, pair_id_of
from biasdpo.dataset.rows import BadLine, Journal, Row, row_of
from biasdpo.dataset.torn import repair, repaired_lines, sync_folder, torn_file
from biasdpo.errors import DatasetError, WorkspaceError
from biasdpo.records import Judgment, JudgmentMeta
from biasdpo.workspace import Workspace, locked, refuse_on_public_space

__all__ = [
    "LOCK_SECONDS",
    "Appended",
    "BadLine",
    "Journal",
    "Row",
    "append",
    "append_all",
    "mend",
    "new_judgment",
    "repaired_lines",
    "retract",
    "row_of",
    "torn_file",
    "undo",
]

LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Appended:
    """What an append did: rows written, rows that were there already, and whether a torn line was repaired before."""

    written: int
    known: int
    repaired: bool


def new_judgment(prompt: str, chosen: str, rejected: str, **columns: Any) -> Judgment:
    """A judgment with a new id, of now. Texts that can't be stored are a DatasetError."""
    for column, text in zip(TEXTS, (prompt, chosen, rejected), strict=True):
        check_text(text, column, "This pair")
    return Judgment(uuid.uuid4().hex, _now(), pair_id_of(prompt, chosen, rejected), prompt, chosen, rejected, **columns)


def append(workspace: Workspace, judgment: Judgment) -> Appended:
    """Store one judgment; storing it again (same id, a second try) is the same as once.

    Raises WorkspaceError where the disk is full, the folder can't be written or the lock can't be had within LOCK_SECONDS:
    then nothing of it is in the journal, and the call may be repeated. A judgment that can't be stored is a DatasetError.
    A process's first append reads the journal's ids (0.1 s of 100,000 rows), the others what is new.
    """
    line = _line(judgment)
    with _opened(workspace.preferences) as (file, repaired):
        if known_ids(workspace.preferences, file).has(file, judgment.id):
            return Appended(0, 1, repaired)
        _write(file, line)
    return Appended(1, 0, repaired)


def append_all(workspace: Workspace, judgments: Iterable[Judgment]) -> Appended:
    """Store many in one go: all of them, or none where it fails. Ids that the journal has are left out. Raises as `append`."""
    new: dict[str, bytes] = {}
    count = 0
    for count, judgment in enumerate(judgments, start=1):  # noqa: B007 (counted, also those that are left out)
        if judgment.id not in new:
            new[judgment.id] = _line(judgment)
    with _opened(workspace.preferences) as (file, repaired):
        known = known_ids(workspace.preferences, file)
        new = {judgment_id: line for judgment_id, line in new.items() if not known.has(file, judgment_id)}
        _write(file, b"".join(new.values()))
    return Appended(len(new), count - len(new), repaired)


def mend(workspace: Workspace) -> bool:
    """Repair a torn last line now, where there is one: until then nobody else can read the file as JSON lines. True if so."""
    if not workspace.preferences.exists():
        return False
    with _opened(workspace.preferences) as (_file, repaired):
        return repaired


def retract(workspace: Workspace, judgment_id: str, annotator: str = "") -> Judgment:
    """Take back any judgment by its id. Doing so twice is the same as once. Refused on a public Space (see `undo`)."""
    refuse_on_public_space("Withdrawing by id")
    journal = Journal(workspace.preferences).refresh()
    row = journal.rows.get(judgment_id)
    if row is None or row["verdict"] == "retracted":
        raise DatasetError(f"No judgment {judgment_id!r} in {workspace.preferences}: `dataset export` lists the ids")
    known = next((r for r in journal.rows.values() if r["verdict"] == "retracted" and r["retracts"] == judgment_id), None)
    if known is not None:
        return Judgment(**known | {"meta": JudgmentMeta(**known["meta"])})
    return undo(workspace, judgment_id, row["pair_id"], annotator or row["annotator"], row["source"])


def undo(workspace: Workspace, judgment_id: str, pair_id: str, annotator: str, source: str = "label") -> Judgment:
    """Take back a judgment that the caller made: appends a row that says so."""
    # The id follows from what it takes back, so that a second try is known.
    judgment = Judgment(f"retracts-{judgment_id}", _now(), pair_id, "", "", "", verdict="retracted", retracts=judgment_id)
    judgment = replace(judgment, annotator=annotator, source=source)
    append(workspace, judgment)
    return judgment


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _as_stored(created_at: str) -> str:
    """A time with its milliseconds, always: pyarrow takes a column of times without fractions for timestamps, not for text."""
    try:
        time = datetime.fromisoformat(created_at)
    except ValueError:
        return created_at
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC).isoformat(timespec="milliseconds")


def _line(judgment: Judgment) -> bytes:
    """The judgment's line: every column, each of its one type, whatever the caller had."""
    try:
        meta = vars(judgment.meta) | {"seconds": float(judgment.meta.seconds), "seed": int(judgment.meta.seed)}
        row = row_of(vars(judgment) | {"meta": dict(meta)})
        row["created_at"] = _as_stored(row["created_at"])
        if row["meta"] != meta:
            raise ValueError("meta holds a value of a wrong type")
        if not math.isfinite(meta["seconds"]):  # JSON has no such number: it would be stored as null
            raise ValueError(f"meta.seconds must be a number, got {meta['seconds']}")
        return orjson.dumps(row) + b"\n"
    except (TypeError, ValueError) as exc:  # orjson's error is a TypeError: half a surrogate pair, a number past 64 bits
        raise DatasetError(f"Judgment {judgment.id!r} can't be stored: {exc}; mend it, then try again") from exc


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, bool]]:
    """The journal under its lock, its last line whole; and whether that had to be repaired. An OSError is a WorkspaceError."""
    try:
        with locked(path, LOCK_SECONDS):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(file).st_size == 0:  # not "was it there?": whoever made it may have been killed before this
                    sync_folder(path.parent)
                    sync_folder(path.parent.parent)
                yield file, repair(file, path)
            finally:
                os.close(file)
    except OSError as exc:
        place, reason = exc.filename or path, exc.strerror or exc
        message = f"Not stored: can't write {place}: {reason}; free space or make it writable, then try again"
        raise WorkspaceError(message) from exc


def _write(file: int, data: bytes) -> None:
    """All of it on the disk, or nothing of it in the file and an OSError."""
    size = os.fstat(file).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(file, memoryview(data)[written:])
        os.fsync(file)
    except OSError:
        with suppress(OSError):  # what can't be cut off now is cut off before the next append
            os.ftruncate(file, size)
            os.fsync(file)
        raise
