"""The Export tab: an adapter, or a model with it, as a GGUF file; what was exported, how it was verified, and its use elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import models
from biasdpo.config import DEFAULT_QUANTIZATION, ExportConfig, Setting
from biasdpo.errors import BiasDPOError, ExportError
from biasdpo.gguf import export as exporting
from biasdpo.gguf import quantize, write
from biasdpo.gguf.export import ExportRecord, load_record
from biasdpo.gguf.proof import MAX_DROP, MAX_KL_NATS, RESERVED_BYTES, ExportProof
from biasdpo.jobs import store
from biasdpo.jobs.job import Job
from biasdpo.jobs.resolve import resolve_export
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.ui.components import QUICK, Studio, Updates, size_text, escape, handles, plural
from biasdpo.ui.jobs import build_jobs, refuse_if_public, state_word
from biasdpo.workspace import Workspace, is_public_space, sha256_of

_FORMATS = [("LoRA: the adapter alone, loaded beside its base model", "lora"), ("Merged: one complete model", "merged")]
_PROOFS = [("Full", "full"), ("Quick", "quick"), ("None", "none")]
_EMPTY = """### No exports yet
An export is one GGUF file for llama.cpp, Ollama and similar apps. Choose an adapter and press **Export**; before a file gets its
name, it is compared with the model it was made from."""


def build_export(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    settings = ExportConfig.settings()
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            adapter = gr.Dropdown([], label="Run or adapter", info="Or the path of a PEFT folder.", allow_custom_value=True,
                                  elem_id="export-adapter")  # fmt: skip
            format_ = gr.Radio(_FORMATS, value="lora", label="Format", elem_id="export-format")
            quantization = gr.Dropdown(
                list(settings["quantization"].choices), value=DEFAULT_QUANTIZATION, label="Quantization", visible=False,
                filterable=False, elem_id="export-quantization",
            )  # fmt: skip
            proof = gr.Radio(_PROOFS, value="full", label="Proof", info=settings["proof"].help, elem_id="export-proof")
            name = gr.Textbox(label="File name", max_lines=1, elem_id="export-name")
            plan = gr.Markdown(elem_id="export-plan")
            start = gr.Button("Export", variant="primary", interactive=not is_public_space(), elem_id="export-start")
            with gr.Accordion("Advanced", open=False, elem_id="export-advanced"):
                advanced = {key: _field(one) for key, one in settings.items() if one.is_advanced}
        with gr.Column(scale=3, min_width=300):
            empty = gr.Markdown(_EMPTY, elem_id="export-empty")
            panel = build_jobs(studio, "export", ["Export", "State", "Adapter", "Format", "Size", "Proof"], _row)
            with panel.box:
                sentence = gr.Markdown(elem_id="export-sentence")
                with gr.Row(elem_classes="actions"):
                    download = gr.DownloadButton("Download", variant="primary", size="sm", visible=False, elem_id="export-download")
                    compare = gr.Button("Open in Compare", size="sm", visible=False, elem_id="export-compare")
                files = gr.Dataframe(headers=["File", "Size", "SHA-256"], label="Written", interactive=False, visible=False,
                                     column_widths=["40%", "15%", "45%"], elem_id="export-files")  # fmt: skip
                with gr.Accordion("Proof details", open=False, visible=False, elem_id="export-details") as details:
                    figures = gr.Dataframe(headers=["Measured", "Found", "Required"], label="Proof", show_label=False, wrap=True,
                                           interactive=False, elem_id="export-figures")  # fmt: skip
                    gr.Markdown("transformers in F32 and llama.cpp on this file, both on the CPU (F32 KV cache, no flash attention). "
                                "KL divergence from the original to the file, in nats per position.")  # fmt: skip
                with gr.Accordion("Use it elsewhere", open=False, visible=False, elem_id="export-elsewhere") as elsewhere:
                    commands = {
                        label: gr.Textbox(label=label, lines=lines, max_lines=12, interactive=False, buttons=["copy"])
                        for label, lines in (("llama.cpp", 1), ("Ask the server", 2), ("Ollama", 1), ("Ollama's Modelfile", 4))
                    }
                panel.build_log()
    proposed = gr.State("")
    served: set[Path] = set()  # files that Gradio serves from where they are: copies in its cache could fill the disk
    inputs = [adapter, format_, quantization, proof, name, proposed, *advanced.values()]

    def config_of(adapter_: str, format__: str, quantization_: str, proof_: str, name_: str, _proposed: str, *more: Any) -> ExportConfig:
        adapter_ = (adapter_ or "").strip().strip("'\"")
        named = (name_ or "").strip() or "export"
        values = {key: value for key, value in zip(advanced, more, strict=True) if value not in (None, "")}
        if adapter_ == "none" and format__ == "merged" and "model" not in values:
            values["model"] = next(spec.id for spec in models.list_models() if spec.present)
        is_run = any(one.id == adapter_ for one in _runs(studio.workspace))
        return ExportConfig(
            **values | {"source": values["source"] if format__ == "merged" else "auto"},
            out=Path(named if named.endswith(".gguf") else f"{named}.gguf"),
            format=format__,
            quantization=quantization_ if format__ == "merged" else "",
            proof=proof_,
            **{"run" if is_run else "adapter": adapter_},
        )

    def look(*given: Any) -> Updates:
        """What the form asks for, in a line; what doesn't go together is said there, and again by Export."""
        shown: Updates = {quantization: gr.Dropdown(visible=given[1] == "merged")}
        try:
            config, spec, found = resolve_export(config_of(*given), studio.workspace)
            sizes = _sizes(config, spec, found)
            chosen = config.quantization if config.quantization in sizes else next(iter(sizes))
            if config.format == "merged":
                shown[quantization] = gr.Dropdown(_quantizations(sizes), value=chosen, visible=True)
        except BiasDPOError as exc:
            return shown | {plan: f"⚠ {escape(str(exc))}"}
        stem = f"{found.id if found is not None else Path(spec.id).stem}-{chosen or 'lora'}"
        if given[4] in ("", given[5]):  # a name of one's own stays
            free = f"{store.free_id('export', stem, studio.workspace)}.gguf"
            shown |= {name: free, proposed: free}
        return shown | {plan: _plan(config, spec, sizes[chosen], studio.workspace)}

    def open_form(request: dict[str, Any], chosen: str) -> Updates:
        """The tab was opened: what can be exported now."""
        return {adapter: _adapters(studio.workspace, chosen or request.get("run") or "")}

    def prefill(request: dict[str, Any]) -> Updates:
        return {adapter: _adapters(studio.workspace, request["run"]) if request.get("run") else gr.skip()}

    def begin(*given: Any) -> Updates:
        refuse_if_public("Export")
        job = store.start_export(config_of(*given), studio.workspace, command="the Export tab")
        return {name: "", proposed: ""} | panel.show(job.id)

    def render(job: Job | None) -> Updates:
        record, found = (None, None) if job is None or is_public_space() else (_record(job), _proof(job))
        if job is not None and record is not None and job.file not in served:
            gr.set_static_paths([job.file])
            served.add(job.file)
        texts = _commands(record) if record is not None else ["", "", "", ""]
        has_file = record is not None
        return {
            sentence: _sentence(job, record, found),
            download: gr.DownloadButton(value=str(record.out) if record is not None else None, visible=has_file),
            compare: gr.Button(visible=has_file),
            files: gr.Dataframe(_files(record) if record is not None else [], visible=has_file),
            details: gr.Accordion(visible=found is not None and found.tokenizer is not None),
            figures: _figures(found),
            elsewhere: gr.Accordion(visible=has_file),
            **dict(zip(commands.values(), texts, strict=True)),
        }

    def use(selected: str) -> Updates:
        job = panel.job(selected)
        record = _record(job) if job is not None else None
        if record is None:
            raise ExportError("This export has no finished file: wait for it, or export again")
        if record.format == "merged":
            return studio.open("compare", model=str(record.out), adapter="none")
        return studio.open("compare", model=record.model, adapter=record.request.get("run") or record.request.get("adapter") or "")

    looked = [quantization, name, proposed, plan]
    tab.select(handles(open_form), [studio.requests["export"], adapter], adapter, **QUICK)
    studio.on_request("export", prefill, [], [adapter])
    gr.on(
        [adapter.change, format_.input, quantization.input, proof.input, advanced["model"].blur, advanced["source"].input,
         name.blur],
        handles(look), inputs, looked, trigger_mode="always_last", **QUICK,
    )  # fmt: skip
    started = gr.on([start.click, name.submit], handles(begin), inputs, [name, proposed, *panel.chosen_outputs()], **QUICK)
    started.success(handles(look), inputs, looked, **QUICK)
    compare.click(handles(use), panel.selected, studio.open_outputs("compare"), **QUICK)
    panel.watch("list", lambda _job: {empty: gr.Markdown(visible=not store.list_jobs(studio.workspace, "export"))}, [empty])
    panel.watch("status", render, [sentence, download, compare, files, details, figures, elsewhere, *commands.values()])
    panel.wire(tab)


