"""A preference pair: what a row must be, and one row a pair."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from biasdpo.errors import DatasetError

TEXTS = ("prompt", "chosen", "rejected")
MAX_CHARACTERS = 100_000  # of one text: longer than any model's context that this is made for


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
    """What is left for training, and what was left out. `repeats`: rows that say again what another row says."""

    pairs: tuple[PreferencePair, ...]
    repeats: int
    contradictions: int  # pairs chosen as often one way as the other


def pair_id_of(prompt: str, one: str, other: str) -> str:
    """The same two completions to the same prompt are the same pair, whichever was chosen. 16 hex digits."""
    texts = [prompt, *sorted((one, other))]
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:16]


def pair_of_row(row: Any, where: str) -> PreferencePair:
    """Check one row; `where` (file and line) begins the error."""
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: expected an object with prompt, chosen, rejected, got {type(row).__name__}; mend the row")
    texts = []
    for column in TEXTS:
        if column not in row:
            raise DatasetError(f"{where}: no column {column!r}, got {', '.join(map(str, row)) or 'none'}; add it or drop the row")
        value = row[column]
        if not isinstance(value, str):
            raise DatasetError(f"{where}: {column} must be a string, got {type(value).__name__}; mend or drop the row")
        check_text(value, column, where)
        texts.append(value)
    prompt, chosen, rejected = texts
    if chosen.strip() == rejected.strip():
        raise DatasetError(f"{where}: chosen and rejected are the same text, which teaches nothing; drop the row")
    category = row.get("category") or ""
    return PreferencePair(prompt, chosen, rejected, category if isinstance(category, str) else str(category))


def check_text(value: str, column: str, where: str) -> None:
    """A text that can be stored and trained on: not empty, not endless, no NUL, no half of a surrogate pair."""
    if not value.strip():
        raise DatasetError(f"{where}: {column} is empty; fill it or drop the row")
    if len(value) > MAX_CHARACTERS:
        raise DatasetError(
            f"{where}: {column} has {len(value):,} characters, at most {MAX_CHARACTERS:,}; shorten or drop the row"
        )
    if "\0" in value:
        raise DatasetError(f"{where}: {column} holds a NUL character; mend or drop the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise DatasetError(f"{where}: {column} holds half a surrogate pair, which is no text; mend or drop the row") from exc


def derive(rows: Sequence[PreferencePair]) -> Derived:
    """One row a pair id. Rows in conflict are decided by majority; an even split is left out and counted."""
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
    """The accuracy of "pick the longer completion", in characters; a tie counts half. None without rows."""
    if not rows:
        return None
    points = (1.0 if len(r.chosen) > len(r.rejected) else 0.5 if len(r.chosen) == len(r.rejected) else 0.0 for r in rows)
    return sum(points) / len(rows)
