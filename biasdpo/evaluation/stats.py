"""Bootstrap intervals, paired randomization tests, and verdicts over items; pure functions of arrays.

interval   95% percentile bootstrap over items (Efron and Tibshirani, 1993, chapter 13), seeded; both sides of an item are
           resampled together
p-value    paired approximate randomization test of "both sides are the same" (Noreen, 1989): each item's sides swap with
           probability 1/2; p = (1 + resamples at least as far from the null as observed) / (1 + RESAMPLES)
table      Holm's step-down correction (Holm, 1979) over all p-values shown together

By hand, because a metric is a function of several averages: one set of resamples serves all metrics of a benchmark, which
`scipy.stats.bootstrap` and `permutation_test` can't do (one statistic a call), and SciPy has no Holm correction.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Name = TypeVar("Name", bound=Hashable)
Better = Literal["higher", "lower", "nearer", "unchanged"]
Measures = Literal["bias", "quality"]
Verdict = Literal["less biased", "better", "no clear difference", "worse"]

RESAMPLES = 10_000
ALPHA = 0.05
_CHUNK_NUMBERS = 4_000_000  # resampling weights held at once, which bounds memory for any number of items


@dataclass(frozen=True)
class Metric:
    """A function of averages over N items with K numbers each (2K for a metric of both sides, base's first).

    of_means   averages (..., F) to the metric (...); NaN where it is undefined
    features   item numbers (..., N, K) to what is averaged, (..., N, F)
    better     which direction is good; "nearer": toward `ideal`; "unchanged": any change is a cost
    ideal      for "nearer": the ideal value; for a metric of both sides: its value if the adapter changes nothing
    measures   bias, or quality (the quality cost of debiasing)
    exchanged  for a metric of both sides whose null hypothesis is not "base = tuned": an item's features after the swap
    restates   the metric this one expresses in other units; redundant metrics are excluded from the Holm correction
    """

    of_means: Callable[[Array], Array] = lambda means: means[..., 0]
    features: Callable[[Array], Array] = lambda items: items
    better: Better = "higher"
    ideal: float = 0.0
    measures: Measures = "bias"
    exchanged: Callable[[Array], Array] | None = None
    restates: str = ""

    def __call__(self, items: Array) -> Array:
        return self.of_means(self.features(items).mean(axis=-2))


def ratio(part: Array, whole: Array, *, undefined: float = np.nan) -> Array:
    """part / whole, elementwise; `undefined` where nothing is in the whole."""
    result: Array = np.divide(part, whole, out=np.full(np.shape(whole), undefined), where=np.asarray(whole) > 0)
    return result


@dataclass(frozen=True)
class Interval:
    """A metric's value over all items and its 95% interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        return {"value": self.value, "ci95": [self.low, self.high]}


def bootstrap(items: Array, metrics: Mapping[Name, Metric], *, seed: int = 0) -> dict[Name, Interval]:
    """Each metric over items (N, K) with its interval, all from the same resamples. A metric that is undefined over all items
    is left out; resamples in which a metric is undefined don't count toward its interval."""
    if not metrics:
        return {}
    features = {name: metric.features(items) for name, metric in metrics.items()}
    stacked = np.concatenate(list(features.values()), axis=1)
    resampled = np.concatenate([weights @ stacked / len(items) for weights in _resamples(len(items), seed)])
    ends = np.cumsum([part.shape[1] for part in features.values()])
    intervals = {}
    for (name, metric), columns in zip(metrics.items(), np.split(resampled, ends[:-1], axis=1), strict=True):
        values = metric.of_means(columns)
        value = float(metric.of_means(features[name].mean(axis=0)))
        defined = values[~np.isnan(values)]
        if not np.isnan(value) and len(defined):
            low, high = np.percentile(defined, [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)])
            intervals[name] = Interval(value, float(low), float(high))
    return intervals


