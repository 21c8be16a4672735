"""Summaries of the journal: agreement, counts, coverage, the numbers of `dataset stats`, and the searchable table."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from threading import Lock
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np

from biasdpo.data.health import Overlap, measure
from biasdpo.data.journal import Journal, Row, garbage_collection_paused, repaired_lines
from biasdpo.data.pairs import judged_pair_id, shown_pair_id
from biasdpo.errors import ConfigError
from biasdpo.workspace import Workspace

# Agreement

VALUES = ("first", "second", "tie", "both_biased", "both_unusable")
"""The possible values of a judgment; first and second are its completions in alphabetical order."""


@dataclass(frozen=True)
class Agreement:
    """How consistent annotators are with themselves and with each other.

    self_consistency  by annotator: hidden repeats judged as the first time, and hidden repeats in all
    alpha             Krippendorff's alpha, nominal, over the `pairs` judged by two or more annotators: 1 is full agreement, 0 is
                      chance. None without such pairs, and if all judgments say the same, which can't be told from chance
    """

    self_consistency: dict[str, tuple[int, int]]
    alpha: float | None
    pairs: int


def value_of(row: Row) -> str:
    """The value of a judgment, one of VALUES."""
    if row["verdict"] != "preferred":
        return str(row["verdict"])
    chosen, rejected = row["original_chosen"] or row["chosen"], row["original_rejected"] or row["rejected"]
    return "first" if chosen < rejected else "second"


def agreement(rows: Iterable[Row]) -> Agreement:
    """The agreement of a journal's standing rows, in order. Rows without an annotator are ignored."""
    named = [row for row in rows if row["annotator"] and row["verdict"] != "retracted"]
    named.sort(key=itemgetter("created_at"))  # a judgment that was edited stands at the end of the journal
    alpha, pairs = _krippendorff(named)
    return Agreement(self_consistency(named), alpha, pairs)


def self_consistency(rows: Iterable[Row]) -> dict[str, tuple[int, int]]:
    """By annotator: hidden repeats judged as the pair was before, and hidden repeats in all.

    A repeat counts only if an earlier judgment of the pair stands; of several, the last one before the repeat is compared.
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
        elif (first := before.get((row["annotator"], row["repeat_of"]))) is not None:
            agreed, total = counts.get(row["annotator"], (0, 0))
            counts[row["annotator"]] = (agreed + (value_of(row) == first), total + 1)
    return counts


def _krippendorff(rows: Iterable[Row]) -> tuple[float | None, int]:
    """Krippendorff's alpha, and the number of pairs behind it. Of an annotator's judgments of a pair, the last one counts."""
    judged = [row for row in rows if not row["repeat_of"]]
    pair_ids = list(map(shown_pair_id, judged))
    times = Counter(pair_ids)  # most pairs are judged once, and are left out here
    last = {(pair, row["annotator"]): value_of(row) for pair, row in zip(pair_ids, judged, strict=True) if times[pair] > 1}
    annotators = Counter(pair for pair, _annotator in last)
    units: dict[str, Counter[str]] = {}
    for (pair, _annotator), value in last.items():
        if annotators[pair] > 1:
            units.setdefault(pair, Counter())[value] += 1
    counts = np.array([[unit[value] for value in VALUES] for unit in units.values()], np.int64).reshape(-1, len(VALUES))
    if (counts.sum(axis=0) > 0).sum() < 2:
        return None, len(units)
    import krippendorff

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a division by 0 must not pass for a value
        return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal")), len(units)


# Counts

_LENGTHS = {"under half": 0.5, "shorter": 0.95, "about the same": 1.05, "longer": 2.0, "over twice": np.inf}
"""Length of chosen, in lengths of rejected: up to which ratio it is called so."""


def counts(standing: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Counts of a journal's standing rows, without hidden repeats: by chart, the number by name, e.g. "Verdicts": {"tie": 3}.

    Categories and lengths are of the rows that prefer one completion; days are UTC, in order.
    """
    rows = [row for row in standing if not row["repeat_of"]]
    preferred = [row for row in rows if row["verdict"] == "preferred"]
    ratios = [len(row["chosen"]) / max(1, len(row["rejected"])) for row in preferred]
    classes = np.bincount(np.searchsorted([*_LENGTHS.values()], ratios), minlength=len(_LENGTHS)).tolist()
    return {
        "Pairs by category": dict(Counter(row["category"] or "(none)" for row in preferred).most_common()),
        "Rows by verdict": dict(Counter(row["verdict"].replace("_", " ") for row in rows).most_common()),
        "Length of chosen against rejected": dict(zip(_LENGTHS, classes, strict=True)) if preferred else {},
        "Rows per day": dict(sorted(Counter(row["created_at"][:10] for row in rows).items())),
    }


