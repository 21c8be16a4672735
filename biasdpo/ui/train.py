"""The Train tab: a new run on the left; on the right the runs, the chosen one as it trains, and several compared.

Training is a process of its own. The tab only reads run folders, so neither a closed page nor the end of the app stops a run.
"""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import config as configs
from biasdpo import models
from biasdpo.access import is_owner, require_owner
from biasdpo.config import Preset, Setting, TrainConfig
from biasdpo.data import splits
from biasdpo.data.importing import HUB
from biasdpo.data.splits import SEED_PAIRS, WORKSPACE, Mixture
from biasdpo.errors import BiasDPOError, ConfigError, JobError, plural
from biasdpo.jobs import store
from biasdpo.jobs.estimate import Estimate, estimate_training, known_estimate
from biasdpo.jobs.job import Job
from biasdpo.jobs.outcome import best_accuracy, held_out_metrics, held_out_pairs, outcome, pack_run, pairs_needed, run_table
from biasdpo.jobs.resolve import training_refusal
from biasdpo.labeling import is_alike, word_diff
from biasdpo.ui.charts import TRAINING, training_chart
from biasdpo.ui.components import (
    QUICK,
    Studio,
    Updates,
    catalog_choices,
    duration,
    escape,
    handles,
    local_time,
    model_choices,
    pasted,
)
from biasdpo.ui.jobs import SMALL, JobPanel, run_estimate, state_word

FIRST_MODEL = "smollm2"
MAX_COMPARED = 6  # as many as the charts have colors
_FILES = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"]
_DIFF_CHARACTERS = 4_000  # difflib's time grows with the square
_OFF = "Training is for the owner of this app."
_NO_RUNS = """No runs yet. A run teaches the model to prefer the less biased completion of each pair, and saves an adapter that
Compare can switch on and off. A preset and data are chosen already: press **Start**."""


def build_train(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    refusal = training_refusal()
    if refusal:
        gr.Markdown(refusal, elem_id="train-refusal")
    with gr.Row(elem_id="train-columns"):
        with gr.Column(scale=5, min_width=340, visible=not refusal):
            form = Form(studio)
        with gr.Column(scale=7, min_width=340):
            empty = gr.Markdown(_NO_RUNS, visible=False, elem_id="train-empty")  # until the list was read
            panel = JobPanel(studio, "train", ("Run", "State", "Held-out accuracy", "Data", "Started"), row_of, outcome_text)
            with panel.box:
                build_outcome(studio, panel, form)
                build_probes(panel)
                build_curves(panel)
                panel.build_note()
                build_details(panel)
                panel.build_log()
            compare = build_comparison(studio)
    studio.next_step("measure", "Next: measure what changed")
    wire_form(studio, tab, form, panel)
    panel.wire(tab)
    runs = panel.versions["list"]

    def show_number(seen: str) -> tuple[Any, Any]:
        number = int(seen.partition("\n")[0])
        return gr.update(visible=not number), gr.update(visible=number > 1)

    runs.change(show_number, runs, [empty, compare], **QUICK)


# The settings of a run as fields of the form, generated from TrainConfig

_SEED = "seed"  # the shipped pairs: everybody gets the form, so it names no folder
SETTINGS = tuple(one for name, one in TrainConfig.settings().items() if name not in ("model", "datasets"))


def build_field(setting: Setting, value: Any) -> Any:
    """The field of one setting."""
    limits = ""
    if setting.kind in ("integer", "number"):
        ends = [f"{end:,.0f}" if end >= 1000 else f"{end:g}" for end in (setting.low, setting.high) if end is not None]
        limits = f" Range: {' to '.join(ends)} {setting.unit}".rstrip() + "."
    shown: dict[str, Any] = {
        "label": setting.label,
        "info": setting.help + limits,
        "elem_id": f"train-{setting.name.replace('_', '-')}",
        "min_width": 220,
        "value": to_field(setting, value),
    }
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), multiselect=setting.is_list or None, **shown)
    if setting.kind == "integer" and not setting.is_list:
        return gr.Number(**shown)
    lines = 3 if setting.separator == "\n" else 1
    return gr.Textbox(lines=lines, max_lines=lines, **shown)


def to_field(setting: Setting, value: Any) -> Any:
    """A config's value as its field shows it."""
    if setting.kind == "choice":
        return list(value) if setting.is_list else value
    return value if setting.kind == "integer" and not setting.is_list else setting.format(value)