# The form


def _field(one: Setting) -> Any:
    """A field for a setting, as it is declared."""
    info = f"{one.help}{f' ({one.unit})' if one.unit else ''}"
    options: dict[str, Any] = {"label": one.label, "info": info, "elem_id": f"export-{one.name.replace('_', '-')}"}
    if one.kind == "choice":
        return gr.Radio(list(one.choices), value=one.default, **options)
    if one.kind == "text":
        return gr.Textbox(one.default, max_lines=1, **options)
    return gr.Number(one.default, precision=0 if one.kind == "integer" else None, minimum=one.low, maximum=one.high, **options)


def _runs(workspace: Workspace) -> list[AdapterSpec]:
    """Finished runs, the newest first."""
    return [adapter for adapter in models.adapters(workspace) if adapter.folder.parent.parent == workspace.runs]


def _adapters(workspace: Workspace, chosen: str) -> Any:
    """The picker: runs, shipped adapters, no adapter. `chosen` "": the first of them."""
    runs = {adapter.id for adapter in _runs(workspace)}
    shipped = [adapter.id for adapter in models.adapters(workspace) if adapter.id not in runs]
    choices = [(f"{one} (run)", one) for one in (adapter.id for adapter in _runs(workspace))]
    choices += [(f"{one} (shipped)", one) for one in shipped] + [("No adapter: the base model alone", "none")]
    return gr.Dropdown(choices, value=chosen or choices[0][1])


