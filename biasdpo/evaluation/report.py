"""Exports a result: a Markdown report, CSV, and a section of the adapter's model card. None names a folder of this machine."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biasdpo import models
from biasdpo.access import require_owner
from biasdpo.benchmarks.titles import benchmark_title, better_words, metric_title
from biasdpo.errors import EvaluationError, plural
from biasdpo.evaluation.results import (
    PERPLEXITY,
    Ci,
    ComparedRow,
    TableRow,
    compare,
    curve_metrics,
    curve_points,
    entry_of,
    group_table,
    table,
)
from biasdpo.jobs.job import shown_command
from biasdpo.model_card import CARD, plain
from biasdpo.records import csv_cell
from biasdpo.workspace import Workspace, replacing, sha256_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Labeled = tuple[str, Mapping[str, Any]]
"""A name of an evaluation, and its result."""

BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
_QUALITY_COST = ("utility", "utility_generation")


# In one sentence


def sentence(result: Mapping[str, Any]) -> str:
    """The outcome in one plain sentence. A benchmark is clearly less biased (or more) if one of its bias metrics is and none
    says the opposite; redundant metrics don't count."""
    rows = [row for row in table(result) if row.verdict and not entry_of(result, row).get("restates")]
    bias: dict[str, set[str]] = {}
    for row in rows:
        if row.measures == "bias":
            bias.setdefault(row.benchmark, set()).add(row.verdict)
    quality = [row for row in rows if row.measures == "quality"]
    if not rows:
        parts = ["The base model alone was scored, so there is nothing to compare"]
    else:
        parts = [part for part in (_bias_outcome(list(bias.values())), _quality_outcome(quality)) if part]
    clear = [row for row in rows if row.measures == "bias" and row.verdict in ("less biased", "worse")]
    unclear = [metric_title(row.metric) for row in rows if row.measures == "bias" and row not in clear]
    if len(bias) == 1 and clear and unclear:
        parts[0] += f" ({', '.join(metric_title(row.metric) for row in clear)}; no clear change: {', '.join(unclear)})"
    limited = {f"{benchmark_title(row.benchmark)} was {row.why_not}" for row in rows if row.why_not.startswith("limited")}
    parts += sorted(limited)
    if result["provenance"].get("interrupted"):
        parts.append("stopped before all items were scored")
    for name, one in result["benchmarks"].items():
        if unmatched := int(one.get("n_without_biased_answer") or 0):
            items = f"{unmatched:,} of {plural(one['n'], benchmark_title(name) + ' item')}"
            parts.append(f"without a biased answer, and so in no bias score: {items}")
    if result.get("missing"):
        parts.append(f"not scored: {', '.join(map(benchmark_title, result['missing']))}")
    text = "; ".join(parts) + "."
    return text[:1].upper() + text[1:]


def _bias_outcome(by_benchmark: Sequence[set[str]]) -> str:
    counts = Counter(
        "mixed" if {"less biased", "worse"} <= verdicts else next((v for v in ("less biased", "worse") if v in verdicts), "")
        for verdicts in by_benchmark
    )
    if not counts:
        return ""
    every = plural(len(by_benchmark), "benchmark")
    said: list[str] = []
    for verdict, words in (("less biased", "clearly less biased"), ("worse", "clearly more biased"), ("mixed", "mixed")):
        if counts[verdict]:
            said.append(f"{words} on {counts[verdict]}{'' if said else f' of {every}'}")
    if not said:
        return f"no clear change in bias on {every}"
    return ", ".join([*said, f"no clear change on {counts['']}"] if counts[""] else said)


def _quality_outcome(rows: Sequence[TableRow]) -> str:
    worse = [row for row in rows if row.verdict == "worse"]
    if worse:
        costs = (f"{metric_title(row.metric)} {figure(row.difference, signed=True)}" for row in worse)
        return f"quality cost: {', '.join(costs)}"
    if not rows:
        return "quality was not measured"
    return "quality improved" if any(row.verdict == "better" for row in rows) else "no clear quality cost"


def figure(value: float | None, ci: Ci | None = None, *, signed: bool = False) -> str:
    """A value with its interval for people, to three digits of the largest number: "61.2 [58.1, 64.3]"."""
    if value is None:
        return ""
    largest = max(map(abs, (value, *(ci or ()))))
    style = f"{'+' if signed else ''},.{3 if largest < 2 else 2 if largest < 10 else 1 if largest < 1000 else 0}f"
    text = f"{value:{style}}" if ci is None else f"{value:{style}} [{ci[0]:{style}}, {ci[1]:{style}}]"
    return text.replace("-", "−")


