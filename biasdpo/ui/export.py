"""The Export tab: exports, the chosen one, a new one. The tab only reads files: an export is a process of its own, which neither
a closed page nor the end of the app stops."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import models
from biasdpo.config import DEFAULT_QUANTIZATION, ExportConfig
from biasdpo.errors import BiasDPOError, ConfigError, ExportError
from biasdpo.gguf import export as serving
from biasdpo.gguf import quantize, write
from biasdpo.gguf.export import ExportRecord, load_record, modelfile_file
from biasdpo.gguf.proof import MAX_DROP, MAX_KL_NATS, ExportProof
from biasdpo.gguf.quantize import KEEP
from biasdpo.jobs import store as jobs_store
from biasdpo.jobs.job import Job
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.ui import components
from biasdpo.ui.components import Store, own_choices, pasted
from biasdpo.ui.jobs import QUICK, RAW, JobsLayout, JobsView, Mark, Updates
from biasdpo.ui.train import chip, duration, model_title, size_text, told, when
from biasdpo.workspace import is_public_space, refuse_on_public_space

# Export render


FORMATS = {"lora": "LoRA", "merged": "merged"}
_WORDS = {
    "stopped": "nothing is left under its name",
    "failed": "nothing is left under its name",
    "interrupted": "its process is gone",
    "finished": "",
}
_HEADS = ("Export", "State", "Model", "Adapter", "Kind", "Size", "Proof", "When (UTC)")


def refused() -> str:
    """What stands first on a public Space."""
    return (
        '<div class="bd-space" role="note"><b>Export is off on this public Space.</b> Duplicate the Space, or run BiasDPO on '
        "your own machine, to make files for llama.cpp and Ollama.</div>"
    )


def no_exports() -> str:
    """The empty state."""
    return (
        '<div class="bd-empty" role="note"><h2>No exports yet</h2><p>An export is one GGUF file for llama.cpp, Ollama and their '
        "like: an adapter alone, or a whole model with it merged in. Each is compared with the original before it gets its name. "
        "Below, an adapter is chosen already: press <b>Export</b>.</p></div>"
    )


# The list


def table(exports: Sequence[tuple[str, Job]], chosen: str) -> str:
    """All exports by id, the newest first; the chosen one is marked."""
    at = next((i for i, (name, _) in enumerate(exports) if name == chosen), 0)
    rows = "".join(_row(name, export, name == chosen, i == at) for i, (name, export) in enumerate(exports))
    head = "".join(f'<th scope="col">{name}</th>' for name in _HEADS)
    listed = f'<table class="bd-rows bd-exports"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="bd-rows-box">{listed}</div>'


def _row(name: str, export: Job, chosen: bool, tabbed: bool) -> str:
    cells = (
        chip(export.state),
        escape(model_of(export)),
        escape(adapter_of(export)),
        escape(kind_of(export)),
        size_text(export.file.stat().st_size) if export.file.is_file() else "–",
        escape(verdict(export)),
        escape(when(export.started_at)),
    )
    current = ' aria-current="true"' if chosen else ""
    button = (
        f'<button type="button" tabindex="{0 if tabbed else -1}" data-focus="{escape(name)}">{escape(export.file.name)}</button>'
    )
    return f'<tr data-id="{escape(name)}"{current}><td>{button}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _asked(export: Job, name: str) -> str:
    return str(getattr(export.config, name, None) or "")


def record_of(export: Job) -> ExportRecord | None:
    """What the file says of itself; None where it is not finished, or has no record."""
    return load_record(export.file) if export.state == "finished" else None


def model_of(export: Job) -> str:
    """The base model's title."""
    if (record := record_of(export)) is not None:
        return record.model_title
    return model_title(_asked(export, "model")) or "–"


def adapter_of(export: Job) -> str:
    """The adapter's id; never a folder of this machine."""
    if (record := record_of(export)) is not None:
        return record.adapter
    name = _asked(export, "run") or _asked(export, "adapter")
    return Path(name).name or "–"


def kind_of(export: Job) -> str:
    """LoRA, or the quantization of a merged file."""
    if (record := record_of(export)) is not None:
        return record.quantization or FORMATS.get(record.format, record.format)
    return _asked(export, "quantization") or FORMATS.get(_asked(export, "format"), "–")


