"""Benchmarks: items to requests, outputs to numbers. None of them knows a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo.benchmarks import (
    bbq,
    bold,
    counterfactual_gap,
    crows_pairs,
    overcorrection,
    quick_check,
    real_toxicity_prompts,
    stereoset,
    truthfulqa,
    utility,
    winobias,
)
from biasdpo.benchmarks.base import GenerationBenchmark, LikelihoodBenchmark
from biasdpo.benchmarks.rows import Origin, is_present
from biasdpo.benchmarks.toxicity import ToxicityScorer, profanity_check
from biasdpo.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """Settings of the benchmarks by generation. None: each benchmark's default.

    samples          completions per prompt, for the benchmark that takes several (real_toxicity_prompts)
    max_new_tokens   tokens of a completion
    open_scorer      opens the toxicity scorer for those that need one
    """

    samples: int | None = None
    max_new_tokens: int | None = None
    open_scorer: Callable[[], ToxicityScorer] = profanity_check


_BY_LIKELIHOOD: dict[str, Callable[[Path | None], LikelihoodBenchmark[Any]]] = {
    "quick_check": lambda _data_dir: quick_check.build(),
    "counterfactual_gap": lambda _data_dir: counterfactual_gap.build(),
    "crows_pairs": crows_pairs.build,
    "stereoset": stereoset.build,
    "bbq": bbq.build,
    "winobias": winobias.build,
    "truthfulqa": truthfulqa.build,
    "group_facts": lambda _data_dir: overcorrection.build_facts(),
    "utility": utility.build,
    "perplexity": utility.build_perplexity,
}
_BY_GENERATION: dict[str, Callable[[Path | None, Generation], GenerationBenchmark[Any]]] = {
    "bold": lambda data_dir, how: bold.build(data_dir, how.open_scorer(), how.max_new_tokens),
    "real_toxicity_prompts": lambda data_dir, how: real_toxicity_prompts.build(
        data_dir, how.open_scorer(), how.samples, how.max_new_tokens
    ),
    "utility_generation": lambda _data_dir, how: utility.build_generation(how.max_new_tokens),
    "overcorrection": lambda _data_dir, how: overcorrection.build(how.max_new_tokens),
}
NAMES = ("preference", *_BY_LIKELIHOOD, *_BY_GENERATION)
_ORIGINS: dict[str, Origin] = {
    "crows_pairs": crows_pairs.ORIGIN,
    "stereoset": stereoset.ORIGIN,
    "bbq": bbq.ORIGIN,
    "winobias": winobias.ORIGIN,
    "truthfulqa": truthfulqa.ORIGIN,
    "utility": real_toxicity_prompts.ORIGIN,
    "bold": bold.ORIGIN,
    "real_toxicity_prompts": real_toxicity_prompts.ORIGIN,
}


def check_name(name: str) -> str:
    """The name of a benchmark. Raises ConfigError, with the known names, for another."""
    if name not in NAMES:
        raise ConfigError(f"Unknown benchmark {name!r}: choose of {', '.join(NAMES)}")
    return name


def default_benchmarks(data_dir: Path | None) -> tuple[str, ...]:
    """The benchmarks that are scored by default, without a download: the quick check, those of four bias benchmarks that are on
    this machine, and perplexity."""
    found = [name for name in ("crows_pairs", "stereoset", "bbq", "winobias") if has_items(name, data_dir)]
    return ("quick_check", *found, "perplexity")


def has_items(name: str, data_dir: Path | None) -> bool:
    """Whether the benchmark's items are on this machine: shipped, in DATA_DIR, or, if that is None, in the Hub's cache."""
    return name not in _ORIGINS or is_present(_ORIGINS[name], data_dir)


def expand(names: Iterable[str]) -> list[str]:
    """The benchmarks that the user's names stand for, each once: `utility` is the whole quality cost (`utility` and
    `utility_generation`), `perplexity` its quick half alone."""
    found: list[str] = []
    for name in names:
        found += ["utility", "utility_generation"] if check_name(name) == "utility" else [name]
    return [name for name in dict.fromkeys(found) if name != "perplexity" or "utility" not in found]


def build(
    name: str, data_dir: Path | None, generation: Generation | None = None
) -> LikelihoodBenchmark[Any] | GenerationBenchmark[Any]:
    """A benchmark of public items, from DATA_DIR/NAME or, if DATA_DIR is None, from the Hub. `preference`, whose pairs are the
    user's own, comes from `evaluation.run.preference_benchmark`."""
    if check_name(name) in _BY_GENERATION:
        return _BY_GENERATION[name](data_dir, generation or Generation())
    return _BY_LIKELIHOOD[name](data_dir)
