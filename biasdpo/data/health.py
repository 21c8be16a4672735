"""The confound meter: what a model could learn from the pairs beside what they are meant to teach.

Counted are standing judgments, hidden repeats left out; shares are of those that prefer one completion."""

from __future__ import annotations

import csv
import io
import math
import re
import string
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from biasdpo.data.journal import Journal, Mark, Row, without_collection
from biasdpo.data.pairs import TEXTS, PreferencePair, judged_pair_id
from biasdpo.errors import DatasetError

# --- words: Texts as words, and words as numbers, many texts at once: what near-duplicates and overlap are


Hashes = NDArray[np.uint64]
Counts = NDArray[np.int64]

# All of ASCII that is neither \w nor \s, to be deleted: several times faster than a regular expression.
_ASCII_MARKS = {code: None for code in range(128) if re.fullmatch(r"[^\w\s]", chr(code))}
_ASCII_LOWER = {ord(upper): lower for upper, lower in zip(string.ascii_uppercase, string.ascii_lowercase, strict=True)}
_ASCII = _ASCII_MARKS | _ASCII_LOWER
_BETWEEN = "\x1e"  # ASCII's record separator, which is white space and so stays where it is


def normalise(text: str) -> str:
    """Casefolded, without punctuation and runs of spaces: what makes two texts the same one."""
    if text.isascii():
        return " ".join(text.translate(_ASCII).split())
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s]", "", text)).strip()


def normalise_all(texts: Sequence[str]) -> list[str]:
    """Each text normalised: ASCII in one go, which takes half the time."""
    together = _BETWEEN.join(texts)
    if not together.isascii() or together.count(_BETWEEN) != len(texts) - 1:
        return list(map(normalise, texts))
    return [" ".join(text.split()) for text in together.translate(_ASCII).split(_BETWEEN)]


def word_hashes(normalised: Sequence[str]) -> tuple[Hashes, Counts]:
    """A 64-bit hash of each word of N normalised texts, one text after the other, and each text's number of words (N,).

    Of a word's bytes alone, so the same in every process: a polynomial in an odd base modulo 2^64, taken from running sums
    (Karp and Rabin, 1987), then mixed. An empty text has one empty word, of hash 0.
    """
    data = np.frombuffer(" ".join(normalised).encode("utf-8", "replace") + b" ", np.uint8)
    ends = np.flatnonzero(data == 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    powers, inverses = _powers(len(data))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(data * powers)))
    hashes = (sums[ends] - sums[starts]) * inverses[starts]
    counts = np.fromiter((text.count(" ") + 1 for text in normalised), np.int64, len(normalised))
    return mix(hashes), counts


def mix(values: Hashes) -> Hashes:
    """Spread every bit over all bits (Stafford's variant 13 of MurmurHash3's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def distinct(values: Hashes) -> Hashes:
    """Each value once, sorted. (numpy.unique of integers hashes, and slowly where their low bits repeat.)"""
    values = np.sort(values)
    return values[np.concatenate(([True], values[1:] != values[:-1]))] if len(values) else values


def _powers(count: int) -> tuple[Hashes, Hashes]:
    """The first `count` powers of the base, and their inverses modulo 2^64."""
    base = 0x9E3779B97F4A7C15
    of_base, of_inverse = (np.full(count, value, np.uint64) for value in (base, pow(base, -1, 2**64)))
    of_base[0] = of_inverse[0] = 1
    return np.cumprod(of_base), np.cumprod(of_inverse)


def ramp(counts: Counts) -> Counts:
    """0, 1, …, n-1 for each n of `counts`, one after the other: (sum,)."""
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)


# --- near duplicates: Prompts that are nearly the same: Jaccard similarity of word trigrams, found by MinHash (Broder


THRESHOLD = 0.4  # Jaccard similarity of two prompts' sets of word trigrams from which on they are near-duplicates
_BANDS, _ROWS = 32, 2
_GROUPS = (slice(0, 6), slice(6, _BANDS))  # six bands find most that is near; the others are asked where it isn't
_OFFERED = 4  # prompts that a bucket offers, so that a thousand copies cost no more than a few
_NUMBER_BITS = np.uint64(24)  # of an entry: the prompt's number; above it stands its bucket
_NUMBER = np.uint64(2**24 - 1)
_HALF = np.uint64(32)
_BLOCK = 4096  # prompts or pairs handled at once, to stay within the processor's cache
_SHORT = 64  # trigrams; longer prompts are compared one by one

_random = np.random.default_rng(20240718)  # fixed: the same prompts meet in the same buckets in every process
_FACTORS: Hashes = _random.integers(0, 2**64, size=_BANDS * _ROWS, dtype=np.uint64) | np.uint64(1)
_ADDENDS: Hashes = _random.integers(0, 2**64, size=_BANDS * _ROWS, dtype=np.uint64)


def normalise_prompt(prompt: str) -> str:
    """Casefolded, without punctuation and runs of spaces: what makes two prompts the same one."""
    return normalise(prompt)


def trigrams(normalised: str) -> frozenset[str]:
    """Word trigrams, with two empty words at either end, so that the shortest prompt has some."""
    words = ["", "", *normalised.split(" "), "", ""]
    return frozenset(map(" ".join, zip(words, words[1:], words[2:], strict=False)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """|A and B| / |A or B|."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def count_near_duplicates(prompts: Iterable[str]) -> int:
    """How many prompts, apart from those that are equal but for case and punctuation, have an earlier near-duplicate."""
    return sum(bool(near) for _number, near in NearDuplicates().add_until_near(prompts))


