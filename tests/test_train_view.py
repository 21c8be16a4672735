"""What the Train tab reads of runs and computes for its charts, without a browser."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from biasdpo.config import TrainConfig
from biasdpo.errors import ConfigError
from biasdpo.jobs import store
from biasdpo.ui import train
from biasdpo.ui.charts import charts_of_run, logged_csv, moving_mean, points, thinned
from biasdpo.ui.train import SeenRun, see
from biasdpo.workspace import Workspace
from tests.run_folders import metrics, probe, write_run


@pytest.fixture
def seen(tmp_path: Path) -> SeenRun:
    write_run(tmp_path, "first", status={"best_step": 30, "best_accuracy": 0.785})
    return see(store.find_job("first", Workspace(tmp_path), "train"))


def test_what_is_read_of_a_finished_run(seen):
    assert (seen.model, seen.data) == ("SmolLM2-135M-Instruct", "seed set")
    assert (seen.accuracy, seen.baseline) == (0.885, 0.615)
    assert seen.has_adapter
    assert not seen.active


def test_a_damaged_folder_shows_what_it_has(tmp_path):
    folder = write_run(tmp_path, "torn", "stopped", steps=3)
    folder.config.write_text("{")
    folder.record.write_text("")
    seen = see(store.find_job("torn", Workspace(tmp_path), "train"))
    assert (seen.config, seen.model, seen.started_at) == (None, "–", "")
    assert "step 3 of 40" in train.head(seen)
    assert "torn" in train.table([seen], "torn")
    assert train.details(seen)


def test_the_step_of_a_probe_that_is_shown_follows_the_latest_until_one_looks_back():
    rows = [row for step in (0, 20, 40) for row in probe(step)]
    assert train.step_shown(rows, None) == 40
    assert train.turned(rows, None, -1) == 20
    assert train.turned(rows, 20, -1) == 0
    assert train.turned(rows, 0, -1) == 0
    assert train.turned(rows, 20, 1) is None  # the latest, whatever follows
    assert train.step_shown(rows, 30) == 40  # gone after a resume
    assert train.step_shown([], None) is None
    assert "probe 2 of 3" in train.position(rows, 20)


def test_what_differs_between_configs():
    configs = {"a": TrainConfig(beta=0.1, rank=8), "b": TrainConfig(beta=0.3, rank=8)}
    assert train.differing(configs) == {"beta": {"a": 0.1, "b": 0.3}}


def test_a_run_that_held_nothing_out_has_no_command_to_measure_it(seen):
    assert "--benchmark preference" in train.evaluate_command(seen)
    unmeasured = replace(seen, held_out={})  # as under FSDP: there are held-out pairs, not scored at the end
    assert "--benchmark preference" in train.evaluate_command(unmeasured)
    nothing = replace(unmeasured, origin=seen.origin | {"held_out_longer_baseline": None})
    html = train.evaluate_command(nothing)
    assert "held no pairs out" in html
    assert "held-out share of 0.1" in html
    assert "--benchmark" not in html


# Curves


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
