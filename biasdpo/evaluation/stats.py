"""Intervals, paired tests and verdicts over items, pure.

interval   percentile bootstrap over items (Efron and Tibshirani, 1993, chapter 13): 95 %, seeded, both sides of a pair resampled
           together
p-value    of "the two sides are one": paired approximate randomization (Noreen, 1989): the sides of each item change places
           by the toss of a coin; p = (1 + as far from the null as seen, or farther) / (1 + RESAMPLES)
table      Holm's step-down correction (Holm, 1979) of all p-values that are shown together"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Better = Literal["higher", "lower", "nearer", "unchanged"]
Measures = Literal["bias", "quality"]
Verdict = Literal["less biased", "better", "no clear difference", "worse"]

RESAMPLES = 10_000
ALPHA = 0.05
_CHUNK_NUMBERS = 4_000_000  # of a resample's weights at once: bounds memory, however many items there are


def first(means: Array) -> Array:
    """The first of an item's numbers, averaged."""
    return np.asarray(means[..., 0])


def as_they_are(items: Array) -> Array:
    """An item's own numbers are what is averaged."""
    return items


@dataclass(frozen=True)
class Metric:
    """A figure that is a function of averages over items: N of K numbers each (2K where it needs both sides, base's first).

    features   (..., N, K) to what is averaged, (..., N, F): one item at a time, or with weights that the whole set gives
    of_means   the averages (..., F) to the metric (...); not a number where it is undefined
    better     which way is good; "nearer": to `ideal`; "unchanged": neither way, any change is a price
    ideal      of "nearer"; for a metric of both sides: its value where the adapter changes nothing
    measures   bias, or quality: the price of debiasing
    exchanged  of a metric of both sides that sets tuned against something else than base: an item's features after both have
               changed places (None: after base and tuned have)
    restates   of a metric of both sides: the one whose difference it puts in other words ("12 % more"), so that it is no second
               question in a table of p-values
    """

    of_means: Callable[[Array], Array] = first
    features: Callable[[Array], Array] = as_they_are
    better: Better = "higher"
    ideal: float = 0.0
    measures: Measures = "bias"
    exchanged: Callable[[Array], Array] | None = None
    restates: str = ""

    def __call__(self, items: Array) -> Array:
        return self.of_means(self.features(items).mean(axis=-2))


mean_of = Metric()
"""The mean of the items' first number."""


