"""What the Compare tab's buttons do: validate, call one function, render."""

from __future__ import annotations

import secrets
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from biasdpo import models
from biasdpo.compare import Waiting
from biasdpo.engines import EngineKey, EnginePool, Loading
from biasdpo.errors import BackendError, BiasDPOError, ConfigError, PromptError
from biasdpo.records import SEED_RANGE, GenerationPair, Sampling, check_strength
from biasdpo.template import PromptTemplate
from biasdpo.ui import link, measured, render
from biasdpo.ui.link import Settings
from biasdpo.ui.startup import Startup, default_adapter
from biasdpo.ui.visitors import Visitors

Updates = dict[Any, Any]


class CompareHandlers:
    """The handlers. Every one answers for one visitor; what is shared lies in the pool, the startup and `visitors`."""

    pool: EnginePool
    startup: Startup
    visitors: Visitors
    model: gr.Dropdown
    adapter: gr.Dropdown
    proof: gr.HTML
    reload: gr.Button
    timer: gr.Timer
    tuned_pane: gr.Column
    base_only_pane: gr.Column
    base_only: gr.HTML
    measured_box: gr.Accordion
    measured: gr.HTML
    prompt: gr.Textbox
    system: gr.Textbox
    strength: gr.Slider
    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    repetition_penalty: gr.Slider
    max_new_tokens: gr.Number
    seed: gr.Number
    random_seed: gr.Checkbox
    base_head: gr.HTML
    base_text: gr.Textbox
    base_status: gr.HTML
    tuned_head: gr.HTML
    tuned_text: gr.Textbox
    tuned_status: gr.HTML
    notice: gr.HTML
    last_prompt: gr.State
    picked_model: gr.State
    link: gr.Textbox
    seen: gr.Textbox

    def model_choices(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    # The page and its engine

    def open_page(self, request: gr.Request) -> Updates:
        """A page was opened: show what its link asks for, and load the model if nobody has."""
        settings, problems = link.decode(dict(request.query_params), Settings(), self.pool.workspace)
        for problem in problems:
            gr.Warning(problem)
        sampling = settings.sampling
        updates: Updates = {
            self.prompt: settings.prompt,
            self.system: settings.system,
            self.strength: settings.strength,
            self.max_new_tokens: sampling.max_new_tokens,
            self.temperature: sampling.temperature,
            self.top_p: sampling.top_p,
            self.top_k: sampling.top_k,
            self.repetition_penalty: sampling.repetition_penalty,
            self.seed: sampling.seed,
            self.random_seed: settings.random_seed,
        }
        view = self.engine_view(settings.model, settings.adapter, load=True)
        view[self.system] = gr.update(value=settings.system, **_properties(view.get(self.system)))
        return updates | view

    def close_page(self, request: gr.Request) -> None:
        """The tab was closed or reloaded: free the engine."""
        self.visitors.dismiss(request.session_hash or "")

    def watch_engine(self, model: str, adapter: str) -> Updates:
        """A tick of the clock while a model is being loaded."""
        return self.engine_view(model, adapter, load=False)

    def pick_model(self, model: str, adapter: str, picked_model: str) -> Updates:
        """Another model: its own adapter, and load it. A dropdown also reports that it was left without a change."""
        return self.engine_view(model, adapter if model == picked_model else "", load=True)

    def pick_adapter(self, model: str, adapter: str) -> Updates:
        """Another adapter, or another try."""
        return self.engine_view(model, adapter, load=True)

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
            failed = {self.proof: render.error(str(exc)), self.timer: gr.Timer(active=False), self.reload: gr.update(visible=True)}
            return failed | (self._picked(key) if pick and key is not None else self._named(model, adapter) if pick else {})
        return (self._picked(key) if pick else {}) | self._shown(key, state)

    def _named(self, model: str, adapter: str) -> Updates:
        """The pickers as a visitor (or a link) named them, where no more is known."""
        names = [("the model's own", "")] + ([(adapter, adapter)] if adapter else [])
        return {self.model: gr.update(value=model), self.picked_model: model, self.adapter: gr.update(choices=names, value=adapter)}

    def _picked(self, key: EngineKey) -> Updates:
        """The two pickers, once the names are known."""
        choices = [("none (base only)", "none")]
        system: Any = gr.skip()
        spec = models.catalog().get(key.model)
        if spec is not None:
            choices = [(_adapter_label(a), a.id) for a in models.adapters_for(spec, self.pool.workspace)] + choices
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

    # Writing

    def settings(self, values: tuple[Any, ...]) -> Settings:
        """What a visitor sent, checked: the page's components are no guard, since anyone can post to the function."""
        prompt, model, adapter, system, strength, tokens, temperature, top_p, top_k, penalty, seed, random_seed = values
        for name, value in (("prompt", prompt), ("model", model), ("adapter", adapter), ("system", system)):
            if not isinstance(value, str | None):
                raise ConfigError(f"{name} must be text: got {type(value).__name__}; send a string")
        return Settings(
            prompt=prompt or "",
            model=model or "auto",
            adapter=adapter or "",
            system=system or "",
            strength=check_strength(strength),
            sampling=Sampling(tokens, temperature, top_p, top_k, penalty, seed),
            random_seed=bool(random_seed),
        )

    def write(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        """Generate: stream both sides into the panes."""
        session = request.session_hash or secrets.token_hex(8)
        turn = self.visitors.begin(session)
        try:
            settings = self.settings(values)
            if not settings.prompt.strip():
                raise PromptError("The prompt is empty: type one, or pick an example")
            if settings.random_seed:
                drawn = secrets.randbelow(SEED_RANGE[1] + 1)
                settings = replace(settings, sampling=replace(settings.sampling, seed=drawn))
            yield self._begun(settings)
            key = self.key(settings.model, settings.adapter)
            while key is None and not turn.cancellation.is_set():
                self.startup.wait(0.25)
                key = self.key(settings.model, settings.adapter)
            if key is None:
                yield {self.notice: render.note("Stopped before the model was chosen.")}
                return
            turn.start(self.pool, key, settings.prompt, settings.sampling, settings.system, settings.strength)
            event: Any = None
            for event in turn.watch(self.pool, key):
                yield self._rendered(event)
            if turn.superseded:
                return
            if not isinstance(event, GenerationPair):
                yield {self.notice: render.note("Stopped before the first token."), **self._empty_statuses()}
        except BiasDPOError as exc:
            yield {self.notice: render.error(str(exc)), **self._empty_statuses()}
        except Exception as exc:  # a fault of ours: one line for the visitor, the trace for the terminal
            traceback.print_exc(file=sys.stderr)
            fault = BackendError(f"The app failed ({type(exc).__name__}: {exc}): try again; the terminal shows where")
            yield {self.notice: render.error(str(fault)), **self._empty_statuses()}
        finally:
            self.visitors.end(session, turn)

    def write_again(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        """Regenerate: the last prompt once more (with a new seed where it is random)."""
        if not values[0]:
            yield {self.notice: render.note("Nothing to regenerate yet: press Generate first.")}
            return
        yield from self.write(request, *values)

    def _begun(self, settings: Settings) -> Updates:
        tuned = f"{settings.adapter or 'default adapter'} · {render.strength_words(settings.strength)}"
        return {
            self.base_head: render.pane_head("Base", render.settings_used(settings.sampling), "base-text"),
            self.tuned_head: render.pane_head("DPO-tuned", tuned, "tuned-text"),
            self.base_text: "",
            self.tuned_text: "",
            **self._empty_statuses(),
            self.notice: render.busy("Starting …"),
            self.seed: settings.sampling.seed,
            self.last_prompt: settings.prompt,
            self.timer: gr.Timer(active=True),
        }

    def _empty_statuses(self) -> Updates:
        return {self.base_status: render.no_status(), self.tuned_status: render.no_status()}

    def _rendered(self, event: Waiting | Loading | GenerationPair) -> Updates:
        if isinstance(event, Waiting):
            return {self.notice: render.waiting(event)}
        if isinstance(event, Loading):
            return {self.notice: render.busy(f"The model is being loaded ({round(100 * event.share)} %): writing starts after that.")}
        updates: Updates = {
            self.base_text: event.left.text,
            self.base_status: render.status(event.left),
            self.notice: render.finished(event) if event.finished else render.busy("Writing …"),
        }
        if event.right is not None:
            updates |= {self.tuned_text: event.right.text, self.tuned_status: render.status(event.right)}
        return updates

    def stop_writing(self, request: gr.Request) -> None:
        """Stop, at any stage: waiting, loading, reading the prompt, writing."""
        self.visitors.stop(request.session_hash or "")

    def clear_page(self, request: gr.Request) -> Updates:
        """Stop, and empty prompt and panes."""
        self.visitors.dismiss(request.session_hash or "")
        return {
            self.prompt: "",
            self.base_text: "",
            self.tuned_text: "",
            self.base_head: render.pane_head("Base", "", "base-text"),
            self.tuned_head: render.pane_head("DPO-tuned", "", "tuned-text"),
            **self._empty_statuses(),
            self.notice: "",
            self.last_prompt: "",
            self.link: gr.update(visible=False),
        }

    # The rendered template, the link

    def show_seen(self, prompt: str, model: str, adapter: str, system: str) -> str:
        """What the model really sees."""
        try:
            key = self.key(model, adapter)
            template = None if key is None else self._template(key)
        except BiasDPOError as exc:
            return str(exc)
        if template is None:
            return "(shown when the model is loaded)"
        return template.render_text(prompt or "", system or "")

    def _template(self, key: EngineKey) -> PromptTemplate | None:
        state = self.pool.state(key)
        if state is not None and state.engine is not None:
            return state.engine.backend.template
        return models.catalog()[key.model].template if key.model in models.catalog() else None

    def make_link(self, *values: Any) -> Updates:
        """The query string of what is set now; the browser puts its own address before it and copies it."""
        try:
            settings = self.settings(values)
            return {self.link: gr.update(value=link.encode(settings), visible=True), self.notice: gr.skip()}
        except BiasDPOError as exc:
            return {self.link: gr.update(visible=False), self.notice: render.error(str(exc))}


def _adapter_label(adapter: models.AdapterSpec) -> str:
    return adapter.id if not adapter.run_id or adapter.run_id == adapter.id else f"{adapter.id} · run {adapter.run_id}"


def _properties(update: Any) -> dict[str, Any]:
    return {k: v for k, v in update.items() if k in ("visible", "placeholder")} if isinstance(update, dict) else {}
