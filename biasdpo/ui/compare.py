"""The Compare tab: what it is made of and what sets off what. What the handlers do is in `compare_actions`."""

from __future__ import annotations

import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import labeling, models, prompts
from biasdpo.chat import PromptTemplate
from biasdpo.compare import Waiting
from biasdpo.data import journal
from biasdpo.engines import EngineKey, EnginePool, Loading
from biasdpo.errors import BackendError, BiasDPOError, ConfigError, ModelError, PromptError
from biasdpo.labeling import Answer, BlindPair, Details
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.prompts import Prompt
from biasdpo.records import SEED_RANGE, STRENGTH_RANGE, GenerationPair, Sampling, check_strength
from biasdpo.ui import components
from biasdpo.ui.components import Settings, Store, Visitors, own_choices, pasted
from biasdpo.ui.label import LabelSessions
from biasdpo.workspace import is_public_space

# Startup


class Startup:
    """The model named by --model; `resolve` settles it, from a background thread."""

    def __init__(self, model: str = "auto", backend: str = "auto") -> None:
        self.asked = model
        self.backend = backend
        self.reason = ""  # why "auto" chose what it chose: one sentence for the page
        self.error: BiasDPOError | None = None
        self._model = "" if model == "auto" else models.absolute_name(model)
        self._resolved = threading.Event()
        if self._model:
            self._resolved.set()

    @property
    def model(self) -> str:
        """The model's id, or "" while it is not settled (or could not be: see `error`)."""
        return self._model

    @property
    def resolved(self) -> bool:
        return self._resolved.is_set()

    def resolve(self, pool: EnginePool) -> None:
        """Settle the model and start loading it with its default adapter."""
        if not self.resolved:
            try:
                spec, self.reason = models.choose_auto()
                self._model = spec.id
            except BiasDPOError as exc:
                self.error = exc
            except Exception as exc:
                self.error = ModelError(f"No model could be chosen ({type(exc).__name__}: {exc}): name one with --model")
                raise
            finally:
                self._resolved.set()
        if self._model:
            pool.load(EngineKey(self._model, default_adapter(self._model, pool), self.backend))

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until the model is settled; False if it still is not."""
        return self._resolved.wait(timeout_seconds)

    def model_of(self, picked: str) -> str:
        """The model that a visitor's choice means: "auto" is this app's; "" while that is not settled."""
        if picked != "auto":
            return picked
        if self.error is not None:
            raise self.error
        return self._model


def default_adapter(model: str, pool: EnginePool) -> str:
    """The adapter that a model opens with: the shipped one, else that of its newest run, else "none" (base-only)."""
    try:
        spec = models.catalog()[model] if model in models.catalog() else models.find(model)
        if spec.default_adapter:
            return spec.default_adapter
        trained = models.adapters_made_for(spec, pool.workspace)
    except BiasDPOError:
        return "none"  # the model's own line is shown when it is loaded
    return trained[0].id if trained else "none"


# Engine actions


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
                return {self.proof: components.choosing(), self.timer: gr.Timer(active=True)} | self._named(model, adapter)
            state = self.pool.load(key) if load else self.pool.state(key)
            if state is not None and state.error is not None:
                raise state.error
        except BiasDPOError as exc:
            failed = {
                self.proof: components.no_comparison(str(exc)),
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
        fitting_ones = [] if spec is None else models.adapters_for(spec, self.pool.workspace)
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
            line = components.loading(title, state) if state is not None else components.not_loaded(title)
            return {self.proof: line, self.timer: gr.Timer(active=waits), self.reload: gr.update(visible=False)}
        engine = state.engine
        has_adapter = engine.adapter is not None
        table = components.table(engine.adapter.folder) if engine.adapter is not None else ""
        reason = self.startup.reason if key.model == self.startup.model else ""
        updates: Updates = {
            self.proof: components.proof(engine, reason),
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
            updates[self.base_only] = components.base_only(
                engine.spec, len(models.adapters_for(engine.spec, self.pool.workspace))
            )
        return updates

    def key(self, model: str, adapter: str) -> EngineKey | None:
        """The engine that a visitor's choice means; None while "auto" is not settled. Refuses what isn't allowed here."""
        model, adapter = pasted(model) or "auto", pasted(adapter)
        if model not in (self.startup.asked, self.startup.model):  # the owner may start a Space with any model; visitors may not
            components.check_model(model)
        components.check_adapter(adapter, self.pool.workspace)
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


# Pair actions


History = list[tuple[str, GenerationPair]]
"""When (local time, for people), and what was written."""

_KEPT = 50  # pairs of one page's history


class PairActions:
    """Handlers of finished pairs. The history is a `gr.State` of the visitor's own page."""

    sessions: LabelSessions
    store: Store
    pair: gr.State
    history: gr.State
    history_box: gr.Accordion
    history_picker: gr.Dropdown
    judge_box: gr.Accordion
    judge_category: gr.Dropdown
    judge_notice: gr.HTML
    tabs: gr.Tabs
    diff_box: gr.Accordion
    diff: gr.HTML
    prompt: gr.Textbox
    seed: gr.Number
    base_head: gr.HTML
    base_text: gr.Textbox
    base_status: gr.HTML
    tuned_head: gr.HTML
    tuned_text: gr.Textbox
    tuned_status: gr.HTML
    notice: gr.HTML
    last_prompt: gr.State

    @property
    def pair_outputs(self) -> list[Any]:
        """All that hangs on which pair is finished."""
        return [
            self.history,
            self.history_box,
            self.history_picker,
            self.judge_box,
            self.judge_category,
            self.judge_notice,
            self.diff_box,
            self.diff,
        ]

    def remember(self, pair: GenerationPair | None, history: History) -> Updates:
        """A generation has ended: put the pair into the history, and offer what can be done with it."""
        if pair is None or not pair.left.text:
            return self._offers(None)
        if not history or history[-1][1] != pair:
            history = [*history, (datetime.now().strftime("%H:%M:%S"), pair)][-_KEPT:]
        return {
            self.history: history,
            self.history_box: gr.update(label=f"History of this page ({len(history)})", visible=True),
            self.history_picker: gr.update(choices=_choices(history), value=len(history) - 1),
        } | self._offers(pair)

    def _offers(self, pair: GenerationPair | None) -> Updates:
        both = pair is not None and pair.right is not None and bool(pair.right.text)
        drawn = ""
        if pair is not None and pair.right is not None:
            drawn = components.side_diff(pair.left.text, pair.right.text, ("base", "tuned"))
        return {
            self.judge_box: gr.update(visible=both),
            self.judge_category: None if pair is None else _category_of(pair.prompt),
            self.judge_notice: "",
            self.diff_box: gr.update(visible=both),
            self.diff: drawn,
        }

    def reopen(self, index: Any, history: History) -> Updates:
        """Show a pair of the history again, as it was written."""
        pair = _chosen(index, history)
        if pair is None:
            return {self.notice: components.note("No pair is chosen: generate one, or choose one of the history.")}
        shown: Updates = {
            self.pair: pair,
            self.prompt: pair.prompt,
            self.last_prompt: pair.prompt,
            self.seed: pair.sampling.seed,
            self.base_head: components.pane_head("Base", components.settings_used(pair.sampling), "base-text"),
            self.base_text: pair.left.text,
            self.base_status: components.status(pair.left),
            self.notice: components.note(f"From the history: {pair.model} with {pair.adapter or 'no adapter'}."),
        }
        if pair.right is None:
            shown |= {self.tuned_text: "", self.tuned_status: components.no_status()}
        else:
            detail = components.tuned_detail(pair.adapter, pair.strength)
            shown |= {
                self.tuned_head: components.pane_head("DPO-tuned", detail, "tuned-text"),
                self.tuned_text: pair.right.text,
                self.tuned_status: components.status(pair.right),
            }
        return shown | self._offers(pair)

    def judging(self, answer: Answer) -> Callable[..., Updates]:
        """The handler of one verdict's button."""

        def judge(who: Any, pair: GenerationPair | None, category: str | None) -> Updates:
            return self.judge_here(answer, who, pair, category)

        return judge

    def judge_here(self, answer: Answer, who: Any, pair: GenerationPair | None, category: str | None) -> Updates:
        """A verdict on the pair in the panes, sides known: stored with the source `compare`."""
        try:
            shown = sides_known(pair, category)
            annotator = components.annotator_of(who)
            if not annotator:
                raise ConfigError("Nobody has agreed yet: write a pseudonym on the Label tab and agree to what is stored")
            made = labeling.judgment(shown, answer, Details(category or "", "", "", annotator))
            same = [row for row in self.store.judged_by(annotator) if row["pair_id"] == made.pair_id and not row["repeat_of"]]
            if same:
                raise ConfigError("You have judged this pair already: withdraw that judgment on the Label tab to judge it anew")
            journal.append(self.store.workspace, made)
        except BiasDPOError as exc:
            return {self.judge_notice: components.error(str(exc))}
        side = made.meta.chosen_side
        said = {"base": "base is less biased", "tuned": "tuned is less biased"}.get(side) or components.VERDICTS[answer].lower()
        return {
            self.judge_notice: components.note(f"Stored: {said}. Sides were known, so it is marked as judged on the Compare tab.")
        }

    def send_to_label(self, pair: GenerationPair | None, category: str | None, request: gr.Request) -> Updates:
        """The pair at hand becomes the next on the Label tab, to be edited there, its sides in random order but known."""
        session = self.sessions.of(request.session_hash)
        try:
            known = sides_known(pair, category)
        except BiasDPOError as exc:
            return {self.judge_notice: components.error(str(exc))}
        with session.lock:
            session.show_before(known.swapped() if session.rng.random() < 0.5 else known)
        return {self.judge_notice: components.note("It is the next pair on the Label tab."), self.tabs: gr.Tabs(selected="label")}


