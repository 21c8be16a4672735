"""Preference pairs held out from training: does the model rank the less biased completion higher?

reward_accuracy              share of pairs with (log pi/pi_ref of chosen) > (the same of rejected); DPO's own measure
                             (arXiv:2305.18290, section 6). Base against itself has none: it is a paired metric
logratio_margin_nats         mean of that difference, nats; times beta it is the reward margin
length_normalised_accuracy   share with logp(chosen) / tokens > logp(rejected) / tokens under one side alone, so that a
                             longer completion is no handicap; end-of-text counts as a token
pick_the_longer_baseline     the accuracy of choosing the completion with more characters (ties count half)
lead_over_the_longer         reward_accuracy less that baseline, on the same pairs: an adapter that only learned to write more has
                             no lead. Its p-value lets the adapter's answer and the longer completion change places
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from biasdpo.data.pairs import PreferencePair, longer_baseline
from biasdpo.evaluation.stats import Array, Metric
from biasdpo.records import Likelihood, LikelihoodRequest, Request

_CHOSEN, _REJECTED, _CHOSEN_TOKENS, _REJECTED_TOKENS, _LONGER = range(5)


class Preference:
    """See the module's docstring. Numbers of an item: logp chosen, logp rejected, their token counts, and whether picking the
    longer completion is right (1, 0, or 0.5 where neither is longer)."""

    name = "preference"
    columns: Sequence[str] = ("logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected", "longer_is_chosen")

    def __init__(self, pairs: Sequence[PreferencePair], data_sha256: str = "") -> None:
        self.items = pairs
        self.data_sha256 = data_sha256

    def requests(self, item: PreferencePair) -> list[Request]:
        return [LikelihoodRequest(item.prompt, text, end_of_text=True) for text in (item.chosen, item.rejected)]

    def scores(self, item: PreferencePair, outputs: Sequence[Likelihood]) -> list[float]:
        chosen, rejected = outputs
        return [chosen.logp, rejected.logp, chosen.tokens, rejected.tokens, longer_baseline([item]) or 0.0]

    def describe(self, item: PreferencePair) -> dict[str, str]:
        return {"prompt": item.prompt, "chosen": item.chosen, "rejected": item.rejected, "category": item.category}

    def outcome(self, _item: PreferencePair, numbers: Sequence[float]) -> str:
        """The completion that is likelier a token, as `length_normalised_accuracy` counts it."""
        return "prefers chosen" if _length_normalised(np.array(numbers))[0] else "prefers rejected"

    def groups(self, item: PreferencePair) -> list[str]:
        return [item.category] if item.category else []

    def side_metrics(self) -> dict[str, Metric]:
        return {"length_normalised_accuracy": Metric(features=_length_normalised)}

    def paired_metrics(self) -> dict[str, Metric]:
        return {
            "reward_accuracy": Metric(features=_log_ratio_is_higher, ideal=0.5),
            "logratio_margin_nats": Metric(features=_log_ratio_difference),
            "lead_over_the_longer": Metric(features=_lead_over_the_longer, exchanged=lambda items: -_lead_over_the_longer(items)),
        }

    def report(self, items: Sequence[PreferencePair], _numbers: Array) -> dict[str, float]:
        return {"pick_the_longer_baseline": longer_baseline(items) or 0.0}


def _length_normalised(items: Array) -> Array:
    chosen = items[..., _CHOSEN] / items[..., _CHOSEN_TOKENS]
    rejected = items[..., _REJECTED] / items[..., _REJECTED_TOKENS]
    return np.asarray(chosen > rejected, dtype=np.float64)[..., None]


def _log_ratio_difference(items: Array) -> Array:
    base, tuned = np.split(items, 2, axis=-1)
    chosen = tuned[..., _CHOSEN] - base[..., _CHOSEN]
    return np.asarray(chosen - (tuned[..., _REJECTED] - base[..., _REJECTED]))[..., None]


def _log_ratio_is_higher(items: Array) -> Array:
    return np.asarray(_log_ratio_difference(items) > 0, dtype=np.float64)


def _lead_over_the_longer(items: Array) -> Array:
    return _log_ratio_is_higher(items) - items[..., [_LONGER]]
