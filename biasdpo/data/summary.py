"""The data set as a table: search, filters and pages over the journal's judgments, the newest first."""

from __future__ import annotations

import heapq
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from operator import itemgetter
from threading import Lock
from typing import Any, Literal, Protocol, TypeVar, get_args
from weakref import WeakKeyDictionary

import numpy as np

from biasdpo.data.health import Overlap, measure
from biasdpo.data.journal import Journal, Row, repaired_lines, without_collection
from biasdpo.data.pairs import judged_pair_id, shown_pair_id
from biasdpo.errors import ConfigError
from biasdpo.workspace import Workspace

# --- agreement: How far judgments can be relied on: of one annotator with themself, and of annotators with one


VALUES = ("first", "second", "tie", "both_biased")
"""What a judgment can say of a pair; first and second are its completions in alphabetical order."""


@dataclass(frozen=True)
class Agreement:
    """`self_consistency`: by annotator, how many hidden repeats were judged as the first time, of how many.

    `alpha`: Krippendorff's, nominal, over the `pairs` that two or more annotators judged: 1 is full agreement, 0 is chance.
    None until there are such pairs, and where all judgments say the same, which leaves nothing to tell from chance.
    """

    self_consistency: dict[str, tuple[int, int]]
    alpha: float | None
    pairs: int


def value_of(row: Row) -> str:
    """What a judgment says, one of VALUES."""
    if row["verdict"] != "preferred":
        return str(row["verdict"])
    chosen, rejected = row["original_chosen"] or row["chosen"], row["original_rejected"] or row["rejected"]
    return "first" if chosen < rejected else "second"


def agreement(rows: Iterable[Row]) -> Agreement:
    """Of a journal's standing rows, in their order. Rows without an annotator say nothing here."""
    named = [row for row in rows if row["annotator"] and row["verdict"] != "retracted"]
    alpha, pairs = _between(named)
    return Agreement(self_consistency(named), alpha, pairs)


def self_consistency(rows: Iterable[Row]) -> dict[str, tuple[int, int]]:
    """By annotator: hidden repeats judged as the pair was at first, and hidden repeats in all.

    A repeat whose first judgment does not stand is not counted. Where a pair was judged several times, the last one before the
    repeat is its first.
    """
    rows = list(rows)
    repeated = {row["repeat_of"] for row in rows} - {""}
    before: dict[tuple[str, str], str] = {}
    counts: dict[str, tuple[int, int]] = {}
    for row in rows if repeated else ():
        if not row["repeat_of"]:
            pair_id = shown_pair_id(row)
            if pair_id in repeated:
                before[row["annotator"], pair_id] = value_of(row)
            continue
        first = before.get((row["annotator"], row["repeat_of"]))
        if first is not None:
            agreed, total = counts.get(row["annotator"], (0, 0))
            counts[row["annotator"]] = (agreed + (value_of(row) == first), total + 1)
    return counts


def _between(rows: Iterable[Row]) -> tuple[float | None, int]:
    """Krippendorff's alpha, and the number of pairs behind it. An annotator's last judgment of a pair is theirs."""
    asked = [row for row in rows if not row["repeat_of"]]
    pair_ids = [shown_pair_id(row) for row in asked]
    times = Counter(pair_ids)  # most pairs are judged once: they are left out at once
    last = {(pair, row["annotator"]): value_of(row) for pair, row in zip(pair_ids, asked, strict=True) if times[pair] > 1}
    judges = Counter(pair for pair, _annotator in last)
    units: dict[str, Counter[str]] = {}
    for (pair, _annotator), value in last.items():
        if judges[pair] > 1:
            units.setdefault(pair, Counter())[value] += 1
    counts = np.array([[unit[value] for value in VALUES] for unit in units.values()], np.int64).reshape(-1, len(VALUES))
    if (counts.sum(axis=0) > 0).sum() < 2:
        return None, len(units)
    import krippendorff

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a division by 0 would be a value made up
        return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal")), len(units)


# --- counts: The counts that the page draws: what stands, by category, verdict, source, day and length


LENGTH_BOUNDS = (1 / 2, 3 / 4, 1.0, 4 / 3, 2.0)
"""Chosen over rejected, in characters: where one length class ends and the next begins; exactly 1 is a class of its own."""


