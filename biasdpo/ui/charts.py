"""One metric by category and group, base and tuned side by side with their intervals; and the plane of bias and fluency."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from biasdpo.errors import ConfigError
from biasdpo.evaluation.results import Ci, CurvePoint, TableRow, group_table, table
from biasdpo.ui.components import (
    CLASSES,
    SYMBOLS,
    benchmark_title,
    decimals,
    direction,
    headline,
    interval,
    metric_title,
    number,
    of_row,
)

# Train curves


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


# Train charts


WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34  # the frame's margins, in the drawing's units

_CORNERS = (
    '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M2 6V2h4M10 2h4v4M14 10v4h-4M6 14H2v-4" fill="none" '
    'stroke="currentColor" stroke-width="1.6"/></svg>'
)


def charts(drawn: Iterable[Chart], none_yet: str, run_ids: Sequence[str]) -> str:
    """All charts of these runs that have a point, or a line where none has."""
    figures = "".join(figure(chart) for chart in drawn if not chart.empty)
    if not figures:
        return f'<div class="bd-note">{escape(none_yet)}</div>'
    return f'<div class="bd-curves" data-runs="{escape(json.dumps(list(run_ids)))}">{figures}</div>'


def figure(chart: Chart) -> str:
    """One chart with its title, legend and buttons."""
    shown = [curve for curve in chart.curves if curve.points]
    legend = "".join(
        f'<span class="bd-key bd-c{curve.colour % 6} bd-key-{curve.look}"><i aria-hidden="true"></i>{escape(curve.name)}</span>'
        for curve in shown
        if curve.look != "faint"
    )
    if chart.level is not None:
        legend += f'<span class="bd-key bd-key-level"><i aria-hidden="true"></i>{escape(chart.level[0])}</span>'
    if chart.best is not None:
        legend += f'<span class="bd-key bd-key-best"><i aria-hidden="true"></i>best: step {chart.best:,}</span>'
    buttons = "".join(
        f'<button type="button" data-curve="{what}" data-focus="{escape(chart.id)}-{what}" title="{label}" '
        f'aria-label="{escape(chart.title)}: {label}">{text}</button>'
        for what, text, label in (
            ("full", _CORNERS, "fill the screen"),
            ("svg", "SVG", "save as a picture"),
            ("csv", "CSV", "save the numbers"),
        )
    )
    return (
        f'<figure class="bd-curve" data-name="{escape(chart.id)}" data-curves="{escape(_data(chart))}">'
        f"<figcaption><b>{escape(chart.title)}</b> <span>{escape(chart.unit)}</span>"
        f'<span class="bd-curve-buttons">{buttons}</span></figcaption>{svg(chart)}'
        f'<div class="bd-legend">{legend}</div><div class="bd-tip" hidden></div></figure>'
    )


def svg(chart: Chart) -> str:
    """The drawing. Its description says in words where each curve has come to."""
    shown = [curve for curve in chart.curves if curve.points]
    xs = [x for curve in shown for x, _ in curve.points]
    ys = [y for curve in shown for _, y in curve.points] + ([] if chart.level is None else [chart.level[1]])
    x_low, x_high = min(xs), max(xs)
    x_high = x_high if x_high > x_low else x_low + 1
    y_ticks = ticks(*(chart.bounds or (min(ys), max(ys))))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(point: Point) -> tuple[float, float]:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = []
    for tick in y_ticks:
        y = at((x_low, tick))[1]
        parts.append(f'<line class="bd-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4}" text-anchor="end">{escape(_label(tick, y_ticks))}</text>')
    x_ticks = [tick for tick in ticks(x_low, x_high, 6) if x_low <= tick <= x_high and float(tick).is_integer()]
    for tick in x_ticks:
        x = at((tick, y_low))[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>')
    if chart.level is not None:
        y = at((x_low, chart.level[1]))[1]
        parts.append(f'<line class="bd-level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    if chart.best is not None and x_low <= chart.best <= x_high:
        x = at((chart.best, y_low))[0]
        parts.append(f'<line class="bd-best" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts += [_drawn(curve, [at(point) for point in curve.points]) for curve in shown]
    parts.append(f'<line class="bd-cross" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>')
    frame = f'data-x="{x_low:g} {x_high:g}" data-frame="{LEFT} {WIDTH - RIGHT}"'
    return (
        f'<svg class="bd-plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" data-focus="{escape(chart.id)}" {frame} '
        f'aria-label="{escape(described(chart))}">{"".join(parts)}</svg>'
    )


def _drawn(curve: Curve, at: list[tuple[float, float]]) -> str:
    kind = f'class="bd-line bd-c{curve.colour % 6} bd-{curve.look}"'
    if len(at) == 1:
        return f'<circle {kind} cx="{at[0][0]}" cy="{at[0][1]}" r="3.5"/>'
    line = " ".join(f"{x:g},{y:g}" for x, y in at)
    dots = ""
    if curve.look == "dashed" and len(at) <= 30:
        dots = "".join(f'<circle {kind} cx="{x:g}" cy="{y:g}" r="2.6"/>' for x, y in at)
    return f'<polyline {kind} points="{line}"/>{dots}'


def described(chart: Chart) -> str:
    """The chart in words: each curve's first and last value."""
    said = []
    for curve in chart.curves:
        if curve.points and curve.look != "faint":
            (first, before), (last, after) = curve.points[0], curve.points[-1]
            said.append(f"{curve.name} {before:.3g} at step {first:g}, {after:.3g} at step {last:g}")
    if chart.level is not None:
        said.append(f"{chart.level[0]} {chart.level[1]:.3g}")
    if chart.best is not None:
        said.append(f"best step {chart.best}")
    return f"{chart.title} ({chart.unit}): {'; '.join(said)}. Arrow keys read values."


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose low and high, about `count` of them."""
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def _label(tick: float, every: list[float]) -> str:
    """A tick's text, with as many decimals as tell it from its neighbour."""
    step = every[1] - every[0]
    largest = max(abs(every[0]), abs(every[-1]))
    if largest < 1e-2 or largest >= 1e6:
        digits = max(0, math.floor(math.log10(abs(tick)) + 1e-9) - math.floor(math.log10(step) + 1e-9)) if tick else 0
        return f"{tick:.{digits}e}".replace("e-0", "e-").replace("e+0", "e") if tick else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{tick:,.{decimals}f}".replace("-", "−")


