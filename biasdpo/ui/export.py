"""The Export tab: an adapter, or a model with it, as a GGUF file; how it was verified, and how to use it elsewhere;
publishing on the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import models, publish
from biasdpo.access import is_owner, require_owner
from biasdpo.config import DEFAULT_QUANTIZATION, ExportConfig, PublishConfig, Setting
from biasdpo.errors import BiasDPOError, ExportError, PublishError
from biasdpo.gguf import export as exporting
from biasdpo.gguf.export import ExportRecord, load_record
from biasdpo.gguf.proof import ExportProof
from biasdpo.gguf.quantize import COSTS
from biasdpo.gguf.write import expected_sizes
from biasdpo.jobs import store
from biasdpo.jobs.job import Job
from biasdpo.jobs.resolve import resolve_export
from biasdpo.ui.components import QUICK, Studio, Updates, escape, handles, pasted, size_text
from biasdpo.ui.jobs import SMALL, JobPanel, state_word
from biasdpo.workspace import Workspace, sha256_of

_FORMATS = [("LoRA adapter", "lora"), ("Merged model", "merged")]
_FORMAT_INFO = "A LoRA adapter is a small file, loaded beside its base model. A merged model is complete."
_DEPTHS = [("Full", "full"), ("Quick", "quick"), ("None: not verified", "none")]
_EMPTY = """### No exports yet
An export is one GGUF file for llama.cpp, Ollama and similar apps. Choose a run or an adapter and press **Export**. Unless you
choose no verification, the file is compared with the original model before it is saved."""
_METHOD = """Both on the CPU: transformers in F32, and llama.cpp on this file (F32 KV cache, no flash attention). KL divergence
from the original to the file, in nats per position."""


def build_export(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    settings, workspace = ExportConfig.settings(), studio.workspace
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            adapter = gr.Dropdown([], label="Run or adapter", info="Or the path of a PEFT folder.", allow_custom_value=True,
                                  elem_id="export-adapter")  # fmt: skip
            format_ = gr.Radio(_FORMATS, value="lora", label="Format", info=_FORMAT_INFO, elem_id="export-format")
            quantization = gr.Dropdown(list(settings["quantization"].choices), value=DEFAULT_QUANTIZATION, label="Quantization",
                                       visible=False, filterable=False, elem_id="export-quantization")  # fmt: skip
            proof = gr.Radio(_DEPTHS, value="full", label="Verification", info=settings["proof"].help, elem_id="export-proof")
            name = gr.Textbox(label="File name", max_lines=1, elem_id="export-name")
            start = gr.Button("Export", variant="primary", elem_id="export-start")
            plan = gr.Markdown(elem_id="export-plan")
            with gr.Accordion("Advanced", open=False, elem_id="export-advanced"):
                advanced = {key: _field(one) for key, one in settings.items() if one.is_advanced}
            _build_publish(studio, adapter)
        with gr.Column(scale=3, min_width=300):
            empty = gr.Markdown(_EMPTY, visible=False, elem_id="export-empty")
            panel = JobPanel(studio, "export", ["Export", "State", "Adapter", "Format", "Size", "Verification"], _row, _outcome)
            with panel.actions:
                download = gr.DownloadButton("Download", variant="primary", elem_id="export-download", **SMALL)
            with panel.box:
                with gr.Column(visible=False, elem_id="export-result") as result:
                    files = gr.Dataframe(headers=["File", "Size", "SHA-256"], label="Files", interactive=False, buttons=[],
                                         wrap=True, column_widths=["40%", "15%", "45%"], elem_id="export-files")  # fmt: skip
                    with gr.Accordion("Use it elsewhere", open=False, elem_id="export-elsewhere"):
                        commands = [
                            gr.Textbox(label=label, lines=lines, max_lines=12, interactive=False, buttons=["copy"])
                            for label, lines in (("llama.cpp", 1), ("Ask that server", 2), ("Ollama", 1), ("Modelfile", 4))
                        ]
                with gr.Accordion("Verification details", open=False, visible=False, elem_id="export-details") as details:
                    figures = gr.Dataframe(headers=["Measured", "Found", "Required"], label="Verification", interactive=False,
                                           wrap=True, buttons=[], elem_id="export-figures")  # fmt: skip
                    gr.Markdown(_METHOD)
                panel.build_log()
            compare = gr.Button("Next: try it in Compare", visible=False, elem_id="export-compare", elem_classes="next-step")
    proposed, served = gr.State(""), set[Path]()  # served in place: copies in Gradio's cache could fill the disk
    inputs = [adapter, format_, quantization, proof, name, proposed, *advanced.values()]

    def config_of(chosen: str, kind: Any, type_: str, depth: Any, file: str, _proposed: str, *more: Any) -> ExportConfig:
        chosen, file = pasted(chosen), (file or "").strip() or "export"
        shown = {key: value for key, value in zip(advanced, more, strict=True) if value not in (None, "")}
        given: dict[str, Any] = {key: settings[key].parse(str(value)) for key, value in shown.items()}
        if chosen == "none" and kind == "merged" and "model" not in given:
            given["model"] = next((spec.id for spec in models.list_models() if spec.present), "")
        if kind == "merged":
            given["quantization"] = type_
        else:
            del given["source"]
        given["run" if chosen in _runs(workspace) else "adapter"] = chosen
        given |= {"format": kind, "proof": depth}
        return ExportConfig(out=Path(file if file.endswith(".gguf") else f"{file}.gguf"), **given)

    def look(*given: Any) -> Updates:
        """Preview what Export would write, in one line; settings that conflict are named there."""
        shown: Updates = {quantization: gr.Dropdown(visible=given[1] == "merged")}
        try:
            require_owner("Export")
            config, spec, found = resolve_export(config_of(*given), workspace)
            sizes = expected_sizes(spec, found, config.format, config.source)
        except BiasDPOError as exc:
            return shown | {plan: f"⚠ {escape(str(exc))}"}
        chosen = config.quantization if config.quantization in sizes else next(iter(sizes))
        if config.format == "merged":
            choices = [(f"{one} · {size_text(count)} · {COSTS[one]}", one) for one, count in sizes.items()]
            shown[quantization] = gr.Dropdown(choices, value=chosen, visible=True)
        if given[4] in ("", given[5]):  # a name of one's own stays
            stem = f"{found.id if found is not None else Path(spec.id).stem}-{chosen or 'lora'}"
            free = f"{store.free_id('export', stem, workspace)}.gguf"
            shown |= {name: free, proposed: free}
        what = f"{escape(found.id)} for {escape(spec.title)}" if found is not None else f"{escape(spec.title)} alone"
        room = size_text(shutil.disk_usage(workspace.root).free)
        return shown | {plan: f"**{what}**: about {size_text(sizes[chosen])}, {room} of disk space free."}

    def open_form(request: dict[str, Any], chosen: str) -> Updates:
        return {adapter: _adapters(workspace, chosen or request.get("run") or "")}

    def prefill(request: dict[str, Any]) -> Updates:
        return {adapter: _adapters(workspace, request["run"]) if request.get("run") else gr.skip()}

    def begin(*given: Any) -> Updates:
        require_owner("Export")
        job = store.start_export(config_of(*given), workspace, command="the Export tab")
        return {name: "", proposed: ""} | panel.show(job.id)

    def render(job: Job | None) -> Updates:
        hidden = job is None or not is_owner()  # names of folders
        record, found = (None, None) if job is None or hidden else (_record(job), _proof(job))
        if record is not None and record.out not in served:
            gr.set_static_paths([record.out])
            served.add(record.out)
        texts = exporting.commands(record) if record is not None else [""] * len(commands)
        return {
            download: gr.DownloadButton(value=None if record is None else str(record.out), visible=record is not None),
            compare: gr.Button(visible=record is not None),
            result: gr.Column(visible=record is not None),
            files: [] if record is None else _files(record),
            details: gr.Accordion(visible=found is not None and found.tokenizer is not None),
            figures: [] if found is None else found.rows(),
        } | dict(zip(commands, texts, strict=True))

    def use(selected: str) -> Updates:
        require_owner("Opening an export")
        job = panel.job(selected)
        record = None if job is None else _record(job)
        if record is None:
            raise ExportError("This export has no finished file: wait for it, or export again")
        if record.format == "merged":
            return studio.open("compare", model=str(record.out), adapter="none")
        return studio.open("compare", model=record.model, adapter=record.adapter_name)

    looked = [quantization, name, proposed, plan]
    chosen_by = [format_.input, quantization.input, name.blur, advanced["model"].blur, advanced["source"].input]
    gr.on([adapter.change, *chosen_by], handles(look), inputs, looked, trigger_mode="always_last", **QUICK)
    tab.select(handles(open_form), [studio.requests["export"], adapter], adapter, **QUICK)
    studio.on_request("export", prefill, [], [adapter])
    started = gr.on([start.click, name.submit], handles(begin), inputs, [name, proposed, *panel.chosen_outputs()], **QUICK)
    started.success(handles(look), inputs, looked, **QUICK)
    compare.click(handles(use), panel.selected, studio.open_outputs("compare"), **QUICK)
    panel.watch("list", lambda _job: {empty: gr.Markdown(visible=not store.list_jobs(workspace, "export"))}, [empty])
    panel.watch("state", render, [download, compare, result, files, details, figures, *commands])
    panel.wire(tab)


def _build_publish(studio: Studio, adapter: gr.Dropdown) -> None:
    """The form that publishes the chosen run on the Hub: Publish sends what Preview has shown."""
    settings, workspace = PublishConfig.settings(), studio.workspace
    with gr.Accordion("Publish on the Hugging Face Hub", open=False, elem_id="publish-box") as box:
        fields: dict[str, Any] = {}
        for key, one in settings.items():
            shown: dict[str, Any] = {"label": one.label, "info": one.help, "elem_id": f"publish-{key}"}
            if one.kind == "flag":
                fields[key] = gr.Checkbox(False, **shown)
            elif key == "gguf":
                fields[key] = gr.Dropdown([("None", "")], value="", **shown)
            else:
                fields[key] = gr.Textbox(placeholder=one.metavar, max_lines=1, **shown)
        preview = gr.Button("Preview", elem_id="publish-preview")
        with gr.Column(visible=False, elem_id="publish-plan") as planned:
            summary = gr.Markdown(elem_id="publish-summary")
            files = gr.Dataframe(headers=["Repository", "File", "Size"], label="Files", interactive=False, wrap=True, buttons=[],
                                 elem_id="publish-files")  # fmt: skip
            look: dict[str, Any] = {"lines": 10, "max_lines": 20, "interactive": False, "buttons": ["copy"]}
            cards = {name: gr.Textbox(label=f"{name.capitalize()} card", elem_id=f"publish-{name}-card", **look)
                     for name in ("model", "dataset")}  # fmt: skip
            send = gr.Button("Publish", elem_id="publish-send")
            result = gr.Markdown(elem_id="publish-result")
    seen = gr.State("")
    inputs = [adapter, *fields.values()]

    def list_exports() -> Any:
        exports = [job.id for job in store.list_jobs(workspace, "export") if is_owner() and job.state == "finished"]
        return gr.Dropdown([("None", ""), *((one, one) for one in exports)])

    def plan_of(run: str, *given: Any) -> publish.Plan:
        require_owner("Publishing")
        values = zip(fields, (value.strip() if isinstance(value, str) else value for value in given), strict=True)
        filled: dict[str, Any] = {key: value for key, value in values if value}
        return publish.plan(pasted(run), PublishConfig(**filled), workspace)

    def show(*given: Any) -> Updates:
        plan = plan_of(*given)
        texts = {one.type: one.card for one in plan.repositories}
        return {
            planned: gr.Column(visible=True),
            summary: "\n".join(f"- {escape(line)}" for line in plan.summary()),
            files: [[one.id, name, size_text(size)] for one in plan.repositories for name, size, _sha256 in one.listing],
            result: "",
            seen: plan.digest,
        } | {card: gr.Textbox(value=texts.get(name, ""), visible=name in texts) for name, card in cards.items()}

    def go(digest: str, *given: Any) -> Iterator[Updates]:
        plan = plan_of(*given)
        if plan.digest != digest:
            raise PublishError("This is not what the preview shows: press Preview again, then Publish")
        yield {result: "Sending…"}
        try:
            done = publish.publish(plan, workspace)
        except BiasDPOError:
            yield {result: ""}
            raise
        states = [(one, f"commit {one.commit[:12]}" if one.commit else "nothing changed") for one in done]
        yield {result: "\n".join(f"- ✓ {one.type.capitalize()} [{escape(one.id)}]({one.url}): {how}" for one, how in states)}

    box.expand(list_exports, None, fields["gguf"], **QUICK)
    preview.click(handles(show), inputs, [planned, summary, files, result, seen, *cards.values()], **QUICK)
    send.click(handles(go), [seen, *inputs], result, **QUICK)


def _field(one: Setting) -> Any:
    """The field of an advanced setting."""
    shown: dict[str, Any] = {"value": one.default, "label": one.label, "info": one.help, "elem_id": f"export-{one.name}"}
    if one.kind == "integer" and not one.is_optional:  # an empty gr.Number shows 0
        return gr.Number(precision=0, minimum=one.low, maximum=one.high, **shown)
    return gr.Radio(list(one.choices), **shown) if one.kind == "choice" else gr.Textbox(max_lines=1, **shown)


def _runs(workspace: Workspace) -> list[str]:
    """Finished runs, the newest first."""
    return [adapter.id for adapter in models.adapters(workspace) if adapter.folder.parent.parent == workspace.runs]


def _adapters(workspace: Workspace, chosen: str) -> Any:
    """The picker. `chosen` "": the first."""
    runs = _runs(workspace)
    choices = [(f"{run} (run)", run) for run in runs]
    choices += [(f"{one.id} (shipped)", one.id) for one in models.adapters(workspace) if one.id not in runs]
    choices.append(("No adapter: a model alone", "none"))
    return gr.Dropdown(choices, value=chosen or choices[0][1])


def _record(job: Job) -> ExportRecord | None:
    """The record of a finished file; None if it is missing or unreadable."""
    return load_record(job.file) if job.state == "finished" else None


def _proof(job: Job) -> ExportProof | None:
    """The proof of a finished export, or the one that a failed export did not pass."""
    record = _record(job)
    row = record.proof if record is not None else job.status.proof
    try:
        return ExportProof.from_json(row) if row else None
    except (TypeError, ValueError):
        return None


def _row(job: Job) -> list[Any]:
    record, proof, asked = _record(job), _proof(job), job.config
    size = size_text(job.file.stat().st_size) if job.file.is_file() else "–"
    adapter, kind = ("–", "–") if asked is None else (Path(asked.run or asked.adapter).name, asked.quantization or "LoRA")
    if record is not None:
        adapter, kind = record.adapter, record.quantization or "LoRA"
    return [job.id, state_word(job), adapter, kind, size, "–" if proof is None else proof.verdict]


def _outcome(job: Job) -> str:
    """How the file was verified, in a sentence, and what to know before using it."""
    record, proof = _record(job), _proof(job)
    if job.state != "finished":
        return ""
    if record is None or proof is None:
        return "⚠ **Not verified**: the file has no record of what it was made from."
    mark = "✓" if proof.equality is not None and not proof.warnings else "⚠"
    return "\n- ".join([f"{mark} {escape(proof.sentence())}.", *map(escape, [*proof.warnings, *record.notes()])])


def _files(record: ExportRecord) -> list[list[str]]:
    beside = [path for path in sorted(record.out.parent.glob(f"{record.out.name}.*")) if path.is_file()]
    rows = [[path.name, size_text(path.stat().st_size), sha256_of(path)] for path in beside]
    return [[record.out.name, size_text(record.bytes), record.sha256], *rows]
