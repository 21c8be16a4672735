"""Prompts that are nearly the same: Jaccard similarity of word trigrams, found by MinHash (Broder, 1997) in linear time.

MinHash proposes, the exact similarity decides: nothing is called near that is not. What may be missed: a pair at the threshold
meets in one of the 32 bands with probability 1 - (1 - 0.4^2)^32 = 0.996 (at 0.5: 0.9999), and less often among prompts that
begin or end alike by the thousand (measured: 0.90 where all share half of their words), because a bucket offers its first four
only. Of many that are nearly the same, each is found to have near-duplicates, of which the first few are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from biasdpo.dataset.words import Counts, Hashes, distinct, mix, normalise, normalise_all, ramp, word_hashes
from biasdpo.errors import DatasetError

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
