"""A result to keep: Markdown, CSV, and a section of the adapter's card. Nothing in them names a folder of this machine."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from biasdpo import models, runs
from biasdpo.errors import EvaluationError
from biasdpo.evaluations.compare import compare
from biasdpo.evaluations.curve import PRICE, metrics, points
from biasdpo.evaluations.table import Ci, TableRow, group_table, table
from biasdpo.run_card import CARD, plain
from biasdpo.workspace import Workspace, refuse_on_public_space, replacing

Labelled = tuple[str, Mapping[str, Any]]
"""What an evaluation is called, and its result."""

BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
_INTERVALS = ("base_ci", "tuned_ci", "ci")
_PRICE = ("utility", "utility_generation")


# Markdown


def markdown(result: Mapping[str, Any] | Sequence[Labelled], command: Sequence[str] = ()) -> str:
    """One result as a report, or several side by side. `command`: that reproduces it (of one result), as
    `EvaluationRequest.command` gives it."""
    if isinstance(result, Mapping):
        return _lines([f"# Evaluation of {_who(result)}", "", *_report(result, command)])
    return _lines(["# Evaluations side by side", "", *_side_by_side(result)])


def _report(result: Mapping[str, Any], command: Sequence[str]) -> Iterator[str]:
    provenance = result["provenance"]
    yield from _what(provenance)
    if provenance.get("interrupted"):
        yield from ("**Interrupted: what was scored until then. Not comparable.**", "")
    rows = table(result)
    of_bias, of_price = ([row for row in rows if (row.benchmark in _PRICE) is price] for price in (False, True))
    for title, some in (("Benchmarks", of_bias), ("Price", of_price)):
        if some:
            yield from (f"## {title}", "", *_table(some), "")
    yield from _notes(result)
    for name in result["benchmarks"]:
        groups = group_table(result, name)
        if groups:
            yield from (f"<details><summary>{plain(name)} by group</summary>", "", *_table(groups), "", "</details>", "")
    yield from _curves(result)
    if command:
        yield from ("## Reproduce", "", "```", runs.shown_command(list(command)[3:]), "```", "")
    yield "Each line: base → tuned on the same items, 95 % bootstrap intervals, p of a paired randomization test, corrected by"
    yield "Holm over the table. Good news must survive the correction; a clear change for the worse need not."


def _what(provenance: Mapping[str, Any]) -> Iterator[str]:
    strengths = provenance.get("strengths") or [provenance.get("strength", 1.0)]
    limit = provenance.get("limit")
    facts = {
        "Model": f"{plain(Path(provenance['model']).name)} (SHA-256 `{provenance.get('model_sha256', '')[:16]}`)",
        "Adapter": "none: the base model alone",
        "Strength": ", ".join(f"{strength:g}" for strength in strengths),
        "Backend": plain(provenance.get("backend", "")),
        "Items": f"at most {limit:,} of each benchmark, drawn by the seed" if limit else "all",
        "Seed": str(provenance.get("seed", "")),
        "Code": f"BiasDPO {provenance.get('code_version', '')}",
        "Report": datetime.now(UTC).date().isoformat(),
    }
    if provenance.get("adapter"):
        facts["Adapter"] = f"{plain(provenance['adapter'])} (SHA-256 `{provenance.get('adapter_sha256', '')[:16]}`)"
    yield from (f"- {name}: {value}" for name, value in facts.items())
    yield ""


def _table(rows: Sequence[TableRow]) -> Iterator[str]:
    grouped = any(row.group for row in rows)
    first = "Group | Metric" if grouped else "Benchmark | Metric"
    yield f"| {first} | n | Base | Tuned | Difference | p (Holm) | Verdict |"
    yield "|---|---|---:|---:|---:|---:|---:|---|"
    for row in rows:
        better = f" ({row.better} is better)" if row.better else ""
        mark = "" if row.comparable else " *"
        cells = (
            plain(row.group if grouped else row.benchmark),
            f"{plain(row.metric)}{better}",
            f"{row.n:,}{mark}",
            _number(row.base, row.base_ci),
            _number(row.tuned, row.tuned_ci),
            _number(row.difference, row.ci),
            "" if row.p_holm is None else _p(row.p_holm),
            row.verdict,
        )
        yield f"| {' | '.join(cells)} |"


def _notes(result: Mapping[str, Any]) -> Iterator[str]:
    """What a reader must know of the benchmarks beside their figures."""
    notes = []
    for name, found in result["benchmarks"].items():
        if found.get("not_comparable"):
            notes.append(f"\\* {name}: not comparable with other evaluations: {found['not_comparable']}.")
        if found.get("not_as_published"):
            notes.append(f"{name}: not comparable with published figures: {plain(found['not_as_published'])}.")
        if found["n_failed"]:
            reason = found["failures"][0]["reason"] if found.get("failures") else "no reason is known"
            notes.append(f"{name}: {found['n_failed']:,} items could not be scored, and are not; the first: {plain(reason)}")
        baseline = found.get("pick_the_longer_baseline")
        if baseline is not None:
            notes.append(f"{name}: picking the longer completion is right in {baseline:.3f} of the pairs.")
        if found.get("data_sha256"):
            notes.append(f"{name}: SHA-256 of the data `{found['data_sha256'][:16]}`.")
    if notes:
        yield from (*(f"- {note}" for note in notes), "")


def _curves(result: Mapping[str, Any]) -> Iterator[str]:
    if not result.get("curve"):
        return
    lines = {(name, metric): points(result, name, metric) for name, metric in [*metrics(result), PRICE]}
    lines = {key: line for key, line in lines.items() if line}
    strengths = sorted({point.strength for line in lines.values() for point in line})
    yield from ("## By strength", "", f"| Benchmark | Metric | {' | '.join(f'{s:g}' for s in strengths)} |")
    yield f"|---|---|{'---:|' * len(strengths)}"
    for (name, metric), line in lines.items():
        at = {point.strength: _number(point.value, point.value_ci) for point in line}
        yield f"| {plain(name)} | {plain(metric)} | {' | '.join(at.get(strength, '') for strength in strengths)} |"
    yield ""


def _side_by_side(labelled: Sequence[Labelled]) -> Iterator[str]:
    for label, result in labelled:
        yield from (f"## {plain(label)}: {_who(result)}", "", *_what(result["provenance"]))
    yield from ("## Tuned", "", "Without an adapter: base. \\* may not be compared, for the reason below.", "")
    yield f"| Benchmark | Metric | {' | '.join(plain(label) for label, _ in labelled)} |"
    yield f"|---|---|{'---:|' * len(labelled)}"
    rows = compare(labelled)
    for row in rows:
        better = f" ({row.better} is better)" if row.better else ""
        cells = [_cell(cell) for cell in row.cells]
        yield f"| {plain(row.benchmark)} | {plain(row.metric)}{better}{'' if row.comparable else ' *'} | {' | '.join(cells)} |"
    whys = {row.benchmark: row.why_not for row in rows if not row.comparable}
    if whys:
        yield from ("", *(f"- \\* {plain(name)}: {why}" for name, why in whys.items()))


def _cell(row: TableRow | None) -> str:
    if row is None:
        return ""
    if row.tuned is not None:
        value = _number(row.tuned, row.tuned_ci)
    else:
        value = _number(row.base, row.base_ci) if row.base is not None else _number(row.difference, row.ci)
    return f"{value}<br>{row.verdict}" if row.verdict else value


def _who(result: Mapping[str, Any]) -> str:
    provenance = result["provenance"]
    model = Path(provenance["model"]).name
    return plain(f"{provenance['adapter']} on {model}" if provenance.get("adapter") else model)


def _number(value: float | None, ci: Ci | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if ci is None else f"{value:.4g} [{ci[0]:.4g}, {ci[1]:.4g}]"


def _p(p_value: float) -> str:
    return f"{p_value:.2g}" if p_value >= 0.0001 else "< 0.0001"


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


# CSV


def csv_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a metric, overall and by group. The columns are those of `TableRow`, an interval in two (`base_ci_low`,
    `base_ci_high`), then model and adapter."""
    provenance = result["provenance"]
    rows = [*table(result), *(row for name in result["benchmarks"] for row in group_table(result, name))]
    return [{**_flat(row), "model": provenance["model"], "adapter": provenance.get("adapter", "")} for row in rows]


