"""Which ids a journal has: so that storing a judgment again, however late and from whichever process, is the same as once."""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from biasdpo.dataset.growing import GrowingLines
from biasdpo.dataset.rows import BOM, row_of

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
