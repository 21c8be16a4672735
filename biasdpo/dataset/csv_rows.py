"""Rows of a CSV file: the delimiter is found, quoted line breaks are kept, and a stray quote costs its own row alone."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from biasdpo.dataset.rows import BadLine
from biasdpo.dataset.source_rows import MAX_LINE_BYTES, NO_UTF8, SourceRow, bad_line, is_utf8
from biasdpo.errors import DatasetError


class _Lines:
    """A file's lines for a csv.reader, which can be given back from the second line of a row on."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._back: deque[str] = deque()
        self._row: list[str] = []
        self.number = 0  # of lines handed out

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._lines)
        self._row.append(line)
        self.number += 1
        return line

    def begin_row(self) -> int:
        """The number of the line where the next row starts."""
        self._row.clear()
        return self.number + 1

    def give_back(self) -> None:
        """Hand out the lines of this row again, without its first."""
        self._back.extendleft(reversed(self._row[1:]))
        self.number -= len(self._row[1:])


def csv_rows(path: Path) -> Iterator[SourceRow | BadLine]:
    # The csv module's limit is one for the whole process, and meant against endless fields; a higher one harms nobody.
    csv.field_size_limit(MAX_LINE_BYTES)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter = _delimiter(file.readline())
        file.seek(0)
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            start = lines.begin_row()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as exc:
                # A stray quote must not swallow the rows after it: read on from the second line.
                lines.give_back()
                never = "unexpected end of data" in str(exc)
                yield bad_line(start, f"no CSV ({'a quote is opened and never closed' if never else exc})")
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
                continue
            if not header:
                header = _header(cells, path)
            elif cells:
                yield _csv_row(start, cells, header)


def _delimiter(first_line: str) -> str:
    return max(",;\t|", key=first_line.count)


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DatasetError(f"{path} has the column {twice[0][:60]!r} twice; rename one of them")
    return names


def _csv_row(line: int, cells: list[str], header: list[str]) -> SourceRow | BadLine:
    if not all(map(is_utf8, cells)):
        return bad_line(line, NO_UTF8)
    if len(cells) < len(header) or any(cells[len(header) :]):
        return bad_line(line, f"{len(cells)} cells, but the header has {len(header)}")
    return SourceRow(line, {name: cell for name, cell in zip(header, cells, strict=False) if name})
