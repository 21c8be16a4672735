"""The Data set tab: what it is made of and what sets off what. What the handlers do is in `dataset_actions` (the journal) and
`file_actions` (import, export)."""

from __future__ import annotations

from typing import Any

import gradio as gr

from biasdpo.ui import dataset_render, render
from biasdpo.ui.dataset_actions import FILTERS, MAX_SEARCH_CHARACTERS, STATES, DatasetActions
from biasdpo.ui.file_actions import FORMATS, ORIGINS, FileActions
from biasdpo.ui.label_sessions import LabelSessions
from biasdpo.ui.store import Store

_PICKERS = ("Prompt", "Chosen", "Rejected", "Category", "Target group")
_FILES = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"]

_IMPORT = (
    "A prompt with a chosen and a rejected completion a row: plain texts, or chat messages as TRL and LLaMA-Factory write them. "
    "Preview guesses which column is what, and you may say otherwise."
)

# Where the focus goes when what it was on has gone away.
_FOCUS_ROW = "() => window.bdFocus('#dataset-table tr[aria-current] button', '#dataset-table button')"
_FOCUS_WITHDRAW = "() => window.bdFocus('#dataset-withdraw', '#dataset-close')"


class DatasetTab(DatasetActions, FileActions):
    """One tab over the store; `build` is called once, inside the page's Blocks."""

    def __init__(self, store: Store, sessions: LabelSessions, identity: gr.BrowserState) -> None:
        """`sessions`: what each page has stored, which is all that it may withdraw on a public Space."""
        self.store = store
        self.sessions = sessions
        self.identity = identity

    def build(self, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.number = gr.State(0)
        self.chosen = gr.State("")
        self.asked = gr.State("")
        self.charts_open = gr.State(False)
        self.previewed = gr.State(None)
        self.meter = gr.HTML("", js_on_load=None, elem_id="dataset-meter")
        self.trouble = gr.HTML("", js_on_load=None, elem_id="dataset-trouble")
        self.empty = gr.HTML(dataset_render.empty(), js_on_load=None, visible=False, elem_id="dataset-empty")
        with gr.Column(visible=False, elem_id="dataset-browse") as self.browse:
            self._build_filters()
            with gr.Row(elem_id="dataset-panes"):
                with gr.Column(scale=3, min_width=340, elem_id="dataset-list"):
                    self._build_table()
                with gr.Column(scale=2, min_width=340, visible=False, elem_id="dataset-detail") as self.detail_box:
                    self._build_detail()
        with gr.Accordion("Counts and charts", open=False, elem_id="dataset-charts") as self.charts_box:
            self.charts = gr.HTML("", js_on_load=None, apply_default_css=False)
        with gr.Accordion("Import", open=False, elem_id="dataset-import"):
            self._build_import()
        with gr.Accordion("Export", open=False, elem_id="dataset-export"):
            self._build_export()
        self._wire(tab)

    def _build_filters(self) -> None:
        with gr.Row(elem_id="dataset-filters"):
            self.search_box = gr.Textbox(
                "",
                label="Search",
                placeholder="words in any column",
                max_lines=1,
                max_length=MAX_SEARCH_CHARACTERS,
                elem_id="dataset-search",
                min_width=220,
                scale=2,
            )
            self.filters = [
                gr.Dropdown(
                    [("All", "")], value="", label=name.capitalize(), elem_id=f"dataset-filter-{name}", min_width=140, scale=1
                )
                for name in FILTERS
            ]
            self.state = gr.Dropdown(
                [(title, state) for state, title in STATES.items()],
                value="all",
                label="State",
                elem_id="dataset-filter-state",
                min_width=140,
                scale=1,
            )

    def _build_table(self) -> None:
        with gr.Row(elem_id="dataset-pager"):
            self.position = gr.HTML("", js_on_load=None, elem_id="dataset-position")
            self.previous_button = gr.Button("← Previous page", size="sm", elem_id="dataset-previous", min_width=60, scale=0)
            self.next_button = gr.Button("Next page →", size="sm", elem_id="dataset-next", min_width=60, scale=0)
        self.table = gr.HTML("", js_on_load="window.bdTable(element, trigger)", apply_default_css=False, elem_id="dataset-table")

    def _build_detail(self) -> None:
        with gr.Row(elem_id="dataset-detail-top"):
            self.detail_head = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="dataset-detail-head")
            self.withdraw_button = gr.Button("Withdraw …", size="sm", elem_id="dataset-withdraw", min_width=60, scale=0)
            self.close_button = gr.Button("Close", size="sm", elem_id="dataset-close", min_width=60, scale=0)
        with gr.Row(visible=False, elem_id="dataset-confirm") as self.confirm_box:
            self.really_button = gr.Button(
                "Really withdraw", variant="stop", size="sm", elem_id="dataset-really-withdraw", min_width=60
            )
            self.keep_button = gr.Button("Keep it", size="sm", elem_id="dataset-keep", min_width=60)
        self.detail_notice = gr.HTML("", js_on_load=None, elem_id="dataset-detail-notice")
        self.detail = gr.HTML("", js_on_load=None, apply_default_css=False)

    def _build_import(self) -> None:
        gr.HTML(render.note(_IMPORT), js_on_load=None)
        self.origin = gr.Radio(
            [(title, name) for name, title in ORIGINS.items()], value="file", label="From", elem_id="import-origin"
        )
        self.file = gr.File(
            label="JSONL, JSON, CSV or Parquet", file_types=_FILES, type="filepath", height=120, elem_id="import-file"
        )
        self.hub = gr.Textbox(label="Data set", placeholder="hub:OWNER/NAME", max_lines=1, visible=False, elem_id="import-hub")
        self.preview_button = gr.Button("Preview", variant="secondary", elem_id="import-preview")
        self.import_notice = gr.HTML("", js_on_load=None, elem_id="import-notice")
        with gr.Column(visible=False, elem_id="import-box") as self.preview_box:
            with gr.Row(elem_id="import-columns"):
                self.pickers = [
                    gr.Dropdown(
                        [("(none)", "")],
                        value="",
                        label=f"{title} column",
                        elem_id=f"import-column-{title.lower().replace(' ', '-')}",
                        min_width=140,
                    )
                    for title in _PICKERS
                ]
            self.preview = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="import-first-rows")
            self.import_button = gr.Button("Import", variant="primary", elem_id="import-button")
        self.imported = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="import-result")

    def _build_export(self) -> None:
        with gr.Row(elem_id="export-row"):
            self.format = gr.Radio(
                [(title, suffix) for suffix, title in FORMATS.items()],
                value=".jsonl",
                label="What training reads: one row a pair, by majority, withdrawn judgments left out",
                elem_id="export-format",
                scale=3,
                min_width=280,
            )
            self.export_button = gr.Button("Export", variant="primary", elem_id="export-button", scale=0, min_width=150)
        self.export_notice = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="export-notice")
        with gr.Row(visible=False, elem_id="export-files") as self.export_box:
            self.download = gr.DownloadButton("", elem_id="export-data", min_width=60)
            self.download_card = gr.DownloadButton("", elem_id="export-card", min_width=60)

    def _wire(self, tab: gr.Tab) -> None:
        # Validation is ours (preprocess=False), so that a value that is no choice gets our line, not the component's.
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        sought = [self.search_box, *self.filters, self.state]
        view = [self.number, self.chosen, self.charts_open, *sought]
        listed = [self.number, self.position, self.table]
        in_full = [
            self.chosen,
            self.detail_box,
            self.detail_head,
            self.detail,
            self.detail_notice,
            self.withdraw_button,
            self.confirm_box,
            self.asked,
        ]
        everything = [self.trouble, self.empty, self.browse, *self.filters, self.charts, self.charts_open]
        everything += [*listed, *(c for c in in_full if c not in (self.detail_notice, self.confirm_box, self.asked))]

        tab.select(self.open_tab, view, everything, **quick)
        tab.select(self.show_meter, None, self.meter, **quick)
        # A textbox's `input` is a pressed key only: what is pasted or deleted shows as a change.
        gr.on(
            [self.search_box.change, *(box.input for box in (*self.filters, self.state))],
            self.search,
            view,
            listed,
            trigger_mode="always_last",
            **quick,
        )
        pager = [self.previous_button.click, self.next_button.click]
        gr.on(pager, self.turn, view, listed, trigger_mode="always_last", **quick)

        # Not "always_last": that would send the first row's id again for a click while it is answered.
        self.table.click(self.choose, None, [*in_full, self.position], trigger_mode="multiple", **quick).success(
            None, None, None, js="() => window.bdShow('dataset-detail')", api_visibility="private"
        )
        self.close_button.click(self.close_detail, view, [*in_full, *listed], **quick).then(
            None, None, None, js=_FOCUS_ROW, api_visibility="private"
        )
        self.withdraw_button.click(self.ask, self.chosen, [self.asked, self.confirm_box], **quick)
        self.keep_button.click(self.keep, None, [self.asked, self.confirm_box], **quick).then(
            None, None, None, js=_FOCUS_WITHDRAW, api_visibility="private"
        )
        withdrawn = self.really_button.click(self.withdraw, [self.identity, self.asked], [*in_full, self.position], **quick).then(
            None, None, None, js=_FOCUS_WITHDRAW, api_visibility="private"
        )
        self.charts_box.expand(self.show_charts, None, [self.charts, self.charts_open], **quick)
        self.charts_box.collapse(lambda: False, None, self.charts_open, **quick)

        named = [self.origin, self.file, self.hub]
        outcome = [self.previewed, self.preview_box, self.import_notice, self.imported]
        seen = [*outcome, self.preview, *self.pickers]
        self.origin.input(self.choose_origin, self.origin, [self.file, self.hub], **quick)
        # Files may be long, and the Hub far away: through the queue, where nobody else waits for them but who imports, too.
        queued: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        gr.on([self.preview_button.click, self.hub.submit], self.show_preview, named, seen, concurrency_limit=4, **queued)
        gr.on(
            [picker.input for picker in self.pickers],
            self.map_columns,
            [self.previewed, *self.pickers],
            [self.import_notice, self.preview],
            concurrency_limit=4,
            trigger_mode="always_last",
            **queued,
        )
        imported = self.import_button.click(
            self.import_rows, [*named, self.previewed, *self.pickers], outcome, concurrency_limit=1, **queued
        )
        for changed in (withdrawn, imported):
            changed.then(self.open_tab, view, everything, **quick).then(self.show_meter, None, self.meter, **quick)
        self.export_button.click(
            self.export,
            self.format,
            [self.export_notice, self.export_box, self.download, self.download_card],
            concurrency_limit=1,
            **queued,
        )
