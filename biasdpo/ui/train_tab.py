"""The Train tab: runs, the chosen one, a new one, several compared. The tab only reads run folders: training is a process of its
own, which neither a closed page nor the end of the app stops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import gradio as gr

from biasdpo import runs
from biasdpo.engines import EnginePool
from biasdpo.errors import BiasDPOError
from biasdpo.ui import render, train_render
from biasdpo.ui.store import Store
from biasdpo.ui.train_compare import MOST_RUNS, CompareRuns
from biasdpo.ui.train_data import Updates
from biasdpo.ui.train_new import NewRunPanel
from biasdpo.ui.train_reading import see
from biasdpo.ui.train_run import RunActions
from biasdpo.workspace import is_public_space, refuse_on_public_space

_FOCUS_DELETE = "() => window.bdFocus('#train-delete', '#train-new-button')"
_FOCUS_LIST = "() => window.bdFocus('#train-table tr[aria-current] button', '#train-new-button')"


class TrainTab(NewRunPanel, RunActions, CompareRuns):
    """One tab over the workspace's run folders; `build` is called once, inside the page's Blocks."""

    def __init__(
        self, store: Store, pool: EnginePool, pick_adapter: Callable[[str, str], Updates], compare_outputs: list[Any]
    ) -> None:
        """`pick_adapter`, `compare_outputs`: how the Compare tab takes over a model and an adapter."""
        self.store = store
        self.pool = pool
        self.pick_adapter = pick_adapter
        self.compare_outputs = compare_outputs
        self.estimates: dict[str, threading.Event] = {}
        self.waiting: set[str] = set()

    def build(self, demo: gr.Blocks, tabs: gr.Tabs, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.tabs = tabs
        self.view = gr.State("")
        self.mark = gr.State({})
        self.probe_at = gr.State(None)
        self.log_open = gr.State(False)
        self.asked = gr.State("")
        self.chosen = gr.Textbox("", elem_id="train-chosen")  # hidden by the style; kept by the page, whatever becomes of the app
        self.machine = gr.HTML(train_render.refused() if is_public_space() else "", js_on_load=None, elem_id="train-machine")
        self.empty = gr.HTML(
            train_render.no_runs_here() if is_public_space() else train_render.no_runs(),
            js_on_load=None,
            visible=False,
            elem_id="train-empty",
        )
        with gr.Column(visible=False, elem_id="train-list") as self.list_box:
            with gr.Row(elem_id="train-list-top"):
                gr.HTML("<h2>Runs</h2>", js_on_load=None)
                self.new_button = gr.Button(
                    "New run", size="sm", elem_id="train-new-button", min_width=90, scale=0, visible=not is_public_space()
                )
                self.several_button = gr.Button("Compare runs", size="sm", elem_id="train-several", min_width=110, scale=0)
            self.table = gr.HTML(
                "", js_on_load="window.bdTable(element, trigger)", apply_default_css=False, elem_id="train-table"
            )
        with gr.Column(visible=False, elem_id="train-new") as self.new_box:
            gr.HTML("<h2>New run</h2>", js_on_load=None)
            self.build_new()
        with gr.Column(visible=False, elem_id="train-run") as self.run_box:
            self._build_run()
        with gr.Column(visible=False, elem_id="train-compare") as self.compare_box:
            gr.HTML("<h2>Compare runs</h2>", js_on_load=None)
            self.picked = gr.Dropdown(
                [], multiselect=True, max_choices=MOST_RUNS, label="Runs", elem_id="train-picked", min_width=300
            )
            self.comparison = self._charts("train-comparison")
        self.timer = gr.Timer(active=False)  # goes once the tab was opened
        self._wire(demo, tab)

    def _build_run(self) -> None:
        self.head = gr.HTML("", js_on_load=None, elem_id="train-head")
        with gr.Row(elem_id="train-actions"):
            self.stop_button = self._action("Stop", "train-stop", variant="stop")
            self.resume_button = self._action("Resume", "train-resume", variant="primary")
            self.compare_button = self._action("Compare base and tuned", "train-to-compare", variant="primary")
            self.evaluate_button = self._action("Evaluate", "train-to-evaluate")
            self.export_button = self._action("Export as GGUF", "train-export-gguf")
            self.zip_button = self._action("Export adapter (.zip)", "train-export-zip")
            self.retry_button = self._action("Retry with changes", "train-retry")
            self.delete_button = self._action("Delete …", "train-delete")
        self.confirm_text = gr.HTML("", js_on_load=None, elem_id="train-confirm-text")
        with gr.Row(visible=False, elem_id="train-confirm") as self.confirm_box:
            self.really_button = gr.Button(
                "Really delete", variant="stop", size="sm", elem_id="train-really-delete", min_width=60
            )
            self.keep_button = gr.Button("Keep it", size="sm", elem_id="train-keep", min_width=60)
        self.run_notice = gr.HTML("", js_on_load=None, elem_id="train-notice")
        self.download = gr.DownloadButton("", visible=False, elem_id="train-download", min_width=60)
        self.evaluate = gr.HTML("", js_on_load=None, elem_id="train-evaluate")
        self.charts = self._charts("train-charts")
        with gr.Row(elem_id="train-probe-top"):
            gr.HTML("<h3>Live probe: base beside the model so far</h3>", js_on_load=None)
            self.probe_position = gr.HTML("", js_on_load=None, elem_id="train-probe-position")
            with gr.Row(visible=False, elem_id="train-probe-buttons") as self.probe_buttons:
                self.earlier_button = gr.Button("← Earlier", size="sm", elem_id="train-probe-earlier", min_width=60, scale=0)
                self.later_button = gr.Button("Later →", size="sm", elem_id="train-probe-later", min_width=60, scale=0)
        self.probes = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="train-probes")
        with gr.Row(elem_id="train-note-row"):
            self.note = gr.Textbox(
                label="Note on this run", lines=2, max_lines=8, elem_id="train-note", scale=5, interactive=not is_public_space()
            )
            self.note_button = gr.Button(
                "Save note", size="sm", elem_id="train-save-note", min_width=90, scale=0, visible=not is_public_space()
            )
        self.note_saved = gr.HTML("", js_on_load=None, elem_id="train-note-saved")
        with gr.Accordion("Log (the last lines)", open=False, elem_id="train-log") as self.log_box:
            self.log = gr.HTML("", js_on_load=None, apply_default_css=False, autoscroll=True, max_height=420)
        with gr.Accordion("Data and settings", open=False, elem_id="train-details"):
            self.details = gr.HTML("", js_on_load=None, apply_default_css=False)

    @staticmethod
    def _action(title: str, elem_id: str, variant: Any = "secondary") -> gr.Button:
        return gr.Button(title, size="sm", variant=variant, elem_id=elem_id, min_width=60, visible=False)

    def _charts(self, elem_id: str) -> gr.HTML:
        """Charts whose CSV button asks for the logged numbers, which are too many to be sent with each tick."""

        def logged_csv(asked: Any) -> dict[str, str]:  # Gradio marks the function, and a method can't be marked
            try:
                return {"csv": self.logged_csv(asked)}
            except (BiasDPOError, OSError) as exc:
                return {"error": str(exc)}

        load = "window.bdCurves(element, server)"
        return gr.HTML("", js_on_load=load, apply_default_css=False, elem_id=elem_id, server_functions=[logged_csv])

    def _wire(self, demo: gr.Blocks, tab: gr.Tab) -> None:
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        seen, shown = self.seen_outputs, self.run_outputs
        here = [self.view, self.chosen, self.mark, self.probe_at, self.log_open]
        new_inputs = [self.model, self.run_id, self.proposed, *self.source_fields]
        new_outputs = self.plan_outputs
        demo.load(self.open_page, None, [self.tabs, self.chosen], **quick)
        demo.unload(self.close_page)
        filling = quick | {"show_progress_on": self.new_notice}  # see `wire_new`
        tab.select(self.open_tab, [*here, *new_inputs], [self.machine, *shown, *new_outputs], **filling).then(
            self.first_mixture, [self.mixture_view, *self.mixture_inputs], self.mixture_view, api_visibility="private",
            show_progress="hidden", preprocess=False,
        )  # fmt: skip
        self.timer.tick(self.watch, here, seen, **quick)
        self.chosen.change(None, self.chosen, None, js="(run) => window.bdAddress(run)", api_visibility="private")
        # `choose` needs the event's data, and so takes the page's inputs by place.
        # Not "always_last": for a click during another one Gradio would send the first one's row again.
        self.table.click(self.choose_row, self.log_open, shown, trigger_mode="multiple", **quick).success(
            None, None, None, js="() => window.bdShow('train-run')", api_visibility="private"
        )
        self.new_button.click(self.open_new_run, new_inputs, [*shown, *new_outputs], **filling).then(
            self.first_mixture, [self.mixture_view, *self.mixture_inputs], self.mixture_view, api_visibility="private",
            show_progress="hidden", preprocess=False,
        )  # fmt: skip
        several = [self.view, self.new_box, self.run_box, self.compare_box, self.table, self.picked, self.comparison]
        self.several_button.click(self.open_compare, self.picked, several, **quick)
        self.picked.change(self.compare, self.picked, self.comparison, trigger_mode="always_last", **quick, preprocess=False)
        self.wire_new(shown)

        one = [self.chosen, self.log_open]
        self.stop_button.click(self.stop, one, shown, **quick)
        self.resume_button.click(self.resume, one, shown, **quick)
        self.retry_button.click(self.retry, self.chosen, [*shown, *new_outputs], **filling).then(
            None, None, None, js="() => window.bdShow('train-new')", api_visibility="private"
        )
        asking = [self.asked, self.confirm_box, self.confirm_text, self.run_notice]
        self.delete_button.click(self.ask_delete, self.chosen, asking, **quick).then(
            None, None, None, js="() => window.bdFocus('#train-keep')", api_visibility="private"
        )
        self.keep_button.click(self.keep, None, asking[:3], **quick).then(
            None, None, None, js=_FOCUS_DELETE, api_visibility="private"
        )
        self.really_button.click(self.delete, self.asked, shown, **quick).then(
            None, None, None, js=_FOCUS_LIST, api_visibility="private"
        )
        gr.on([self.note.blur, self.note_button.click], self.save_note, [self.chosen, self.note], self.note_saved, **quick)
        self.log_box.expand(self.open_log, self.chosen, [self.log_open, self.log], **quick)
        self.log_box.collapse(lambda: False, None, self.log_open, **quick)
        probed = [self.probe_at, self.probe_position, self.probes, self.run_notice]
        for button, by in ((self.earlier_button, -1), (self.later_button, 1)):
            button.click(self.turning(by), [self.chosen, self.probe_at], probed, **quick)
        self.compare_button.click(self.open_in_compare, self.chosen, [self.run_notice, self.tabs, *self.compare_outputs], **quick)
        exported: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": 2}
        self.zip_button.click(self.export_zip, self.chosen, [self.run_notice, self.download], **exported)

    # Opening

    def open_page(self, request: gr.Request) -> Updates:
        """A link that names a run opens it."""
        run_id = request.query_params.get("run", "")
        return {self.tabs: gr.Tabs(selected="train"), self.chosen: run_id} if run_id else {self.chosen: ""}

    def close_page(self, request: gr.Request) -> None:
        """The page was closed: an estimate that it asked for ends. Runs go on."""
        self.cancel_estimate(request)

    def open_tab(self, view: str, chosen: str, mark: dict[str, int], probe_at: int | None, log_open: bool, *new: Any) -> Updates:
        """The tab was chosen: the run that was on, else the one that trains, else the newest, else the panel for the first."""
        machine = {self.machine: self.machine_note()}
        try:
            every = self.every()
            if view in ("new", "compare"):
                fresh = self.open_new(*new) if view == "new" else {}
                return machine | self.watch(view, chosen, mark, probe_at, log_open) | fresh
            known = [run.id for run in every]
            training = [run.id for run in every if run.status.state in ("running", "stopping")]
            queued = [run.id for run in every if run.active][::-1]  # the first in the queue
            run_id = chosen if chosen in known else next(iter([*training, *queued, *known]), "")
            if not run_id:
                return machine | self.open_new_run(*new)
            gone = f"No run {chosen!r} any more: {run_id} is shown." if chosen and chosen not in known else ""
            return machine | self.show_run(run_id, log_open, render.note(gone))
        except (BiasDPOError, OSError) as exc:
            return machine | self.unlisted(exc, mark)

    def open_new_run(self, *new: Any) -> Updates:
        """The panel for a new run."""
        return self._news(self.every(), "", {}, None, False) | self.turn_to("new") | self.open_new(*new)

    def first_mixture(self, shown: Any, *mixed: Any) -> Any:
        """The data's counts, once: later they follow the rows."""
        if shown:
            yield gr.skip()
            return
        yield from self.show_mixture(*mixed)

    def choose_row(self, log_open: bool, event: gr.EventData) -> Updates:
        """A row of the list was chosen."""
        return self.choose(event, log_open)

    def after_start(self, run_id: str, notice: str) -> Updates:
        """Show the run that was started."""
        return self.show_run(run_id, False, notice)

    def retry(self, run_id: Any) -> Updates:
        """The panel for a new run, filled with this one's config."""
        try:
            refuse_on_public_space("Training")
            run = see(runs.show(str(run_id), self.workspace))
            if run.config is None:
                return {self.run_notice: render.error(f"Run {run.id}'s config can't be read: start a new run instead")}
            filled = self.fill_from(run.config, str(run.folder.snapshot))
        except BiasDPOError as exc:
            return {self.run_notice: render.error(str(exc))}
        return self._news(self.every(), "", {}, None, False) | self.turn_to("new") | filled
