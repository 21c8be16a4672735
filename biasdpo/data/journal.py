"""The journal of judgments, WORKSPACE/preferences.jsonl: append-only, one JSON object per line.

A row is on disk before it is acknowledged (before the function returns). A line truncated by a power loss was never acknowledged;
it is moved to preferences.jsonl.torn before the next append.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import orjson

from biasdpo.access import check_stored, require_owner
from biasdpo.data.pairs import LABELS, TEXTS, check_label, check_text, pair_id_of
from biasdpo.errors import DatasetError, WorkspaceError
from biasdpo.records import Judgment, JudgmentMeta, Verdict
from biasdpo.workspace import Workspace, locked

EDITABLE = ("prompt", "chosen", "rejected", "category", "target_group", "note")
_REPLACED, _UNDONE = "replaced by ", "import undone"  # notes of the rows that withdraw
LOCK_SECONDS = 10.0  # how long an append waits for the lock
BOM = b"\xef\xbb\xbf"
_READ_LOCK_SECONDS = 2.0  # how long a reader waits for the lock before it reports a bad line
_BLOCK_BYTES = 8 * 2**20
_LINE_BLOCK_BYTES = 4096  # most lines are shorter


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the cyclic collector while many rows are built: none is garbage, and scanning them takes as long as building them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# Rows

Row = dict[str, Any]
"""A line of the journal, with every column of `Judgment`."""

_COLUMNS = tuple(f.name for f in fields(Judgment))
_TEXT_COLUMNS = tuple(name for name in _COLUMNS if name != "meta")
_TYPES = tuple(dict if name == "meta" else str for name in _COLUMNS)
_META = asdict(JudgmentMeta())
_META_KEYS, _META_TYPES = tuple(_META), tuple(map(type, _META.values()))
_VERDICTS = get_args(Verdict)


@dataclass(frozen=True)
class BadLine:
    """A line of a file that is not a row, with the reason."""

    line: int
    reason: str


def parse_row(line: bytes) -> Row:
    """Parse a line of the journal; a line that is not a row is a ValueError with the reason."""
    return row_of(orjson.loads(line.removeprefix(BOM)))


def row_of(value: Any) -> Row:
    """Return a journal line with every column; a column of the wrong type is a ValueError. May change `value`.

    Missing columns become empty, and so do values of the wrong type in `meta`.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    row: Row = value
    if (*value,) != _COLUMNS or (*map(type, value.values()),) != _TYPES:  # as written here, all is well at one glance
        row = {column: value.get(column, "") for column in _TEXT_COLUMNS} | {"meta": value.get("meta", {})}
        for column in _TEXT_COLUMNS:
            if not isinstance(row[column], str):
                raise ValueError(f"{column} must be a string, got {type(row[column]).__name__}")
    if not row["id"]:
        raise ValueError("no id")
    if row["verdict"] not in _VERDICTS:
        raise ValueError(f"verdict must be one of {', '.join(_VERDICTS)}, got {row['verdict'][:40]!r}")
    meta = row["meta"]
    if type(meta) is not dict or (*meta,) != _META_KEYS or (*map(type, meta.values()),) != _META_TYPES:
        row["meta"] = _clean_meta(meta)
    return row


def _clean_meta(meta: Any) -> dict[str, Any]:
    """Keep the known keys that have the right type: no judgment is bad because of its `meta`."""
    clean = dict(_META)
    for key, default in _META.items():
        value = meta.get(key, default) if isinstance(meta, dict) else default
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is type(default):
            clean[key] = value
    return clean


# Reading a file that grows


