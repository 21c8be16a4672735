"""Data health: what a model could learn from preference pairs besides what they are meant to teach.

Judgments that were withdrawn and hidden repeats are not counted; shares are of the judgments that prefer one completion.
"""

from __future__ import annotations

import csv
import io
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from biasdpo.data.journal import Journal, Mark, Row, garbage_collection_paused
from biasdpo.data.near_duplicates import NearDuplicates, normalize
from biasdpo.data.pairs import TEXTS, PreferencePair, judged_pair_id
from biasdpo.data.templated import marker_in
from biasdpo.errors import DatasetError, plural

# Overlap with benchmarks

GRAM_WORDS = 8  # as in the contamination checks of GPT-3 and Llama 2, which use 8 to 13
_NOT_ITEMS = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "README", "CITATION", "CHANGELOG")
_TEXTS_AT_ONCE = 10_000  # to bound memory
_FACTORS = np.random.default_rng(8).integers(0, 2**63, size=GRAM_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Overlap:
    """The word 8-grams of a folder's benchmark files.

    files     files read, relative to the folder
    skipped   files that are not UTF-8 text, and so were not checked
    """

    files: tuple[str, ...]
    skipped: tuple[str, ...]
    _grams: Hashes  # (G,) sorted; a gram occurs once per file
    _file_of: NDArray[np.int32]  # (G,) index into `files`

    def files_of(self, texts: Sequence[str]) -> dict[int, set[str]]:
        """By index of a text: the files with which it shares eight consecutive words; only of texts that share some."""
        files: defaultdict[int, set[str]] = defaultdict(set)
        for grams, text_of in _grams_of(texts):
            found = self._found(grams)
            for gram, text in zip(grams[found], text_of[found].tolist(), strict=True):
                start, end = np.searchsorted(self._grams, gram), np.searchsorted(self._grams, gram, side="right")
                files[text].update(self.files[i] for i in self._file_of[start:end])
        return dict(files)

    def _found(self, grams: Hashes) -> NDArray[np.bool_]:
        """Which grams occur in some file: (G,)."""
        if not len(self._grams):
            return np.zeros(len(grams), np.bool_)
        order = np.argsort(grams)  # in order, the binary search stays within the cache
        places = np.empty(len(grams), np.int64)
        places[order] = np.searchsorted(self._grams, grams[order])
        return np.asarray(self._grams[np.minimum(places, len(self._grams) - 1)] == grams)


def load_overlap(folder: Path) -> Overlap:
    """Read every benchmark file below a folder. A missing folder is a DatasetError."""
    if not folder.is_dir():
        raise DatasetError(f"No folder {folder} to read benchmark files from: name one with --data-dir")
    files: list[str] = []
    skipped: list[str] = []
    grams: list[Hashes] = [np.empty(0, np.uint64)]
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or path.name.upper().startswith(_NOT_ITEMS) or not path.is_file():
            continue
        try:
            texts = _texts_in(path)
        except OSError as exc:
            raise DatasetError(f"Can't read {path}: {exc.strerror or exc}; make it readable, or remove it") from exc
        except UnicodeDecodeError:
            skipped.append("/".join(parts))
            continue
        files.append("/".join(parts))
        grams.append(np.unique(np.concatenate([grams[0], *(block for block, _text_of in _grams_of(texts))])))
    every = np.concatenate(grams)
    file_of = np.repeat(np.arange(len(files)), [len(of_file) for of_file in grams[1:]]).astype(np.int32)
    order = np.argsort(every, kind="stable")
    return Overlap(tuple(files), tuple(skipped), every[order], file_of[order])


def _texts_in(path: Path) -> list[str]:
    """The separate texts of a file: JSON strings, CSV cells, or else lines. Raises UnicodeDecodeError."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() in (".csv", ".tsv"):
        try:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            return [cell for row in rows for cell in row]
        except csv.Error:  # a cell past the module's limit, a NUL
            return text.splitlines()
    strings = _json_strings(text)
    if strings is not None:
        return strings
    lines = text.splitlines()
    return list(chain.from_iterable((_json_strings(line) if line.lstrip()[:1] in "{[" else None) or [line] for line in lines))


def _json_strings(text: str) -> list[str] | None:
    """All strings among the values (not the keys) of a JSON text; None if it is not JSON."""
    try:
        values = [orjson.loads(text)]
    except ValueError:
        return None
    strings = []
    while values:
        value = values.pop()
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
    return strings


def _grams_of(texts: Sequence[str]) -> Iterator[tuple[Hashes, NDArray[np.int64]]]:
    """Yield, block by block, the hashes of the texts' 8-grams and the index of each one's text."""
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        words = [normalize(text).split() for text in texts[start : start + _TEXTS_AT_ONCE]]
        counts = np.fromiter(map(len, words), np.int64, len(words))
        hashes = np.fromiter(map(hash, chain.from_iterable(words)), np.int64, counts.sum()).view(np.uint64)
        text_of = np.repeat(np.arange(start, start + len(words)), counts)
        size = max(0, len(hashes) - GRAM_WORDS + 1)
        grams = np.zeros(size, np.uint64)
        for k in range(GRAM_WORDS):
            grams += hashes[k : k + size] * _FACTORS[k]
        within = text_of[:size] == text_of[len(text_of) - size :]  # not across the end of a text
        yield grams[within], text_of[:size][within]


# Shares and their warnings

LONGER_LIMIT = 0.6  # above it, "pick the longer" is worth learning
LEFT_LIMITS = (0.4, 0.6)  # within them, a preference for one side is harmless
MIN_COUNT = 20  # judgments or prompts below which no share is worth a warning
NEAR_DUPLICATE_LIMIT = 0.1  # share of the prompts
_NAMED_FILES = 3  # benchmark files named in a warning


@dataclass
class Shares:
    """Sums over judgments that prefer one completion, of one annotator or of all; `with_sides` of them record the sides."""

    pairs: int = 0
    longer: float = 0.0
    with_sides: int = 0
    left: int = 0

    def add(self, row: Row) -> None:
        lead = len(row["chosen"]) - len(row["rejected"])
        self.pairs += 1
        self.longer += 1 if lead > 0 else 0.5 if lead == 0 else 0
        left, chosen = row["meta"].get("left_side"), row["meta"].get("chosen_side")
        if left and chosen:
            self.with_sides += 1
            self.left += left == chosen

    @property
    def longer_share(self) -> float | None:
        return self.longer / self.pairs if self.pairs else None

    @property
    def left_share(self) -> float | None:
        return self.left / self.with_sides if self.with_sides else None

    def warnings(self, annotator: str = "") -> list[str]:
        """A sentence with its remedy for each share past its limit by more than chance explains (95%)."""
        lines = []
        if self.pairs >= MIN_COUNT and wilson(self.longer, self.pairs)[0] > LONGER_LIMIT:
            share = f"{_percent(self.longer / self.pairs)} of {self.pairs:,} pairs"
            what = f"{annotator} chose the longer answer in" if annotator else "Chosen answers are longer in"
            lines.append(
                f"{what} {share}: a model could learn length instead of content. Prefer pairs of similar length, or shorten "
                "the longer answer."
            )
        low, high = wilson(self.left, self.with_sides) if self.with_sides >= MIN_COUNT else LEFT_LIMITS
        if low > LEFT_LIMITS[1] or high < LEFT_LIMITS[0]:
            share = f"{_percent(self.left / self.with_sides)} of {self.with_sides:,} verdicts"
            what = f"{annotator} chose the left answer in" if annotator else "The left answer was chosen in"
            lines.append(f"{what} {share}, although sides are random. Read both answers to the end before choosing.")
        return lines


def wilson(hits: float, n: int) -> tuple[float, float]:
    """The 95% confidence interval of a share: hits of n > 0 (Wilson, 1927, without continuity correction)."""
    z = 1.959964
    share, scale = hits / n, 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return center - half, center + half


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


# Confounds


@dataclass(frozen=True)
class AnnotatorShares:
    """One annotator's habits. `pairs`: judgments that prefer one completion; shares are None if there is nothing to count."""

    annotator: str
    pairs: int
    chosen_longer_share: float | None
    chosen_left_share: float | None


@dataclass(frozen=True)
class Confounds:
    """Properties that the pairs share besides their meaning. Shares are None if there is nothing to count.

    pairs                judgments that prefer one completion
    chosen_longer_share  share in which chosen is longer, in characters; equal lengths count half
    chosen_left_share    share in which chosen was on the left, of those that record it
    exact_duplicates     judgments in which an annotator repeats their own judgment of a pair
    near_duplicates      distinct prompts that nearly repeat an earlier one (see `NearDuplicates`)
    benchmark_overlap    pairs that share eight consecutive words with a benchmark; None if no benchmark files were given
    annotators           those with a pseudonym, by name
    warnings             what is wrong and what to do, a sentence or two each; none if all is well
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
    """Measure the confounds of journal rows (with or without those that retract others) or of training pairs."""
    every = [_row_of_pair(row) if isinstance(row, PreferencePair) else row for row in rows]
    tally = _Tally(overlap)
    with garbage_collection_paused():
        tally.add(_counted(every, {row["retracts"] for row in every if row["verdict"] == "retracted"}))
    return tally.confounds()


class Meter:
    """The confounds of a growing journal. A refresh costs what is new; after a withdrawal, all is counted again. Thread-safe."""

    def __init__(self, overlap: Overlap | None = None) -> None:
        self._lock = threading.Lock()
        self._overlap = overlap
        self._start_over(None)

    def _start_over(self, journal: Journal | None) -> None:
        self._journal = journal
        self._mark: Mark = (0, 0)
        self._counted: set[str] = set()
        self._retracted: set[str] = set()
        self._tally = _Tally(self._overlap)

    def refresh(self, journal: Journal) -> Confounds:
        """Return the confounds of what a journal has read so far."""
        with self._lock, garbage_collection_paused():
            rows, mark = journal.since(self._mark)
            retracted = {row["retracts"] for row in rows if row["verdict"] == "retracted"}
            if journal is not self._journal or mark[0] != self._mark[0] or not self._counted.isdisjoint(retracted):
                self._start_over(journal)
                rows, mark = journal.since(self._mark)
                retracted = {row["retracts"] for row in rows if row["verdict"] == "retracted"}
            self._mark = mark
            self._retracted |= retracted
            new = _counted(rows, self._retracted)
            self._counted.update(row["id"] for row in new)
            self._tally.add(new)
            return self._tally.confounds()


def _counted(rows: Iterable[Row], retracted: set[str]) -> list[Row]:
    return [r for r in rows if r["verdict"] != "retracted" and not r["repeat_of"] and r["id"] not in retracted]


def _row_of_pair(pair: PreferencePair) -> Row:
    texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return texts | {"id": "", "verdict": "preferred", "repeat_of": "", "retracts": "", "annotator": "", "pair_id": "", "meta": {}}


class _Tally:
    """All sums behind `Confounds`."""

    def __init__(self, overlap: Overlap | None) -> None:
        self._overlap = overlap
        self._by_annotator: defaultdict[str, Shares] = defaultdict(Shares)  # "" for those without a pseudonym
        self._judgments = 0
        self._statements: set[tuple[str, str, str]] = set()
        self._prompts = NearDuplicates()
        self._near_duplicates = 0
        self._overlapping = 0
        self._templated: Counter[str] = Counter()  # by marker
        self._files: set[str] = set()

    def add(self, rows: Sequence[Row]) -> None:
        self._judgments += len(rows)
        self._statements.update(map(_statement, rows))
        preferred = [row for row in rows if row["verdict"] == "preferred"]
        for row in preferred:
            self._by_annotator[row["annotator"]].add(row)
            if marker := marker_in(*(row[column] for column in TEXTS)):
                self._templated[marker] += 1
        near = self._prompts.add_all([row["prompt"] for row in preferred])
        self._near_duplicates += sum(bool(numbers) for _number, numbers in near)
        if self._overlap is not None and preferred:
            by_row: defaultdict[int, set[str]] = defaultdict(set)
            for text, files in self._overlap.files_of([row[column] for row in preferred for column in TEXTS]).items():
                by_row[text // len(TEXTS)] |= files
            self._overlapping += len(by_row)
            self._files.update(*by_row.values())

    def confounds(self) -> Confounds:
        everyone = Shares(*(sum(column) for column in zip(*map(astuple, self._by_annotator.values()), strict=True)))
        annotators = {name: shares for name, shares in sorted(self._by_annotator.items()) if name}
        return Confounds(
            pairs=everyone.pairs,
            chosen_longer_share=everyone.longer_share,
            chosen_left_share=everyone.left_share,
            exact_duplicates=self._judgments - len(self._statements),
            near_duplicates=self._near_duplicates,
            benchmark_overlap=None if self._overlap is None else self._overlapping,
            annotators=tuple(AnnotatorShares(n, s.pairs, s.longer_share, s.left_share) for n, s in annotators.items()),
            warnings=tuple(self._warnings(everyone, annotators)),
        )

    def _warnings(self, everyone: Shares, annotators: Mapping[str, Shares]) -> Iterator[str]:
        yield from everyone.warnings()
        if len(annotators) > 1:  # a single annotator's habits are those of all
            for name, shares in annotators.items():
                yield from shares.warnings(name)
        prompts = len(self._prompts)
        if prompts >= MIN_COUNT and self._near_duplicates > NEAR_DUPLICATE_LIMIT * prompts:
            yield (
                f"{self._near_duplicates:,} of {prompts:,} prompts nearly repeat an earlier one and add little. Write different "
                "prompts."
            )
        if self._templated:
            markers = ", ".join(marker for marker, _count in self._templated.most_common(_NAMED_FILES))
            yield (
                f"A chat template's markers ({markers}) are in {self._templated.total():,} of {plural(everyone.pairs, 'pair')} "
                "and would be trained as text. Withdraw them and import the file again with “Unwrap” (--unwrap)."
            )
        if self._overlapping:
            files = sorted(self._files)
            named = ", ".join(files[:_NAMED_FILES]) + (", …" if len(files) > _NAMED_FILES else "")
            pairs = "1 pair shares" if self._overlapping == 1 else f"{self._overlapping:,} pairs share"
            yield (
                f"{pairs} eight consecutive words with a benchmark ({named}), which would then test what was trained on. "
                f"Withdraw {'it' if self._overlapping == 1 else 'them'}."
            )


def _statement(row: Row) -> tuple[Any, str, str]:
    """Who says what about which pair."""
    verdict = row["verdict"]
    if verdict == "preferred":
        verdict = "first" if row["chosen"] < row["rejected"] else "second"
    return row["annotator"], judged_pair_id(row), verdict