def _category_of(text: str) -> str | None:
    """The category of a shipped example; anybody's own prompt has none yet."""
    return next((prompt.category for prompt in prompts.shipped() if prompt.text == text.strip()), None)


def _choices(history: History) -> list[tuple[str, int]]:
    lines = [
        (f"{at} · {' '.join(pair.prompt.split())[:80]} · {pair.adapter or 'base only'}", i)
        for i, (at, pair) in enumerate(history)
    ]
    return lines[::-1]


def _chosen(index: Any, history: History) -> GenerationPair | None:
    return history[index][1] if isinstance(index, int) and 0 <= index < len(history) else None


def sides_known(pair: GenerationPair | None, category: str | None) -> BlindPair:
    """The pair in the panes as something to judge, base left. ConfigError where there is none, or only half of one."""
    if pair is None or not pair.finished:
        raise ConfigError("No finished pair to judge: generate one first")
    if any(c is not None and c.finish_reason == "cancelled" for c in (pair.left, pair.right)):
        raise ConfigError("This pair was stopped before its end, and half a completion is none to train on: press Regenerate")
    return replace(labeling.known(pair, Prompt(pair.prompt, category or "")), sides_known=True)


# Compare actions


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
        settings, problems = components.decode(dict(request.query_params), Settings(), self.pool.workspace)
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
                yield {self.notice: components.note("Stopped before the model was chosen.")}
                return
            turn.start(self.pool, key, settings.prompt, settings.sampling, settings.system, settings.strength)
            event: Any = None
            for event in turn.watch(self.pool, key):
                yield self._rendered(event)
            if turn.superseded:
                return
            if not isinstance(event, GenerationPair):
                yield {self.notice: components.note("Stopped before the first token."), **self._empty_statuses()}
        except BiasDPOError as exc:
            yield {self.notice: components.error(str(exc)), **self._empty_statuses()}
        except Exception as exc:  # a fault of ours: one line for the visitor, the trace for the terminal
            traceback.print_exc(file=sys.stderr)
            fault = BackendError(f"The app failed ({type(exc).__name__}: {exc}): try again; the terminal shows where")
            yield {self.notice: components.error(str(fault)), **self._empty_statuses()}
        finally:
            self.visitors.end(session, turn)

    def write_again(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        """Regenerate: the last prompt once more (with a new seed where it is random)."""
        if not values[0]:
            yield {self.notice: components.note("Nothing to regenerate yet: press Generate first.")}
            return
        yield from self.write(request, *values)

    def _begun(self, settings: Settings) -> Updates:
        tuned = components.tuned_detail(settings.adapter, settings.strength)
        return {
            self.base_head: components.pane_head("Base", components.settings_used(settings.sampling), "base-text"),
            self.tuned_head: components.pane_head("DPO-tuned", tuned, "tuned-text"),
            self.base_text: "",
            self.tuned_text: "",
            **self._empty_statuses(),
            self.notice: components.busy("Starting …"),
            self.seed: settings.sampling.seed,
            self.last_prompt: settings.prompt,
            self.pair: None,
            self.timer: gr.Timer(active=True),
        }

    def _empty_statuses(self) -> Updates:
        return {self.base_status: components.no_status(), self.tuned_status: components.no_status()}

    def _rendered(self, event: Waiting | Loading | GenerationPair) -> Updates:
        if isinstance(event, Waiting):
            return {self.notice: components.waiting(event)}
        if isinstance(event, Loading):
            return {self.notice: components.loading_first(event)}
        updates: Updates = {
            self.base_text: event.left.text,
            self.base_status: components.status(event.left),
            self.notice: components.finished(event) if event.finished else components.busy("Writing …"),
        }
        if event.right is not None:
            updates |= {self.tuned_text: event.right.text, self.tuned_status: components.status(event.right)}
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
            self.base_head: components.pane_head("Base", "", "base-text"),
            self.tuned_head: components.pane_head("DPO-tuned", "", "tuned-text"),
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
            return {self.link: gr.update(value=components.encode(settings), visible=True), self.notice: gr.skip()}
        except BiasDPOError as exc:
            return {self.link: gr.update(visible=False), self.notice: components.error(str(exc))}


def _properties(update: Any) -> dict[str, Any]:
    return {k: v for k, v in update.items() if k in ("visible", "placeholder")} if isinstance(update, dict) else {}


# Compare tab


_VERDICTS: list[tuple[str, Answer]] = [
    ("Base is less biased", "left"),
    ("Tuned is less biased", "right"),
    ("Tie", "tie"),
    ("Both are biased", "both_biased"),
]


class CompareTab(CompareActions):
    """One tab over one pool of engines; `build` is called once, inside the page's Blocks."""

    def __init__(
        self, pool: EnginePool, startup: Startup, sessions: LabelSessions, store: Store, identity: gr.BrowserState
    ) -> None:
        self.pool = pool
        self.startup = startup
        self.sessions = sessions
        self.store = store
        self.identity = identity
        self.visitors = Visitors()

    def build(self, demo: gr.Blocks, tabs: gr.Tabs) -> None:
        """Lay out the tab, then wire it."""
        self._build_pickers()
        self._build_prompt()
        self._build_panes()
        self._build_finished()
        self._build_details()
        self.last_prompt = gr.State("")
        self.picked_model = gr.State("")
        self.pair = gr.State(None)
        self.history = gr.State([])
        self.tabs = tabs
        self.timer = gr.Timer(0.4, active=False)
        self._wire(demo)

    def _build_pickers(self) -> None:
        here = "catalog id" if is_public_space() else "catalog id, Hub id or path"
        with gr.Row(elem_id="pickers"):
            self.model = gr.Dropdown(
                self.model_choices(),
                value=self.startup.model or "auto",
                label=f"Model ({here})",
                allow_custom_value=True,
                elem_id="model",
                min_width=220,
            )
            self.adapter = gr.Dropdown(
                [("the model's own", "")],
                value="",
                label="Adapter" if is_public_space() else "Adapter (run or path)",
                allow_custom_value=True,
                elem_id="adapter",
                min_width=220,
            )
            self.strength = gr.Slider(
                *STRENGTH_RANGE,
                value=1.0,
                step=0.05,
                label="Adapter strength (1 is as trained)",
                elem_id="strength",
                buttons=[],
                min_width=220,
            )
        self.strength_note = gr.HTML("", js_on_load=None, elem_id="strength-note")
        self.proof = gr.HTML(components.choosing(), js_on_load=None, elem_id="proof")
        self.reload = gr.Button("Try to load it again", size="sm", visible=False, elem_id="reload")

    def _build_prompt(self) -> None:
        with gr.Row(elem_id="compare-top"):
            with gr.Column(scale=3, min_width=320):
                self.prompt = gr.Textbox(
                    label="Prompt (Ctrl+Enter generates, Esc stops)",
                    placeholder="Ask something that may bring a bias to light, or pick an example",
                    lines=4,
                    max_lines=8,
                    elem_id="prompt",
                )
                with gr.Row(elem_id="actions"):
                    self.generate = gr.Button("Generate", variant="primary", elem_id="generate", min_width=60)
                    self.stop = gr.Button("Stop", elem_id="stop", min_width=60)
                    self.regenerate = gr.Button("Regenerate", elem_id="regenerate", min_width=60)
                    self.clear = gr.Button("Clear", elem_id="clear", min_width=60)
                    self.copy_link = gr.Button("Copy link", elem_id="copy-link", min_width=60)
            with gr.Column(scale=2, min_width=300, elem_id="examples-box"), gr.Tabs(elem_id="examples"):
                self.examples = [self._build_examples(*item) for item in prompts.by_category().items()]
        self.link = gr.Textbox(label="Link to this prompt and these settings", visible=False, elem_id="link", interactive=False)

    @staticmethod
    def _build_examples(category: str, prompts: list[str]) -> gr.Dataset:
        with gr.Tab(category.capitalize()):
            return gr.Dataset(
                components=["textbox"],
                samples=[[prompt] for prompt in prompts],
                show_label=False,
                layout="gallery",
                samples_per_page=len(prompts),
                elem_id=f"examples-{category}",
            )

    def _build_panes(self) -> None:
        self.notice = gr.HTML("", js_on_load=None, elem_id="notice")
        with gr.Row(elem_id="panes", equal_height=True):
            with gr.Column(elem_classes="bd-pane bd-base", min_width=300):
                self.base_head = gr.HTML(components.pane_head("Base", "", "base-text"), js_on_load=None)
                self.base_text = self._pane_text("Base completion", "base-text")
                self.base_status = gr.HTML(components.no_status(), js_on_load=None, elem_id="base-status")
            with gr.Column(elem_classes="bd-pane bd-tuned", min_width=300) as self.tuned_pane:
                self.tuned_head = gr.HTML(components.pane_head("DPO-tuned", "", "tuned-text"), js_on_load=None)
                self.tuned_text = self._pane_text("DPO-tuned completion", "tuned-text")
                self.tuned_status = gr.HTML(components.no_status(), js_on_load=None, elem_id="tuned-status")
            with gr.Column(min_width=300, visible=False) as self.base_only_pane:
                self.base_only = gr.HTML("", js_on_load=None, elem_id="base-only")

    @staticmethod
    def _pane_text(label: str, elem_id: str) -> gr.Textbox:
        return gr.Textbox(
            label=label,
            show_label=False,
            container=False,
            interactive=False,
            lines=9,
            max_lines=24,
            elem_id=elem_id,
            placeholder="The completion appears here.",
            html_attributes=gr.InputHTMLAttributes(),
        )

    def _build_finished(self) -> None:
        """What can be done with a finished pair; hidden until there is one."""
        with gr.Accordion("Judge this pair", open=False, visible=False, elem_id="judge") as self.judge_box:
            with gr.Row(elem_id="judge-row"):
                self.judge_answers = [
                    (gr.Button(title, size="sm", min_width=60, elem_id=f"judge-{name.replace('_', '-')}"), name)
                    for title, name in _VERDICTS
                ]
                self.send = gr.Button("Send it to the Label tab", size="sm", min_width=60, elem_id="send-to-label")
            self.judge_category = gr.Dropdown(
                list(prompts.CATEGORIES), value=None, label="Category", elem_id="judge-category", min_width=120
            )
            self.judge_notice = gr.HTML("", js_on_load=None, elem_id="judge-notice")
        with gr.Accordion("Word by word: base against tuned", open=False, visible=False, elem_id="diff") as self.diff_box:
            self.diff = gr.HTML("", js_on_load=None)
        with gr.Accordion("History of this page", open=False, visible=False, elem_id="history") as self.history_box, gr.Row():
            self.history_picker = gr.Dropdown([], label="Earlier pairs", elem_id="history-picker", scale=4)
            self.reopen_button = gr.Button("Show it again", elem_id="reopen", scale=1, min_width=120)

    def _build_details(self) -> None:
        defaults = Sampling()
        with gr.Accordion("Sampling and system prompt", open=False, elem_id="sampling"):
            with gr.Row():
                self.temperature = gr.Slider(
                    0, 2, value=defaults.temperature, step=0.05, label="Temperature", info="0 is greedy", elem_id="temperature"
                )
                self.top_p = gr.Slider(
                    0.01, 1, value=defaults.top_p, step=0.01, label="Top-p", info="probability mass kept; 1 keeps all"
                )
                self.top_k = gr.Slider(0, 1000, value=defaults.top_k, step=1, label="Top-k", info="tokens kept; 0 keeps all")
            with gr.Row():
                self.repetition_penalty = gr.Slider(
                    0.5, 2, value=defaults.repetition_penalty, step=0.05, label="Repetition penalty", info="1 is off"
                )
                self.max_new_tokens = gr.Number(
                    defaults.max_new_tokens, precision=0, label="Max new tokens", info="1 to 4096", elem_id="max-new-tokens"
                )
                self.seed = gr.Number(defaults.seed, precision=0, label="Seed", info="0 is a seed like any other", elem_id="seed")
                self.random_seed = gr.Checkbox(False, label="Random seed", info="draw a new one each time", elem_id="random-seed")
            self.system = gr.Textbox(label="System prompt", lines=2, max_lines=6, elem_id="system")
        with gr.Accordion("What the model really sees", open=False, elem_id="seen") as self.seen_box:
            self.seen = gr.Textbox(
                label="The prompt in the model's template, special tokens included",
                lines=3,
                max_lines=16,
                interactive=False,
                elem_id="seen-text",
            )
        with gr.Accordion(
            "What this adapter changed (measured)", open=False, visible=False, elem_id="measured"
        ) as self.measured_box:
            self.measured = gr.HTML("", js_on_load=None)

    @property
    def setting_inputs(self) -> list[gr.components.Component]:
        """All that a visitor sets, in the order that `CompareActions.settings` reads it."""
        return [
            self.prompt,
            self.model,
            self.adapter,
            self.system,
            self.strength,
            self.max_new_tokens,
            self.temperature,
            self.top_p,
            self.top_k,
            self.repetition_penalty,
            self.seed,
            self.random_seed,
        ]

    @property
    def engine_inputs(self) -> list[Any]:
        """What the Label tab takes over: model, adapter, system prompt and strength."""
        return [self.model, self.adapter, self.system, self.strength]

    def _wire(self, demo: gr.Blocks) -> None:
        # Quick answers go past the queue, so that they come while generations wait in it. Validation is ours
        # (preprocess=False), so that a value out of its range gets our line, not the component's.
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        shown = [*self.setting_inputs, *(c for c in self.engine_outputs if c not in self.setting_inputs)]
        # Through the queue, since gr.Warning (a bad link) travels with its messages.
        demo.load(self.open_page, None, shown, **quick | {"queue": True}, concurrency_limit=None)
        demo.unload(self.close_page)
        picked = [self.model, self.adapter]
        self.timer.tick(self.watch_engine, picked, self.engine_outputs, **quick)
        self.model.input(self.pick_model, [*picked, self.picked_model], self.engine_outputs, **quick)
        self.adapter.input(self.pick_adapter, picked, self.engine_outputs, **quick)
        self.reload.click(self.pick_adapter, picked, self.engine_outputs, **quick)
        self.strength.change(
            components.strength_note, self.strength, self.strength_note, trigger_mode="always_last", **quick, preprocess=False
        )
        for dataset in self.examples:
            dataset.click(_first, dataset, self.prompt, **quick)

        writing = [
            self.base_head,
            self.base_text,
            self.base_status,
            self.tuned_head,
            self.tuned_text,
            self.tuned_status,
            self.notice,
            self.seed,
            self.last_prompt,
            self.timer,
            self.pair,
        ]
        streamed: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "preprocess": False}
        written = self.generate.click(self.write, self.setting_inputs, writing, api_name="compare", **streamed)
        again = [self.last_prompt, *self.setting_inputs[1:]]
        rewritten = self.regenerate.click(self.write_again, again, writing, api_visibility="private", **streamed)
        for event in (written, rewritten):
            event.then(self.remember, [self.pair, self.history], self.pair_outputs, **quick)
        self.reopen_button.click(
            self.reopen, [self.history_picker, self.history], [self.prompt, *writing, *self.pair_outputs], **quick
        )
        for button, name in self.judge_answers:
            known = [self.identity, self.pair, self.judge_category]
            button.click(self.judging(name), known, self.judge_notice, **quick)
        self.send.click(self.send_to_label, [self.pair, self.judge_category], [self.judge_notice, self.tabs], **quick)
        self.stop.click(self.stop_writing, None, None, api_name="stop", queue=False, show_progress="hidden")
        self.clear.click(self.clear_page, None, [self.prompt, *writing, self.link], **quick)

        template_inputs = [self.prompt, self.model, self.adapter, self.system]
        gr.on(
            [self.seen_box.expand, self.prompt.change, self.system.change, self.model.change],
            self.show_seen,
            template_inputs,
            self.seen,
            trigger_mode="always_last",
            preprocess=False,
            **quick,
        )
        self.copy_link.click(self.make_link, self.setting_inputs, [self.link, self.notice], preprocess=False, **quick).success(
            None, self.link, self.link, js="(query) => window.bdCopyLink(query)"
        )


def _first(sample: list[str]) -> str:
    return sample[0]