def proof_of(export: Job) -> ExportProof | None:
    """The proof of a finished export, or of one that failed it; None where there is none, or none that can be read."""
    record = record_of(export)
    row = record.proof if record is not None else export.status.proof
    try:
        return ExportProof.from_json(row) if row else None
    except (TypeError, ValueError):
        return None


def verdict(export: Job) -> str:
    """The proof in two words."""
    proof = proof_of(export)
    if proof is None:
        return "–"
    if proof.passed is False:
        return "failed"
    if proof.skipped:
        return "not compared"
    return "equal" if proof.passed else "measured, warning" if proof.warnings else "measured"


# One export


def head(export: Job) -> str:
    """Name, state, progress, numbers, what went wrong."""
    status = export.status
    words = status.phase if export.is_active else _WORDS[export.state]
    parts = [
        f'<div class="bd-run-head"><h2>{escape(export.file.name)}</h2>{chip(export.state)}'
        f'<span class="bd-run-words" role="status">{escape(words)}</span></div>'
    ]
    if export.is_active:
        parts.append(_progress(status.share))
    parts.append(_numbers(export))
    if status.error:
        parts.append(components.error(status.error))
    if export.state == "finished" and record_of(export) is None:
        parts.append(
            components.note("It has no record of its export: what it was made from, and whether it was proven, is unknown.")
        )
    return f'<section class="bd-run" aria-label="Export {escape(export.file.name)}">{"".join(parts)}</section>'


def _progress(share: float) -> str:
    percent = 100 * share
    return (
        '<div class="bd-progress bd-is-running"><div class="bd-progress-track" role="progressbar" aria-label="Progress" '
        f'aria-valuenow="{percent:.0f}" aria-valuemin="0" aria-valuemax="100"><i style="width: {percent:.1f}%"></i></div>'
        f"<div><span>{percent:.0f} %</span></div></div>"
    )


def _numbers(export: Job) -> str:
    record = record_of(export)
    facts = [("model", escape(model_of(export))), ("adapter", escape(adapter_of(export))), ("kind", escape(kind_of(export)))]
    if record is not None:
        facts.append(("size", size_text(record.bytes)))
        facts.append(("SHA-256", f'<code title="{escape(record.sha256)}">{escape(record.sha256[:12])}</code>'))
        if record.seconds:
            facts.append(("took", f"{duration(sum(record.seconds.values()))}, proof {duration(record.seconds.get('proof', 0))}"))
    if export.started_at:
        facts.append(("written" if record is not None else "started", f"{escape(when(export.started_at))} UTC"))
    return f'<div class="bd-facts bd-run-facts">{"".join(f"<span><i>{name}</i> {value}</span>" for name, value in facts)}</div>'


def proof_panel(export: Job) -> str:
    """What the proof found: its verdict, its figures beside what is asked of them, warnings; "" where there is no proof."""
    proof = proof_of(export)
    if proof is None:
        return ""
    mark, word = _verdict(proof, is_lora=_asked(export, "format") == "lora")
    warnings = "".join(f"<li>{escape(line)}</li>" for line in proof.warnings)
    parts = [f'<p class="bd-proof-verdict bd-proof-{mark}">{word}</p>']
    if warnings:
        parts.append(f'<ul class="bd-meter-warnings">{warnings}</ul>')
    parts += [components.error(line) for line in proof.failures]
    if proof.skipped:
        parts.append(components.note(proof.skipped))
    rows = "".join(f'<tr><th scope="row">{what}</th><td>{found}</td><td>{ask}</td></tr>' for what, found, ask in figures(proof))
    if rows:
        heads = "".join(f'<th scope="col">{name}</th>' for name in ("Measured", "Found", "Asked"))
        parts.append(
            f'<div class="bd-scroll"><table class="bd-table bd-proof-table"><thead><tr>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    parts.append(
        '<p class="bd-measured-at">transformers in F32 against llama.cpp on this file, both on the CPU: F32 KV cache, no flash '
        "attention. KL from the original to the file, in nats a position.</p>"
    )
    return f'<section class="bd-proof-panel" aria-label="Proof"><h3>Proof of equality</h3>{"".join(parts)}</section>'


