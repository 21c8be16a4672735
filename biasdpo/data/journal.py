"""The journal of judgments, WORKSPACE/preferences.jsonl: append-only, one JSON object a line, nothing lost.

A row is acknowledged (the function returns) only when it is on the disk. A line that a power loss tore is set aside before the
next append (see `torn`); a row that was torn was never acknowledged."""

from __future__ import annotations

import gc
import math
import os
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import orjson

from biasdpo.data.pairs import TEXTS, check_text, pair_id_of
from biasdpo.errors import DatasetError, WorkspaceError
from biasdpo.records import Judgment, JudgmentMeta, Verdict
from biasdpo.workspace import Workspace, locked, refuse_on_public_space

# --- bulk: Rows by the hundred thousand


@contextmanager
def without_collection() -> Iterator[None]:
    """While many rows are made or counted, none of which is garbage: else Python's collector goes over all of them again and
    again, which takes as long as the work itself. Reference counts free what they free; cycles wait until afterwards.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- growing: A file of lines that grows at its end, read on from where the last reading ended


_BLOCK_BYTES = 8 * 2**20  # read at once


class GrowingLines:
    """How far a file was read: `offset` bytes, which are `count` whole lines."""

    def __init__(self) -> None:
        self.offset = 0
        self.count = 0
        self._inode = 0
        self._last = b""

    def continues_in(self, file: int) -> bool:
        """Whether an open file begins with what was read, as far as its inode, its size and the last line read can tell."""
        status = os.fstat(file)
        if self.offset == 0:
            self._inode = status.st_ino
            return True
        same = status.st_ino == self._inode and status.st_size >= self.offset
        last = self._last + b"\n"
        return same and os.pread(file, len(last), self.offset - len(last)) == last

    def read(self, file: int) -> Iterator[bytes]:
        """The whole lines that are new, without their ends. One counts as read when the next is asked for.

        A last line without an end is being written, or torn, and waits. Nothing past the size that the file has at the start is
        read: what a torn line was cut off for while it was read, and what was written in its place, would make one line.
        """
        start, end = self.offset, os.fstat(file).st_size
        rest = b""
        while start < end and (data := os.pread(file, min(_BLOCK_BYTES, end - start), start)):
            start += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                yield line
                self.offset += len(line) + 1
                self.count += 1
                self._last = line


# --- rows: The journal's rows as they are read: what a line must be, and a reader that follows the file as


Row = dict[str, Any]
"""A line of the journal, with every column of `Judgment`."""

_COLUMNS = tuple(f.name for f in fields(Judgment))
_TEXT_COLUMNS = tuple(name for name in _COLUMNS if name != "meta")
_TYPES = tuple(dict if name == "meta" else str for name in _COLUMNS)
_META = asdict(JudgmentMeta())
_META_KEYS, _META_TYPES = tuple(_META), tuple(map(type, _META.values()))
_VERDICTS = frozenset(get_args(Verdict))

Mark = tuple[int, int]
"""How far a reader of `Journal.since` has come: which reading of the file, and how many of its rows."""

BOM = b"\xef\xbb\xbf"
_DOUBT_SECONDS = 2.0  # how long a line that is no row may wait for the file's lock


@dataclass(frozen=True)
class BadLine:
    """A line of a file that is no row, with the reason."""

    line: int
    reason: str


def row_of(value: Any) -> Row:
    """A journal's line with every column; a column of a wrong type is a ValueError that says which. Missing ones are empty, and
    what `meta` has of another type. May change `value`."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    row: Row = value
    if (*value,) != _COLUMNS or (*map(type, value.values()),) != _TYPES:  # as this program writes it: all seen at a glance
        row = {column: value.get(column, "") for column in _TEXT_COLUMNS} | {"meta": value.get("meta", {})}
        for column in _TEXT_COLUMNS:
            if not isinstance(row[column], str):
                raise ValueError(f"{column} must be a string, got {type(row[column]).__name__}")
    if not row["id"]:
        raise ValueError("no id")
    if row["verdict"] not in _VERDICTS:
        raise ValueError(f"verdict must be one of {', '.join(get_args(Verdict))}, got {row['verdict']!r}")
    meta = row["meta"]
    if type(meta) is not dict or (*meta,) != _META_KEYS or (*map(type, meta.values()),) != _META_TYPES:
        row["meta"] = _meta_of(meta)
    return row