def _data(chart: Chart) -> str:
    """What the cross-hair shows: each curve's points, to five digits."""
    curves = [
        {"name": curve.name, "colour": curve.colour % 6, "points": [[x, float(f"{y:.5g}")] for x, y in curve.points]}
        for curve in chart.curves
        if curve.points
    ]
    return json.dumps(curves, ensure_ascii=False, separators=(",", ":"))


# Evaluate forest


MOST_UNITS = 5.0  # of the axis to either side; what lies beyond is marked at the edge

Labelled = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Mark:
    """One improvement, in its metric's unit; `unit`: what it is divided by, 0 where nothing is known of it."""

    label: str
    colour: int
    row: TableRow
    value: float
    low: float
    high: float
    unit: float

    @property
    def at(self) -> tuple[float, float, float]:
        """Low, value and high in units of the axis."""
        return self.low / self.unit, self.value / self.unit, self.high / self.unit


def forest(results: Sequence[Labelled], why_not: Mapping[str, str] | None = None) -> str:
    """One result, or several against each other; a line where there is nothing to draw. `why_not`: by benchmark, why the results
    must not be set side by side, where they must not."""
    found = marks(results)
    drawn = [mark for mark in found if mark.unit > 0]
    if not drawn:
        return '<div class="bd-note">No differences to draw: without an adapter base stands alone.</div>'
    span = min(max(max(abs(end) for mark in drawn for end in mark.at), 1.0), MOST_UNITS)
    several = len(results) > 1
    body = "".join(_rows(found, span, several, why_not or {}))
    marks_at = [tick for tick in ticks(-span, span, 6) if -span <= tick <= span]
    axis = "".join(f'<i style="left: {_percent(tick, span):.2f}%">{_tick(tick)}</i>' for tick in marks_at)
    legend = ""
    if several:
        keys = (
            f'<span class="bd-key bd-c{i % 6}"><i aria-hidden="true"></i>{escape(label)}</span>'
            for i, (label, _) in enumerate(results)
        )
        legend = f'<div class="bd-legend">{"".join(keys)}</div>'
    return (
        f'<figure class="bd-forest">{legend}<table><thead><tr><th scope="col">Metric</th><th scope="col">'
        '<span class="bd-forest-ends"><span>← worse</span><span>better →</span></span></th>'
        f'<th scope="col">Difference, tuned − base [95 %]</th></tr></thead><tbody>{body}</tbody>'
        f'<tfoot><tr><td></td><td><div class="bd-forest-axis" aria-hidden="true">{axis}</div></td><td></td></tr></tfoot></table>'
        "<figcaption>To the right: an improvement, whatever way the metric counts. One unit of the axis is half the width of "
        "base’s own 95&nbsp;% interval (of a metric that needs both sides: of its own); the bar is the 95&nbsp;% interval of "
        "the paired difference. The numbers are in the metric’s unit.</figcaption></figure>"
    )


