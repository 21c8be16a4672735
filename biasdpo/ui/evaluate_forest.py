"""The differences of all metrics on one axis: a forest plot, as an HTML table whose middle column is drawn.

Metrics have units of their own (per cent, nats, perplexity). So each improvement, positive where tuned is the better side, is
divided by half the width of base's own 95 % interval on the same items: 1 is as far as base's figure may be off by the choice of
items. What base has not (a metric of both sides) is divided by half the width of its own interval. The numbers on the right stay
in the metric's unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from biasdpo.evaluations.table import Ci, TableRow, table
from biasdpo.ui.evaluate_words import CLASSES, SYMBOLS, benchmark_title, direction, interval, metric_title, number, of_row
from biasdpo.ui.train_charts import ticks

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
            f"<td>{_drawn(mark, span)}</td><td>{change(row)} {verdict(row.verdict)}</td></tr>"
        )


def change(row: TableRow) -> str:
    """The difference with its interval; of a metric of both sides its value, and which one means no change."""
    digits, signed = of_row(row), row.no_change == 0
    told = f"<b>{number(row.difference, digits, signed=signed)}</b> <small>{interval(row.ci, digits, signed=signed)}</small>"
    return told if signed else f"{told} <small>no change: {row.no_change:g}</small>"


def _metric(row: TableRow) -> str:
    return f'{escape(metric_title(row.metric))} <small class="bd-way">{escape(direction(row.better))}</small>'


def _drawn(mark: Mark, span: float) -> str:
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
