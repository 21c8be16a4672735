"""Curves and charts of runs: pure functions, with the arithmetic to be seen."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html import unescape

import pytest

from biasdpo.errors import ConfigError
from biasdpo.ui import charts as train_charts
from biasdpo.ui.charts import Chart, Curve, charts_of_run, charts_of_runs, logged_csv, moving_mean, points, thinned
from tests.run_folders import metrics


def test_points_are_the_finite_numbers_of_a_key():
    rows = [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": math.nan},
        {"step": 3, "eval_loss": 0.4},
        {"step": 4, "loss": 1},
        {"loss": 2},
    ]
    assert points(rows, "loss") == ((1.0, 0.5), (4.0, 1.0))
    assert points(rows, "eval_loss") == ((3.0, 0.4),)


def test_moving_mean_of_the_last_five():
    curve = [(float(i), float(i)) for i in range(1, 8)]
    assert [y for _, y in moving_mean(curve)] == [1, 1.5, 2, 2.5, 3, 4, 5]  # (1+…+5)/5 = 3, (2+…+6)/5 = 4, (3+…+7)/5 = 5


def test_a_long_curve_is_thinned_to_means_and_keeps_its_ends():
    curve = [(float(i), float(i % 2)) for i in range(10_001)]
    thin = thinned(curve, 102)
    assert len(thin) == 102
    assert (thin[0], thin[-1]) == (curve[0], curve[-1])
    assert all(0.45 < y < 0.55 for _, y in thin[1:-1])  # of about a hundred 0s and 1s in turn
    assert thinned(curve[:50]) == tuple(curve[:50])


def test_a_runs_charts_have_train_held_out_baseline_and_best_step():
    loss, margins, accuracies, rate, speed = charts_of_run(metrics(40, 40, 1e-4), [], 0.615, 30)
    assert [curve.name for curve in loss.curves] == ["train, each", "train, moving mean", "held-out"]
    assert [x for x, _ in loss.curves[2].points] == [10, 20, 30, 40]
    assert margins.curves[2].points[-1] == (40, pytest.approx(1.1))
    assert accuracies.level == ("pick the longer", 0.615)
    assert accuracies.bounds == (0, 1)
    assert {chart.best for chart in (loss, margins, accuracies)} == {30}
    assert rate.best is None
    assert speed.empty
    short = charts_of_run(metrics(3, 40, 1e-4), [], None, None)
    assert [curve.name for curve in short[0].curves] == ["train", "held-out"]  # three points have no moving mean


def test_the_csv_has_the_logged_numbers_however_long_the_curve():
    rows = [{"step": step, "loss": 1 / step, "eval_loss": 0.1 if step % 1000 == 0 else None} for step in range(1, 2001)]
    assert len(charts_of_run(rows, [], None, None)[0].curves[0].points) == 400  # what is drawn
    lines = logged_csv("loss", [("a", rows, [])]).splitlines()
    assert lines[0] == "curve,step,value"
    assert lines[3] == '"train",3,0.3333333333333333'
    assert len(lines) == 1 + 2000 + 2
    assert lines[-1] == '"held-out",2000,0.1'
    both = logged_csv("compare-loss", [("a", rows[:2], []), ("b", rows[:1], [])]).splitlines()
    assert both[1:] == ['"a, train",1,1.0', '"a, train",2,0.5', '"b, train",1,1.0']
    assert logged_csv("speed", [("a", [], [{"step": 1, "tokens_per_second": 800}])]).splitlines()[1:] == ['"tokens/s",1,800.0']
    for no_chart in ("../loss", "compare-rate"):
        with pytest.raises(ConfigError, match="No chart is called"):
            logged_csv(no_chart, [])


def test_runs_compared_have_a_colour_each():
    charts = charts_of_runs([("a", metrics(40, 40, 1e-4)), ("b", metrics(9, 40, 1e-4))])
    assert [(curve.name, curve.colour) for curve in charts[0].curves] == [("a, held-out", 0), ("a, train", 0), ("b, train", 1)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.31, 0.69, [0.3, 0.4, 0.5, 0.6, 0.7]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (0, 1e-4, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        (5, 5, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
    made = train_charts.ticks(low, high)
    assert made == pytest.approx(expected)


def test_a_chart_is_drawn_where_its_numbers_say():
    chart = Chart("x", "X", "nats", (Curve("train", ((0.0, 0.0), (10.0, 1.0))),), ("level", 0.5), 5, (0.0, 1.0))
    drawn = ElementTree.fromstring(train_charts.svg(chart))
    line = drawn.find("polyline").get("points")  # type: ignore[union-attr]
    left, right = train_charts.LEFT, train_charts.WIDTH - train_charts.RIGHT
    top, bottom = train_charts.TOP, train_charts.HEIGHT - train_charts.BOTTOM
    assert line == f"{left},{bottom} {right},{top}"  # from the lower left corner to the upper right one
    level = next(e for e in drawn.iter("line") if e.get("class") == "bd-level")
    assert float(level.get("y1")) == pytest.approx((top + bottom) / 2, abs=0.1)
    best = next(e for e in drawn.iter("line") if e.get("class") == "bd-best")
    assert float(best.get("x1")) == pytest.approx((left + right) / 2, abs=0.1)
    assert drawn.get("aria-label") == (
        "X (nats): train 0 at step 0, 1 at step 10; level 0.5; best step 5. Arrow keys read values."
    )


def test_one_point_is_a_dot_and_none_is_a_note():
    one = Chart("x", "X", "", (Curve("train", ((3.0, 0.7),)),))
    assert "<circle" in train_charts.svg(one)
    assert "polyline" not in train_charts.svg(one)
    assert train_charts.charts([Chart("x", "X", "", (Curve("train", ()),))], "nothing <yet>", ["a"]) == (
        '<div class="bd-note">nothing &lt;yet&gt;</div>'
    )


def test_names_of_others_never_become_markup():
    evil = '"><script>alert(1)</script>'
    html = train_charts.figure(Chart("x", "X", "", (Curve(evil, ((0.0, 1.0), (1.0, 2.0))),)))
    assert "<script" not in html
    data = re.search(r'data-curves="([^"]*)"', html)
    assert data is not None
    assert json.loads(unescape(data[1]))[0]["name"] == evil


def test_tick_labels_tell_neighbours_apart():
    rate = Chart("r", "R", "", (Curve("rate", ((0.0, 0.0), (1.0, 1e-4))),))
    texts = [element.text for element in ElementTree.fromstring(train_charts.svg(rate)).iter("text")]
    assert texts[:6] == ["0", "2e-5", "4e-5", "6e-5", "8e-5", "1.0e-4"]
    margins = Chart("m", "M", "", (Curve("m", ((0.0, -0.5), (1.0, 1.0))),))
    texts = [element.text for element in ElementTree.fromstring(train_charts.svg(margins)).iter("text")]
    assert texts[:4] == ["−0.5", "0.0", "0.5", "1.0"]