def marks(results: Sequence[Labelled]) -> list[Mark]:
    """Metric by metric, in each the results in their order, without what only restates another metric. A metric's unit is that of
    the first result that has it."""
    by_metric: dict[tuple[str, str], list[Mark]] = {}
    for colour, (label, result) in enumerate(results):
        for row in table(result):
            entry = entry_of(result, row)
            improved = entry.get("improvement") if entry else None
            if not isinstance(improved, Mapping) or entry.get("restates"):
                continue
            value, (low, high) = float(improved["value"]), improved["ci95"]
            others = by_metric.setdefault((row.benchmark, row.metric), [])
            unit = others[0].unit if others else unit_of(row.base_ci, (low, high))
            others.append(Mark(label, colour, row, value, float(low), float(high), unit))
    return [mark for found in by_metric.values() for mark in found]


def entry_of(result: Mapping[str, Any], row: TableRow) -> Mapping[str, Any]:
    """What the result holds of the difference of a row; {} where it has none."""
    found = result["benchmarks"][row.benchmark]
    entry = found.get("difference", {}).get(row.metric) or found.get("paired", {}).get(row.metric)
    return entry if isinstance(entry, Mapping) else {}


def unit_of(base_ci: Ci | None, improvement_ci: Ci) -> float:
    """Half the width of base's interval, else of the improvement's own; 0 where both are points."""
    for ci in (base_ci, improvement_ci):
        if ci is not None and math.isfinite(ci[1] - ci[0]) and ci[1] > ci[0]:
            return (ci[1] - ci[0]) / 2
    return 0.0


def _rows(found: Sequence[Mark], span: float, several: bool, why_not: Mapping[str, str]) -> Iterator[str]:
    benchmark = metric = ""
    for mark in found:
        row = mark.row
        if row.benchmark != benchmark:
            benchmark, metric = row.benchmark, ""
            why = why_not.get(benchmark)
            told = f' <span class="bd-not-comparable">not side by side: {escape(why)}</span>' if why else ""
            title = escape(benchmark_title(benchmark))
            yield f'<tr class="bd-forest-head"><th colspan="3" scope="colgroup">{title}{told}</th></tr>'
        if several and row.metric != metric:
            metric = row.metric
            yield f'<tr class="bd-forest-metric"><th colspan="3">{_metric(row)}</th></tr>'
        name = f'<span class="bd-c{mark.colour % 6} bd-key"><i></i>{escape(mark.label)}</span>' if several else _metric(row)
        yield (
            f'<tr class="bd-is-{CLASSES.get(row.verdict, "open")}"><th scope="row">{name}</th>'
            f"<td>{_forest_drawn(mark, span)}</td><td>{change(row)} {verdict(row.verdict)}</td></tr>"
        )