@dataclass(frozen=True)
class Counts:
    """Of standing judgments, hidden repeats left out. "" is a column that nobody filled in.

    judgments    all of them
    by_category  those that prefer one completion
    by_verdict, by_source
    by_day       UTC; those whose time is none are left out
    by_length    those that prefer one completion, by `length_class`: seven numbers
    """

    judgments: int
    by_category: Counter[str]
    by_verdict: Counter[str]
    by_source: Counter[str]
    by_day: Counter[date]
    by_length: tuple[int, ...]

    @property
    def shorter(self) -> int:
        """Pairs whose chosen completion is the shorter one."""
        return sum(self.by_length[: len(self.by_length) // 2])

    @property
    def longer(self) -> int:
        """Pairs whose chosen completion is the longer one."""
        return sum(self.by_length[len(self.by_length) // 2 + 1 :])


def count(standing: Iterable[Row]) -> Counts:
    """Count a journal's standing rows."""
    rows = [row for row in standing if not row["repeat_of"]]
    preferred = [row for row in rows if row["verdict"] == "preferred"]
    days = Counter(row["created_at"][:10] for row in rows)
    lengths = Counter(length_class(len(row["chosen"]), len(row["rejected"])) for row in preferred)
    return Counts(
        judgments=len(rows),
        by_category=Counter(row["category"] for row in preferred),
        by_verdict=Counter(row["verdict"] for row in rows),
        by_source=Counter(row["source"] for row in rows),
        by_day=Counter({day: number for text, number in days.items() if (day := _day_of(text)) is not None}),
        by_length=tuple(lengths[i] for i in range(len(LENGTH_BOUNDS) + 2)),
    )


def length_class(chosen: int, rejected: int) -> int:
    """Which class of `by_length` two lengths fall into, from 0 (under half as long) to 6 (more than twice as long); 3 is the
    same length. A bound belongs to the class that is nearer to 1."""
    if chosen == rejected:
        return LENGTH_BOUNDS.index(1.0) + 1
    ratio = chosen / max(1, rejected)
    return bisect_right(LENGTH_BOUNDS, ratio) if ratio < 1 else bisect_left(LENGTH_BOUNDS, ratio) + 1


def _day_of(text: str) -> date | None:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return None


# --- coverage: The coverage matrix, category x target group, and which prompts fill its thinnest cells first


Cell = tuple[str, str]
"""Category and target group; "" where that is not known."""


class HasCell(Protocol):
    """What names the cell that it would fill."""

    @property
    def category(self) -> str: ...
    @property
    def target_group(self) -> str: ...


Prompt = TypeVar("Prompt", bound=HasCell)


@dataclass(frozen=True)
class Coverage:
    """The matrix: `counts[i][j]` judgments of `categories[i]` about `groups[j]`; both in alphabetical order, "" last."""

    categories: tuple[str, ...]
    groups: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def cells(self) -> list[tuple[str, str, int]]:
        """Category, group and count of every cell, the thinnest first; ties in the matrix's order."""
        every = [
            (category, group, count)
            for category, counts in zip(self.categories, self.counts, strict=True)
            for group, count in zip(self.groups, counts, strict=True)
        ]
        return sorted(every, key=lambda cell: cell[2])


def cell_counts(rows: Iterable[Row]) -> Counter[Cell]:
    """How many of a journal's standing rows each cell holds: those that prefer one completion, hidden repeats left out."""
    return Counter(
        (row["category"], row["target_group"]) for row in rows if row["verdict"] == "preferred" and not row["repeat_of"]
    )


def coverage(counts: Mapping[Cell, int], prompts: Iterable[HasCell] = ()) -> Coverage:
    """The matrix of the counts, with the cells that the prompts at hand would fill."""
    cells = {*counts, *((prompt.category, prompt.target_group) for prompt in prompts)}
    categories, groups = (tuple(sorted({cell[i] for cell in cells}, key=lambda name: (not name, name))) for i in (0, 1))
    return Coverage(categories, groups, tuple(tuple(counts.get((c, g), 0) for g in groups) for c in categories))


def thinnest(prompts: Sequence[Prompt], counts: Mapping[Cell, int]) -> list[Prompt]:
    """The prompts in the order in which to offer them: each time one of the cell that is thinnest then.

    A prompt that was offered counts as judged, so that the cells fill side by side. Ties, and prompts of one cell, keep the
    order that they have.
    """
    by_cell: dict[Cell, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_cell.setdefault((prompt.category, prompt.target_group), []).append(place)
    # Of each cell its next prompt: how full the cell is then, the prompt's place, how many of the cell were offered.
    heap = [(counts.get(cell, 0), places[0], 0, cell) for cell, places in by_cell.items()]
    heapq.heapify(heap)
    order = []
    while heap:
        count, place, offered, cell = heap[0]
        order.append(prompts[place])
        places = by_cell[cell]
        if offered + 1 < len(places):
            heapq.heapreplace(heap, (count + 1, places[offered + 1], offered + 1, cell))
        else:
            heapq.heappop(heap)
    return order


# --- stats: The data set in numbers: what `dataset stats` prints


def stats(source: Workspace | Journal | Iterable[Row], overlap: Overlap | None = None) -> dict[str, Any]:
    """Counts and confounds of a workspace's journal, of a journal as far as it was read, or of its rows.

    rows                 judgments, retracted ones among them, and rows that take one back
    pairs                what training reads: distinct pairs by majority, see `derive`
    ties, both_biased    standing judgments without hidden repeats, as are those of `by_category` ("" where none was given),
                         which prefer one completion
    retracted            judgments taken back
    repaired_lines       torn lines that were set aside; 0 unless a workspace is given, as are `bad_lines`: lines that are no rows
    the others           see `Confounds` and `Agreement`
    """
    with without_collection():
        return _stats(source, overlap)


def _stats(source: Workspace | Journal | Iterable[Row], overlap: Overlap | None) -> dict[str, Any]:
    repaired = bad = 0
    if isinstance(source, Workspace):
        repaired = repaired_lines(source)
        source = Journal(source.preferences).refresh()
    if isinstance(source, Journal):
        bad = len(source.bad_lines)
        source = source.since((0, 0))[0]
    rows = list(source)
    retracted = {row["retracts"] for row in rows if row["verdict"] == "retracted"}
    standing = [row for row in rows if row["verdict"] != "retracted" and row["id"] not in retracted]
    judged = [row for row in standing if not row["repeat_of"]]
    preferred = [row for row in judged if row["verdict"] == "preferred"]
    verdicts = Counter(row["verdict"] for row in judged)
    confounds = measure(judged, overlap)
    agreed = agreement(standing)
    return {
        "rows": len(rows),
        "pairs": _derived_pairs(preferred),
        "ties": verdicts["tie"],
        "both_biased": verdicts["both_biased"],
        "retracted": sum(row["verdict"] != "retracted" and row["id"] in retracted for row in rows),
        "by_category": dict(sorted(Counter(row["category"] for row in preferred).items())),
        "chosen_longer_share": confounds.chosen_longer_share,
        "chosen_left_share": confounds.chosen_left_share,
        "near_duplicates": confounds.near_duplicates,
        "repaired_lines": repaired,
        "bad_lines": bad,
        "exact_duplicates": confounds.exact_duplicates,
        "benchmark_overlap": confounds.benchmark_overlap,
        "annotators": [asdict(shares) for shares in confounds.annotators],
        "agreement": {
            "alpha": agreed.alpha,
            "pairs": agreed.pairs,
            "self_consistency": {name: {"agreed": a, "total": t} for name, (a, t) in sorted(agreed.self_consistency.items())},
        },
        "warnings": list(confounds.warnings),
    }


def _derived_pairs(preferred: Sequence[Row]) -> int:
    """How many pairs `derive` leaves, by the rows' pair ids, which it would have to compute again."""
    pair_ids = list(map(judged_pair_id, preferred))
    votes = Counter(pair_ids)
    lead: Counter[str] = Counter()  # of pairs with several votes: those for one completion less those for the other
    for pair_id, row in zip(pair_ids, preferred, strict=True):
        if votes[pair_id] > 1:
            lead[pair_id] += 1 if row["chosen"] < row["rejected"] else -1
    return len(votes) - sum(not margin for margin in lead.values())


# --- table: The data set as a table: search, filters and pages over the journal's judgments, the newest fir


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