def _meta_of(meta: Any) -> dict[str, Any]:
    """The fixed keys. A value of another type counts as not given: nobody's judgment is bad for it."""
    if not isinstance(meta, dict):
        return dict(_META)
    kept = {key: meta.get(key, default) for key, default in _META.items()}
    for key, default in _META.items():
        if type(kept[key]) is not type(default):
            kept[key] = float(kept[key]) if isinstance(default, float) and type(kept[key]) is int else default
    return kept


class Journal:
    """What the journal says, read as it grows: `refresh` reads only what was appended since. Threads may share one.

    rows        by id, in their order; the same id twice is one row (the first)
    retracted   ids that were taken back
    bad_lines   lines that are no rows; a last line without an end is being written, or torn, and waits
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reading = 0
        self._lock = threading.RLock()
        self._start_over()

    def _start_over(self) -> None:
        self._reading += 1
        self.rows: dict[str, Row] = {}
        self.retracted: set[str] = set()
        self.bad_lines: list[BadLine] = []
        self._in_order: list[Row] = []
        self._lines = GrowingLines()

    def refresh(self) -> Journal:
        """Read what is new; a file that was replaced or cut is read from its start."""
        with self._lock:
            if not self._read(doubt=True):
                # A line that is no row may be two halves: read while a torn line was cut off and another written in its place.
                with suppress(WorkspaceError, OSError), locked(self.path, _DOUBT_SECONDS):
                    self._read(doubt=False)
                    return self
                self._read(doubt=False)
        return self

    def standing(self) -> list[Row]:
        """The judgments that were not taken back, in their order."""
        with self._lock:
            return [row for row in self._in_order if row["verdict"] != "retracted" and row["id"] not in self.retracted]

    def since(self, mark: Mark) -> tuple[list[Row], Mark]:
        """The rows after a mark, judgments and what takes them back, in their order; and the mark to ask with next time.

        Where the file was read from its start since, the mark's first number changes and all rows are given; (0, 0) gives all.
        """
        with self._lock:
            rows = self._in_order[mark[1] :] if mark[0] == self._reading else list(self._in_order)
            return rows, (self._reading, len(self._in_order))

    def _read(self, *, doubt: bool) -> bool:
        """Read what is new; with `doubt`, stop before a line that is no row and return False."""
        try:
            with self.path.open("rb") as file, without_collection():
                if not self._lines.continues_in(file.fileno()):
                    self._start_over()
                    self._lines.continues_in(file.fileno())
                for line in self._lines.read(file.fileno()):
                    try:
                        self._take(line.removeprefix(BOM) if self._lines.count == 0 else line)
                    except ValueError as exc:  # orjson's error is one, too
                        if doubt:
                            return False
                        self.bad_lines.append(BadLine(self._lines.count + 1, str(exc)))
        except FileNotFoundError:
            if self._lines.offset:
                self._start_over()
        except OSError as exc:
            raise WorkspaceError(f"Can't read {self.path}: {exc.strerror or exc}; make it readable") from exc
        return True

    def _take(self, line: bytes) -> None:
        if not line or line.isspace():
            return
        row = row_of(orjson.loads(line))
        if row["id"] not in self.rows:
            self.rows[row["id"]] = row
            self._in_order.append(row)
            if row["verdict"] == "retracted":
                self.retracted.add(row["retracts"])


# --- known ids: Which ids a journal has: so that storing a judgment again, however late and from whichever proc


_LENGTH_BITS = 32  # of a place: the line's length; above them where it begins
_START = b'{"id":"'  # of a line as this program writes it


class KnownIds:
    """The ids of a journal and where their lines begin. About 200 bytes an id; a refresh reads what is new."""

    def __init__(self) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._lines = GrowingLines()
        self._places: dict[bytes, int] = {}

    def refresh(self, file: int) -> None:
        """Read on in the journal, open and under its lock."""
        if not self._lines.continues_in(file):
            self._start_over()
            self._lines.continues_in(file)
        for whole in self._lines.read(file):
            line = whole.removeprefix(BOM) if self._lines.count == 0 else whole
            end = line.find(b'"', len(_START))
            found = line[len(_START) : end] if line.startswith(_START) else b"\\"
            if b"\\" in found:  # written by somebody else, or an id that JSON escapes
                found = _parsed_id(line)
            if found:
                self._places.setdefault(found, self._lines.offset << _LENGTH_BITS | len(whole))

    def has(self, file: int, judgment_id: str) -> bool:
        """Whether the journal has a row of this id: its line is read again, since a line that is no row counts for nothing."""
        place = self._places.get(judgment_id.encode())
        if place is None:
            return False
        line = os.pread(file, place & (1 << _LENGTH_BITS) - 1, place >> _LENGTH_BITS)
        try:
            return bool(row_of(orjson.loads(line.removeprefix(BOM)))["id"] == judgment_id)
        except ValueError:
            return False


_of_path: dict[Path, KnownIds] = {}


def known_ids(path: Path, file: int) -> KnownIds:
    """Those of the journal at `path`, open and under its lock. A process reads a journal once, then only what is new in it."""
    known = _of_path.setdefault(path, KnownIds())
    known.refresh(file)
    return known


def _parsed_id(line: bytes) -> bytes:
    try:
        value = orjson.loads(line)
    except ValueError:
        return b""
    found = value.get("id") if isinstance(value, dict) else None
    return found.encode("utf-8", "replace") if isinstance(found, str) else b""


# --- torn: A last line that a power loss or a kill left torn: set aside before the next append, in prefere


_BLOCK = 4096  # read at first: most lines are shorter


def repair(file: int, path: Path) -> bool:
    """Mend the last line of an open journal, under its lock; True if there was something to mend.

    A whole row gets its line end; a torn one is cut off. A line that has its end and is no JSON was torn as well: the file's
    length can reach the disk before its middle does. Raises OSError; what is begun then is done by the next repair.
    """
    size = os.fstat(file).st_size
    line = last_line(file, size)
    ended = line.endswith(b"\n")
    whole = _is_json(line)
    if size == 0 or (ended and (whole or line.isspace())):
        return False
    _set_aside(path, size - len(line), line, kept=whole)
    if whole:
        os.write(file, b"\n")
    else:
        os.ftruncate(file, size - len(line))
    os.fsync(file)
    return True


def last_line(file: int, size: int) -> bytes:
    """The last line of an open file of that size, with its end if it has one."""
    start, tail = size, b""
    while start > 0 and b"\n" not in tail[:-1]:
        step = min(_BLOCK if not tail else len(tail), start)  # doubling: a long line costs no more than a few reads
        start -= step
        tail = os.pread(file, step, start) + tail
    return tail[tail.rfind(b"\n", 0, max(0, len(tail) - 1)) + 1 :]


def torn_file(path: Path) -> Path:
    """Where the torn lines of a journal are set aside."""
    return path.with_name(path.name + ".torn")


def repaired_lines(workspace: Workspace) -> int:
    """How many torn lines were repaired so far."""
    return len(_notes(torn_file(workspace.preferences)))


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems can't; what is in the files is synced by itself
        pass
    finally:
        os.close(handle)


def _set_aside(path: Path, offset: int, line: bytes, *, kept: bool) -> None:
    aside = torn_file(path)
    text = line.decode("utf-8", "replace")
    last = _notes(aside)[-1:]
    if last and (last[0].get("offset"), last[0].get("text")) == (offset, text):
        return  # a repair that was killed before it was done
    note = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "kept": kept, "offset": offset, "text": text}
    with aside.open("ab") as record:
        # The line end before it parts it from a note that was itself torn.
        record.write(b"\n" * (record.tell() > 0) + orjson.dumps(note) + b"\n")
        record.flush()
        os.fsync(record.fileno())
    sync_folder(path.parent)


def _notes(aside: Path) -> list[dict[str, Any]]:
    lines = aside.read_bytes().split(b"\n") if aside.is_file() else []
    return [orjson.loads(line) for line in lines if _is_json(line)]


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except ValueError:
        return False


# --- journal: The journal of judgments, WORKSPACE/preferences.jsonl: append-only, one JSON object a line, not


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
