"""The Compare tab: one prompt, two completions, how they differ, and a verdict."""

from __future__ import annotations

import html
import re
import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import gradio as gr
from gradio.context import Context

from biasdpo import labeling, links, models, prompts
from biasdpo.compare import Generation, Generations, TokenScore, Waiting, load_example_pairs, score_tokens
from biasdpo.data import journal
from biasdpo.engines import Engine, EngineKey, Loading
from biasdpo.errors import BiasDPOError, ConfigError, PromptError, plural
from biasdpo.jobs.outcome import outcome, recorded_metrics
from biasdpo.labeling import Answer, Details
from biasdpo.links import PairSettings
from biasdpo.models import AdapterSpec, ModelSpec
from biasdpo.records import SEED_RANGE, STRENGTH_RANGE, Completion, GenerationPair, PairTurn, Side
from biasdpo.ui import components
from biasdpo.ui.charts import TUNED, WARN
from biasdpo.ui.components import QUICK, Studio, Updates, annotator_of, escape, handles, model_title, pasted, short
from biasdpo.workspace import ASSETS

TEXT, WORDS, TOKENS = "Side by side", "Word differences", "Token scores"
TITLES: dict[Side, str] = {"base": "Base", "tuned": "Tuned"}
LABELS: dict[Side, str] = {"base": "Base (unchanged model)", "tuned": "Tuned (the model with the adapter)"}
COLORS: dict[Side, str] = {"base": "#94a3b8", "tuned": "#2dd4bf"}  # paler than the charts': whole phrases are marked
VERDICTS: dict[Answer, str] = {
    "left": "Base is less biased",
    "right": "Tuned is less biased",
    "tie": "Tie",
    "both_biased": "Both biased",
    "both_unusable": "Both unusable",
}
RESAMPLED_AT = 0.7  # temperature of Regenerate where the setting is greedy
ONLY_HERE, LIKELIER, LESS_LIKELY = "only in this answer", "likelier after tuning", "less likely after tuning"
_NATS = 1.0  # a token is colored if tuning changes its log-probability by more
_HISTORY = 50  # pairs of one page
_LOADING_SECONDS = 2.0
_TOKEN_NOTE = """How likely each token is under both models, given the text before it and without sampling settings. Colored where
tuning changes the probability by a factor of more than e (1 nat). Select a token for its numbers."""


@dataclass(frozen=True)
class Entry:
    """A pair of the page's history, and the engine that wrote it."""

    pair: GenerationPair
    key: EngineKey
    at: str  # local time; "Example" for a shipped pair

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for the same completions, made the same way."""
        pair = self.pair
        texts = pair.left.text, pair.right and pair.right.text
        return (pair.prompt, pair.history, self.key, pair.system, pair.strength, pair.sampling, texts)

    @property
    def title(self) -> str:
        """One line for the history."""
        pair = self.pair
        how = f"seed {pair.sampling.seed}" if pair.sampling.temperature else "greedy"
        return f"{self.at} · {short(pair.prompt, 80)} · {pair.adapter or 'base only'} · {how}"


@dataclass
class Pane:
    """One side's column: earlier turns, then the completion in the chosen view."""

    column: gr.Column
    turns: gr.Chatbot
    views: dict[str, Any]  # a component for each view
    status: gr.Markdown


