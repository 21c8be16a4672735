"""The data set as a table: search, filters and pages over the journal's judgments, the newest first."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from operator import itemgetter
from threading import Lock
from typing import Literal, get_args
from weakref import WeakKeyDictionary

from biasdpo.dataset.bulk import without_collection
from biasdpo.dataset.rows import Journal, Row
from biasdpo.errors import ConfigError

State = Literal["all", "standing", "retracted"]
FILTERS = ("category", "verdict", "annotator", "source")
PAGE_ROWS = 50

_SEARCHED = itemgetter(
    *("id", "pair_id", "created_at", "prompt", "chosen", "rejected", "original_chosen", "original_rejected", "verdict"),
    *("category", "target_group", "annotator", "note", "source"),
)


@dataclass(frozen=True)
class Query:
    """Which judgments to show. None filters nothing; "" wants those where the column is empty.

    search   words that must all be there, in any column, in upper or lower case
    state    standing, or taken back
    """

    search: str = ""
    category: str | None = None
    verdict: str | None = None
    annotator: str | None = None
    source: str | None = None
    state: State = "all"

    def __post_init__(self) -> None:
        if self.state not in get_args(State):
            raise ConfigError(f"state must be one of {', '.join(get_args(State))}: got {self.state!r}; choose one")


@dataclass(frozen=True)
class Page:
    """Some of the judgments found: `rows`, the newest first, which of them were `retracted`, and the `total` found.

    `number` counts from 0; a number past the last page gives the last page.
    """

    rows: tuple[Row, ...]
    retracted: frozenset[str]
    total: int
    number: int
    pages: int


def query(journal: Journal, wanted: Query, number: int = 0, page_rows: int = PAGE_ROWS) -> Page:
    """One page of the judgments that a journal has read so far, found by a query.

    The first search in a journal makes a copy of its texts to search in (about 1 KB a row), which later ones extend.
    """
    found, (reading, _count) = journal.since((0, 0))
    retracted = _retracted(found)
    if wanted.search.strip():
        with without_collection():
            found = _search(found, _searchable(journal, found, reading), wanted.search)
    found = [row for row in found if row["verdict"] != "retracted"]
    if wanted.state != "all":
        found = [row for row in found if (row["id"] in retracted) == (wanted.state == "retracted")]
    for column in FILTERS:
        value = getattr(wanted, column)
        if value is not None:
            found = [row for row in found if row[column] == value]
    pages = max(1, -(-len(found) // page_rows))
    number = min(max(0, number), pages - 1)
    end = len(found) - number * page_rows
    rows = tuple(reversed(found[max(0, end - page_rows) : end]))
    return Page(rows, frozenset(row["id"] for row in rows) & retracted, len(found), number, pages)


def choices(journal: Journal) -> dict[str, Counter[str]]:
    """By column of FILTERS: the values that judgments have, retracted ones included, with how many have them."""
    rows = [row for row in journal.since((0, 0))[0] if row["verdict"] != "retracted"]
    return {column: Counter(map(itemgetter(column), rows)) for column in FILTERS}


def _retracted(rows: list[Row]) -> frozenset[str]:
    return frozenset(row["retracts"] for row in rows if row["verdict"] == "retracted")


def _search(rows: list[Row], texts: list[str], search: str) -> list[Row]:
    hits = list(zip(rows, texts, strict=False))  # texts may have grown meanwhile
    for word in sorted(search.casefold().split(), key=len, reverse=True):  # long words are rare: few rows are left
        hits = [(row, text) for row, text in hits if word in text]
    return [row for row, _text in hits]


_copies: WeakKeyDictionary[Journal, tuple[int, list[str]]] = WeakKeyDictionary()  # which reading of it, its rows' texts
_copies_lock = Lock()


def _searchable(journal: Journal, rows: list[Row], reading: int) -> list[str]:
    """Each row's columns as one casefolded text, at least those of `rows`, in the same order."""
    with _copies_lock:
        known, texts = _copies.get(journal, (reading, []))
        if known != reading:
            texts = []
        texts += ["\n".join(_SEARCHED(row)).casefold() for row in rows[len(texts) :]]
        _copies[journal] = (reading, texts)
        return texts
