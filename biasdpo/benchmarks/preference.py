"""Preference pairs held out from training: does the model rank the less biased completion higher?

reward_accuracy              share of pairs with (log pi/pi_ref of chosen) > (the same of rejected), DPO's own measure
                             (arXiv:2305.18290, section 6). Needs both sides
logratio_margin_nats         mean of that difference, nats; times beta it is the reward margin
length_normalised_accuracy   share with logp(chosen) / tokens > logp(rejected) / tokens under one side alone, so that length is
                             no handicap; the end-of-text token counts
pick_the_longer_baseline     accuracy of choosing the completion with more characters (a tie counts half)
lead_over_the_longer         reward_accuracy minus that baseline, on the same pairs: an adapter that only learned to write more
                             has no lead. For its p-value the adapter's choice and the longer completion are swapped
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from biasdpo import rewards
from biasdpo.benchmarks.base import LikelihoodBenchmark
from biasdpo.data.pairs import PreferencePair, longer_baseline
from biasdpo.evaluation.stats import Array, Metric
from biasdpo.records import Likelihood, LikelihoodRequest, Request

_CHOSEN, _REJECTED, _CHOSEN_TOKENS, _REJECTED_TOKENS, _LONGER = range(5)


class Preference(LikelihoodBenchmark[PreferencePair]):
    """Numbers of an item: logp of chosen and rejected, their token counts, and whether picking the longer completion is right
    (1, 0, or 0.5 for a tie)."""

    name = "preference"
    columns = ("logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected", "longer_is_chosen")

    def __init__(self, pairs: Sequence[PreferencePair], data_sha256: str = "", source: str = "pairs") -> None:
        """`source`: what the pairs are, e.g. "seed pairs"."""
        super().__init__(pairs, data_sha256)
        self.pairs_source = f"{len(pairs):,} {source.replace('pairs', 'pair', 1) if len(pairs) == 1 else source}"

    def requests(self, item: PreferencePair) -> list[Request]:
        return [LikelihoodRequest(item.prompt, text, end_of_text=True) for text in (item.chosen, item.rejected)]

    def scores(self, item: PreferencePair, outputs: Sequence[Likelihood]) -> list[float]:
        chosen, rejected = outputs
        return [chosen.logp, rejected.logp, chosen.tokens, rejected.tokens, _longer_is_chosen([item])]

    def describe(self, item: PreferencePair) -> dict[str, str]:
        return {"prompt": item.prompt, "chosen": item.chosen, "rejected": item.rejected, "category": item.category}

    def outcome(self, _item: PreferencePair, numbers: Sequence[float]) -> str:
        """The completion with the higher logp per token, as `length_normalised_accuracy` counts it."""
        return "prefers chosen" if _length_normalised(np.array(numbers))[0] else "prefers rejected"

    def side_metrics(self) -> dict[str, Metric]:
        return {"length_normalised_accuracy": Metric(features=_length_normalised)}

    def paired_metrics(self) -> dict[str, Metric]:
        return {
            "reward_accuracy": Metric(features=_log_ratio_is_higher, ideal=0.5),
            "logratio_margin_nats": Metric(features=_log_ratio_difference),
            "lead_over_the_longer": Metric(features=_lead_over_the_longer, exchanged=lambda items: -_lead_over_the_longer(items)),
        }

    def report(self, items: Sequence[PreferencePair], _numbers: Array) -> dict[str, float]:
        return {"pick_the_longer_baseline": _longer_is_chosen(items)}


def _longer_is_chosen(pairs: Sequence[PreferencePair]) -> float:
    baseline = longer_baseline(pairs)
    return float("nan") if baseline is None else baseline


def _length_normalised(items: Array) -> Array:
    chosen = items[..., _CHOSEN] / items[..., _CHOSEN_TOKENS]
    rejected = items[..., _REJECTED] / items[..., _REJECTED_TOKENS]
    return np.asarray(chosen > rejected, dtype=np.float64)[..., None]


def _log_ratio_difference(items: Array) -> Array:
    base, tuned = np.split(items, 2, axis=-1)
    chosen = tuned[..., _CHOSEN] - base[..., _CHOSEN]
    return np.asarray(chosen - (tuned[..., _REJECTED] - base[..., _REJECTED]))[..., None]


def _log_ratio_is_higher(items: Array) -> Array:
    return rewards.wins(_log_ratio_difference(items))


def _lead_over_the_longer(items: Array) -> Array:
    return _log_ratio_is_higher(items) - items[..., [_LONGER]]
