"""One metric by category and group, base and tuned side by side with their intervals; and the plane of bias and fluency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from biasdpo.evaluations.curve import CurvePoint
from biasdpo.evaluations.table import Ci, TableRow, group_table, table
from biasdpo.ui.evaluate_forest import verdict
from biasdpo.ui.evaluate_words import benchmark_title, decimals, direction, headline, interval, metric_title, number, of_row
from biasdpo.ui.train_charts import ticks

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


def _tick(tick: float) -> str:
    return f"{tick:g}".replace("-", "−")
