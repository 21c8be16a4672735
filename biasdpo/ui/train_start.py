"""What the New run panel does: presets, data, settings, an estimate, the start. Every function here refuses on a public Space
before it reads anything that was named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import gradio as gr

from biasdpo import models, run_config, runs
from biasdpo.engines import EnginePool
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.run_config import Preset, RunConfig
from biasdpo.ui import render, train_plan_render, train_render, train_settings, train_sources
from biasdpo.ui.own_models import own_choices, pasted
from biasdpo.ui.train_data import DataActions, Updates, told
from biasdpo.ui.train_settings import DECIDING, GROUPS, SETTINGS, Setting
from biasdpo.ui.train_sources import MOST_SOURCES
from biasdpo.workspace import is_public_space, refuse_on_public_space

FIRST_MODEL = "smollm2"
_TELL_SECONDS = 0.5


def presets_of(model: str) -> list[Preset]:
    """The presets made for a model; for one from elsewhere, those of the catalog model of its architecture."""
    own = [preset for preset in run_config.presets() if preset.model == model]
    if own or model in models.catalog():
        return own
    try:
        architecture = models.find(model).architecture
    except BiasDPOError:
        return []
    like = [spec.id for spec in models.catalog().values() if spec.architecture == architecture]
    return [preset for preset in run_config.presets() if preset.model in like]


def first_preset(model: str) -> Preset | None:
    """The quickest."""
    return next(iter(presets_of(model)), None)


class StartActions(DataActions):
    """The handlers. `source_rows`, `fields` and the like are the panel's, in `train_new`."""

    pool: EnginePool
    model: gr.Dropdown
    preset: gr.Radio
    preset_text: gr.HTML
    fields: list[Any]
    groups: list[gr.Accordion]
    run_id: gr.Textbox
    proposed: gr.State
    trouble: gr.HTML
    estimate_view: gr.HTML
    estimate_button: gr.Button
    cancel_button: gr.Button
    estimates: dict[str, threading.Event]

    def after_start(self, run_id: str, notice: str) -> Updates:
        """What the page shows of a run that was started; the tab's."""
        raise NotImplementedError

    # Model and preset

    def model_choices(self, picked: str = "") -> list[tuple[str, str]]:
        """The catalog with what is here, then models of one's own: the picked one and those that are loaded."""
        specs = map(models.with_files, models.catalog().values())
        choices = [(s.title if s.present else f"{s.title} · not on this machine", s.id) for s in specs]
        return choices + own_choices([picked, *(spec.id for spec in self.pool.opened())])

    def pick_model(self, model: Any, run_id: Any, proposed: str) -> Updates:
        """Another model: its presets, the quickest filled in."""
        try:
            refuse_on_public_space("Training")
            if not isinstance(model, str) or not model.strip():
                raise ConfigError("No model is named: choose one, or type a Hub id, an HF folder or a .gguf file")
            model = models.absolute_name(pasted(model))
            if model not in models.catalog():
                models.find(model)
        except BiasDPOError as exc:
            return {self.new_notice: render.error(str(exc))}
        chosen = first_preset(model)
        shown = self._filled(chosen) | {
            self.model: gr.update(choices=self.model_choices(model), value=model),
            self.preset: gr.update(choices=_choices(model), value=_id(chosen)),
            self.new_notice: "",
        }
        if not run_id or run_id == proposed:  # a name of the visitor's own stays
            shown |= self._proposal(model)
        return shown

    def pick_preset(self, preset_id: Any, model: Any) -> Updates:
        """Another preset: its values, over the defaults."""
        if is_public_space():  # a model of any path would be looked at
            return {self.new_notice: train_render.refused()}
        return self._filled(next((p for p in presets_of(str(model)) if p.id == preset_id), None))

    def _filled(self, preset: Preset | None) -> Updates:
        config = run_config.from_mapping({**preset.values, "model": ""} if preset else {})
        return {self.preset_text: train_plan_render.preset(preset), self.estimate_view: ""} | self._fields_of(config)

    def _fields_of(self, config: RunConfig) -> Updates:
        values = train_settings.from_config(config)
        effects = train_settings.effects(train_settings.field_values(values)).values()
        return {f: gr.update(value=v, visible=e) for f, v, e in zip(self.fields, values, effects, strict=True)}

    def _proposal(self, model: str) -> Updates:
        free = runs.new_run_id(model, self.store.workspace)
        return {self.run_id: free, self.proposed: free}

    def open_new(self, model: Any, run_id: Any, proposed: str, *sources: Any) -> Updates:
        """The panel was opened: what can be chosen now, and a name that is free now."""
        named = [name for name in sources[::2] if isinstance(name, str)]
        shown: Updates = {
            source: gr.update(choices=train_sources.choices(self.store, named)) for _, source, _, _ in self.source_rows
        }
        shown |= {self.model: gr.update(choices=self.model_choices(model if isinstance(model, str) else "")), self.new_notice: ""}
        if isinstance(model, str) and (not run_id or run_id == proposed):
            shown |= self._proposal(model)
        return shown

    def fill_from(self, config: RunConfig, snapshot: str) -> Updates:
        """The panel with a run's config, to start another like it. A file that is gone is replaced by the run's own snapshot.
        What can't be taken over is said."""
        rows = train_sources.rows_of(config.datasets, config.dataset_weights)
        told: list[str] = []
        missing = [name for name, _ in rows if not train_sources.is_there(name)]
        if missing:
            told.append(f"{train_sources.titles(missing)}: not there any more, so the run's own copy of its data is chosen.")
            if config.dataset_weights:
                weights = ", ".join(f"{train_sources.titles([name])} {weight:g}" for name, weight in rows)
                told.append(f"That copy is one source, with a weight of 1: the run's own weights are lost ({weights}).")
            rows = [(snapshot, 1.0)]
        elif len(rows) > MOST_SOURCES:
            left_out = train_sources.titles([name for name, _ in rows[MOST_SOURCES:]])
            told.append(f"The run has {len(rows)} sources and there is room for {MOST_SOURCES} here: {left_out} left out.")
            rows = rows[:MOST_SOURCES]
        return (
            self._fields_of(config)
            | self.rows_shown(rows, [name for name, _ in rows])
            | self._proposal(config.model)
            | {
                self.model: gr.update(choices=self.model_choices(config.model), value=config.model),
                self.preset: gr.update(choices=_choices(config.model), value=None),
                self.preset_text: render.note("The settings of the run that is tried again: change what you want to."),
                self.new_notice: render.note(" ".join(told)),
                self.estimate_view: "",
            }
        )

    # Settings

    def show_effects(self, *deciding: Any) -> list[Any]:
        """Only settings that have an effect are shown."""
        effects = train_settings.effects(dict(zip(DECIDING, deciding, strict=True)))
        return [gr.update(visible=effects[setting.name]) for setting in SETTINGS if setting.depends]

    def checking(self, setting: Setting) -> Callable[[Any], Any]:
        """The validator of one field, for when it is left."""

        def check(value: Any) -> Any:
            line = train_settings.problem(setting, value)
            return gr.validate(not line, line)

        return check

    def check_everything(self, *given: Any) -> list[Any]:
        """The validator of Start and Estimate: a word on each input."""
        before = len(given) - len(SETTINGS)
        lines = [""] * before + train_settings.problems(given[before:])
        return [gr.validate(not line, line) for line in lines]

    def point_out(self, *given: Any) -> list[Any]:
        """What is wrong, in one place, with its group unfolded; nothing where all is well."""
        lines = dict(zip(SETTINGS, train_settings.problems(given[-len(SETTINGS) :]), strict=True))
        opened = [gr.update(open=True) if any(lines[s] for s in group) else gr.skip() for group in GROUPS.values()]
        return [train_plan_render.field_errors(line for line in lines.values() if line), *opened]

    def _config(self, given: Sequence[Any]) -> tuple[RunConfig, str]:
        """The run that is asked for, and its name."""
        model, run_id, shown, *rest = given
        if not isinstance(model, str) or not model.strip():
            raise ConfigError("No model to train: choose one under Model")
        sources, fields = rest[: 2 * MOST_SOURCES], rest[2 * MOST_SOURCES :]
        rows = train_sources.read_rows(sources[: 2 * shown])
        values = train_settings.to_values(fields) | train_sources.config_values(rows)
        config = run_config.from_mapping(values | {"model": models.absolute_name(pasted(model))})
        return config, run_id.strip() if isinstance(run_id, str) else ""

    # Estimate and start

    def estimate(self, request: gr.Request, *given: Any) -> Iterator[Updates]:
        """Measure real steps in a process of their own; Cancel, or closing the page, ends it."""
        cancelled, ended = threading.Event(), threading.Event()  # by the visitor; because nobody waits for it any more
        self.estimates[request.session_hash or ""] = cancelled
        buttons = {self.estimate_button: gr.update(interactive=False), self.cancel_button: gr.update(visible=True)}
        yield {self.new_notice: train_plan_render.measuring(0), self.estimate_view: ""} | buttons
        shown: Updates
        try:
            refuse_on_public_space("Training")
            config, _name = self._config(given)
            freed = self.pool.free_gpu()
            began = time.monotonic()
            with ThreadPoolExecutor(1) as executor:
                task = executor.submit(
                    runs.estimate, config, self.store.workspace, cancelled=lambda: cancelled.is_set() or ended.is_set()
                )
                try:
                    while wait([task], _TELL_SECONDS).not_done:
                        yield {self.new_notice: train_plan_render.measuring(time.monotonic() - began)}
                finally:
                    ended.set()  # before the executor waits for its task
            view = train_plan_render.estimate(task.result())
            shown = {self.estimate_view: view, self.new_notice: _freed(freed)}
        except Exception as exc:
            line = render.note("Cancelled.") if cancelled.is_set() else render.error(told(exc, "Not estimated"))
            shown = {self.new_notice: line}
        finally:
            self.estimates.pop(request.session_hash or "", None)
        yield shown  # the buttons are set back when all is over: see `wire_new`

    def cancel_estimate(self, request: gr.Request) -> None:
        """Cancel, or the page was closed."""
        event = self.estimates.get(request.session_hash or "")
        if event is not None:
            event.set()

    def start(self, *given: Any) -> Iterator[Updates]:
        """Start the run, and show it."""
        yield {self.new_notice: render.busy("Reading the data and starting …")}
        try:
            refuse_on_public_space("Training")
            config, run_id = self._config(given)
            freed = self.pool.free_gpu()
            runs.start(config, run_id, self.store.workspace, command="the page's Train tab")
        except Exception as exc:
            yield {self.new_notice: render.error(told(exc, "Not started"))}
            return
        yield {self.new_notice: "", self.estimate_view: ""} | self.after_start(run_id, _freed(freed))


def _choices(model: str) -> list[tuple[str, str]]:
    return [(preset.title, preset.id) for preset in presets_of(model)]


def _id(preset: Preset | None) -> str | None:
    return preset.id if preset else None


def _freed(titles: Sequence[str]) -> str:
    return render.note(f"Freed on the GPU for this run: {', '.join(titles)}. Generate loads it again.") if titles else ""
