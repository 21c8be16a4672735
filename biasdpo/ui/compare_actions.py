"""What the Compare tab's buttons do: validate, call one function, render."""

from __future__ import annotations

import secrets
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from biasdpo.compare import Waiting
from biasdpo.engines import EngineKey, Loading
from biasdpo.errors import BackendError, BiasDPOError, ConfigError, PromptError
from biasdpo.records import SEED_RANGE, GenerationPair, Sampling, check_strength
from biasdpo.template import PromptTemplate
from biasdpo.ui import link, render
from biasdpo.ui.engine_actions import EngineActions, Updates
from biasdpo.ui.link import Settings
from biasdpo.ui.pair_actions import PairActions
from biasdpo.ui.visitors import Visitors


class CompareActions(EngineActions, PairActions):
    """The handlers. Every one answers for one visitor; their running generations lie in `visitors`."""

    # Beside what the two parents have.
    visitors: Visitors
    strength: gr.Slider
    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    repetition_penalty: gr.Slider
    max_new_tokens: gr.Number
    random_seed: gr.Checkbox
    link: gr.Textbox
    seen: gr.Textbox

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
        tuned = render.tuned_detail(settings.adapter, settings.strength)
        return {
            self.base_head: render.pane_head("Base", render.settings_used(settings.sampling), "base-text"),
            self.tuned_head: render.pane_head("DPO-tuned", tuned, "tuned-text"),
            self.base_text: "",
            self.tuned_text: "",
            **self._empty_statuses(),
            self.notice: render.busy("Starting …"),
            self.seed: settings.sampling.seed,
            self.last_prompt: settings.prompt,
            self.pair: None,
            self.timer: gr.Timer(active=True),
        }

    def _empty_statuses(self) -> Updates:
        return {self.base_status: render.no_status(), self.tuned_status: render.no_status()}

    def _rendered(self, event: Waiting | Loading | GenerationPair) -> Updates:
        if isinstance(event, Waiting):
            return {self.notice: render.waiting(event)}
        if isinstance(event, Loading):
            return {self.notice: render.loading_first(event)}
        updates: Updates = {
            self.base_text: event.left.text,
            self.base_status: render.status(event.left),
            self.notice: render.finished(event) if event.finished else render.busy("Writing …"),
        }
        if event.right is not None:
            updates |= {self.tuned_text: event.right.text, self.tuned_status: render.status(event.right)}
        if event.finished:
            updates[self.pair] = event
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
            self.pair: None,
            self.link: gr.update(visible=False),
        }

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
        spec = self.spec_of(key.model)
        return spec.template if spec is not None else None

    def make_link(self, *values: Any) -> Updates:
        """The query string of what is set now; the browser puts its own address before it and copies it."""
        try:
            settings = self.settings(values)
            return {self.link: gr.update(value=link.encode(settings), visible=True), self.notice: gr.skip()}
        except BiasDPOError as exc:
            return {self.link: gr.update(visible=False), self.notice: render.error(str(exc))}


def _properties(update: Any) -> dict[str, Any]:
    return {k: v for k, v in update.items() if k in ("visible", "placeholder")} if isinstance(update, dict) else {}
