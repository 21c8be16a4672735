"""Intervals, paired tests, corrections and verdicts, against textbook values and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from biasdpo.evaluation import stats
from biasdpo.evaluation.stats import Interval, Metric

RATIO = Metric(of_means=lambda means: means[..., 0] / means[..., 1])


def test_the_interval_of_a_mean_is_the_textbook_one():
    items = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
    interval, resampled = stats.bootstrap(items, stats.mean_of)
    half_width = 1.96 * items.std() / math.sqrt(400)
    assert interval.value == pytest.approx(items.mean())
    assert interval.high - interval.value == pytest.approx(half_width, rel=0.08)
    assert interval.value - interval.low == pytest.approx(half_width, rel=0.08)
    assert stats.bootstrap(items, stats.mean_of)[0] == interval  # the same seed, the same interval
    assert stats.bootstrap(items, stats.mean_of, seed=1)[0] != interval
    assert stats.two_sided_p(resampled) == 1 / stats.RESAMPLES  # far from zero: the smallest p that it can give
    assert stats.two_sided_p(resampled - resampled.mean()) > 0.5


def test_a_share_has_the_binomial_interval():
    items = np.array([[1.0]] * 30 + [[0.0]] * 70)
    interval, _ = stats.bootstrap(items, stats.mean_of)
    # Binomial(100, 0.3) / 100: 2.5 % and 97.5 % quantiles are 0.21 and 0.39
    assert (interval.value, interval.low, interval.high) == (pytest.approx(0.3), pytest.approx(0.21), pytest.approx(0.39))


def test_a_ratio_is_one_of_sums_and_undefined_resamples_say_nothing():
    items = np.array([[1.0, 2.0], [3.0, 2.0]])
    assert RATIO(items) == pytest.approx(4 / 4)
    half = Metric(of_means=lambda m: np.where(m[..., 1] > 0, m[..., 0] / np.where(m[..., 1] > 0, m[..., 1], 1), np.nan))
    interval, resampled = stats.bootstrap(np.array([[1.0, 1.0], [0.0, 0.0]]), half)
    # A quarter of the resamples draws the second item twice, which has nothing to divide by.
    assert np.isnan(resampled).mean() == pytest.approx(0.25, abs=0.02)
    assert (interval.low, interval.high) == (1.0, 1.0)
    nothing, _ = stats.bootstrap(np.zeros((3, 2)), half)
    assert math.isnan(nothing.value)


def test_many_items_in_little_memory_give_the_same_interval(monkeypatch):
    items = np.random.default_rng(0).normal(size=(50, 1))
    whole = stats.bootstrap(items, stats.mean_of)[0]
    monkeypatch.setattr(stats, "_CHUNK_NUMBERS", 50 * 7)  # seven resamples at once, and a last few
    in_parts, resampled = stats.bootstrap(items, stats.mean_of)
    assert len(resampled) == stats.RESAMPLES
    assert (in_parts.low, in_parts.high) == (pytest.approx(whole.low), pytest.approx(whole.high))


def test_both_sides_are_resampled_together():
    base = np.random.default_rng(2).normal(0.0, 10.0, size=(100, 1))
    both = np.concatenate([base, base + 0.5], axis=1)  # every item half a point higher: no noise in the difference
    interval, _ = stats.bootstrap(both, stats.difference(stats.mean_of))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def test_improvement_knows_what_is_good():
    both = np.array([[60.0, 45.0]])  # from 60 to 45
    assert stats.difference(stats.mean_of)(both) == -15
    assert stats.improvement(Metric(better="higher"))(both) == -15
    assert stats.improvement(Metric(better="lower"))(both) == 15
    assert stats.improvement(Metric(better="nearer", ideal=50))(both) == 5  # |60 - 50| - |45 - 50|
    assert stats.improvement(Metric(better="nearer"))(both) == 15  # |60| - |45|


def test_randomization_p_is_the_exact_paired_test():
    # Five items change, all for the better, so 2 of 2^5 tosses are as far from no change: 1/16, as McNemar's exact test says.
    both = np.array([[0.0, 1.0]] * 5 + [[1.0, 1.0]] * 15)
    p = stats.randomization_p(both, {"m": stats.difference(stats.mean_of)})["m"]
    assert p == pytest.approx(1 / 16, abs=0.01)
    # As many for the better as for the worse: every toss is as far.
    balanced = np.array([[0.0, 1.0], [1.0, 0.0]] * 4)
    assert stats.randomization_p(balanced, {"m": stats.difference(stats.mean_of)})["m"] == 1.0
    # A metric of both sides has its own value of no change.
    wins = Metric(features=lambda items: (items[:, 1:] > items[:, :1]).astype(float), ideal=0.5)
    assert stats.randomization_p(np.array([[0.0, 1.0]] * 5), {"m": wins})["m"] == pytest.approx(1 / 16, abs=0.01)
    # The smallest that can be had is not zero.
    clear = np.array([[0.0, 1.0]] * 200)
    assert stats.randomization_p(clear, {"m": stats.difference(stats.mean_of)})["m"] == 1 / (stats.RESAMPLES + 1)


def test_p_values_are_true_to_their_name():
    """Where nothing has changed, p <= 0.05 in about 5 of 100 tries."""
    rng = np.random.default_rng(3)
    tries = [stats.randomization_p(rng.normal(size=(40, 2)), {"m": stats.difference(stats.mean_of)})["m"] for _ in range(200)]
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


def test_base_may_have_reached_the_ideal_already():
    nearer = Metric(better="nearer", ideal=50)
    assert stats.includes_ideal(nearer, Interval(52, 48, 56))
    assert not stats.includes_ideal(nearer, Interval(56, 52, 60))
    assert not stats.includes_ideal(Metric(), Interval(0, -1, 1))  # "higher" has no ideal
