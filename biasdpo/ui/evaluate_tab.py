"""The Evaluate tab: evaluations, the chosen one, a new one, several against each other. The tab only reads files: an evaluation
is a process of its own, which neither a closed page nor the end of the app stops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo.engines import EnginePool
from biasdpo.errors import BiasDPOError
from biasdpo.ui import evaluate_render, render
from biasdpo.ui.evaluate_new import NewEvaluationPanel
from biasdpo.ui.evaluate_one import EvaluationActions
from biasdpo.ui.evaluate_reading import Results
from biasdpo.ui.evaluate_several import MOST, CompareEvaluations
from biasdpo.ui.label_sessions import LabelSessions
from biasdpo.ui.news import Mark, Updates
from biasdpo.ui.store import Store
from biasdpo.workspace import is_public_space

_FOCUS_DELETE = "() => window.bdFocus('#eval-delete', '#eval-new-button')"
_FOCUS_LIST = "() => window.bdFocus('#eval-table tr[aria-current] button', '#eval-new-button', '#eval-start')"


class EvaluateTab(NewEvaluationPanel, EvaluationActions, CompareEvaluations):
    """One tab over the workspace's evaluations; `build` is called once, inside the page's Blocks."""

    def __init__(
        self,
        store: Store,
        pool: EnginePool,
        sessions: LabelSessions,
        data_dir: Path | None,
        pick_adapter: Callable[[str, str], Updates],
        compare_outputs: list[Any],
        compare_prompt: gr.Textbox,
    ) -> None:
        """`pick_adapter`, `compare_outputs`, `compare_prompt`: how the Compare tab takes over a model, an adapter, a prompt."""
        self.store = store
        self.pool = pool
        self.sessions = sessions
        self.data_dir = "" if data_dir is None else str(data_dir)
        self.pick_compared = pick_adapter
        self.compare_outputs = compare_outputs
        self.compare_prompt = compare_prompt
        self.results = Results()
        self.estimates: dict[str, threading.Event] = {}

    def build(self, demo: gr.Blocks, tabs: gr.Tabs, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.tabs = tabs
        here = not is_public_space()
        self.view = gr.State("")
        self.mark = gr.State({})
        self.asked = gr.State("")
        self.chosen = gr.Textbox("", elem_id="eval-chosen")  # hidden by the style; kept by the page, whatever becomes of the app
        gr.HTML("" if here else evaluate_render.refused(), js_on_load=None, elem_id="eval-machine")
        self.empty = gr.HTML(
            evaluate_render.no_evaluations(self.data_dir) if here else "", js_on_load=None, visible=False, elem_id="eval-empty"
        )
        with gr.Column(visible=False, elem_id="eval-list") as self.list_box:
            with gr.Row(elem_id="eval-list-top"):
                gr.HTML("<h2>Evaluations</h2>", js_on_load=None)
                self.new_button = gr.Button(
                    "New evaluation", size="sm", elem_id="eval-new-button", min_width=120, scale=0, visible=here
                )
                self.several_button = gr.Button("Compare several", size="sm", elem_id="eval-several", min_width=120, scale=0)
            self.table = gr.HTML("", js_on_load="window.bdTable(element, trigger)", apply_default_css=False, elem_id="eval-table")
        with gr.Column(visible=False, elem_id="eval-new") as self.new_box:
            gr.HTML("<h2>New evaluation</h2>", js_on_load=None)
            self.build_new()
        with gr.Column(visible=False, elem_id="eval-one") as self.one_box:
            self._build_one()
        with gr.Column(visible=False, elem_id="eval-side-by-side") as self.several_box:
            gr.HTML("<h2>Several against each other</h2>", js_on_load=None)
            self.picked = gr.Dropdown(
                [], multiselect=True, max_choices=MOST, label="Evaluations", elem_id="eval-picked", min_width=300
            )
            self.several_saves = self._saves("eval-several-saves")
            self.comparison = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-comparison")
        self.timer = gr.Timer(active=False)  # goes once the tab was opened
        self._wire(demo, tab)

    def _build_one(self) -> None:
        self.head = gr.HTML("", js_on_load=None, elem_id="eval-head")
        with gr.Row(elem_id="eval-actions"):
            self.cancel_button = self._action("Cancel", "eval-cancel", variant="stop")
            self.resume_button = self._action("Resume", "eval-resume", variant="primary")
            self.compare_button = self._action("Open in Compare", "eval-to-compare")
            self.card_button = self._action("Put it into the adapter’s card", "eval-card")
            self.delete_button = self._action("Delete …", "eval-delete")
        self.confirm_text = gr.HTML("", js_on_load=None, elem_id="eval-confirm-text")
        with gr.Row(visible=False, elem_id="eval-confirm") as self.confirm_box:
            self.really_button = gr.Button("Really delete", variant="stop", size="sm", elem_id="eval-really-delete", min_width=60)
            self.keep_button = gr.Button("Keep it", size="sm", elem_id="eval-keep", min_width=60)
        self.notice = gr.HTML("", js_on_load=None, elem_id="eval-notice")
        with gr.Column(visible=False, elem_id="eval-result") as self.result_box:
            self.outcome = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-outcome")
            self.saves = self._saves("eval-saves")
            gr.HTML("<h3>What changed: tuned − base</h3>", js_on_load=None)
            self.forest = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-forest")
            with gr.Column(visible=False, elem_id="eval-plane-box") as self.plane_box:
                gr.HTML("<h3>Bias and fluency by strength</h3>", js_on_load=None)
                self.plane_pick = gr.Dropdown([], label="Metric of the curve", elem_id="eval-plane-pick", min_width=240)
                self.plane = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-plane")
            with gr.Column(visible=False, elem_id="eval-groups-box") as self.groups_box:
                gr.HTML("<h3>By category and group</h3>", js_on_load=None)
                self.group_pick = gr.Dropdown([], label="Metric by group", elem_id="eval-group-pick", min_width=240)
                self.bars = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-bars")
            with gr.Column(visible=False, elem_id="eval-flips-box") as self.flips_box:
                gr.HTML("<h3>Items that flipped</h3>", js_on_load=None)
                with gr.Row():
                    self.flip_pick = gr.Dropdown([], label="Benchmark", elem_id="eval-flip-pick", min_width=200)
                    self.flip_way = gr.Dropdown([], label="Which way", elem_id="eval-flip-way", min_width=260)
                self.flip_most = gr.State(0)
                self.flips = gr.HTML(
                    "", js_on_load="window.bdFlips(element, trigger)", apply_default_css=False, elem_id="eval-flips"
                )
                self.more_button = gr.Button("More", size="sm", visible=False, elem_id="eval-more")
        self.made_by = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="eval-made-by")

    def _saves(self, elem_id: str) -> gr.HTML:
        """Buttons that ask for a file and save it: it is made when it is asked for."""

        def saved(asked: Any) -> dict[str, str]:  # Gradio marks the function, and a method can't be marked
            try:
                return self.saved(asked)
            except (BiasDPOError, OSError) as exc:
                return {"error": str(exc)}

        load = "window.bdSaves(element, server)"
        return gr.HTML("", js_on_load=load, apply_default_css=False, elem_id=elem_id, server_functions=[saved])

    @staticmethod
    def _action(title: str, elem_id: str, variant: Any = "secondary") -> gr.Button:
        return gr.Button(title, size="sm", variant=variant, elem_id=elem_id, min_width=60, visible=False)

    @property
    def all_outputs(self) -> list[Any]:
        """All of the tab that opening it may touch."""
        return [*self.one_outputs, *self.new_outputs]

    def _wire(self, demo: gr.Blocks, tab: gr.Tab) -> None:
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        raw = quick | {"preprocess": False}
        here = [self.view, self.chosen, self.mark]
        shown = self.all_outputs
        demo.load(self.open_page, None, [self.tabs, self.chosen], **quick)
        tab.select(self.open_tab, [*here, *self.new_inputs], shown, **raw)
        self.timer.tick(self.watch, here, self.seen_outputs, **quick)
        self.chosen.change(None, self.chosen, None, js="(id) => window.bdEvaluation(id)", api_visibility="private")
        # Not "always_last": for a click during another one Gradio would send the first one's row again.
        self.table.click(self.choose_row, None, shown, trigger_mode="multiple", **quick).success(
            None, None, None, js="() => window.bdShow('eval-one')", api_visibility="private"
        )
        self.new_button.click(self.open_new, self.new_inputs, shown, **raw).then(
            None, None, None, js="() => window.bdShow('eval-new')", api_visibility="private"
        )
        self.several_button.click(self.open_several, self.picked, [*shown, self.picked, *self.several_outputs], **raw).then(
            None, None, None, js="() => window.bdShow('eval-side-by-side')", api_visibility="private"
        )
        self.picked.input(self.compare, self.picked, self.several_outputs, trigger_mode="always_last", **raw)
        self.wire_new(demo)
        self.start_button.click(self.start, self.new_inputs, shown, concurrency_limit=1, **raw | {"queue": True})
        self._wire_one(quick, raw)

    def _wire_one(self, quick: dict[str, Any], raw: dict[str, Any]) -> None:
        shown = self.all_outputs
        self.cancel_button.click(self.cancel, self.chosen, self.notice, **quick)
        self.resume_button.click(self.resume, self.chosen, shown, **quick)
        self.card_button.click(self.to_card, self.chosen, self.notice, **quick)
        asking = [self.asked, self.confirm_box, self.confirm_text, self.notice]
        self.delete_button.click(self.ask_delete, self.chosen, asking, **quick).then(
            None, None, None, js="() => window.bdFocus('#eval-keep')", api_visibility="private"
        )
        self.keep_button.click(self.keep, None, asking[:3], **quick).then(
            None, None, None, js=_FOCUS_DELETE, api_visibility="private"
        )
        self.really_button.click(self.delete, self.asked, shown, **quick).then(
            None, None, None, js=_FOCUS_LIST, api_visibility="private"
        )
        away = [self.notice, self.tabs, *self.compare_outputs, self.compare_prompt]
        self.compare_button.click(self.open_in_compare, self.chosen, away, **quick)
        self.group_pick.input(self.pick_bars, [self.chosen, self.group_pick], self.bars, **raw)
        self.plane_pick.input(self.pick_plane, [self.chosen, self.plane_pick], self.plane, **raw)
        picked = [self.chosen, self.flip_pick]
        self.flip_pick.input(self.pick_flips, picked, self.flip_outputs, **raw)
        self.flip_way.input(self.filter_flips, [*picked, self.flip_way], self.flip_outputs, **raw)
        self.more_button.click(self.more_flips, [*picked, self.flip_way, self.flip_most], self.flip_outputs, **raw)
        # Through the queue, since gr.Warning travels with its messages.
        taken = raw | {"queue": True, "concurrency_limit": None, "trigger_mode": "multiple"}
        self.flips.click(self.take_flip, picked, away, **taken)

    # Opening

    def open_page(self, request: gr.Request) -> Updates:
        """A link that names an evaluation opens it."""
        evaluation_id = request.query_params.get("evaluation", "")
        return {self.tabs: gr.Tabs(selected="evaluate"), self.chosen: evaluation_id} if evaluation_id else {self.chosen: ""}

    def open_tab(self, view: str, chosen: str, mark: Mark, *new: Any) -> Updates:
        """The tab was chosen: what was on, else the evaluation under way, else the newest, else the panel for the first."""
        try:
            if view == "new":
                return self.watch(view, chosen, mark) | self.first("", *new)
            every = self.every()
            known = [one.id for one in every]
            if view == "several" or (view == "one" and chosen in known):  # as it was left, with what was picked of it
                return self.watch(view, chosen, mark)
            active = [one.id for one in every if one.is_active]
            shown = chosen if chosen in known else next(iter([*active, *known]), "")
            if not shown:
                return self.open_new(*new)
            gone = f"No evaluation {chosen!r} any more: {shown} is shown." if chosen and chosen not in known else ""
            return self.show_one(shown, render.note(gone))
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, mark)

    def open_new(self, *new: Any, run_id: str = "") -> Updates:
        """The panel for a new evaluation."""
        return self.changed(self.every(), "", {}) | self.turn_to("new") | self.first(run_id, *new)

    def open_run(self, run_id: Any, *new: Any) -> Updates:
        """The panel for a new evaluation of this run, from its own panel on the Train tab."""
        if not isinstance(run_id, str) or not run_id:
            return {self.tabs: gr.skip()}
        return self.open_new(*new, run_id=run_id) | {self.tabs: gr.Tabs(selected="evaluate")}

    def choose_row(self, event: gr.EventData) -> Updates:
        """A row of the list was chosen."""
        wanted = event._data.get("id") if isinstance(event._data, dict) else None
        try:
            return self.show_one(str(wanted))
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, {})
