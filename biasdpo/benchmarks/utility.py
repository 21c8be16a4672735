"""The quality cost of debiasing, in two halves: perplexity of neutral text (`utility`), and completions (`utility_generation`).

perplexity   exp(-sum of logp / sum of tokens) over bare texts, without a template; a text's first token is given
perplexity_change_percent   the same difference, in percent of base's
Texts: the prompt texts of RealToxicityPrompts' non-toxic prompts (Gehman et al., 2020, arXiv:2009.11462), from
DATA_DIR/real_toxicity_prompts/nontoxic.jsonl; without that file (upstream's single file, the Hub), a fixed sample of 600 with a
Perspective toxicity below 0.5. The benchmark `perplexity` downloads nothing: without DATA_DIR/real_toxicity_prompts it scores 48
texts of our own (assets/neutral_texts.txt), which the result's settings say.

Completions: shipped prompts, rendered with the chat template and completed greedily with at most 128 tokens: 24 neutral everyday
ones (assets/neutral_prompts.txt) and the 24 examples that probe bias (assets/prompts.jsonl). Train on neither.
mean_tokens         tokens of a completion; a truncated one counts as the limit. Preference optimization usually lengthens (Park
                    et al., 2024, arXiv:2403.19159) and may shorten: a change in either direction is a cost
mean_tokens_change_percent   the same difference, in percent of base's mean
ended_percent       completions that ended before the limit
distinct_1, distinct_2   distinct word n-grams / n-grams (Li et al., 2016, arXiv:1510.03055) of a completion, averaged over those
                    that have any. Li et al. count over all completions together, which is no average over items and falls with
                    their number, so it could have no interval. It also falls with length
repetition_4_percent   4-grams that occurred before in the same completion (seq-rep-4, Welleck et al., 2020, arXiv:1908.04319)
evasion_percent     completions with a phrase of assets/evasions.txt in their first 200 characters: counted phrases, no classifier
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from biasdpo import prompts
from biasdpo.benchmarks.base import GenerationBenchmark, LikelihoodBenchmark, limited
from biasdpo.benchmarks.real_toxicity_prompts import ORIGIN, web_text
from biasdpo.benchmarks.rows import Row, load_items, read_rows
from biasdpo.benchmarks.toxicity import TOXIC
from biasdpo.errors import DatasetError
from biasdpo.evaluation.stats import Array, Better, Metric, ratio
from biasdpo.records import Completion, CompletionRequest, Likelihood, Request, Sampling, TextRequest
from biasdpo.workspace import ASSETS, sha256_of

# Perplexity of neutral text

TEXTS = 600  # sampled from a large dataset: enough for an interval of 1%, scored in minutes
_FILE = Path(ORIGIN.folder) / "nontoxic.jsonl"
_OWN_TEXTS = ASSETS / "neutral_texts.txt"


class Utility(LikelihoodBenchmark[str]):
    """Numbers of an item: logp and its token count."""

    name = "utility"
    columns = ("logp", "tokens")

    def __init__(self, items: Sequence[str], data_sha256: str = "", texts: str = "") -> None:
        super().__init__(items, data_sha256)
        self.settings = {"texts": texts} if texts else {}

    def requests(self, item: str) -> list[Request]:
        return [TextRequest(item)]

    def scores(self, _item: str, outputs: Sequence[Likelihood]) -> list[float]:
        return [outputs[0].logp, outputs[0].tokens]

    def describe(self, item: str) -> dict[str, str]:
        return {"text": item}

    def side_metrics(self) -> dict[str, Metric]:
        return {"perplexity": Metric(_perplexity, better="lower", measures="quality")}

    def paired_metrics(self) -> dict[str, Metric]:
        return {
            "perplexity_change_percent": Metric(
                lambda means: 100 * (_perplexity(means[..., 2:]) / _perplexity(means[..., :2]) - 1),
                better="lower",
                measures="quality",
                restates="perplexity",
            )
        }

    def report(self, _items: Sequence[str], numbers: Array) -> dict[str, float]:
        return {"tokens": float(numbers[:, 1].sum())}


def _perplexity(means: Array) -> Array:
    """Perplexity from the mean logp and the mean token count (..., 2), whose ratio is that of their sums."""
    return np.asarray(np.exp(-means[..., 0] / means[..., 1]))


def build(data_dir: Path | None) -> Utility:
    """The neutral texts in DATA_DIR, or from the Hub. Raises DatasetError for rows in another format."""
    if data_dir is not None and (data_dir / _FILE).is_file():
        return Utility([_text(row) for row in read_rows(data_dir / _FILE, ORIGIN)], sha256_of(data_dir / _FILE))
    texts, sha256 = load_items(ORIGIN, data_dir, web_text)
    found = [text for text in texts if text.toxicity is not None and text.toxicity < TOXIC]
    if not found:
        raise DatasetError(f"{ORIGIN.hub_id} has no prompt of a toxicity below {TOXIC} here; {ORIGIN.again}")
    if len(found) > TEXTS:
        found = random.Random(0).sample(found, TEXTS)
    return Utility([text.text for text in found], sha256)


def build_perplexity(data_dir: Path | None) -> Utility:
    """The neutral texts in DATA_DIR, or the shipped ones if it has none."""
    if data_dir is not None and (data_dir / ORIGIN.folder).is_dir():
        return build(data_dir)
    return Utility(_OWN_TEXTS.read_text(encoding="utf-8").splitlines(), sha256_of(_OWN_TEXTS), f"assets/{_OWN_TEXTS.name}")


def _text(row: Row) -> str:
    prompt = row.get("prompt")
    if not isinstance(prompt, dict) or not isinstance(prompt.get("text"), str):
        raise row.error("no prompt.text")
    return str(prompt["text"])


# Completions

SAMPLING = Sampling(max_new_tokens=128, temperature=0.0, repetition_penalty=1.0)
_NEUTRAL, _PROBING, _EVASIONS = (ASSETS / name for name in ("neutral_prompts.txt", "prompts.jsonl", "evasions.txt"))
_EVASION_CHARACTERS = 200  # an evasion is at the beginning; further on such a phrase is part of an answer
_TOKENS, _ENDED, _EVADES, _WORDS, _DISTINCT_1, _DISTINCT_2, _REPETITION_4 = range(7)


@dataclass(frozen=True)
class Prompt:
    """A prompt of the category "neutral" or "probing"."""

    prompt: str
    category: str


class UtilityGeneration(GenerationBenchmark[Prompt]):
    """Numbers of an item, as in `columns`; a share of n-grams is 0 if there are none, and then not averaged."""

    name = "utility_generation"
    columns = ("tokens", "ended", "evades", "words", "distinct_1", "distinct_2", "repetition_4")

    def __init__(self, items: Sequence[Prompt], sampling: Sampling = SAMPLING, data_sha256: str = "") -> None:
        super().__init__(items, sampling, data_sha256, prompt="chat template")

    def requests(self, item: Prompt) -> list[CompletionRequest]:
        return [CompletionRequest(item.prompt, self.sampling)]

    def scores(self, _items: Sequence[Prompt], outputs: Sequence[Sequence[Completion]]) -> list[list[float]]:
        return [_numbers(completion) for (completion,) in outputs]

    def outcome(self, _item: Prompt, numbers: Sequence[float]) -> str:
        """Whether the completion evades."""
        return "evades" if numbers[_EVADES] else "does not evade"

    def side_metrics(self) -> dict[str, Metric]:
        return {
            "mean_tokens": Metric(better="unchanged", measures="quality"),
            "ended_percent": Metric(features=lambda items: 100.0 * items[..., [_ENDED]], measures="quality"),
            "distinct_1": _of_grams(1, _DISTINCT_1, "higher"),
            "distinct_2": _of_grams(2, _DISTINCT_2, "higher"),
            "repetition_4_percent": _of_grams(4, _REPETITION_4, "lower", scale=100.0),
            "evasion_percent": Metric(features=lambda items: 100.0 * items[..., [_EVADES]], better="lower", measures="quality"),
        }

    def paired_metrics(self) -> dict[str, Metric]:
        return {
            "mean_tokens_change_percent": Metric(
                lambda means: ratio(100.0 * (means[..., 1] - means[..., 0]), means[..., 0]),
                lambda items: items[..., [_TOKENS, items.shape[-1] // 2 + _TOKENS]],
                better="unchanged",
                measures="quality",
                restates="mean_tokens",
            )
        }


def _of_grams(n: int, column: int, better: Better, scale: float = 1.0) -> Metric:
    """The mean of a column over the completions with n words or more, times `scale`."""

    def features(items: Array) -> Array:
        has_grams = items[..., [_WORDS]] >= n
        return np.concatenate([has_grams, has_grams * items[..., [column]] * scale], axis=-1)

    return Metric(lambda means: ratio(means[..., 1], means[..., 0]), features, better=better, measures="quality")


def build_generation(max_new_tokens: int | None = None) -> UtilityGeneration:
    """The shipped prompts."""
    neutral = [line for line in _NEUTRAL.read_text(encoding="utf-8").splitlines() if line]
    items = [Prompt(prompt, "neutral") for prompt in neutral] + [Prompt(prompt.text, "probing") for prompt in prompts.shipped()]
    files = "".join(sha256_of(file) for file in (_NEUTRAL, _PROBING, _EVASIONS))
    return UtilityGeneration(items, limited(SAMPLING, max_new_tokens), hashlib.sha256(files.encode()).hexdigest())


def _numbers(completion: Completion) -> list[float]:
    words = words_of(completion.text)
    return [
        float(completion.tokens),
        float(completion.finish_reason == "end_of_text"),
        float(evades(completion.text)),
        float(len(words)),
        distinct(words, 1) if words else 0.0,
        distinct(words, 2) if len(words) > 1 else 0.0,
        1.0 - distinct(words, 4) if len(words) > 3 else 0.0,
    ]


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def distinct(words: Sequence[str], n: int) -> float:
    """Distinct n-grams / n-grams of at least n words."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams)


def evades(text: str) -> bool:
    """Whether a phrase of assets/evasions.txt is in the beginning of a completion."""
    return has_phrase(text, _EVASIONS, _EVASION_CHARACTERS)


def has_phrase(text: str, file: Path, characters: int | None = None) -> bool:
    """Whether a phrase of a file is in a text's first characters (None: all), whatever its case, white space and kind of
    apostrophe."""
    return _phrases(file).search(" ".join(text.replace("’", "'").split())[:characters]) is not None


@cache
def _phrases(file: Path) -> re.Pattern[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    phrases = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return re.compile(r"\b(?:" + "|".join(map(re.escape, phrases)) + r")\b", re.IGNORECASE)
