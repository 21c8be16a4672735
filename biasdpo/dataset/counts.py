"""The counts that the page draws: what stands, by category, verdict, source, day and length."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date

from biasdpo.dataset.rows import Row

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