class GrowingLines:
    """Reads the lines of a growing file. `offset`: bytes read so far, which are `count` whole lines."""

    def __init__(self) -> None:
        self.offset = 0
        self.count = 0
        self._inode = 0
        self._last = b""

    def continues_in(self, file: int) -> bool:
        """Whether an open file still begins with what was read, judging by its inode, its size and the last line read."""
        status = os.fstat(file)
        if self.offset == 0:
            self._inode = status.st_ino
            return True
        last = self._last + b"\n"
        same = status.st_ino == self._inode and status.st_size >= self.offset
        return same and os.pread(file, len(last), self.offset - len(last)) == last

    def read(self, file: int) -> Iterator[bytes]:
        """Yield the new whole lines, without their line ends; a line counts as read when the next one is requested.

        A last line without a line end is being written, or truncated, and is left for later. Nothing past the size that the file
        has at the start is read, since a truncated line and the row written in its place would make one line.
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


Mark = tuple[int, int]
"""A position in `Journal.since`: which reading of the file, and how many of its rows."""


class Journal:
    """The journal's content; `refresh` reads what was appended since. Thread-safe.

    rows        by id, in order; a second row of the same id is ignored
    retracted   ids that were withdrawn
    bad_lines   lines that are not rows
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

    def refresh(self, *, is_locked: bool = False) -> Journal:
        """Read what is new; a file that was replaced or cut is read from its start. `is_locked`: the caller holds its lock."""
        with self._lock:
            if not self._read(stop_at_bad_line=not is_locked):
                # It may be two halves, read while a truncated line was replaced by another: look again while nobody writes.
                with suppress(WorkspaceError, OSError), locked(self.path, _READ_LOCK_SECONDS):
                    self._read(stop_at_bad_line=False)
                    return self
                self._read(stop_at_bad_line=False)
        return self

    def standing(self) -> list[Row]:
        """The judgments that were not withdrawn, in order."""
        with self._lock:
            return [row for row in self._in_order if row["verdict"] != "retracted" and row["id"] not in self.retracted]

    def since(self, mark: Mark) -> tuple[list[Row], Mark]:
        """Return the rows after a mark, including those that withdraw others, and the next mark.

        (0, 0) returns all rows. So does a mark from before the file was read again from its start; the mark's first number tells.
        """
        with self._lock:
            rows = self._in_order[mark[1] :] if mark[0] == self._reading else list(self._in_order)
            return rows, (self._reading, len(self._in_order))

    def _read(self, *, stop_at_bad_line: bool) -> bool:
        """Read what is new; False if it stopped at a bad line."""
        try:
            with self.path.open("rb") as file, garbage_collection_paused():
                if not self._lines.continues_in(file.fileno()):
                    self._start_over()
                    self._lines.continues_in(file.fileno())
                for line in self._lines.read(file.fileno()):
                    try:
                        self._add(line)
                    except ValueError as exc:
                        if stop_at_bad_line:
                            return False
                        self.bad_lines.append(BadLine(self._lines.count + 1, str(exc)))
        except FileNotFoundError:
            if self._lines.offset:
                self._start_over()
        except OSError as exc:
            raise WorkspaceError(f"Can't read {self.path}: {exc.strerror or exc}; make it readable") from exc
        return True

    def _add(self, line: bytes) -> None:
        if not line or line.isspace():
            return
        row = row_of(orjson.loads(line.removeprefix(BOM)))  # not `parse_row`: a call less for each line
        if row["id"] not in self.rows:
            self.rows[row["id"]] = row
            self._in_order.append(row)
            if row["verdict"] == "retracted":
                self.retracted.add(row["retracts"])


_journals: dict[Path, Journal] = {}


def journal_of(workspace: Workspace) -> Journal:
    """The journal of a workspace as this process has read it: one for all, so that each row is read once."""
    return _journals.setdefault(workspace.preferences, Journal(workspace.preferences))


# Appending


class KnownIds:
    """The ids in a journal, including those of lines that are not rows. Reading them takes a fraction of the time of its rows."""

    def __init__(self) -> None:
        self._lines = GrowingLines()
        self._ids: set[str] = set()

    def refresh(self, file: int) -> set[str]:
        """Read what is new in the open, locked journal."""
        if not self._lines.continues_in(file):
            self._lines, self._ids = GrowingLines(), set()
            self._lines.continues_in(file)
        for line in self._lines.read(file):
            start, _, rest = line.partition(b'{"id":"')
            found, _, _ = rest.partition(b'"')
            if not start and b"\\" not in found:
                self._ids.add(found.decode("utf-8", "replace"))
            elif line:  # written by another program
                with suppress(ValueError, AttributeError):
                    self._ids.add(str(orjson.loads(line.removeprefix(BOM)).get("id")))
        return self._ids