def write_csv(result: Mapping[str, Any], path: Path) -> Path:
    """Write `csv_rows` as a CSV file, UTF-8; returns its path."""
    rows = csv_rows(result)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _columns())
        writer.writeheader()
        writer.writerows(rows)
    return path


def _columns() -> list[str]:
    names = [field.name for field in fields(TableRow)]
    columns = [part for name in names for part in ([f"{name}_low", f"{name}_high"] if name in _INTERVALS else [name])]
    return [*columns, "model", "adapter"]


def _flat(row: TableRow) -> dict[str, Any]:
    values = asdict(row)
    for name in _INTERVALS:
        low, high = values.pop(name) or (None, None)
        values |= {f"{name}_low": low, f"{name}_high": high}
    return values


# The adapter's card


def add_to_card(result: Mapping[str, Any], workspace: Workspace, command: Sequence[str] = ()) -> Path:
    """Put the report into the card (README.md) of the adapter that was evaluated, in place of an earlier one; returns the card.

    Only of a run of this workspace, and of the very adapter that is there now. Raises EvaluationError where it is another's,
    or not whole, RefusedError on a public Space.
    """
    refuse_on_public_space("Writing into an adapter's card")
    provenance = result["provenance"]
    name = provenance.get("adapter", "")
    adapter = next((one for one in models.adapters(workspace) if one.id == name), None)
    if adapter is None or adapter.folder.parent.parent != workspace.runs:
        raise EvaluationError(
            f"{name or 'The base model'} is no run's adapter in this workspace, so it has no card to write into"
        )
    if models.adapter_sha256(adapter) != provenance.get("adapter_sha256"):
        raise EvaluationError(f"Run {name!r} has another adapter now than the one that was evaluated: evaluate it again")
    if provenance.get("interrupted"):
        raise EvaluationError("What was interrupted is no result for a card: resume the evaluation, then add it")
    card = adapter.folder / CARD
    section = _lines([BEGIN, "## Evaluation", "", *_deeper(_report(result, command)), "", END])
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {plain(name)}\n"
    with replacing(card) as temporary:
        temporary.write_text(_with_section(before, section), encoding="utf-8")
    return card


def _deeper(lines: Iterator[str]) -> Iterator[str]:
    """Headings one level below the section's own."""
    return (f"#{line}" if line.startswith("## ") else line for line in lines)


def _with_section(card: str, section: str) -> str:
    """The card with this section in place of the one it has, else at its end."""
    begin, end = card.find(BEGIN), card.find(END)
    if 0 <= begin < end:
        return card[:begin] + section + card[end + len(END) :].removeprefix("\n")
    return card.rstrip("\n") + "\n\n" + section
