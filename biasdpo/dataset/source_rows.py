"""What reading gives: rows with their line, and lines that are no rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from biasdpo.dataset.rows import BadLine

MAX_LINE_BYTES = 16 * 1024 * 1024  # a longer line is no row: three texts of at most 100,000 characters are far shorter
NO_UTF8 = "broken UTF-8; save the file as UTF-8"
_MAX_REASON = 300


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read. `line` counts from 1: the line where it starts (JSONL, CSV), else its number in the file."""

    line: int
    value: Any


def columns_of(rows: Sequence[SourceRow | BadLine]) -> tuple[str, ...]:
    """Every column that some of the rows have, in the order in which they come up."""
    values = [row.value for row in rows if isinstance(row, SourceRow) and isinstance(row.value, dict)]
    return tuple(dict.fromkeys(str(column) for value in values for column in value))


def bad_line(line: int, reason: str) -> BadLine:
    """A BadLine whose reason is one line and not endless, whatever the file holds."""
    text = "".join(character if character.isprintable() else " " for character in reason[: _MAX_REASON + 1])
    return BadLine(line, text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "…")


def is_utf8(text: str) -> bool:
    """Whether text that was decoded with `surrogateescape` held no broken bytes."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