_known_ids: dict[Path, KnownIds] = {}


@dataclass(frozen=True)
class Appended:
    """The result of an append: rows written, rows that were there already, and whether a truncated line was repaired first."""

    written: int
    known: int
    repaired: bool


def new_judgment(prompt: str, chosen: str, rejected: str, **columns: Any) -> Judgment:
    """Build a judgment with a new id and the current time. Texts that can't be stored are a DatasetError."""
    for column, text in zip(TEXTS, (prompt, chosen, rejected), strict=True):
        check_text(text, column, "This pair")
    return Judgment(uuid.uuid4().hex, now(), pair_id_of(prompt, chosen, rejected), prompt, chosen, rejected, **columns)


def append(workspace: Workspace, judgment: Judgment) -> Appended:
    """Store one judgment. Storing it again (the same id, in a second try) changes nothing.

    Raises WorkspaceError if the disk is full, the folder is read-only, or the lock is held for longer than LOCK_SECONDS; then
    nothing is stored, and the call may be repeated. A judgment that can't be stored is a DatasetError; a visitor's that is too
    much, a RefusedError.
    """
    if judgment.verdict != "retracted":
        path = workspace.preferences
        check_stored(len(_line(judgment)), path.stat().st_size if path.exists() else 0)
    return append_all(workspace, [judgment])


def append_all(workspace: Workspace, judgments: Iterable[Judgment]) -> Appended:
    """Store judgments, all or (on an error) none; those already in the journal are skipped. Raises as `append` does."""
    lines: dict[str, bytes] = {}
    count = 0
    for judgment in judgments:
        count += 1
        if judgment.id not in lines:
            lines[judgment.id] = _line(judgment)
    with opened(workspace.preferences) as (file, repaired):
        known = _known_ids.setdefault(workspace.preferences, KnownIds()).refresh(file).intersection(lines)
        if known:  # a line that is not a row makes no id known
            known &= journal_of(workspace).refresh(is_locked=True).rows.keys()
        new = [line for judgment_id, line in lines.items() if judgment_id not in known]
        _write(file, b"".join(new))  # synced even if nothing is new: the process that wrote it may have been killed before
    return Appended(len(new), count - len(new), repaired)


def repair(workspace: Workspace) -> bool:
    """Repair a truncated last line now, so that other programs can read the file as JSON lines. True if there was one."""
    if not workspace.preferences.exists():
        return False
    with opened(workspace.preferences) as (_file, repaired):
        return repaired


def undo(workspace: Workspace, judgment_id: str, pair_id: str, annotator: str, source: str = "label") -> Judgment:
    """Withdraw a judgment that the caller made, by appending a row that says so."""
    judgment = _retraction({"id": judgment_id, "pair_id": pair_id, "source": source}, annotator)
    append(workspace, judgment)
    return judgment


def withdraw(workspace: Workspace, ids: Iterable[str], annotator: str = "") -> int:
    """Withdraw judgments by their ids, in one append; return how many of them stood. Only for the owner (see `undo`)."""
    require_owner("Withdrawing by id")
    ids = frozenset(ids)
    rows = journal_of(workspace).refresh().rows
    for unknown in sorted(id for id in ids if id not in rows or rows[id]["verdict"] == "retracted"):
        raise DatasetError(f"No judgment {unknown!r} in {workspace.preferences}: `dataset export` lists the ids")
    return len(_replace(workspace, lambda row: row["id"] in ids, lambda _row: None, annotator))


def undo_import(workspace: Workspace, source: str, annotator: str = "") -> int:
    """Withdraw everything that still stands of the source `import:NAME`, in one append; return how much that was.

    Importing the same rows again stores them again, unlike rows that were withdrawn one by one. Only for the owner.
    """
    require_owner("Undoing an import")
    if not source.startswith("import:"):
        raise DatasetError(f"An import is named import:NAME, as the table's Source column shows: got {source!r}")
    return len(_replace(workspace, lambda row: row["source"] == source, lambda _row: None, annotator, _UNDONE))


