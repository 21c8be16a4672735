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
from biasdpo.evaluations import Evaluation
from biasdpo.ui import evaluate_render
from biasdpo.ui.evaluate_new import NewEvaluationPanel
from biasdpo.ui.evaluate_one import EvaluationActions
from biasdpo.ui.evaluate_reading import Results
from biasdpo.ui.evaluate_several import MOST, CompareEvaluations
from biasdpo.ui.jobs_layout import QUICK, RAW, JobsLayout
from biasdpo.ui.label_sessions import LabelSessions
from biasdpo.ui.news import Updates
from biasdpo.ui.store import Store
from biasdpo.workspace import is_public_space


class EvaluateTab(NewEvaluationPanel, EvaluationActions, CompareEvaluations, JobsLayout[Evaluation]):
    """One tab over the workspace's evaluations; `build` is called once, inside the page's Blocks."""

    prefix = "eval"

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
        self.build_state()
        gr.HTML("" if here else evaluate_render.refused(), js_on_load=None, elem_id="eval-machine")
        self.build_list(empty=evaluate_render.no_evaluations(self.data_dir) if here else "")
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

    def build_list_buttons(self) -> None:
        self.several_button = gr.Button("Compare several", size="sm", elem_id="eval-several", min_width=120, scale=0)

    def _build_one(self) -> None:
        self.head = gr.HTML("", js_on_load=None, elem_id="eval-head")
        with gr.Row(elem_id="eval-actions"):
            self.cancel_button = self.action("Cancel", "cancel", variant="stop")
            self.resume_button = self.action("Resume", "resume", variant="primary")
            self.compare_button = self.action("Open in Compare", "to-compare")
            self.card_button = self.action("Put it into the adapter’s card", "card")
            self.delete_button = self.action("Delete …", "delete")
        self.build_asking()
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

    @property
    def all_outputs(self) -> list[Any]:
        return [*self.one_outputs, *self.new_outputs]

    def _wire(self, demo: gr.Blocks, tab: gr.Tab) -> None:
        demo.load(self.open_page, None, [self.tabs, self.chosen], **QUICK)
        self.wire_list(tab, self.new_inputs)
        self.chosen.change(None, self.chosen, None, js="(id) => window.bdEvaluation(id)", api_visibility="private")
        shown = self.all_outputs
        self.several_button.click(self.open_several, self.picked, [*shown, self.picked, *self.several_outputs], **RAW).then(
            None, None, None, js="() => window.bdShow('eval-side-by-side')", api_visibility="private"
        )
        self.picked.input(self.compare, self.picked, self.several_outputs, trigger_mode="always_last", **RAW)
        self.wire_new(demo)
        self.start_button.click(self.start, self.new_inputs, shown, concurrency_limit=1, **RAW | {"queue": True})
        self.wire_deleting()
        self._wire_one()

    def _wire_one(self) -> None:
        self.cancel_button.click(self.cancel, self.chosen, self.notice, **QUICK)
        self.resume_button.click(self.resume, self.chosen, self.all_outputs, **QUICK)
        self.card_button.click(self.to_card, self.chosen, self.notice, **QUICK)
        away = [self.notice, self.tabs, *self.compare_outputs, self.compare_prompt]
        self.compare_button.click(self.open_in_compare, self.chosen, away, **QUICK)
        self.group_pick.input(self.pick_bars, [self.chosen, self.group_pick], self.bars, **RAW)
        self.plane_pick.input(self.pick_plane, [self.chosen, self.plane_pick], self.plane, **RAW)
        picked = [self.chosen, self.flip_pick]
        self.flip_pick.input(self.pick_flips, picked, self.flip_outputs, **RAW)
        self.flip_way.input(self.filter_flips, [*picked, self.flip_way], self.flip_outputs, **RAW)
        self.more_button.click(self.more_flips, [*picked, self.flip_way, self.flip_most], self.flip_outputs, **RAW)
        # Through the queue, since gr.Warning travels with its messages.
        taken = RAW | {"queue": True, "concurrency_limit": None, "trigger_mode": "multiple"}
        self.flips.click(self.take_flip, picked, away, **taken)

    # Opening

    def open_page(self, request: gr.Request) -> Updates:
        """A link that names an evaluation opens it."""
        evaluation_id = request.query_params.get("evaluation", "")
        return {self.tabs: gr.Tabs(selected="evaluate"), self.chosen: evaluation_id} if evaluation_id else {self.chosen: ""}
