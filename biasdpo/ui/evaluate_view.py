"""What the Evaluate tab shows of the evaluations, and of the chosen one: read from their files, sent where it changed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
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
from biasdpo.ui.news import Mark, Updates, key, news
from biasdpo.ui.store import Store
from biasdpo.workspace import Workspace, is_public_space

_TICK_SECONDS = 1.0  # while an evaluation is under way
_SLOW_TICK_SECONDS = 5.0  # else: one may be written by the command line


class EvaluationsView:
    """The tab's components of evaluations, and what is written into them. `mark`: see `news`."""

    store: Store
    results: Results
    view: gr.State
    chosen: gr.Textbox
    mark: gr.State
    timer: gr.Timer
    empty: gr.HTML
    list_box: gr.Column
    table: gr.HTML
    new_box: gr.Column
    one_box: gr.Column
    several_box: gr.Column
    head: gr.HTML
    cancel_button: gr.Button
    resume_button: gr.Button
    compare_button: gr.Button
    card_button: gr.Button
    delete_button: gr.Button
    asked: gr.State
    confirm_box: gr.Row
    confirm_text: gr.HTML
    notice: gr.HTML
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
    def workspace(self) -> Workspace:
        return self.store.workspace

    @property
    def flip_outputs(self) -> list[Any]:
        """All that another choice of flips may touch."""
        return [self.flip_way, self.flip_most, self.flips, self.more_button]

    @property
    def seen_outputs(self) -> list[Any]:
        """All that a tick of the clock may touch."""
        buttons = [self.cancel_button, self.resume_button, self.compare_button, self.card_button, self.delete_button]
        boxes = [self.result_box, self.groups_box, self.plane_box, self.flips_box]
        shown = [self.outcome, self.saves, self.forest, self.bars, self.plane, self.made_by]
        picks = [self.group_pick, self.plane_pick, self.flip_pick]
        first = [self.notice, self.mark, self.timer, self.empty, self.list_box, self.table, self.head]
        return [*first, *buttons, *boxes, *shown, *picks, *self.flip_outputs]

    @property
    def one_outputs(self) -> list[Any]:
        """All that choosing an evaluation may touch."""
        asking = [self.asked, self.confirm_box, self.confirm_text]
        boxes = [self.new_box, self.one_box, self.several_box]
        return [*self.seen_outputs, self.view, *boxes, self.chosen, *asking]

    def turn_to(self, view: str) -> Updates:
        """One of the three panels: "new", "one" or "several"."""
        return {
            self.view: view,
            self.new_box: gr.update(visible=view == "new" and not is_public_space()),
            self.one_box: gr.update(visible=view == "one"),
            self.several_box: gr.update(visible=view == "several"),
        }

    def every(self) -> list[Evaluation]:
        """All evaluations, the newest first."""
        return evaluations.list_evaluations(self.workspace)

    def listed(self, every: Sequence[Evaluation], chosen: str) -> str:
        """The list, with what was asked for of each."""
        return evaluate_render.listed([(one, self.results.about(one)) for one in every], chosen)

    def watch(self, view: str, chosen: str, mark: Mark) -> Updates:
        """A tick of the clock."""
        try:
            return self.changed(self.every(), chosen if view == "one" else "", mark)
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, mark)

    def unlisted(self, exc: Exception, mark: Mark) -> Updates:
        """The evaluations can't be read: said in place of the list, which the next tick that can read them brings back."""
        line = (
            str(exc) if isinstance(exc, BiasDPOError) else f"The evaluations can't be read: {exc}; they come back when they can"
        )
        said = (self.table, self.list_box)
        kept = {name: value for name, value in mark.items() if name not in map(key, said)}
        return {self.table: render.error(line), self.list_box: gr.update(visible=True), self.mark: kept}

    def show_one(self, evaluation_id: str, notice: str = "") -> Updates:
        """An evaluation was chosen or started: all of it. One that is gone: the newest other, or the panel for a new one."""
        every = self.every()
        known = [one.id for one in every]
        shown = evaluation_id if evaluation_id in known else next(iter(known), "")
        return (
            ({} if shown or is_public_space() else self.fresh(notice))
            | self.changed(every, shown, {})
            | self.turn_to("one" if shown else "new")
            | {
                self.chosen: shown,
                self.notice: notice,
                self.asked: "",
                self.confirm_box: gr.update(visible=False),
                self.confirm_text: "",
            }
        )

    def fresh(self, notice: str) -> Updates:
        """The panel for a new evaluation as it is at first; the panel's own."""
        raise NotImplementedError

    def changed(self, every: Sequence[Evaluation], chosen: str, mark: Mark) -> Updates:
        """What has changed since `mark`."""
        active = any(one.is_active for one in every)
        parts: Updates = {
            self.timer: gr.update(value=_TICK_SECONDS if active else _SLOW_TICK_SECONDS, active=True),
            self.empty: gr.update(visible=not every),
            self.list_box: gr.update(visible=bool(every)),
            self.table: self.listed(every, chosen),
        }
        one = next((one for one in every if one.id == chosen), None)
        read = mark.get("result", 0)
        if one is not None:
            parts |= self._parts(one)
            now = hash((one.id, version(one)))
            if now != read:  # a result is drawn once
                parts |= self._result_parts(one)
                read = now
        new, marked = news(parts, mark)
        if one is not None and mark.get("active") and not one.is_active:
            new[self.notice] = ""  # that it was asked to end is said by its state now
        return new | {self.mark: marked | {"result": read, "active": one is not None and one.is_active}}

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