def change(row: TableRow) -> str:
    """The difference with its interval; of a metric of both sides its value, and which one means no change."""
    digits, signed = of_row(row), row.no_change == 0
    told = f"<b>{number(row.difference, digits, signed=signed)}</b> <small>{interval(row.ci, digits, signed=signed)}</small>"
    return told if signed else f"{told} <small>no change: {row.no_change:g}</small>"


def _metric(row: TableRow) -> str:
    return f'{escape(metric_title(row.metric))} <small class="bd-way">{escape(direction(row.better))}</small>'


def _forest_drawn(mark: Mark, span: float) -> str:
    """The cell's drawing, which says nothing to a screen reader that the numbers beside it do not."""
    zero = '<i class="bd-zero"></i>'
    if mark.unit <= 0:
        return f'<div class="bd-forest-cell" aria-hidden="true">{zero}</div>'
    low, value, high = mark.at
    left, right = (_percent(min(max(end, -span), span), span) for end in (low, high))
    ends = ("bd-beyond-left " if low < -span else "") + ("bd-beyond-right" if high > span else "")
    bar = ""
    if low <= span and high >= -span:
        bar = f'<i class="bd-forest-ci {ends}" style="left: {left:.2f}%; width: {max(right - left, 0.0):.2f}%"></i>'
    at = _percent(min(max(value, -span), span), span)
    off = ' class="bd-off-left"' if value < -span else ' class="bd-off-right"' if value > span else ""
    point = f'<b{off} style="left: {at:.2f}%"></b>'
    return f'<div class="bd-forest-cell" aria-hidden="true">{zero}{bar}{point}</div>'


def verdict(word: str) -> str:
    """A verdict in words, with its symbol and colour; "" where there is none."""
    if not word:
        return ""
    symbol = f'<span aria-hidden="true">{SYMBOLS.get(word, "")}</span>'
    return f'<span class="bd-verdict-word bd-is-{CLASSES.get(word, "open")}">{symbol} {escape(word)}</span>'


def _percent(at: float, span: float) -> float:
    """A place on the axis from -span to span; a little is kept free at the edges."""
    return 4 + 92 * (at + span) / (2 * span)


def _tick(tick: float) -> str:
    return f"{tick:g}".replace("-", "−")


# Evaluate bars


_MOST_GROUPS = 40
_WIDTH, _HEIGHT = 640, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 18, 46


def grouped(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, "benchmark/metric") of what can be shown by group, each benchmark's headline first."""
    choices = []
    for name in result["benchmarks"]:
        metrics = list(dict.fromkeys(row.metric for row in group_table(result, name) if row.base is not None))
        first = headline(name, metrics)
        for metric in sorted(metrics, key=lambda metric: metric != first):
            choices.append((f"{benchmark_title(name)} · {metric_title(metric)}", f"{name}/{metric}"))
    return choices


