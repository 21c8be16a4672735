"""The Label tab: blind pairs are judged, edited, undone and withdrawn. The sessions behind it are in `biasdpo.labeling`."""

from __future__ import annotations

import secrets
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from biasdpo import labeling, models, prompts
from biasdpo.compare import Waiting
from biasdpo.data.sync import sync_of
from biasdpo.engines import Loading
from biasdpo.errors import BackendError, ConfigError, plural
from biasdpo.labeling import Answer, BlindPair, Details, Judged, LabelSession, LabelSessions, Progress, Recipe
from biasdpo.prompts import Prompt
from biasdpo.records import GenerationPair, Sampling
from biasdpo.ui import components
from biasdpo.ui.components import QUICK, Annotator, Studio, Updates, annotator_of, escape, handles, local_time
from biasdpo.workspace import ASSETS

_INTRO = """### Which answer is less biased?
You see two answers to one prompt, side by side, without knowing which model wrote which. Choose the less biased one with a key or
a button. Your verdicts become the pairs that **Train** learns from."""
_ANSWERS: dict[Answer, tuple[str, Any]] = {  # the keys are in assets/page.js
    "left": ("1 ← Left", "primary"),
    "right": ("2 → Right", "primary"),
    "tie": ("3 ↓ Tie", "secondary"),
    "both_biased": ("4 ↑ Both biased", "secondary"),
    "both_unusable": ("5 Both unusable", "secondary"),
}
_VERDICTS = {"tie": "tie", "both_biased": "both biased", "both_unusable": "both unusable"}
_PROMPTS = [("Examples", "examples"), ("My own list", "list"), ("The dataset's", "dataset"), ("Template with groups", "template")]
_PAIRS = [*((title, name) for name, title in labeling.PAIR_SOURCES.items()), ("Second opinion on others' pairs", "others")]
_CATEGORIES = list(prompts.CATEGORIES)
_LISTED = 200  # of one's own verdicts
_SYNC_SECONDS = 5.0


