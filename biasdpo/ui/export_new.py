"""The panel for a new export: what, as what, how small. Every function here refuses on a public Space before it reads what was
named."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import exports, gguf_export, models
from biasdpo.errors import BiasDPOError, ConfigError, ExportError
from biasdpo.exports import ExportRequest
from biasdpo.exports.jobs import check_name, folder_for, free_name, id_of
from biasdpo.exports.request import DEFAULT_QUANTIZATION, MOST_PAIRS
from biasdpo.gguf_export.quantizations import KEEP
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.ui import export_render, render
from biasdpo.ui.export_view import ExportsView
from biasdpo.ui.news import Updates
from biasdpo.ui.own_models import own_choices, pasted
from biasdpo.ui.train_data import told
from biasdpo.ui.train_render import size
from biasdpo.workspace import is_public_space, refuse_on_public_space

_FORMATS = [
    ("LoRA: the adapter alone. Small, and loaded beside its base model, at any strength", "lora"),
    ("Merged: one complete model with the adapter in it, for whatever reads GGUF", "merged"),
]
_SOURCES = [
    ("the Hugging Face folder where there is one, else the base GGUF", "auto"),
    ("the Hugging Face folder: full precision", "hf"),
    ("the base GGUF: its metadata and tokenizer are kept, and every tensor that the adapter does not touch", "gguf"),
]
_F32_BYTES = 4
_ROOM_BYTES = 10**9  # the proof's, beside the weights


class NewExportPanel(ExportsView):
    """The components of a new export, and their handlers."""

    adapter: gr.Dropdown
    model: gr.Dropdown
    format: gr.Radio
    quantization: gr.Radio
    origin: gr.Radio
    pairs: gr.Number
    threads: gr.Number
    name: gr.Textbox
    proposed: gr.State
    plan: gr.HTML
    new_notice: gr.HTML
    start_button: gr.Button

    def build_new(self) -> None:
        """Lay out the panel."""
        with gr.Row():
            self.adapter = gr.Dropdown(
                [],
                label="Adapter (run, shipped, or a PEFT folder)",
                allow_custom_value=True,
                elem_id="gguf-adapter",
                min_width=240,
            )
            self.model = gr.Dropdown(
                [], label="Base model (catalog id, Hub id or path)", allow_custom_value=True, elem_id="gguf-model", min_width=240
            )
        self.format = gr.Radio(_FORMATS, value="lora", label="As", elem_id="gguf-format", elem_classes="bd-cards")
        self.quantization = gr.Radio(
            [], label="Quantization", elem_id="gguf-quantization", elem_classes="bd-cards", visible=False
        )
        with gr.Accordion("Source, proof, threads", open=False, elem_id="gguf-more"):
            self.origin = gr.Radio(_SOURCES, value="auto", label="A merged file is made from", elem_id="gguf-source",
                                   elem_classes="bd-cards")  # fmt: skip
            with gr.Row():
                self.pairs = gr.Number(
                    MOST_PAIRS,
                    precision=0,
                    label="Held-out pairs",
                    info="at most; reward accuracy is measured on them before and after. 0: not at all",
                    elem_id="gguf-pairs",
                    min_width=200,
                )
                self.threads = gr.Number(
                    0, precision=0, label="CPU threads", info="0: all cores", elem_id="gguf-threads", min_width=200
                )
        self.plan = gr.HTML("", js_on_load=None, elem_id="gguf-plan")
        with gr.Row(elem_id="gguf-start-row"):
            self.name = gr.Textbox(label="File name", elem_id="gguf-name", min_width=240, scale=3)
            self.start_button = gr.Button("Export", variant="primary", elem_id="gguf-start", min_width=120, scale=0)
        self.new_notice = gr.HTML("", js_on_load=None, elem_id="gguf-new-notice")
        self.proposed = gr.State("")

    @property
    def plan_inputs(self) -> list[Any]:
        return [self.adapter, self.model, self.format, self.quantization, self.origin, self.name, self.proposed]

    @property
    def plan_outputs(self) -> list[Any]:
        """All of the panel that a choice may change."""
        pickers = [self.adapter, self.model, self.format, self.quantization, self.origin]
        return [*pickers, self.name, self.proposed, self.plan, self.new_notice]

    def wire_new(self) -> None:
        """What sets off what in this panel. Starting is the tab's."""
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        self.adapter.input(self.pick_adapter, self.plan_inputs, self.plan_outputs, **quick)
        gr.on(
            [self.model.input, self.format.input, self.quantization.input, self.origin.input],
            self.replan,
            self.plan_inputs,
            self.plan_outputs,
            trigger_mode="always_last",
            **quick,
        )
        self.name.submit(None, None, None, js="() => document.getElementById('gguf-start').click()", api_visibility="private")

    # Choosing

    def first(self, run_id: str, *given: Any) -> Updates:
        """The panel was opened: what can be chosen now. `run_id`: the run that is to be exported, "" for what was chosen."""
        adapter, model, *others = given
        known = "" if run_id or not adapter else model
        choices = self._adapter_choices()
        chosen = run_id or adapter or next((value for _, value in choices), "none")
        if chosen not in [value for _, value in choices]:
            choices.append((Path(chosen).name, chosen))
        model = self._model_of(chosen, known)
        named = {self.model: gr.update(choices=self._model_choices(model), value=model)}
        return self._planned(chosen, model, *others) | {self.adapter: gr.update(choices=choices, value=chosen)} | named

    def fresh(self, notice: str) -> Updates:
        """The panel as it is at first, with a word on what became of the export that was shown."""
        shown = {self.format: "lora", self.origin: "auto"} | self.first("", "", "", "lora", "", "auto", "", "")
        return shown | ({self.new_notice: notice} if notice else {})

    def pick_adapter(self, adapter: Any, model: Any, *others: Any) -> Updates:
        """Another adapter: its own base model, in the picker where it is another one than before."""
        own = self._model_of(_text(adapter), _text(model) if adapter == "none" else "") or _text(model)
        named = {} if own == model else {self.model: gr.update(choices=self._model_choices(own), value=own)}
        return self._planned(adapter, own, *others) | named

    def replan(self, *given: Any) -> Updates:
        """Another model, format, quantization or source."""
        return self._planned(*given)

    def _adapter_choices(self) -> list[tuple[str, str]]:
        """Runs first, the newest on top."""
        known = models.adapters(self.workspace)
        runs = [adapter for adapter in known if self._is_run(adapter)]
        shipped = [adapter for adapter in known if not self._is_run(adapter)]
        named = [(f"run {adapter.id}", adapter.id) for adapter in runs]
        named += [(f"{adapter.id} (shipped)", adapter.id) for adapter in shipped]
        return [*named, ("none: the model alone", "none")]

    def _is_run(self, adapter: AdapterSpec) -> bool:
        return adapter.folder.parent.parent == self.workspace.runs

    def _model_choices(self, model: str) -> list[tuple[str, str]]:
        specs = map(models.with_files, models.catalog().values())
        choices = [(spec.title if spec.present else f"{spec.title} · not on this machine", spec.id) for spec in specs]
        return [*choices, *own_choices([model])]

    def _planned(
        self, adapter: Any, model: Any, format: Any, quantization: Any, origin: Any, name: Any, proposed: Any
    ) -> Updates:
        """The panel for these choices. What does not go together is said, and the rest stays as it is."""
        shown: Updates = {self.quantization: gr.update(visible=format == "merged"), self.new_notice: "", self.plan: ""}
        try:
            refuse_on_public_space("Export")
            found = self._found(_text(adapter))
            model = _text(model)
            if not model:
                raise ConfigError(f"{_text(adapter)} does not say which model it was made for: choose it under Base model")
            if format == "lora" and found is None:
                raise ConfigError("A LoRA file is an adapter, and none is chosen: choose one, or export the model merged")
            spec = models.find(model)
            about, chosen = self._sizes(spec, found, format, quantization, origin, shown)
            stem = f"{found.id if found is not None else Path(model).stem}-{chosen or 'lora'}"
            folder = folder_for(found, self.workspace)
            if not name or name == proposed:  # a name of the visitor's own stays
                free = free_name(stem, folder)
                shown |= {self.name: free, self.proposed: free}
            at = next(path for path in (folder, *folder.parents) if path.is_dir())
            needs = _F32_BYTES * spec.parameters + _ROOM_BYTES
            shown[self.plan] = export_render.plan(about, shutil.disk_usage(at).free, needs)
        except Exception as exc:
            shown[self.new_notice] = render.error(told(exc, "Not planned"))
        return shown

    def _model_of(self, adapter: str, known: str) -> str:
        """The base model of an adapter: the one that is chosen already, else the one that it names, else "". The model alone: the
        catalog's first."""
        if is_public_space():
            return ""
        try:
            found = self._found(adapter)
        except BiasDPOError:  # the panel says so
            return known
        if found is None:
            return known or next(iter(models.catalog()))
        return known or found.model

    def _found(self, adapter: str) -> AdapterSpec | None:
        if not adapter:
            raise ConfigError("No adapter is named: choose one, or none: the model alone")
        return models.find_adapter(adapter, models.catalog()["smollm2"], self.workspace)

    def _sizes(
        self, spec: ModelSpec, adapter: AdapterSpec | None, format: Any, quantization: Any, origin: Any, shown: Updates
    ) -> tuple[int | None, str]:
        """Fill in the quantizations with their sizes; the size of the chosen one, and its name ("" for LoRA)."""
        if format == "lora":
            return (adapter.weights.stat().st_size if adapter is not None else None), ""
        offered = [(known.name, known.name, known.cost) for known in gguf_export.QUANTIZATIONS]
        if spec.gguf_path is not None and origin != "hf":
            offered.insert(0, (KEEP, "as the base GGUF", "Every tensor in the type that it has there."))
        sizes: dict[str, int] = {}
        choices = []
        for value, title, cost in offered:
            try:
                sizes[value] = gguf_export.expected_bytes(spec, value, source=origin)
            except ExportError as exc:  # of a width that this quantization does not go with
                if value == quantization:
                    shown[self.new_notice] = render.note(str(exc))
                continue
            choices.append((f"{title} · {size(sizes[value])} · {cost}", value))
        wanted = (quantization, DEFAULT_QUANTIZATION, *sizes)
        chosen = next(name for name in wanted if name in sizes)
        shown[self.quantization] = gr.update(choices=choices, value=chosen, visible=True)
        return sizes[chosen], chosen

    # Starting

    def start(self, *given: Any) -> Iterator[Updates]:
        """Start the export, and show it."""
        yield {self.new_notice: render.busy("Starting …")}
        try:
            refuse_on_public_space("Export")
            export = exports.start(self._request(*given), self.workspace)
            shown = self.show_one(id_of(export, self.workspace))
        except Exception as exc:
            yield {self.new_notice: render.error(told(exc, "Not started"))}
            return
        yield {self.new_notice: "", self.name: "", self.proposed: ""} | shown

    def _request(
        self, adapter: Any, model: Any, format: Any, quantization: Any, origin: Any, name: Any, pairs: Any, threads: Any
    ) -> ExportRequest:
        found = self._found(_text(adapter))
        is_run = found is not None and self._is_run(found)
        out = folder_for(found, self.workspace) / check_name(_text(name))
        request = ExportRequest(out, format, adapter="" if is_run else _text(adapter), run=_text(adapter) if is_run else "")
        return replace(
            request,
            model=_text(model),
            quantization=_text(quantization) if format == "merged" else "",
            source=origin if format == "merged" else "auto",
            pairs=_whole(pairs, "pairs"),
            threads=_whole(threads, "threads") or None,
        )


def _text(value: Any) -> str:
    return pasted(value) if isinstance(value, str) else ""


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ConfigError(f"{name} must be a whole number: got {value!r}; write one such as 0")
    return int(value)