def notes(result: Mapping[str, Any]) -> list[str]:
    """Caveats about the figures: what was not scored, then by benchmark. Those with the same caveat share one note."""
    found = [f"{benchmark_title(name)} was not scored: {why}" for name, why in result.get("missing", {}).items()]
    shared: dict[str, list[str]] = {}
    for name, one in result["benchmarks"].items():
        for text in _remarks(one):
            shared.setdefault(text, []).append(benchmark_title(name))
    return found + [f"{', '.join(names)}: {text}." for text, names in shared.items()]


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    if found.get("not_comparable"):
        yield f"not comparable with other evaluations: {found['not_comparable']}"
    if found.get("not_as_published"):
        yield f"not comparable with published figures: {found['not_as_published']}"
    if found["n_failed"]:
        reason = found["failures"][0]["reason"] if found.get("failures") else "the reason is unknown"
        yield f"{plural(found['n_failed'], 'item')} could not be scored; the first: {reason}"
    if found.get("pick_the_longer_baseline") is not None:
        yield f"picking the longer completion is right in {found['pick_the_longer_baseline']:.3f} of the pairs"


# Tables of text, for the page

_HEADERS = ("Verdict", "Change (tuned − base)", "Base", "Tuned", "p", "Items")
_SYMBOLS = {"less biased": "▲", "better": "▲", "no clear difference": "○", "worse": "▼"}


def text_table(labeled: Sequence[Labeled]) -> tuple[list[str], list[list[str]]]:
    """The overall rows of a result, or of several side by side: headers and cells."""
    if len(labeled) == 1:
        return ["Metric", *_HEADERS], [[_named(row), *_texts(row)] for row in table(labeled[0][1])]
    cells = [[_named(row), *("" if cell is None else _text(cell) for cell in row.cells)] for row in compare(labeled)]
    return ["Metric", *(label for label, _ in labeled)], cells


def text_of_groups(rows: Sequence[TableRow]) -> tuple[list[str], list[list[str]]]:
    """Rows of one metric by group: headers and cells."""
    return ["Group", *_HEADERS], [[row.group or "all items", *_texts(row)] for row in rows]


def _named(row: TableRow | ComparedRow) -> str:
    return f"{benchmark_title(row.benchmark)}: {metric_title(row.metric)}, {better_words(row.better)}".removesuffix(", ")


def _texts(row: TableRow) -> list[str]:
    """A row's cells under _HEADERS."""
    p = "" if row.p_holm is None else "<\u00a00.001" if row.p_holm < 0.001 else f"{row.p_holm:.3f}"
    change = figure(row.difference, row.ci, signed=row.no_change == 0)
    if row.no_change and row.difference is not None:
        change += f"; without a change: {row.no_change:g}"
    if row.better.startswith("nearer ") and row.base is not None and row.tuned is not None:  # verdict and p are of the distance
        ideal = float(row.better.removeprefix("nearer "))
        base, tuned = abs(row.base - ideal), abs(row.tuned - ideal)
        decimals = len(figure(max(base, tuned)).partition(".")[2])
        change += f"; distance from {ideal:g}: {base:.{decimals}f} → {tuned:.{decimals}f}"
    shown = "n/a" if row.is_undefined else figure(row.base, row.base_ci)
    return [_decided(row), change, shown, figure(row.tuned, row.tuned_ci), p, f"{row.n:,}"]


def _text(row: TableRow) -> str:
    value = figure(row.tuned, row.tuned_ci) or figure(row.base, row.base_ci) or figure(row.difference, row.ci) or "n/a"
    return f"{value} {_decided(row)}".rstrip()


def _decided(row: TableRow) -> str:
    return f"{_SYMBOLS.get(row.verdict, '')} {row.verdict}".strip()


# Markdown


def markdown(result: Mapping[str, Any] | Sequence[Labeled], command: Sequence[str] = ()) -> str:
    """One result as a report, or several side by side. `command`: reproduces it (for one result), as from
    `EvaluationConfig.command`."""
    if isinstance(result, Mapping):
        return _lines([f"# Evaluation of {_title(result)}", "", *_report(result, command)])
    return _lines(["# Evaluations side by side", "", *_side_by_side(result)])