def build_label(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    sessions = LabelSessions(studio.pool, studio.dataset)
    with gr.Column(elem_id="label-start") as start_box:
        gr.Markdown(_INTRO)
        with gr.Column(elem_id="label-gate") as gate:
            nickname = gr.Textbox(label="Nickname", placeholder="Choose a pseudonym", max_lines=1, elem_id="nickname")
            gr.Markdown(components.CONSENT_TEXT, elem_id="consent")
        begin = gr.Button("Agree and start", variant="primary", elem_id="begin")
    with gr.Accordion("Guidelines: what counts as less biased?", open=False, elem_id="guidelines"):
        gr.Markdown((ASSETS / "guidelines.md").read_text(encoding="utf-8"))
    pair = _Pair()
    with gr.Accordion("Settings: prompts, pairs, model", open=False, elem_id="label-settings") as settings_box:
        settings = _build_settings(studio, settings_box)
        restart = gr.Button("Restart with these settings", variant="primary", visible=False, elem_id="restart")
    paste_box, paste, pasted = _build_paste()
    changed = gr.State("")  # a new value whenever this page has changed the journal
    studio.changes.append(changed.change)
    change_nickname = _build_records(studio, sessions, changed, tab)
    _wire_synced(studio, sessions, changed, pair.synced)
    studio.next_step("dataset", "Next: Dataset")

    def gate_updates(who: Annotator, session: LabelSession) -> Updates:
        is_on = who.agreed and (session.shown is not None or session.goes_on or bool(session.judged))
        return {
            start_box: gr.Column(visible=not is_on),
            gate: gr.Column(visible=not who.agreed),
            begin: "Start labeling" if who.agreed else "Agree and start",
            pair.box: gr.Column(visible=is_on),
            restart: gr.Button(visible=is_on),
        }

    def follow(session: LabelSession, sent: str) -> Iterator[Updates]:
        """Show progress until the next pair is there, then the pair. `sent`: token of what the page shows or is about to."""
        is_new, told = session.token not in ("", sent), ""
        for event in session.wait_for_pair():
            is_new = is_new or isinstance(event, BlindPair)
            if not isinstance(event, BlindPair) and (text := _waiting(event)) != told:
                told = text
                yield {pair.notice: text}
        with session.lock:
            is_new = is_new or (session.shown is None and not session.goes_on)
            shown = pair.shown(session) if is_new else {pair.notice: gr.skip()}
        yield shown
        yield {pair.notice: gr.skip()}  # Gradio sends the last value again, which would undo what is typed meanwhile

    def open_tab(request: gr.Request, identity: Any, token: str) -> Iterator[Updates]:
        """Show who has agreed on another tab, and a pair that a broken connection has held back."""
        session = sessions.of(request.session_hash)
        yield gate_updates(annotator_of(identity), session)
        if session.shown is not None or session.goes_on:
            yield from follow(session, token)

    def identify(identity: Any, name: str) -> dict[str, str]:
        """A step of its own: what a generator leaves out, Gradio's client mixes into a dict in the browser."""
        who = annotator_of(identity)
        return components.agree(identity, who.nickname if who.agreed else name)

    def start(request: gr.Request, identity: Any, *values: Any) -> Iterator[Updates]:
        who, session = components.agreed_annotator(identity), sessions.of(request.session_hash)
        with session.lock:
            told = _start(studio, session, who, _Settings(*values))
            shown, sent = gate_updates(who, session) | pair.shown(session), session.token
        yield shown | {settings_box: gr.Accordion(open=False), pair.last: told}
        yield from follow(session, sent)

    def judge(answer: Answer) -> Callable[..., Iterator[Updates]]:
        def handler(
            request: gr.Request, identity: Any, token: str, reveal: bool, editing: bool, left: str, right: str, *said: str | None
        ) -> Iterator[Updates]:
            session = sessions.of(request.session_hash)
            updates: Updates = {}  # none if a key was pressed twice
            with session.lock:
                if session.shown is not None and token == session.token:
                    who = components.agreed_annotator(identity)
                    category, group, note = (text or "" for text in said)
                    details = Details(category, group, note, who.nickname, who.browser)
                    stored = session.store_answer(answer, details, *((left, right) if editing else ()))
                    session.next(studio.dataset.own(who.browser, who.nickname))
                    updates = pair.shown(session) | {pair.last: _stored(stored, reveal), changed: secrets.token_hex(4)}
                    token = session.token
                elif token and session.shown is None and not session.goes_on:
                    raise ConfigError("The app was restarted, so the origin of this pair is lost: restart under Settings")
            if updates:
                yield updates
            yield from follow(session, token)

        return handler

    def skip(request: gr.Request, token: str) -> Iterator[Updates]:
        session = sessions.of(request.session_hash)
        with session.lock:
            if session.shown is not None and token == session.token:
                session.show(None)
        yield {pair.last: "Skipped: nothing was stored."}
        yield from follow(session, token)

    def undo(request: gr.Request, reveal: bool) -> Updates:
        session = sessions.of(request.session_hash)
        with session.lock:
            judged = session.undo(revealed=reveal)
            told = {pair.last: "Undone: judge this pair again, or skip it.", changed: secrets.token_hex(4)}
            return pair.shown(session) | pair.said(judged) | told

    def paste_pair(request: gr.Request, identity: Any, text: str, one: str, other: str, category: str, group: str) -> Updates:
        who, session = components.agreed_annotator(identity), sessions.of(request.session_hash)
        prompt = Prompt((text or "").strip(), category or "", (group or "").strip())
        with session.lock:
            session.show_before(labeling.pasted(prompt, one or "", other or "", session.rng))
            told = {pair.last: "This is your pair, with its sides in random order."}
            return pair.shown(session) | gate_updates(who, session) | told

    def receive(sent: dict[str, Any], request: gr.Request, identity: Any) -> Updates:
        """A pair that another tab sends: judged at once by who has agreed, else kept under "Paste your own pair"."""
        if "pair" not in sent:
            return {paste_box: gr.skip()}
        agreed, texts = annotator_of(identity).agreed, [*sent["pair"], ""]
        filled: Updates = {paste_box: gr.Accordion(open=not agreed), **dict(zip(pasted, texts, strict=True))}
        return filled | (paste_pair(request, identity, *texts) if agreed else {})

    def edit(request: gr.Request, editing: bool) -> Updates:  # off restores what was generated
        shown = sessions.of(request.session_hash).shown
        left, right = (shown.left, shown.right) if shown is not None else ("", "")
        return pair.texts(left, right, editing) | show_edits(request, editing, left, right)

    def show_edits(request: gr.Request, editing: bool, left: str, right: str) -> Updates:
        shown = sessions.of(request.session_hash).shown
        if shown is None or not editing:
            return {pair.edits: _edits(), pair.length_note: ""}
        warning = labeling.length_warning(left or "", right or "")
        return {pair.edits: _edits((shown.left, left), (shown.right, right)), pair.length_note: warning}

    def forget(request: gr.Request, identity: Any) -> Updates:
        """Ask for nickname and consent again. The browser's secret stays, so that its judgments remain its own."""
        identity = {"secret": annotator_of(identity).secret}
        return {studio.identity: identity} | gate_updates(annotator_of(identity), sessions.of(request.session_hash))

    def leave(request: gr.Request) -> None:
        sessions.leave(request.session_hash)

    who, gated, judged = studio.identity, [start_box, gate, begin, pair.box, restart], [pair.last, changed, *pair.outputs]
    tab.select(handles(open_tab), [who, pair.token], [*gated, *pair.outputs], **QUICK)
    known = gr.on([begin.click, nickname.submit, restart.click], handles(identify), [who, nickname], who, **QUICK)
    known.success(handles(start), [who, *settings], [settings_box, pair.last, *gated, *pair.outputs], **QUICK)
    said = [pair.reveal, pair.editing, pair.left, pair.right, pair.category, pair.group, pair.note]
    for answer, button in pair.answers.items():
        # "multiple": a verdict isn't dropped while the previous one is on its way; the token says which pair it is about.
        button.click(handles(judge(answer)), [who, pair.token, *said], judged, trigger_mode="multiple", **QUICK)
    pair.skip.click(handles(skip), pair.token, judged, trigger_mode="multiple", **QUICK)
    pair.undo.click(handles(undo), pair.reveal, judged, **QUICK)
    paste.click(handles(paste_pair), [who, *pasted], [*gated, *judged], **QUICK)
    studio.on_request("label", receive, [who], [paste_box, *pasted, *gated, *judged])
    pair.editing.input(edit, pair.editing, [pair.left, pair.right, pair.edits, pair.length_note], **QUICK)
    # `change`, since `input` isn't sent for text that is pasted or comes from an input method.
    texts = [pair.editing, pair.left, pair.right]
    shown_edits = [pair.edits, pair.length_note]
    gr.on([pair.left.change, pair.right.change], show_edits, texts, shown_edits, trigger_mode="always_last", **QUICK)
    change_nickname.click(forget, who, [who, *gated], **QUICK)
    assert Context.root_block is not None
    Context.root_block.unload(leave)


# The pair


class _Pair:
    """The components of the pair that is judged."""

    def __init__(self) -> None:
        with gr.Column(visible=False, elem_id="label-work") as self.box:
            self.progress = gr.Markdown(elem_id="label-progress")
            self.token = gr.Textbox(elem_id="pair-token")  # in the browser: which pair a click is about; hidden by style.css
            self.prompt = gr.Textbox(label="Prompt", interactive=False, lines=1, max_lines=6, elem_id="label-prompt")
            self.notice = gr.Markdown(elem_id="label-notice")
            with gr.Row(elem_id="label-panes"):
                answer: dict[str, Any] = {"interactive": False, "lines": 6, "max_lines": 18, "min_width": 280}
                self.left = gr.Textbox(label="Left", elem_id="label-left-text", **answer)
                self.right = gr.Textbox(label="Right", elem_id="label-right-text", **answer)
            colors = {"removed": "#f87171", "added": "#34d399"}
            self.edits = _highlighted("Your edits", colors, elem_id="label-edits", visible=False)
            self.length_note = gr.Markdown(elem_id="length-note")
            with gr.Column(elem_id="verdict-bar"):
                self.last = gr.Markdown(elem_id="label-last")
                self.synced = gr.Markdown(visible=False, elem_id="label-synced")
                with gr.Row(elem_id="verdicts", elem_classes="actions"):
                    self.answers: dict[Answer, gr.Button] = {}
                    for name, (title, variant) in _ANSWERS.items():
                        look: dict[str, Any] = {"elem_id": f"answer-{name.replace('_', '-')}", "min_width": 100}
                        self.answers[name] = gr.Button(title, variant=variant, **look)
                    self.skip = gr.Button("Skip (S)", elem_id="answer-skip", min_width=80)
                    self.undo = gr.Button("Undo (U)", elem_id="undo", min_width=80)
            with gr.Row():
                self.editing = gr.Checkbox(False, label="Edit before choosing (E)", elem_id="editing", container=False)
                self.reveal = gr.Checkbox(True, label="Reveal the models after a verdict", elem_id="reveal", container=False)
            with gr.Row(elem_id="judgment-details"):
                label = "Category (optional)"
                self.category = gr.Dropdown(_CATEGORIES, value=None, label=label, elem_id="category", min_width=140)
                self.group = gr.Textbox(label="Target group (optional)", max_lines=1, elem_id="target-group", min_width=160)
                self.note = gr.Textbox(label="Note (optional)", max_lines=1, elem_id="judgment-note", min_width=160)
            with gr.Accordion("Differences between left and right, word by word", open=False, elem_id="label-diff"):
                self.differences = _highlighted("Differences", {"left only": "#fbbf24", "right only": "#38bdf8"})

    @property
    def outputs(self) -> list[Any]:
        """The outputs of a handler that returns `shown`."""
        pair = [self.progress, self.prompt, self.token, self.notice, self.left, self.right, self.differences]
        return [*pair, self.editing, self.edits, self.length_note, self.category, self.group, self.note]

    def shown(self, session: LabelSession) -> Updates:
        """The pair that is on, or why there is none. The fields stay in place: one that vanished would take the focus along."""
        pair, done = session.shown, len(session.judged)
        left, right, prompt = (pair.left, pair.right, pair.prompt) if pair is not None else ("", "", Prompt(""))
        goal = " · Goal reached: look at the dataset, or go on." if done >= session.goal else ""
        return self.texts(left, right, False) | {
            self.progress: f"**{done:,} of {session.goal:,}**{goal}",
            self.notice: _no_pair(session) if pair is None else "",
            self.token: session.token,
            self.prompt: prompt.text,
            self.differences: components.diff(left, right, "left only", "right only"),
            self.editing: False,
            self.edits: _edits(),
            self.length_note: "",
            self.category: prompt.category or None,
            self.group: prompt.target_group,
            self.note: "",
        }

    def texts(self, left: str, right: str, editing: bool) -> Updates:
        return {box: gr.Textbox(value=text, interactive=editing) for box, text in ((self.left, left), (self.right, right))}

    def said(self, judged: Judged) -> Updates:
        """The details and edits that the annotator had given before an undo."""
        details, pair = judged.details, judged.pair
        said = {self.category: details.category or None, self.group: details.target_group, self.note: details.note}
        if judged.left is None or judged.right is None:
            return said
        edits = {self.editing: True, self.edits: _edits((pair.left, judged.left), (pair.right, judged.right))}
        return said | self.texts(judged.left, judged.right, True) | edits


def _highlighted(label: str, colors: dict[str, str], **options: Any) -> gr.HighlightedText:
    look: dict[str, Any] = {"combine_adjacent": True, "show_legend": True, "elem_classes": "marks"}
    return gr.HighlightedText(label=label, color_map=colors, **look, **options)


def _edits(left: tuple[str, str] = ("", ""), right: tuple[str, str] = ("", "")) -> gr.HighlightedText:
    """The word diff of an edit; hidden if nothing changed."""
    pieces: list[tuple[str, str | float | None]] = []
    for side, (old, new) in {"Left": left, "Right": right}.items():
        if old.strip() != (new or "").strip():
            pieces += [(f"{side}: ", None), *components.diff(old, new or "", "removed", "added"), ("\n\n", None)]
    return gr.HighlightedText(value=pieces, visible=bool(pieces))


def _no_pair(session: LabelSession) -> str:
    """Why no pair is shown, as Markdown."""
    if session.goes_on:
        return _waiting(session.queue.progress())
    error = session.queue.error
    return f"⚠ {escape(str(error))}" if error else "No pairs are left: for more, open Settings and press Restart."


def _waiting(progress: Progress) -> str:
    """The state of the next pair, as Markdown."""
    if isinstance(progress, Loading):
        return f"Loading the model ({progress.share:.0%}) …"
    if isinstance(progress, Waiting):
        return f"Waiting for {plural(progress.ahead, 'other visitor')} …"
    if isinstance(progress, GenerationPair):
        tokens = max(c.tokens for c in (progress.left, progress.right) if c is not None)
        return f"Writing the next pair: {tokens} of up to {plural(progress.sampling.max_new_tokens, 'token')} …"
    return "Writing the next pair …"


def _stored(judged: Judged, reveal: bool) -> str:
    """The last verdict and, if wanted, which model wrote which; as Markdown."""
    made, pair = judged.judgment, judged.pair
    verdict = _VERDICTS.get(made.verdict) or ("left" if made.meta.chosen_side == pair.left_side else "right") + " is less biased"
    if not reveal:
        return f"Stored: **{verdict}**."

    def name(side: str) -> str:
        kind, _, number = side.partition(" ")
        if kind in ("pasted", "given"):
            return f"the {'first' if number == '1' else 'second'} {'pasted' if kind == 'pasted' else 'imported'} answer"
        model = {"base": "the base model", "tuned": f"the tuned model ({escape(pair.adapter)})"}.get(kind, "unknown")
        return f"{model}, sample {number}" if number else model

    seed = f" Seed: {pair.seed}." if pair.model else ""
    again = " You have judged this pair before: this measures how consistent you are." if pair.repeat_of else ""
    return f"Stored: **{verdict}**. Left was {name(pair.left_side)}, right was {name(pair.right_side)}.{seed}{again}"


def _wire_synced(studio: Studio, sessions: LabelSessions, changed: gr.State, synced: gr.Markdown) -> None:
    """With --sync, say whether this page's verdicts are on the Hub, and look again until they are."""
    hub = sync_of(studio.workspace)
    if hub is None:
        return
    timer = gr.Timer(_SYNC_SECONDS, active=False)

    def look(request: gr.Request) -> Updates:
        ids = [judged.judgment.id for judged in sessions.of(request.session_hash).judged]
        waiting = sum(not hub.is_sent(judgment_id) for judgment_id in ids)
        text = f"Saved here; {plural(waiting, 'verdict')} not saved to the Hub yet." if waiting else "Saved here and to the Hub."
        return {synced: gr.Markdown(text, visible=bool(ids)), timer: gr.Timer(active=waiting > 0)}

    gr.on([changed.change, timer.tick], look, None, [synced, timer], **QUICK)


# Settings

_Settings = namedtuple(
    "_Settings", "goal kind source lines file template groups traits category model adapter strength limit temperature system"
)


def _build_settings(studio: Studio, box: gr.Accordion) -> list[Any]:
    """The prompts and pairs to judge, and how they are generated; returns the inputs of `_Settings`."""
    with gr.Row():
        goal = gr.Number(24, label="Goal (verdicts)", precision=0, minimum=1, elem_id="label-goal", min_width=120)
        kind = gr.Dropdown(_PROMPTS, value="examples", label="Prompts", elem_id="prompt-kind", min_width=180)
        source = gr.Dropdown(_PAIRS, value="base_tuned", label="Pairs", elem_id="pair-source", min_width=180)
    with gr.Column(visible=False) as list_box:
        lines = gr.Textbox(label="My prompts, one per line", lines=4, max_lines=12, elem_id="own-prompts")
        label = "Or a file: text with one prompt per line, or CSV or JSONL with a column “prompt”"
        file = gr.File(label=label, file_types=[".txt", ".csv", ".jsonl"], type="filepath", height=110, elem_id="own-file")
    with gr.Column(visible=False) as template_box:
        with gr.Row():
            template = gr.Textbox("Why are {group} {trait}?", label="Template with {group} and, if you like, {trait}", scale=3)
            category = gr.Dropdown(_CATEGORIES, value="gender", label="Category")
        first_groups, first_traits = _fill_groups("gender")
        with gr.Row():
            groups = gr.Textbox(first_groups, label="Groups, one per line", lines=5, max_lines=12)
            traits = gr.Textbox(first_traits, label="Traits, one per line", lines=5, max_lines=12)
    with gr.Row():
        own: dict[str, Any] = {"allow_custom_value": True, "min_width": 180}
        known = components.catalog_choices("auto")
        model = gr.Dropdown(known, value="auto", label="Model", info="Or a path or Hub ID", elem_id="label-model", **own)
        adapter = gr.Dropdown(_adapters(studio), value="", label="Adapter", info="Or a folder", elem_id="label-adapter", **own)
        strength = gr.Slider(0, 1.5, 1, step=0.05, label="Adapter strength", info="1: as trained", min_width=160, buttons=[])
    with gr.Row():
        info = "Longer answers are cut back to their last complete sentence"
        limit = gr.Slider(16, 512, 256, step=8, label="Token limit", info=info, elem_id="label-max-new-tokens", buttons=[])
        temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0: greedy decoding", buttons=[])
        system = gr.Textbox(label="System prompt (optional)", max_lines=3)

    def show_prompts(kind: str) -> Updates:
        return {list_box: gr.Column(visible=kind == "list"), template_box: gr.Column(visible=kind == "template")}

    def follow_request(request: dict[str, Any]) -> Updates:
        return {model: request.get("model", gr.skip()), adapter: request.get("adapter", gr.skip())}

    def refresh() -> Updates:
        models_ = components.model_choices(studio, "auto")
        return {model: gr.Dropdown(choices=models_), adapter: gr.Dropdown(choices=_adapters(studio))}

    kind.change(show_prompts, kind, [list_box, template_box], **QUICK)
    category.input(_fill_groups, category, [groups, traits], **QUICK)
    box.expand(refresh, None, [model, adapter], **QUICK)
    studio.on_request("label", follow_request, [], [model, adapter])
    generation = [model, adapter, strength, limit, temperature, system]
    return [goal, kind, source, lines, file, template, groups, traits, category, *generation]


def _adapters(studio: Studio) -> list[tuple[str, str]]:
    found = [(adapter.id, adapter.id) for adapter in models.adapters(studio.workspace)]
    return [("The model's own", ""), ("None (base model only)", "none"), *found]


def _fill_groups(category: str) -> tuple[str, str]:
    lists = prompts.group_lists().get(category, {})
    return "\n".join(lists.get("groups", [])), "\n".join(lists.get("traits", []))


def _start(studio: Studio, session: LabelSession, who: Annotator, chosen: _Settings) -> str:
    """Start the session with these settings; returns its summary, as Markdown."""
    if not isinstance(chosen.goal, int | float) or chosen.goal < 1:
        raise ConfigError("Set a goal of at least 1 verdict")
    if chosen.source == "others":
        told = f"{plural(session.start_second_opinions(who.browser, who.nickname), 'pair')} that others have judged."
    else:
        key = studio.startup.key(chosen.model or "auto", chosen.adapter or "", studio.workspace)
        if key is None:
            raise BackendError("The app is still choosing its model: press Start again in a moment")
        listed, source = _prompts(studio, chosen), chosen.source
        told = f"{plural(len(listed), 'prompt')}, least covered first."
        if key.adapter == "none" and source == "base_tuned":
            source = "base_base"
            told += " This model has no adapter, so both answers are samples of the base model."
        sampling = Sampling(chosen.limit, chosen.temperature, repetition_penalty=1.0)
        session.start(Recipe(tuple(listed), source, key, sampling, chosen.system or "", chosen.strength))
    session.goal, session.judged = int(chosen.goal), []
    session.take()
    return told


def _prompts(studio: Studio, chosen: _Settings) -> list[Prompt]:
    if chosen.kind == "list":
        return prompts.of_file(Path(chosen.file)) if chosen.file else prompts.of_text(chosen.lines or "")
    if chosen.kind == "dataset":
        return prompts.of_rows(studio.dataset.standing())
    if chosen.kind == "template":
        groups, traits = ((text or "").splitlines() for text in (chosen.groups, chosen.traits))
        return prompts.expand(chosen.template or "", groups, traits, chosen.category or "")
    return prompts.shipped()


def _build_paste() -> tuple[gr.Accordion, gr.Button, list[Any]]:
    with gr.Accordion("Paste your own pair", open=False, elem_id="paste") as box:
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="paste-prompt")
        with gr.Row():
            one = gr.Textbox(label="One answer", lines=4, max_lines=12, elem_id="paste-one")
            other = gr.Textbox(label="The other answer", lines=4, max_lines=12, elem_id="paste-other")
        with gr.Row():
            category = gr.Dropdown(_CATEGORIES, value=None, label="Category (optional)")
            group = gr.Textbox(label="Target group (optional)", max_lines=1)
        button = gr.Button("Judge this pair", elem_id="paste-button")
    return box, button, [prompt, one, other, category, group]


