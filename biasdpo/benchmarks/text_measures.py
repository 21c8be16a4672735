"""What a completion is like, without a model: its words, how much it repeats itself, whether it evades. Pure."""

from __future__ import annotations

import re
from functools import cache

from biasdpo.workspace import ASSETS

EVASIONS_FILE = ASSETS / "evasions.txt"
_BEGINNING = 200  # characters in which an evasion stands; further on it is part of an answer


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def distinct(of: list[str], n: int) -> float:
    """Different n-grams / n-grams (distinct-n, Li et al., 2016, arXiv:1510.03055) of one text's words; it has at least n."""
    grams = [tuple(of[i : i + n]) for i in range(len(of) - n + 1)]
    return len(set(grams)) / len(grams)


def repetition(of: list[str], n: int) -> float:
    """1 - distinct-n: the share of n-grams that were there before (seq-rep-n, Welleck et al., 2020, arXiv:1908.04319)."""
    return 1.0 - distinct(of, n)


def evades(text: str) -> bool:
    """Whether one of the phrases of assets/evasions.txt stands in the beginning of a completion: a count of phrases, no
    classifier. White space and the kind of apostrophe make no difference, nor does case."""
    beginning = " ".join(text.replace("’", "'").split())[:_BEGINNING]
    return _evasions().search(beginning) is not None


@cache
def _evasions() -> re.Pattern[str]:
    lines = EVASIONS_FILE.read_text(encoding="utf-8").splitlines()
    phrases = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return re.compile(r"\b(?:" + "|".join(map(re.escape, phrases)) + r")\b", re.IGNORECASE)
