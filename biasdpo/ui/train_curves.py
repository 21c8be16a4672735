"""What a run's charts show: metrics.jsonl and speed.jsonl as curves. Pure; they are drawn in `train_charts`."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from biasdpo.errors import ConfigError

Point = tuple[float, float]
Look = Literal["line", "faint", "dashed"]
Rows = Sequence[Mapping[str, Any]]

MOST_POINTS = 400  # of one curve: more than a screen has columns for
_SMOOTHED_FROM = 12  # points; a moving mean of fewer hides what there is


@dataclass(frozen=True)
class Curve:
    """One line. `colour`: a number from 0 of the page's own scale; `look`: faint for raw values under their mean."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    look: Look = "line"


@dataclass(frozen=True)
class Chart:
    """Curves over the optimizer's steps.

    unit     of the vertical axis, for people
    level    a named horizontal line, or None
    best     the step of the best evaluation, marked by a vertical line; None where there is none
    bounds   of the vertical axis; None: by the curves
    """

    id: str
    title: str
    unit: str
    curves: tuple[Curve, ...]
    level: tuple[str, float] | None = None
    best: int | None = None
    bounds: tuple[float, float] | None = None

    @property
    def empty(self) -> bool:
        return not any(curve.points for curve in self.curves)


def points(rows: Rows, key: str) -> tuple[Point, ...]:
    """The finite values of a key, by step."""
    return tuple(
        (float(row["step"]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key]) and isinstance(row.get("step"), int | float)
    )


def moving_mean(curve: Sequence[Point]) -> tuple[Point, ...]:
    """The mean of each point and those before it, a twentieth of the curve (at least five points) wide."""
    width = max(5, len(curve) // 20)
    smooth, total = [], 0.0
    for i, (step, value) in enumerate(curve):
        total += value - (curve[i - width][1] if i >= width else 0.0)
        smooth.append((step, total / min(i + 1, width)))
    return tuple(smooth)


def thinned(curve: Sequence[Point], most: int = MOST_POINTS) -> tuple[Point, ...]:
    """At most `most` points: the means of stretches of equal length. The first and the last point stay."""
    if len(curve) <= most:
        return tuple(curve)
    inner = curve[1:-1]
    count = most - 2
    bounds = [round(i * len(inner) / count) for i in range(count + 1)]
    means = []
    for low, high in itertools.pairwise(bounds):
        part = inner[low:high]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return (curve[0], *means, curve[-1])


def _train_and_held_out(rows: Rows, key: str) -> tuple[Curve, ...]:
    return (*_raw_and_mean("train", points(rows, key), 0), Curve("held-out", thinned(points(rows, f"eval_{key}")), 1, "dashed"))


def _raw_and_mean(name: str, raw: tuple[Point, ...], colour: int) -> tuple[Curve, ...]:
    if len(raw) < _SMOOTHED_FROM:
        return (Curve(name, raw, colour),)
    return (
        Curve(f"{name}, each", thinned(raw), colour, "faint"),
        Curve(f"{name}, moving mean", thinned(moving_mean(raw)), colour),
    )


def charts_of_run(metrics: Rows, speed: Rows, baseline: float | None, best: int | None) -> tuple[Chart, ...]:
    """A run's five charts. `baseline`: the accuracy of picking the longer completion, on the held-out pairs."""
    level = None if baseline is None else ("pick the longer", baseline)
    rates = _raw_and_mean("tokens/s", points(speed, "tokens_per_second"), 2)
    return (
        Chart("loss", "Loss", "nats", _train_and_held_out(metrics, "loss"), best=best),
        Chart("margins", "Reward margin", "nats", _train_and_held_out(metrics, "rewards/margins"), best=best),
        Chart(
            "accuracies",
            "Reward accuracy",
            "share of pairs",
            _train_and_held_out(metrics, "rewards/accuracies"),
            level=level,
            best=best,
            bounds=(0.0, 1.0),
        ),
        Chart("rate", "Learning rate", "per step", (Curve("learning rate", thinned(points(metrics, "learning_rate")), 3),)),
        Chart("speed", "Speed", "tokens/s", rates),
    )


_COMPARED = (
    ("loss", "Loss", "nats", "loss", None),
    ("margins", "Reward margin", "nats", "rewards/margins", None),
    ("accuracies", "Reward accuracy", "share of pairs", "rewards/accuracies", (0.0, 1.0)),
)


def charts_of_runs(runs: Iterable[tuple[str, Rows]]) -> tuple[Chart, ...]:
    """The curves of several runs in one chart each: held-out where a run was evaluated more than once, else the moving mean of
    training."""
    found = list(runs)
    charts = []
    for id_, title, unit, key, bounds in _COMPARED:
        curves = []
        for colour, (name, rows) in enumerate(found):
            held_out, train = points(rows, f"eval_{key}"), points(rows, key)
            if len(held_out) > 1:
                curves.append(Curve(f"{name}, held-out", thinned(held_out), colour, "dashed"))
            mean = moving_mean(train) if len(train) >= _SMOOTHED_FROM else train
            curves.append(Curve(f"{name}, train", thinned(mean), colour))
        charts.append(Chart(f"compare-{id_}", title, unit, tuple(curves), bounds=bounds))
    return tuple(charts)


_LOGGED = {
    "loss": ("loss", "eval_loss"),
    "margins": ("rewards/margins", "eval_rewards/margins"),
    "accuracies": ("rewards/accuracies", "eval_rewards/accuracies"),
}
_ALONE = {"rate": ("learning rate", "learning_rate"), "speed": ("tokens/s", "tokens_per_second")}


def logged_csv(chart: str, runs: Iterable[tuple[str, Rows, Rows]]) -> str:
    """What lies under a chart: every logged number, neither thinned nor averaged nor rounded, as lines of curve, step, value.

    `runs`: id, metrics, speed of each. ConfigError for a chart that does not exist.
    """
    name = chart.removeprefix("compare-")
    if name not in _LOGGED and (name not in _ALONE or name != chart):
        raise ConfigError(f"No chart is called {chart[:40]!r}: choose of {', '.join((*_LOGGED, *_ALONE))}")
    text = io.StringIO("curve,step,value\n")
    text.seek(0, io.SEEK_END)
    lines = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    for run_id, metrics, speed in runs:
        keys = dict(zip(("train", "held-out"), _LOGGED[name], strict=True)) if name in _LOGGED else dict([_ALONE[name]])
        for curve, key in keys.items():
            title = curve if name == chart else f"{run_id}, {curve}"
            lines.writerows((title, int(step), value) for step, value in points(speed if name == "speed" else metrics, key))
    return text.getvalue()
