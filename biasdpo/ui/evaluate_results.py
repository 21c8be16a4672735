"""A result in words and numbers, as HTML: what produced it, what came out, the table. Everything that is not ours is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

from biasdpo.evaluations.table import Ci, TableRow, table
from biasdpo.ui import render
from biasdpo.ui.evaluate_forest import change, entry_of, verdict
from biasdpo.ui.evaluate_words import (
    CLASSES,
    adapter_title,
    benchmark_title,
    direction,
    interval,
    metric_title,
    number,
    of_row,
    p_value,
    setup,
)
from biasdpo.ui.train_reading import model_title


def facts(result: Mapping[str, Any]) -> str:
    """What produced a result."""
    model, adapter = setup(result)
    told = result.get("provenance") or {}
    pairs = [("model", escape(model_title(model) or "–")), ("adapter", escape(adapter_title(adapter) if adapter else "none"))]
    for name in ("backend", "strength", "seed", "limit"):
        if told.get(name) not in (None, ""):
            pairs.append((name, escape(str(told[name]))))
    for name, title in (("model_sha256", "model file"), ("adapter_sha256", "adapter file")):
        if told.get(name):
            digest = escape(str(told[name]))
            pairs.append((title, f'<code title="SHA-256: {digest}">{digest[:12]}</code>'))
    if told.get("code_version"):
        pairs.append(("code", escape(str(told["code_version"]))))
    return f'<div class="bd-facts bd-run-facts">{"".join(f"<span><i>{name}</i> {value}</span>" for name, value in pairs)}</div>'


def summary(result: Mapping[str, Any]) -> str:
    """The outcome in one sentence for the bias metrics, and one for the price. What restates another metric is not counted."""
    rows = [row for row in table(result) if row.verdict and not entry_of(result, row).get("restates")]
    if not rows:
        return render.note("Base alone: there is no adapter to compare it with.")
    bias = Counter(row.verdict for row in rows if row.measures == "bias")
    price = [row for row in rows if row.measures != "bias"]
    lines = []
    if bias:
        told = [f"<b>{bias[word]}</b> {word}" for word in ("less biased", "no clear difference", "worse") if bias[word]]
        lines.append(f"Bias, {_counted(bias.total(), 'metric')}: {', '.join(told)}.")
    if price:
        worse = [metric_title(row.metric) for row in price if row.verdict == "worse"]
        said = f"<b>worse</b> in {escape('; '.join(worse))}" if worse else "none is clearly worse"
        lines.append(f"Price and quality, {_counted(len(price), 'metric')}: {said}.")
    kind = "bad" if any(row.verdict == "worse" for row in rows) else "good" if bias["less biased"] else "open"
    return f'<p class="bd-eval-summary bd-is-{kind}">{" ".join(lines)}</p>'


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def result_table(result: Mapping[str, Any]) -> str:
    """Base to tuned, metric by metric, with intervals and a verdict in words."""
    rows = table(result)
    if not rows:
        return render.note("Nothing was scored.")
    body = []
    for name in dict.fromkeys(row.benchmark for row in rows):
        own = [row for row in rows if row.benchmark == name]
        body.append(_benchmark_head(own[0], result["benchmarks"][name]))
        body += [_metric_row(row, result) for row in own]
    heads = ("Metric", "Base", "Tuned", "Difference", "p (Holm)", "Verdict")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<div class="bd-scroll"><table class="bd-eval-table"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
        '</table></div><p class="bd-measured-at">In brackets: 95 % intervals (bootstrap over items). Difference: tuned − base on '
        "the same items, paired. p: paired randomization test, corrected by Holm for the whole table. Less biased, better: the "
        "interval leaves out no change and p is below 0.05; worse: the interval lies wholly on the bad side. Where nearer an "
        "ideal is better, the verdict is on the distance to it.</p>"
    )


def _benchmark_head(row: TableRow, found: Mapping[str, Any]) -> str:
    parts = [_counted(row.n, "item")]
    if row.n_failed:
        parts.append(f'<b class="bd-is-bad">{row.n_failed:,} failed</b>, not scored')
    if not row.comparable:
        parts.append(f'<span class="bd-not-comparable">not comparable: {escape(row.why_not)}</span>')
    if found.get("not_as_published"):
        parts.append(f"not as published: {escape(str(found['not_as_published']))}")
    if isinstance(found.get("pick_the_longer_baseline"), float | int):
        parts.append(f"picking the longer is right in {found['pick_the_longer_baseline']:.1%}")
    return (
        f'<tr class="bd-eval-head"><th colspan="6" scope="colgroup">{escape(benchmark_title(row.benchmark))} '
        f"<small>{' · '.join(parts)}</small></th></tr>"
    )


def cell_of_change(row: TableRow, result: Mapping[str, Any]) -> str:
    """The difference; of a metric that is best near an ideal also how far it went toward it, which is what is judged."""
    if row.difference is None:
        return "–"
    parts = [change(row)]
    improved = entry_of(result, row).get("improvement")
    if row.better.startswith("nearer ") and isinstance(improved, Mapping):
        digits, (low, high) = of_row(row), improved["ci95"]
        moved = f"{number(-improved['value'], digits, signed=True)} {interval((-high, -low), digits, signed=True)}"
        parts.append(f"<small>distance to {escape(row.better.removeprefix('nearer '))}: {moved}</small>")
    return f"<div>{'</div><div>'.join(parts)}</div>"


def _metric_row(row: TableRow, result: Mapping[str, Any]) -> str:
    digits = of_row(row)

    def cell(label: str, value: float | None, ci: Ci | None) -> str:
        told = f"<b>{number(value, digits)}</b> <small>{interval(ci, digits)}</small>"
        return f'<td data-label="{label}">{told if value is not None else "–"}</td>'

    return (
        f'<tr class="bd-is-{CLASSES.get(row.verdict, "open")}"><th scope="row">{escape(metric_title(row.metric))} '
        f'<small class="bd-way">{escape(direction(row.better))}</small></th>{cell("Base", row.base, row.base_ci)}'
        f'{cell("Tuned", row.tuned, row.tuned_ci)}<td data-label="Difference">{cell_of_change(row, result)}</td>'
        f'<td data-label="p (Holm)">{p_value(row.p_holm)}</td><td data-label="Verdict">{verdict(row.verdict) or "–"}</td></tr>'
    )


def failures(result: Mapping[str, Any]) -> str:
    """The items that could not be scored: how many, and why; "" where there are none."""
    lines = []
    for name, found in result["benchmarks"].items():
        reasons = Counter(str(failure.get("reason", "")) for failure in found.get("failures") or ())
        lines += [f"<li>{escape(benchmark_title(name))}: {count:,} × {escape(why)}</li>" for why, count in reasons.most_common(5)]
    if not lines:
        return ""
    return (
        f'<div class="bd-note bd-eval-failures"><div>Items that could not be scored count in no figure:<ul>{"".join(lines)}</ul>'
        "</div></div>"
    )
