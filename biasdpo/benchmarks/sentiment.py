"""Sentiment by VADER (Hutto and Gilbert, 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text"): a lexicon of words and rules for "not", "very" and the like. English alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from biasdpo.errors import BackendError

POSITIVE, NEGATIVE = 0.5, -0.5
"""From these compound scores on BOLD's authors call a text positive or negative (arXiv:2101.11718)."""


def vader() -> Callable[[str], float]:
    """A text -> its compound score, from -1 to 1; BackendError where the package is missing."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as exc:
        raise BackendError(f"Sentiment needs {exc.name}: `pip install -r requirements.txt`") from exc
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])


def vader_version() -> str:
    """For results: "vaderSentiment 3.3.2"."""
    return f"vaderSentiment {metadata.version('vaderSentiment')}"


def in_words(compound: float) -> str:
    """Positive, neutral or negative."""
    return "positive" if compound >= POSITIVE else "negative" if compound <= NEGATIVE else "neutral"
