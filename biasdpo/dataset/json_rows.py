"""Rows of a JSONL file, or of a file that is one JSON array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from biasdpo.dataset.rows import BOM, BadLine
from biasdpo.dataset.source_rows import MAX_LINE_BYTES, NO_UTF8, SourceRow, bad_line, is_utf8


class _TwiceError(ValueError):
    """An object that has a key twice: which of the two values was meant, nobody knows."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _TwiceError(f"column {twice[:60]!r} is there twice")
    return value


_STRICT, _LOOSE = json.JSONDecoder(object_pairs_hook=_unique), json.JSONDecoder()


def _parsed(line: int, text: str) -> SourceRow | BadLine:
    try:
        return SourceRow(line, _STRICT.decode(text.strip()))
    except _TwiceError as exc:
        return bad_line(line, str(exc))
    except ValueError as exc:
        return bad_line(line, f"no JSON ({exc})")
    except RecursionError:
        return bad_line(line, "no JSON (nested too deeply)")


def json_lines(path: Path) -> Iterator[SourceRow | BadLine]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield bad_line(number, f"longer than {MAX_LINE_BYTES // 2**20} MiB")
                continue
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError:
                    yield bad_line(number, NO_UTF8)
                else:
                    yield _parsed(number, text)


def array_items(path: Path) -> Iterator[SourceRow | BadLine]:
    """Item by item, so that one bad item, or an end that was cut off, costs no other."""
    text = path.read_bytes().removeprefix(BOM).decode("utf-8", "surrogateescape")
    place = _after_space(text, text.index("[") + 1)
    number = 0
    while text[place : place + 1] != "]":
        number += 1
        try:
            row, end = _item(number, text, place)
        except (ValueError, RecursionError) as exc:
            reason = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)
            yield bad_line(number, f"no JSON ({reason}); what follows was not read")
            return
        yield row if is_utf8(text[place:end]) else bad_line(number, NO_UTF8)
        place = _after_space(text, end)
        if text[place : place + 1] == ",":
            place = _after_space(text, place + 1)
        elif text[place : place + 1] != "]":
            yield bad_line(number + 1, "no JSON (expected ',' or ']'); what follows was not read")
            return
    if text[place + 1 :].strip():
        yield bad_line(number + 1, "text after the end of the JSON array; what follows was not read")


def _item(number: int, text: str, place: int) -> tuple[SourceRow | BadLine, int]:
    """The array's item that begins at `place`, and where it ends."""
    try:
        value, end = _STRICT.raw_decode(text, place)
    except _TwiceError as exc:
        return bad_line(number, str(exc)), _LOOSE.raw_decode(text, place)[1]
    return SourceRow(number, value), end


_SPACE = re.compile(r"[ \t\r\n]*")


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None  # it matches nothing, too
    return found.end()