# Coverage

Cell = tuple[str, str]
"""Category and target group; "" if unknown."""


def cell_counts(rows: Iterable[Row]) -> Counter[Cell]:
    """Count the standing rows of each cell: those that prefer one completion, without hidden repeats."""
    return Counter(
        (row["category"], row["target_group"]) for row in rows if row["verdict"] == "preferred" and not row["repeat_of"]
    )


# Statistics


def stats(source: Workspace | Journal | Iterable[Row], overlap: Overlap | None = None) -> dict[str, Any]:
    """The object that `dataset stats --json` prints, for a workspace's journal, a journal as far as it was read, or its rows.

    rows                 judgments, including retracted ones, and rows that retract one
    pairs                what training reads: distinct pairs by majority, see `pairs.derive`
    ties, both_biased, both_unusable    standing judgments without hidden repeats
    by_category          those of them that prefer one completion, by category ("" if none was given)
    retracted            judgments that were withdrawn
    repaired_lines       truncated lines that were set aside; 0 unless a workspace is given
    bad_lines            lines that are not rows; 0 for rows
    the others           see `Confounds` and `Agreement`
    """
    repaired = bad = 0
    with garbage_collection_paused():
        if isinstance(source, Workspace):
            repaired = repaired_lines(source)
            source = Journal(source.preferences).refresh()
        if isinstance(source, Journal):
            bad = len(source.bad_lines)
            source = source.since((0, 0))[0]
        rows = list(source)
        retracted = _retracted(rows)
        standing = [row for row in rows if row["verdict"] != "retracted" and row["id"] not in retracted]
        judged = [row for row in standing if not row["repeat_of"]]
        preferred = [row for row in judged if row["verdict"] == "preferred"]
        verdicts = Counter(row["verdict"] for row in judged)
        confounds = measure(judged, overlap)
        agreed = agreement(standing)
        pairs = _derived_pairs(preferred)
    return {
        "rows": len(rows),
        "pairs": pairs,
        "ties": verdicts["tie"],
        "both_biased": verdicts["both_biased"],
        "both_unusable": verdicts["both_unusable"],
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
    """How many pairs `derive` leaves, without computing the pair ids again."""
    pair_ids = list(map(judged_pair_id, preferred))
    votes = Counter(pair_ids)
    lead: Counter[str] = Counter()  # of pairs with several votes: those for one completion less those for the other
    for pair_id, row in zip(pair_ids, preferred, strict=True):
        if votes[pair_id] > 1:
            lead[pair_id] += 1 if row["chosen"] < row["rejected"] else -1
    return len(votes) - sum(margin == 0 for margin in lead.values())


# The table

State = Literal["all", "standing", "retracted"]
FILTERS = ("category", "verdict", "annotator", "source")
PAGE_ROWS = 50
MAX_SEARCH_CHARACTERS = 200  # each word is looked for in every row

_SEARCHED = itemgetter(
    *("id", "pair_id", "created_at", "prompt", "chosen", "rejected", "original_chosen", "original_rejected", "verdict"),
    *("category", "target_group", "annotator", "note", "source"),
)


@dataclass(frozen=True)
class Query:
    """Which judgments to show. None does not filter; "" matches those where the column is empty.

    search   words that must all occur, in any column, in any case
    state    all, standing, or retracted
    """

    search: str = ""
    category: str | None = None
    verdict: str | None = None
    annotator: str | None = None
    source: str | None = None
    state: State = "all"

    def __post_init__(self) -> None:
        if len(self.search) > MAX_SEARCH_CHARACTERS:
            raise ConfigError(f"A search has at most {MAX_SEARCH_CHARACTERS} characters: shorten it")
        if self.state not in get_args(State):
            raise ConfigError(f"state must be one of {', '.join(get_args(State))}: got {self.state!r}; choose one")


@dataclass(frozen=True)
class Page:
    """A page of judgments: `rows`, newest first, the row that withdraws each of the `retractions` by id, and the `total` found.

    `number` counts from 0; a number past the last page gives the last page.
    """

    rows: tuple[Row, ...]
    retractions: dict[str, Row]
    total: int
    number: int
    pages: int


def find(journal: Journal, wanted: Query) -> tuple[list[Row], dict[str, Row]]:
    """The judgments that match among those that a journal has read so far, oldest first, and what withdraws any by its id.

    The first search makes a copy of the journal's texts to search in (about 1 KB per row), which later ones extend.
    """
    found, (reading, _count) = journal.since((0, 0))
    retractions = {row["retracts"]: row for row in reversed(found) if row["verdict"] == "retracted"}
    if wanted.search.strip():
        with garbage_collection_paused():
            found = _search(found, _searchable(journal, found, reading), wanted.search)
    found = [row for row in found if row["verdict"] != "retracted"]
    if wanted.state != "all":
        found = [row for row in found if (row["id"] in retractions) == (wanted.state == "retracted")]
    for column in FILTERS:
        value = getattr(wanted, column)
        if value is not None:
            found = [row for row in found if row[column] == value]
    return found, retractions


def query(journal: Journal, wanted: Query, number: int = 0, page_rows: int = PAGE_ROWS) -> Page:
    """Find one page of the judgments that a journal has read so far."""
    found, retractions = find(journal, wanted)
    pages = max(1, -(-len(found) // page_rows))
    number = min(max(0, number), pages - 1)
    end = len(found) - number * page_rows
    rows = tuple(reversed(found[max(0, end - page_rows) : end]))
    shown = {row["id"]: retractions[row["id"]] for row in rows if row["id"] in retractions}
    return Page(rows, shown, len(found), number, pages)


def choices(journal: Journal, state: State) -> dict[str, Counter[str]]:
    """For each column of FILTERS: its values, with how many judgments in this state have each."""
    rows, _retractions = find(journal, Query(state=state))
    return {column: Counter(map(itemgetter(column), rows)) for column in FILTERS}


def _retracted(rows: Iterable[Row]) -> frozenset[str]:
    return frozenset(row["retracts"] for row in rows if row["verdict"] == "retracted")


def _search(rows: list[Row], texts: list[str], search: str) -> list[Row]:
    hits = list(zip(rows, texts, strict=False))  # the texts may have grown meanwhile
    for word in sorted(search.casefold().split(), key=len, reverse=True):  # long words are rare: few rows are left
        hits = [(row, text) for row, text in hits if word in text]
    return [row for row, _text in hits]


_texts: WeakKeyDictionary[Journal, tuple[int, list[str]]] = WeakKeyDictionary()  # the reading, and its rows' texts
_texts_lock = Lock()


def _searchable(journal: Journal, rows: list[Row], reading: int) -> list[str]:
    """Each row's columns as one case-folded text, at least for `rows`, in the same order."""
    with _texts_lock:
        known, texts = _texts.get(journal, (reading, []))
        if known != reading:
            texts = []
        texts += ["\n".join(_SEARCHED(row)).casefold() for row in rows[len(texts) :]]
        _texts[journal] = (reading, texts)
        return texts
