"""Several evaluations against each other: the same metrics in columns, and their differences in one forest plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.evaluations.compare import ComparedRow, compare
from biasdpo.evaluations.table import TableRow
from biasdpo.ui import evaluate_forest, evaluate_render, render
from biasdpo.ui.evaluate_view import EvaluationsView
from biasdpo.ui.evaluate_words import adapter_title, benchmark_title, direction, interval, metric_title, number, of_row, setup
from biasdpo.ui.news import Updates

MOST = 6  # as many as the page has colours

Labelled = tuple[str, Mapping[str, Any]]


class CompareEvaluations(EvaluationsView):
    """The handlers of the panel."""

    picked: gr.Dropdown
    comparison: gr.HTML
    several_saves: gr.HTML

    @property
    def several_outputs(self) -> list[Any]:
        return [self.comparison, self.several_saves]

    def open_several(self, picked: Any) -> Updates:
        """The panel was opened: all results can be picked; the two newest are, at first."""
        try:
            every = [one for one in self.every() if one.has_result]
        except (BiasDPOError, OSError) as exc:
            return {self.comparison: render.error(str(exc))}
        known = [one.id for one in every]
        kept = [name for name in picked or () if name in known] if isinstance(picked, list) else []
        kept = kept or known[:2]
        return (
            self.turn_to("several")
            | {self.table: self.listed(self.every(), ""), self.picked: gr.update(choices=known, value=kept)}
            | self.compare(kept)
        )

    def compare(self, picked: Any) -> Updates:
        """The evaluations that were picked."""
        try:
            names = [name for name in picked if isinstance(name, str)] if isinstance(picked, list) else []
            if len(names) > MOST:
                raise ConfigError(f"At most {MOST} evaluations side by side: got {len(names)}; take some out")
            found = {one.id: one for one in self.every() if one.has_result}
            labelled = [(name, self.results.of(found[name])) for name in names if name in found]
            if not labelled:
                return {self.comparison: render.note("Choose two or more evaluations to compare."), self.several_saves: ""}
            return {
                self.comparison: comparison(labelled),
                self.several_saves: evaluate_render.saves([name for name, _ in labelled]),
            }
        except (BiasDPOError, OSError) as exc:
            return {self.comparison: render.error(str(exc)), self.several_saves: ""}


def comparison(labelled: Sequence[Labelled]) -> str:
    """A column an evaluation, then the forest."""
    why_not = {row.benchmark: row.why_not for row in compare(labelled)}
    forest = evaluate_forest.forest(labelled, why_not)
    return f'{table(labelled)}<h3 class="bd-compared">Differences, tuned − base</h3>{forest}'


def table(labelled: Sequence[Labelled]) -> str:
    """Metric by metric: base to tuned of each, with the verdict; what must not be set side by side says why."""
    rows = compare(labelled)
    heads = "".join(
        f'<th scope="col" class="bd-c{i % 6}">{escape(name)}<small>{escape(adapter_title(setup(result)[1]))}</small></th>'
        for i, (name, result) in enumerate(labelled)
    )
    body = []
    for name in dict.fromkeys(row.benchmark for row in rows):
        own = [row for row in rows if row.benchmark == name]
        why = f' <span class="bd-not-comparable">not side by side: {escape(own[0].why_not)}</span>' if own[0].why_not else ""
        body.append(
            f'<tr class="bd-eval-head"><th colspan="{len(labelled) + 1}" scope="colgroup">{escape(benchmark_title(name))} '
            f"<small>{_items(own[0])}{why}</small></th></tr>"
        )
        body += map(_row, own)
    return (
        '<div class="bd-scroll"><table class="bd-eval-table bd-eval-several"><thead><tr><th scope="col">Metric</th>'
        f"{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _items(row: ComparedRow) -> str:
    counts = [f"{cell.n:,}" for cell in row.cells if cell is not None]
    told = f"{counts[0]} items" if len(set(counts)) == 1 else f"{' / '.join(counts)} items"
    limited = any(cell is not None and not cell.comparable for cell in row.cells)
    return told + (" · not comparable with published figures" if limited else "")


def _row(row: ComparedRow) -> str:
    cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row.cells)
    way = f'<small class="bd-way">{escape(direction(row.better))}</small>' if row.better else ""
    return f'<tr><th scope="row">{escape(metric_title(row.metric))} {way}</th>{cells}</tr>'


def _cell(row: TableRow | None) -> str:
    if row is None:
        return "–"
    digits = of_row(row)
    if row.base is None:
        told = evaluate_forest.change(row)
    elif row.tuned is None:
        told = f"<b>{number(row.base, digits)}</b> <small>{interval(row.base_ci, digits)}</small>"
    else:
        told = f"{number(row.base, digits)} → <b>{number(row.tuned, digits)}</b> <small>{interval(row.tuned_ci, digits)}</small>"
    return f"{told} {evaluate_forest.verdict(row.verdict)}"
