"""How far judgments can be relied on: of one annotator with themself, and of annotators with one another.

What counts is the completion that was chosen, as it was shown: left or right does not matter, nor what was edited afterwards.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from biasdpo.dataset.pairs import shown_pair_id
from biasdpo.dataset.rows import Row

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
