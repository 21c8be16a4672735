"""Charts, with plotly. Colors follow the page's theme: `themed` leaves text and background to it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biasdpo.data.health import wilson

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


# Curves of training runs


@dataclass(frozen=True)
class Metric:
    """What one chart of a run shows. `keys`: of metrics.jsonl, by the name of their curve."""

    title: str
    unit: str
    keys: dict[str, str]
    bounds: tuple[float, float] | None = None


TRAINING = {
    "accuracy": Metric("Reward accuracy", "share of pairs", {"": "rewards/accuracies"}, (0, 1.02)),
    "margin": Metric("Reward margin", "nats", {"": "rewards/margins"}),
    "loss": Metric("Loss", "nats", {"": "loss"}),
    "kl": Metric(
        "KL to the base model", "nats", {"plain text": "text_kl", "counterfactual": "counterfactual_kl", "ending": "ending_kl"}
    ),
}
_COLORS = (TUNED, "#7c3aed", WARN, "#2563eb", "#db2777", BASE)
_MAX_POINTS = 400  # of one curve: more than a screen has columns for
_SMOOTHED_FROM = 12  # points; a moving mean of fewer hides what there is

Rows = Sequence[Mapping[str, Any]]
Points = list[tuple[float, float]]


def training_chart(name: str, runs: Mapping[str, Rows], *, pairs: int = 0, longer: float | None = None) -> Any:
    """One metric of one run, or of several, over the optimizer's steps; None where nothing was logged.

    runs     lines of metrics.jsonl by run id
    pairs    held-out pairs of the one run: its held-out accuracies get 95 % intervals
    longer   accuracy of always choosing the longer completion, drawn as a line
    """
    import plotly.graph_objects as go

    metric, figure = TRAINING[name], go.Figure()
    colors = itertools.cycle(_COLORS)
    for run_id, rows in runs.items():
        for label, key in metric.keys.items():
            color = next(colors)
            words = [run_id] * (len(runs) > 1) + [label] * bool(label)
            train, held_out = points(rows, key), points(rows, f"eval_{key}")
            if len(train) >= _SMOOTHED_FROM:
                if len(runs) == 1:
                    figure.add_scatter(**_xy(thinned(train)), line_color=color, opacity=0.3, showlegend=False, hoverinfo="skip")
                train = moving_mean(train)
            if train:
                figure.add_scatter(**_xy(thinned(train)), name=", ".join([*words, "training"]), line_color=color)
            if held_out:
                bars = _intervals(held_out, pairs) if name == "accuracy" and pairs else None
                look: dict[str, Any] = {"line": {"color": color if len(runs) > 1 else WARN, "dash": "dot"}}
                look |= {"name": ", ".join([*words, "held-out"]), "error_y": bars, "mode": "lines+markers"}
                figure.add_scatter(**_xy(held_out) | look)
    if not figure.data:
        return None
    if longer is not None and name == "accuracy":
        figure.add_hline(longer, line={"dash": "dash", "color": BASE, "width": 1}, annotation_text="choosing the longer")
    figure.update_layout(title={"text": f"{metric.title} ({metric.unit})", "font_size": 13, "x": 0.02}, uirevision=name)
    figure.update_yaxes(range=metric.bounds)
    return themed(figure, height=230)


def _xy(curve: Points) -> dict[str, Any]:
    return {"x": [x for x, _ in curve], "y": [y for _, y in curve], "mode": "lines" if len(curve) > 1 else "markers"}


def _intervals(curve: Points, pairs: int) -> dict[str, Any]:
    ends = [wilson(y * pairs, pairs) for _, y in curve]
    up, down = ([abs(end[i] - y) for end, (_, y) in zip(ends, curve, strict=True)] for i in (1, 0))
    return {"type": "data", "array": up, "arrayminus": down, "thickness": 1}


def points(rows: Rows, key: str) -> Points:
    """The finite values of a key, by step."""
    return [
        (float(row["step"]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key]) and isinstance(row.get("step"), int | float)
    ]


def moving_mean(curve: Points) -> Points:
    """The mean of each point and those before it, a twentieth of the curve (at least five points) wide."""
    width = max(5, len(curve) // 20)
    sums = [0.0, *itertools.accumulate(y for _, y in curve)]
    starts = [max(0, i + 1 - width) for i in range(len(curve))]
    return [
        (x, (sums[i + 1] - sums[start]) / (i + 1 - start)) for i, ((x, _), start) in enumerate(zip(curve, starts, strict=True))
    ]


def thinned(curve: Points, most: int = _MAX_POINTS) -> Points:
    """At most `most` points: means of stretches of equal length. The first and the last point stay."""
    if len(curve) <= most:
        return curve
    inner, count = curve[1:-1], most - 2
    ends = [round(i * len(inner) / count) for i in range(count + 1)]
    parts = [inner[low:high] for low, high in itertools.pairwise(ends)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [curve[0], *means, curve[-1]]
