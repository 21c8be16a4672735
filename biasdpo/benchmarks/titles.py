"""Display names of benchmarks and metrics, for reports and the page."""

from __future__ import annotations

from typing import Literal, NamedTuple

Group = Literal["bias", "quality", "generation"]


class Title(NamedTuple):
    """A benchmark's display name, what it asks, and its group on the page."""

    name: str
    about: str
    group: Group


BENCHMARKS: dict[str, Title] = {
    "quick_check": Title("Quick check", "our own short sentences about groups; works offline", "bias"),
    "counterfactual_gap": Title("Counterfactual gap", "does the group in a prompt change the answer? works offline", "bias"),
    "preference": Title("Preference pairs", "is the less biased completion preferred?", "bias"),
    "crows_pairs": Title("CrowS-Pairs", "is the stereotype likelier than its counterpart?", "bias"),
    "stereoset": Title("StereoSet", "stereotype, anti-stereotype or nonsense?", "bias"),
    "bbq": Title("BBQ", "does the answer follow the text or the stereotype?", "bias"),
    "winobias": Title("WinoBias", "does a pronoun's gender decide its occupation?", "bias"),
    "perplexity": Title("Perplexity of neutral text", "how well it predicts everyday prose", "quality"),
    "truthfulqa": Title("TruthfulQA", "truth against common misconceptions", "quality"),
    "group_facts": Title("Facts about groups", "easy questions of our own; works offline", "quality"),
    "utility_generation": Title("Completion quality", "length, repetition, evasions; slower", "generation"),
    "overcorrection": Title("Overcorrection", "are harmless prompts that name a group answered plainly? slower", "generation"),
    "bold": Title("BOLD", "sentiment and toxicity of text about each group", "generation"),
    "real_toxicity_prompts": Title("RealToxicityPrompts", "how toxic continuations of web text get", "generation"),
}
"""In the page's order. `utility`, the name of perplexity in results, is looked up by `benchmark_title`."""

METRICS = {
    "reward_accuracy": "Reward accuracy",
    "lead_over_the_longer": "Lead over picking the longer",
    "logratio_margin_nats": "Log-ratio margin (nats)",
    "length_normalised_accuracy": "Length-normalized accuracy",
    "stereotype_percent": "Stereotype preferred (%)",
    "mean_abs_difference_nats": "Strength of preference (nats)",
    "mean_abs_strength_nats": "Strength of preference (nats)",
    "gap_nats": "Gap between groups (nats)",
    "same_answer_percent": "Same answer for every group (%)",
    "language_modeling_score": "Language modeling score (LMS, %)",
    "stereotype_score": "Stereotype score (SS, %)",
    "icat": "ICAT",
    "accuracy_ambiguous": "Accuracy, ambiguous context",
    "accuracy_disambiguated": "Accuracy, disambiguated context",
    "bias_score_ambiguous": "Bias score, ambiguous context",
    "bias_score_disambiguated": "Bias score, disambiguated context",
    "gap": "Accuracy gap, pro minus anti (points)",
    "accuracy_pro": "Accuracy, pro-stereotypical (%)",
    "accuracy_anti": "Accuracy, anti-stereotypical (%)",
    "mc1": "MC1 (%)",
    "mc2": "MC2 (%)",
    "perplexity_change_percent": "Perplexity change (%)",
    "mean_tokens": "Mean length (tokens)",
    "mean_tokens_change_percent": "Mean length change (%)",
    "ended_percent": "Ended before the limit (%)",
    "distinct_1": "Distinct words (distinct-1)",
    "distinct_2": "Distinct word pairs (distinct-2)",
    "repetition_4_percent": "Repeated 4-grams (%)",
    "evasion_percent": "Evasions (%)",
    "hedging_percent": "Hedges (%)",
    "names_group_percent": "Names the group (%)",
    "length_percent_of_twin": "Length in percent of the twin's",
    "accuracy_percent": "Accuracy (%)",
    "right_share_percent": "Share on the right answer (%)",
    "vader_sentiment": "VADER sentiment",
    "vader_positive_percent": "Positive by VADER (%)",
    "vader_negative_percent": "Negative by VADER (%)",
    "vader_sentiment_gap": "VADER sentiment gap between groups",
}
_HEADLINES = {
    "preference": "reward_accuracy",
    "quick_check": "stereotype_percent",
    "crows_pairs": "stereotype_percent",
    "stereoset": "icat",
    "bbq": "bias_score_ambiguous",
    "winobias": "gap",
    "utility": "perplexity",
}


def benchmark_title(name: str) -> str:
    """The display name of a benchmark; an unknown one's own name."""
    title = BENCHMARKS.get("perplexity" if name == "utility" else name)
    return name if title is None else title.name


def metric_title(name: str) -> str:
    return METRICS.get(name, name.replace("_", " ").capitalize())


def headline(benchmark: str, metrics: list[str]) -> str:
    """The metric of a benchmark to show first; "" if there are none."""
    wanted = _HEADLINES.get(benchmark, "")
    return wanted if wanted in metrics else next(iter(metrics), "")


def better_words(better: str) -> str:
    """Which values of a metric are good: "↑ is better", "50 is ideal"; "" where nothing is compared."""
    known = {"higher": "↑\u00a0is\u00a0better", "lower": "↓\u00a0is\u00a0better", "unchanged": "no change is ideal", "": ""}
    return known.get(better, better.replace("nearer ", "") + " is ideal")
