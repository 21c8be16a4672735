"""What the page shows of its engine: the pickers, the proof line, and what hangs on which adapter is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import fitting, models
from biasdpo.engines import EngineKey, EnginePool, Loading
from biasdpo.errors import BiasDPOError
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.ui import link, measured, render
from biasdpo.ui.own_models import own_choices, pasted
from biasdpo.ui.startup import Startup, default_adapter

Updates = dict[Any, Any]


class EngineActions:
    """Handlers of everything that names or shows an engine. What is shared by visitors lies in the pool and the startup."""

    pool: EnginePool
    startup: Startup
    model: gr.Dropdown
    picked_model: gr.State
    adapter: gr.Dropdown
    proof: gr.HTML
    reload: gr.Button
    timer: gr.Timer
    tuned_pane: gr.Column
    base_only_pane: gr.Column
    base_only: gr.HTML
    measured_box: gr.Accordion
    measured: gr.HTML
    system: gr.Textbox

    @property
    def engine_outputs(self) -> list[Any]:
        """All that shows the state of an engine."""
        return [
            self.model,
            self.picked_model,
            self.adapter,
            self.proof,
            self.reload,
            self.timer,
            self.tuned_pane,
            self.base_only_pane,
            self.base_only,
            self.measured_box,
            self.measured,
            self.system,
        ]

    def watch_engine(self, model: str, adapter: str) -> Updates:
        """A tick of the clock while a model is being loaded."""
        return self.engine_view(model, adapter, load=False)

    def pick_model(self, model: str, adapter: str, picked_model: str) -> Updates:
        """Another model: its own adapter, and load it. A dropdown also reports that it was left without a change."""
        return self.engine_view(model, adapter if model == picked_model else "", load=True)

    def pick_adapter(self, model: str, adapter: str) -> Updates:
        """Another adapter, or another try."""
        return self.engine_view(model, adapter, load=True)

    def refresh_adapters(self, model: str, adapter: str) -> Any:
        """The tab was chosen: runs may have finished meanwhile, or were deleted.

        Gradio also says so of the tab that a page opens with: then nothing is picked yet, and an answer that comes late would
        overwrite what the page's link names. So what is picked stays as it is, and only the list is renewed.
        """
        try:
            key = self.key(model, adapter) if adapter else None
            return gr.skip() if key is None else gr.update(choices=self._adapter_choices(key))
        except BiasDPOError:
            return gr.skip()

    def engine_view(self, model: str, adapter: str, *, load: bool) -> Updates:
        """Everything on the page that depends on the engine of this model and adapter."""
        pick = load or model == "auto" or not adapter  # the pickers are the visitor's: a tick only fills what was left open
        key = None
        try:
            key = self.key(model, adapter)
            if key is None:
                return {self.proof: render.choosing(), self.timer: gr.Timer(active=True)} | self._named(model, adapter)
            state = self.pool.load(key) if load else self.pool.state(key)
            if state is not None and state.error is not None:
                raise state.error
        except BiasDPOError as exc:
            failed = {
                self.proof: render.no_comparison(str(exc)),
                self.timer: gr.Timer(active=False),
                self.reload: gr.update(visible=True),
            }
            return failed | (self._picked(key) if pick and key is not None else self._named(model, adapter) if pick else {})
        return (self._picked(key) if pick else {}) | self._shown(key, state)

    def _named(self, model: str, adapter: str) -> Updates:
        """The pickers as a visitor (or a link) named them, where no more is known."""
        names = [("the model's own", "")] + ([(adapter, adapter)] if adapter else [])
        return {
            self.model: gr.update(value=model),
            self.picked_model: model,
            self.adapter: gr.update(choices=names, value=adapter),
        }

    def _picked(self, key: EngineKey) -> Updates:
        """The two pickers, once the names are known."""
        spec = self.spec_of(key.model)
        system: Any = gr.skip()
        if spec is not None:
            system = gr.update(visible=spec.template.has_system, placeholder=spec.template.default_system)
        return {
            self.model: gr.update(choices=self.model_choices(key.model), value=key.model),
            self.picked_model: key.model,
            self.adapter: gr.update(choices=self._adapter_choices(key), value=key.adapter),
            self.system: system,
        }

    def _adapter_choices(self, key: EngineKey) -> list[tuple[str, str]]:
        """The adapters that fit this model, the picked one among them."""
        spec = self.spec_of(key.model)
        fitting_ones = [] if spec is None else fitting.adapters_for(spec, self.pool.workspace)
        choices = [(_adapter_label(a, spec), a.id) for a in fitting_ones] + [("none (base only)", "none")]
        if key.adapter not in [value for _, value in choices]:
            choices.insert(0, (key.adapter, key.adapter))
        return choices

    @staticmethod
    def spec_of(model: str) -> ModelSpec | None:
        """What is known of a model before it is loaded; None of one that is not there or damaged, which has its own line."""
        try:
            return models.with_files(models.catalog()[model]) if model in models.catalog() else models.find(model)
        except BiasDPOError:
            return None

    def _shown(self, key: EngineKey, state: Loading | None) -> Updates:
        """The proof line and what hangs on it."""
        title = models.catalog()[key.model].title if key.model in models.catalog() else Path(key.model).name
        if state is None or state.engine is None:
            waits = state is not None
            line = render.loading(title, state) if state is not None else render.not_loaded(title)
            return {self.proof: line, self.timer: gr.Timer(active=waits), self.reload: gr.update(visible=False)}
        engine = state.engine
        has_adapter = engine.adapter is not None
        table = measured.table(engine.adapter.folder) if engine.adapter is not None else ""
        reason = self.startup.reason if key.model == self.startup.model else ""
        updates: Updates = {
            self.proof: render.proof(engine, reason),
            self.timer: gr.Timer(active=False),
            self.reload: gr.update(visible=False),
            self.tuned_pane: gr.update(visible=has_adapter),
            self.base_only_pane: gr.update(visible=not has_adapter),
            self.measured_box: gr.update(visible=bool(table)),
            self.measured: table,
            self.system: gr.update(
                visible=engine.backend.template.has_system, placeholder=engine.backend.template.default_system
            ),
        }
        if not has_adapter:
            updates[self.base_only] = render.base_only(engine.spec, len(fitting.adapters_for(engine.spec, self.pool.workspace)))
        return updates

    def key(self, model: str, adapter: str) -> EngineKey | None:
        """The engine that a visitor's choice means; None while "auto" is not settled. Refuses what isn't allowed here."""
        model, adapter = pasted(model) or "auto", pasted(adapter)
        if model not in (self.startup.asked, self.startup.model):  # the owner may start a Space with any model; visitors may not
            link.check_model(model)
        link.check_adapter(adapter, self.pool.workspace)
        name = models.absolute_name(self.startup.model_of(model))
        if not name:
            return None
        return EngineKey(name, adapter or default_adapter(name, self.pool), self.startup.backend)

    def model_choices(self, picked: str = "") -> list[tuple[str, str]]:
        """Models of one's own (the picked one, the app's, those that are loaded), then the catalog with what is here."""
        choices = [("Automatic", "auto")] if self.startup.asked == "auto" and not self.startup.model else []
        choices += own_choices([picked, self.startup.model, *(spec.id for spec in self.pool.opened())])
        for spec in map(models.with_files, models.catalog().values()):
            choices.append((spec.title if spec.present else f"{spec.title} · not on this machine", spec.id))
        return choices


def _adapter_label(adapter: AdapterSpec, spec: ModelSpec | None) -> str:
    parts = [adapter.id]
    if adapter.run_id and adapter.run_id != adapter.id:
        parts.append(f"run {adapter.run_id}")
    if spec is not None and adapter.model not in {spec.id, spec.hub_id} - {""}:
        known = models.catalog().get(adapter.model)
        of = known.title if known is not None else Path(adapter.model).name
        parts.append(f"fits, made for {of}" if of else "fits")
    return " · ".join(parts)
