"""Foreign rows to preference pairs: which column is what, and the conversion of one row.

Understood as they are, row by row:

- prompt, chosen, rejected as plain strings
- TRL's conversational preference format: lists of {role, content}; also with the prompt implicit, as the turns that chosen and
  rejected both begin with (UltraFeedback repeats that prompt in a column of its own)
- LLaMA-Factory's alpaca preference format: instruction, input (joined by a line break, as LLaMA-Factory does), chosen, rejected
- LLaMA-Factory's sharegpt preference format: conversations as [{from, value}, ...], chosen and rejected as {from, value}

A system text stands before the prompt, with an empty line between, as in templates that know no system turn: training renders
one user turn. The caller is told (`ForeignPair.has_system`). A row with earlier turns (`history`, or a longer conversation), with
tools, or with pictures is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from biasdpo.dataset.chat import Message, is_chat, messages_of, split_completion, split_system
from biasdpo.dataset.pairs import text_fault
from biasdpo.errors import ConfigError, DatasetError

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
