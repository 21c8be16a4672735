"""The journal of judgments, WORKSPACE/preferences.jsonl: append-only, one JSON object a line, nothing lost.

A row is acknowledged (the function returns) only when it is on the disk. A line that a power loss tore is set aside before the
next append, in preferences.jsonl.torn; a row that was torn was never acknowledged.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import orjson

from biasdpo.dataset.pairs import TEXTS, check_text, pair_id_of
from biasdpo.errors import DatasetError, WorkspaceError
from biasdpo.records import Judgment, JudgmentMeta, Verdict
from biasdpo.workspace import Workspace, locked, refuse_on_public_space

Row = dict[str, Any]
"""A line of the journal, with every column of `Judgment`."""

LOCK_SECONDS = 10.0
_TEXT_COLUMNS = tuple(f.name for f in fields(Judgment) if f.name != "meta")
_META = asdict(JudgmentMeta())
_TAIL_BYTES = 256 * 1024  # how far back an append looks for its own id: a second try comes soon after the first
_BLOCK = 64 * 1024


@dataclass(frozen=True)
class Appended:
    """What an append did: rows written, rows that were there already, and whether a torn line was repaired before."""

    written: int
    known: int
    repaired: bool


@dataclass(frozen=True)
class BadLine:
    """A line of a file that is no row, with the reason."""

    line: int
    reason: str


# Write


def new_judgment(prompt: str, chosen: str, rejected: str, **columns: Any) -> Judgment:
    """A judgment with a new id, of now. Texts that can't be stored are a DatasetError."""
    for column, text in zip(TEXTS, (prompt, chosen, rejected), strict=True):
        check_text(text, column, "This pair")
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return Judgment(uuid.uuid4().hex, now, pair_id_of(prompt, chosen, rejected), prompt, chosen, rejected, **columns)


def append(workspace: Workspace, judgment: Judgment) -> Appended:
    """Store one judgment; storing it again (same id, a second try) is the same as once.

    Raises WorkspaceError where the disk is full, the folder can't be written or the lock can't be had within LOCK_SECONDS:
    then nothing of it is in the journal, and the call may be repeated.
    """
    path = workspace.preferences
    with _opened(path) as (file, repaired):
        if judgment.id in _ids(_tail(file)):
            return Appended(0, 1, repaired)
        _write(file, path, _line(judgment))
    return Appended(1, 0, repaired)


def append_all(workspace: Workspace, judgments: Iterable[Judgment]) -> Appended:
    """Store many in one go: all of them, or none where it fails. Ids that the journal has are left out."""
    path = workspace.preferences
    with _opened(path) as (file, repaired):
        known = Journal(path).refresh().rows
        new: dict[str, Judgment] = {}
        count = 0
        for count, judgment in enumerate(judgments, start=1):  # noqa: B007 (counted, also those that are left out)
            if judgment.id not in known:
                new.setdefault(judgment.id, judgment)
        _write(file, path, b"".join(map(_line, new.values())))
    return Appended(len(new), count - len(new), repaired)


def retract(workspace: Workspace, judgment_id: str, annotator: str = "") -> Judgment:
    """Take back any judgment by its id. Doing so twice is the same as once. Refused on a public Space (see `undo`)."""
    refuse_on_public_space("Withdrawing by id")
    journal = Journal(workspace.preferences).refresh()
    row = journal.rows.get(judgment_id)
    if row is None or row["verdict"] == "retracted":
        raise DatasetError(f"No judgment {judgment_id!r} in {workspace.preferences}: `dataset export` lists the ids")
    return undo(workspace, judgment_id, row["pair_id"], annotator or row["annotator"], row["source"])


