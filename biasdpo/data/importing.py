"""Is a file, or the journal, what it should be? Every line that is not, with its reason; nothing is changed."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from biasdpo.data.journal import BOM, BadLine, Journal, Row, append_all, row_of
from biasdpo.data.pairs import TEXTS, pair_id_of, text_fault
from biasdpo.errors import ConfigError, DatasetError
from biasdpo.records import SEED_RANGE, Judgment, JudgmentMeta
from biasdpo.workspace import Workspace, refuse_on_public_space

# --- chat: Chat messages, as TRL (role, content) and LLaMA-Factory (from, value) write them, to one prompt


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_KEYS = (("role", "content"), ("from", "value"))


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


def is_chat(value: Any) -> bool:
    """Whether a column's value is a message, a list of messages, or JSON text of such a list (as CSV files hold them)."""
    if isinstance(value, str):
        return _from_json(value) is not None
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, dict) and _keys(item) is not None for item in items)


def messages_of(value: Any, column: str) -> list[Message]:
    """The messages of a value for which `is_chat` holds; what can't be understood is a ValueError that names the column."""
    if isinstance(value, str):
        value = _from_json(value)
    return [_message(item, column) for item in (value if isinstance(value, list) else [value])]


def split_completion(messages: Sequence[Message], column: str) -> tuple[list[Message], str]:
    """The turns before the completion, and the completion: the last turn, which must be the assistant's."""
    if messages[-1].role != "assistant":
        raise ValueError(f"{column} ends with a turn of the {messages[-1].role}, not of the assistant")
    return list(messages[:-1]), messages[-1].content


def split_system(messages: Sequence[Message], column: str) -> tuple[str, str]:
    """The system text ("" for none) and the one user turn. Longer conversations are refused: training renders one user turn,
    and to flatten them would put the model's own words into the user's mouth."""
    system, turns = ("", messages) if messages[0].role != "system" else (messages[0].content, messages[1:])
    if len(turns) != 1:
        raise ValueError(f"{column} has {len(turns)} turns before the completion; only one user turn can be trained on")
    if turns[0].role != "user":
        raise ValueError(f"{column} ends with a turn of the {turns[0].role}, not of the user")
    return system, turns[0].content


def _keys(item: dict[Any, Any]) -> tuple[str, str] | None:
    return next((keys for keys in _KEYS if keys[0] in item and keys[1] in item), None)


def _from_json(text: str) -> list[Any] | None:
    start = text[:200].lstrip()
    if not start.startswith("[{") or not any(f'"{role}"' in start for role, _ in _KEYS):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if is_chat(value) and isinstance(value, list) else None


def _message(item: dict[str, Any], column: str) -> Message:
    keys = _keys(item)
    assert keys is not None  # is_chat holds
    role, content = item[keys[0]], item[keys[1]]
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{column} has a turn of role {str(role)[:40]!r}; understood are {', '.join(ROLES)}")
    if item.get("tool_calls"):
        raise ValueError(f"{column} has tool calls, which can't be trained on here")
    if isinstance(content, list):  # parts, as models that see pictures take them
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{column} has a turn with parts that are no text")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise ValueError(f"{column} has a turn whose {keys[1]} must be a string, got {type(content).__name__}")
    return Message(ROLES[role], content)


# --- source rows: What reading gives: rows with their line, and lines that are no rows


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


# --- csv rows: Rows of a CSV file: the delimiter is found, quoted line breaks are kept, and a stray quote cost


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


# --- formats: Foreign rows to preference pairs: which column is what, and the conversion of one row


MAX_LABEL_CHARACTERS = 200  # of a category, group or pseudonym
MAX_NOTE_CHARACTERS = 10_000
_NOT_TEXT = ("tools", "images", "image", "videos", "audios")