def bars(result: Mapping[str, Any], benchmark: str, metric: str) -> str:
    """The whole, then its groups."""
    whole = [row for row in table(result) if (row.benchmark, row.metric) == (benchmark, metric)]
    groups = [row for row in group_table(result, benchmark) if row.metric == metric]
    rows = [row for row in (*whole, *groups) if row.base is not None]
    if not rows:
        return '<div class="bd-note">Nothing of this metric by group.</div>'
    ideal = _ideal(rows[0].better)
    ends = [end for row in rows for ci in (row.base_ci, row.tuned_ci) for end in (ci or ())]
    ends += [value for row in rows for value in (row.base, row.tuned) if value is not None]
    scale = ticks(min([0.0, *ends]), max([0.0, *ends] + ([] if ideal is None else [ideal])))
    low, high = scale[0], scale[-1]
    body = "".join(_row(row, low, high, ideal) for row in rows[:_MOST_GROUPS])
    more = f'<p class="bd-measured-at">And {len(rows) - _MOST_GROUPS:,} groups more: the CSV has them all.</p>'
    legend = '<span class="bd-key bd-key-base"><i></i>base</span>'
    if any(row.tuned is not None for row in rows):
        legend += '<span class="bd-key bd-key-tuned"><i></i>tuned</span>'
    legend += '<span class="bd-key bd-key-whisker"><i></i>95 % interval</span>'
    if ideal is not None:
        legend += f'<span class="bd-key bd-key-level"><i></i>ideal: {ideal:g}</span>'
    title = f"{benchmark_title(benchmark)}: {metric_title(metric)}"
    axis = (
        f"<span>{number(low, 1)}</span><span>{number(high, 1)}</span>"
        if high > 2
        else f"<span>{low:g}</span><span>{high:g}</span>"
    )
    return (
        f'<figure class="bd-groups" aria-label="{escape(title)}"><figcaption>{escape(title)} <small>'
        f"{escape(direction(rows[0].better))}; few items make wide intervals</small></figcaption>"
        f'<div class="bd-legend">{legend}</div>'
        '<table><thead class="bd-unseen"><tr><th scope="col">Group</th><th scope="col">Drawn</th><th scope="col">Base, tuned</th>'
        f'</tr></thead><tbody>{body}</tbody><tfoot aria-hidden="true"><tr><td></td><td>'
        f'<div class="bd-groups-axis">{axis}</div></td>'
        f"<td></td></tr></tfoot></table>{more if len(rows) > _MOST_GROUPS else ''}</figure>"
    )


def _ideal(better: str) -> float | None:
    return float(better.removeprefix("nearer ")) if better.startswith("nearer ") else None


def _row(row: TableRow, low: float, high: float, ideal: float | None) -> str:
    digits = of_row(row)
    name = f"<b>{escape(row.group)}</b>" if row.group else "<b>all</b>"
    sides = [("base", row.base, row.base_ci)] + ([("tuned", row.tuned, row.tuned_ci)] if row.tuned is not None else [])
    drawn = "".join(_bar(side, value or 0.0, ci, low, high, ideal) for side, value, ci in sides)
    told = "".join(
        f'<span class="bd-of-{side}"><span class="bd-unseen">{side} </span><b>{number(value, digits)}</b> '
        f"<small>{interval(ci, digits)}</small></span>"
        for side, value, ci in sides
    )
    cls = "" if row.group else ' class="bd-whole"'
    return (
        f'<tr{cls}><th scope="row">{name} <small>{row.n:,} items</small></th><td><div class="bd-groups-cell" aria-hidden="true">'
        f"{drawn}</div></td><td>{told}{verdict(row.verdict if row.verdict != 'no clear difference' else '')}</td></tr>"
    )


def _bar(side: str, value: float, ci: Ci | None, low: float, high: float, ideal: float | None) -> str:
    def at(number: float) -> float:
        return 100 * (number - low) / (high - low)

    zero, end = at(0.0), at(value)
    parts = [f'<i class="bd-fill" style="left: {min(zero, end):.2f}%; width: {abs(end - zero):.2f}%"></i>']
    if ci is not None:
        parts.append(f'<i class="bd-whisker" style="left: {at(ci[0]):.2f}%; width: {at(ci[1]) - at(ci[0]):.2f}%"></i>')
    if ideal is not None:
        parts.append(f'<i class="bd-ideal" style="left: {at(ideal):.2f}%"></i>')
    return f'<div class="bd-of-{side}">{"".join(parts)}</div>'


# The plane