def edit(workspace: Workspace, ids: Iterable[str], changes: Mapping[str, str], annotator: str = "") -> list[str]:
    """Change columns of judgments in one append: each is withdrawn, and one with the changes takes its place.

    Return the new ids; judgments that were withdrawn, or would not change, are left alone. A change that can't be stored is a
    DatasetError. Only for the owner.
    """
    require_owner("Editing")
    if unknown := changes.keys() - set(EDITABLE):
        raise DatasetError(f"Only {', '.join(EDITABLE)} can be edited: got {', '.join(sorted(unknown))}")
    ids = frozenset(ids)

    def changes_it(row: Row) -> bool:
        return row["id"] in ids and any(row[column] != text for column, text in changes.items())

    return _replace(workspace, changes_it, lambda row: _edited(row, changes), annotator)


def replacement(retraction: Row) -> str:
    """The id of the judgment that took a withdrawn one's place when it was edited; "" if none did."""
    return str(retraction["note"]).removeprefix(_REPLACED) if retraction["note"].startswith(_REPLACED) else ""


def undone_ids(journal: Journal) -> set[str]:
    """Ids of judgments that were withdrawn with their whole import, edited before or not."""
    undone: set[str] = set()
    for row in reversed(journal.since((0, 0))[0]):  # an edit before what became of it
        if row["verdict"] == "retracted" and (row["note"] == _UNDONE or replacement(row) in undone):
            undone.add(row["retracts"])
    return undone


def _replace(
    workspace: Workspace,
    concerns: Callable[[Row], bool],
    replaced: Callable[[Row], Judgment | None],
    annotator: str,
    note: str = "",
) -> list[str]:
    """Withdraw the standing judgments that this concerns, each with what takes its place (None: nothing); return their new ids.

    Under the journal's lock, so that of two edits of one judgment only the first counts.
    """
    lines, ids = [], []
    with opened(workspace.preferences) as (file, _repaired):
        for row in filter(concerns, journal_of(workspace).refresh(is_locked=True).standing()):
            new = replaced(row)
            if new is not None:
                lines.append(_line(new))
            ids.append(new.id if new else row["id"])
            lines.append(_line(replace(_retraction(row, annotator), note=_REPLACED + new.id if new else note)))
        _write(file, b"".join(lines))
    return ids


def _retraction(row: Mapping[str, Any], annotator: str) -> Judgment:
    # The id is derived from the judgment's, so that a second try is recognized.
    judgment = Judgment(f"retracts-{row['id']}", now(), row["pair_id"], "", "", "", verdict="retracted", retracts=row["id"])
    return replace(judgment, annotator=annotator or row.get("annotator", ""), source=row["source"])


def _edited(row: Row, changes: Mapping[str, str]) -> Judgment:
    new = row | dict(changes)
    for column in TEXTS:
        check_text(new[column], column, "This edit")
    for column in LABELS.keys() & changes.keys():
        check_label(new[column], column)
    if new["chosen"].strip() == new["rejected"].strip():
        raise DatasetError("After the edit both completions are the same text, which teaches nothing: change one of them")
    for column in ("chosen", "rejected"):  # what the annotator was shown
        shown = row[f"original_{column}"] or row[column]
        new[f"original_{column}"] = "" if new[column] == shown else shown
    new["pair_id"] = pair_id_of(*(new[column] for column in TEXTS))
    content = "\0".join(("edit", row["id"], *(new[column] for column in EDITABLE)))
    new["id"] = hashlib.sha256(content.encode()).hexdigest()[:32]
    return Judgment(**new | {"meta": JudgmentMeta(**row["meta"])})


