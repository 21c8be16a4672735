"""Charts, with plotly. Colors follow the page's theme: `themed` leaves text and background to it."""

from __future__ import annotations

from typing import Any

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


# Dataset

_MOST_BARS = 12


def counted(title: str, numbers: dict[str, int]) -> Any:
    """Bars of a count by name, in the given order, or by day (as "2026-11-30"). Names are text, never markup."""
    import html

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
