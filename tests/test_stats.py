"""Intervals, paired tests, corrections and verdicts, against textbook values and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from biasdpo.evaluation import stats
from biasdpo.evaluation.stats import Interval, Metric

MEAN = Metric()
RATIO = Metric(of_means=lambda means: stats.ratio(means[..., 0], means[..., 1]))


def bootstrap(items: np.ndarray, metric: Metric = MEAN, **options: int) -> Interval:
    return stats.bootstrap(items, {"m": metric}, **options)["m"]


def randomization_p(both: np.ndarray, metric: Metric) -> float:
    return stats.randomization_p(both, {"m": metric})["m"]


def test_the_interval_of_a_mean_is_the_textbook_one():
    items = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
    interval = bootstrap(items)
    half_width = 1.96 * items.std() / math.sqrt(400)
    assert interval.value == pytest.approx(items.mean())
    assert interval.high - interval.value == pytest.approx(half_width, rel=0.08)
    assert interval.value - interval.low == pytest.approx(half_width, rel=0.08)
    assert bootstrap(items) == interval  # the same seed, the same interval
    assert bootstrap(items, seed=1) != interval


def test_a_share_has_the_binomial_interval():
    interval = bootstrap(np.array([[1.0]] * 30 + [[0.0]] * 70))
    # Binomial(100, 0.3) / 100: 2.5 % and 97.5 % quantiles are 0.21 and 0.39
    assert (interval.value, interval.low, interval.high) == (pytest.approx(0.3), pytest.approx(0.21), pytest.approx(0.39))


def test_a_ratio_is_of_sums_and_undefined_resamples_do_not_count():
    assert RATIO(np.array([[1.0, 2.0], [3.0, 2.0]])) == pytest.approx(4 / 4)
    # A quarter of the resamples draws the second item twice, whose ratio is undefined.
    interval = bootstrap(np.array([[1.0, 1.0], [0.0, 0.0]]), RATIO)
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)
    assert stats.bootstrap(np.zeros((3, 2)), {"undefined": RATIO, "mean": MEAN}).keys() == {"mean"}


def test_many_items_in_little_memory_give_the_same_interval(monkeypatch):
    items = np.random.default_rng(0).normal(size=(50, 1))
    whole = bootstrap(items)
    monkeypatch.setattr(stats, "_CHUNK_NUMBERS", 50 * 7)  # seven resamples at once, and a last few
    in_chunks = bootstrap(items)
    assert (in_chunks.low, in_chunks.high) == (pytest.approx(whole.low), pytest.approx(whole.high))


def test_both_sides_are_resampled_together():
    base = np.random.default_rng(2).normal(0.0, 10.0, size=(100, 1))
    both = np.concatenate([base, base + 0.5], axis=1)  # every item half a point higher: no noise in the difference
    interval = bootstrap(both, stats.difference(MEAN))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def test_improvement_knows_what_is_good():
    both = np.array([[60.0, 45.0]])  # from 60 to 45
    assert stats.difference(MEAN)(both) == -15
    assert stats.improvement(Metric(better="higher"))(both) == -15
    assert stats.improvement(Metric(better="lower"))(both) == 15
    assert stats.improvement(Metric(better="nearer", ideal=50))(both) == 5  # |60 - 50| - |45 - 50|
    assert stats.improvement(Metric(better="nearer"))(both) == 15  # |60| - |45|


def test_randomization_p_is_the_exact_paired_test():
    # Five items change, all for the better, so 2 of 2^5 swaps are as far from no change: 1/16, as McNemar's exact test says.
    change = stats.difference(MEAN)
    assert randomization_p(np.array([[0.0, 1.0]] * 5 + [[1.0, 1.0]] * 15), change) == pytest.approx(1 / 16, abs=0.01)
    # As many for the better as for the worse: every swap is as far.
    assert randomization_p(np.array([[0.0, 1.0], [1.0, 0.0]] * 4), change) == 1.0
    # A metric of both sides has its own value for no change.
    wins = Metric(features=lambda items: (items[:, 1:] > items[:, :1]).astype(float), ideal=0.5)
    assert randomization_p(np.array([[0.0, 1.0]] * 5), wins) == pytest.approx(1 / 16, abs=0.01)
    # The smallest possible p is not zero.
    assert randomization_p(np.array([[0.0, 1.0]] * 200), change) == 1 / (stats.RESAMPLES + 1)


def test_p_values_are_calibrated():
    """If nothing has changed, p <= 0.05 in about 5 of 100 tries."""
    rng = np.random.default_rng(3)
    tries = [randomization_p(rng.normal(size=(40, 2)), stats.difference(MEAN)) for _ in range(200)]
    assert 0.01 <= np.mean(np.array(tries) <= 0.05) <= 0.10


def test_holm_by_hand():
    # Sorted: 0.01 x 4, 0.015 x 3 = 0.045, 0.03 x 2 = 0.06, 0.04 x 1 = 0.04, which may not be below its predecessor.
    assert stats.holm([0.03, 0.01, 0.04, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]  # 0.6 x 2 is no probability
    assert stats.holm([]) == []


@pytest.mark.parametrize(
    ("measures", "low", "high", "p_holm", "expected"),
    [
        ("bias", 0.1, 2.0, 0.01, "less biased"),
        ("quality", 0.1, 2.0, 0.01, "better"),
        ("bias", 0.1, 2.0, 0.06, "no clear difference"),  # clear alone, but not in this table
        ("bias", -0.1, 2.0, 0.01, "no clear difference"),
        ("bias", -2.0, -0.1, 1.0, "worse"),  # bad news needs no correction
        ("quality", -2.0, -0.1, 0.001, "worse"),
        ("bias", 0.0, 0.0, 1.0, "no clear difference"),
    ],
)
def test_verdicts(measures, low, high, p_holm, expected):
    assert stats.verdict(measures, Interval((low + high) / 2, low, high), p_holm) == expected