class NearDuplicates:
    """Prompts in the order in which they came; each is asked for its earlier near-duplicates once, when it is added.

    Whether prompts come one by one or all at once makes no difference. About 500 bytes a prompt of twelve words.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # normalised prompt -> number
        self._normalised: list[str] = []  # by number
        self._tokens = _Grown(np.uint32)  # the trigrams' hashes, prompt after prompt, each once
        self._ends = _Grown(np.int64)  # by number: where its trigrams end
        self._runs: tuple[list[Hashes], ...] = tuple([] for _ in _GROUPS)  # sorted entries (bucket, number), earlier first

    def add(self, prompt: str) -> tuple[int, list[int]]:
        """The prompt's number, and the numbers of its earlier near-duplicates: the first few of many, and [] where the prompt was
        there already."""
        return self.add_all([prompt])[0]

    def add_all(self, prompts: Iterable[str]) -> list[tuple[int, list[int]]]:
        """What `add` gives for each, one after the other."""
        return self._add(prompts, lambda found: np.ones(len(found), np.bool_))

    def add_until_near(self, prompts: Iterable[str]) -> list[tuple[int, list[int]]]:
        """As `add_all`, but the search for a prompt's near-duplicates may end once there is one: faster, fewer are named."""
        return self._add(prompts, lambda found: ~found)

    def number_of(self, prompt: str) -> int | None:
        """The number of a prompt that is in."""
        return self._numbers.get(normalise(prompt))

    def near(self, number: int) -> list[int]:
        """A prompt's earlier near-duplicates as they are now."""
        start, end = self._spans(np.array([number]))
        keys = _keys(self._tokens.all[start[0] : end[0]], end - start)
        offers = [p for g, runs in zip(_GROUPS, self._runs, strict=True) for p in _offers(_entries(keys[g], number), runs)]
        return (self._near(distinct(np.concatenate(offers))) & _NUMBER).tolist() if offers else []

    def remove(self, number: int) -> None:
        """Forget a prompt: from now on it is nobody's near-duplicate, and it gets a new number if it comes again."""
        if self._numbers.get(self._normalised[number]) != number:
            return
        del self._numbers[self._normalised[number]]
        start, end = self._spans(np.array([number]))
        keys = _keys(self._tokens.all[start[0] : end[0]], end - start)
        for group, runs in zip(_GROUPS, self._runs, strict=True):
            entries = _entries(keys[group], number)
            for i, run in enumerate(runs):
                at = np.minimum(np.searchsorted(run, entries), len(run) - 1)
                if (run[at] == entries).any():
                    runs[i] = np.delete(run, at[run[at] == entries])
            runs[:] = [run for run in runs if len(run)]

    def _add(
        self, prompts: Iterable[str], wanted: Callable[[NDArray[np.bool_]], NDArray[np.bool_]]
    ) -> list[tuple[int, list[int]]]:
        first = len(self._normalised)
        added: list[tuple[int, bool]] = []
        prompts = list(prompts)
        for begin in range(0, len(prompts), _BLOCK):
            for normalised in normalise_all(prompts[begin : begin + _BLOCK]):
                new = len(self._normalised)
                number = self._numbers.setdefault(normalised, new)
                added.append((number, number == new))
                if number == new:
                    self._normalised.append(normalised)
        if len(self._normalised) > _NUMBER:
            raise DatasetError(f"{len(self._normalised):,} prompts are too many: at most {_NUMBER:,}; take fewer")
        near = self._index(first, wanted) if len(self._normalised) > first else {}
        return [(number, near.get(number, []) if is_new else []) for number, is_new in added]

    def _index(self, first: int, wanted: Callable[[NDArray[np.bool_]], NDArray[np.bool_]]) -> dict[int, list[int]]:
        """Take the prompts from number `first` on into the buckets; by number, the earlier near-duplicates that they have.

        wanted   of which prompts were found near (N,) so far: which are to be searched for in the next group of bands
        """
        blocks = []
        for begin in range(first, len(self._normalised), _BLOCK):
            tokens, counts = _tokens_of(*word_hashes(self._normalised[begin : begin + _BLOCK]))
            self._ends.extend(len(self._tokens.all) + np.cumsum(counts))
            self._tokens.extend(tokens)
            blocks.append(_keys(tokens, counts))
        keys = np.concatenate(blocks, axis=1)
        found = np.zeros(keys.shape[1], np.bool_)
        pairs = np.empty(0, np.uint64)
        for group, runs in zip(_GROUPS, self._runs, strict=True):
            entries = _entries(keys[group], first)
            asks = wanted(found)[(entries & _NUMBER).astype(np.int64) - first]
            offers = np.concatenate([*_offers(entries[asks], runs), *_offers_within(entries, asks, runs)])
            pairs = np.concatenate((pairs, self._near(distinct(offers))))
            found[(pairs >> _HALF).astype(np.int64) - first] = True
            runs.append(entries)
            while len(runs) > 1 and len(runs[-2]) <= 2 * len(runs[-1]):  # few runs, and an entry is moved rarely
                last = runs.pop()
                runs[-1] = np.sort(np.concatenate((runs[-1], last)), kind="stable")
        pairs = distinct(pairs)
        own, others = pairs >> _HALF, (pairs & _NUMBER).tolist()
        begins = np.flatnonzero(np.concatenate(([True], own[1:] != own[:-1])))[: len(own)]
        ends = [*begins[1:].tolist(), len(own)]
        return {n: others[a:b] for n, a, b in zip(own[begins].tolist(), begins.tolist(), ends, strict=False)}

    def _near(self, offers: Hashes) -> Hashes:
        """The offers (own number << 32 | other number) that are near indeed."""
        own, other = (offers >> _HALF).astype(np.int64), (offers & _NUMBER).astype(np.int64)
        return offers[self._similarity(own, other) >= THRESHOLD]

    def _spans(self, numbers: Counts) -> tuple[Counts, Counts]:
        ends = self._ends.all
        return np.where(numbers > 0, ends[numbers - 1], 0), ends[numbers]

    def _similarity(self, one: Counts, other: Counts) -> NDArray[np.float64]:
        """The exact Jaccard similarities of pairs of prompts: (P,) numbers and (P,) numbers give (P,)."""
        (start, end), (other_start, other_end) = self._spans(one), self._spans(other)
        size, other_size = end - start, other_end - other_start
        longest = np.maximum(size, other_size)
        shared = np.zeros(len(one), np.int64)
        by_length = np.argsort(longest, kind="stable")
        short = int(np.searchsorted(longest[by_length], _SHORT, side="right"))
        for begin in range(0, short, _BLOCK):
            chunk = by_length[begin : min(begin + _BLOCK, short)]
            width = int(longest[chunk[-1]])
            # What fills up is no trigram's hash: those have 31 bits.
            left = _matrix(self._tokens.all, start[chunk], size[chunk], width, 2**31)
            right = _matrix(self._tokens.all, other_start[chunk], other_size[chunk], width, 2**31 + 1)
            count = np.zeros(len(chunk), np.int64)
            for row in left:
                count += (right == row).sum(axis=0)
            shared[chunk] = count
        for i in by_length[short:].tolist():
            left, right = self._tokens.all[start[i] : end[i]], self._tokens.all[other_start[i] : other_end[i]]
            shared[i] = len(np.intersect1d(left, right, assume_unique=True))
        similarity: NDArray[np.float64] = shared / (size + other_size - shared)
        return similarity