def now() -> str:
    """The current time as it is stored: UTC, ISO 8601, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _line(judgment: Judgment) -> bytes:
    """The judgment's line: every column, each of its one type, whatever the caller passed."""
    try:
        meta = vars(judgment.meta) | {"seconds": float(judgment.meta.seconds), "seed": int(judgment.meta.seed)}
        row = row_of(vars(judgment) | {"meta": dict(meta)})
        row["created_at"] = _with_milliseconds(row["created_at"])
        if row["meta"] != meta:
            raise ValueError("meta holds a value of a wrong type")
        if not math.isfinite(meta["seconds"]):  # JSON has no such number: it would be stored as null
            raise ValueError(f"meta.seconds must be a number, got {meta['seconds']}")
        return orjson.dumps(row) + b"\n"
    except (TypeError, ValueError) as exc:  # orjson raises TypeErrors: half a surrogate pair, a number past 64 bits
        raise DatasetError(f"Judgment {judgment.id!r} can't be stored: {exc}; fix it, then try again") from exc


def _with_milliseconds(created_at: str) -> str:
    """A time with milliseconds, always: pyarrow takes a column of times without fractions for timestamps, not for text."""
    try:
        time = datetime.fromisoformat(created_at)
    except ValueError:
        return created_at
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC).isoformat(timespec="milliseconds")


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, bool]]:
    """Open the journal under its lock, with its last line whole; yield the file and whether it had to be repaired."""
    try:
        with locked(path, LOCK_SECONDS):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(file).st_size == 0:  # not "was it there?": its creator may have been killed before this
                    sync_folder(path.parent)
                    sync_folder(path.parent.parent)
                yield file, _repair_last_line(file, path)
            finally:
                os.close(file)
    except OSError as exc:
        place, reason = exc.filename or path, exc.strerror or exc
        message = f"Not stored: can't write {place}: {reason}; free space or make it writable, then try again"
        raise WorkspaceError(message) from exc


def _write(file: int, data: bytes) -> None:
    """Bring all of the data to the disk, or leave nothing of it in the file and raise OSError."""
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


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk; some file systems can't, and sync files alone."""
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(handle)
    os.close(handle)


# Truncated lines


def truncated_file(path: Path) -> Path:
    """Where the truncated lines of a journal are set aside."""
    return path.with_name(path.name + ".torn")


def repaired_lines(workspace: Workspace) -> int:
    """How many truncated lines were repaired so far."""
    return len(_repairs(truncated_file(workspace.preferences)))


def _repair_last_line(file: int, path: Path) -> bool:
    """Repair the last line of an open, locked journal; True if that was necessary. An interrupted repair is done by the next.

    A whole row gets its line end; a truncated one is cut off. So is a line that has a line end but is not JSON: a file's length
    can reach the disk before its content does.
    """
    size = os.fstat(file).st_size
    line = _last_line(file, size)
    whole = _is_json_object(line)
    if size == 0 or (line.endswith(b"\n") and (whole or line.isspace())):
        return False
    _record_repair(path, size - len(line), line, kept=whole)
    if whole:
        os.write(file, b"\n")
    else:
        os.ftruncate(file, size - len(line))
    os.fsync(file)
    return True


def _last_line(file: int, size: int) -> bytes:
    """The last line of an open file of that size, with its line end if it has one."""
    start, tail = size, b""
    while start > 0 and b"\n" not in tail[:-1]:
        step = min(len(tail) or _LINE_BLOCK_BYTES, start)  # doubling: a long line takes only a few reads
        start -= step
        tail = os.pread(file, step, start) + tail
    return tail[tail.rfind(b"\n", 0, max(0, len(tail) - 1)) + 1 :]


def _record_repair(path: Path, offset: int, line: bytes, *, kept: bool) -> None:
    record = truncated_file(path)
    text = line.decode("utf-8", "replace")
    last = _repairs(record)[-1:]
    if last and (last[0].get("offset"), last[0].get("text")) == (offset, text):
        return  # recorded by a repair that was killed before it was done
    entry = {"at": now(), "kept": kept, "offset": offset, "text": text}
    with record.open("ab") as file:
        # The line end in front separates it from an entry that was itself truncated.
        file.write(b"\n" * (file.tell() > 0) + orjson.dumps(entry) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _repairs(record: Path) -> list[dict[str, Any]]:
    lines = record.read_bytes().split(b"\n") if record.is_file() else []
    return [orjson.loads(line) for line in lines if _is_json_object(line)]


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except ValueError:
        return False