def _sizes(config: ExportConfig, spec: ModelSpec, adapter: AdapterSpec | None) -> dict[str, int]:
    """About the bytes of the file, by quantization that the model allows; {"": bytes} of a LoRA."""
    if config.format == "lora":
        return {"": adapter.weights.stat().st_size if adapter is not None else 0}
    sizes: dict[str, int] = {}
    refused: BiasDPOError | None = None
    for quantization in ExportConfig.settings()["quantization"].choices:
        try:
            sizes[quantization] = write.expected_bytes(spec, quantization, source=config.source)
        except BiasDPOError as exc:  # of a width that it does not fit, or of "keep" without a base GGUF
            refused = exc
    if not sizes and refused is not None:
        raise refused
    return sizes


def _quantizations(sizes: dict[str, int]) -> list[tuple[str, str]]:
    costs = {one.name: one.cost for one in quantize.QUANTIZATIONS} | {quantize.KEEP: "Every tensor keeps the base GGUF's type."}
    return [(f"{name} · {size_text(count)} · {costs[name]}", name) for name, count in sizes.items()]


def _plan(config: ExportConfig, spec: ModelSpec, about: int, workspace: Workspace) -> str:
    """What Export will write, and what that takes."""
    adapter = config.run or config.adapter
    what = f"{escape(Path(adapter).name)} for {escape(spec.title)}" if adapter != "none" else f"{escape(spec.title)} alone"
    folder = workspace.root / "exports"
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    text = f"**{what}**: about {size_text(about)}; {size_text(free)} free."
    if config.proof != "none":
        return f"{text} The proof takes about {size_text(4 * spec.parameters + RESERVED_BYTES)} of memory."
    return f"{text} Without a proof, the file is recorded as **not verified**."