def plane(points: Sequence[CurvePoint], benchmark: str, metric: str, better: str) -> str:
    """A metric by strength against the change of perplexity: how much bias goes for how much fluency."""
    title = f"{benchmark_title(benchmark)}: {metric_title(metric)}"
    placed = changes(points)
    if len(placed) < 2:
        return '<div class="bd-note">No curve: it needs perplexity and two strengths or more that were scored to the end.</div>'
    described = "; ".join(f"strength {p.strength:g}: {p.value:.3g} at {x:+.2f} % perplexity" for x, p in placed)
    buttons = "".join(
        f'<button type="button" data-curve="{what}" aria-label="{escape(title)}: {label}" title="{label}">{text}</button>'
        for what, text, label in (("full", "Full", "fill the screen"), ("svg", "SVG", "save as a picture"))
    )
    digits = decimals(*(p.value for p in points))
    rows = "".join(
        f'<tr><th scope="row">{p.strength:g}</th><td>{number(p.value, digits)} <small>{interval(p.value_ci, digits)}</small></td>'
        f"<td>{number(p.perplexity, 2)}</td><td>{number(x, 2, signed=True)} %</td></tr>"
        for x, p in placed
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Strength", metric_title(metric), "Perplexity", "Change"))
    return (
        f'<figure class="bd-curve bd-plane" data-name="{escape(benchmark)}-{escape(metric)}-plane"><figcaption>'
        f"<b>{escape(title)}</b> <span>against perplexity, by the adapter’s strength; {escape(direction(better))}</span>"
        f'<span class="bd-curve-buttons">{buttons}</span></figcaption>{_svg(placed, better, f"{title}: {described}")}'
        '<div class="bd-tip" hidden></div></figure>'
        f'<div class="bd-scroll"><table class="bd-table"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def changes(points: Sequence[CurvePoint]) -> list[tuple[float, CurvePoint]]:
    """Each point with its change of perplexity against the first (base), per cent; those without perplexity are left out."""
    known = [point for point in points if point.perplexity]
    if not known or not known[0].perplexity:
        return []
    base = known[0].perplexity
    return [(100 * ((point.perplexity or base) / base - 1), point) for point in known]


def _svg(placed: Sequence[tuple[float, CurvePoint]], better: str, described: str) -> str:
    ideal = _ideal(better)
    ys = [end for _, point in placed for end in (*point.value_ci, point.value)] + ([] if ideal is None else [ideal])
    x_ticks, y_ticks = ticks(min(0.0, *(x for x, _ in placed)), max(x for x, _ in placed)), ticks(min(ys), max(ys))
    (x_low, x_high), (y_low, y_high) = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = []
    for tick in y_ticks:
        y = at(x_low, tick)[1]
        parts.append(f'<line class="bd-grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{_tick(tick)}</text>')
    for tick in x_ticks:
        x = at(tick, y_low)[0]
        parts.append(f'<line class="bd-grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        sign = "+" if tick > 0 else ""
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{sign}{_tick(tick)} %</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">change of perplexity</text>')
    if ideal is not None:
        y = at(x_low, ideal)[1]
        parts.append(f'<line class="bd-level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{y - 5}" text-anchor="end">ideal</text>')
    for x, point in placed:
        (px, low), (_, high) = at(x, point.value_ci[0]), at(x, point.value_ci[1])
        parts.append(f'<line class="bd-line bd-c0 bd-faint" x1="{px}" x2="{px}" y1="{low}" y2="{high}"/>')
    line = " ".join("{:g},{:g}".format(*at(x, point.value)) for x, point in placed)
    parts.append(f'<polyline class="bd-line bd-c0" points="{line}"/>')
    for i, (x, point) in enumerate(placed):
        px, py = at(x, point.value)
        side, dx = ("end", -8) if px > _WIDTH - _RIGHT - 70 else ("start", 8)
        name = "base" if point.strength == 0 else f"{point.strength:g}"
        parts.append(f'<circle class="bd-line bd-c0" cx="{px}" cy="{py}" r="{5 if point.strength == 1 else 4}"/>')
        dy = -9 if _falls(placed, i) else 18  # beside the line, not on it
        parts.append(f'<text class="bd-point" x="{px + dx}" y="{py + dy}" text-anchor="{side}">{name}</text>')
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(described)}"'
    return f'<svg class="bd-plot" {box}>{"".join(parts)}</svg>'


def _falls(placed: Sequence[tuple[float, CurvePoint]], i: int) -> bool:
    """Whether the line goes down after the point, as the page shows it; after the last: before it."""
    at = min(i, len(placed) - 2)
    return placed[at + 1][1].value <= placed[at][1].value
