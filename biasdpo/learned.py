"""What training learned: how far an adapter moved each preference pair, and which pairs it still gets wrong.

With r(y) = log pi(y|x) - log pi_base(y|x), nats, which times beta is DPO's implicit reward (arXiv:2305.18290, section 5):

    margin          r(chosen) - r(rejected); the pair is right if it is above 0
    by length only  right, but r(chosen) per token is not above r(rejected) per token: the longer completion carries the margin
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any

import numpy as np

from biasdpo import rewards
from biasdpo.backends.base import Backend, Cancellation
from biasdpo.data.pairs import PreferencePair
from biasdpo.errors import plural
from biasdpo.evaluation import stats
from biasdpo.records import Likelihood, LikelihoodRequest

TRAINED, UNSEEN = "trained on", "not trained on"  # "": not known
FEWEST = 10  # pairs for an interval
_AT_ONCE = 16  # pairs; scoring stops between such batches
_BINS = 20
_SHOWN = 160  # characters


@dataclass(frozen=True)
class LearnedPair:
    """A pair with its margin in nats. `part`: TRAINED or UNSEEN; `source`: the file it is from."""

    pair: PreferencePair
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    source: str = ""
    part: str = ""

    @property
    def margin(self) -> float:
        return self.chosen - self.rejected

    @property
    def right(self) -> float:
        """1, 0, or 0.5 for a tie, as in `rewards.wins`."""
        return float(rewards.wins([self.margin])[0])

    @property
    def by_length_only(self) -> bool:
        return self.right == 1 and self.chosen / self.chosen_tokens <= self.rejected / self.rejected_tokens


def score_pairs(
    backend: Backend,
    pairs: Sequence[PreferencePair],
    *,
    system: str = "",
    strength: float = 1.0,
    cancellation: Cancellation | None = None,
) -> Iterator[LearnedPair]:
    """Each pair under the backend's adapter, in order. End-of-text counts, as in training."""
    for begin in range(0, len(pairs), _AT_ONCE):
        if cancellation is not None and cancellation.is_set():
            return
        part = pairs[begin : begin + _AT_ONCE]
        texts = [(pair.prompt, text) for pair in part for text in (pair.chosen, pair.rejected)]
        requests = [LikelihoodRequest(prompt, text, system, end_of_text=True) for prompt, text in texts]
        base = backend.loglikelihood(requests, "base")
        tuned = backend.loglikelihood(requests, "tuned", strength=strength)
        for i, pair in enumerate(part):
            yield _learned(pair, base[2 * i : 2 * i + 2], tuned[2 * i : 2 * i + 2])


def _learned(pair: PreferencePair, base: Sequence[Likelihood], tuned: Sequence[Likelihood]) -> LearnedPair:
    chosen, rejected = (after.logp - before.logp for before, after in zip(base, tuned, strict=True))
    return LearnedPair(pair, chosen, rejected, base[0].tokens, base[1].tokens)


def placed(found: Iterable[LearnedPair], sources: Sequence[str], trained: AbstractSet[str] | None) -> list[LearnedPair]:
    """With the source of each, and whether it is among the ids that the adapter was `trained` on (None: not known)."""

    def part(pair: PreferencePair) -> str:
        return "" if trained is None else TRAINED if pair.pair_id in trained else UNSEEN

    return [replace(one, source=source, part=part(one.pair)) for one, source in zip(found, sources, strict=False)]


# Summary


def summarize(found: Sequence[LearnedPair]) -> dict[str, Any]:
    """Numbers over all pairs and by part, source and category; a histogram of the margins, its edges shared by all parts."""
    if not found:
        return {"n": 0}
    edges = np.histogram_bin_edges([one.margin for one in found], bins=_BINS)
    groups: dict[str, Callable[[LearnedPair], str]] = {
        "by_part": lambda one: one.part or "not known",
        "by_source": lambda one: one.source,
        "by_category": lambda one: one.pair.category or "(none)",
    }
    summary = _numbers(found) | {"edges": edges.tolist()}
    for name, key in groups.items():
        values = sorted({key(one) for one in found})
        members = {value: [one for one in found if key(one) == value] for value in values}
        summary[name] = {
            value: _numbers(part) | {"histogram": np.histogram([one.margin for one in part], edges)[0].tolist()}
            for value, part in members.items()
        }
    return summary


def _numbers(found: Sequence[LearnedPair]) -> dict[str, Any]:
    """Accuracy with a 95% bootstrap interval (none for fewer than 10 pairs), mean margin, and the share right by length only."""
    items = np.array([[one.right, one.margin, one.by_length_only] for one in found], dtype=np.float64)
    value: dict[str, Any] = {"n": len(found), "accuracy": {"value": float(items[:, 0].mean())}}
    if len(found) >= FEWEST:
        value["accuracy"] = stats.bootstrap(items[:, :1], {"accuracy": stats.Metric()})["accuracy"].to_json()
    return value | {"margin_nats": float(items[:, 1].mean()), "by_length_only": float(items[:, 2].mean())}


def hardest(found: Iterable[LearnedPair]) -> list[LearnedPair]:
    """The lowest margin first: what the adapter still gets wrong, then what it hardly moved."""
    return sorted(found, key=lambda one: one.margin)


def lines(summary: Mapping[str, Any], shown: Iterable[LearnedPair]) -> Iterator[str]:
    """The summary and some pairs as text."""
    yield _line("all", summary) if summary["n"] else "No pairs were scored"
    for name in ("by_part", "by_source", "by_category"):
        groups = summary.get(name, {})
        for value, numbers in groups.items() if len(groups) > 1 else ():
            yield f"  {_line(value, numbers)}"
    for one in shown:
        yield f"{one.margin:+.2f} nats: {_short(one.pair.prompt)}\n  chosen    {_short(one.pair.chosen)}"
        yield f"  rejected  {_short(one.pair.rejected)}"


def _short(text: str) -> str:
    return shorten(text, _SHOWN, placeholder=" …")


def _line(name: str, numbers: Mapping[str, Any]) -> str:
    accuracy = numbers["accuracy"]
    interval = " [{:.2f}, {:.2f}]".format(*accuracy["ci95"]) if "ci95" in accuracy else ""
    told = f"{name}: {accuracy['value']:.2f}{interval} of {plural(numbers['n'], 'pair')} right"
    return f"{told}, mean margin {numbers['margin_nats']:+.2f} nats, {numbers['by_length_only']:.0%} by length only"


def to_json(one: LearnedPair) -> dict[str, Any]:
    """A pair as `learned --json` prints it."""
    pair = one.pair
    return {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "category": pair.category,
        "source": one.source,
        "part": one.part,
        "margin_nats": one.margin,
        "chosen_nats": one.chosen,
        "rejected_nats": one.rejected,
        "by_length_only": one.by_length_only,
    }
