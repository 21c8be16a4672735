"""What the Evaluate tab shows of the evaluations, and of the chosen one: read from their files, sent where it changed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio as gr

from biasdpo import evaluations
from biasdpo.errors import BiasDPOError
from biasdpo.evaluations import Evaluation, curve
from biasdpo.evaluations.flips import flips
from biasdpo.evaluations.table import table
from biasdpo.ui import evaluate_bars, evaluate_flips, evaluate_forest, evaluate_render, evaluate_results, render
from biasdpo.ui.evaluate_reading import Result, Results, version
from biasdpo.ui.evaluate_words import benchmark_title, metric_title
from biasdpo.ui.jobs_view import JobsView
from biasdpo.ui.news import Mark, Updates
from biasdpo.workspace import is_public_space


class EvaluationsView(JobsView[Evaluation]):
    """The tab's components of evaluations, and what is written into them."""

    noun = "evaluation"
    tab_id = "evaluate"

    results: Results
    several_box: gr.Column
    head: gr.HTML
    cancel_button: gr.Button
    resume_button: gr.Button
    compare_button: gr.Button
    card_button: gr.Button
    result_box: gr.Column
    outcome: gr.HTML
    saves: gr.HTML
    forest: gr.HTML
    groups_box: gr.Column
    group_pick: gr.Dropdown
    bars: gr.HTML
    plane_box: gr.Column
    plane_pick: gr.Dropdown
    plane: gr.HTML
    flips_box: gr.Column
    flip_pick: gr.Dropdown
    flip_way: gr.Dropdown
    flip_most: gr.State
    flips: gr.HTML
    more_button: gr.Button
    made_by: gr.HTML

    @property
    def flip_outputs(self) -> list[Any]:
        """All that another choice of flips may touch."""
        return [self.flip_way, self.flip_most, self.flips, self.more_button]

    @property
    def seen_outputs(self) -> list[Any]:
        buttons = [self.cancel_button, self.resume_button, self.compare_button, self.card_button, self.delete_button]
        boxes = [self.result_box, self.groups_box, self.plane_box, self.flips_box]
        shown = [self.outcome, self.saves, self.forest, self.bars, self.plane, self.made_by]
        picks = [self.group_pick, self.plane_pick, self.flip_pick]
        return [*self.list_outputs, self.head, *buttons, *boxes, *shown, *picks, *self.flip_outputs]

    @property
    def panels(self) -> Mapping[str, gr.Column]:
        return {**super().panels, "several": self.several_box}

    def every(self) -> list[Evaluation]:
        return evaluations.list_evaluations(self.workspace)

    def id_of(self, job: Evaluation) -> str:
        return job.id

    def name_of(self, job: Evaluation) -> str:
        return job.id

    def found(self, job_id: str) -> Evaluation:
        return evaluations.find(job_id, self.workspace)

    def deleting(self, job: Evaluation) -> str:
        return evaluate_render.deleting(job)

    def delete_files(self, job: Evaluation) -> None:
        evaluations.delete(job)

    def listed(self, every: Sequence[Evaluation], chosen: str) -> str:
        return evaluate_render.listed([(one, self.results.about(one)) for one in every], chosen)

    def parts_of(self, job: Evaluation, mark: Mark) -> tuple[Updates, Mark]:
        parts = self._parts(job)
        now = hash((job.id, version(job)))
        if now != mark.get("result"):  # a result is drawn once
            parts |= self._result_parts(job)
        return parts, {"result": now}

    def _parts(self, one: Evaluation) -> Updates:
        here = not is_public_space()
        has_adapter = self.results.about(one).adapter not in ("", "none")
        return {
            self.head: evaluate_render.head(one),
            self.cancel_button: gr.update(visible=here and one.is_active),
            self.resume_button: gr.update(
                visible=here and one.request is not None and one.state in ("cancelled", "interrupted", "failed")
            ),
            self.compare_button: gr.update(visible=one.has_result and has_adapter and not one.is_active),
            self.card_button: gr.update(visible=here and one.state == "finished" and has_adapter),
            self.delete_button: gr.update(visible=here and not one.is_active),
            self.made_by: _made_by(one) if here else "",
        }

    def _result_parts(self, one: Evaluation) -> Updates:
        """The result, or nothing of it; one that can't be read is said in its place."""
        if not one.has_result:
            return {self.result_box: gr.update(visible=False)}
        try:
            result = self.results.of(one)
        except (BiasDPOError, OSError) as exc:
            hidden = [self.groups_box, self.plane_box, self.flips_box]
            empty = {self.saves: "", self.forest: ""} | {box: gr.update(visible=False) for box in hidden}
            return {self.result_box: gr.update(visible=True), self.outcome: render.error(str(exc))} | empty
        groups = evaluate_bars.grouped(result)
        curves = [(f"{benchmark_title(b)} · {metric_title(m)}", f"{b}/{m}") for b, m in curve.metrics(result)]
        if not result.get("curve"):
            curves = []
        decided = [
            name for name, found in result["benchmarks"].items() if any("outcome" in i for i in found.get("items", ())[:1])
        ]
        flipped = {name: len(flips(result, name)) for name in decided}
        first = max(flipped, key=lambda name: flipped[name], default="")
        titled = [(f"{benchmark_title(name)} ({count:,})", name) for name, count in flipped.items()]
        return {
            self.result_box: gr.update(visible=True),
            self.outcome: "".join(
                part(result)
                for part in (
                    evaluate_results.summary,
                    evaluate_results.facts,
                    evaluate_results.result_table,
                    evaluate_results.failures,
                )
            ),
            self.saves: evaluate_render.saves([one.id]),
            self.forest: evaluate_forest.forest([(one.id, result)]),
            self.groups_box: gr.update(visible=bool(groups)),
            self.group_pick: gr.update(choices=groups, value=groups[0][1] if groups else None),
            self.bars: self.drawn_bars(result, groups[0][1]) if groups else "",
            self.plane_box: gr.update(visible=bool(curves)),
            self.plane_pick: gr.update(choices=curves, value=curves[0][1] if curves else None),
            self.plane: self.drawn_plane(result, curves[0][1]) if curves else "",
            self.flips_box: gr.update(visible=bool(decided)),
            self.flip_pick: gr.update(choices=titled, value=first or None),
        } | (self.drawn_flips(result, first) if first else {})

    def drawn_bars(self, result: Result, picked: str) -> str:
        """One metric by group. `picked`: "benchmark/metric"."""
        benchmark, _, metric = picked.partition("/")
        return evaluate_bars.bars(result, benchmark, metric)

    def drawn_plane(self, result: Result, picked: str) -> str:
        """One metric by strength against perplexity. `picked`: "benchmark/metric"."""
        benchmark, _, metric = picked.partition("/")
        better = next((row.better for row in table(result) if (row.benchmark, row.metric) == (benchmark, metric)), "")
        return evaluate_bars.plane(curve.points(result, benchmark, metric), benchmark, metric, better)

    def drawn_flips(self, result: Result, benchmark: str, wanted: str = "", most: int = evaluate_flips.PAGE) -> Updates:
        """The flips of one benchmark that went the wanted way."""
        every = flips(result, benchmark)
        shown = evaluate_flips.filtered(every, wanted)
        scored = result["benchmarks"].get(benchmark, {}).get("n", 0)
        left = len(shown) - most
        return {
            self.flip_way: gr.update(choices=evaluate_flips.ways(every), value=wanted, visible=bool(every)),
            self.flip_most: most,
            self.flips: evaluate_flips.listed(shown, benchmark, scored, most),
            self.more_button: gr.update(visible=left > 0, value=f"Show {min(left, evaluate_flips.PAGE)} more"),
        }


def _made_by(one: Evaluation) -> str:
    """The command that does the same."""
    if one.request is None:
        return ""
    command = f"python {shlex.join(one.request.command()[1:])}"
    return (
        f'<div class="bd-command"><span>The same by command:</span><code>{escape(command)}</code><button type="button" '
        f'class="bd-copy" data-text="{escape(command)}" aria-label="Copy the command">Copy</button></div>'
    )
