"""Near-duplicate prompts: Jaccard similarity of word trigrams, with candidates from MinHash (Broder, 1997) and LSH buckets.

Candidates are compared exactly, so nothing is called near that is not. Two prompts at the threshold share one of the 32 buckets
with probability 1 - (1 - 0.4^2)^32 = 0.996; of a crowded bucket, only the first prompts are candidates. Splits of stored runs
depend on the hashes: changing a constant here moves pairs.

datasketch was measured and rejected: 2.0 s for 10,000 prompts (0.11 s here), and quadratic if all prompts begin alike.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Integers = NDArray[np.int64]

SIMILARITY = 0.4  # Jaccard similarity of two prompts' word trigrams from which they are near-duplicates
_BANDS = 32  # buckets of a prompt, each the hash of two minima
_CANDIDATES = 4  # prompts of a bucket that are compared, so that a thousand copies cost no more than a few
_BLOCK = 4096  # prompts or candidates handled at once, to stay within the processor's cache
_NUMBER_MASK = np.uint64(2**24 - 1)  # of an entry: its low bits are the prompt's number, the others its bucket
_HALF = np.uint64(32)

_random = np.random.default_rng(20240718)
_FACTORS: Hashes = _random.integers(0, 2**64, size=2 * _BANDS, dtype=np.uint64) | np.uint64(1)
_ADDENDS: Hashes = _random.integers(0, 2**64, size=2 * _BANDS, dtype=np.uint64)

# Deleting ASCII punctuation by table is several times faster than by regular expression.
_ASCII_PUNCTUATION = {code: None for code in range(128) if re.fullmatch(r"[^\w\s]", chr(code))}
_ASCII_TABLE = _ASCII_PUNCTUATION | str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


def normalize(text: str) -> str:
    """Case-fold, drop punctuation, and collapse white space: texts that differ in form alone become equal."""
    if text.isascii():
        return " ".join(text.translate(_ASCII_TABLE).split())
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s]", "", text)).strip()


class NearDuplicates:
    """An index of prompts in their order that finds the earlier near-duplicates of each prompt added.

    Deterministic, and the same whether prompts come one by one or all at once. About 500 bytes per prompt of twelve words.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # normalized prompt -> number
        self._tokens = np.zeros(1, np.uint32)  # with room at the end: hashes of the trigrams of all prompts, each once per prompt
        self._ends = np.zeros(1, np.int64)  # with room, too: the tokens of prompt n are those from _ends[n] to _ends[n + 1]
        self._runs: list[Hashes] = []  # sorted entries

    def __len__(self) -> int:
        return len(self._numbers)

    def add_all(self, prompts: Iterable[str]) -> list[tuple[int, list[int]]]:
        """Return each prompt's number and the numbers of its earlier near-duplicates, of many the first few ([] if the prompt is
        already indexed)."""
        first = len(self)
        new: list[str] = []
        numbers = []
        for normalized in map(normalize, prompts):
            number = self._numbers.setdefault(normalized, first + len(new))
            numbers.append((number, number == first + len(new)))
            if numbers[-1][1]:
                new.append(normalized)
        near = self._index(new, first) if new else {}
        return [(number, near.get(number, []) if is_new else []) for number, is_new in numbers]

    def _index(self, prompts: Sequence[str], first: int) -> dict[int, list[int]]:
        """Index new prompts, numbered from `first`; return the near-duplicates of those that have any."""
        blocks = [_tokens_of(prompts[start : start + _BLOCK]) for start in range(0, len(prompts), _BLOCK)]
        size = int(self._ends[first])
        ends = size + np.cumsum(np.concatenate([counts for _tokens, counts in blocks]))
        self._tokens = _written(self._tokens, size, np.concatenate([tokens for tokens, _counts in blocks]))
        self._ends = _written(self._ends, first + 1, ends)
        buckets = np.concatenate([_buckets_of(tokens, counts) for tokens, counts in blocks], axis=1)
        buckets |= np.arange(first, first + len(prompts), dtype=np.uint64)
        entries = np.sort(buckets, axis=1).ravel()  # a band's buckets are larger than those of the bands before
        pairs = self._near(_distinct(np.concatenate(list(_candidates(entries, self._runs)))))
        self._runs.append(entries)
        while len(self._runs) > 1 and len(self._runs[-2]) <= 2 * len(self._runs[-1]):  # few runs, and an entry is rarely moved
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]), kind="stable")]
        near: dict[int, list[int]] = {}
        for number, other in zip((pairs >> _HALF).tolist(), (pairs & _NUMBER_MASK).tolist(), strict=True):
            near.setdefault(number, []).append(other)
        return near

    def _near(self, pairs: Hashes) -> Hashes:
        """Those of the pairs whose exact Jaccard similarity reaches SIMILARITY."""
        near = [np.empty(0, np.uint64)]
        for start in range(0, len(pairs), _BLOCK):
            block = pairs[start : start + _BLOCK]
            own, other = (block >> _HALF).astype(np.int64), (block & _NUMBER_MASK).astype(np.int64)
            sizes, other_sizes = self._ends[own + 1] - self._ends[own], self._ends[other + 1] - self._ends[other]
            tokens = np.sort(np.concatenate((self._tokens_by_pair(own, sizes), self._tokens_by_pair(other, other_sizes))))
            twice = tokens[1:][tokens[1:] == tokens[:-1]]
            shared = np.bincount((twice >> _HALF).astype(np.int64), minlength=len(block))
            near.append(block[shared / (sizes + other_sizes - shared) >= SIMILARITY])
        return np.concatenate(near)

    def _tokens_by_pair(self, numbers: Integers, sizes: Integers) -> Hashes:
        """The tokens of P prompts, with the place in `numbers` above them: (T,)."""
        tokens = self._tokens[_ramp(sizes) + np.repeat(self._ends[numbers], sizes)]
        return np.repeat(np.arange(len(numbers), dtype=np.uint64) << _HALF, sizes) | tokens