# The names that a column goes by, the likeliest first.
_NAMES = {
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


@dataclass(frozen=True)
class ColumnMapping:
    """Which column of a file is what; "" is none.

    prompt        may be "" where chosen and rejected are message lists that begin with it
    input         alpaca's second half of the prompt
    system        a system text, which is put before the prompt
    history       alpaca's earlier turns: rows that have some are refused
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

    def to_json(self) -> dict[str, str]:
        """The columns that are mapped."""
        return {field: column for field, column in asdict(self).items() if column}


FIELDS = tuple(asdict(ColumnMapping()))


@dataclass(frozen=True)
class ForeignPair:
    """A converted row. `has_system`: a system text was put before the prompt."""

    prompt: str
    chosen: str
    rejected: str
    category: str = ""
    target_group: str = ""
    annotator: str = ""
    note: str = ""
    has_system: bool = False


def detect(columns: Sequence[str], sample_rows: Sequence[Any]) -> ColumnMapping:
    """Guess which column is what, by name (exact first, then whatever the case), and by what the sample rows hold."""
    found = {field: _first_of(names, columns) for field, names in _NAMES.items()}
    prompts = [_first_of([name], columns) for name in _NAMES["prompt"]]
    whole = {name for name in prompts if name.casefold() == "messages" and _holds_completions(name, sample_rows)}
    found["prompt"] = next((name for name in prompts if name and name not in whole), "")
    if found["prompt"].casefold() != "instruction":  # elsewhere, `input` and `history` are nothing of alpaca's
        found["input"] = found["history"] = ""
    return ColumnMapping(**found)


def parse_mapping(text: str, guess: ColumnMapping, columns: Sequence[str]) -> ColumnMapping:
    """`prompt=COLUMN,chosen=COLUMN`: the guess with these columns instead; `category=` takes none. Errors name what is known."""
    given: dict[str, str] = {}
    for part in text.split(","):
        field, equals, column = part.partition("=")
        if not equals or field.strip() not in FIELDS:
            raise ConfigError(f"--map takes FIELD=COLUMN[,FIELD=COLUMN] with a field of {', '.join(FIELDS)}: got {part[:60]!r}")
        given[field.strip()] = column
        if column and column not in columns:
            raise DatasetError(f"No column {column[:60]!r} for {field.strip()}: choose of {shown_columns(columns)}")
    return replace(guess, **given)


def check_required(mapping: ColumnMapping, columns: Sequence[str]) -> None:
    """Raise DatasetError where no column is mapped to chosen or rejected."""
    for field, column in (("chosen", mapping.chosen), ("rejected", mapping.rejected)):
        if not column:
            raise DatasetError(
                f"No column was recognised as {field}, got {shown_columns(columns)}: name it with --map {field}=COLUMN"
            )


def convert(row: Any, mapping: ColumnMapping) -> ForeignPair:
    """One row as a pair; a row that can't be one is a ValueError with the reason, in one line."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with prompt, chosen, rejected, got {type(row).__name__}")
    for column in _NOT_TEXT:
        if row.get(column):
            raise ValueError(f"the row has {column}, which can't be trained on here")
    chosen_start, chosen = _completion(row, mapping.chosen)
    rejected_start, rejected = _completion(row, mapping.rejected)
    if chosen_start != rejected_start:
        raise ValueError(f"{mapping.chosen} and {mapping.rejected} begin with different turns")
    system, prompt = _prompt(row, mapping, chosen_start)
    if chosen.strip() and chosen.strip() == rejected.strip():
        raise ValueError("chosen and rejected are the same text, which teaches nothing")
    if system and prompt.strip():
        prompt = f"{system}\n\n{prompt}"
    for text, column in ((prompt, mapping.prompt or "prompt"), (chosen, mapping.chosen), (rejected, mapping.rejected)):
        fault = text_fault(text, column)
        if fault:
            raise ValueError(fault)
    return ForeignPair(
        prompt,
        chosen,
        rejected,
        category=_label(row, mapping.category),
        target_group=_label(row, mapping.target_group),
        annotator=_label(row, mapping.annotator),
        note=_label(row, mapping.note, MAX_NOTE_CHARACTERS),
        has_system=bool(system),
    )


def shown_columns(columns: Iterable[Any]) -> str:
    """Column names for a message: one line, not endless, whatever the file holds."""
    names = ["".join(c if c.isprintable() else "?" for c in str(name)[:40]) for name in columns]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") if names else "none"


def _first_of(names: Sequence[str], columns: Sequence[str]) -> str:
    folded = {column.strip().casefold(): column for column in reversed(columns)}
    return next((name if name in columns else folded[name] for name in names if name in columns or name in folded), "")


def _holds_completions(column: str, sample_rows: Sequence[Any]) -> bool:
    """Whether a column is a whole conversation, the assistant's last word included (TRL's `messages`): no prompt."""
    for row in sample_rows:
        value = row.get(column) if isinstance(row, dict) else None
        if isinstance(value, list) and is_chat(value):
            try:
                return messages_of(value, column)[-1].role == "assistant"
            except ValueError:
                return False
    return False


def _value(row: dict[str, Any], column: str) -> Any:
    if column not in row:
        raise ValueError(f"no column {column!r}, got {shown_columns(row)}")
    value = row[column]
    if isinstance(value, str) and value[:20].lstrip().startswith("[{'") and ("'role'" in value or "'from'" in value):
        raise ValueError(f"{column} is the printed form of chat messages, not their JSON; save the file again as JSONL")
    if not isinstance(value, str) and not is_chat(value):
        raise ValueError(f"{column} must be a string, got {type(value).__name__} (or chat messages, with role and content)")
    return value


def _completion(row: dict[str, Any], column: str) -> tuple[list[Message], str]:
    """The turns that a completion's column begins with ([] for plain text), and the completion."""
    value = _value(row, column)
    return split_completion(messages_of(value, column), column) if is_chat(value) else ([], value)


def _prompt(row: dict[str, Any], mapping: ColumnMapping, start: list[Message]) -> tuple[str, str]:
    """The system text ("" for none) and the prompt of a row whose completions begin with `start`."""
    system, prompt = _prompt_of_columns(row, mapping) if mapping.prompt else ("", "")
    if start:
        start_system, start_prompt = split_system(start, mapping.chosen)
        if mapping.prompt and prompt.strip() != start_prompt.strip():
            raise ValueError(f"{mapping.prompt} is not the turn that {mapping.chosen} begins with")
        prompt, system = start_prompt, _one(system, start_system)
    elif not mapping.prompt:
        raise ValueError(
            f"no column is the prompt, and chosen and rejected are no messages that begin with it: {shown_columns(row)}"
        )
    if mapping.system and row.get(mapping.system) is not None:
        text = row[mapping.system]
        if not isinstance(text, str):
            raise ValueError(f"{mapping.system} must be a string, got {type(text).__name__}")
        system = _one(system, text)
    if mapping.history and row.get(mapping.history):
        raise ValueError(f"{mapping.history} holds earlier turns; only one user turn can be trained on")
    return system, prompt


def _prompt_of_columns(row: dict[str, Any], mapping: ColumnMapping) -> tuple[str, str]:
    value = _value(row, mapping.prompt)
    if is_chat(value):
        return split_system(messages_of(value, mapping.prompt), mapping.prompt)
    parts = [value]
    if mapping.input and row.get(mapping.input) is not None:
        if not isinstance(row[mapping.input], str):
            raise ValueError(f"{mapping.input} must be a string, got {type(row[mapping.input]).__name__}")
        parts.append(row[mapping.input])
    return "", "\n".join(part for part in parts if part)


def _one(one: str, other: str) -> str:
    if one.strip() and other.strip() and one.strip() != other.strip():
        raise ValueError("the row has two different system texts")
    return one if one.strip() else other if other.strip() else ""


def _label(row: dict[str, Any], column: str, longest: int = MAX_LABEL_CHARACTERS) -> str:
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
    fault = text_fault(text, column) if text.strip() else ""
    if fault:
        raise ValueError(fault)
    return text


# --- json rows: Rows of a JSONL file, or of a file that is one JSON array


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


# --- reading: The rows of a file or a Hub data set, whatever its format, one by one; a row that can't be read


HUB = "hub:"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_PACKED = {b"PK\x03\x04": "a ZIP or Excel file", b"\x1f\x8b": "a gzip file", b"\x28\xb5\x2f\xfd": "a zstd file"}


def rows_of(source: str | Path) -> Iterator[SourceRow | BadLine]:
    """The rows of a file or of `hub:OWNER/NAME`. A source that has no rows to read at all (missing, a folder, packed, UTF-16, a
    CSV whose header names a column twice, a damaged Parquet file) is a DatasetError."""
    if str(source).startswith(HUB):
        for number, value in hub_rows(str(source).removeprefix(HUB)):
            yield SourceRow(number, value)
        return
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (which, unlike Path's, leaves an unknown ~user alone)
    try:
        yield from _reader_of(path)(path)
    except OSError as exc:
        raise DatasetError(f"Can't read {path}: {exc.strerror or exc}; name a UTF-8 JSONL file, or CSV or Parquet") from exc


def hub_rows(name: str) -> list[tuple[int, Any]]:
    """Rows of a Hub data set's split `train`, else its first, with their numbers from 1."""
    from datasets import load_dataset

    try:
        splits = load_dataset(name)
        split = "train" if "train" in splits else next(iter(splits))
        return list(enumerate(splits[split], start=1))
    except Exception as exc:  # datasets raises a dozen unrelated kinds, all of which mean "not to be had"
        reason = str(exc).strip().split("\n")[0][:160] or type(exc).__name__
        raise DatasetError(f"Can't load {HUB}{name}: {reason}; check the name and the network, or name a JSONL file") from exc


def _reader_of(path: Path) -> Callable[[Path], Iterator[SourceRow | BadLine]]:
    if not path.exists():
        raise DatasetError(f"No dataset file {path}: check the path (or name hub:OWNER/NAME, or workspace)")
    if not path.is_file():
        raise DatasetError(f"{path} is no file; name a JSONL, JSON, CSV or Parquet file")
    with path.open("rb") as file:
        start = file.read(4096)
        file.seek(max(0, path.stat().st_size - 4096))
        end = file.read()
    for magic, what in _PACKED.items():
        if start.startswith(magic):
            raise DatasetError(f"{path} is {what}; unpack it, or save it as JSONL, CSV or Parquet")
    if start.startswith(_UTF16):
        raise DatasetError(f"{path} is UTF-16; save it as UTF-8")
    if start.startswith(b"PAR1"):
        return _parquet
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        raise DatasetError(f"{path} is no Parquet file, whatever its name says; rename it or make it again")
    if suffix in (".csv", ".tsv"):
        return csv_rows
    is_array = start.removeprefix(BOM).lstrip().startswith(b"[") and (suffix == ".json" or end.rstrip().endswith(b"]"))
    return array_items if is_array else json_lines


def _parquet(path: Path) -> Iterator[SourceRow | BadLine]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise DatasetError(f"{path} has the column {twice[0][:60]!r} twice; rename one of them")
            for batch in file.iter_batches(batch_size=1024):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        yield SourceRow(number, batch.slice(i, 1).to_pylist()[0])
                    except UnicodeDecodeError:
                        yield bad_line(number, NO_UTF8)
    except pyarrow.ArrowException as exc:
        reason = str(exc).strip().split("\n")[0][:160]
        raise DatasetError(f"Can't read {path} as Parquet: {reason}; make it again") from exc


# --- importing: A foreign file into the journal: previewed, converted row by row, the good rows stored in one g


SAMPLE_ROWS = 1000  # rows read ahead to learn a file's columns
_MAX_NAME_CHARACTERS = 100
_OWN_ID = re.compile(r"[0-9a-f]{32}")
_JOURNAL_COLUMNS = {"id", "pair_id", "verdict", "retracts"}


@dataclass(frozen=True)
class Preview:
    """What an import would make of a source's first rows.

    columns   of the first SAMPLE_ROWS rows, in the order in which they come up
    mapping   as given, else guessed; "" where no column was recognised
    pairs     the first converted rows
    bad       the first bad rows (with a mapping that lacks chosen or rejected, none are converted, and none are bad)
    """

    columns: tuple[str, ...]
    mapping: ColumnMapping
    pairs: tuple[ForeignPair, ...]
    bad: tuple[BadLine, ...]


@dataclass(frozen=True)
class Converted:
    """A whole source, converted. `notes`: one line each on what was changed or left out, beside the bad rows."""

    judgments: tuple[Judgment, ...]
    bad: tuple[BadLine, ...]
    columns: tuple[str, ...]
    mapping: ColumnMapping
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """What an import did. `known`: rows that the journal had already (or that were withdrawn since)."""

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


def preview(source: str | Path, mapping: ColumnMapping | None = None, rows: int = 5) -> Preview:
    """The columns of a source and its first `rows` pairs and bad rows. Stores nothing; a source that can't be read at all is
    a DatasetError, and a public Space a RefusedError."""
    refuse_on_public_space("Import")
    head = list(_head(rows_of(source)))
    columns, mapping = _columns_and_mapping(head, mapping)
    pairs: list[ForeignPair] = []
    bad: list[BadLine] = []
    for row in head if mapping.chosen and mapping.rejected else ():
        if isinstance(row, BadLine):
            bad.append(row)
        elif not is_journal_row(row.value) or row.value.get("verdict") == "preferred":
            try:
                pairs.append(convert(row.value, mapping))
            except ValueError as exc:
                bad.append(bad_line(row.line, str(exc)))
        if len(pairs) >= rows and len(bad) >= rows:
            break
    return Preview(columns, mapping, tuple(pairs[:rows]), tuple(bad[:rows]))


def import_file(
    workspace: Workspace,
    source: str | Path,
    mapping: ColumnMapping | None = None,
    name: str = "",
    on_row: Callable[[], object] = lambda: None,
) -> Imported:
    """Take a file, or `hub:OWNER/NAME`, into the journal as `import:NAME` (default: the file's name without its suffix).

    mapping   which column is what; None guesses it (see `preview`)
    on_row    called after each row that was read

    Raises DatasetError where not one row is good, WorkspaceError where the journal can't be written (then nothing of it is), and
    RefusedError on a public Space.
    """
    refuse_on_public_space("Import")
    converted = convert_source(source, mapping, import_name(source, name), on_row)
    check_some_good(source, converted)
    appended = append_all(workspace, converted.judgments)
    return _imported(converted, appended.written, appended.known)


def try_import(
    workspace: Workspace,
    source: str | Path,
    mapping: ColumnMapping | None = None,
    name: str = "",
    on_row: Callable[[], object] = lambda: None,
) -> Imported:
    """What `import_file` would do, and its errors; stores nothing."""
    refuse_on_public_space("Import")
    converted = convert_source(source, mapping, import_name(source, name), on_row)
    check_some_good(source, converted)
    known = Journal(workspace.preferences).refresh().rows
    written = len({judgment.id for judgment in converted.judgments} - known.keys())
    return _imported(converted, written, len(converted.judgments) - written)


def _imported(converted: Converted, written: int, known: int) -> Imported:
    source = converted.judgments[0].source
    return Imported(written, known, converted.bad, converted.columns, converted.mapping, source, converted.notes)


def import_name(source: str | Path, name: str = "") -> str:
    """The NAME of `import:NAME`: as given, else the file's name without its suffix, or OWNER/NAME on the Hub."""
    text = str(source)
    name = name or (text.removeprefix(HUB) if text.startswith(HUB) else Path(text).stem)
    if not name.isprintable() or len(name) > _MAX_NAME_CHARACTERS:
        raise ConfigError(
            f"An import's name has at most {_MAX_NAME_CHARACTERS} printable characters: got {name[:120]!r}; choose another"
        )
    return name


def convert_source(
    source: str | Path, mapping: ColumnMapping | None = None, name: str = "file", on_row: Callable[[], object] = lambda: None
) -> Converted:
    """Every row of a source as a judgment that could be stored, its source `import:NAME`.

    Raises DatasetError where the source can't be read at all, or where no column is recognised as chosen or rejected."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    rows = rows_of(source)
    head = list(_head(rows))
    columns, mapping = _columns_and_mapping(head, mapping)
    if columns:
        check_required(mapping, columns)
    judgments: list[tuple[str, Judgment]] = []  # with the id that a journal's row has there
    bad: list[BadLine] = []
    left_out: Counter[str] = Counter()
    withdrawn: set[str] = set()
    said: Counter[tuple[str, ...]] = Counter()
    with_system = 0
    for row in chain(head, rows):
        on_row()
        if isinstance(row, BadLine):
            bad.append(row)
            continue
        try:
            if is_journal_row(row.value):
                own = row_of(row.value)
                if own["verdict"] != "preferred":
                    withdrawn |= {own["retracts"]} - {""}
                    left_out[own["verdict"]] += own["verdict"] != "retracted"
                    continue
                pair, extra = convert(row.value, mapping), _of_journal(own, now)
            else:
                pair, extra = convert(row.value, mapping), {}
        except ValueError as exc:
            bad.append(bad_line(row.line, str(exc)))
            continue
        with_system += pair.has_system
        texts = (pair.prompt, pair.chosen, pair.rejected)
        said[*texts, pair.annotator] += 1
        pair_id = pair_id_of(*texts)
        judgment = Judgment(
            _own_id(row.value, pair_id) or _id_of(*texts, pair.annotator, str(said[*texts, pair.annotator])),
            extra.pop("created_at", now),
            pair_id,
            *texts,
            category=pair.category,
            target_group=pair.target_group,
            annotator=pair.annotator,
            note=pair.note,
            source=f"import:{name}",
            **extra,
        )
        judgments.append((row.value["id"] if extra else "", judgment))
    standing = [judgment for there, judgment in judgments if there not in withdrawn]
    left_out["withdrawn"] = len(judgments) - len(standing)
    return Converted(tuple(standing), tuple(bad), columns, mapping, _notes(with_system, +left_out))


def check_some_good(source: str | Path, converted: Converted) -> None:
    """Raise DatasetError where a source has not one good row."""
    if converted.judgments:
        return
    if not converted.bad:
        notes = "".join(f" ({note})" for note in converted.notes)
        raise DatasetError(f"{source} has no rows to take over{notes}; name another file")
    first = converted.bad[0]
    raise DatasetError(
        f"No good row in {source}, {len(converted.bad):,} bad ones, the first in line {first.line}: {first.reason}; "
        "mend the file, or name its columns with --map"
    )


def is_journal_row(value: Any) -> bool:
    """Whether a row is a line of a journal (this workspace's or another's), by its columns."""
    return isinstance(value, dict) and value.keys() >= _JOURNAL_COLUMNS


def _head(rows: Iterator[SourceRow | BadLine]) -> Iterator[SourceRow | BadLine]:
    """The first rows, until SAMPLE_ROWS of them are objects."""
    objects = 0
    while objects < SAMPLE_ROWS:
        row = next(rows, None)
        if row is None:
            return
        objects += isinstance(row, SourceRow) and isinstance(row.value, dict)
        yield row


def _columns_and_mapping(head: list[SourceRow | BadLine], mapping: ColumnMapping | None) -> tuple[tuple[str, ...], ColumnMapping]:
    columns = columns_of(head)
    return columns, mapping or detect(columns, [row.value for row in head if isinstance(row, SourceRow)])


def _own_id(row: dict[str, Any], pair_id: str) -> str:
    """The id that a row brings along, where BiasDPO made it; else ""."""
    own = row.get("id")
    return own if isinstance(own, str) and _OWN_ID.fullmatch(own) and row.get("pair_id") == pair_id else ""


def _id_of(*parts: str) -> str:
    """32 hex digits of texts that hold no NUL character."""
    return hashlib.sha256("\0".join(("import", *parts)).encode()).hexdigest()[:32]


def _of_journal(row: dict[str, Any], now: str) -> dict[str, Any]:
    """What a journal's row says beside its pair; a text that can't be stored is a ValueError."""
    try:
        datetime.fromisoformat(row["created_at"])
        created_at = row["created_at"]
    except ValueError:
        created_at = now
    kept = {column: row[column] for column in ("original_chosen", "original_rejected", "repeat_of")}
    meta = _meta_of(row["meta"])
    for column, text in chain(kept.items(), asdict(meta).items()):
        if isinstance(text, str) and text.strip() and (fault := text_fault(text, column)):
            raise ValueError(fault)
    return {"created_at": created_at, **kept, "meta": meta}


def _meta_of(meta: dict[str, Any]) -> JudgmentMeta:
    """What `row_of` left of it, without numbers that can't be stored."""
    seed, seconds = meta["seed"], meta["seconds"]
    seed = seed if SEED_RANGE[0] <= seed <= SEED_RANGE[1] else 0
    return JudgmentMeta(**meta | {"seed": seed, "seconds": seconds if math.isfinite(seconds) else 0.0})


def _notes(with_system: int, left_out: Counter[str]) -> tuple[str, ...]:
    notes = []
    if with_system:
        notes.append(f"{with_system:,} rows have a system text, which now stands before the prompt")
    if left_out:
        counts = ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items()))
        notes.append(f"left out of the journal: {counts}")
    return tuple(notes)


# --- validation: Is a file, or the journal, what it should be? Every line that is not, with its reason; nothing


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
