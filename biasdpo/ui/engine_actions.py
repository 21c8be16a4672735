"""What the page shows of its engine: the pickers, the proof line, and what hangs on which adapter is loaded."""

from __future__ import annotations

from typing import Any

import gradio as gr

from biasdpo import models
from biasdpo.engines import EngineKey, EnginePool, Loading
from biasdpo.errors import BiasDPOError
from biasdpo.ui import link, measured, render
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
        """The tab was chosen: runs may have finished meanwhile, or were deleted."""
        try:
            key = self.key(model, adapter)
            return gr.skip() if key is None else self._picked(key)[self.adapter]
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
        choices = [("none (base only)", "none")]
        system: Any = gr.skip()
        spec = models.catalog().get(key.model)
        names = {key.model, spec.hub_id if spec is not None else key.model}
        trained = [a for a in models.adapters(self.pool.workspace) if a.model in names]
        choices = [(_adapter_label(a), a.id) for a in trained] + choices
        if spec is not None:
            system = gr.update(visible=spec.template.has_system, placeholder=spec.template.default_system)
        if key.adapter not in [value for _, value in choices]:
            choices.insert(0, (key.adapter, key.adapter))
        return {
            self.model: gr.update(choices=self.model_choices(), value=key.model),
            self.picked_model: key.model,
            self.adapter: gr.update(choices=choices, value=key.adapter),
            self.system: system,
        }

    def _shown(self, key: EngineKey, state: Loading | None) -> Updates:
        """The proof line and what hangs on it."""
        title = models.catalog()[key.model].title if key.model in models.catalog() else key.model
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
            updates[self.base_only] = render.base_only(engine.spec, len(models.adapters_for(engine.spec, self.pool.workspace)))
        return updates

    def key(self, model: str, adapter: str) -> EngineKey | None:
        """The engine that a visitor's choice means; None while "auto" is not settled. Refuses what isn't allowed here."""
        model = (model or "auto").strip()
        if model != self.startup.asked:  # the owner may start a Space with any model; visitors may not
            link.check_model(model)
        link.check_adapter(adapter or "", self.pool.workspace)
        name = self.startup.model_of(model)
        if not name:
            return None
        if not adapter:
            adapter = default_adapter(name, self.pool)
        return EngineKey(name, adapter.strip(), self.startup.backend)

    def model_choices(self) -> list[tuple[str, str]]:
        """The catalog with what is here, and the model that the app was started with."""
        choices = [("Automatic", "auto")] if self.startup.asked == "auto" and not self.startup.model else []
        for spec in map(models.with_files, models.catalog().values()):
            choices.append((spec.title if spec.present else f"{spec.title} · not on this machine", spec.id))
        named = self.startup.model
        if named and named not in models.catalog():
            choices.insert(0, (named, named))
        return choices


def _adapter_label(adapter: models.AdapterSpec) -> str:
    return adapter.id if not adapter.run_id or adapter.run_id == adapter.id else f"{adapter.id} · run {adapter.run_id}"