class _Grown:
    """An array that grows at its end."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._data: NDArray[Any] = np.empty(1024, dtype)
        self._size = 0

    @property
    def all(self) -> NDArray[Any]:
        return self._data[: self._size]

    def extend(self, values: NDArray[Any]) -> None:
        size = self._size + len(values)
        if size > len(self._data):
            grown = np.empty(max(size, 2 * len(self._data)), self._data.dtype)
            grown[: self._size] = self.all
            self._data = grown
        self._data[self._size : size] = values
        self._size = size


def _tokens_of(words: Hashes, counts: Counts) -> tuple[NDArray[np.uint32], Counts]:
    """The trigrams of N prompts as 31-bit hashes, each once in a prompt, and how many each prompt has (N,)."""
    padded = np.zeros(len(words) + 4 * len(counts), np.uint64)  # two empty words, hash 0, at either end
    begins = np.cumsum(counts + 4) - counts - 4
    padded[ramp(counts) + np.repeat(begins + 2, counts)] = words
    start = ramp(counts + 2) + np.repeat(begins, counts + 2)
    mixed = mix(padded[start] * _FACTORS[0] + padded[start + 1] * _FACTORS[1] + padded[start + 2] * _FACTORS[2])
    prompts = np.repeat(np.arange(len(counts), dtype=np.uint64), counts + 2)
    both = distinct(prompts << _HALF | mixed >> np.uint64(33))
    return both.astype(np.uint32), np.bincount((both >> _HALF).astype(np.int64), minlength=len(counts))


def _keys(tokens: NDArray[np.uint32], counts: Counts) -> Hashes:
    """The buckets of N prompts: (bands, N). The band stands in the five highest bits, a hash of its two minima below."""
    values = tokens.astype(np.uint64)
    starts = np.cumsum(counts) - counts
    minima = np.empty((_BANDS * _ROWS, len(counts)), np.uint64)
    for k in range(_BANDS * _ROWS):
        np.minimum.reduceat(values * _FACTORS[k] + _ADDENDS[k], starts, out=minima[k])
    bands = np.arange(_BANDS, dtype=np.uint64)[:, None] << np.uint64(59)
    return bands | mix(minima[0::_ROWS] * _FACTORS[0] + minima[1::_ROWS] * _FACTORS[1]) >> np.uint64(5)


def _entries(keys: Hashes, first: int) -> Hashes:
    """Sorted entries (bucket << 24 | number) of the prompts from number `first` on: (bands N,)."""
    numbers = np.arange(first, first + keys.shape[1], dtype=np.uint64)
    return np.sort(keys & ~_NUMBER | numbers, axis=1).ravel()  # band by band, so in order as a whole


def _offers(entries: Hashes, runs: list[Hashes]) -> Iterator[Hashes]:
    """Pairs (own number << 32 | earlier number): each entry with the first _OFFERED earlier ones of its bucket in the runs."""
    taken = np.zeros(len(entries), np.int64)
    for run in runs:
        start = np.searchsorted(run, entries & ~_NUMBER)
        for k in range(_OFFERED):
            other = run[np.minimum(start + k, len(run) - 1)]
            # Of the same bucket and with a smaller number: all that is left at its place is smaller than the entry.
            hit = (start + k < len(run)) & (taken < _OFFERED) & (other < entries) & (other >= entries & ~_NUMBER)
            if not hit.any():
                break
            taken += hit
            yield (entries[hit] & _NUMBER) << _HALF | other[hit] & _NUMBER


def _offers_within(entries: Hashes, asks: NDArray[np.bool_], runs: list[Hashes]) -> Iterator[Hashes]:
    """As `_offers`, of the entries among themselves, after what the runs have offered. `asks`: which entries ask (N,)."""
    same = (entries[1:] ^ entries[:-1]) <= _NUMBER  # as the bucket of the entry before
    begins = np.flatnonzero(np.concatenate(([True], ~same)))
    sizes = np.diff(begins, append=len(entries))
    begins, sizes = begins[sizes > 1], sizes[sizes > 1]
    place, begin = ramp(sizes), np.repeat(begins, sizes)  # place in the bucket
    asking = asks[begin + place]
    place, begin = place[asking], begin[asking]
    own = entries[begin + place]
    left = np.full(len(own), _OFFERED)
    for run in runs:
        known = np.searchsorted(run, own | _NUMBER, side="right") - np.searchsorted(run, own & ~_NUMBER)
        left -= np.minimum(known, left)
    for k in range(_OFFERED):
        hit = (k < place) & (k < left)
        yield (own[hit] & _NUMBER) << _HALF | entries[begin[hit] + k] & _NUMBER


def _matrix(tokens: NDArray[np.uint32], start: Counts, size: Counts, width: int, fill: int) -> NDArray[np.uint32]:
    """The tokens of P prompts as columns: (width, P), filled up with `fill`."""
    row = np.arange(width)[:, None]
    at = np.minimum(start + row, len(tokens) - 1)
    return np.where(row < size, tokens[at], np.uint32(fill))


# --- overlap: Whether a text shares eight words in a row with a benchmark: training must never eat its test


GRAM_WORDS = 8  # as in GPT-3's and Llama 2's contamination checks, which take 8 to 13
_ABOUT = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "README", "CITATION", "CHANGELOG")  # files about a benchmark, no items
_BLOCK_CHARACTERS = 500_000  # of text at once, to bound memory
_SIEVE_SLOTS = 16  # a gram, so that one gram in 16 that is none of the benchmarks' has to be looked up
_OVERLAP_FACTORS: Hashes = np.random.default_rng(8).integers(0, 2**64, size=GRAM_WORDS, dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True, eq=False)
class Overlap:
    """The word 8-grams of a folder's benchmark files.

    files     what was read, relative to the folder
    skipped   what is no UTF-8 text: nothing is known of it
    """

    files: tuple[str, ...]
    skipped: tuple[str, ...]
    _grams: Hashes  # (G,) sorted; a gram once a file
    _file_of: NDArray[np.int32]  # (G,) index in `files`
    _sieve: NDArray[np.bool_]  # whether any gram has these low bits

    def overlaps(self, text: str) -> bool:
        """Whether a text shares eight words in a row with any file."""
        return bool(self.flags([text])[0])

    def flags(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """`overlaps` of N texts (N,), a million words a second or so."""
        flags = np.zeros(len(texts), np.bool_)
        for grams, text in _grams_of(texts):
            flags[text[self._known(grams)]] = True
        return flags

    def files_of(self, text: str) -> tuple[str, ...]:
        """The files with which a text shares eight words in a row."""
        found: set[int] = set()
        for grams, _text in _grams_of([text]):
            for gram in grams[self._known(grams)]:
                begin, end = np.searchsorted(self._grams, gram), np.searchsorted(self._grams, gram, side="right")
                found |= set(self._file_of[begin:end].tolist())
        return tuple(self.files[i] for i in sorted(found))

    def _known(self, grams: Hashes) -> NDArray[np.int64]:
        """Which of the grams are in some file: their places."""
        places = np.flatnonzero(self._sieve[grams & np.uint64(len(self._sieve) - 1)])
        at = np.minimum(np.searchsorted(self._grams, grams[places]), max(0, len(self._grams) - 1))
        return places[self._grams[at] == grams[places]] if len(self._grams) else places


def load_overlap(folder: Path) -> Overlap:
    """Read every benchmark file below a folder. A folder that is not there is a DatasetError."""
    if not folder.is_dir():
        raise DatasetError(f"No folder {folder} to read benchmark files from: name one with --data-dir")
    files: list[str] = []
    skipped: list[str] = []
    grams: list[Hashes] = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or path.name.upper().startswith(_ABOUT) or not path.is_file():
            continue
        try:
            fields = _fields(path)
        except OSError as exc:
            raise DatasetError(f"Can't read {path}: {exc.strerror or exc}; make it readable, or take it out") from exc
        except UnicodeDecodeError:
            skipped.append("/".join(parts))
            continue
        files.append("/".join(parts))
        found = [grams_of_block for grams_of_block, _text in _grams_of(fields)]
        grams.append(distinct(np.concatenate([np.empty(0, np.uint64), *found])))
    return _build(tuple(files), tuple(skipped), grams)


def _build(files: tuple[str, ...], skipped: tuple[str, ...], grams: list[Hashes]) -> Overlap:
    """`grams`: those of each file, each once."""
    all_grams = np.concatenate([np.empty(0, np.uint64), *grams])
    file_of = np.repeat(np.arange(len(files)), [len(own) for own in grams]).astype(np.int32)
    order = np.argsort(all_grams, kind="stable")
    sieve = np.zeros(1 << (_SIEVE_SLOTS * len(all_grams)).bit_length(), np.bool_)
    sieve[all_grams & np.uint64(len(sieve) - 1)] = True
    return Overlap(files, skipped, all_grams[order], file_of[order], sieve)


def _fields(path: Path) -> list[str]:
    """The texts of a file that belong together: JSON values, CSV cells, else lines. Raises UnicodeDecodeError."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() in (".csv", ".tsv"):
        try:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            return [cell for row in rows for cell in row]
        except csv.Error:  # a cell past the module's limit, a NUL: then it is read as lines
            return text.splitlines()
    try:
        return list(_strings(orjson.loads(text)))
    except ValueError:
        return [field for line in text.splitlines() for field in _line_fields(line)]


