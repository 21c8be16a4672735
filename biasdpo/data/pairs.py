"""A preference pair: its checks, its id, and one row per pair by majority."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biasdpo.errors import DatasetError

TEXTS = ("prompt", "chosen", "rejected")
LABELS = {"category": 200, "target_group": 200, "annotator": 200, "note": 10_000}
"""The texts beside a pair, with the most characters of each."""
MAX_CHARACTERS = 100_000  # of one text: longer than the context of any supported model


@dataclass(frozen=True)
class PreferencePair:
    """A less-biased and a more-biased completion to the same prompt. `category` is "" where unknown."""

    prompt: str
    chosen: str
    rejected: str
    category: str = ""

    @property
    def pair_id(self) -> str:
        return pair_id_of(self.prompt, self.chosen, self.rejected)


@dataclass(frozen=True)
class Derived:
    """One row per pair.

    repeats         rows about a pair that another row is about, too
    contradictions  pairs left out, since they were chosen as often one way as the other
    """

    pairs: tuple[PreferencePair, ...]
    repeats: int
    contradictions: int


def pair_id_of(prompt: str, one: str, other: str) -> str:
    """An id of 16 hex digits: the same two completions to the same prompt are the same pair, whichever was chosen."""
    texts = [prompt, *sorted((one, other))]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:16]


def judged_pair_id(row: Mapping[str, Any]) -> str:
    """The pair id of a journal row as it was judged, edits included."""
    return row["pair_id"] or pair_id_of(row["prompt"], row["chosen"], row["rejected"])


def shown_pair_id(row: Mapping[str, Any]) -> str:
    """The pair id of the two completions of a journal row as they were shown, before any edit."""
    chosen, rejected = row["original_chosen"], row["original_rejected"]
    if not chosen and not rejected:
        return judged_pair_id(row)
    return pair_id_of(row["prompt"], chosen or row["chosen"], rejected or row["rejected"])


def pair_of_row(row: Any, where: str) -> PreferencePair:
    """Check one row and return its pair; `where` (file and line) begins the error."""
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: expected an object with prompt, chosen, rejected, got {type(row).__name__}; fix the row")
    texts = []
    for column in TEXTS:
        if column not in row:
            raise DatasetError(
                f"{where}: no column {column!r}, got {', '.join(map(str, row)) or 'none'}; add it, or drop the row"
            )
        value = row[column]
        if not isinstance(value, str):
            raise DatasetError(f"{where}: {column} must be a string, got {type(value).__name__}; fix or drop the row")
        check_text(value, column, where)
        texts.append(value)
    prompt, chosen, rejected = texts
    if chosen.strip() == rejected.strip():
        raise DatasetError(f"{where}: chosen and rejected are the same text, which teaches nothing; drop the row")
    category = row.get("category") or ""
    return PreferencePair(prompt, chosen, rejected, category if isinstance(category, str) else str(category))


def check_text(value: str, column: str, where: str) -> None:
    """Raise DatasetError if a text can't be stored or trained on; `where` (file and line) begins the error."""
    fault = text_fault(value, column)
    if fault:
        raise DatasetError(f"{where}: {fault}; fix or drop the row")


def check_label(text: str, column: str) -> None:
    """Raise DatasetError if a text beside a pair (one of LABELS) can't be stored; an empty one can."""
    if len(text) > LABELS[column]:
        raise DatasetError(f"{column} has {len(text):,} characters, at most {LABELS[column]:,}: shorten it")
    if text.strip():
        check_text(text, column, "This judgment")


def text_fault(value: str, column: str) -> str:
    """Return why a text can't be stored or trained on (empty, too long, NUL, half a surrogate pair), or ""."""
    if is_blank(value):
        return f"{column} is empty"
    if len(value) > MAX_CHARACTERS:
        return f"{column} has {len(value):,} characters, at most {MAX_CHARACTERS:,}"
    if "\0" in value:
        return f"{column} holds a NUL character"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"{column} holds half a surrogate pair, which is no text"
    return ""


def is_blank(text: str) -> bool:
    """Whether a text has only white space and characters without a shape, such as a zero-width space."""
    if text.isascii():
        return not text.strip()
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


def looks_alike(one: str, other: str) -> bool:
    """Whether two texts differ at most in white space, characters without a shape, and how accents are encoded."""

    def shown(text: str) -> str:
        if text.isascii():
            return " ".join(text.split())
        visible = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))
        return " ".join(unicodedata.normalize("NFC", visible).split())

    return one == other or shown(one) == shown(other)


def derive(rows: Sequence[PreferencePair]) -> Derived:
    """Reduce to one row per pair id, by majority; pairs that are evenly split are left out and counted."""
    votes: dict[str, Counter[str]] = {}
    first: dict[tuple[str, str], PreferencePair] = {}
    for row in rows:
        pair_id = row.pair_id
        votes.setdefault(pair_id, Counter())[row.chosen] += 1
        first.setdefault((pair_id, row.chosen), row)
    pairs, contradictions = [], 0
    for pair_id, counts in votes.items():
        ranked = counts.most_common(2)
        if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
            contradictions += 1
        else:
            pairs.append(first[pair_id, ranked[0][0]])
    return Derived(tuple(pairs), repeats=len(rows) - len(votes), contradictions=contradictions)


def longer_baseline(rows: Sequence[PreferencePair]) -> float | None:
    """The accuracy of picking the longer completion, in characters; a tie counts half. None without rows."""
    if not rows:
        return None
    points = (1.0 if len(r.chosen) > len(r.rejected) else 0.5 if len(r.chosen) == len(r.rejected) else 0.0 for r in rows)
    return sum(points) / len(rows)