def _verdict(proof: ExportProof, *, is_lora: bool) -> tuple[str, str]:
    if proof.failures:
        return "bad", "Not equal: the file was thrown away."
    if proof.skipped:
        return "open", "Not compared with the original."
    if proof.passed:
        return "good", '<span aria-hidden="true">✓</span> Equal to the original, to rounding.'
    word = f"Its base GGUF, in {escape(proof.quantization)}," if is_lora else escape(proof.quantization)
    if proof.warnings:
        return "open", f"{word} can't be equal to the original. What it changes was measured: see the warning."
    return "good", f'<span aria-hidden="true">✓</span> {word} can\'t be equal to the original. What it changes was measured.'


def figures(proof: ExportProof) -> list[tuple[str, str, str]]:
    """(what, found, asked) of each measurement, as HTML."""
    rows = []
    if (tokens := proof.tokenizer) is not None:
        found = "all alike" if not tokens.different else f"<b>{tokens.different:,}</b> differ"
        rows.append((f"Tokenizer, {tokens.strings:,} texts", found, "all alike"))
    if (equality := proof.equality) is not None:
        asked = f"at most {MAX_KL_NATS:g}" if proof.lossless else "–"
        rows.append((f"Mean KL, {equality.positions:,} positions", f"{equality.mean_kl:.2g}", asked))
        rows.append(("Largest KL", f"{equality.max_kl:.2g}", "–"))
        rows.append(("Same likeliest token", f"{equality.agreement:.2%}", "–"))
        clear = f"{equality.clear_agreement:.2%} of {equality.clear_positions:,}"
        rows.append(("Same where the two likeliest are clearly apart", clear, "100%" if proof.lossless else "–"))
        if equality.adapter_kl is not None:
            rows.append(("For comparison: mean KL if the adapter were left out", f"{equality.adapter_kl:.2g}", "–"))
    if (survival := proof.survival) is not None:
        change = f"{survival.before:.1%} → <b>{survival.after:.1%}</b>"
        rows.append(
            (f"Reward accuracy, {survival.pairs:,} held-out pairs", change, f"falls by at most {100 * MAX_DROP:g} points")
        )
    return rows


def fallbacks(record: ExportRecord | None) -> str:
    """The tensors that could not have the quantization's type; "" where all have it."""
    fallen = record.written.get("fallbacks") or [] if record is not None else []
    if not fallen:
        return ""
    pairs: dict[tuple[str, str], int] = {}
    for one in fallen:
        key = str(one.get("wanted")), str(one.get("got"))
        pairs[key] = pairs.get(key, 0) + 1
    told = "; ".join(f"{count:,} as {escape(got)} in place of {escape(wanted)}" for (wanted, got), count in pairs.items())
    return (
        f'<div class="bd-note">Widths that the quantization\'s blocks do not divide: {told}. The file is larger than the '
        "quantization's name suggests.</div>"
    )


def elsewhere(record: ExportRecord) -> str:
    """The file's place, and the commands that serve it, to be copied."""
    modelfile = modelfile_file(record.out)
    lines = [
        ("The file:", str(record.out)),
        ("llama.cpp:", serving.llama_server(record)),
        ("Ask it:", serving.request(record)),
        ("Ollama:", serving.ollama(record, modelfile)),
    ]
    if record.command:
        lines.append(("Made by:", record.command))
    return f'<div class="bd-commands">{"".join(map(_command, lines))}</div>'


def _command(line: tuple[str, str]) -> str:
    name, command = line
    return (
        f'<div class="bd-command"><span>{name}</span><code>{escape(command)}</code><button type="button" class="bd-copy" '
        f'data-text="{escape(command)}" aria-label="Copy: {escape(name.rstrip(":"))}">Copy</button></div>'
    )


def modelfile(record: ExportRecord) -> str:
    """Ollama's Modelfile as it lies beside the file."""
    text = serving.modelfile(record)
    return (
        f'<div class="bd-modelfile"><button type="button" class="bd-copy" data-text="{escape(text)}" '
        'aria-label="Copy the Modelfile">Copy</button>'
        f'<pre class="bd-log" tabindex="0" aria-label="Modelfile">{escape(text)}</pre></div>'
    )