@dataclass(frozen=True)
class Interval:
    """A metric's value over all items and its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        return {"value": self.value, "ci95": [self.low, self.high]}


def bootstrap(items: Array, metric: Metric, *, seed: int = 0) -> tuple[Interval, Array]:
    """The metric over items (N, K), its 95 % interval, and the resampled values (RESAMPLES,) themselves."""
    return bootstrap_all(items, {"": metric}, seed=seed)[""]


def bootstrap_all(items: Array, metrics: Mapping[str, Metric], *, seed: int = 0) -> dict[str, tuple[Interval, Array]]:
    """Each metric over items (N, K) as `bootstrap` gives it, all from the same resamples. Resamples in which a metric is
    undefined say nothing about it; where it is undefined over all items, its interval is of no numbers."""
    if not metrics:
        return {}
    features = {name: metric.features(items) for name, metric in metrics.items()}
    stacked = np.concatenate(list(features.values()), axis=1)
    resampled = np.concatenate([weights @ stacked / len(items) for weights in _resamples(len(items), seed)])
    ends = np.cumsum([part.shape[1] for part in features.values()])
    results = {}
    for (name, metric), columns in zip(metrics.items(), np.split(resampled, ends[:-1], axis=1), strict=True):
        values = metric.of_means(columns)
        value = float(metric.of_means(features[name].mean(axis=0)))
        defined = values[~np.isnan(values)]
        if np.isnan(value) or not len(defined):
            results[name] = (Interval(float("nan"), float("nan"), float("nan")), values)
        else:
            low, high = np.percentile(defined, [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)])
            results[name] = (Interval(value, float(low), float(high)), values)
    return results


def _resamples(n: int, seed: int) -> Iterator[Array]:
    """RESAMPLES rows of how often each of n items was drawn, (some, n) at a time."""
    rng = np.random.default_rng(seed)
    some = max(1, min(RESAMPLES, _CHUNK_NUMBERS // n))
    for begin in range(0, RESAMPLES, some):
        rows = min(some, RESAMPLES - begin)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def two_sided_p(resampled_differences: Array) -> float:
    """Bootstrap p-value of "no difference": twice the smaller tail beyond 0, at least 1 / resamples, at most 1."""
    below = float((resampled_differences <= 0).mean())
    above = float((resampled_differences >= 0).mean())
    return min(1.0, max(2 * min(below, above), 1 / len(resampled_differences)))


# Two sides of the same items


def difference(metric: Metric) -> Metric:
    """Tuned minus base, of items (N, 2K)."""
    return _of_both(metric, lambda base, tuned: tuned - base)


def of_base(metric: Metric) -> Metric:
    """The metric of base, of items (N, 2K)."""
    return Metric(metric.of_means, lambda items: metric.features(items[..., : items.shape[-1] // 2]))


def of_tuned(metric: Metric) -> Metric:
    """The metric of tuned, of items (N, 2K)."""
    return Metric(metric.of_means, lambda items: metric.features(items[..., items.shape[-1] // 2 :]))


def improvement(metric: Metric) -> Metric:
    """How much better tuned is than base, of items (N, 2K): positive is good. For "nearer": how much nearer to the ideal."""
    if metric.better == "nearer":
        return _of_both(metric, lambda base, tuned: np.abs(base - metric.ideal) - np.abs(tuned - metric.ideal))
    sign = 1.0 if metric.better == "higher" else -1.0
    return _of_both(metric, lambda base, tuned: sign * (tuned - base))


def _of_both(metric: Metric, change: Callable[[Array, Array], Array]) -> Metric:
    def features(items: Array) -> Array:
        width = items.shape[-1] // 2
        return np.concatenate([metric.features(items[..., :width]), metric.features(items[..., width:])], axis=-1)

    def of_means(means: Array) -> Array:
        width = means.shape[-1] // 2
        return np.asarray(change(metric.of_means(means[..., :width]), metric.of_means(means[..., width:])))

    return Metric(of_means, features)


def randomization_p(both: Array, metrics: Mapping[str, Metric], *, seed: int = 0) -> dict[str, float]:
    """p-values of metrics of both sides, items (N, 2K), each against its `ideal` as the value where the sides are one."""
    if not metrics:
        return {}
    width = both.shape[1] // 2
    swapped = np.concatenate([both[:, width:], both[:, :width]], axis=1)
    as_is = {name: metric.features(both) for name, metric in metrics.items()}
    after = {name: m.features(swapped) if m.exchanged is None else m.exchanged(both) for name, m in metrics.items()}
    change = np.concatenate([after[name] - as_is[name] for name in metrics], axis=1)
    start = np.concatenate([part.mean(axis=0) for part in as_is.values()])
    rng = np.random.default_rng(seed)
    n, some = len(both), max(1, _CHUNK_NUMBERS // len(both))
    rows = [min(some, RESAMPLES - begin) for begin in range(0, RESAMPLES, some)]
    means = np.concatenate([start + rng.integers(0, 2, size=(r, n)).astype(np.float64) @ change / n for r in rows])
    ends = np.cumsum([part.shape[1] for part in as_is.values()])
    p_values = {}
    for (name, metric), columns in zip(metrics.items(), np.split(means, ends[:-1], axis=1), strict=True):
        seen = abs(float(metric.of_means(as_is[name].mean(axis=0))) - metric.ideal)
        distances = np.abs(metric.of_means(columns) - metric.ideal)
        as_far = int((distances >= seen - 1e-9 * max(1.0, seen)).sum())  # equal but for rounding is as far
        p_values[name] = (1 + as_far) / (1 + RESAMPLES)
    return p_values


# A table


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: of m, the k-th smallest times (m - k + 1), never below a smaller one's."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def verdict(measures: Measures, improved: Interval, p_holm: float) -> Verdict:
    """In words. To be good news a change must be clear (interval on the good side) and survive the correction of the table; to
    be bad news, a clear one is enough.

    improved   how much better tuned is, as `improvement` gives it
    """
    if improved.low > 0 and p_holm <= ALPHA:
        return "less biased" if measures == "bias" else "better"
    return "worse" if improved.high < 0 else "no clear difference"


def includes_ideal(metric: Metric, of_base: Interval) -> bool:
    """Whether one side's interval holds the ideal already, so that there is nothing left to show."""
    return metric.better == "nearer" and of_base.low <= metric.ideal <= of_base.high
