"""The New run panel: what it is made of and what sets off what. What its buttons do is in `train_start`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from biasdpo import run_config
from biasdpo.ui import train_plan_render, train_settings, train_sources
from biasdpo.ui.train_reading import SEED_SET
from biasdpo.ui.train_settings import DECIDING, GROUPS, SETTINGS
from biasdpo.ui.train_sources import MOST_SOURCES
from biasdpo.ui.train_start import FIRST_MODEL, StartActions, first_preset, presets_of
from biasdpo.workspace import is_public_space

_READY_AGAIN = "() => [{__type__: 'update', interactive: true}, {__type__: 'update', visible: false}]"
_FILES = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"]


class NewRunPanel(StartActions):
    """One column of the Train tab."""

    def build_new(self) -> None:
        """Lay the panel out, with the first preset of the first model filled in."""
        preset = first_preset(FIRST_MODEL)
        values = train_settings.from_config(run_config.from_mapping(preset.values if preset else {}))
        with gr.Row(elem_id="train-what"):
            here = "catalog id" if is_public_space() else "catalog id, Hub id, HF folder or .gguf"
            self.model = gr.Dropdown(
                self.model_choices(),
                value=FIRST_MODEL,
                label=f"Model ({here})",
                allow_custom_value=True,
                elem_id="train-model",
                min_width=260,
            )
            self.preset = gr.Radio(
                [(shipped.title, shipped.id) for shipped in presets_of(FIRST_MODEL)],
                value=preset.id if preset else None,
                label="Preset",
                elem_id="train-preset",
                min_width=300,
            )
        self.preset_text = gr.HTML(train_plan_render.preset(preset), js_on_load=None, elem_id="train-preset-text")
        self._build_data()
        explained = run_config.explained()
        self.fields: list[Any] = []
        self.groups: list[gr.Accordion] = []
        for group, settings in GROUPS.items():
            slug = group.split()[0].lower()
            with (
                gr.Accordion(group, open=group == "Essentials", elem_id=f"train-group-{slug}") as box,
                gr.Row(elem_classes="bd-fields"),
            ):
                self.groups.append(box)
                self.fields += [train_settings.build_field(setting, explained[setting.name]) for setting in settings]
        effects = train_settings.effects(train_settings.field_values(values)).values()
        for field, value, effect in zip(self.fields, values, effects, strict=True):
            field.value, field.visible = value, effect
        self.estimate_view = gr.HTML("", js_on_load=None, elem_id="train-estimate-view")
        with gr.Row(elem_id="train-start-row"):
            self.run_id = gr.Textbox("", label="Name of the run", max_lines=1, elem_id="train-run-id", min_width=180, scale=2)
            self.estimate_button = gr.Button("Estimate time and memory", elem_id="train-estimate", min_width=170, scale=1)
            self.cancel_button = gr.Button("Cancel", elem_id="train-cancel", visible=False, min_width=80, scale=0)
            self.start_button = gr.Button("Start", variant="primary", elem_id="train-start", min_width=150, scale=1)
        self.proposed = gr.State("")
        self.trouble = gr.HTML("", js_on_load=None, elem_id="train-trouble")
        self.new_notice = gr.HTML("", js_on_load=None, elem_id="train-new-notice")

    def _build_data(self) -> None:
        self.shown_sources = gr.State(1)
        self.source_rows: list[tuple[gr.Row, gr.Dropdown, gr.Number, gr.Button]] = []
        with gr.Column(elem_id="train-data"):
            for i in range(MOST_SOURCES):
                with gr.Row(visible=i == 0, elem_id=f"train-source-row-{i + 1}", elem_classes="bd-source") as row:
                    source = gr.Dropdown(
                        train_sources.choices(self.store),
                        value=str(SEED_SET) if i == 0 else "",
                        label="Data (choose, or type hub:OWNER/NAME or a file's path)" if i == 0 else f"Data {i + 1}",
                        allow_custom_value=True,
                        elem_id=f"train-source-{i + 1}",
                        min_width=220,
                        scale=5,
                    )
                    weight = gr.Number(
                        1, label="Weight", elem_id=f"train-weight-{i + 1}", min_width=90, scale=1, step=0.5, minimum=None
                    )
                    remove = gr.Button("Remove", size="sm", elem_id=f"train-remove-{i + 1}", min_width=80, scale=0, visible=i > 0)
                self.source_rows.append((row, source, weight, remove))
            with gr.Row(elem_id="train-data-buttons"):
                self.add_button = gr.Button("+ Another source", size="sm", elem_id="train-add-source", min_width=130, scale=0)
                self.upload = gr.UploadButton(
                    "+ A file of mine", file_types=_FILES, size="sm", elem_id="train-upload", min_width=130, scale=0
                )
            self.mixture_view = gr.HTML("", js_on_load=None, elem_id="train-mixture")

    @property
    def source_fields(self) -> list[Any]:
        """Source, weight, source, weight, …"""
        return [field for _, source, weight, _ in self.source_rows for field in (source, weight)]

    @property
    def mixture_inputs(self) -> list[Any]:
        """What the data's counts hang on."""
        by_name = dict(zip((s.name for s in SETTINGS), self.fields, strict=True))
        return [self.shown_sources, by_name["held_out_share"], by_name["seed"], *self.source_fields]

    @property
    def source_outputs(self) -> list[Any]:
        """All that a change of the rows may touch."""
        return [self.shown_sources, *(row for row, *_ in self.source_rows), *self.source_fields, self.add_button]

    @property
    def plan_outputs(self) -> list[Any]:
        """All of the panel that a preset, another run or a start fills."""
        return [
            self.model,
            self.preset,
            self.preset_text,
            *self.fields,
            *self.source_outputs,
            self.run_id,
            self.proposed,
            self.new_notice,
            self.mixture_view,
            self.estimate_view,
        ]

    def wire_new(self, run_outputs: list[Any]) -> None:
        """`run_outputs`: what a started run fills beside this panel."""
        raw: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        quick = raw | {"queue": False}
        named = [self.run_id, self.proposed]
        # Progress is shown nowhere near a field: Gradio would wipe what a validator has said there.
        filling = quick | {"show_progress_on": self.new_notice}
        self.model.input(self.pick_model, [self.model, *named], self.plan_outputs, **filling)
        self.preset.input(self.pick_preset, [self.preset, self.model], self.plan_outputs, **filling)
        by_name = dict(zip((s.name for s in SETTINGS), self.fields, strict=True))
        gr.on(
            [by_name[name].change for name in DECIDING],
            self.show_effects,
            [by_name[name] for name in DECIDING],
            [field for setting, field in zip(SETTINGS, self.fields, strict=True) if setting.depends],
            trigger_mode="always_last",
            **filling,
        )
        gr.on(
            [field.change for field in (self.model, *self.source_fields, *self.fields)],
            None,
            None,
            self.estimate_view,
            js="() => ''",  # what was measured is of another run; in the browser, so that it costs no request
            api_visibility="private",
        )
        for setting, field in zip(SETTINGS, self.fields, strict=True):
            if setting.kind not in ("choice", "choices"):  # a list offers nothing wrong
                field.blur(_checked, field, None, validator=self.checking(setting), concurrency_limit=None, **raw)

        rows = [self.shown_sources, *self.source_fields]
        self.add_button.click(self.add_source, rows, self.source_outputs, **quick)
        self.upload.upload(self.add_file, [self.upload, *rows], [*self.source_outputs, self.new_notice], **quick)
        for i, (_row, _source, _weight, remove) in enumerate(self.source_rows):
            remove.click(self.removing(i), rows, self.source_outputs, **quick)
        # Files may be long and the Hub far away: through the queue.
        gr.on(
            [field.change for field in (*self.source_fields, by_name["held_out_share"], by_name["seed"])],
            self.show_mixture,
            self.mixture_inputs,
            self.mixture_view,
            trigger_mode="always_last",
            concurrency_limit=4,
            **raw,
        )
        everything = [self.model, self.run_id, self.shown_sources, *self.source_fields, *self.fields]
        checked = {"validator": self.check_everything, **raw}
        # A validator speaks at the field, which may lie in a folded group: say it here, too, and unfold that group.
        # First, since Gradio leaves out what comes after a validator's no.
        both = [self.start_button.click, self.estimate_button.click]
        gr.on(both, self.point_out, everything, [self.trouble, *self.groups], **quick)
        outcome = [self.new_notice, self.estimate_view, self.estimate_button, self.cancel_button]
        # Not with the last word of the estimate: a moment longer Gradio takes it to be under way, and would drop a click.
        self.estimate_button.click(self.estimate, everything, outcome, concurrency_limit=1, **checked).then(
            None, None, [self.estimate_button, self.cancel_button], js=_READY_AGAIN, api_visibility="private"
        )
        self.cancel_button.click(self.cancel_estimate, None, None, **quick)
        self.start_button.click(self.start, everything, [*outcome, *run_outputs], concurrency_limit=4, **checked)
        self.run_id.submit(None, None, None, js="() => document.getElementById('train-start').click()", api_visibility="private")


def _checked(_value: Any) -> None:
    """Nothing: the validator before it has said what there is to say."""