def deleting(export: Job) -> str:
    """What is lost when an export is deleted."""
    lost = (
        f"the file ({size_text(export.file.stat().st_size)}), its record and its Modelfile"
        if export.file.is_file()
        else "its log"
    )
    return (
        f'<div class="bd-error" role="alert"><b>Delete {escape(export.file.name)}?</b> Lost are {lost}. The adapter stays, so '
        "it can be exported again.</div>"
    )


# A new export


def plan(about_bytes: int | None, free_bytes: int, needs_bytes: int | None) -> str:
    """What the chosen export takes: disk, and memory for its proof."""
    if about_bytes is None:
        return ""
    text = f"About <b>{size_text(about_bytes)}</b>; {size_text(free_bytes)} are free on that disk."
    if needs_bytes is not None:
        text += f" The proof takes about {size_text(needs_bytes)} of memory, and is left out where there is less."
    return f'<div class="bd-note"><span>{text}</span></div>'


# Export view


class ExportsView(JobsView[Job]):
    """The tab's components of exports, and what is written into them."""

    noun = "export"
    tab_id = "export"

    machine: gr.HTML
    head: gr.HTML
    cancel_button: gr.Button
    use_button: gr.Button
    download: gr.DownloadButton
    again_button: gr.Button
    proof: gr.HTML
    fallbacks: gr.HTML
    elsewhere_box: gr.Column
    elsewhere: gr.HTML
    modelfile: gr.HTML
    served: set[Path]  # files that Gradio was told to serve

    @property
    def seen_outputs(self) -> list[Any]:
        buttons = [self.cancel_button, self.use_button, self.download, self.again_button, self.delete_button]
        shown = [self.head, self.proof, self.fallbacks, self.elsewhere_box, self.elsewhere, self.modelfile]
        return [*self.list_outputs, *buttons, *shown]

    def every(self) -> list[Job]:
        return jobs_store.list_jobs(self.workspace, "export")

    def id_of(self, job: Job) -> str:
        return job.id

    def name_of(self, job: Job) -> str:
        return job.file.name

    def found(self, job_id: str) -> Job:
        return jobs_store.find_job(job_id, self.workspace, "export")

    def deleting(self, job: Job) -> str:
        return deleting(job)

    def delete_files(self, job: Job) -> None:
        jobs_store.delete_job(job.id, self.workspace, "export")

    def listed(self, every: Sequence[Job], chosen: str) -> str:
        return table([(self.id_of(export), export) for export in every], chosen)

    def parts_of(self, job: Job, _mark: Mark) -> tuple[Updates, Mark]:
        return self._parts(job), {}

    def _parts(self, export: Job) -> Updates:
        here = not is_public_space()
        record = record_of(export)
        usable = here and record is not None and not export.is_active
        return {
            self.head: head(export),
            self.cancel_button: gr.update(visible=here and export.is_active),
            self.use_button: gr.update(visible=usable),
            self.download: self._download(export) if here else gr.update(visible=False),
            self.again_button: gr.update(visible=here and export.state in ("stopped", "failed", "interrupted")),
            self.delete_button: gr.update(visible=here and not export.is_active),
            self.proof: proof_panel(export),
            self.fallbacks: fallbacks(record),
            self.elsewhere_box: gr.update(visible=usable),
            self.elsewhere: elsewhere(record) if usable and record is not None else "",
            self.modelfile: modelfile(record) if usable and record is not None else "",
        }

    def _download(self, export: Job) -> Any:
        """The button with the file itself, served to whoever has its address: a copy in Gradio's cache could fill the disk."""
        if export.is_active or not export.file.is_file():
            return gr.update(visible=False)
        if export.file not in self.served:
            gr.set_static_paths([export.file])
            self.served.add(export.file)
        return gr.update(label=f"Download ({size_text(export.file.stat().st_size)})", value=str(export.file), visible=True)