def from_field(setting: Setting, value: Any) -> Any:
    """A field's value as the config takes it; the config checks it."""
    if isinstance(value, str) and setting.kind != "choice":
        return setting.parse(value)
    if value is None and setting.is_list:
        return ()
    return int(value) if setting.kind == "integer" and isinstance(value, float) and value.is_integer() else value


def effects(values: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each setting changes anything beside these values, which may be as the fields show them."""
    return {one.name: one.has_effect(values) for one in SETTINGS}


def config_of(model: Any, data: Any, *values: Any) -> TrainConfig:
    """The config that the form shows; settings without an effect are at their defaults. Raises ConfigError.

    values   the fields', in the order of SETTINGS
    """
    if not isinstance(model, str) or not model.strip():
        raise ConfigError("No model to train: choose one, or enter a Hub id, a Hugging Face folder or a .gguf file")
    names = tuple(map(source_of, data or ()))
    if not names:
        raise ConfigError("No data to train on: choose at least one source")
    shown = {one.name: value for one, value in zip(SETTINGS, values, strict=True)}
    matters = effects({**shown, "datasets": names})
    read = {one.name: from_field(one, shown[one.name]) if matters[one.name] else one.default for one in SETTINGS}
    return TrainConfig(**read | {"model": models.absolute_name(pasted(model)), "datasets": names})


# Models, presets and data


def presets_of(model: str) -> list[Preset]:
    """The presets made for a model; for one of the user's own, those of the catalog model of its architecture."""
    alike = [model]
    if model not in models.catalog():
        try:
            architecture = models.find(model).architecture
        except BiasDPOError:
            return []
        alike = [spec.id for spec in models.catalog().values() if spec.architecture == architecture]
    return [preset for preset in configs.presets() if preset.model in alike]


def preset_cards(presets: Sequence[Preset]) -> list[tuple[str, str]]:
    """Title and, below it, one sentence (assets/style.css shows the line break)."""
    return [(f"{preset.title}\n{preset.description.partition('. ')[0].rstrip('.')}.", preset.id) for preset in presets]


def source_of(name: str) -> str:
    """A source as the training process finds it: a file by its absolute path."""
    name = pasted(name)
    if name == _SEED:
        return SEED_PAIRS
    return name if name == WORKSPACE or name.startswith(HUB) else str(Path(name).expanduser().resolve())


def own_pairs(studio: Studio) -> int | None:
    """How many pairs the workspace has from labeling and imports; None if they can't be read."""
    with suppress(BiasDPOError):
        return studio.dataset.confounds().pairs
    return None


def source_choices(studio: Studio, chosen: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The data sources to choose from; `chosen`: further ones, such as an uploaded file."""
    own = own_pairs(studio)
    mine = "Your own pairs (can't be read)" if own is None else f"Your own pairs ({own:,})"
    offered = [("Seed pairs (shipped)", _SEED), (mine, WORKSPACE)]
    return offered + [(splits.source_title(name), name) for name in chosen if name not in (_SEED, SEED_PAIRS, WORKSPACE)]


def mixture_line(found: Mixture, needed: int) -> str:
    """The pairs that a run would train on, and what is wrong with them, in Markdown."""
    parts = [f"**{plural(found.pairs_train, 'pair')}** to train on, {found.pairs_held_out:,} held out to measure the result"]
    for count, what in (
        (found.repeats, "repeated, used once"),
        (found.contradictions, "left out: judged both ways"),
        (found.dropped, "left out: too close to both sides of the split"),
        (found.rows_per_epoch if found.rows_per_epoch != found.pairs_train else 0, "per epoch, by weight"),
    ):
        parts += [f"{count:,} {what}"] if count else []
    warnings = [escape(warning) for warning in found.confounds.warnings]
    if (total := found.pairs_train + found.pairs_held_out) < needed:
        few = f"**Few pairs:** {total:,} of about {needed:,}. With fewer, too few are held out to tell a result from chance."
        warnings.insert(0, few)
    return "; ".join(parts) + "." + "".join(f"\n\n⚠ {warning}" for warning in warnings)


def estimate_line(found: Estimate) -> str:
    """Time and memory of a run, or why it can't fit, in Markdown."""
    if not found.fits:
        return f"⚠ {escape(found.refusal)}"
    device = "the CPU" if found.device == "cpu" else escape(found.device)
    long = [f"{plural(n, 'pair')} too long: {what}." for n, what in ((found.dropped, "dropped"), (found.cut, "truncated")) if n]
    long += [f"{plural(found.equal, 'pair')} dropped: both completions are the same within max_length."] if found.equal else []
    cost = f"About **{duration(found.seconds_total)}** on {device} ({plural(found.steps, 'step')})"
    memory = f"**{found.memory_bytes / 1e9:.1f} GB** of memory; {found.memory_free_bytes / 1e9:.1f} GB are free."
    return " ".join([f"{cost} and {memory}", *long])


# A new run


class Form:
    """The left column: a new run, at first with the quickest preset of the first model. `fields`: in the order of SETTINGS."""

    def __init__(self, studio: Studio) -> None:
        presets = presets_of(FIRST_MODEL)
        config = TrainConfig(**presets[0].values)
        fields: dict[str, Any] = {}
        own: dict[str, Any] = {"allow_custom_value": True, "min_width": 220}

        def build_fields(group: str) -> None:
            for one in SETTINGS:
                if one.group == group:
                    fields[one.name] = build_field(one, getattr(config, one.name))
                    fields[one.name].visible = one.has_effect(dict(config))

        gr.Markdown("### New run")
        self.preset = gr.Radio(
            preset_cards(presets), value=presets[0].id, label="Preset", show_label=False, elem_id="train-preset"
        )
        with gr.Row():
            choices = catalog_choices()
            self.model = gr.Dropdown(choices, value=FIRST_MODEL, label="Model, Hub ID, or path", elem_id="train-model", **own)
            sources = source_choices(studio)
            self.data = gr.Dropdown(
                sources, value=[_SEED], multiselect=True, label="Data, Hub dataset, or path", elem_id="train-data", **own
            )
        build_fields("Model and data")
        # Never added unasked: what a preset trains on, and with it what its estimate says, would depend on a few trial verdicts.
        self.add_own = gr.Button(visible=False, size="sm", elem_id="train-add-own")
        self.data_line = gr.Markdown(elem_id="train-data-line")
        with gr.Row(visible=False, elem_id="train-needed", elem_classes="actions") as self.more_data:
            studio.next_step("label", "Label pairs")
            studio.next_step("dataset", "Import pairs")
        self.cost = gr.Markdown(elem_id="train-cost")
        with gr.Row(elem_classes="actions"):
            self.start = gr.Button("Start", variant="primary", elem_id="train-start", min_width=150)
            self.measure = gr.Button("Estimate time", elem_id="train-estimate", min_width=120)
            self.cancel = gr.Button("Cancel", elem_id="train-cancel", visible=False, min_width=90)
            self.upload = gr.UploadButton("Add a data file", file_types=_FILES, elem_id="train-upload", min_width=130)
        with gr.Accordion("Advanced", open=False, elem_id="train-advanced") as self.advanced:
            self.name = gr.Textbox(
                label="Run name", info="Default: the model's name and a number.", max_lines=1, elem_id="train-run-id"
            )
            for group in dict.fromkeys(one.group for one in SETTINGS if one.group != "Model and data"):
                with gr.Accordion(group, open=group == "Essentials", elem_id=f"train-group-{group.lower()}"), gr.Row():
                    build_fields(group)
        with gr.Accordion("Config file", open=False, elem_id="train-config"):
            look: dict[str, Any] = {"language": None, "interactive": False, "wrap_lines": True, "max_lines": 30}
            self.preview = gr.Code(label="Config file (TOML)", elem_id="train-preview", **look)
            self.imported = gr.UploadButton(
                "Import a config file", file_types=[".toml", ".json"], size="sm", elem_id="train-import"
            )
        self.fields = [fields[one.name] for one in SETTINGS]

    @property
    def filled(self) -> list[Any]:
        """The outputs of `fill` and `show`."""
        return [self.preset, self.model, self.data, *self.fields]

    def fill(self, config: TrainConfig) -> Updates:
        """Show a config's settings, but for its model and data."""
        return {field: to_field(s, getattr(config, s.name)) for s, field in zip(SETTINGS, self.fields, strict=True)}

    def show(self, studio: Studio, config: TrainConfig, snapshot: Path | None = None) -> Updates:
        """Show a config, with its model and data."""
        if snapshot is not None:
            config = with_data(config, snapshot)
        named = [_SEED if name == SEED_PAIRS else name for name in config.datasets]
        return self.fill(config) | {
            self.preset: gr.update(choices=preset_cards(presets_of(config.model)), value=None),
            self.model: gr.update(choices=model_choices(studio, config.model), value=config.model),
            self.data: gr.update(choices=source_choices(studio, config.datasets), value=named),
        }


def with_data(config: TrainConfig, snapshot: Path) -> TrainConfig:
    """The config of a run whose files may be gone: then with `snapshot`, the run's own copy of its data."""
    gone = [name for name in config.datasets if name != WORKSPACE and not name.startswith(HUB) and not Path(name).is_file()]
    if not gone or not snapshot.is_file():
        return config
    names = html.escape(", ".join(map(splits.source_title, gone)))
    gr.Warning(f"{names}: no longer there, so the run's own copy of its data is chosen, without weights.")
    return config.replace(datasets=(str(snapshot),), dataset_weights=())


def wire_form(studio: Studio, tab: gr.Tab, form: Form, panel: JobPanel) -> None:
    """Connect the left column."""
    workspace = studio.workspace
    conditional = [(one, field) for one, field in zip(SETTINGS, form.fields, strict=True) if one.when]

    def describe(name: Any, *given: Any) -> Updates:
        """All that follows from what the form shows: the pairs, the cost if it was measured before, the config file."""
        if not is_owner():
            return {form.data_line: _OFF}
        matters = effects({one.name: value for one, value in zip(SETTINGS, given[2:], strict=True)} | {"datasets": given[1]})
        shown: Updates = {field: gr.update(visible=matters[one.name]) for one, field in conditional}
        own = 0 if WORKSPACE in map(source_of, given[1] or ()) else own_pairs(studio) or 0
        what = f"Your own {plural(own, 'pair')} {'is' if own == 1 else 'are'} not selected: add {'it' if own == 1 else 'them'}"
        shown[form.add_own] = gr.update(value=what, visible=own > 0)
        try:
            config = config_of(*given)
        except BiasDPOError as exc:
            return shown | {
                form.data_line: f"⚠ {escape(str(exc))}",
                form.preview: f"# {exc}",
                form.start: gr.update(interactive=False),
            }
        root = shlex.quote(str(workspace.root))
        command = f"# python -m biasdpo train --config FILE --run-id {name or 'NAME'} --workspace {root}\n"
        known, needed = known_estimate(config, workspace), pairs_needed(config.held_out_share)
        shown[form.cost] = "Time and memory: not measured for these settings yet." if known is None else estimate_line(known)
        shown[form.preview] = command + config.to_toml()
        try:
            found = splits.mixture_of(config, workspace)
            line, few = mixture_line(found, needed), found.pairs_train + found.pairs_held_out < needed
        except BiasDPOError as exc:
            line, few, found = f"⚠ {escape(str(exc))}. About {plural(needed, 'pair')} needed.", True, None
        return shown | {
            form.data_line: line,
            form.more_data: gr.update(visible=few),
            form.start: gr.update(interactive=found is not None),
        }

    def look(model: Any, data: Any) -> list[Any]:
        """The choices may have changed."""
        known = model_choices(studio, pasted(str(model or "")))
        return [gr.update(choices=known), gr.update(choices=source_choices(studio, data or ()))]

    def pick_model(model: Any) -> Updates:
        require_owner("Training")
        name = models.absolute_name(pasted(str(model or "")))
        presets = presets_of(name)
        preset = gr.update(choices=preset_cards(presets), value=presets[0].id if presets else None)
        chosen = gr.update(choices=model_choices(studio, name), value=name)
        return pick_preset(presets[0].id if presets else "") | {form.preset: preset, form.model: chosen}

    def pick_preset(preset_id: Any) -> Updates:
        values = next((preset.values for preset in configs.presets() if preset.id == preset_id), {})
        filled = form.fill(TrainConfig(**values))
        return {field: value for field, value in filled.items() if field is not form.fields[0]}  # the weights of the data

    def import_config(file: str) -> Updates:
        require_owner("Training")
        path = Path(file)
        config = configs.load_json(path) if path.suffix == ".json" else TrainConfig(**configs.read_toml(path))
        return form.show(studio, config)

    def add_data(source: str, data: Any) -> Any:
        require_owner("Training")
        chosen = [*(data or ()), source]
        return gr.update(choices=source_choices(studio, chosen), value=chosen)

    def take_data(request: dict[str, Any]) -> Any:
        """The data that another tab asks to train on."""
        return add_data(WORKSPACE, ()) if request.get("data") == WORKSPACE and is_owner() else gr.skip()

    def estimate(*given: Any) -> Iterator[Updates]:
        require_owner("Training")

        def waiting(seconds: float) -> Updates:
            line = f"Loading the model and measuring a few steps: {seconds:.0f} s so far …"
            return {form.cost: line, form.measure: gr.update(interactive=False), form.cancel: gr.update(visible=True)}

        try:
            line = estimate_line((yield from run_estimate(waiting, estimate_training, config_of(*given), workspace)))
        except BiasDPOError as exc:
            line = f"⚠ {escape(str(exc))}"
        yield ended(line)

    def ended(line: str = "Cancelled.") -> Updates:
        return {form.cost: line, form.measure: gr.update(interactive=True), form.cancel: gr.update(visible=False)}

    def start(name: Any, *given: Any) -> Updates:
        require_owner("Training")
        job = store.start_training(config_of(*given), workspace, str(name or "").strip(), command="Train tab")
        return panel.show(job.id) | {form.name: ""}

    everything = [form.name, form.model, form.data, *form.fields]
    outcome_ = [
        form.add_own,
        form.data_line,
        form.more_data,
        form.start,
        form.cost,
        form.preview,
        *(field for _, field in conditional),
    ]
    described = {"fn": handles(describe), "inputs": everything, "outputs": outcome_, **QUICK}
    tab.select(look, [form.model, form.data], [form.model, form.data], **QUICK).then(**described)
    gr.on([field.change for field in everything], trigger_mode="always_last", **described)
    # A folded field is not built yet and reports no change, so what was filled in is described by hand.
    form.model.input(handles(pick_model), form.model, form.filled, **QUICK).then(**described)
    form.preset.input(handles(pick_preset), form.preset, form.filled, **QUICK).then(**described)
    form.imported.upload(handles(import_config), form.imported, form.filled, **QUICK).then(**described)
    form.upload.upload(handles(add_data), [form.upload, form.data], form.data, **QUICK)
    form.add_own.click(handles(partial(add_data, WORKSPACE)), form.data, form.data, **QUICK)
    studio.on_request("train", take_data, [], [form.data])
    progress = [form.cost, form.measure, form.cancel]
    going = form.measure.click(handles(estimate), everything[1:], progress, **QUICK | {"concurrency_limit": 1})
    form.cancel.click(ended, None, progress, cancels=[going], **QUICK)
    form.start.click(handles(start), everything, [form.name, *panel.chosen_outputs()], **QUICK)


# The chosen run


def row_of(job: Job) -> list[Any]:
    """A run in the list."""
    data = splits.data_title(job.config) if job.config is not None else ""
    return [job.id, state_word(job), best_accuracy(job), data, local_time(job.started_at)]


def outcome_text(job: Job) -> str:
    """The outcome of a run, in Markdown."""
    if job.has_adapter:
        return f"**{outcome(held_out_metrics(job))}**"
    if job.status.best_step is None or not (accuracy := best_accuracy(job)):
        return ""
    of = plural(held_out_pairs(job), "held-out pair")
    return f"Best so far: step {job.status.best_step:,}, reward accuracy {accuracy} on {of}."


def build_outcome(studio: Studio, panel: JobPanel, form: Form) -> None:
    """The actions on a run and its adapter."""
    with panel.actions:
        compare = gr.Button("Try in Compare", variant="primary", elem_id="train-to-compare", **SMALL)
        measure = gr.Button("Measure", elem_id="train-to-measure", **SMALL)
        export = gr.Button("Export", elem_id="train-to-export", **SMALL)
        download = gr.Button("Download (.zip)", elem_id="train-zip", **SMALL)
        retry = gr.Button("Retry with changes", elem_id="train-retry", **SMALL)
    file = gr.DownloadButton("Download", visible="hidden", elem_id="train-zip-file")

    def show(job: Job | None) -> Updates:
        ready, here = job is not None and job.has_adapter, is_owner()
        shown = {compare: ready, measure: ready, export: ready, download: ready and here}
        shown[retry] = job is not None and job.config is not None and here
        updates: Updates = {button: gr.update(visible=visible) for button, visible in shown.items()}
        updates[retry]["variant"] = "primary" if job is not None and job.state == "failed" else "secondary"
        return updates

    def finished(selected: str) -> Job:
        job = store.find_job(selected, studio.workspace, "train")
        if not job.has_adapter:
            raise JobError(f"Run {selected!r} has no adapter: it is {job.state}")
        return job

    def open_tab(name: str, selected: str) -> Updates:
        job = finished(selected)
        asked = {"model": job.config.model, "adapter": job.id} if name == "compare" else {"run": job.id}
        return studio.open(name, **asked)

    def copy_settings(selected: str) -> Updates:
        require_owner("Training")
        job = store.find_job(selected, studio.workspace, "train")
        if job.config is None:
            raise JobError(f"The config of run {selected!r} can't be read: start a new run instead")
        gr.Info(f"The form has the settings of {job.id} now: change them, then press Start.")
        return form.show(studio, job.config, job.folder.snapshot) | {form.advanced: gr.update(open=True)}

    def pack(selected: str) -> str:
        require_owner("Downloading a run")
        return str(pack_run(finished(selected)))

    panel.watch("state", show, [compare, measure, export, download, retry])
    for button, name in ((compare, "compare"), (measure, "measure"), (export, "export")):
        button.click(handles(partial(open_tab, name)), panel.selected, studio.open_outputs(name), **QUICK)
    # Gradio's download button needs its file before the click.
    download.click(handles(pack), panel.selected, file, **QUICK).success(
        None, None, None, js="() => document.querySelector('#train-zip-file').click()", api_visibility="private"
    )
    retry.click(handles(copy_settings), panel.selected, [*form.filled, form.advanced], **QUICK).then(
        None, None, None, js="() => document.querySelector('#train-preset')?.scrollIntoView()", api_visibility="private"
    )


Probes = Sequence[Mapping[str, Any]]
Shown = tuple[str, int] | None  # a run's id and the step of its probe; None: the latest
Pieces = list[tuple[str, str | float | None]]


def find_probe(rows: Probes, run_id: str, at: Shown, by: int = 0) -> tuple[list[int], int | None, Shown]:
    """All steps with a probe, the one that is shown, or `by` places later, and where that is. The latest is None, so that it
    stays the latest when others follow."""
    steps = sorted({row["step"] for row in rows if isinstance(row.get("step"), int)})
    if not steps:
        return steps, None, None
    place = steps.index(at[1]) if at is not None and at[0] == run_id and at[1] in steps else len(steps) - 1
    place = min(max(place + by, 0), len(steps) - 1)
    return steps, steps[place], None if place == len(steps) - 1 else (run_id, steps[place])


def diff_sides(base: str, tuned: str) -> tuple[Pieces, Pieces]:
    """Both texts, with the words that only one of them has marked, where that isn't most of them."""
    if max(len(base), len(tuned)) > _DIFF_CHARACTERS or not is_alike(base, tuned):
        return [(base, None)], [(tuned, None)]
    left: Pieces = []
    right: Pieces = []
    for kind, text in word_diff(base, tuned):
        for side, own, label in ((left, "out", "base only"), (right, "in", "new")):
            if kind in ("same", own):  # white space between two marked words is marked, too
                side.append((text, label if kind == own or (text.isspace() and side and side[-1][1]) else None))
    return left, right


def build_probes(panel: JobPanel) -> None:
    """The policy's answers as it learns, beside the base model's."""
    state = gr.State(None)
    with gr.Row(elem_classes="actions", elem_id="train-probe-top"):
        title = gr.Markdown(elem_id="train-probe-step")
        earlier = gr.Button("← Earlier", size="sm", visible=False, elem_id="train-probe-earlier", min_width=90)
        later = gr.Button("Later →", size="sm", visible=False, elem_id="train-probe-later", min_width=90)
    boxes, prompts, sides = [], [], []
    look: dict[str, Any] = {"show_inline_category": False, "combine_adjacent": True, "min_width": 260}
    for i in range(3):  # as many as a run has at most
        with gr.Column(visible=False, elem_id=f"train-probe-{i + 1}") as box:
            prompts.append(gr.Markdown())
            with gr.Row():
                sides.append(gr.HighlightedText(label="Base", color_map={"base only": "#f59e0b"}, **look))
                sides.append(gr.HighlightedText(label="Tuned", color_map={"new": "#14b8a6"}, **look))
        boxes.append(box)

    def show(job: Job | None, at: Shown, by: int = 0) -> Updates:
        rows = [] if job is None else job.folder.read_probes()
        steps, step, at = find_probe(rows, job.id if job is not None else "", at, by)
        text = "#### What the model answers"
        if step is not None:
            text += f" after step {step:,}" if step else " before training"
        elif job is not None and job.config is not None:
            every = f"The first answers come before training, then every {plural(job.config.probe_every, 'step')}."
            text += f"\n{every if job.config.probe_every else 'This run has no probes: set “Probe every” under Advanced.'}"
        shown: Updates = {
            state: at,
            title: text,
            earlier: gr.update(visible=len(steps) > 1, interactive=step not in steps[:1]),
            later: gr.update(visible=len(steps) > 1, interactive=step not in steps[-1:]),
        }
        found = [row for row in rows if row.get("step") == step]
        for i, box in enumerate(boxes):
            shown[box] = gr.update(visible=i < len(found))
            if i < len(found):
                prompt, base, tuned = (str(found[i].get(name, "")) for name in ("prompt", "base", "tuned"))
                left, right = diff_sides(base, tuned)
                label = "The same as base" if base == tuned else f"After step {step:,}"
                shown |= {prompts[i]: f"**{escape(prompt)}**", sides[2 * i]: left}
                shown[sides[2 * i + 1]] = gr.update(value=right, label=label)
        return shown

    outputs = [state, title, earlier, later, *boxes, *prompts, *sides]
    panel.watch("probes.jsonl", show, outputs, [state])
    for button, by in ((earlier, -1), (later, 1)):
        turn = partial(lambda by, selected, at: show(panel.job(selected), at, by), by)
        button.click(handles(turn), [panel.selected, state], outputs, **QUICK)


def build_curves(panel: JobPanel) -> None:
    """The metrics by step, drawn again when a line is added."""
    with gr.Row():
        plots = {name: gr.Plot(show_label=False, visible=False, min_width=300, elem_id=f"train-{name}") for name in TRAINING}

    def show(job: Job | None) -> Updates:
        if job is None:
            return {plot: gr.update(visible=False) for plot in plots.values()}
        longer = job.record.origin().get("held_out_longer_baseline")
        draw = partial(training_chart, runs={job.id: job.folder.read_metrics()}, pairs=held_out_pairs(job), longer=longer)
        charts = {plot: draw(name) for name, plot in plots.items()}
        return {plot: gr.Plot(value=chart, visible=chart is not None) for plot, chart in charts.items()}

    panel.watch("metrics.jsonl", show, list(plots.values()))


def build_details(panel: JobPanel) -> None:
    """Results, data and settings of the run."""
    with gr.Accordion("Data and settings", open=False, elem_id="train-details"):
        table = gr.Dataframe(interactive=False, show_label=False, wrap=True, max_height=400, buttons=[])
    panel.watch("config.json", lambda job: {} if job is None else {table: run_table([job])}, [table])


# Several runs


def build_comparison(studio: Studio) -> gr.Accordion:
    """The curves of several runs in one chart each, and a table of their results and of the settings that differ."""
    box = gr.Accordion("Compare runs", open=False, visible=False, elem_id="train-compare")
    with box:
        picked = gr.Dropdown([], multiselect=True, max_choices=MAX_COMPARED, label="Runs to compare", elem_id="train-picked")
        with gr.Row():
            plots = {name: gr.Plot(show_label=False, visible=False, min_width=300) for name in TRAINING if name != "kl"}
        look: dict[str, Any] = {"interactive": False, "show_label": False, "wrap": True, "buttons": []}
        table = gr.Dataframe(max_height=400, visible=False, elem_id="train-compared", **look)

    def choices(chosen: list[str] | None) -> Any:
        ids = [job.id for job in store.list_jobs(studio.workspace, "train")]
        return gr.update(choices=ids, value=[name for name in chosen or () if name in ids] or ids[:2])

    def compare(chosen: list[str] | None) -> Updates:
        jobs = [store.find_job(name, studio.workspace, "train") for name in chosen or ()]
        metrics = {job.id: job.folder.read_metrics() for job in jobs}
        charts = {plot: training_chart(name, metrics) for name, plot in plots.items()}
        shown: Updates = {plot: gr.Plot(value=chart, visible=chart is not None) for plot, chart in charts.items()}
        return shown | {table: gr.Dataframe(value=run_table(jobs), visible=bool(jobs))}

    box.expand(choices, picked, picked, **QUICK)
    picked.change(handles(compare), picked, [table, *plots.values()], trigger_mode="always_last", **QUICK)
    return box
