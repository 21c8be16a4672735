"""Charts, with plotly. Colors follow the page's theme: `themed` leaves text and background to it."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas

from biasdpo.benchmarks.titles import benchmark_title, metric_title
from biasdpo.data.health import wilson
from biasdpo.evaluation.report import figure
from biasdpo.evaluation.results import CurvePoint, TableRow, entry_of, table

BASE, TUNED, WARN = "#64748b", "#0d9488", "#d97706"
"""Colors of base, tuned, and what needs attention."""
SERIES = (TUNED, "#8b5cf6", WARN, "#db2777", "#3b82f6", "#65a30d")
"""Colors of runs or evaluations side by side, in this order; with 3:1 contrast on light and dark, as all colors here."""


def themed(figure: Any, *, height: int = 260) -> Any:
    """Give a plotly figure the page's look: transparent and compact."""
    figure.update_layout(
        height=height,
        template={},  # plotly's own is most of a figure, and costs the page CPU whenever a chart is drawn again
        margin={"l": 12, "r": 12, "t": 32, "b": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#64748b"},
        hovermode="x unified",
        modebar={"bgcolor": "rgba(0,0,0,0)", "remove": ["select", "lasso"]},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(gridcolor="rgba(127,127,127,0.35)", zeroline=False, automargin=True, title_standoff=6)
    return figure


# Curves of training runs


@dataclass(frozen=True)
class Metric:
    """One chart of a run. `keys`: of metrics.jsonl, by the name of their curve."""

    title: str
    unit: str
    keys: dict[str, str]
    bounds: tuple[float, float] | None = None


TRAINING = {
    "accuracy": Metric("Reward accuracy", "Share of pairs", {"": "rewards/accuracies"}, (0, 1.02)),
    "margin": Metric("Reward margin", "Nats", {"": "rewards/margins"}),
    "loss": Metric("Loss", "Nats", {"": "loss"}),
    "kl": Metric(
        "KL to the base model", "Nats", {"plain text": "text_kl", "counterfactual": "counterfactual_kl", "ending": "ending_kl"}
    ),
}
_MAX_POINTS = 400  # of one curve: more than a screen has columns for
_LINE: dict[str, Any] = {"line": {"color": BASE, "dash": "dash", "width": 1.5}, "showlegend": True}
_SMOOTHED_FROM = 12  # points; a moving mean of fewer hides what there is

Rows = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]


def training_chart(name: str, runs: Mapping[str, Rows], *, pairs: int = 0, longer: float | None = None) -> Any:
    """One metric of one run, or of several, over the optimizer's steps; None where nothing was logged.

    runs     lines of metrics.jsonl by run id
    pairs    held-out pairs of the one run: its held-out accuracies get 95% intervals
    longer   accuracy of always choosing the longer completion, drawn as a line
    """
    import plotly.graph_objects as go

    metric, figure = TRAINING[name], go.Figure()
    colors = itertools.cycle(SERIES)
    for run_id, rows in runs.items():
        for label, key in metric.keys.items():
            color = next(colors)
            words = [run_id] * (len(runs) > 1) + [label] * bool(label)
            train, held_out = points(rows, key), points(rows, f"eval_{key}")
            if len(train) >= _SMOOTHED_FROM:
                if len(runs) == 1:
                    figure.add_scatter(**_xy(thinned(train)), line_color=color, opacity=0.4, showlegend=False, hoverinfo="skip")
                train = moving_mean(train)
            if train:
                figure.add_scatter(**_xy(thinned(train)), name=", ".join([*words, "training"]), line_color=color)
            if held_out:
                ends = [wilson(y * pairs, pairs) if name == "accuracy" and pairs else None for _, y in held_out]
                look: dict[str, Any] = {"line": {"color": color if len(runs) > 1 else WARN, "dash": "dot"}}
                look |= {"name": ", ".join([*words, "held-out"]), "mode": "lines+markers"}
                figure.add_scatter(**_xy(held_out) | look, error_y=_error([y for _, y in held_out], ends))
    if not figure.data:
        return None
    if longer is not None and name == "accuracy":
        figure.add_hline(longer, name="always choosing the longer completion", **_LINE)
    figure.update_layout(title={"text": metric.title, "font_size": 13, "x": 0.02}, uirevision=name, showlegend=True)
    figure.update_xaxes(title_text="Step")
    figure.update_yaxes(title_text=metric.unit, range=metric.bounds)
    return themed(figure, height=270)


def _xy(curve: Points) -> dict[str, Any]:
    return {"x": [x for x, _ in curve], "y": [y for _, y in curve], "mode": "lines" if len(curve) > 1 else "markers"}


def points(rows: Rows, key: str) -> Points:
    """The finite values of a key, by step."""
    return [
        (float(row["step"]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key]) and isinstance(row.get("step"), int | float)
    ]


def moving_mean(curve: Points) -> Points:
    """The mean of each point and those before it, a twentieth of the curve (at least five points) wide."""
    means = pandas.Series([y for _, y in curve]).rolling(max(5, len(curve) // 20), min_periods=1).mean()
    return [(x, mean) for (x, _), mean in zip(curve, means, strict=True)]


def thinned(curve: Points, most: int = _MAX_POINTS) -> Points:
    """At most `most` points: means of stretches of equal length. The first and the last point stay."""
    if len(curve) <= most:
        return curve
    means = [part.mean(axis=0) for part in np.array_split(np.array(curve[1:-1]), most - 2)]
    return [curve[0], *((float(x), float(y)) for x, y in means), curve[-1]]


# Measure

MAX_UNITS = 5.0  # of the forest plot's axis to either side; what lies beyond is drawn at the edge

Labeled = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Improvement:
    """How much better tuned is than base, in units of half the width of base's interval. `row`: in the metric's own unit."""

    row: TableRow
    value: float
    low: float
    high: float


def improvements(result: Mapping[str, Any]) -> list[Improvement]:
    """Metric by metric, without redundant ones; those without any spread have no unit and are left out."""
    found = []
    for row in table(result):
        entry = entry_of(result, row)
        if not entry or entry.get("restates"):
            continue
        low, high = entry["improvement"]["ci95"]
        widths = [b - a for a, b in (row.base_ci or (0.0, 0.0), (low, high)) if b > a]
        if widths:
            unit = widths[0] / 2
            found.append(Improvement(row, entry["improvement"]["value"] / unit, low / unit, high / unit))
    return found


def forest(results: Sequence[Labeled]) -> Any:
    """The improvements of one result or of several, a point and its 95% interval each; None if there are none."""
    import plotly.graph_objects as go

    found = [(label, improvements(result)) for label, result in results]
    lines: dict[tuple[str, str], int] = {}  # by benchmark and metric ("" for the benchmark's heading): its place
    for key in dict.fromkeys((one.row.benchmark, one.row.metric) for _, every in found for one in every):
        lines.setdefault((key[0], ""), len(lines))
        lines[key] = len(lines)
    if not lines:
        return None
    plot = go.Figure()
    for i, (label, every) in enumerate(found):
        low, value, high = (
            [min(max(getattr(one, end), -MAX_UNITS), MAX_UNITS) for one in every] for end in ("low", "value", "high")
        )
        verdicts = [{"worse": WARN, "no clear difference": BASE}.get(one.row.verdict, TUNED) for one in every]
        beyond = [
            "circle" if abs(one.value) <= MAX_UNITS else f"triangle-{'left' if one.value < 0 else 'right'}" for one in every
        ]
        plot.add_scatter(
            x=value,
            y=[lines[one.row.benchmark, one.row.metric] + 0.8 * ((i + 0.5) / len(found) - 0.5) for one in every],
            name=html.escape(label),
            mode="markers",
            marker={"size": 9, "color": verdicts if len(found) == 1 else SERIES[i], "symbol": beyond},
            error_x=_error(value, list(zip(low, high, strict=True))) | {"color": BASE if len(found) == 1 else SERIES[i]},
            text=[f"{figure(one.row.difference, one.row.ci, signed=not one.row.no_change)}: {one.row.verdict}" for one in every],
            hovertemplate="%{text}",
        )
    titles = [
        html.escape(metric_title(metric)) if metric else f"<b>{html.escape(benchmark_title(name))}</b>" for name, metric in lines
    ]
    themed(plot, height=90 + (18 + 4 * len(found)) * len(lines))
    plot.add_vline(x=0, line={"color": BASE, "width": 1})
    plot.update_layout(hovermode="closest", showlegend=len(found) > 1, margin_t=28)
    plot.update_xaxes(title_text="← worse · better →", range=[-MAX_UNITS - 0.3, MAX_UNITS + 0.3])
    plot.update_yaxes(range=[len(lines) - 0.5, -0.5], tickvals=list(lines.values()), ticktext=titles, showgrid=False)
    return plot


def groups(rows: Sequence[TableRow]) -> Any:
    """One metric by group, base and tuned with their intervals, if any. `rows`: the overall row first."""
    import plotly.graph_objects as go

    names = [html.escape(f"{row.group or 'all items'} (n = {row.n:,})") for row in rows]
    plot = go.Figure()
    for side, color, offset in (("base", BASE, -0.12), ("tuned", TUNED, 0.12)):
        values = [getattr(row, side) for row in rows]
        if any(value is not None for value in values):
            error = _error(values, [getattr(row, f"{side}_ci") for row in rows])
            look: dict[str, Any] = {"name": side, "mode": "markers", "marker": {"size": 9, "color": color}, "error_x": error}
            plot.add_scatter(x=values, y=[i + offset for i in range(len(rows))], **look)
    themed(plot, height=110 + 30 * len(rows))
    _add_ideal(plot.add_vline, rows[0].better, "x")
    plot.update_layout(hovermode="closest", margin_t=8)
    plot.update_xaxes(title_text=html.escape(metric_title(rows[0].metric)))
    plot.update_yaxes(range=[len(rows) - 0.5, -0.5], tickvals=list(range(len(rows))), ticktext=names)
    return plot


def by_strength(points: Sequence[CurvePoint], title: str, better: str) -> Any:
    """One metric by the adapter's strength and, below it, the perplexity of neutral text."""
    from plotly.subplots import make_subplots

    costs = [point for point in points if point.perplexity is not None]
    plot = make_subplots(rows=2 if costs else 1, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    lines = [(points, "value", title, TUNED), (costs, "perplexity", "Perplexity", WARN)]
    for number, (shown, name, label, color) in enumerate(lines[: 2 if costs else 1], 1):
        values = [getattr(point, name) for point in shown]
        error = _error(values, [getattr(point, f"{name}_ci") for point in shown])
        look: dict[str, Any] = {"line": {"color": color}, "showlegend": False, "row": number, "col": 1}
        plot.add_scatter(x=[point.strength for point in shown], y=values, name=label, error_y=error, **look)
        plot.update_yaxes(title_text=html.escape(label), row=number, col=1)
    themed(plot, height=430 if costs else 260)
    _add_ideal(lambda **line: plot.add_hline(**line, row=1, col=1), better, "y")
    plot.update_layout(hovermode="closest", margin_t=12)
    plot.update_xaxes(title_text="Adapter strength (0: base)", row=2 if costs else 1, col=1)
    return plot


def _error(values: Sequence[float], ends: Sequence[tuple[float, float] | None]) -> dict[str, Any]:
    up = [end and end[1] - value for value, end in zip(values, ends, strict=True)]
    down = [end and value - end[0] for value, end in zip(values, ends, strict=True)]
    return {"type": "data", "array": up, "arrayminus": down, "thickness": 1.5}


def _add_ideal(add_line: Callable[..., Any], better: str, axis: str) -> None:
    if better.startswith("nearer "):
        ideal = better.removeprefix("nearer ")
        add_line(**{axis: float(ideal)}, name=f"ideal: {ideal} (no bias)", **_LINE)


# Dataset

_MOST_BARS = 12


def counted(title: str, numbers: dict[str, int]) -> Any:
    """Bars of a count by name, in the given order, or by day (as "2026-11-30"). Names are text, never markup."""
    from plotly import graph_objects

    by_day = title.endswith("per day") and len(numbers) > _MOST_BARS  # few days are names: plotly would show their hours
    names = list(numbers) if by_day else list(numbers)[:_MOST_BARS]
    labels = [html.escape(name if len(name) <= 24 else name[:23] + "…") for name in names]
    figure = graph_objects.Figure(graph_objects.Bar(x=labels, y=[numbers[name] for name in names], marker_color=TUNED))
    figure.update_layout(title={"text": title, "font": {"size": 13}})
    figure.update_xaxes(type="date" if by_day else "category")
    if rest := sum(numbers.values()) - sum(numbers[name] for name in names):
        figure.update_xaxes(title=f"{rest:,} more in others")
    return themed(figure, height=230)
