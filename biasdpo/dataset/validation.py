"""Is a file, or the journal, what it should be? Every line that is not, with its reason; nothing is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from biasdpo.dataset.formats import ColumnMapping
from biasdpo.dataset.importing import convert_source, is_journal_row
from biasdpo.dataset.pairs import TEXTS, text_fault
from biasdpo.dataset.reading import HUB, rows_of
from biasdpo.dataset.rows import BOM, BadLine, Row, row_of
from biasdpo.dataset.source_rows import SourceRow, bad_line
from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace


@dataclass(frozen=True)
class Validated:
    """What was found. `rows` = good ones + bad ones; `by_verdict` counts a journal's good lines ({} for other files);
    `mapping` names the columns of other files; `notes` say what an import would change or leave out."""

    source: str
    rows: int
    good: int
    bad: tuple[BadLine, ...]
    by_verdict: dict[str, int]
    mapping: ColumnMapping
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that `dataset validate --json` prints."""
        return asdict(self) | {"mapping": self.mapping.to_json()}


def validate(source: Workspace | str | Path, on_row: Callable[[], object] = lambda: None) -> Validated:
    """Check a workspace's journal (one that is not there yet has no rows), or any file that an import takes.

    A source that can't be read at all is a DatasetError.
    """
    if isinstance(source, Workspace):
        path = source.preferences
        return _journal(path, on_row) if path.exists() else Validated(str(path), 0, 0, (), {}, ColumnMapping())
    if is_journal(source):
        return _journal(Path(source), on_row)
    converted = convert_source(source, on_row=on_row)
    good = len(converted.judgments)
    return Validated(str(source), good + len(converted.bad), good, converted.bad, {}, converted.mapping, converted.notes)


def is_journal(source: str | Path) -> bool:
    """Whether a source is a journal's file: a JSONL file whose first object has a journal's columns."""
    if str(source).startswith(HUB) or Path(source).suffix.lower() not in (".jsonl", ".ndjson"):
        return False
    first = next((row.value for row in rows_of(source) if isinstance(row, SourceRow)), None)
    return is_journal_row(first)


def _journal(path: Path, on_row: Callable[[], object]) -> Validated:
    rows, good = 0, Counter[str]()
    bad: list[BadLine] = []
    lines_by_id: dict[str, int] = {}
    retracts: list[tuple[int, str]] = []
    for number, line in _lines(path):
        on_row()
        rows += 1
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it has no line end: it is being written, or was torn (the next append mends it)")
            row = row_of(orjson.loads(line))
            fault = _fault(row)
            if fault:
                raise ValueError(fault)
            if row["id"] in lines_by_id:
                raise ValueError(f"its id was there before, in line {lines_by_id[row['id']]}: this line counts for nothing")
        except ValueError as exc:  # orjson's error is one, too
            bad.append(bad_line(number, str(exc)))
            continue
        lines_by_id[row["id"]] = number
        good[row["verdict"]] += 1
        if row["verdict"] == "retracted":
            retracts.append((number, row["retracts"]))
    for number, judgment_id in retracts:
        if judgment_id not in lines_by_id:
            bad.append(bad_line(number, f"it takes back {judgment_id!r}, an id that no good line has"))
            good["retracted"] -= 1
    bad.sort(key=lambda line: line.line)
    return Validated(str(path), rows, good.total(), tuple(bad), dict(sorted((+good).items())), ColumnMapping())


def _fault(row: Row) -> str:
    """Why training can't use a judgment; "" where it can, or where it says nothing that training reads."""
    if row["verdict"] != "preferred":
        return ""
    for column in TEXTS:
        fault = text_fault(row[column], column)
        if fault:
            return fault
    return "chosen and rejected are the same text" if row["chosen"].strip() == row["rejected"].strip() else ""


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(BOM) if number == 1 else line
                if text.strip():
                    yield number, text
    except OSError as exc:
        raise DatasetError(f"Can't read {path}: {exc.strerror or exc}; make it readable") from exc
