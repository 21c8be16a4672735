"""Import of foreign preference data: read a file of any supported format, convert its rows, store the good ones, list the bad.

A bad row never costs a good one: each is reported with its line and a reason. pandas, pyarrow and `datasets` reject a whole file
for one bad line, or lose its line number, so JSON and CSV are read here; Parquet is read by pyarrow, the Hub by `datasets`. Of
these, only the mapped columns are read.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from biasdpo.access import require_owner
from biasdpo.data import templated
from biasdpo.data.journal import BOM, BadLine, Row, append_all, journal_of, now, parse_row, row_of, undone_ids
from biasdpo.data.pairs import LABELS, TEXTS, pair_id_of, text_fault
from biasdpo.data.templated import Message
from biasdpo.errors import ConfigError, DatasetError, plural
from biasdpo.records import SEED_RANGE, Judgment, JudgmentMeta, csv_text
from biasdpo.workspace import Workspace

# Reading: the rows of a source, one by one

HUB = "hub:"
MAX_LINE_BYTES = 16 * 1024 * 1024  # far longer than three texts of at most 100,000 characters
MAX_PARQUET_CELLS, MAX_PARQUET_BYTES = 50_000_000, 4 * 2**30  # unpacked: a file of a few KB can claim any number
_MAX_REASON = 300
_NOT_UTF8 = "broken UTF-8; save the file as UTF-8"
_AROUND_ROWS = ("data", "rows", "examples", "instances", "items", "samples", "train")
_SPACES = (" ", "\t", "\r", "\n")
_PACKED = {b"PK\x03\x04": "a ZIP or Excel file", b"\x1f\x8b": "a gzip file", b"\x28\xb5\x2f\xfd": "a zstd file"}


@dataclass(frozen=True)
class SourceRow:
    """A row as it was read. `line` counts from 1: the line where it starts (JSONL, CSV), or else its number in the file."""

    line: int
    value: Any
    is_csv: bool = False


Read = SourceRow | BadLine
Select = Callable[[Sequence[str]], Collection[str]]
"""Which of a table's columns to read."""


def rows_of(source: str | Path, select: Select = lambda names: names) -> Iterator[Read]:
    """Yield the rows of a file or of `hub:OWNER/NAME`. Columns of a Parquet file or the Hub that are not selected are None.

    A source without any rows to read (missing, a folder, compressed, a column name twice, a damaged Parquet file) is a
    DatasetError.
    """
    if str(source).startswith(HUB):
        yield from _hub_rows(str(source).removeprefix(HUB), select)
        return
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (which, unlike Path's, leaves an unknown ~user alone)
    try:
        kind = _kind_of(path)
        yield from _parquet_rows(path, select) if kind == "Parquet" else _READERS[kind](path)
    except OSError as exc:
        raise DatasetError(f"Can't read {path}: {exc.strerror or exc}; name a UTF-8 JSONL file, or CSV or Parquet") from exc


def bad_line(line: int, reason: str) -> BadLine:
    """Build a BadLine whose reason is one printable line of limited length, whatever the file contains."""
    text = "".join(character if character.isprintable() else " " for character in reason[: _MAX_REASON + 1])
    return BadLine(line, text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "…")


def _kind_of(path: Path) -> str:
    """The kind of a file: "Parquet", "CSV", "JSON" (one text) or "JSON Lines"."""
    if not path.exists():
        raise DatasetError(f"No dataset file {path}: check the path (or name hub:OWNER/NAME, or workspace)")
    if not path.is_file():
        raise DatasetError(f"{path} is not a file; name a JSONL, JSON, CSV or Parquet file")
    with _open(path) as file:
        start = file.read(4096)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        end = file.read().rstrip()
        file.seek(0)
        first = file.readline(MAX_LINE_BYTES).removeprefix(BOM).strip()
    for magic, what in _PACKED.items():
        if start.startswith(magic):
            raise DatasetError(f"{path} is {what}; unpack it, or save it as JSONL, CSV or Parquet")
    if start.startswith(b"PAR1"):
        return "Parquet"
    suffix, begins_with = path.suffix.lower(), start.removeprefix(BOM).lstrip()[:1]
    if suffix == ".parquet":
        raise DatasetError(f"{path} is not a Parquet file, whatever its name says; rename it or make it again")
    if suffix in (".csv", ".tsv") or (suffix in (".txt", ".tab") and begins_with not in (b"[", b"{")):
        return "CSV"
    is_array = begins_with == b"[" and (suffix == ".json" or end.endswith(b"]"))
    return "JSON" if is_array or (begins_with == b"{" and not _is_row(first)) else "JSON Lines"


def _is_row(line: bytes) -> bool:
    """Whether a file's first line, which begins with "{", is a row, good or bad: not the beginning of an object on several
    lines, nor an object around the rows."""
    try:
        return _rows_within(json.loads(line)) is None
    except (ValueError, RecursionError):
        return line.endswith(b"}")


def _rows_within(value: Any) -> list[Any] | None:
    """The rows of an object around them, such as {"data": [{…}, …]}; None for anything else."""
    rows = next((value[name] for name in _AROUND_ROWS if name in value), None) if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(item, dict) for item in rows):
        return None
    if "chosen" in value or "prompt" in value:
        return None
    return [item["row"] if isinstance(item.get("row"), dict) else item for item in rows]  # "row": of the Hub's viewer