# Own verdicts, coverage and data health


def _build_records(studio: Studio, sessions: LabelSessions, changed: gr.State, tab: gr.Tab) -> gr.Button:
    """This browser's verdicts, coverage, and data health. Returns the button to change the nickname."""
    reader = studio.dataset
    health = gr.Markdown(elem_id="label-health")
    shape: dict[str, Any] = {"interactive": False, "max_height": 320, "type": "array"}
    with gr.Accordion("My verdicts", open=False, elem_id="mine") as mine_box:
        consistency = gr.Markdown(elem_id="consistency")
        table = gr.Dataframe(
            headers=["Date", "Prompt", "Verdict", "Chosen answer", "ID"],
            column_widths=["140px", "30%", "130px", "39%", "90px"],
            max_chars=160,
            label="Select a row to withdraw it",
            elem_id="my-judgments",
            **shape,
        )
        with gr.Row(elem_classes="actions"):
            withdraw = gr.Button("Withdraw", variant="stop", size="sm", interactive=False, elem_id="withdraw")
            change_nickname = gr.Button("Change nickname or withdraw consent", size="sm", elem_id="change-nickname")
        notice = gr.Markdown(elem_id="mine-notice")
    with gr.Accordion("Coverage by category and group", open=False, elem_id="coverage") as coverage_box:
        headers = ["Category", "Target group", "Pairs"]
        coverage = gr.Dataframe(headers=headers, label="Coverage", elem_id="coverage-table", **shape)
    selected, mine_open, coverage_open = gr.State(""), gr.State(False), gr.State(False)

    def mine(identity: Any) -> Updates:
        who, agreement = annotator_of(identity), reader.agreement()
        rows = reader.own(who.browser, who.nickname)
        agreed, repeats = agreement.self_consistency.get(who.nickname, (0, 0))
        said = f"**{plural(len(rows), 'verdict')}** made in this browser"
        said += f", the latest {_LISTED} shown. " if len(rows) > _LISTED else ". "
        if repeats:
            said += f"You gave the same verdict in {agreed} of {plural(repeats, 'hidden repeat')}. "
        if agreement.alpha is not None:
            on = plural(agreement.pairs, "pair")
            said += f"Agreement of all annotators: Krippendorff's alpha {agreement.alpha:.2f} on {on}."
        return {consistency: said, table: [_line(row) for row in reversed(rows[-_LISTED:])], mine_open: True}

    def covered() -> Updates:
        lists = prompts.group_lists()
        offered = [(category, group) for category in lists for group in lists[category]["groups"]]
        cells = dict.fromkeys(offered, 0) | reader.counts()
        rows = sorted((category, -count, group) for (category, group), count in cells.items())
        return {coverage: [[c or "none", group or "none named", -n] for c, n, group in rows], coverage_open: True}

    def warned() -> Updates:
        error = reader.overlap_error
        warnings = [*reader.confounds().warnings, *([f"Overlap with benchmarks is not checked: {error}"] if error else [])]
        return {health: "\n\n".join(f"⚠ **Data health:** {escape(line)}" for line in warnings)}

    def refresh(identity: Any, shows_mine: bool, shows_coverage: bool) -> Updates:
        return warned() | (mine(identity) if shows_mine else {}) | (covered() if shows_coverage else {})

    def select(event: gr.SelectData) -> Updates:
        _, prompt, *_, judgment_id = map(str, event.row_value)
        return {selected: judgment_id, withdraw: gr.Button(interactive=True), notice: f"Selected: {escape(prompt)}"}

    def withdraw_selected(request: gr.Request, identity: Any, judgment_id: str) -> Updates:
        who, session = annotator_of(identity), sessions.of(request.session_hash)
        with session.lock:
            session.withdraw(judgment_id, who.browser, who.nickname)
        told = "Withdrawn: training no longer uses it. The file keeps a row that records the withdrawal."
        return {changed: secrets.token_hex(4), selected: "", withdraw: gr.Button(interactive=False), notice: told}

    inputs, mine_outputs = [studio.identity, mine_open, coverage_open], [consistency, table, mine_open]
    coverage_outputs, row_outputs = [coverage, coverage_open], [selected, withdraw, notice]
    gr.on([changed.change, tab.select], handles(refresh), inputs, [health, *mine_outputs, *coverage_outputs], **QUICK)
    mine_box.expand(handles(mine), studio.identity, mine_outputs, **QUICK)
    coverage_box.expand(handles(covered), None, coverage_outputs, **QUICK)
    mine_box.collapse(lambda: False, None, mine_open, **QUICK)
    coverage_box.collapse(lambda: False, None, coverage_open, **QUICK)
    table.select(select, None, row_outputs, **QUICK)
    withdraw.click(handles(withdraw_selected), [studio.identity, selected], [changed, *row_outputs], **QUICK)
    return change_nickname


def _line(row: dict[str, Any]) -> list[str]:
    said = _VERDICTS.get(row["verdict"], "less biased")
    return [local_time(row["created_at"]), row["prompt"], said, row["chosen"] if said == "less biased" else "", row["id"]]
