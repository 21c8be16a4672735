"""The journal's rows as they are read: what a line must be, and a reader that follows the file as it grows."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import orjson

from biasdpo.dataset.bulk import without_collection
from biasdpo.dataset.growing import GrowingLines
from biasdpo.errors import WorkspaceError
from biasdpo.records import Judgment, JudgmentMeta, Verdict
from biasdpo.workspace import locked

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
