"""The confound meter: what a model could learn from the pairs beside what they are meant to teach.

Counted are standing judgments, hidden repeats left out; shares are of those that prefer one completion.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

import numpy as np

from biasdpo.dataset.bulk import without_collection
from biasdpo.dataset.near_duplicates import NearDuplicates
from biasdpo.dataset.overlap import Overlap
from biasdpo.dataset.pairs import TEXTS, PreferencePair, judged_pair_id
from biasdpo.dataset.rows import Journal, Mark, Row
from biasdpo.dataset.shares import MIN_COUNT, Shares

NEAR_DUPLICATE_LIMIT = 0.1  # of the prompts
_NAMED_FILES = 3  # of benchmark files in a warning


@dataclass(frozen=True)
class AnnotatorShares:
    """One annotator's habits. `pairs`: judgments that prefer one completion; shares are None where there is nothing to count."""

    annotator: str
    pairs: int
    chosen_longer_share: float | None
    chosen_left_share: float | None


@dataclass(frozen=True)
class Confounds:
    """What the pairs have in common beside their meaning. Shares are None where there is nothing to count.

    pairs                judgments that prefer one completion
    chosen_longer_share  whose chosen is longer, in characters; the same length counts half
    chosen_left_share    of those that say where the chosen one stood: left
    exact_duplicates     judgments that say again what the same annotator said of the same pair
    near_duplicates      distinct prompts that nearly repeat an earlier one (see `near_duplicates`)
    benchmark_overlap    pairs that share eight words in a row with a benchmark; None where no benchmark files were given
    annotators           those with a pseudonym, by name
    warnings             one line each, for what is past its limit
    """

    pairs: int
    chosen_longer_share: float | None
    chosen_left_share: float | None
    exact_duplicates: int
    near_duplicates: int
    benchmark_overlap: int | None
    annotators: tuple[AnnotatorShares, ...]
    warnings: tuple[str, ...]


def measure(rows: Iterable[Row | PreferencePair], overlap: Overlap | None = None) -> Confounds:
    """The confounds of any rows: a journal's (with or without those that take others back), or a mixture for training."""
    every = [_row_of_pair(row) if isinstance(row, PreferencePair) else row for row in rows]
    retracted = {row["retracts"] for row in every if row["verdict"] == "retracted"}
    tally = _Tally(overlap)
    with without_collection():
        tally.add(_counted(every, retracted))
    return tally.confounds()


class Meter:
    """The confounds of a journal as it grows: a refresh costs what is new. Threads may share one.

    After withdrawals the near-duplicates may differ by a few from a fresh count: who was first is not asked again.
    """

    def __init__(self, overlap: Overlap | None = None) -> None:
        self._lock = threading.Lock()
        self._overlap = overlap
        self._start_over()

    def _start_over(self) -> None:
        self._mark: Mark = (0, 0)
        self._source: Journal | None = None
        self._retracted: set[str] = set()
        self._counted: dict[str, Row] = {}
        self._tally = _Tally(self._overlap)

    def refresh(self, journal: Journal) -> Confounds:
        """The confounds of what a journal has read so far."""
        with self._lock, without_collection():
            rows, mark = journal.since(self._mark)
            if journal is not self._source or mark[0] != self._mark[0]:
                self._start_over()
                rows, mark = journal.since(self._mark)
            self._source, self._mark = journal, mark
            retracted = dict.fromkeys(row["retracts"] for row in rows if row["verdict"] == "retracted")
            self._tally.remove([self._counted.pop(id_) for id_ in retracted if id_ in self._counted])
            self._retracted |= retracted.keys()
            new = _counted(rows, self._retracted)
            self._tally.add(new)
            self._counted |= {row["id"]: row for row in new}
            return self._tally.confounds()


def _counted(rows: Sequence[Row], retracted: set[str]) -> list[Row]:
    return [r for r in rows if r["verdict"] != "retracted" and not r["repeat_of"] and r.get("id", "") not in retracted]


def _row_of_pair(pair: PreferencePair) -> Row:
    texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return texts | {"verdict": "preferred", "repeat_of": "", "annotator": "", "pair_id": "", "meta": {}}


