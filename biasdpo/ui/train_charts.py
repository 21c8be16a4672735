"""Charts as SVG: colours are the page's variables, so that light and dark are exact, and nothing is loaded from elsewhere.

`gr.LinePlot` was left: it draws anew, and blinks, at every update, and its marks (best step, baseline) can't be named. The
cross-hair, which reads `data-curves`, and the two downloads (SVG, CSV) are in assets/charts.js.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape

from biasdpo.ui.train_curves import Chart, Curve, Point

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