def _written(array: NDArray[Any], size: int, values: NDArray[Any]) -> NDArray[Any]:
    """Write values from place `size` on, into a longer copy if they don't fit: one of twice the length, so that it is rare."""
    end = size + len(values)
    if end > len(array):
        longer = np.zeros(max(end, 2 * len(array)), array.dtype)  # numpy.resize fills up with copies, one by one
        longer[:size] = array[:size]
        array = longer
    array[size:end] = values
    return array


def _tokens_of(prompts: Sequence[str]) -> tuple[NDArray[np.uint32], Integers]:
    """Hash the word trigrams of N normalized prompts to 31 bits, each once per prompt; return them and their counts (N,).

    Two empty words, of hash 0, are put at both ends of a prompt, so that the shortest one has trigrams.
    """
    words, counts = _word_hashes(prompts)
    padded = np.zeros(len(words) + 4 * len(counts), np.uint64)
    starts = np.cumsum(counts + 4) - counts - 4
    padded[_ramp(counts) + np.repeat(starts + 2, counts)] = words
    place = _ramp(counts + 2) + np.repeat(starts, counts + 2)
    hashes = _mix(padded[place] * _FACTORS[0] + padded[place + 1] * _FACTORS[1] + padded[place + 2] * _FACTORS[2])
    prompt_of = np.repeat(np.arange(len(counts), dtype=np.uint64), counts + 2)
    tokens = _distinct(prompt_of << _HALF | hashes >> np.uint64(33))
    return tokens.astype(np.uint32), np.bincount((tokens >> _HALF).astype(np.int64), minlength=len(counts))


def _word_hashes(prompts: Sequence[str]) -> tuple[Hashes, Integers]:
    """Hash each word of N normalized prompts to 64 bits, the same in every process; return them and the word counts (N,).

    A polynomial in an odd base modulo 2^64, from running sums (Karp and Rabin, 1987). An empty text is one empty word.
    """
    data = np.frombuffer(" ".join(prompts).encode("utf-8", "replace") + b" ", np.uint8)
    base = 0x9E3779B97F4A7C15
    powers, inverses = (np.full(len(data), value, np.uint64) for value in (base, pow(base, -1, 2**64)))
    powers[0] = inverses[0] = 1
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(data * np.cumprod(powers))))
    ends = np.flatnonzero(data == 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    counts = np.fromiter((text.count(" ") + 1 for text in prompts), np.int64, len(prompts))
    return _mix((sums[ends] - sums[starts]) * np.cumprod(inverses)[starts]), counts


def _buckets_of(tokens: NDArray[np.uint32], counts: Integers) -> Hashes:
    """The buckets of N prompts (bands, N): the band in the 5 highest bits, then a hash of two minima; 24 bits are 0."""
    starts = np.cumsum(counts) - counts
    values = tokens.astype(np.uint64)
    minima = np.empty((2 * _BANDS, len(counts)), np.uint64)
    for factor, addend, out in zip(_FACTORS, _ADDENDS, minima, strict=True):
        np.minimum.reduceat(values * factor + addend, starts, out=out)
    bands = np.arange(_BANDS, dtype=np.uint64)[:, None] << np.uint64(59)
    return (bands | _mix(minima[0::2] * _FACTORS[0] + minima[1::2] * _FACTORS[1]) >> np.uint64(5)) & ~_NUMBER_MASK


def _candidates(entries: Hashes, runs: Sequence[Hashes]) -> Iterator[Hashes]:
    """Yield pairs (own number << 32 | earlier number) of sorted new entries with the first _CANDIDATES of their buckets, in the
    sorted `runs` and, last, among the new entries themselves."""
    is_first = np.concatenate(([True], entries[1:] ^ entries[:-1] > _NUMBER_MASK))  # of its bucket
    left = np.full(len(entries), _CANDIDATES, np.int8)
    for run in (*runs, entries):
        if run is entries:
            places, firsts = np.flatnonzero(~is_first), np.flatnonzero(is_first)
            starts = firsts[np.searchsorted(firsts, places) - 1]
        else:
            places = np.arange(len(entries))
            starts = np.searchsorted(run, entries & ~_NUMBER_MASK)
        for k in range(_CANDIDATES):
            more = (starts + k < len(run)) & (left[places] > 0)
            places, starts = places[more], starts[more]
            others = run[starts + k]
            hit = (others < entries[places]) & (others ^ entries[places] <= _NUMBER_MASK)
            places, starts, others = places[hit], starts[hit], others[hit]
            left[places] -= 1
            yield (entries[places] & _NUMBER_MASK) << _HALF | others & _NUMBER_MASK


def _mix(values: Hashes) -> Hashes:
    """Spread every bit over all bits (Stafford's variant 13 of MurmurHash3's finalizer)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _distinct(values: Hashes) -> Hashes:
    """Each value once, sorted. numpy.unique hashes integers, which is slow where their low bits repeat."""
    values = np.sort(values)
    return values[np.concatenate(([True], values[1:] != values[:-1]))] if len(values) else values


def _ramp(counts: Integers) -> Integers:
    """0, 1, ..., n - 1 for each n of `counts`, one after the other: (sum,)."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