def _line_fields(line: str) -> Iterable[str]:
    if line.lstrip()[:1] in ("{", "["):
        try:
            return _strings(orjson.loads(line))
        except ValueError:  # a line of text that begins with a bracket
            pass
    return [line]


def _strings(value: Any) -> Iterator[str]:
    """All strings among the values of JSON, not the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _grams_of(texts: Sequence[str]) -> Iterator[tuple[Hashes, Counts]]:
    """Block by block, the hashes of the texts' 8-grams, and the number of each one's text."""
    begin = 0
    while begin < len(texts):
        end, characters = begin, 0
        while end < len(texts) and (end == begin or characters + len(texts[end]) <= _BLOCK_CHARACTERS):
            characters += len(texts[end])
            end += 1
        normalised = normalise_all(texts[begin:end])
        long = [i for i, text in enumerate(normalised) if text.count(" ") >= GRAM_WORDS - 1]
        if long:
            yield _grams_of_block([normalised[i] for i in long], [begin + i for i in long])
        begin = end


def _grams_of_block(normalised: list[str], numbers: list[int]) -> tuple[Hashes, Counts]:
    words, counts = word_hashes(normalised)
    grams = counts - (GRAM_WORDS - 1)
    start = ramp(grams) + np.repeat(np.cumsum(counts) - counts, grams)
    total = np.zeros(len(start), np.uint64)
    for k in range(GRAM_WORDS):
        total += words[start + k] * _OVERLAP_FACTORS[k]
    return mix(total), np.repeat(np.array(numbers, np.int64), grams)


# --- shares: What annotators' choices have in common, and from where on it is worth a warning


BIASDPO_LONGER_SHARE = 0.835  # of BiasDPO's own 1,030 rows: the scale of this confound
LONGER_LIMIT = 0.6  # past which "pick the longer" is worth learning
LEFT_LIMITS = (0.4, 0.6)  # within which a habit of the eye does no harm
MIN_COUNT = 20  # of judgments or prompts, below which no share is worth a warning


@dataclass
class Shares:
    """Sums over judgments that prefer one completion, of one annotator or of all."""

    pairs: int = 0
    longer: float = 0.0
    placed: int = 0  # that say where the chosen one stood
    left: int = 0

    def count(self, row: Row, sign: int) -> None:
        lead = len(row["chosen"]) - len(row["rejected"])
        self.pairs += sign
        self.longer += sign if lead > 0 else sign / 2 if lead == 0 else 0
        left, chosen = row["meta"].get("left_side"), row["meta"].get("chosen_side")
        if left and chosen:
            self.placed += sign
            self.left += sign * (left == chosen)

    def merge(self, other: Shares) -> None:
        self.pairs += other.pairs
        self.longer += other.longer
        self.placed += other.placed
        self.left += other.left

    @property
    def longer_share(self) -> float | None:
        return self.longer / self.pairs if self.pairs else None

    @property
    def left_share(self) -> float | None:
        return self.left / self.placed if self.placed else None

    def warnings(self, who: str = "") -> list[str]:
        """One line for each share that is past its limit, beyond what chance explains (95 %)."""
        name = f"{who}: the" if who else "The"
        lines = []
        if self.pairs >= MIN_COUNT and wilson(self.longer, self.pairs)[0] > LONGER_LIMIT:
            share, scale = _percent(self.longer / self.pairs), _percent(BIASDPO_LONGER_SHARE)
            lines.append(
                f"{name} longer completion is chosen in {share} of {self.pairs:,} pairs (BiasDPO's own data set: {scale}), so a "
                "model can learn to write more; choose or edit for content: trim the chosen one"
            )
        low, high = wilson(self.left, self.placed) if self.placed >= MIN_COUNT else LEFT_LIMITS
        if low > LEFT_LIMITS[1] or high < LEFT_LIMITS[0]:
            share = _percent(self.left / self.placed)
            lines.append(
                f"{name} left completion is chosen in {share} of {self.placed:,} judgments, though sides are drawn at random: "
                "read both to the end before choosing"
            )
        return lines


def wilson(hits: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share: hits of n > 0. Wilson, 1927, without continuity correction."""
    z = 1.959964
    share, scale = hits / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# --- confounds: The confound meter: what a model could learn from the pairs beside what they are meant to teach


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
