"""What the Evaluate tab calls benchmarks, metrics and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biasdpo.evaluations.table import Ci, TableRow

BY_LIKELIHOOD = {
    "preference": ("Preference pairs", "held-out pairs: is the less biased completion the likelier one?"),
    "crows_pairs": ("CrowS-Pairs", "two sentences that differ in the group they name: is the stereotype the likelier one?"),
    "stereoset": ("StereoSet", "a stereotype, its opposite and nonsense: which is the likeliest?"),
    "bbq": ("BBQ", "questions about two people: does the answer follow the text, or the stereotype?"),
    "winobias": ("WinoBias", "does a pronoun's gender decide which occupation it means?"),
    "truthfulqa": ("TruthfulQA", "the truth against common false beliefs: what debiasing may cost"),
}
BY_GENERATION = {
    "bold": ("BOLD", "sentiment and toxicity of what is written about each group, and the gap between groups"),
    "real_toxicity_prompts": ("RealToxicityPrompts", "how toxic sentences from the web are completed, at worst"),
}
PRICE = {
    "perplexity": ("Perplexity of neutral text", "quick: how much less likely harmless sentences become"),
    "utility_generation": ("What is written", "slower: length, repetition and evasions of completions"),
}
_TITLES = {
    **{name: title for name, (title, _) in (BY_LIKELIHOOD | BY_GENERATION | PRICE).items()},
    "utility": "Perplexity of neutral text",
}
_METRICS = {
    "reward_accuracy": "Reward accuracy",
    "lead_over_the_longer": "Lead over picking the longer",
    "logratio_margin_nats": "Log-ratio margin (nats)",
    "length_normalised_accuracy": "Accuracy, length-normalised",
    "stereotype_percent": "Prefers the stereotype (%)",
    "mean_abs_difference_nats": "Strength of preference (nats)",
    "language_modeling_score": "Prefers sense to nonsense (LMS, %)",
    "stereotype_score": "Prefers the stereotype (SS, %)",
    "icat": "ICAT (both in one, of 100)",
    "accuracy_ambiguous": "Accuracy, ambiguous",
    "accuracy_disambiguated": "Accuracy, disambiguated",
    "bias_score_ambiguous": "Bias score, ambiguous",
    "bias_score_disambiguated": "Bias score, disambiguated",
    "gap": "Gap, pro- to anti-stereotypical (points)",
    "accuracy_pro": "Accuracy, pro-stereotypical (%)",
    "accuracy_anti": "Accuracy, anti-stereotypical (%)",
    "mc1": "MC1 (%)",
    "mc2": "MC2 (%)",
    "perplexity": "Perplexity",
    "perplexity_change_percent": "Perplexity, change (%)",
    "mean_tokens": "Mean length (tokens)",
    "mean_tokens_change_percent": "Mean length, change (%)",
    "ended_percent": "Ended by itself (%)",
    "distinct_1": "Different words (distinct-1)",
    "distinct_2": "Different word pairs (distinct-2)",
    "repetition_4_percent": "Repeated 4-grams (%)",
    "evasion_percent": "Evasions (%)",
    "vader_sentiment": "VADER sentiment",
    "vader_positive_percent": "Positive by VADER (%)",
    "vader_negative_percent": "Negative by VADER (%)",
    "vader_sentiment_gap": "VADER sentiment, gap between groups",
}
_HEADLINES = {  # the metric that is shown first of a benchmark
    "preference": "length_normalised_accuracy",
    "crows_pairs": "stereotype_percent",
    "stereoset": "icat",
    "bbq": "bias_score_ambiguous",
    "winobias": "gap",
    "utility": "perplexity",
}
SYMBOLS = {"less biased": "▲", "better": "▲", "no clear difference": "○", "worse": "▼"}
"""Beside a verdict's colour, so that it is not told by colour alone."""
CLASSES = {"less biased": "good", "better": "good", "no clear difference": "open", "worse": "bad"}


def benchmark_title(name: str) -> str:
    """A benchmark for people."""
    return _TITLES.get(name, name)


def metric_title(name: str) -> str:
    """A metric for people; one that is not known here by its own name."""
    return _METRICS.get(name, name.replace("_", " ").capitalize())


def headline(name: str, metrics: Sequence[str]) -> str:
    """The metric of a benchmark that is shown first; "" where it has none."""
    wanted = _HEADLINES.get(name, "")
    return wanted if wanted in metrics else next(iter(metrics), "")


def direction(better: str) -> str:
    """Which way a metric is good, in words."""
    return {"higher": "higher is better", "lower": "lower is better"}.get(better, f"{better} is better")


def decimals(*values: float | None) -> int:
    """As many as show three digits of the largest of these numbers, so that a row's numbers stand alike."""
    largest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    return 3 if largest < 2 else 2 if largest < 10 else 1 if largest < 1000 else 0


def of_row(row: TableRow) -> int:
    """The decimals of a row's numbers."""
    return decimals(row.base, row.tuned, *((row.difference,) if row.base is None else ()))


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """A number with a true minus sign; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    text = text.replace("-", "−")
    return text.lstrip("+−") if not any(digit in text for digit in "123456789") else text


def interval(ci: Ci | None, digits: int, *, signed: bool = False) -> str:
    """A 95 % interval in brackets; "" where there is none."""
    if ci is None:
        return ""
    return f"[{number(ci[0], digits, signed=signed)}, {number(ci[1], digits, signed=signed)}]"


def p_value(p: float | None) -> str:
    """A p-value, as exact as 10,000 resamples make it."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def adapter_title(name: str) -> str:
    """An adapter's id; of a path its last part, never a folder of this machine."""
    return Path(name).name if name else "default"


def setup(result: Mapping[str, Any]) -> tuple[str, str]:
    """The ids of the model and the adapter of a result; "" where it says none."""
    provenance = result.get("provenance")
    told = provenance if isinstance(provenance, Mapping) else {}
    return str(told.get("model") or ""), str(told.get("adapter") or "")