# The list


def _record(job: Job) -> ExportRecord | None:
    """What a finished file says of itself; None where there is none, or none that can be read."""
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
    adapter, kind = "–", "–"
    if record is not None:
        adapter, kind = record.adapter, record.quantization or "LoRA"
    elif asked is not None:
        adapter, kind = Path(asked.run or asked.adapter).name, asked.quantization or "LoRA"
    size = size_text(job.file.stat().st_size) if job.file.is_file() else "–"
    return [job.id, state_word(job), adapter, kind, size, proof.verdict if proof is not None else "–"]


# The chosen export


def _sentence(job: Job | None, record: ExportRecord | None, proof: ExportProof | None) -> str:
    """How the file was verified, in a sentence; below it what to know before using it."""
    if job is None or (record is None and job.state != "finished"):
        return ""
    if record is None or proof is None:
        return "⚠ **Not verified**: the file has no record of what it was made from and how it was verified."
    mark = "✓" if proof.verdict in ("equal", "measured") and not proof.warnings else "⚠"
    fallen = len(record.written.get("fallbacks") or ())
    notes = [f"{plural(fallen, 'tensor')} have a larger type than {record.quantization}, which does not fit their width."]
    return f"{mark} {escape(proof.sentence())}." + "".join(f"\n- {escape(one)}" for one in [*proof.warnings, *notes[: bool(fallen)]])


def _files(record: ExportRecord) -> list[list[str]]:
    beside = [path for path in sorted(record.out.parent.glob(f"{record.out.name}.*")) if path.is_file()]
    rows = [[path.name, size_text(path.stat().st_size), sha256_of(path)] for path in beside]
    return [[record.out.name, size_text(record.bytes), record.sha256], *rows]


def _figures(proof: ExportProof | None) -> list[list[str]]:
    """Each measurement of a proof, and what is required of it."""
    rows: list[list[str]] = []
    if proof is None:
        return rows
    if (tokens := proof.tokenizer) is not None:
        rows.append([f"Tokens of {tokens.strings:,} texts", f"{tokens.different:,} differ", "0 differ"])
    if (e := proof.equality) is not None:
        exact = "100%" if proof.lossless else "–"
        limit = f"at most {MAX_KL_NATS:g}" if proof.lossless else "–"
        rows.append([f"Mean KL, {e.positions:,} positions", f"{e.mean_kl:.2g}", limit])
        rows.append(["Largest KL", f"{e.max_kl:.2g}", "–"])
        rows.append(["Same most likely token", f"{e.agreement:.2%}", "–"])
        rows.append([f"The same at the {e.clear_positions:,} positions without a near tie", f"{e.clear_agreement:.2%}", exact])
        if e.adapter_kl is not None:
            rows.append(["For comparison: mean KL if the adapter were left out", f"{e.adapter_kl:.2g}", "–"])
    if (s := proof.survival) is not None:
        found = f"{s.before:.1%} before, {s.after:.1%} after"
        rows.append([f"Reward accuracy on {plural(s.pairs, 'held-out pair')}", found, f"drops by at most {MAX_DROP:.0%}"])
    return rows


def _commands(record: ExportRecord) -> list[str]:
    """To serve the file with llama.cpp, to ask that server, to serve it with Ollama, and its Modelfile."""
    ollama = exporting.ollama(record, exporting.modelfile_file(record.out))
    return [exporting.llama_server(record), exporting.request(record), ollama, exporting.modelfile(record)]