def _report(result: Mapping[str, Any], command: Sequence[str], *, dated: bool = True) -> Iterator[str]:
    provenance = result["provenance"]
    yield from _facts(provenance, dated=dated)
    if provenance.get("interrupted"):
        yield from ("**Interrupted: only what was scored until then. Not comparable.**", "")
    yield from (f"**{plain(sentence(result))}**", "")
    rows = table(result)
    for title, is_cost in (("Benchmarks", False), ("Quality cost", True)):
        shown = [row for row in rows if (row.benchmark in _QUALITY_COST) is is_cost]
        if shown:
            yield from (f"## {title}", "", *_metrics_table(shown), "")
    hashes = [
        f"{name}: SHA-256 of the data `{one['data_sha256'][:16]}`."
        for name, one in result["benchmarks"].items()
        if one.get("data_sha256")
    ]
    yield from (*(f"- {note}" for note in [*map(plain, notes(result)), *hashes]), "")
    for name in result["benchmarks"]:
        groups = group_table(result, name)
        if groups:
            yield from (f"<details><summary>{plain(name)} by group</summary>", "", *_metrics_table(groups), "", "</details>", "")
    yield from _curves(result)
    if command:
        yield from ("## Reproduce", "", "```", shown_command(list(command)[3:]), "```", "")
    yield "Each row: base → tuned on the same items, 95% bootstrap intervals, and the p-value of a paired randomization test,"
    yield "Holm-corrected over the table. An improvement must survive the correction; a clear change for the worse need not."


def _facts(provenance: Mapping[str, Any], *, dated: bool = True) -> Iterator[str]:
    limit = provenance.get("limit")
    facts = {
        "Model": f"{plain(Path(provenance['model']).name)} (SHA-256 `{provenance.get('model_sha256', '')[:16]}`)",
        "Adapter": "none: the base model alone",
        "Strength": ", ".join(f"{s:g}" for s in provenance.get("strengths") or [provenance.get("strength", 1.0)]),
        "Backend": plain(provenance.get("backend", "")),
        "Items": f"at most {limit:,} of each benchmark, drawn by the seed" if limit else "all",
        "Preference pairs": plain(provenance.get("pairs_source") or "not scored"),
        "Seed": provenance.get("seed", ""),
        "Code": f"BiasDPO {provenance.get('code_version', '')}",
    }
    if dated:
        facts["Report"] = datetime.now(UTC).date().isoformat()
    if provenance.get("adapter"):
        facts["Adapter"] = f"{plain(provenance['adapter'])} (SHA-256 `{provenance.get('adapter_sha256', '')[:16]}`)"
    yield from (f"- {name}: {value}" for name, value in facts.items())
    yield ""


def _metrics_table(rows: Sequence[TableRow]) -> Iterator[str]:
    grouped = any(row.group for row in rows)
    header = ["Group" if grouped else "Benchmark", "Metric", "n", "Base", "Tuned", "Difference", "p (Holm)", "Verdict"]
    cells = [
        [
            plain(row.group if grouped else row.benchmark),
            _metric(row.metric, row.better),
            f"{row.n:,}{'' if row.comparable else ' *'}",
            "n/a" if row.is_undefined else _number(row.base, row.base_ci),
            _number(row.tuned, row.tuned_ci),
            _number(row.difference, row.ci),
            "" if row.p_holm is None else f"{row.p_holm:.2g}" if row.p_holm >= 0.0001 else "< 0.0001",
            row.verdict,
        ]
        for row in rows
    ]
    return _table(header, "|---|---|---:|---:|---:|---:|---:|---|", cells)