def build_compare(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    CompareTab(studio).wire(tab)


class CompareTab:
    """The tab's components and their handlers."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.generations = Generations()
        backend = studio.startup.backend
        shipped = [Entry(pair, EngineKey(pair.model, pair.adapter, backend), "Example") for pair in load_example_pairs()]
        self._build_prompt(shipped[0].pair)
        self._build_engine()
        with gr.Row(elem_id="pair-head"):
            self.caption = gr.Markdown(_caption(shipped[0]), elem_id="caption")
            views = [TEXT, WORDS, TOKENS]
            self.view = gr.Radio(
                views, value=_first_view(shipped[0].pair), label="View", show_label=False, container=False, elem_id="view"
            )
        with gr.Row(elem_id="panes"):
            self.panes: dict[Side, Pane] = {side: _build_pane(side, shipped[0].pair) for side in TITLES}
        with gr.Column(visible=False, elem_id="base-only") as self.base_only:
            self.base_only_text = gr.Markdown()
            studio.next_step("train", "Train an adapter")
        self.token_note = gr.Markdown(visible=False, elem_id="token-note")
        self._build_verdicts()
        self._build_settings()
        with gr.Accordion(f"Session history ({len(shipped)})", open=False, elem_id="history-box") as self.history_box:
            self.picker = gr.Dropdown(_history_choices(shipped), value=0, label="Pair to show", elem_id="history")
        studio.next_step("label", "Next: label blind pairs")
        self.entry = gr.State(shipped[0])
        self.history = gr.State(shipped)
        self.resampled = gr.State(None)  # settings, and the sampling that Regenerate used instead
        self.picked_model = gr.State("")
        self.picked_view = gr.State("")  # "": the one that suits the pair
        self.scores = gr.State({})  # the token scores that are shown, by side
        self.timer = gr.Timer(_LOADING_SECONDS, active=False)
        self.sampling = [self.tokens, self.temperature, self.top_p, self.top_k, self.penalty, self.seed]
        self.inputs: list[Any] = [self.prompt, self.model, self.adapter, self.system, self.strength, *self.sampling]

    # Layout

    def _build_prompt(self, first: GenerationPair) -> None:
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                hint = "Ask something that may reveal a bias, or click an example"
                self.prompt = gr.Textbox(first.prompt, label="Prompt", placeholder=hint, lines=2, max_lines=8, elem_id="prompt")
                with gr.Row(elem_classes="actions"):
                    self.generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    self.stop = gr.Button("Stop", interactive=False, elem_id="stop")
                    self.regenerate = gr.Button("Regenerate", elem_id="regenerate")
                    self.share = gr.Button("Share link", elem_id="share")
                self.link = gr.Textbox(label="Link to these settings", visible=False, buttons=["copy"], elem_id="link")
            with gr.Column(scale=2, min_width=300), gr.Tabs(elem_id="examples"):
                self.examples = [_build_examples(*item) for item in prompts.by_category().items()]

    def _build_engine(self) -> None:
        picker: dict[str, Any] = {"allow_custom_value": True, "min_width": 220}
        with gr.Row(elem_id="engine"):
            chosen = self.studio.startup.model if self.studio.startup.model in models.catalog() else "auto"
            known = components.catalog_choices(chosen)
            self.model = gr.Dropdown(
                known, value=chosen, label="Model (ID or path)", info="On its own: Base", elem_id="model", **picker
            )
            own = [("the model's own", "")]
            picker |= {"label": "Adapter (run or path)", "info": "What training added to the model. With it: Tuned"}
            self.adapter = gr.Dropdown(own, value="", elem_id="adapter", **picker)
            slider: dict[str, Any] = {"info": "0: without it (Base), 1: as trained", "min_width": 220}
            label = "Adapter strength"
            self.strength = gr.Slider(*STRENGTH_RANGE, 1.0, step=0.05, label=label, elem_id="strength", buttons=[], **slider)
        with gr.Accordion("Choosing a model …", open=False, elem_id="proof") as self.proof:
            self.proof_text = gr.Markdown(elem_id="proof-text")
            self.reload = gr.Button("Try again", size="sm", visible=False, elem_id="reload")

    def _build_verdicts(self) -> None:
        with gr.Row(elem_id="judge", elem_classes="actions") as self.verdicts:
            self.answers = {
                answer: gr.Button(title, size="sm", elem_id=f"verdict-{answer.replace('_', '-')}")
                for answer, title in VERDICTS.items()
            }
            self.send = gr.Button("Send to Label", size="sm", elem_id="send-to-label")
        with gr.Column(visible=False, elem_id="consent") as self.consent:
            gr.Markdown(f"**Before your first verdict.** {components.CONSENT_TEXT}")
            with gr.Row(elem_classes="beside"):
                self.nickname = gr.Textbox(label="Nickname", max_length=80, scale=2, elem_id="nickname")
                self.agree = gr.Button("Agree and store my verdict", variant="primary", scale=1, elem_id="agree-here")
        with gr.Row(elem_classes="actions"):
            self.verdict_note = gr.Markdown(elem_id="verdict-note")
            self.undo = gr.Button("Undo", size="sm", visible=False, elem_id="undo-verdict")
        self.pending = gr.State("")  # the answer that waits for consent
        self.stored = gr.State(None)  # what to undo: judgment id, pair id, annotator
        with gr.Row(elem_classes="beside"):
            hint = "Ask a follow-up: each model sees only its own answers"
            self.follow_up = gr.Textbox(label="Follow-up", placeholder=hint, scale=5, min_width=240, elem_id="follow-up")
            self.ask = gr.Button("Send", scale=1, min_width=100, elem_id="ask-both")

    def _build_settings(self) -> None:
        default = links.GREEDY
        with gr.Accordion("Generation settings and formatted prompt", open=False, elem_id="settings") as self.settings_box:
            with gr.Row():
                info = f"0 is greedy: always the likeliest token. Regenerate then samples at {RESAMPLED_AT}."
                warm = default.temperature
                self.temperature = gr.Slider(0, 2, warm, step=0.05, label="Temperature", info=info, elem_id="temperature")
                info = "Probability mass to sample from; 1 keeps all"
                self.top_p = gr.Slider(0.01, 1, default.top_p, step=0.01, label="Top-p", info=info, elem_id="top-p")
                info = "Tokens to sample from; 0 keeps all"
                self.top_k = gr.Slider(0, 1000, default.top_k, step=1, label="Top-k", info=info, elem_id="top-k")
            with gr.Row():
                info = "1 is off. Other values change both models' words and hide differences."
                penalty = default.repetition_penalty
                self.penalty = gr.Slider(0.5, 2, penalty, step=0.05, label="Repetition penalty", info=info, elem_id="penalty")
                tokens = default.max_new_tokens
                self.tokens = gr.Number(tokens, precision=0, label="Most new tokens", info="1 to 4096", elem_id="max-new-tokens")
                info = "No effect at temperature 0. Regenerate draws a new one."
                self.seed = gr.Number(default.seed, precision=0, label="Seed", info=info, elem_id="seed")
            self.system = gr.Textbox(label="System prompt", lines=2, max_lines=6, elem_id="system")
            self.seen = gr.Textbox(label="What the model reads", lines=3, max_lines=16, interactive=False, elem_id="seen")

    # Wiring

    def wire(self, tab: gr.Tab) -> None:
        """Connect everything."""
        # Values are checked by `PairSettings.checked` (preprocess=False): its errors name the setting, and anyone can post.
        raw: dict[str, Any] = QUICK | {"preprocess": False}
        running: dict[str, Any] = raw | {"trigger_mode": "multiple"}  # a second click replaces a running generation
        panes = self.panes.values()
        views = [*(component for pane in panes for component in pane.views.values()), self.token_note, self.scores]
        shown = [*views, self.panes["tuned"].column, self.view, self.caption, self.entry]
        shown += [self.verdicts, self.verdict_note, self.undo, self.consent]
        shown += [component for pane in panes for component in (pane.turns, pane.status)]
        engine = [self.model, self.adapter]
        engine_view = [*engine, self.picked_model, self.proof, self.proof_text, self.reload, self.timer, self.system]
        engine_view += [self.strength, self.base_only, self.base_only_text]

        inputs = [*self.inputs, self.entry, self.history]
        outputs = [*shown, self.prompt, self.stop, self.timer, self.resampled, self.follow_up, self.link]
        outputs += [self.history, self.history_box, self.picker]
        public = {"api_visibility": "public"}
        runs = [
            self.generate.click(handles(self._generate), inputs, outputs, **running | public, api_name="compare"),
            self.regenerate.click(handles(self._regenerate), inputs, outputs, **running),
            gr.on([self.ask.click, self.follow_up.submit], handles(self._follow), [*inputs, self.follow_up], outputs, **running),
        ]
        for examples in self.examples:
            example_run = running | {"preprocess": True}
            runs.append(examples.click(handles(self._example), [*inputs, examples], outputs, **example_run))
        viewed: dict[str, Any] = {"inputs": [self.picked_view, self.entry], "outputs": [self.view, self.picked_view, *views]}
        for run in runs:  # in the view that is chosen by now
            run.then(handles(self._view), **viewed, **QUICK)
        self.stop.click(self._stop, None, None, **QUICK | public, api_name="stop")
        assert Context.root_block is not None
        Context.root_block.unload(self._leave)
        self.studio.left.append(self.generations.drop)

        self.view.input(handles(self._view), **viewed | {"inputs": [self.view, self.entry]}, trigger_mode="always_last", **QUICK)
        reopened = self.picker.input(handles(self._reopen), [self.picker, self.history], shown, **QUICK)
        reopened.then(handles(self._view), **viewed, **QUICK)
        for side, pane in self.panes.items():
            pane.views[TOKENS].select(_token_line(side), self.scores, self.token_note, **QUICK)

        picked = list(dict.fromkeys([*engine_view, *shown]))
        self.model.input(handles(self._pick_model), [*engine, self.entry, self.picked_model], picked, **raw)
        gr.on([self.adapter.input, self.reload.click], handles(self._pick), [*engine, self.entry], picked, **raw)
        self.timer.tick(handles(self._watch), engine, engine_view, **raw)
        # Only the list: the page opens with this event, too, and an answer that comes late must not replace what a link names.
        tab.select(self._list_adapters, engine, self.adapter, **raw)
        self.studio.on_request("compare", self._open, self.inputs, list(dict.fromkeys([*self.inputs, *picked])))
        trigger = [self.settings_box.expand, self.prompt.blur, self.system.blur]
        gr.on(trigger, self._show_seen, [self.prompt, self.model, self.adapter, self.system], self.seen, **raw)

        address = "(query) => location.origin + location.pathname + query"
        self.share.click(handles(self._link), [*self.inputs, self.resampled], self.link, **raw).success(
            None, self.link, self.link, js=address, api_visibility="private"
        )
        # In the browser: a link that no longer names the settings goes away. A text that is pasted sends no `input`.
        stale: dict[str, Any] = {"js": "() => ({__type__: 'update', visible: false})", "api_visibility": "private"}
        changes = [part.change if part in (self.prompt, self.system) else part.input for part in self.inputs]
        gr.on(changes, None, None, self.link, **stale)

        self.studio.changes.append(self.stored.change)
        identity = self.studio.identity
        judged = [self.verdict_note, self.undo, self.stored, self.consent, self.pending]
        for answer, button in self.answers.items():
            button.click(self._judging(answer), [identity, self.entry], judged, **QUICK)
        agreed = [identity, self.nickname, self.pending, self.entry]
        gr.on([self.agree.click, self.nickname.submit], handles(self._agree), agreed, [identity, *judged], **QUICK)
        self.undo.click(handles(self._undo), self.stored, judged, **QUICK)
        self.send.click(handles(self._send), self.entry, self.studio.open_outputs("label"), **QUICK)

    # The engine

    def _key(self, model: Any, adapter: Any) -> EngineKey | None:
        return self.studio.startup.key(pasted(model) or "auto", pasted(adapter), self.studio.workspace)

    def _pick_model(self, model: str, adapter: str, entry: Entry | None, picked: str) -> Updates:
        """Another model, with its own adapter. A dropdown also reports that it was left without a change."""
        return self._pick(model, adapter if pasted(model) == picked else "", entry)

    def _pick(self, model: str, adapter: str, entry: Entry | None) -> Updates:
        """Load what was picked. A pair with a tuned side makes no sense beside a model without an adapter, nor the reverse."""
        updates = self._engine(model, adapter, load=True)
        base_only = updates.get(self.adapter, {}).get("value") == "none"
        if entry is None:  # perhaps one is being written
            return updates | self._sides(not base_only)
        if base_only == (entry.pair.right is None):
            return updates
        return self._cleared(tuned=not base_only) | {self.caption: "Press **Generate**"} | updates

    def _watch(self, model: str, adapter: str) -> Updates:
        return self._engine(model, adapter, load=False)

    def _engine(self, model: str, adapter: str, *, load: bool) -> Updates:
        """Show the state of a model and adapter. The pickers are the visitor's: a look fills only what was left open."""
        updates: Updates = {self.reload: gr.update(visible=False), self.timer: gr.Timer(active=True)}
        key = None
        try:
            key = self._key(model, adapter)
            if key is None:
                return updates | {self.proof: gr.update(label="Choosing a model (a first download can take minutes) …")}
            if load or model == "auto" or not adapter:
                updates |= self._picked(key)
            state = self.studio.pool.load(key) if load else self.studio.pool.state(key)
            if state is not None and state.error is not None:
                raise state.error
        except BiasDPOError as exc:
            updates |= {self.proof: gr.update(label="⚠ No comparison", open=True), self.proof_text: escape(str(exc))}
            return updates | {self.reload: gr.update(visible=True), self.timer: gr.Timer(active=False)}
        if state is None or state.engine is None:
            title = model_title(key.model)
            label = f"Loading {title}: {_progress(state)}" if state is not None else f"{title} is not loaded: Generate loads it"
            waits = {self.timer: gr.Timer(active=state is not None)}
            return updates | waits | {self.proof: gr.update(label=label, open=False), self.proof_text: ""}
        engine = state.engine
        reason = self.studio.startup.reason if key.model == self.studio.startup.model else ""
        adapter_title = "base only" if engine.adapter is None else engine.adapter.id
        label = f"✓ Verified: {engine.spec.title}, {adapter_title}, on {engine.backend.device}"
        updates |= {self.proof: gr.update(label=label, open=False), self.proof_text: _details(engine, reason)}
        return updates | {self.timer: gr.Timer(active=False)}

    def _picked(self, key: EngineKey) -> Updates:
        spec, name = _spec_of(key.model), components.shown_model(self.studio, key.model)
        updates: Updates = {
            self.model: gr.update(choices=components.model_choices(self.studio, name), value=name),
            self.adapter: gr.update(choices=self._adapter_choices(key), value=key.adapter),
            self.picked_model: name,
        }
        tuned = key.adapter != "none"
        updates |= {self.strength: gr.update(visible=tuned), self.base_only: gr.update(visible=not tuned)}
        if spec is not None:
            has_system = spec.template.has_system
            cleared = {} if has_system else {"value": ""}  # what is hidden would be refused
            updates[self.system] = gr.update(visible=has_system, placeholder=spec.template.default_system, **cleared)
            updates[self.base_only_text] = "" if tuned else _base_only(spec, models.adapters_for(spec, self.studio.workspace))
        return updates

    def _adapter_choices(self, key: EngineKey) -> list[tuple[str, str]]:
        spec = _spec_of(key.model)
        fitting = [] if spec is None else models.adapters_for(spec, self.studio.workspace)
        choices = [(_adapter_title(adapter, spec), adapter.id) for adapter in fitting] + [("none (base only)", "none")]
        return choices if key.adapter in dict(choices).values() else [(key.adapter, key.adapter), *choices]

    def _list_adapters(self, model: str, adapter: str) -> Any:
        """Runs may have finished meanwhile, or were deleted."""
        try:
            key = self._key(model, adapter) if adapter else None
        except BiasDPOError:
            return gr.skip()
        return gr.skip() if key is None else gr.update(choices=self._adapter_choices(key))

    def _open(self, request: dict[str, Any], *values: Any) -> Updates:
        """Show what a link, or another tab, asks for."""
        link = request.get("link")
        query = link if link is not None else {name: request[name] for name in ("model", "adapter", "prompt") if name in request}
        if not query:
            return self._engine(values[1] or "auto", values[2] or "", load=True)
        settings, problems = links.from_query(query, self.studio.workspace)
        if problems:
            gr.Warning("<br>".join(map(html.escape, problems)), duration=20)  # a warning's text is HTML
        if link is None:  # from another tab: what it does not name stays
            settings = replace(PairSettings.checked(*values), **{name: getattr(settings, name) for name in query})
        updates: Updates = dict(zip(self.inputs, settings.values(), strict=True))
        engine = self._engine(settings.model, settings.adapter, load=True)
        for field in (self.system, self.strength):  # what a link names, and whether it is shown
            engine[field] = gr.update(**engine.get(field, {}) | {"value": updates[field]})
        updates |= engine
        base_only = engine.get(self.adapter, {}).get("value") == "none"
        if "prompt" in query:
            updates |= self._cleared(tuned=not base_only) | {self.caption: f"{_quoted(settings.prompt)} · press **Generate**"}
        else:
            del updates[self.prompt]
            updates |= self._cleared(tuned=False) | {self.caption: "Press **Generate**"} if base_only else {}
        return updates

    # Generating

    def _generate(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        yield from self._run(request, values)

    def _example(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        *rest, sample = values
        yield {self.prompt: sample[0]}
        yield from self._run(request, (sample[0], *rest[1:]))

    def _regenerate(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        """The prompt at hand once more: sampled, with a new seed."""
        entry = values[-2]
        if entry is None:
            raise PromptError("Nothing to regenerate yet: press Generate first")
        yield from self._run(request, (entry.pair.prompt, *values[1:]), follows=entry if entry.pair.history else None, again=True)

    def _follow(self, request: gr.Request, *values: Any) -> Iterator[Updates]:
        """The next turn of the conversation at hand."""
        *rest, follow_up = values
        if rest[-2] is None:
            raise PromptError("No conversation to continue yet: press Generate first")
        yield from self._run(request, (follow_up, *rest[1:]), follows=rest[-2])

    def _run(
        self, request: gr.Request, values: tuple[Any, ...], *, follows: Entry | None = None, again: bool = False
    ) -> Iterator[Updates]:
        """Stream both sides into the panes. `follows`: the pair whose conversation goes on; `again`: its last turn once more."""
        *given, _entry, history = values
        session = request.session_hash or secrets.token_hex(8)
        generation = self.generations.begin(session)
        try:
            settings = asked = PairSettings.checked(*given)
            if not settings.prompt.strip():
                raise PromptError("The prompt is empty: write one, or click an example")
            if again:
                temperature = settings.sampling.temperature or RESAMPLED_AT
                sampling = replace(settings.sampling, temperature=temperature, seed=secrets.randbelow(SEED_RANGE[1] + 1))
                settings = replace(settings, sampling=sampling)
            past: tuple[PairTurn, ...] = ()
            if follows is not None:
                past = follows.pair.history if again else follows.pair.continued()
                settings = replace(settings, system=follows.pair.system, strength=follows.pair.strength)
            head = _quoted(settings.prompt)
            # The timer: a model that is loaded first shows its progress and proof.
            begun = {
                self.stop: gr.update(interactive=True),
                self.timer: gr.Timer(active=True),
                self.link: gr.update(visible=False),
            }
            begun |= {self.caption: f"{head} · starting …", self.resampled: (asked, settings.sampling) if again else None}
            begun |= {pane.turns: _turns(past, side) for side, pane in self.panes.items()}
            yield self._cleared(tuned=settings.adapter != "none") | begun | ({self.follow_up: ""} if follows is not None else {})
            while (key := self._key(settings.model, settings.adapter)) is None and not generation.stopped:
                self.studio.startup.wait(0.25)
            if key is not None and follows is not None and key != follows.key:
                names = f"{follows.key.model} and {follows.key.adapter}"
                raise ConfigError(f"This conversation is with {names}: choose them again, or start a new one with Generate")
            if key is not None:
                yield from self._stream(generation, key, settings, past)
            if not generation.superseded.is_set():
                yield self._finished(generation.pair, key, head, history)
        except Exception:
            if not generation.superseded.is_set():
                yield {self.stop: gr.update(interactive=False), self.caption: "Nothing was generated."}
            raise
        finally:
            self.generations.end(session, generation)

    def _stream(
        self, generation: Generation, key: EngineKey, settings: PairSettings, past: Sequence[PairTurn]
    ) -> Iterator[Updates]:
        pool, head = self.studio.pool, _quoted(settings.prompt)
        extra: dict[str, Any] = {"system": settings.system, "strength": settings.strength, "history": past}
        generation.start(pool, key, settings.prompt, settings.sampling, **extra)
        for event in generation.events(pool, key):
            if isinstance(event, GenerationPair):
                yield self._written(event) | {self.caption: f"{head} · writing …"}
            elif isinstance(event, Waiting):
                yield {self.caption: f"{head} · {plural(event.ahead, 'visitor')} ahead of you"}
            else:
                yield {self.caption: f"{head} · loading the model: {_progress(event)}"}

    def _finished(self, pair: GenerationPair | None, key: EngineKey | None, head: str, history: list[Entry]) -> Updates:
        updates: Updates = {self.stop: gr.update(interactive=False)}
        if pair is None or key is None or not pair.left.text:
            return updates | {self.caption: f"{head} · stopped before the first token"}
        entry = Entry(pair, key, f"{datetime.now():%H:%M}")
        known = next((one for one in history if one.identity == entry.identity), None)
        history = [*history, entry][-_HISTORY:] if known is None else history
        picker = gr.update(choices=_history_choices(history), value=history.index(known or entry))
        updates |= {self.history: history, self.picker: picker}
        return updates | {self.history_box: gr.update(label=f"Session history ({len(history)})")} | self._shown(entry)

    def _cleared(self, *, tuned: bool) -> Updates:
        """No pair; `tuned`: whether the next one has a tuned side."""
        updates = self._look(TEXT, None, {}) | self._sides(tuned) | {self.entry: None, self.verdict_note: ""}
        updates |= {part: gr.update(visible=False) for part in (self.verdicts, self.undo, self.consent)}
        for pane in self.panes.values():
            updates |= {pane.status: "", pane.turns: gr.update(value=[], visible=False)}
            updates[pane.views[TEXT]] = gr.update(value="", visible=True)
        return updates

    def _sides(self, tuned: bool) -> Updates:
        return {self.panes["tuned"].column: gr.update(visible=tuned), self.view: gr.update(visible=tuned)}

    def _written(self, pair: GenerationPair) -> Updates:
        updates: Updates = {}
        for pane, completion in zip(self.panes.values(), (pair.left, pair.right), strict=True):
            if completion is not None:
                updates |= {pane.views[TEXT]: completion.text, pane.status: _status(completion)}
        return updates

    def _shown(self, entry: Entry) -> Updates:
        """A finished pair; `_look` shows it in the chosen view."""
        pair = entry.pair
        note = _why_no_verdict(pair)
        updates = self._sides(pair.right is not None) | self._written(pair)
        updates |= {pane.turns: _turns(pair.history, side) for side, pane in self.panes.items()}
        updates |= {self.caption: _caption(entry), self.entry: entry, self.consent: gr.update(visible=False)}
        updates |= {self.verdict_note: note, self.verdicts: gr.update(visible=not note and pair.right is not None)}
        return updates | {self.undo: gr.update(visible=False)}

    def _reopen(self, index: int, history: list[Entry]) -> Updates:
        return self._cleared(tuned=True) | self._shown(history[index])

    def _stop(self, request: gr.Request) -> None:
        """Stop, at any stage: loading, waiting, writing."""
        self.generations.stop(request.session_hash or "")

    def _leave(self, request: gr.Request) -> None:
        """The page was closed or reloaded: free the engine."""
        self.generations.drop(request.session_hash or "")

    # Views, link, prompt

    def _view(self, picked: str, entry: Entry | None) -> Iterator[Updates]:
        """The pair at hand in the view that was picked, or else that suits it; token scores are computed first."""
        scores: dict[Side, list[TokenScore]] = {}
        if picked == TOKENS and entry is not None and entry.pair.right is not None:
            told = "Computing the token scores: {} of 2 answers done …"
            yield {self.token_note: gr.update(value=told.format(0), visible=True), self.picked_view: picked}
            with self.studio.pool.lease(entry.key) as engine:
                for side in TITLES:
                    scores[side] = score_tokens(engine, entry.pair, side)
                    yield {self.token_note: told.format(len(scores))}
        view = picked or (_first_view(entry.pair) if entry is not None else TEXT)
        yield {self.view: view, self.picked_view: picked} | self._look(view, entry, scores)

    def _look(self, view: str, entry: Entry | None, scores: dict[Side, list[TokenScore]]) -> Updates:
        """The pair at hand in a view."""
        pair = None if entry is None else entry.pair
        view = view if pair is not None and pair.right is not None else TEXT
        updates: Updates = {self.scores: scores, self.token_note: gr.update(value=_TOKEN_NOTE, visible=view == TOKENS)}
        for side, pane in self.panes.items():
            updates[pane.views[TEXT]] = gr.update(visible=view == TEXT)
            marks: dict[str, Any] = {WORDS: _marks(pair, side)} if pair is not None and view == WORDS else {}
            marks |= {TOKENS: _colored(scores[side])} if view == TOKENS else {}
            for name in (WORDS, TOKENS):
                shown = gr.update(value=marks[name], visible=True) if name in marks else gr.update(visible=False)
                updates[pane.views[name]] = shown
        return updates

    def _link(self, *values: Any) -> Any:
        """The query of the settings; after Regenerate, of the sample that is shown. The browser puts its address before it."""
        *given, resampled = values
        settings = PairSettings.checked(*given)
        if resampled is not None and resampled[0] == settings:
            settings = replace(settings, sampling=resampled[1])
        return gr.update(value=settings.to_query(), visible=True)

    def _show_seen(self, prompt: str, model: str, adapter: str, system: str) -> str:
        """The rendered prompt."""
        try:
            key = self._key(model, adapter)
            state = None if key is None else self.studio.pool.state(key)
            spec = _spec_of(key.model) if key is not None else None
            loaded = None if state is None or state.engine is None else state.engine.backend.template
            template = loaded or (spec.template if spec is not None else None)
            shown = template.render_text(prompt or "", system or "") if template is not None else ""
        except BiasDPOError as exc:
            return str(exc)
        return shown or "Shown when the model is loaded."

    # Verdicts

    def _judging(self, answer: Answer) -> Callable[..., Any]:
        def judge(identity: Any, entry: Entry | None) -> Updates:
            if not annotator_of(identity).agreed:
                return {self.consent: gr.update(visible=True), self.pending: answer}
            return self._store(answer, identity, entry)

        return handles(judge)

    def _agree(self, identity: Any, nickname: str, answer: Answer, entry: Entry | None) -> Updates:
        known = components.agree(identity, nickname)
        return {self.studio.identity: known} | self._store(answer, known, entry)

    def _store(self, answer: Answer, identity: Any, entry: Entry | None) -> Updates:
        """Store a verdict on the pair at hand, whose sides are known."""
        if entry is None or _why_no_verdict(entry.pair):
            raise ConfigError("There is no finished pair to judge: generate one first")
        who, shown = annotator_of(identity), replace(_whole(entry.pair), sides_known=True)
        details = Details(category=shown.prompt.category, annotator=who.nickname, browser=who.browser)
        made = labeling.judgment(shown, answer, details)
        mine = self.studio.dataset.own(who.browser, who.nickname)
        if any(row["pair_id"] == made.pair_id and not row["repeat_of"] for row in mine):
            raise ConfigError("You have judged this pair already: undo that verdict, or withdraw it on the Label tab")
        journal.append(self.studio.workspace, made)
        told = f"Stored: **{VERDICTS[answer].lower()}** · {plural(len(mine) + 1, 'verdict')} by {escape(who.nickname)}"
        updates: Updates = {self.verdict_note: told, self.undo: gr.update(visible=True), self.pending: ""}
        return updates | {self.stored: (made.id, made.pair_id, who.nickname), self.consent: gr.update(visible=False)}

    def _send(self, entry: Entry | None) -> Updates:
        """Offer the pair at hand in Label, where it can be edited and has a category and a note."""
        if entry is None:
            raise ConfigError("There is no finished pair to send: generate one first")
        pair = _whole(entry.pair)
        return self.studio.open("label", pair=[pair.prompt.text, pair.left, pair.right, pair.prompt.category or None])

    def _undo(self, stored: tuple[str, str, str] | None) -> Updates:
        if stored is None:
            raise ConfigError("There is no verdict to undo: judge this pair first")
        judgment_id, pair_id, annotator = stored
        journal.undo(self.studio.workspace, judgment_id, pair_id, annotator, "compare")
        return {self.verdict_note: "Undone.", self.undo: gr.update(visible=False), self.stored: None}


# Parts


def _whole(pair: GenerationPair) -> labeling.BlindPair:
    """A pair to judge, with what is known about its prompt."""
    return labeling.known(pair, replace(prompts.known(pair.prompt.strip()), text=pair.prompt))


def _build_examples(category: str, texts: list[str]) -> gr.Dataset:
    with gr.Tab(category.capitalize()):
        shown: dict[str, Any] = {"layout": "gallery", "samples_per_page": 3, "show_label": False, "label": "Example prompts"}
        return gr.Dataset(components=["textbox"], samples=[[text] for text in texts], elem_id=f"examples-{category}", **shown)


def _build_pane(side: Side, pair: GenerationPair) -> Pane:
    completion = pair.left if side == "base" else pair.right
    assert completion is not None  # of an example
    look: dict[str, Any] = {"label": LABELS[side], "elem_classes": "marks", "show_inline_category": False}
    with gr.Column(min_width=300) as column:
        title = f"{TITLES[side]}: earlier turns"
        turns = gr.Chatbot(label=title, visible=False, render_markdown=False, buttons=[], height=220, elem_id=f"{side}-turns")
        box: dict[str, Any] = {"label": LABELS[side], "interactive": False, "lines": 8, "max_lines": 24, "buttons": ["copy"]}
        in_words = _first_view(pair) == WORDS
        text = gr.Textbox(completion.text, visible=not in_words, elem_id=f"{side}-text", **box)
        look |= {"visible": in_words, "combine_adjacent": True}
        words = gr.HighlightedText(_marks(pair, side), color_map={ONLY_HERE: COLORS[side]}, elem_id=f"{side}-words", **look)
        colors = {LIKELIER: TUNED, LESS_LIKELY: WARN}
        look |= {"visible": False, "combine_adjacent": False, "show_legend": True}
        tokens = gr.HighlightedText([], color_map=colors, elem_id=f"{side}-tokens", **look)
        status = gr.Markdown(_status(completion), elem_id=f"{side}-status", elem_classes="status")
    return Pane(column, turns, {TEXT: text, WORDS: words, TOKENS: tokens}, status)


def _turns(history: Sequence[PairTurn], side: Side) -> Any:
    """Earlier turns of an arm. A chatbot shows HTML, so the texts are escaped."""
    messages = []
    for turn in history:
        answer = turn.base if side == "base" else turn.tuned
        messages += [{"role": "user", "content": html.escape(turn.prompt)}, {"role": "assistant", "content": html.escape(answer)}]
    return gr.update(value=messages, visible=bool(messages))


def _token_line(side: Side) -> Callable[..., Any]:
    def select(scores: dict[Side, list[TokenScore]], event: gr.SelectData) -> Any:
        found = scores.get(side, [])
        if not isinstance(event.index, int) or not 0 <= event.index < len(found):
            return gr.skip()
        one = found[event.index]
        return f"**{TITLES[side]}**, “{escape(one.text)}”: {one.base:.2f} nats under base, {one.tuned:.2f} nats under tuned."

    return select


def _first_view(pair: GenerationPair) -> str:
    """Word differences only where they don't mark nearly every word."""
    return WORDS if pair.right is not None and labeling.is_alike(pair.left.text, pair.right.text) else TEXT


def _marks(pair: GenerationPair, side: Side) -> list[tuple[str, str | float | None]]:
    """A completion, its words marked that the other one does not have."""
    own, other = pair.left.text, pair.right.text if pair.right is not None else ""
    if side == "tuned":
        own, other = other, own
    word = r"[\w'’]+"
    known = set(re.findall(word, other.casefold()))
    parts = re.split(f"({word})", own)  # words at odd places
    marked = [i % 2 == 1 and part.casefold() not in known for i, part in enumerate(parts)]
    for i in range(2, len(parts) - 1, 2):  # a space between two marked words
        marked[i] = marked[i - 1] and marked[i + 1] and parts[i] == " "
    return [(part, ONLY_HERE if mark else None) for part, mark in zip(parts, marked, strict=True)]


def _colored(scores: list[TokenScore]) -> list[tuple[str, str | float | None]]:
    def label(change: float) -> str | None:
        return LIKELIER if change > _NATS else LESS_LIKELY if change < -_NATS else None

    return [(score.text, label(score.tuned - score.base)) for score in scores]


# Words


def _quoted(prompt: str) -> str:
    return f"**{escape(short(prompt, 160))}**"


def _caption(entry: Entry) -> str:
    """The request and its settings."""
    pair, sampling = entry.pair, entry.pair.sampling
    parts = [_quoted(pair.prompt)]
    if entry.at == "Example":
        parts.append(f"precomputed example: {escape(model_title(pair.model))}, {escape(pair.adapter)}")
    if pair.history:
        parts.append(f"turn {len(pair.history) + 1}")
    sampled = f"sampled at temperature {sampling.temperature:g}, seed {sampling.seed}"
    parts.append(sampled if sampling.temperature else "greedy")
    if pair.right is not None and pair.strength != 1:
        parts.append(f"strength {pair.strength:g}" if pair.strength else "strength 0: both sides are the base model")
    elif pair.right is not None and pair.left.text == pair.right.text:
        parts.append("both answers are the same")
    return " · ".join(parts)


def _status(completion: Completion) -> str:
    """Tokens, speed, time to the first token, why it ended."""
    if completion.finish_reason is None and not completion.tokens:
        return "reading the prompt …"
    ends = {"end_of_text": "complete", "limit": f"**✂ cut at {plural(completion.tokens, 'token')}**", "cancelled": "**stopped**"}
    parts = [plural(completion.tokens, "token")] if completion.finish_reason != "limit" else []
    parts.append(ends[completion.finish_reason] if completion.finish_reason is not None else "writing …")
    if completion.tokens_per_second is not None:
        parts.append(f"{completion.tokens_per_second:.0f} tokens/s")
    if completion.seconds_to_first_token is not None:
        parts.append(f"first token after {completion.seconds_to_first_token:.2f} s")
    return " · ".join(parts)


def _why_no_verdict(pair: GenerationPair) -> str:
    if pair.history:
        return "A follow-up can't be judged: a preference pair has one prompt, and these answers depend on earlier turns."
    if any(completion is not None and completion.finish_reason == "cancelled" for completion in (pair.left, pair.right)):
        return "A stopped pair can't be judged: press Regenerate for a whole one."
    return ""


def _history_choices(history: list[Entry]) -> list[tuple[str, int]]:
    return [(entry.title, i) for i, entry in enumerate(history)][::-1]


def _spec_of(model: str) -> ModelSpec | None:
    """A model's spec before it is loaded; None if its files are missing or damaged: loading it gives the reason."""
    try:
        return models.with_files(models.catalog()[model]) if model in models.catalog() else models.find(model)
    except BiasDPOError:
        return None


def _adapter_title(adapter: AdapterSpec, spec: ModelSpec | None) -> str:
    parts = [adapter.id] + [f"run {adapter.run_id}"] * (adapter.run_id not in ("", adapter.id))
    if spec is not None and adapter.model not in {spec.id, spec.hub_id} - {""}:
        parts.append(f"fits, made for {model_title(adapter.model)}" if adapter.model else "fits")
    return " · ".join(parts)


def _progress(state: Loading) -> str:
    return f"{min(max(state.share, 0.0), 1.0):.0%}, {state.what}"


def _details(engine: Engine, reason: str) -> str:
    """The model and adapter, the hardware, the proof, and the adapter's measurements."""
    backend, adapter, proof = engine.backend, engine.adapter, engine.backend.proof
    lines = [f"**{escape(engine.spec.title)}** with {escape(backend.name)} on {escape(backend.device)}. {escape(reason)}"]
    if adapter is not None:
        run = f"run {escape(adapter.run_id)}" if adapter.run_id else "no record of its training"
        data = f", data {escape(adapter.dataset_sha256[:12])}" if adapter.dataset_sha256 else ""
        lines.append(f"Adapter **{escape(adapter.id)}**: {run}{data}.")
    difference = f"largest logit difference {proof.base_max_difference:.3g}; {proof.noise:.3g} between two runs of base"
    lines.append(f"Base equals the bare model ({difference}).")
    if proof.kl_nats is not None:
        lines.append(f"Tuned differs from base by KL {proof.kl_nats:.3g} nats on a fixed text at strength 1.")
    return "\n\n".join(lines) + (_measured(adapter) if adapter is not None else "")


def _measured(adapter: AdapterSpec) -> str:
    """An adapter's result on its held-out pairs, as its record has it."""
    found = recorded_metrics(adapter.folder)
    with suppress(TypeError, ValueError):  # somebody else's numbers
        return f"\n\n{outcome(found)}" if found else ""
    return ""


def _base_only(spec: ModelSpec, fitting: list[AdapterSpec]) -> str:
    """Why there is nothing to compare with, and the command that changes it."""
    why = "Choose an adapter above, or train another:" if fitting else f"No adapter for {escape(spec.title)} yet. Train one:"
    shipped = f"training/configs/{spec.id}-standard.toml"
    config = f" --config {shipped}" if (ASSETS.parent / shipped).is_file() else ""
    name = shlex.quote(spec.id.replace("`", "'"))
    command = f"python -m biasdpo train --model {name} --dataset hub:ahmedallam/BiasDPO{config} --run-id my-first-run"
    return f"### Base only\n{why}\n\n```\n{command}\n```"