@dataclass
class _Prompts:
    """The distinct prompts of what stands, and which of them nearly repeat an earlier one."""

    index: NearDuplicates = field(default_factory=NearDuplicates)
    rows: Counter[int] = field(default_factory=Counter)  # prompt number -> judgments
    earlier: dict[int, int] = field(default_factory=dict)  # number -> one that it nearly repeats
    later: dict[int, list[int]] = field(default_factory=dict)  # the other way round

    def add(self, prompts: Iterable[str]) -> None:
        for number, near in self.index.add_until_near(prompts):
            self.rows[number] += 1
            if near:
                self._link(number, near[0])

    def _link(self, number: int, earlier: int) -> None:
        self.earlier[number] = earlier
        self.later.setdefault(earlier, []).append(number)

    def remove(self, prompt: str) -> None:
        number = self.index.number_of(prompt)
        if number is None:
            return
        self.rows[number] -= 1
        if self.rows[number] > 0:
            return
        self.index.remove(number)
        del self.rows[number]
        self.earlier.pop(number, None)
        for other in self.later.pop(number, []):
            if self.earlier.pop(other, None) is not None and (near := self.index.near(other)):
                self._link(other, near[0])


class _Tally:
    """All sums; judgments come and go."""

    def __init__(self, overlap: Overlap | None) -> None:
        self._overlap = overlap
        self._shares: dict[str, Shares] = {}  # by annotator, "" for those without a pseudonym
        self._said: Counter[tuple[str, str, str]] = Counter()
        self._judgments = 0
        self._prompts = _Prompts()
        self._overlapping = 0
        self._files: Counter[str] = Counter()

    def add(self, rows: Sequence[Row]) -> None:
        preferred = self._count(rows, 1)
        self._prompts.add([row["prompt"] for row in preferred])

    def remove(self, rows: Sequence[Row]) -> None:
        for row in self._count(rows, -1):
            self._prompts.remove(row["prompt"])

    def _count(self, rows: Sequence[Row], sign: int) -> list[Row]:
        """Count all but the prompts; the rows that prefer one completion."""
        self._judgments += sign * len(rows)
        if sign > 0:
            self._said.update(map(_said, rows))
        else:
            for said in map(_said, rows):
                self._said[said] -= 1
                if not self._said[said]:
                    del self._said[said]
        preferred = [row for row in rows if row["verdict"] == "preferred"]
        for row in preferred:
            shares = self._shares.get(row["annotator"])
            if shares is None:
                shares = self._shares[row["annotator"]] = Shares()
            shares.count(row, sign)
        if self._overlap is not None and preferred:
            flags = self._overlap.flags([row[column] for row in preferred for column in TEXTS])
            for row in compress(preferred, np.logical_or.reduceat(flags, np.arange(0, len(flags), len(TEXTS)))):
                self._overlapping += sign
                for file in {file for column in TEXTS for file in self._overlap.files_of(row[column])}:
                    self._files[file] += sign
        return preferred

    def confounds(self) -> Confounds:
        together = Shares()
        for shares in self._shares.values():
            together.merge(shares)
        annotators = {name: shares for name, shares in sorted(self._shares.items()) if name and shares.pairs}
        return Confounds(
            pairs=together.pairs,
            chosen_longer_share=together.longer_share,
            chosen_left_share=together.left_share,
            exact_duplicates=self._judgments - len(self._said),
            near_duplicates=len(self._prompts.earlier),
            benchmark_overlap=None if self._overlap is None else self._overlapping,
            annotators=tuple(AnnotatorShares(n, s.pairs, s.longer_share, s.left_share) for n, s in annotators.items()),
            warnings=tuple(self._warnings(together, annotators)),
        )

    def _warnings(self, together: Shares, annotators: Mapping[str, Shares]) -> list[str]:
        lines = together.warnings()
        if len(annotators) > 1:  # one annotator's habits are those of all
            lines += [line for name, shares in annotators.items() for line in shares.warnings(name)]
        near, prompts = len(self._prompts.earlier), len(self._prompts.rows)
        if prompts >= MIN_COUNT and near > NEAR_DUPLICATE_LIMIT * prompts:
            lines.append(f"{near:,} of {prompts:,} prompts nearly repeat an earlier one, and add little to it: ask something new")
        if self._overlapping:
            files = [name for name, count in sorted(self._files.items()) if count]
            named = ", ".join(files[:_NAMED_FILES]) + (", …" if len(files) > _NAMED_FILES else "")
            pairs = "1 pair shares" if self._overlapping == 1 else f"{self._overlapping:,} pairs share"
            lines.append(
                f"{pairs} eight words in a row with a benchmark ({named}), which then tests what was learnt: withdraw them"
            )
        return lines


def _said(row: Row) -> tuple[str, str, str]:
    """Who says what of which pair."""
    pair_id = judged_pair_id(row)
    if row["verdict"] == "preferred":
        return row["annotator"], pair_id, "first" if row["chosen"] < row["rejected"] else "second"
    return row["annotator"], pair_id, row["verdict"]
