"""The Export tab: exports, the chosen one, a new one. The tab only reads files: an export is a process of its own, which neither
a closed page nor the end of the app stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from biasdpo import exports
from biasdpo.errors import BiasDPOError, ExportError
from biasdpo.exports import Export
from biasdpo.ui import export_render, render
from biasdpo.ui.export_new import NewExportPanel
from biasdpo.ui.jobs_layout import QUICK, RAW, JobsLayout
from biasdpo.ui.news import Updates
from biasdpo.ui.store import Store
from biasdpo.workspace import is_public_space, refuse_on_public_space


class ExportTab(NewExportPanel, JobsLayout[Export]):
    """One tab over the workspace's exports; `build` is called once, inside the page's Blocks."""

    prefix = "gguf"

    def __init__(self, store: Store, pick_adapter: Callable[[str, str], Updates], compare_outputs: list[Any]) -> None:
        """`pick_adapter`, `compare_outputs`: how the Compare tab takes over a model and an adapter."""
        self.store = store
        self.pick_compared = pick_adapter
        self.compare_outputs = compare_outputs
        self.served = set()

    def build(self, tabs: gr.Tabs, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.tabs = tabs
        self.build_state()
        self.machine = gr.HTML(export_render.refused() if is_public_space() else "", js_on_load=None, elem_id="gguf-machine")
        self.build_list(empty="" if is_public_space() else export_render.no_exports())
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
            self.cancel_button = self.action("Cancel", "cancel", variant="stop")
            self.use_button = self.action("Use it now", "use", variant="primary")
            self.download = gr.DownloadButton("Download", size="sm", visible=False, elem_id="gguf-download", min_width=60)
            self.again_button = self.action("Export again …", "again")
            self.delete_button = self.action("Delete …", "delete")
        self.build_asking()
        self.proof = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="gguf-proof")
        self.fallbacks = gr.HTML("", js_on_load=None, elem_id="gguf-fallbacks")
        with gr.Column(visible=False, elem_id="gguf-elsewhere") as self.elsewhere_box:
            gr.HTML("<h3>Use it elsewhere</h3>", js_on_load=None)
            self.elsewhere = gr.HTML("", js_on_load=None, apply_default_css=False)
            with gr.Accordion("Ollama's Modelfile (it lies beside the file)", open=False, elem_id="gguf-modelfile"):
                self.modelfile = gr.HTML("", js_on_load=None, apply_default_css=False)

    @property
    def all_outputs(self) -> list[Any]:
        return [*self.one_outputs, *self.plan_outputs]

    def _wire(self, tab: gr.Tab) -> None:
        self.wire_list(tab, self.plan_inputs)
        self.wire_new()
        everything = [*self.plan_inputs[:-1], self.pairs, self.threads]
        self.start_button.click(self.start, everything, self.all_outputs, concurrency_limit=1, **RAW | {"queue": True})
        self.cancel_button.click(self.cancel, self.chosen, self.all_outputs, **QUICK)
        self.again_button.click(self.again, self.chosen, [*self.all_outputs, self.pairs, self.threads], **QUICK)
        self.wire_deleting()
        self.use_button.click(self.use_now, self.chosen, [self.notice, self.tabs, *self.compare_outputs], **QUICK)

    # One export

    def cancel(self, export_id: Any) -> Updates:
        """End it; what it has written goes with it."""
        try:
            refuse_on_public_space("Cancelling an export")
            export = self.one(export_id)
            exports.cancel(export)
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        return self.show_one("", render.note(f"{export.out.name} was cancelled: nothing of it is left."))

    def again(self, export_id: Any) -> Updates:
        """The panel for a new export, with what was asked for of one that failed. Its name is free again."""
        try:
            refuse_on_public_space("Export")
            export = self.one(export_id)
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

    def use_now(self, export_id: Any) -> Updates:
        """The Compare tab: on the merged file, or on the base model with the adapter that a LoRA file holds."""
        try:
            refuse_on_public_space("Opening an export")
            export = self.one(export_id)
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
