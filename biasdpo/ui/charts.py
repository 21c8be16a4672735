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
