"""Benchmarks: items to requests, outputs to scores. None of them knows a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from biasdpo.benchmarks import (
    bbq,
    bold,
    crows_pairs,
    real_toxicity_prompts,
    stereoset,
    truthfulqa,
    utility,
    utility_generation,
    winobias,
)
from biasdpo.benchmarks.base import Benchmark, GenerationBenchmark
from biasdpo.benchmarks.toxicity import ToxicityScorer, profanity_check
from biasdpo.errors import ConfigError


@dataclass(frozen=True)
class Generation:
    """How benchmarks by generation are run. None: as each has it.

    samples          completions of a prompt, where the benchmark takes several (real_toxicity_prompts)
    max_new_tokens   tokens of a completion
    open_scorer      gives the toxicity scorer to those that need one
    """

    samples: int | None = None
    max_new_tokens: int | None = None
    open_scorer: Callable[[], ToxicityScorer] = profanity_check


_BY_LIKELIHOOD: dict[str, Callable[[Path | None], Benchmark]] = {
    "crows_pairs": crows_pairs.build,
    "stereoset": stereoset.build,
    "bbq": bbq.build,
    "winobias": winobias.build,
    "truthfulqa": truthfulqa.build,
    "utility": utility.build,
    "perplexity": utility.build,
}
_BY_GENERATION: dict[str, Callable[[Path | None, Generation], GenerationBenchmark]] = {
    "bold": lambda data_dir, how: bold.build(data_dir, how.open_scorer(), how.max_new_tokens),
    "real_toxicity_prompts": lambda data_dir, how: real_toxicity_prompts.build(
        data_dir, how.open_scorer(), how.samples, how.max_new_tokens
    ),
    "utility_generation": lambda _data_dir, how: utility_generation.build(how.max_new_tokens),
}
NAMES = ("preference", *_BY_LIKELIHOOD, *_BY_GENERATION)


def check_name(name: str) -> str:
    """The name of a benchmark; another one is a ConfigError that lists them."""
    if name not in NAMES:
        raise ConfigError(f"Unknown benchmark {name!r}: choose of {', '.join(NAMES)}")
    return name


def expand(names: Iterable[str]) -> list[str]:
    """The benchmarks that a user's names stand for, each once: `utility` is the whole price, `utility` and `utility_generation`;
    `perplexity` is its quick half alone."""
    found: list[str] = []
    for name in names:
        found += ["utility", "utility_generation"] if check_name(name) == "utility" else [name]
    return [name for name in dict.fromkeys(found) if name != "perplexity" or "utility" not in found]


def build(name: str, data_dir: Path | None, generation: Generation | None = None) -> Benchmark | GenerationBenchmark:
    """A benchmark of public items, from DATA_DIR/NAME or, where DATA_DIR is None, of the Hub. (`preference` has pairs of the
    user's own: see `preference.Preference`.)"""
    if check_name(name) in _BY_GENERATION:
        return _BY_GENERATION[name](data_dir, generation or Generation())
    return _BY_LIKELIHOOD[name](data_dir)