# Export new


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
                    ExportConfig.settings()["pairs"].default,
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
            folder = self.workspace.root / "exports"
            if not name or name == proposed:  # a name of the visitor's own stays
                free = f"{jobs_store.free_id('export', stem, self.workspace)}.gguf"
                shown |= {self.name: free, self.proposed: free}
            at = next(path for path in (folder, *folder.parents) if path.is_dir())
            needs = _F32_BYTES * spec.parameters + _ROOM_BYTES
            shown[self.plan] = plan(about, shutil.disk_usage(at).free, needs)
        except Exception as exc:
            shown[self.new_notice] = components.error(told(exc, "Not planned"))
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
        offered = [(known.name, known.name, known.cost) for known in quantize.QUANTIZATIONS]
        if spec.gguf_path is not None and origin != "hf":
            offered.insert(0, (KEEP, "as the base GGUF", "Every tensor in the type that it has there."))
        sizes: dict[str, int] = {}
        choices = []
        for value, title, cost in offered:
            try:
                sizes[value] = write.expected_bytes(spec, value, source=origin)
            except ExportError as exc:  # of a width that this quantization does not go with
                if value == quantization:
                    shown[self.new_notice] = components.note(str(exc))
                continue
            choices.append((f"{title} · {size_text(sizes[value])} · {cost}", value))
        wanted = (quantization, DEFAULT_QUANTIZATION, *sizes)
        chosen = next(name for name in wanted if name in sizes)
        shown[self.quantization] = gr.update(choices=choices, value=chosen, visible=True)
        return sizes[chosen], chosen

    # Starting

    def start(self, *given: Any) -> Iterator[Updates]:
        """Start the export, and show it."""
        yield {self.new_notice: components.busy("Starting …")}
        try:
            refuse_on_public_space("Export")
            export = jobs_store.start_export(self._request(*given), self.workspace, command="the page's Export tab")
            shown = self.show_one(export.id)
        except Exception as exc:
            yield {self.new_notice: components.error(told(exc, "Not started"))}
            return
        yield {self.new_notice: "", self.name: "", self.proposed: ""} | shown

    def _request(
        self, adapter: Any, model: Any, format: Any, quantization: Any, origin: Any, name: Any, pairs: Any, threads: Any
    ) -> ExportConfig:
        found = self._found(_text(adapter))
        is_run = found is not None and self._is_run(found)
        return ExportConfig(
            out=Path(_text(name)),
            format=format,
            adapter="" if is_run else _text(adapter),
            run=_text(adapter) if is_run else "",
            model=_text(model),
            **{"quantization": _text(quantization) if format == "merged" else ""},  # type: ignore[arg-type]
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


# Export tab


class ExportTab(NewExportPanel, JobsLayout[Job]):
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
        self.machine = gr.HTML(refused() if is_public_space() else "", js_on_load=None, elem_id="gguf-machine")
        self.build_list(empty="" if is_public_space() else no_exports())
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
            jobs_store.stop_job(export.id, self.workspace, "export")
        except BiasDPOError as exc:
            return {self.notice: components.error(str(exc))}
        return self.show_one("", components.note(f"{export.file.name} was cancelled: nothing of it is left."))

    def again(self, export_id: Any) -> Updates:
        """The panel for a new export, with what was asked for of one that failed. Its name is free again."""
        try:
            refuse_on_public_space("Export")
            export = self.one(export_id)
            if export.config is None:
                raise ExportError(f"{export.file.name} is {export.state}: there is nothing to repeat")
            asked = export.config.to_json()
            jobs_store.delete_job(export.id, self.workspace, "export")
        except BiasDPOError as exc:
            return {self.notice: components.error(str(exc))}
        given = [asked.get("run") or asked.get("adapter"), asked.get("model"), asked.get("format"), asked.get("quantization")]
        shown = self.open_new(*given, asked.get("source"), export.file.name, "")
        filled = {self.format: asked.get("format"), self.origin: asked.get("source"), self.name: export.file.name}
        more = {self.pairs: asked.get("pairs"), self.threads: asked.get("threads") or 0}
        return shown | filled | more

    def use_now(self, export_id: Any) -> Updates:
        """The Compare tab: on the merged file, or on the base model with the adapter that a LoRA file holds."""
        try:
            refuse_on_public_space("Opening an export")
            export = self.one(export_id)
            record = record_of(export)
            if record is None:
                raise ExportError(f"{export.file.name} is {export.state}: it can't be opened")
        except BiasDPOError as exc:
            return {self.notice: components.error(str(exc))}
        if record.format == "merged":
            model, adapter = str(record.out), "none"
        else:
            model, adapter = record.model, str(record.request.get("run") or record.request.get("adapter"))
        return self.pick_compared(model, adapter) | {self.tabs: gr.Tabs(selected="compare")}