def _resamples(n: int, seed: int) -> Iterator[Array]:
    """RESAMPLES rows of how often each of n items was drawn, in chunks (rows, n)."""
    rng = np.random.default_rng(seed)
    chunk = max(1, min(RESAMPLES, _CHUNK_NUMBERS // n))
    for begin in range(0, RESAMPLES, chunk):
        rows = min(chunk, RESAMPLES - begin)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


# Two sides of the same items: numbers (N, 2K), base's first


def of_side(metric: Metric, side: int) -> Metric:
    """The metric of base (0) or tuned (1)."""
    return Metric(metric.of_means, lambda items: metric.features(np.split(items, 2, axis=-1)[side]))


def difference(metric: Metric) -> Metric:
    """Tuned minus base."""
    return _of_both(metric, lambda base, tuned: tuned - base)


def improvement(metric: Metric) -> Metric:
    """How much better tuned is than base: positive is good. For "nearer": how much nearer to the ideal."""
    if metric.better == "nearer":
        return _of_both(metric, lambda base, tuned: np.abs(base - metric.ideal) - np.abs(tuned - metric.ideal))
    sign = 1.0 if metric.better == "higher" else -1.0
    return _of_both(metric, lambda base, tuned: sign * (tuned - base))


def _of_both(metric: Metric, change: Callable[[Array, Array], Array]) -> Metric:
    def features(items: Array) -> Array:
        base, tuned = np.split(items, 2, axis=-1)
        return np.concatenate([metric.features(base), metric.features(tuned)], axis=-1)

    def of_means(means: Array) -> Array:
        base, tuned = np.split(means, 2, axis=-1)
        return np.asarray(change(metric.of_means(base), metric.of_means(tuned)))

    return Metric(of_means, features)


def randomization_p(both: Array, metrics: Mapping[Name, Metric], *, seed: int = 0) -> dict[Name, float]:
    """p-values of metrics of both sides, items (N, 2K); each metric's `ideal` is its value under the null hypothesis."""
    if not metrics:
        return {}
    base, tuned = np.split(both, 2, axis=1)
    swapped = np.concatenate([tuned, base], axis=1)
    observed = {name: metric.features(both) for name, metric in metrics.items()}
    after = {name: m.features(swapped) if m.exchanged is None else m.exchanged(both) for name, m in metrics.items()}
    change = np.concatenate([after[name] - observed[name] for name in metrics], axis=1)
    start = np.concatenate([part.mean(axis=0) for part in observed.values()])
    rng = np.random.default_rng(seed)
    n, chunk = len(both), max(1, _CHUNK_NUMBERS // len(both))
    rows = [min(chunk, RESAMPLES - begin) for begin in range(0, RESAMPLES, chunk)]
    means = np.concatenate([start + rng.integers(0, 2, size=(r, n)).astype(np.float64) @ change / n for r in rows])
    ends = np.cumsum([part.shape[1] for part in observed.values()])
    p_values = {}
    for (name, metric), columns in zip(metrics.items(), np.split(means, ends[:-1], axis=1), strict=True):
        distance = abs(float(metric.of_means(observed[name].mean(axis=0))) - metric.ideal)
        distances = np.abs(metric.of_means(columns) - metric.ideal)
        as_far = int((distances >= distance - 1e-9 * max(1.0, distance)).sum())  # equal up to rounding counts as far
        p_values[name] = (1 + as_far) / (1 + RESAMPLES)
    return p_values


# A table of metrics


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order: the k-th smallest of m times (m - k + 1), never below a smaller one's."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def verdict(measures: Measures, improved: Interval, p_holm: float) -> Verdict:
    """The outcome in words. Good news must be clear (the whole interval is on the good side) and survive the correction; for bad
    news a clear interval is enough. `improved`: how much better tuned is, positive is good."""
    if improved.low > 0 and p_holm <= ALPHA:
        return "less biased" if measures == "bias" else "better"
    return "worse" if improved.high < 0 else "no clear difference"
