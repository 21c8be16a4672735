"""The Export tab: exports, the chosen one, a new one. The tab only reads files: an export is a process of its own, which neither
a closed page nor the end of the app stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from biasdpo import exports
from biasdpo.errors import BiasDPOError, ConfigError, ExportError
from biasdpo.exports import Export
from biasdpo.ui import export_render, render
from biasdpo.ui.export_new import NewExportPanel
from biasdpo.ui.export_view import active_or_newest
from biasdpo.ui.news import Mark, Updates
from biasdpo.ui.store import Store
from biasdpo.workspace import is_public_space, refuse_on_public_space

_FOCUS_DELETE = "() => window.bdFocus('#gguf-delete', '#gguf-new-button')"
_FOCUS_LIST = "() => window.bdFocus('#gguf-table tr[aria-current] button', '#gguf-new-button', '#gguf-start')"


class ExportTab(NewExportPanel):
    """One tab over the workspace's exports; `build` is called once, inside the page's Blocks."""

    def __init__(self, store: Store, pick_adapter: Callable[[str, str], Updates], compare_outputs: list[Any]) -> None:
        """`pick_adapter`, `compare_outputs`: how the Compare tab takes over a model and an adapter."""
        self.store = store
        self.pick_compared = pick_adapter
        self.compare_outputs = compare_outputs
        self.served = set()

    def build(self, tabs: gr.Tabs, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.tabs = tabs
        self.view = gr.State("")
        self.mark = gr.State({})
        self.asked = gr.State("")
        self.chosen = gr.Textbox("", elem_id="gguf-chosen")  # hidden by the style; kept by the page, whatever becomes of the app
        self.machine = gr.HTML(export_render.refused() if is_public_space() else "", js_on_load=None, elem_id="gguf-machine")
        self.empty = gr.HTML(
            "" if is_public_space() else export_render.no_exports(), js_on_load=None, visible=False, elem_id="gguf-empty"
        )
        with gr.Column(visible=False, elem_id="gguf-list") as self.list_box:
            with gr.Row(elem_id="gguf-list-top"):
                gr.HTML("<h2>Exports</h2>", js_on_load=None)
                self.new_button = gr.Button(
                    "New export", size="sm", elem_id="gguf-new-button", min_width=110, scale=0, visible=not is_public_space()
                )
            self.table = gr.HTML("", js_on_load="window.bdTable(element, trigger)", apply_default_css=False, elem_id="gguf-table")
        with gr.Column(visible=False, elem_id="gguf-new") as self.new_box:
            gr.HTML("<h2>New export</h2>", js_on_load=None)
            self.build_new()
        with gr.Column(visible=False, elem_id="gguf-one") as self.one_box:
            self._build_one()
        self.timer = gr.Timer(active=False)  # goes once the tab was opened
        self._wire(tab)

    def _build_one(self) -> None:
        self.head = gr.HTML("", js_on_load=None, elem_id="gguf-head")
        with gr.Row(elem_id="gguf-actions"):
            self.cancel_button = self._action("Cancel", "gguf-cancel", variant="stop")
            self.use_button = self._action("Use it now", "gguf-use", variant="primary")
            self.download = gr.DownloadButton("Download", size="sm", visible=False, elem_id="gguf-download", min_width=60)
            self.again_button = self._action("Export again …", "gguf-again")
            self.delete_button = self._action("Delete …", "gguf-delete")
        self.confirm_text = gr.HTML("", js_on_load=None, elem_id="gguf-confirm-text")
        with gr.Row(visible=False, elem_id="gguf-confirm") as self.confirm_box:
            self.really_button = gr.Button("Really delete", variant="stop", size="sm", elem_id="gguf-really-delete", min_width=60)
            self.keep_button = gr.Button("Keep it", size="sm", elem_id="gguf-keep", min_width=60)
        self.notice = gr.HTML("", js_on_load=None, elem_id="gguf-notice")
        self.proof = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="gguf-proof")
        self.fallbacks = gr.HTML("", js_on_load=None, elem_id="gguf-fallbacks")
        with gr.Column(visible=False, elem_id="gguf-elsewhere") as self.elsewhere_box:
            gr.HTML("<h3>Use it elsewhere</h3>", js_on_load=None)
            self.elsewhere = gr.HTML("", js_on_load=None, apply_default_css=False)
            with gr.Accordion("Ollama's Modelfile (it lies beside the file)", open=False, elem_id="gguf-modelfile"):
                self.modelfile = gr.HTML("", js_on_load=None, apply_default_css=False)

    @staticmethod
    def _action(title: str, elem_id: str, variant: Any = "secondary") -> gr.Button:
        return gr.Button(title, size="sm", variant=variant, elem_id=elem_id, min_width=60, visible=False)

    @property
    def all_outputs(self) -> list[Any]:
        """All of the tab that opening it may touch."""
        return [*self.one_outputs, *self.plan_outputs]

    def _wire(self, tab: gr.Tab) -> None:
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        raw = quick | {"preprocess": False}
        here = [self.view, self.chosen, self.mark]
        tab.select(self.open_tab, [*here, *self.plan_inputs], self.all_outputs, **raw)
        self.timer.tick(self.watch, here, self.seen_outputs, **quick)
        # Not "always_last": for a click during another one Gradio would send the first one's row again.
        self.table.click(self.choose_row, None, self.all_outputs, trigger_mode="multiple", **quick).success(
            None, None, None, js="() => window.bdShow('gguf-one')", api_visibility="private"
        )
        self.new_button.click(self.open_new, self.plan_inputs, self.all_outputs, **raw).then(
            None, None, None, js="() => window.bdShow('gguf-new')", api_visibility="private"
        )
        self.wire_new()
        everything = [*self.plan_inputs[:-1], self.pairs, self.threads]
        self.start_button.click(self.start, everything, self.all_outputs, concurrency_limit=1, **raw | {"queue": True})
        self.cancel_button.click(self.cancel, self.chosen, self.all_outputs, **quick)
        self.again_button.click(self.again, self.chosen, [*self.all_outputs, self.pairs, self.threads], **quick)
        asking = [self.asked, self.confirm_box, self.confirm_text, self.notice]
        self.delete_button.click(self.ask_delete, self.chosen, asking, **quick).then(
            None, None, None, js="() => window.bdFocus('#gguf-keep')", api_visibility="private"
        )
        self.keep_button.click(self.keep, None, asking[:3], **quick).then(
            None, None, None, js=_FOCUS_DELETE, api_visibility="private"
        )
        self.really_button.click(self.delete, self.asked, self.all_outputs, **quick).then(
            None, None, None, js=_FOCUS_LIST, api_visibility="private"
        )
        self.use_button.click(self.use_now, self.chosen, [self.notice, self.tabs, *self.compare_outputs], **quick)

    # Opening

    def open_tab(self, view: str, chosen: str, mark: Mark, *new: Any) -> Updates:
        """The tab was chosen: what was on, else the export that is under way, else the newest, else the panel for the first."""
        try:
            if view == "new":
                return self.watch(view, chosen, mark) | self.first("", *new)
            every = self.every()
            known = [name for name, _ in every]
            export_id = chosen if chosen in known else active_or_newest(every)
            if not export_id:
                return self.open_new(*new)
            gone = f"{chosen.rpartition('/')[2]} is not there any more." if chosen and chosen not in known else ""
            return self.show_one(export_id, render.note(gone))
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, mark)

    def open_new(self, *new: Any, run_id: str = "") -> Updates:
        """The panel for a new export."""
        shown = self.changed(self.every(), "", {}) | self.turn_to("new")
        return shown if is_public_space() else shown | self.first(run_id, *new)

    def open_run(self, run_id: Any, *new: Any) -> Updates:
        """The panel for a new export of this run, from its own panel on the Train tab."""
        if not isinstance(run_id, str) or not run_id:
            return {self.tabs: gr.skip()}
        return self.open_new(*new, run_id=run_id) | {self.tabs: gr.Tabs(selected="export")}

    def choose_row(self, event: gr.EventData) -> Updates:
        """A row of the list was chosen."""
        wanted = event._data.get("id") if isinstance(event._data, dict) else None
        try:
            return self.show_one(str(wanted))
        except (BiasDPOError, OSError) as exc:
            return self.unlisted(exc, {})

    # One export

    def _export(self, export_id: Any) -> Export:
        if not isinstance(export_id, str) or not export_id:
            raise ConfigError("No export is chosen: choose one of the list")
        return exports.find(export_id, self.workspace)

    def cancel(self, export_id: Any) -> Updates:
        """End it; what it has written goes with it."""
        try:
            refuse_on_public_space("Cancelling an export")
            export = self._export(export_id)
            exports.cancel(export)
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        return self.show_one("", render.note(f"{export.out.name} was cancelled: nothing of it is left."))

    def again(self, export_id: Any) -> Updates:
        """The panel for a new export, with what was asked for of one that failed. Its name is free again."""
        try:
            refuse_on_public_space("Export")
            export = self._export(export_id)
            if export.status is None:
                raise ExportError(f"{export.out.name} is {export.state}: there is nothing to repeat")
            asked = export.status.request
            exports.delete(export)
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        given = [asked.get("run") or asked.get("adapter"), asked.get("model"), asked.get("format"), asked.get("quantization")]
        shown = self.open_new(*given, asked.get("source"), export.out.name, "")
        filled = {self.format: asked.get("format"), self.origin: asked.get("source"), self.name: export.out.name}
        more = {self.pairs: asked.get("pairs"), self.threads: asked.get("threads") or 0}
        return shown | filled | more

    def ask_delete(self, export_id: Any) -> Updates:
        """Ask first, and say what is lost. The answer is of this export, whichever is chosen meanwhile."""
        try:
            export = self._export(export_id)
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        return {
            self.asked: export_id,
            self.confirm_box: gr.update(visible=True),
            self.confirm_text: export_render.deleting(export),
        }

    def keep(self) -> Updates:
        """Nothing is to be deleted."""
        return {self.asked: "", self.confirm_box: gr.update(visible=False), self.confirm_text: ""}

    def delete(self, asked: Any) -> Updates:
        """Delete it; the newest of the others is shown, or the panel for a new one."""
        try:
            export = self._export(asked)
            exports.delete(export)
        except BiasDPOError as exc:
            return self.keep() | {self.notice: render.error(str(exc))}
        return self.keep() | self.show_one("", render.note(f"{export.out.name} was deleted."))

    def use_now(self, export_id: Any) -> Updates:
        """The Compare tab: on the merged file, or on the base model with the adapter that a LoRA file holds."""
        try:
            refuse_on_public_space("Opening an export")
            export = self._export(export_id)
            if export.record is None:
                raise ExportError(f"{export.out.name} is {export.state}: it can't be opened")
            record = export.record
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        if record.format == "merged":
            model, adapter = str(record.out), "none"
        else:
            model, adapter = record.model, str(record.request.get("run") or record.request.get("adapter"))
        return self.pick_compared(model, adapter) | {self.tabs: gr.Tabs(selected="compare")}