def _open(path: Path) -> BinaryIO:
    """A file's bytes; those of a UTF-16 file as UTF-8, also without a byte order mark: such a text begins with ASCII."""
    file = path.open("rb")
    start = file.read(4)
    file.seek(0)
    zeros = [not byte for byte in start]
    order = "le" if start[:2] == b"\xff\xfe" or zeros == [False, True, False, True] else ""
    order = "be" if start[:2] == b"\xfe\xff" or zeros == [True, False, True, False] else order
    if not order:
        return file
    with file:
        data = file.read()
    return io.BytesIO(data[: len(data) // 2 * 2].decode(f"utf-16-{order}", "surrogatepass").encode("utf-8", "surrogatepass"))


def _hub_rows(name: str, select: Select) -> Iterator[Read]:
    """The rows of a Hub dataset's split `train`, or else its first, numbered from 1."""
    from datasets import load_dataset

    try:
        splits = load_dataset(name)
        table = splits["train" if "train" in splits else next(iter(splits))]
        names = table.column_names
        selected = set(select(names))
        rows = list(table.select_columns([name for name in names if name in selected]))
    except Exception as exc:  # datasets raises a dozen unrelated kinds, all of which mean "not available"
        raise DatasetError(
            f"Can't load {HUB}{name}: {_first_line(exc)}; check the name and the network, or name a JSONL file"
        ) from exc
    yield from (SourceRow(i, dict.fromkeys(names) | row) for i, row in enumerate(rows, start=1))


def _first_line(exc: Exception) -> str:
    return str(exc).strip().split("\n")[0][:160] or type(exc).__name__


def _parquet_rows(path: Path, select: Select) -> Iterator[Read]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            groups = list(map(file.metadata.row_group, range(file.num_row_groups)))
        _check_columns(names, path)
        selected = set(select(names))
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in selected]
        cells, size = sum(chunk.num_values for chunk in chunks), sum(chunk.total_uncompressed_size for chunk in chunks)
        if max(cells / MAX_PARQUET_CELLS, size / MAX_PARQUET_BYTES) > 1:
            raise DatasetError(f"{path} unpacks to {cells:,} values and {size / 1e9:.1f} GB, which is too much; split it")
        # As a dictionary, a text that is repeated a million times is held once.
        repeated = sorted({chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"})
        number = size = 0
        with parquet.ParquetFile(path, read_dictionary=repeated) as file:
            for batch in file.iter_batches(batch_size=1024, columns=[name for name in names if name in selected]):
                for i in range(batch.num_rows):
                    number += 1
                    row = _parquet_row(number, batch.slice(i, 1), names)
                    size += sum(len(v) for v in row.value.values() if isinstance(v, str)) if isinstance(row, SourceRow) else 0
                    if size > MAX_PARQUET_BYTES:
                        raise DatasetError(f"{path} unpacks to more than {MAX_PARQUET_BYTES / 1e9:.0f} GB of text; split it")
                    yield row
    except DatasetError:
        raise
    except Exception as exc:  # pyarrow raises its own kinds, OSError, and Python's
        raise DatasetError(f"Can't read {path} as Parquet: {_first_line(exc)}; make it again") from exc


def _parquet_row(number: int, row: Any, names: Sequence[str]) -> Read:
    try:
        return SourceRow(number, dict.fromkeys(names) | row.to_pylist()[0])
    except UnicodeDecodeError:
        return bad_line(number, _NOT_UTF8)
    except Exception as exc:  # a date out of range, an unknown time zone
        return bad_line(number, f"a column can't be read: {_first_line(exc)}")


def _check_columns(names: Sequence[str], path: Path) -> None:
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DatasetError(f"{path} has the column {twice[0][:60]!r} twice; rename one of them")


def _json_lines(path: Path) -> Iterator[Read]:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES)
                yield bad_line(number, f"longer than {MAX_LINE_BYTES // 2**20} MiB")
                continue
            try:
                text = (line.removeprefix(BOM) if number == 1 else line).decode("utf-8").strip(" \t\r\n")
            except UnicodeDecodeError:
                yield bad_line(number, _NOT_UTF8)
                continue
            if text:
                row, end = _json_value(number, text, 0)
                yield row if end in (-1, len(text)) else bad_line(number, "not JSON (extra data after the value)")


def _json_text(path: Path) -> Iterator[Read]:
    """The items of an array, or objects on several lines, one after the other or around the rows: item by item, so that a bad
    item, or an end that was cut off, costs no other."""
    with _open(path) as file:
        text = file.read().removeprefix(BOM).decode("utf-8", "surrogateescape").strip(" \t\r\n")
    is_array = text.startswith("[")
    close = "]" if is_array else ""
    place, number = _next_place(text, int(is_array)), 0
    fault = ""
    while not fault and text[place : place + 1] != close:
        number += 1
        row, end = _json_value(number, text, place)
        if isinstance(row, BadLine) and end == -1:
            if number == 1 and not is_array:  # JSON Lines after all, with a bad first line
                yield from _json_lines(path)
            else:
                yield replace(row, reason=f"{row.reason}; what follows was not read")
            return
        if not _is_utf8(text[place:end]):
            row = bad_line(number, _NOT_UTF8)
        if isinstance(row, SourceRow) and not is_array and (rows := _rows_within(row.value)) is not None:
            yield from (SourceRow(i, value) for i, value in enumerate(rows, start=1))
        else:
            yield row
        place = _next_place(text, end)
        if is_array and text[place : place + 1] == ",":
            place = _next_place(text, place + 1)
        elif is_array and text[place : place + 1] != close:
            fault = "not JSON (expected ',' or ']')"
    if fault or text[place + 1 :]:
        yield bad_line(number + 1, f"{fault or 'text after the end of the JSON array'}; what follows was not read")


def _next_place(text: str, place: int) -> int:
    """The place of the next character that is not white space."""
    while text[place : place + 1] in _SPACES:
        place += 1
    return place


class _DuplicateKeyError(ValueError):
    """An object has a key twice, so that it is unclear which value was meant."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKeyError(f"column {twice[:60]!r} is there twice")
    return value


_STRICT, _LOOSE = json.JSONDecoder(object_pairs_hook=_unique), json.JSONDecoder()


def _json_value(number: int, text: str, place: int) -> tuple[Read, int]:
    """The JSON value that begins at `place`, and where it ends (-1 if that is unknown)."""
    try:
        try:
            value, end = _STRICT.raw_decode(text, place)
        except _DuplicateKeyError as exc:
            return bad_line(number, str(exc)), _LOOSE.raw_decode(text, place)[1]
    except ValueError as exc:
        return bad_line(number, f"not JSON ({exc})"), -1
    except RecursionError:
        return bad_line(number, "not JSON (nested too deeply)"), -1
    return SourceRow(number, value), end


def _is_utf8(text: str) -> bool:
    """Whether text decoded with `surrogateescape` had no broken bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(path: Path) -> Iterator[Read]:
    """Find the delimiter, keep line breaks within quotes, and lose no more than its own row to a stray quote."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = file.readlines()
    named = re.fullmatch(r"sep=(.)\s*", lines[0], re.IGNORECASE) if lines else None  # as Excel writes it
    delimiter = named[1] if named else max(",;\t|", key=lines[0].count) if lines else ","

    def reader_from(start: int) -> Any:
        return csv.reader(map(lines.__getitem__, range(start, len(lines))), delimiter=delimiter, strict=True)

    first = 1 if named else 0
    reader = reader_from(first)
    header: list[str] = []
    while True:
        start = first + reader.line_num  # the index of the line where the next row starts
        try:
            cells = next(reader, None)
        except csv.Error as exc:
            unclosed = "unexpected end of data" in str(exc)
            yield bad_line(start + 1, f"not CSV ({'a quote is opened and never closed' if unclosed else exc})")
            first, reader = start + 1, reader_from(start + 1)
            continue
        if cells is None:
            return
        if not header:
            header = [cell.strip() for cell in cells]
            _check_columns(header, path)
        elif not all(map(_is_utf8, cells)):
            yield bad_line(start + 1, _NOT_UTF8)
        elif cells and (len(cells) < len(header) or any(cells[len(header) :])):
            yield bad_line(start + 1, f"{plural(len(cells), 'cell')}, but the header has {len(header)}")
        elif cells:
            yield SourceRow(start + 1, _restored({name: cell for name, cell in zip(header, cells, strict=False) if name}), True)


def _restored(row: dict[str, str]) -> dict[str, str]:
    """A row of our own exports with its texts as they were before `csv_cell`: its pair_id is of those."""
    if "pair_id" not in row or not row.keys() >= set(TEXTS):
        return row
    texts = {name: csv_text(cell) for name, cell in row.items()}
    return texts if texts["pair_id"] == pair_id_of(*(texts[name] for name in TEXTS)) else row


_READERS: dict[str, Callable[[Path], Iterator[Read]]] = {"CSV": _csv_rows, "JSON": _json_text, "JSON Lines": _json_lines}


# Chat messages, as TRL (role, content) and LLaMA-Factory (from, value) write them

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))


def _chat(value: Any) -> list[dict[str, Any]]:
    """The messages of a message, a list of them, or JSON text of a list (as CSV files hold them); [] if it is none of these."""
    if isinstance(value, str):
        start = value[:200].lstrip()
        if not start.startswith("[{") or not any(f'"{role}"' in start for role, _content in _MESSAGE_KEYS):
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
        return _chat(value) if isinstance(value, list) else []
    items = value if isinstance(value, list) else [value]
    return items if all(isinstance(item, dict) and _keys_of(item) for item in items) else []


def _messages_of(value: Any, column: str) -> list[Message]:
    """The messages of a chat; what can't be understood is a ValueError that names the column."""
    return [_message(item, column) for item in _chat(value)]


def _split_system(messages: Sequence[Message], column: str) -> tuple[str, str]:
    """The system text ("" for none) and the one user turn.

    Longer conversations are refused: training renders one user turn, and flattening them would put the model's words into it.
    """
    system, turns = (messages[0][1], messages[1:]) if messages and messages[0][0] == "system" else ("", messages)
    if len(turns) != 1:
        raise ValueError(f"{column} has {plural(len(turns), 'turn')} before the completion; only one user turn can be trained on")
    if turns[0][0] != "user":
        raise ValueError(f"{column} ends with a turn of the {turns[0][0]}, not of the user")
    return system, turns[0][1]


def _keys_of(item: dict[Any, Any]) -> tuple[str, str] | None:
    return next((keys for keys in _MESSAGE_KEYS if keys[0] in item and keys[1] in item), None)


def _message(item: dict[str, Any], column: str) -> Message:
    role_key, content_key = _keys_of(item) or _MESSAGE_KEYS[0]
    role, content = item[role_key], item[content_key]
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{column} has a turn of role {str(role)[:40]!r}; supported are {', '.join(ROLES)}")
    if not _is_nothing(item.get("tool_calls")):
        raise ValueError(f"{column} has tool calls, which can't be trained on here")
    if isinstance(content, list):  # parts, as multimodal models take them
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{column} has a turn with parts that are not text")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise ValueError(f"{column} has a turn whose {content_key} must be a string, got {type(content).__name__}")
    return ROLES[role], content


# Columns

_MISSING = {  # what pandas, and with it `datasets`, reads in a CSV file as a missing value
    *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
_NOT_TEXT = ("tools", "images", "image", "videos", "audios")
_NAMES = {  # of each field: the names its column may have, the likeliest first
    "prompt": ("prompt", "instruction", "question", "query", "conversations", "messages", "input"),
    "chosen": ("chosen", "chosen_response", "preferred", "less_biased"),
    "rejected": ("rejected", "rejected_response", "dispreferred", "more_biased"),
    "category": ("category", "bias_type"),
    "target_group": ("target_group",),
    "annotator": ("annotator",),
    "note": ("note",),
    "input": ("input",),
    "system": ("system", "system_prompt"),
    "history": ("history",),
}
FIELDS = tuple(_NAMES)


@dataclass(frozen=True)
class ColumnMapping:
    """Which column of a file is which field; "" for none.

    prompt        may be "" if chosen and rejected are message lists that begin with it
    input         the second half of an Alpaca prompt
    system        a system text, which is put before the prompt
    history       the earlier turns of an Alpaca row: rows that have some are refused
    """

    prompt: str = ""
    chosen: str = ""
    rejected: str = ""
    category: str = ""
    target_group: str = ""
    annotator: str = ""
    note: str = ""
    input: str = ""
    system: str = ""
    history: str = ""

    def with_columns(self, prompt: str, chosen: str, rejected: str, category: str = "", target_group: str = "") -> ColumnMapping:
        """This mapping with other columns; those that belong to the prompt's column go with it, as do those that these take."""
        old = self if prompt == self.prompt else replace(self, input="", history="")
        columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "category": category, "target_group": target_group}
        return replace(old, **{field: "" for field, column in old.to_json().items() if column in columns.values()} | columns)

    def to_json(self) -> dict[str, str]:
        """The columns that are mapped."""
        return {field: column for field, column in asdict(self).items() if column}


def detect(columns: Sequence[str], sample_rows: Sequence[Any]) -> ColumnMapping:
    """Guess which column is which, by name (exact first, then in any case) and by what the sample rows contain."""

    def first_of(names: Sequence[str]) -> str:
        folded = {column.strip().casefold(): column for column in reversed(columns)}
        return next((name if name in columns else folded[name] for name in names if name in columns or name in folded), "")

    found = {field: first_of(names) for field, names in _NAMES.items()}
    prompts = filter(None, (first_of([name]) for name in _NAMES["prompt"]))
    found["prompt"] = next((n for n in prompts if n.casefold() != "messages" or not _holds_completions(n, sample_rows)), "")
    if found["prompt"].casefold() != "instruction":  # elsewhere, `input` and `history` are not Alpaca's
        found["input"] = found["history"] = ""
    return ColumnMapping(**found)


def _holds_completions(column: str, sample_rows: Sequence[Any]) -> bool:
    """Whether a column is a whole conversation, including the assistant's last turn (TRL's `messages`): not a prompt."""
    for row in sample_rows:
        value = row.get(column) if isinstance(row, dict) else None
        if isinstance(value, list) and _chat(value):
            try:
                return _messages_of(value, column)[-1][0] == "assistant"
            except ValueError:
                return False
    return False


def parse_mapping(text: str, guess: ColumnMapping, columns: Sequence[str]) -> ColumnMapping:
    """Parse `prompt=COLUMN,chosen=COLUMN` into the guess with these columns instead; `category=` maps none."""
    given: dict[str, str] = {}
    for part in text.split(","):
        field, equals, column = part.partition("=")
        if not equals or field.strip() not in FIELDS:
            raise ConfigError(f"--map takes FIELD=COLUMN[,FIELD=COLUMN] with a field of {', '.join(FIELDS)}: got {part[:60]!r}")
        given[field.strip()] = column
        if column and column not in columns:
            raise DatasetError(f"No column {column[:60]!r} for {field.strip()}: choose one of {shown_columns(columns)}")
    beside = {field: "" for field, column in guess.to_json().items() if field not in TEXTS and column in given.values()}
    return checked(replace(guess, **beside | given))


def checked(mapping: ColumnMapping) -> ColumnMapping:
    """The mapping, if no column is in it twice; ConfigError otherwise."""
    fields: dict[str, str] = {}
    for field, column in mapping.to_json().items():
        if column in fields:
            raise ConfigError(f"Column {column[:60]!r} is both {fields[column]} and {field}: choose another for one of them")
        fields[column] = field
    return mapping


def used_columns(mapping: ColumnMapping | None) -> Select:
    """Which columns an import reads: those of the mapping, or else those that may be guessed, and what excludes a row."""

    def select(names: Sequence[str]) -> Collection[str]:
        if set(names) >= _JOURNAL_COLUMNS:
            return names
        # A guess may skip `messages` once rows are seen.
        guesses = [mapping] if mapping else [detect(names, ()), detect([n for n in names if n.casefold() != "messages"], ())]
        own = ("id", "pair_id") if {"id", "pair_id"} <= set(names) else ()
        return {column for guess in guesses for column in guess.to_json().values()} | {*_NOT_TEXT, *own}

    return select


def shown_columns(columns: Iterable[Any]) -> str:
    """Column names for a message: one line of limited length, whatever the file contains."""
    names = ["".join(c if c.isprintable() else "?" for c in str(name)[:40]) for name in columns]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"


# Conversion of a row


@dataclass(frozen=True)
class ForeignPair:
    """A converted row.

    has_system   a system text was put before the prompt
    marker       of a chat template that was applied to the texts: "" if none was, or if they were unwrapped
    """

    prompt: str
    chosen: str
    rejected: str
    category: str = ""
    target_group: str = ""
    annotator: str = ""
    note: str = ""
    has_system: bool = False
    marker: str = ""


def convert(row: Any, mapping: ColumnMapping, *, is_csv: bool = False, unwrap: bool = False) -> ForeignPair:
    """Convert a row to a pair; a row that can't be one is a ValueError with the reason, in one line.

    is_csv   a cell such as "nan" is a missing value, as pandas and `datasets` read it
    unwrap   of texts that a chat template was applied to, take the turns
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with prompt, chosen, rejected, got {type(row).__name__}")
    for column in _NOT_TEXT:
        if not _is_nothing(row.get(column)):
            raise ValueError(f"the row has {column}, which can't be trained on here")
    turns, chosen = _completion(row, mapping.chosen)
    rejected_turns, rejected = _completion(row, mapping.rejected)
    cut = -1 if mapping.prompt or turns else templated.answer_start(chosen, rejected)
    if turns != rejected_turns:
        raise ValueError(f"{mapping.chosen} and {mapping.rejected} begin with different turns")
    if cut >= 0:  # a whole dialogue as text, as in HH-RLHF
        system, prompt, chosen, rejected = "", chosen[:cut], chosen[cut:], rejected[cut:]
    else:
        system, prompt = _system_and_prompt(row, mapping, turns)
    if is_csv and row.get("pair_id") != pair_id_of(prompt, chosen, rejected):  # which our own exports have
        for text, column in ((prompt, mapping.prompt), (chosen, mapping.chosen), (rejected, mapping.rejected)):
            if text.strip() in _MISSING:
                raise ValueError(f"{column} is missing ({text.strip()}); if that is the text, save the file as JSONL")
    if (marker := templated.marker_in(prompt, chosen, rejected)) and unwrap:
        marker, prompt_column = "", mapping.prompt or "prompt"
        if templated.marker_in(prompt):
            own_system, prompt = _split_system(templated.turns_of(prompt, prompt_column), prompt_column)
            system = "\n\n".join(filter(None, (system, own_system)))
        chosen = templated.completion_of(chosen, mapping.chosen)
        rejected = templated.completion_of(rejected, mapping.rejected)
    if chosen.strip() and chosen.strip() == rejected.strip():
        raise ValueError("chosen and rejected are the same text, which teaches nothing")
    if system and prompt.strip():
        prompt = f"{system}\n\n{prompt}"
    for text, column in ((prompt, mapping.prompt or "prompt"), (chosen, mapping.chosen), (rejected, mapping.rejected)):
        if fault := text_fault(text, column):
            raise ValueError(fault)
    labels = {field: _label(row, getattr(mapping, field), most) for field, most in LABELS.items()}
    return ForeignPair(prompt, chosen, rejected, **labels, has_system=bool(system), marker=marker)


def _is_nothing(value: Any) -> bool:
    """Whether a value is empty, also as JSON text ("[]")."""
    return not value or value != value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null", *_MISSING))


def _value(row: dict[str, Any], column: str) -> Any:
    """The text or the chat messages in a column."""
    if column not in row:
        raise ValueError(f"no column {column!r}, got {shown_columns(row)}")
    value = row[column]
    if isinstance(value, str) and value[:20].lstrip().startswith("[{'") and ("'role'" in value or "'from'" in value):
        raise ValueError(f"{column} is the printed form of chat messages, not their JSON; save the file again as JSONL")
    if not isinstance(value, str) and not _chat(value):
        raise ValueError(f"{column} must be a string, got {type(value).__name__} (or chat messages, with role and content)")
    return value


def _optional_text(row: dict[str, Any], column: str) -> str:
    value = row.get(column) if column else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column} must be a string, got {type(value).__name__}")
    return value or ""


def _completion(row: dict[str, Any], column: str) -> tuple[list[Message], str]:
    """The turns that a completion's column begins with ([] for plain text), and the completion."""
    value = _value(row, column)
    if not _chat(value):
        return [], value
    *turns, (role, content) = _messages_of(value, column)
    if role != "assistant":
        raise ValueError(f"{column} ends with a turn of the {role}, not of the assistant")
    return turns, content


def _system_and_prompt(row: dict[str, Any], mapping: ColumnMapping, turns: list[Message]) -> tuple[str, str]:
    """The system text ("" for none) and the prompt of a row whose completions begin with `turns`."""
    systems = []
    prompt = ""
    if mapping.prompt:
        value = _value(row, mapping.prompt)
        if _chat(value):
            system, prompt = _split_system(_messages_of(value, mapping.prompt), mapping.prompt)
            systems.append(system)
        else:
            prompt = "\n".join(part for part in (value, _optional_text(row, mapping.input)) if part)
    if turns:
        system, start = _split_system(turns, mapping.chosen)
        if mapping.prompt and prompt.strip() != start.strip():
            raise ValueError(f"{mapping.prompt} is not the turn that {mapping.chosen} begins with")
        prompt = start
        systems.append(system)
    elif not mapping.prompt:
        raise ValueError(
            f"no column is the prompt, and chosen and rejected are no messages that begin with it: {shown_columns(row)}"
        )
    systems.append(_optional_text(row, mapping.system))
    given = {text.strip(): text for text in reversed(systems) if text.strip()}
    if len(given) > 1:
        raise ValueError("the row has two different system texts")
    if mapping.history and row.get(mapping.history):
        raise ValueError(f"{mapping.history} holds earlier turns; only one user turn can be trained on")
    return next(iter(given.values()), ""), prompt


def _label(row: dict[str, Any], column: str, longest: int) -> str:
    """A short text beside the pair; a number as its digits, a list of strings joined by ", ", nothing as ""."""
    value = row.get(column) if column else None
    if value is None or value == "" or value != value:  # NaN is how pandas writes nothing
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    if not isinstance(value, str | int | float):
        raise ValueError(f"{column} must be a string, got {type(value).__name__}")
    text = str(value)
    if len(text) > longest:
        raise ValueError(f"{column} has {len(text):,} characters, at most {longest:,}")
    if text.strip() and (fault := text_fault(text, column)):
        raise ValueError(fault)
    return text


# Conversion of a source

_TEMPLATED = "rows with a chat template's markers: {:,} ({}), which would be trained as text: unwrap them (--unwrap)"
SAMPLE_ROWS = 1000  # rows read ahead to find a file's columns
_OWN_ID = re.compile(r"[0-9a-f]{32}")
_JOURNAL_COLUMNS = {"id", "pair_id", "verdict", "retracts"}


@dataclass(frozen=True)
class Converted:
    """A whole source, converted. `notes`: one line each on what was changed or left out, besides the bad rows."""

    judgments: tuple[Judgment, ...]
    bad: tuple[BadLine, ...]
    columns: tuple[str, ...]
    mapping: ColumnMapping
    notes: tuple[str, ...]


def convert_source(
    source: str | Path,
    mapping: ColumnMapping | None = None,
    name: str = "file",
    on_row: Callable[[], object] = lambda: None,
    *,
    unwrap: bool = False,
) -> Converted:
    """Convert every row of a source to a judgment that could be stored, with the source `import:NAME`. `unwrap`: see `convert`.

    Raises DatasetError if the source can't be read, or if no column is recognized as chosen or rejected.
    """
    imported_at = now()
    rows = rows_of(source, used_columns(mapping))
    head, columns, mapping = _read_head(rows, mapping)
    for field in ("chosen", "rejected") if columns else ():
        if not getattr(mapping, field):
            known = shown_columns(columns)
            raise DatasetError(f"No column was recognized as {field}, got {known}: name it with --map {field}=COLUMN")
    judgments: list[tuple[str, Judgment]] = []  # with the id that the row had in a foreign journal
    bad: list[BadLine] = []
    left_out: Counter[str] = Counter()
    withdrawn: set[str] = set()
    repeats: Counter[tuple[str, ...]] = Counter()
    with_system = 0
    markers: Counter[str] = Counter()
    for row in chain(head, rows):
        on_row()
        if isinstance(row, BadLine):
            bad.append(row)
            continue
        extra: dict[str, Any] = {}
        try:
            if is_journal_row(row.value):
                own = row_of(row.value)
                if own["verdict"] != "preferred":
                    withdrawn |= {own["retracts"]} - {""}
                    left_out[own["verdict"]] += own["verdict"] != "retracted"
                    continue
                extra = _journal_columns(own, imported_at)
            pair = convert(row.value, mapping, is_csv=row.is_csv, unwrap=unwrap)
        except ValueError as exc:
            bad.append(bad_line(row.line, str(exc)))
            continue
        markers[pair.marker] += bool(pair.marker)
        with_system += pair.has_system
        texts = (pair.prompt, pair.chosen, pair.rejected)
        pair_id = pair_id_of(*texts)
        said = (*texts, pair.annotator)
        repeats[said] += 1
        own_id = row.value.get("id")
        if not isinstance(own_id, str) or not _OWN_ID.fullmatch(own_id) or row.value.get("pair_id") != pair_id:
            content = "\0".join(("import", *said, str(repeats[said])))  # the texts have no NUL characters
            own_id = hashlib.sha256(content.encode()).hexdigest()[:32]
        judgment = Judgment(
            own_id,
            extra.pop("created_at", imported_at),
            pair_id,
            pair.prompt,
            pair.chosen,
            pair.rejected,
            source=f"import:{name}",
            **extra | {field: getattr(pair, field) for field in LABELS},
        )
        judgments.append((row.value["id"] if extra else "", judgment))
    kept = [judgment for foreign_id, judgment in judgments if foreign_id not in withdrawn]
    left_out["withdrawn"] = len(judgments) - len(kept)
    notes = []
    if with_system:
        notes.append(f"rows with a system text, which now stands before the prompt: {with_system:,}")
    if +markers:
        notes.append(_TEMPLATED.format(sum(markers.values()), ", ".join(marker for marker, _ in markers.most_common(3))))
    if +left_out:
        notes.append("left out of the journal: " + ", ".join(f"{count:,} {what}" for what, count in sorted((+left_out).items())))
    return Converted(tuple(kept), tuple(bad), columns, mapping, tuple(notes))


def check_some_good(source: str | Path, converted: Converted) -> None:
    """Raise DatasetError if a source has not one good row."""
    if converted.judgments:
        return
    if not converted.bad:
        notes = "".join(f" ({note})" for note in converted.notes)
        raise DatasetError(f"{source} has no rows to import{notes}; name another file")
    first = converted.bad[0]
    raise DatasetError(
        f"No good row in {source}, {plural(len(converted.bad), 'bad one')}, the first in line {first.line}: {first.reason}; "
        "fix the file, or name its columns with --map"
    )


def is_journal_row(value: Any) -> bool:
    """Whether a row is a line of a journal (this workspace's or another's), by its columns."""
    return isinstance(value, dict) and value.keys() >= _JOURNAL_COLUMNS


def _read_head(rows: Iterator[Read], mapping: ColumnMapping | None) -> tuple[list[Read], tuple[str, ...], ColumnMapping]:
    """Read rows until SAMPLE_ROWS of them are objects; return them, their columns, and the mapping as given or guessed."""
    head: list[Read] = []
    objects: list[dict[str, Any]] = []
    while len(objects) < SAMPLE_ROWS and (row := next(rows, None)) is not None:
        head.append(row)
        if isinstance(row, SourceRow) and isinstance(row.value, dict):
            objects.append(row.value)
    columns = tuple(dict.fromkeys(str(column) for value in objects for column in value))
    return head, columns, checked(mapping or detect(columns, objects))


def _journal_columns(row: Row, imported_at: str) -> dict[str, Any]:
    """The columns of a foreign journal's row besides its pair; a text that can't be stored is a ValueError."""
    columns = {column: row[column] for column in ("original_chosen", "original_rejected", "repeat_of")}
    meta = dict(row["meta"])
    for column, text in chain(columns.items(), meta.items()):
        if isinstance(text, str) and text.strip() and (fault := text_fault(text, column)):
            raise ValueError(fault)
    if not SEED_RANGE[0] <= meta["seed"] <= SEED_RANGE[1]:
        meta["seed"] = 0
    if not math.isfinite(meta["seconds"]):
        meta["seconds"] = 0.0
    try:
        datetime.fromisoformat(row["created_at"])
        created_at = row["created_at"]
    except ValueError:
        created_at = imported_at
    return {"created_at": created_at, **columns, "meta": JudgmentMeta(**meta)}


# Import

_MAX_NAME_CHARACTERS = 100


@dataclass(frozen=True)
class Preview:
    """Preview of an import: a source's first rows as they would be stored.

    columns   of the first SAMPLE_ROWS rows, in order of appearance
    mapping   as given, or else guessed; "" for a field without a recognized column
    pairs     the first converted rows
    bad       the first bad rows (without a mapping of chosen and rejected, no row is converted, and none is bad)
    format    of the file and of its rows, in words
    """

    columns: tuple[str, ...]
    mapping: ColumnMapping
    pairs: tuple[ForeignPair, ...]
    bad: tuple[BadLine, ...]
    format: str

    def __str__(self) -> str:
        """The recognized format and columns, in a sentence or two."""
        used = self.mapping.to_json()
        fields = ", ".join(f"{field.replace('_', ' ')} from “{shown_columns([column])}”" for field, column in used.items())
        rest = [column for column in self.columns if column not in used.values()]
        return f"{self.format}: {fields or 'no column was recognized'}." + (
            f" Not imported: {shown_columns(rest)}." if rest else ""
        )


@dataclass(frozen=True)
class Imported:
    """The result of an import. `known`: rows that were in the journal already (or were withdrawn since)."""

    written: int
    known: int
    bad: tuple[BadLine, ...]
    columns: tuple[str, ...]
    mapping: ColumnMapping
    source: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `dataset import --json` prints."""
        return asdict(self) | {"columns": list(self.columns), "mapping": self.mapping.to_json()}


def preview(source: str | Path, mapping: ColumnMapping | None = None, rows: int = 5, *, unwrap: bool = False) -> Preview:
    """Return a source's columns and its first `rows` pairs and bad rows; store nothing. Only for the owner."""
    require_owner("Import")
    head, columns, mapping = _read_head(rows_of(source, used_columns(mapping)), mapping)
    pairs: list[ForeignPair] = []
    bad: list[BadLine] = []
    for row in head if mapping.chosen and mapping.rejected else ():
        if isinstance(row, BadLine):
            bad.append(row)
        elif not is_journal_row(row.value) or row.value.get("verdict") == "preferred":
            try:
                pairs.append(convert(row.value, mapping, is_csv=row.is_csv, unwrap=unwrap))
            except ValueError as exc:
                bad.append(bad_line(row.line, str(exc)))
        if len(pairs) >= rows and len(bad) >= rows:
            break
    first = next((row.value for row in head if isinstance(row, SourceRow) and isinstance(row.value, dict)), {})
    return Preview(columns, mapping, tuple(pairs[:rows]), tuple(bad[:rows]), f"{_file_format(source)}, {_row_format(first)}")


def _file_format(source: str | Path) -> str:
    return "Hub dataset" if str(source).startswith(HUB) else _kind_of(Path(os.path.expanduser(source)))  # noqa: PTH111


def _row_format(row: dict[str, Any]) -> str:
    if is_journal_row(row):
        return "a BiasDPO journal"
    chats = [chat[0] for chat in map(_chat, row.values()) if chat]
    if chats:
        return "chat messages as TRL writes them" if "role" in chats[0] else "chat messages as ShareGPT writes them"
    return "plain text as Alpaca writes it" if "instruction" in row else "plain text"


def import_file(
    workspace: Workspace,
    source: str | Path,
    mapping: ColumnMapping | None = None,
    name: str = "",
    on_row: Callable[[], object] = lambda: None,
    *,
    dry_run: bool = False,
    unwrap: bool = False,
) -> Imported:
    """Store the rows of a file, or of `hub:OWNER/NAME`, in the journal as `import:NAME` (default: the file's stem).

    mapping   which column is which; None guesses it (see `preview`)
    on_row    called after each row read
    dry_run   only report what an import would do
    unwrap    of texts that a chat template was applied to, store the turns

    Raises DatasetError if not one row is good, WorkspaceError if the journal can't be written (then nothing is stored), and
    RefusedError for a visitor.
    """
    require_owner("Import")
    converted = convert_source(source, mapping, import_name(source, name), on_row, unwrap=unwrap)
    check_some_good(source, converted)
    journal = journal_of(workspace).refresh()
    undone = undone_ids(journal)
    judgments = [replace(judgment, id=_next_id(judgment.id, undone)) for judgment in converted.judgments]
    if dry_run:
        written = len({judgment.id for judgment in judgments} - journal.rows.keys())
    else:
        written = append_all(workspace, judgments).written
    known = len(converted.judgments) - written
    import_source = converted.judgments[0].source
    return Imported(written, known, converted.bad, converted.columns, converted.mapping, import_source, converted.notes)


def _next_id(judgment_id: str, undone: set[str]) -> str:
    """The id under which a row is stored: another one each time that its import was undone."""
    while judgment_id in undone:
        judgment_id = hashlib.sha256(f"again\0{judgment_id}".encode()).hexdigest()[:32]
    return judgment_id


def import_name(source: str | Path, name: str = "") -> str:
    """The NAME of `import:NAME`: as given, or else the file's name without its suffix, or OWNER/NAME on the Hub."""
    text = str(source)
    name = name or (text.removeprefix(HUB) if text.startswith(HUB) else Path(text).stem)
    if not name.isprintable() or len(name) > _MAX_NAME_CHARACTERS:
        raise ConfigError(
            f"An import's name has at most {_MAX_NAME_CHARACTERS} printable characters: got {name[:120]!r}; choose another"
        )
    return name


# Validation


@dataclass(frozen=True)
class Validated:
    """The result of a validation.

    rows         good rows and bad ones
    by_verdict   a journal's good lines by verdict ({} for other files)
    mapping      the columns of other files
    notes        what an import would change or leave out
    """

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
    """Check a workspace's journal (a missing one has no rows), or any file that can be imported; change nothing."""
    if isinstance(source, Workspace):
        path = source.preferences
        return _validate_journal(path, on_row) if path.exists() else Validated(str(path), 0, 0, (), {}, ColumnMapping())
    if is_journal(source):
        return _validate_journal(Path(source), on_row)
    converted = convert_source(source, on_row=on_row)
    good = len(converted.judgments)
    return Validated(str(source), good + len(converted.bad), good, converted.bad, {}, converted.mapping, converted.notes)


def is_journal(source: str | Path) -> bool:
    """Whether a source is a journal: a JSONL file whose first object has a journal's columns."""
    if str(source).startswith(HUB) or Path(source).suffix.lower() not in (".jsonl", ".ndjson"):
        return False
    return is_journal_row(next((row.value for row in rows_of(source) if isinstance(row, SourceRow)), None))


def _validate_journal(path: Path, on_row: Callable[[], object]) -> Validated:
    rows, good = 0, Counter[str]()
    bad: list[BadLine] = []
    lines_by_id: dict[str, int] = {}
    retracts: list[tuple[int, str]] = []
    for number, line in _lines_of(path):
        on_row()
        rows += 1
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it has no line end: it is being written, or was truncated (the next append repairs it)")
            row = parse_row(line)
            if fault := _training_fault(row):
                raise ValueError(fault)
            if row["id"] in lines_by_id:
                raise ValueError(f"its id was there before, in line {lines_by_id[row['id']]}: this line is ignored")
        except ValueError as exc:
            bad.append(bad_line(number, str(exc)))
            continue
        lines_by_id[row["id"]] = number
        good[row["verdict"]] += 1
        if row["verdict"] == "retracted":
            retracts.append((number, row["retracts"]))
    for number, judgment_id in retracts:
        if judgment_id not in lines_by_id:
            bad.append(bad_line(number, f"it withdraws {judgment_id!r}, an id that no good line has"))
            good["retracted"] -= 1
    bad.sort(key=lambda line: line.line)
    return Validated(str(path), rows, good.total(), tuple(bad), dict(sorted((+good).items())), ColumnMapping())


def _training_fault(row: Row) -> str:
    """Why training can't use a judgment; "" if it can, or ignores it."""
    if row["verdict"] != "preferred":
        return ""
    faults = filter(None, (text_fault(row[column], column) for column in TEXTS))
    same = "chosen and rejected are the same text" if row["chosen"].strip() == row["rejected"].strip() else ""
    return next(faults, same)


def _lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.removeprefix(BOM).strip())
    except OSError as exc:
        raise DatasetError(f"Can't read {path}: {exc.strerror or exc}; make it readable") from exc