def _table(header: Sequence[str], alignment: str, cells: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield alignment
    yield from (f"| {' | '.join(row)} |" for row in cells)


def _curves(result: Mapping[str, Any]) -> Iterator[str]:
    if not curve_metrics(result):
        return
    curves = {(name, metric): curve_points(result, name, metric) for name, metric in [*curve_metrics(result), PERPLEXITY]}
    curves = {key: points for key, points in curves.items() if points}
    strengths = sorted({point.strength for points in curves.values() for point in points})
    cells = []
    for (name, metric), points in curves.items():
        by_strength = {point.strength: _number(point.value, point.value_ci) for point in points}
        cells.append([plain(name), plain(metric), *(by_strength.get(strength, "") for strength in strengths)])
    header = ["Benchmark", "Metric", *(f"{strength:g}" for strength in strengths)]
    yield from ("## By strength", "", *_table(header, f"|---|---|{'---:|' * len(strengths)}", cells), "")


def _side_by_side(labeled: Sequence[Labeled]) -> Iterator[str]:
    for label, result in labeled:
        yield from (f"## {plain(label)}: {_title(result)}", "", *_facts(result["provenance"]))
    yield from ("## Tuned", "", "Without an adapter: base. \\* can't be compared, for the reason below.", "")
    rows = compare(labeled)
    header = ["Benchmark", "Metric", *(plain(label) for label, _ in labeled)]
    cells = [
        [
            plain(row.benchmark),
            _metric(row.metric, row.better) + ("" if row.comparable else " *"),
            *(_compared_cell(cell) for cell in row.cells),
        ]
        for row in rows
    ]
    yield from _table(header, f"|---|---|{'---:|' * len(labeled)}", cells)
    reasons = {row.benchmark: row.why_not for row in rows if not row.comparable}
    if reasons:
        yield from ("", *(f"- \\* {plain(name)}: {reason}" for name, reason in reasons.items()))


def _compared_cell(row: TableRow | None) -> str:
    if row is None:
        return ""
    values = ((row.tuned, row.tuned_ci), (row.base, row.base_ci), (row.difference, row.ci))
    value = next((_number(value, ci) for value, ci in values if value is not None), "")
    return f"{value}<br>{row.verdict}" if row.verdict else value


def _title(result: Mapping[str, Any]) -> str:
    provenance = result["provenance"]
    model = Path(provenance["model"]).name
    return plain(f"{provenance['adapter']} on {model}" if provenance.get("adapter") else model)


def _metric(name: str, better: str) -> str:
    return plain(name) + (f" ({better} is better)" if better else "")


def _number(value: float | None, ci: Ci | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if ci is None else f"{value:.4g} [{ci[0]:.4g}, {ci[1]:.4g}]"


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


# CSV

_INTERVALS = ("base_ci", "tuned_ci", "ci")


def csv_text(result: Mapping[str, Any]) -> str:
    """`csv_rows` as a CSV file without formulas."""
    rows = csv_rows(result)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def csv_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per metric, overall and by group. The columns are those of `TableRow`, with an interval in two (`base_ci_low`,
    `base_ci_high`), then model and adapter."""
    provenance = result["provenance"]
    found = []
    for row in [*table(result), *(row for name in result["benchmarks"] for row in group_table(result, name))]:
        values = asdict(row)
        for name in _INTERVALS:
            values[f"{name}_low"], values[f"{name}_high"] = values.pop(name) or (None, None)
        found.append({**values, "model": provenance["model"], "adapter": provenance.get("adapter", "")})
    return found


# The adapter's model card


def add_to_card(result: Mapping[str, Any], workspace: Workspace, command: Sequence[str] = ()) -> Path:
    """Put the report into the model card (README.md) of the evaluated adapter, in place of an earlier one; returns the card.

    Only for a run of this workspace, with the very adapter that was evaluated. Raises EvaluationError otherwise or for an
    interrupted evaluation, RefusedError for a visitor.
    """
    require_owner("Writing into an adapter's card")
    provenance = result["provenance"]
    name = provenance.get("adapter", "")
    adapter = next((one for one in models.adapters(workspace) if one.id == name), None)
    if adapter is None or adapter.folder.parent.parent != workspace.runs:
        raise EvaluationError(
            f"{name or 'The base model'} is no run's adapter in this workspace, so it has no card to write into: evaluate the "
            "adapter of a run"
        )
    if sha256_of(adapter.weights) != provenance.get("adapter_sha256"):
        raise EvaluationError(f"Run {name!r} has another adapter now than the one that was evaluated: evaluate it again")
    if provenance.get("interrupted"):
        raise EvaluationError("An interrupted evaluation can't go into a card: resume the evaluation, then add it")
    card = adapter.folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {plain(name)}\n"
    with replacing(card) as temporary:
        temporary.write_text(with_evaluation(text, result, command), encoding="utf-8")
    return card


def with_evaluation(card: str, result: Mapping[str, Any] | None, command: Sequence[str] = ()) -> str:
    """A card with the report as its section "Evaluation", in place of an earlier one. `result` None: that there is none."""
    report = ["Not evaluated on benchmarks."] if result is None else _report(result, command, dated=False)
    deeper = [f"#{line}" if line.startswith("## ") else line for line in report]
    section = _lines([BEGIN, "## Evaluation", "", *deeper, "", END])
    begin, end = card.find(BEGIN), card.find(END)
    if 0 <= begin < end:
        return card[:begin] + section + card[end + len(END) :].removeprefix("\n")
    return card.rstrip("\n") + "\n\n" + section


def hub_metrics(result: Mapping[str, Any]) -> list[EvalResult]:
    """The tuned model's overall metrics for the metadata of a card (`model-index`)."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.benchmark,
            dataset_name=benchmark_title(row.benchmark),
            metric_type=row.metric,
            metric_name=metric_title(row.metric),
            metric_value=round(row.tuned, 4),
        )
        for row in table(result)
        if row.tuned is not None
    ]
