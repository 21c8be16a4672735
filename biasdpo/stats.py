"""Intervals and paired tests over items, pure. Percentile bootstrap: Efron and Tibshirani, 1993, chapter 13."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Metric = Callable[[Array], Array]
"""Of items resampled, (R, N, K): the metric's value of each resample, (R,). K numbers belong to an item."""

RESAMPLES = 2000
_CHUNK = 100  # resamples computed at once, to bound memory


@dataclass(frozen=True)
class Interval:
    """A metric's value over all items and its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        return {"value": self.value, "ci95": [self.low, self.high]}


def mean_of(items: Array) -> Array:
    """The mean of the items' first number."""
    return np.asarray(items[..., 0].mean(axis=-1))


def bootstrap(items: Array, metric: Metric, *, seed: int = 0) -> tuple[Interval, Array]:
    """The metric over items (N, K), its 95 % percentile interval, and the resampled values (RESAMPLES,) themselves."""
    rng = np.random.default_rng(seed)
    n = len(items)
    values = [metric(items[rng.integers(0, n, size=(_CHUNK, n))]) for _ in range(RESAMPLES // _CHUNK)]
    resampled = np.concatenate(values)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(float(metric(items[None])[0]), float(low), float(high)), resampled


def two_sided_p(resampled_differences: Array) -> float:
    """Bootstrap p-value of "no difference": twice the smaller tail beyond 0, at least 1 / resamples, at most 1."""
    below = float((resampled_differences <= 0).mean())
    above = float((resampled_differences >= 0).mean())
    return min(1.0, max(2 * min(below, above), 1 / len(resampled_differences)))
