"""The price of debiasing in what is written: a model that evades everything, rambles or repeats itself scores well on bias.

Prompts that come with us, rendered with the chat template and completed greedily with 128 tokens at most: 24 neutral ones of
everyday matters (assets/neutral_prompts.txt) and the 24 examples that probe bias (assets/prompts.jsonl). Train on neither.

mean_tokens         tokens of a completion; one that met the limit counts as the limit. Preference optimization lengthens as a
                    rule (Park et al., 2024, arXiv:2403.19159), and may shorten: a change either way is a price
mean_tokens_change_percent   the same difference, in per cent of base's mean
ended_percent       completions that ended before the limit
distinct_1, distinct_2   different n-grams of words / n-grams (Li et al., 2016, arXiv:1510.03055) of a completion, averaged over
                    those that have any. Li et al. count over all completions together, a figure that is no average over items and
                    falls with their number, so that it could have no interval. It also falls with length
repetition_4_percent   4-grams that were there before in the same completion (seq-rep-4, Welleck et al., 2020, arXiv:1908.04319)
evasion_percent     completions with a phrase of assets/evasions.txt in their first 200 characters: phrases counted, no classifier
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from biasdpo import prompts
from biasdpo.benchmarks.base import GenerationBenchmark
from biasdpo.benchmarks.text_measures import EVASIONS_FILE, distinct, evades, repetition, words
from biasdpo.evaluation.stats import Array, Better, Metric
from biasdpo.records import Completion, CompletionRequest, Sampling
from biasdpo.workspace import ASSETS, sha256_of

SAMPLING = Sampling(max_new_tokens=128, temperature=0.0, repetition_penalty=1.0)

_NEUTRAL = ASSETS / "neutral_prompts.txt"
_PROBING = ASSETS / "prompts.jsonl"
_TOKENS, _ENDED, _EVADES, _WORDS, _DISTINCT_1, _DISTINCT_2, _REPETITION_4 = range(7)


@dataclass(frozen=True)
class Asked:
    """A prompt, "neutral" or "probing"."""

    prompt: str
    kind: str


class UtilityGeneration(GenerationBenchmark):
    """See the module's docstring. Numbers of an item: see `columns`; a ratio of n-grams is 0 where there are none."""

    name = "utility_generation"
    columns: Sequence[str] = ("tokens", "ended", "evades", "words", "distinct_1", "distinct_2", "repetition_4")

    def __init__(self, items: Sequence[Asked], sampling: Sampling = SAMPLING, data_sha256: str = "") -> None:
        self.items = items
        self.data_sha256 = data_sha256
        self.settings = {
            "samples": 1,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "prompt": "chat template",
        }
        self._sampling = sampling

    def requests(self, item: Asked) -> list[CompletionRequest]:
        return [CompletionRequest(item.prompt, self._sampling)]

    def scores(self, _items: Sequence[Asked], outputs: Sequence[Sequence[Completion]]) -> list[list[float]]:
        return [_numbers(completion) for (completion,) in outputs]

    def describe(self, item: Asked) -> dict[str, str]:
        return {"prompt": item.prompt, "category": item.kind}

    def outcome(self, _item: Asked, numbers: Sequence[float]) -> str:
        """Whether the completion evades."""
        return "evades" if numbers[_EVADES] else "does not evade"

    def groups(self, item: Asked) -> list[str]:
        return [item.kind]

    def side_metrics(self) -> dict[str, Metric]:
        return {
            "mean_tokens": Metric(better="unchanged", measures="quality"),
            "ended_percent": Metric(features=_percent(_ENDED), better="higher", measures="quality"),
            "distinct_1": _of_grams(1, _DISTINCT_1, "higher"),
            "distinct_2": _of_grams(2, _DISTINCT_2, "higher"),
            "repetition_4_percent": _of_grams(4, _REPETITION_4, "lower", 100.0),
            "evasion_percent": Metric(features=_percent(_EVADES), better="lower", measures="quality"),
        }

    def paired_metrics(self) -> dict[str, Metric]:
        return {
            "mean_tokens_change_percent": Metric(
                _tokens_change, _tokens_of_both, better="unchanged", measures="quality", restates="mean_tokens"
            )
        }


def build(max_new_tokens: int | None = None) -> UtilityGeneration:
    """The prompts that come with us."""
    neutral = [line for line in _NEUTRAL.read_text(encoding="utf-8").splitlines() if line]
    items = [Asked(prompt, "neutral") for prompt in neutral]
    items += [Asked(prompt.text, "probing") for prompt in prompts.shipped()]
    files = "".join(sha256_of(file) for file in (_NEUTRAL, _PROBING, EVASIONS_FILE))
    sampling = SAMPLING if max_new_tokens is None else replace(SAMPLING, max_new_tokens=max_new_tokens)
    return UtilityGeneration(items, sampling, hashlib.sha256(files.encode()).hexdigest())


def _numbers(completion: Completion) -> list[float]:
    found = words(completion.text)
    return [
        float(completion.tokens),
        float(completion.finish_reason == "end_of_text"),
        float(evades(completion.text)),
        float(len(found)),
        distinct(found, 1) if found else 0.0,
        distinct(found, 2) if len(found) > 1 else 0.0,
        repetition(found, 4) if len(found) > 3 else 0.0,
    ]


def _percent(column: int) -> Callable[[Array], Array]:
    return lambda items: 100.0 * items[..., [column]]


def _of_grams(n: int, column: int, better: Better, scale: float = 1.0) -> Metric:
    """The mean of a column over the completions that have n words or more, times `scale`."""

    def features(items: Array) -> Array:
        there = items[..., [_WORDS]] >= n
        return np.concatenate([there, there * items[..., [column]] * scale], axis=-1)

    def of_means(means: Array) -> Array:
        there = means[..., 0]
        return np.divide(means[..., 1], there, out=np.full_like(there, np.nan), where=there > 0)

    return Metric(of_means, features, better=better, measures="quality")


def _tokens_of_both(items: Array) -> Array:
    return items[..., [_TOKENS, items.shape[-1] // 2 + _TOKENS]]


def _tokens_change(means: Array) -> Array:
    base = means[..., 0]
    return np.divide(100.0 * (means[..., 1] - base), base, out=np.full_like(base, np.nan), where=base > 0)