def undo(workspace: Workspace, judgment_id: str, pair_id: str, annotator: str, source: str = "label") -> Judgment:
    """Take back a judgment that the caller made: appends a row that says so."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    # The id follows from what it takes back, so that a second try is known.
    judgment = Judgment(f"retracts-{judgment_id}", now, pair_id, "", "", "", verdict="retracted", retracts=judgment_id)
    judgment = replace(judgment, annotator=annotator, source=source)
    append(workspace, judgment)
    return judgment


def _line(judgment: Judgment) -> bytes:
    row = asdict(judgment)
    row["meta"]["seconds"] = float(row["meta"]["seconds"])  # one type a column, whatever the caller had
    row["meta"]["seed"] = int(row["meta"]["seed"])
    return orjson.dumps(row) + b"\n"


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, bool]]:
    """The journal under its lock, its last line whole; and whether that had to be repaired."""
    with locked(path, LOCK_SECONDS):
        try:
            is_new = not path.exists()
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as exc:
            raise _not_written(path, exc) from exc
        try:
            if is_new:
                _sync_folder(path.parent)
            yield file, _repair(file, path)
        finally:
            os.close(file)


def _write(file: int, path: Path, data: bytes) -> None:
    size = os.fstat(file).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(file, data[written:])
        os.fsync(file)
    except OSError as exc:
        with suppress(OSError):
            os.ftruncate(file, size)
        raise _not_written(path, exc) from exc


def _not_written(path: Path, exc: OSError) -> WorkspaceError:
    reason = exc.strerror or exc
    return WorkspaceError(f"Not stored: can't write {path}: {reason}; free space or make it writable, then try again")


def _repair(file: int, path: Path) -> bool:
    """Mend a last line without its end: a whole row gets its line end, a torn one is set aside. True if there was one."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return False
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        start = max(0, start - _BLOCK)
        tail = os.pread(file, size - start, start)
    torn = tail.rpartition(b"\n")[2]
    whole = _parsed(torn) is not None
    note = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "kept": whole, "text": torn.decode("utf-8", "replace")}
    aside = torn_file(path)
    try:
        with aside.open("ab") as record:
            record.write(orjson.dumps(note) + b"\n")
            record.flush()
            os.fsync(record.fileno())
        if whole:
            os.write(file, b"\n")
        else:
            os.ftruncate(file, size - len(torn))
        os.fsync(file)
    except OSError as exc:
        raise _not_written(aside, exc) from exc
    return True


def torn_file(path: Path) -> Path:
    """Where torn lines are set aside."""
    return path.with_name(path.name + ".torn")


def repaired_lines(workspace: Workspace) -> int:
    """How many torn lines were repaired so far."""
    file = torn_file(workspace.preferences)
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def _tail(file: int) -> bytes:
    size = os.fstat(file).st_size
    return os.pread(file, min(size, _TAIL_BYTES), max(0, size - _TAIL_BYTES))


def _ids(lines: bytes) -> set[str]:
    return {row["id"] for line in lines.split(b"\n") if line and (row := _parsed(line)) is not None}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems can't; the row itself is synced
        pass
    finally:
        os.close(handle)


# Read


def _parsed(line: bytes) -> Row | None:
    try:
        row = orjson.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("id"), str) else None


def row_of(value: Any) -> Row:
    """A journal's line with every column; a column of a wrong type is a ValueError that says which. Missing ones are empty."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    row: Row = {}
    for column in _TEXT_COLUMNS:
        text = value.get(column, "")
        if not isinstance(text, str):
            raise ValueError(f"{column} must be a string, got {type(text).__name__}")
        row[column] = text
    if not row["id"]:
        raise ValueError("no id")
    if row["verdict"] not in get_args(Verdict):
        raise ValueError(f"verdict must be one of {', '.join(get_args(Verdict))}, got {row['verdict']!r}")
    meta = value.get("meta", {})
    row["meta"] = _META | meta if isinstance(meta, dict) else _META
    return row


class Journal:
    """What the journal says, read as it grows: `refresh` reads only what was appended since.

    rows        by id, in their order; the same id twice is one row (the first)
    retracted   ids that were taken back
    bad_lines   lines that are no rows; a last line without an end is being written, or torn, and waits
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self.rows: dict[str, Row] = {}
        self.retracted: set[str] = set()
        self.bad_lines: list[BadLine] = []
        self._offset = 0
        self._lines = 0
        self._inode = 0

    def refresh(self) -> Journal:
        """Read what is new; a file that was replaced or cut is read from its start."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._start_over()
                    self._inode = status.st_ino
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            self._start_over()
            return self
        except OSError as exc:
            raise WorkspaceError(f"Can't read {self.path}: {exc.strerror or exc}; make it readable") from exc
        whole, end, _ = data.rpartition(b"\n")
        if end:
            for line in whole.split(b"\n"):
                self._lines += 1
                self._take(line.removeprefix(b"\xef\xbb\xbf") if self._lines == 1 else line)
            self._offset += len(whole) + 1
        return self

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            row = row_of(orjson.loads(line))
        except ValueError as exc:  # orjson's error is one, too
            self.bad_lines.append(BadLine(self._lines, str(exc)))
            return
        if row["id"] in self.rows:
            return
        self.rows[row["id"]] = row
        if row["verdict"] == "retracted":
            self.retracted.add(row["retracts"])

    def standing(self) -> list[Row]:
        """The judgments that were not taken back, in their order."""
        return [row for row in self.rows.values() if row["verdict"] != "retracted" and row["id"] not in self.retracted]
