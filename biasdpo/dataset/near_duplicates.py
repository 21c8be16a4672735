"""Prompts that are nearly the same: Jaccard similarity of word trigrams, found by MinHash (Broder, 1997) in linear time."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from rensa import RMinHash

THRESHOLD = 0.4  # Jaccard similarity of two prompts' sets of word trigrams from which on they are near-duplicates
_BANDS, _ROWS = 32, 2  # a pair at the threshold meets in some band with probability 1 - (1 - 0.4^2)^32 = 0.996
_KEPT = 4  # prompts a bucket remembers, so that a thousand copies cost no more than a few


def normalise_prompt(prompt: str) -> str:
    """Casefolded, without punctuation and runs of spaces: what makes two prompts the same one."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s]", "", text)).strip()


def trigrams(normalised: str) -> frozenset[str]:
    """Word trigrams, with two empty words at either end, so that the shortest prompt has some."""
    words = ["", "", *normalised.split(" "), "", ""]
    return frozenset(map(" ".join, zip(words, words[1:], words[2:], strict=False)))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """|A and B| / |A or B|."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


class NearDuplicates:
    """Prompts in the order in which they came; each is asked for its earlier near-duplicates once, when it is added."""

    def __init__(self) -> None:
        self.prompts: dict[str, int] = {}  # normalised prompt -> number
        self._trigrams: list[frozenset[str]] = []
        self._buckets: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(_BANDS)]

    def add(self, prompt: str) -> tuple[int, list[int]]:
        """The prompt's number, and the numbers of its earlier near-duplicates ([] where it was there already)."""
        normalised = normalise_prompt(prompt)
        known = self.prompts.get(normalised)
        if known is not None:
            return known, []
        number = self.prompts[normalised] = len(self._trigrams)
        own = trigrams(normalised)
        self._trigrams.append(own)
        sketch = RMinHash(num_perm=_BANDS * _ROWS, seed=0)
        sketch.update(list(own))
        digest = sketch.digest()
        checked: dict[int, bool] = {}
        for band, buckets in enumerate(self._buckets):
            key = tuple(digest[band * _ROWS : (band + 1) * _ROWS])
            bucket = buckets.get(key)
            if bucket is None:
                buckets[key] = [number]
                continue
            for other in bucket:
                if other not in checked:
                    checked[other] = jaccard(own, self._trigrams[other]) >= THRESHOLD
            if len(bucket) < _KEPT:
                bucket.append(number)
        return number, [other for other, near in checked.items() if near]


def count_near_duplicates(prompts: Iterable[str]) -> int:
    """How many prompts, apart from those that are equal but for case and punctuation, have an earlier near-duplicate."""
    index = NearDuplicates()
    return sum(bool(index.add(prompt)[1]) for prompt in prompts)
