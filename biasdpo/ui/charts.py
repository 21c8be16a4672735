"""Charts, with plotly. Colors follow the page's theme: `themed` leaves text and background to it."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biasdpo.benchmarks.titles import benchmark_title, metric_title
from biasdpo.evaluation.report import figure
from biasdpo.evaluation.results import CurvePoint, TableRow, entry_of, table

BASE, TUNED, WARN = "#64748b", "#0d9488", "#d97706"
"""Colors of base, tuned, and what needs attention; readable on light and dark."""


def themed(figure: Any, *, height: int = 260) -> Any:
    """Give a plotly figure the page's look: transparent, compact, no tool bar."""
    figure.update_layout(
        height=height,
        margin={"l": 48, "r": 12, "t": 32, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#64748b"},
        hovermode="x unified",
        legend={"orientation": "h", "y": -0.2},
    )
    figure.update_xaxes(gridcolor="rgba(127,127,127,0.2)", zeroline=False)
    figure.update_yaxes(gridcolor="rgba(127,127,127,0.2)", zeroline=False)
    return figure


# Measure

SERIES = (TUNED, "#7c3aed", WARN, "#db2777", "#2563eb", "#65a30d")
"""Colors of evaluations side by side, in this order."""
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
    """The improvements of one result or of several, a point and its 95 % interval each; None if there are none."""
    import plotly.graph_objects as go

    plot, names = go.Figure(), dict[str, None]()
    for (label, result), color in zip(results, SERIES, strict=False):
        found = improvements(result)
        named = [
            f"{html.escape(benchmark_title(one.row.benchmark))}<br>{html.escape(metric_title(one.row.metric))}" for one in found
        ]
        names |= dict.fromkeys(named)
        ends = [[min(max(end, -MAX_UNITS), MAX_UNITS) for end in (one.low, one.value, one.high)] for one in found]
        colors = [{"worse": WARN, "no clear difference": BASE}.get(one.row.verdict, TUNED) for one in found]
        told = [f"{figure(one.row.difference, one.row.ci, signed=one.row.no_change == 0)}: {one.row.verdict}" for one in found]
        plot.add_scatter(
            x=[value for _, value, _ in ends],
            y=named,
            name=html.escape(label),
            mode="markers",
            marker={"size": 9, "color": color if len(results) > 1 else colors},
            error_x={
                "array": [high - value for _, value, high in ends],
                "arrayminus": [value - low for low, value, _ in ends],
                "color": color if len(results) > 1 else BASE,
                "thickness": 1.5,
            },
            text=told,
            hovertemplate="%{y}<br>%{text}<extra></extra>",
        )
    if not names:
        return None
    themed(plot, height=90 + (34 + 14 * (len(results) - 1)) * len(names))
    plot.add_vline(x=0, line={"color": BASE, "width": 1})
    plot.update_layout(
        hovermode="closest", showlegend=len(results) > 1, scattermode="group", margin={"l": 8, "r": 12, "t": 8, "b": 40}
    )
    plot.update_xaxes(title_text="← worse · better →", range=[-MAX_UNITS - 0.3, MAX_UNITS + 0.3])
    plot.update_yaxes(autorange="reversed", automargin=True, categoryarray=list(names))
    return plot


def groups(rows: Sequence[TableRow]) -> Any:
    """One metric by group, base and tuned with their intervals. `rows`: the overall row first."""
    import plotly.graph_objects as go

    names = [html.escape(row.group or "all items") for row in rows]
    plot = go.Figure()
    for side, color in (("base", BASE), ("tuned", TUNED)):
        values = [getattr(row, side) for row in rows]
        if any(value is not None for value in values):
            ends = [getattr(row, f"{side}_ci") or (value, value) for row, value in zip(rows, values, strict=True)]
            plot.add_scatter(x=values, y=names, name=side, mode="markers", marker={"size": 9, "color": color})
            plot.data[-1].error_x = _error(values, ends)
    themed(plot, height=110 + 30 * len(rows))
    _add_ideal(plot.add_vline, rows[0].better, "x")
    plot.update_layout(hovermode="closest", scattermode="group", margin={"l": 8, "r": 12, "t": 8, "b": 40})
    plot.update_yaxes(autorange="reversed", automargin=True)
    return plot


def by_strength(points: Sequence[CurvePoint], title: str, better: str) -> Any:
    """One metric by the adapter's strength and, below it, the perplexity of neutral text."""
    from plotly.subplots import make_subplots

    costs = [point for point in points if point.perplexity is not None]
    plot = make_subplots(rows=2 if costs else 1, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    lines = [(points, "value", title, TUNED), (costs, "perplexity", "Perplexity", WARN)]
    for number, (shown, name, label, color) in enumerate(lines[: 2 if costs else 1], 1):
        values = [getattr(point, name) for point in shown]
        ends = [getattr(point, f"{name}_ci") or (value, value) for point, value in zip(shown, values, strict=True)]
        strengths = [point.strength for point in shown]
        plot.add_scatter(
            x=strengths, y=values, name=label, line={"color": color}, error_y=_error(values, ends), row=number, col=1
        )
        plot.update_yaxes(title_text=html.escape(label), row=number, col=1)
    themed(plot, height=430 if costs else 260)
    _add_ideal(lambda **line: plot.add_hline(**line, row=1, col=1), better, "y")
    plot.update_layout(showlegend=False, hovermode="closest")
    plot.update_xaxes(title_text="Adapter strength (0: base)", row=2 if costs else 1, col=1)
    return plot


def _error(values: Sequence[float], ends: Sequence[tuple[float, float]]) -> dict[str, Any]:
    up = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    down = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    return {"type": "data", "array": up, "arrayminus": down, "thickness": 1.5}


def _add_ideal(add_line: Callable[..., Any], better: str, axis: str) -> None:
    if better.startswith("nearer "):
        place = {axis: float(better.removeprefix("nearer "))}
        add_line(**place, line={"dash": "dot", "color": BASE, "width": 1}, annotation_text="ideal")
