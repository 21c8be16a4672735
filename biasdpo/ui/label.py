"""The Label tab: blind pairs are judged, edited, undone and withdrawn. The sessions behind it are in `biasdpo.labeling`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.context import Context

from biasdpo import labeling, models, prompts
from biasdpo.compare import Waiting
from biasdpo.engines import Loading
from biasdpo.errors import BackendError, ConfigError
from biasdpo.labeling import Answer, BlindPair, Details, Judged, LabelSession, LabelSessions, Progress, Recipe
from biasdpo.prompts import Prompt
from biasdpo.records import GenerationPair, Sampling
from biasdpo.ui.components import (
    CONSENT_TEXT,
    QUICK,
    Annotator,
    Studio,
    Updates,
    agree,
    annotator_of,
    escape,
    handles,
    local_time,
    plural,
)
from biasdpo.workspace import ASSETS

_INTRO = """### Which answer is less biased?
You see two answers to one prompt, side by side, without knowing which model wrote which. Choose the less biased one with a key or a button.
Your verdicts become the pairs that **Train** learns from."""
# The keys are in assets/page.js.
_ANSWERS: list[tuple[str, Answer]] = [
    ("1 ← Left", "left"),
    ("2 → Right", "right"),
    ("3 ↓ Tie", "tie"),
    ("4 ↑ Both biased", "both_biased"),
    ("5 Both unusable", "both_unusable"),
]
_SAID = {"tie": "tie", "both_biased": "both biased", "both_unusable": "both unusable"}
_PROMPT_KINDS = [
    ("Examples", "examples"),
    ("My own list", "list"),
    ("Prompts of the dataset", "dataset"),
    ("A template with groups", "template"),
]
_SECOND_OPINION = "second_opinion"
_PAIRS = [*((title, name) for name, title in labeling.PAIR_SOURCES.items()), ("Second opinion on others' pairs", _SECOND_OPINION)]
_CHANGED = {"removed": "#f87171", "added": "#34d399"}
_DIFF_CHARACTERS = 20_000  # longer texts take seconds to compare
_LISTED = 200  # of one's own judgments


def build_label(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    sessions = LabelSessions(studio.pool, studio.dataset)
    with gr.Column(elem_id="label-start") as start_box:
        gr.Markdown(_INTRO)
        with gr.Column(elem_id="label-gate") as gate:
            nickname = gr.Textbox(label="Nickname", placeholder="Any name but your real one", max_lines=1, elem_id="nickname")
            gr.Markdown(CONSENT_TEXT, elem_id="consent")
        begin = gr.Button("Agree and start", variant="primary", elem_id="begin")
    with gr.Accordion("Guidelines: what counts as less biased?", open=False, elem_id="guidelines"):
        gr.Markdown((ASSETS / "guidelines.md").read_text(encoding="utf-8"))
    pair = _build_pair()
    settings_box, restart, settings = _build_settings(studio)
    paste, pasted = _build_paste()
    changed = gr.State(0)  # counts what this page has stored, to redraw what depends on it
    change_nickname = _build_records(studio, sessions, changed, tab)
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

    def follow(session: LabelSession) -> Iterator[Updates]:
        """Show progress until the next pair is there, then the pair."""
        told = None
        for progress in session.wait_for_pair():
            if (text := _waiting(progress)) != told:
                told = text
                yield {pair.notice: text}
        with session.lock:
            yield pair.shown(session)

    def open_tab(identity: Any, token: str, request: gr.Request) -> Iterator[Updates]:
        """Show who has agreed on another tab, and a pair that a broken connection has held back."""
        session = sessions.of(request.session_hash)
        yield gate_updates(annotator_of(identity), session)
        if session.goes_on and (session.shown is None or token != session.token):
            yield from follow(session)

    def start(request: gr.Request, identity: Any, name: str, *chosen: Any) -> Iterator[Updates]:
        session = sessions.of(request.session_hash)
        if not annotator_of(identity).agreed:
            identity = agree(identity, name)
        who = annotator_of(identity)
        with session.lock:
            told = _start(studio, session, who, _Settings(*chosen))
            shown = gate_updates(who, session) | pair.shown(session)
        yield shown | {studio.identity: identity, settings_box: gr.Accordion(open=False), pair.last: told}
        yield from follow(session)

    def judge(answer: Answer) -> Callable[..., Iterator[Updates]]:
        def handler(request: gr.Request, identity: Any, token: str, reveal: bool, *said: Any) -> Iterator[Updates]:
            session = sessions.of(request.session_hash)
            updates: Updates = {}
            with session.lock:
                if session.shown is not None and token == session.token:
                    stored = pair.store(session, answer, annotator_of(identity), *said)
                    session.next(studio.dataset.own(stored.details.browser, stored.details.annotator))
                    updates = pair.shown(session) | {pair.last: _stored(stored, bool(reveal)), changed: len(session.judged)}
                elif token and session.shown is None and not session.goes_on:
                    raise ConfigError("The app was restarted, so the origin of this pair is lost: press Restart under Settings")
            if updates:
                yield updates
            if not updates or session.shown is None:  # without updates, a key was pressed twice: show what is on
                yield from follow(session)

        return handler

    def skip(token: str, request: gr.Request) -> Iterator[Updates]:
        session = sessions.of(request.session_hash)
        with session.lock:
            if session.shown is not None and token == session.token:
                session.show(None)
        yield {pair.last: "Skipped: nothing was stored."}
        yield from follow(session)

    def undo(reveal: bool, request: gr.Request) -> Updates:
        session = sessions.of(request.session_hash)
        with session.lock:
            judged = session.undo(revealed=bool(reveal))
            told = {pair.last: "Undone: judge this pair again, or skip it.", changed: len(session.judged)}
            return told | pair.shown_again(session, judged)

    def paste_pair(identity: Any, text: str, one: str, other: str, category: str, group: str, request: gr.Request) -> Updates:
        who = annotator_of(identity)
        if not who.agreed:
            raise ConfigError("Enter a nickname above and press “Agree and start” before you judge")
        session = sessions.of(request.session_hash)
        prompt = Prompt((text or "").strip(), category or "", (group or "").strip())
        with session.lock:
            session.show_before(labeling.pasted(prompt, one or "", other or "", session.rng))
            shown = pair.shown(session) | gate_updates(who, session)
            return shown | {pair.last: "This is your pair, its sides in random order.", pair.box: gr.Column(visible=True)}

    def forget(identity: Any, request: gr.Request) -> Updates:
        """Ask for nickname and consent again. The browser's secret stays, so that its judgments remain its own."""
        identity = {"secret": annotator_of(identity).secret}
        return {studio.identity: identity} | gate_updates(annotator_of(identity), sessions.of(request.session_hash))

    def leave(request: gr.Request) -> None:
        sessions.leave(request.session_hash)

    gated = [start_box, gate, begin, pair.box, restart]
    tab.select(handles(open_tab), [studio.identity, pair.token], [*gated, *pair.outputs], **QUICK)
    starts = [studio.identity, settings_box, pair.last, *gated, *pair.outputs]
    gr.on([begin.click, nickname.submit, restart.click], handles(start), [studio.identity, nickname, *settings], starts, **QUICK)
    said = [pair.reveal, pair.editing, pair.left, pair.right, pair.category, pair.group, pair.note]
    judged = [pair.last, changed, *pair.outputs]
    for name, button in pair.answers.items():
        # "multiple": a verdict isn't dropped while the previous one is on its way; the token says which pair it is about.
        handler = handles(judge(name))
        button.click(handler, [studio.identity, pair.token, *said], judged, trigger_mode="multiple", **QUICK)
    pair.skip.click(handles(skip), pair.token, judged, trigger_mode="multiple", **QUICK)
    edits = [pair.left_diff, pair.right_diff, pair.length_note]

    def edit(editing: bool, request: gr.Request) -> Updates:
        return pair.edit(sessions.of(request.session_hash), editing)

    def show_edits(editing: bool, left: str, right: str, request: gr.Request) -> Updates:
        return pair.show_edits(sessions.of(request.session_hash), editing, left, right)

    pair.editing.input(edit, pair.editing, [pair.left, pair.right, *edits], **QUICK)
    # `change`, since `input` isn't sent for text that is pasted or comes from an input method.
    texts = [pair.editing, pair.left, pair.right]
    gr.on([pair.left.change, pair.right.change], show_edits, texts, edits, trigger_mode="always_last", **QUICK)
    pair.undo.click(handles(undo), pair.reveal, judged, **QUICK)
    paste.click(handles(paste_pair), [studio.identity, *pasted], [*gated, pair.last, *pair.outputs], **QUICK)
    change_nickname.click(forget, studio.identity, [studio.identity, *gated], **QUICK)
    if Context.root_block is not None:
        Context.root_block.unload(leave)


# The pair


@dataclass
class _Pair:
    """The pair that is judged, what is said about it, and the verdicts."""

    box: gr.Column
    progress: gr.Markdown
    prompt: gr.Textbox
    token: gr.Textbox
    notice: gr.Markdown
    left: gr.Textbox
    right: gr.Textbox
    left_diff: gr.HighlightedText
    right_diff: gr.HighlightedText
    length_note: gr.Markdown
    answers: dict[Answer, gr.Button]
    skip: gr.Button
    undo: gr.Button
    last: gr.Markdown
    reveal: gr.Checkbox
    editing: gr.Checkbox
    category: gr.Dropdown
    group: gr.Textbox
    note: gr.Textbox
    differences: gr.HighlightedText

    @property
    def outputs(self) -> list[Any]:
        """The outputs of a handler that returns `shown`."""
        edits = [self.editing, self.left_diff, self.right_diff, self.length_note, self.differences]
        return [
            self.progress,
            self.prompt,
            self.token,
            self.notice,
            self.left,
            self.right,
            *edits,
            self.category,
            self.group,
            self.note,
        ]

    def shown(self, session: LabelSession) -> Updates:
        """The pair that is on, or why there is none. The fields stay where they are: one that vanished would take the focus along."""
        pair = session.shown
        done = len(session.judged)
        goal = " · Goal reached: train on your pairs, or go on." if done >= session.goal else ""
        left, right = (pair.left, pair.right) if pair is not None else ("", "")
        return {
            self.progress: f"**{done:,} of {session.goal:,}**{goal}",
            self.notice: "" if pair is not None else _no_pair(session),
            self.token: session.token,
            self.prompt: "" if pair is None else pair.prompt.text,
            self.left: gr.Textbox(value=left, interactive=False),
            self.right: gr.Textbox(value=right, interactive=False),
            self.differences: _pieces(left, right, "left only", "right only"),
            self.category: (pair.prompt.category if pair is not None else "") or None,
            self.group: "" if pair is None else pair.prompt.target_group,
            self.note: "",
            self.editing: False,
        } | self._edits(left, right, left, right)

    def shown_again(self, session: LabelSession, judged: Judged) -> Updates:
        """As `shown`, with what the annotator had said and written before the undo."""
        details = judged.details
        said = {self.category: details.category or None, self.group: details.target_group, self.note: details.note}
        if judged.left is None and judged.right is None:
            return self.shown(session) | said
        pair = judged.pair
        left, right = judged.left or pair.left, judged.right or pair.right
        edited = {box: gr.Textbox(value=text, interactive=True) for box, text in ((self.left, left), (self.right, right))}
        edits = self._edits(pair.left, pair.right, left, right)
        return self.shown(session) | said | {self.editing: True} | edited | edits

    def store(
        self,
        session: LabelSession,
        answer: Answer,
        who: Annotator,
        editing: bool,
        left: str,
        right: str,
        category: str | None,
        group: str,
        note: str,
    ) -> Judged:
        """Store a verdict on the pair that is on."""
        if not who.agreed:
            raise ConfigError("Enter a nickname above and press “Agree and start” before you judge")
        details = Details(category or "", group or "", note or "", who.nickname, who.browser)
        return session.store_answer(answer, details, left if editing else None, right if editing else None)

    def edit(self, session: LabelSession, editing: bool) -> Updates:
        """Turn editing on, or off, which restores what was generated."""
        pair = session.shown
        left, right = (pair.left, pair.right) if pair is not None else ("", "")
        boxes = {box: gr.Textbox(value=text, interactive=bool(editing)) for box, text in ((self.left, left), (self.right, right))}
        return boxes | self._edits(left, right, left, right, warn=bool(editing))

    def show_edits(self, session: LabelSession, editing: bool, left: str, right: str) -> Updates:
        """What has been changed so far."""
        if session.shown is None or not editing:
            return self._edits("", "", "", "")
        return self._edits(session.shown.left, session.shown.right, left or "", right or "")

    def _edits(self, left: str, right: str, new_left: str, new_right: str, *, warn: bool = True) -> Updates:
        is_edited = (left, right) != (new_left, new_right)
        return {
            self.left_diff: _diff_of_edit(left, new_left),
            self.right_diff: _diff_of_edit(right, new_right),
            self.length_note: labeling.length_warning(new_left, new_right) if is_edited and warn else "",
        }


def _build_pair() -> _Pair:
    with gr.Column(visible=False, elem_id="label-work") as box:
        progress = gr.Markdown(elem_id="label-progress")
        token = gr.Textbox(visible="hidden", elem_id="pair-token")  # in the browser: it says which pair a click is about
        prompt = gr.Textbox(label="Prompt", interactive=False, lines=1, max_lines=6, elem_id="label-prompt")
        notice = gr.Markdown(elem_id="label-notice")
        panes = []
        with gr.Row(elem_id="label-panes", equal_height=True):
            for side in ("Left", "Right"):
                with gr.Column(min_width=280):
                    text = gr.Textbox(
                        label=side, interactive=False, lines=6, max_lines=18, elem_id=f"label-{side.lower()}-text", buttons=[]
                    )
                    diff = gr.HighlightedText(
                        label=f"Your edit of the {side.lower()} answer",
                        visible=False,
                        color_map=_CHANGED,
                        combine_adjacent=True,
                        show_legend=True,
                        elem_id=f"label-{side.lower()}-diff",
                    )
                    panes.append((text, diff))
        length_note = gr.Markdown(elem_id="length-note")
        with gr.Row(elem_id="verdicts", elem_classes="actions"):
            answers = {
                name: gr.Button(title, elem_id=f"answer-{name.replace('_', '-')}", min_width=100) for title, name in _ANSWERS
            }
            skip = gr.Button("Skip (S)", variant="secondary", elem_id="answer-skip", min_width=80)
            undo = gr.Button("Undo (U)", variant="secondary", elem_id="undo", min_width=80)
        last = gr.Markdown(elem_id="label-last")
        with gr.Row(elem_id="judgment-details"):
            choices = list(prompts.CATEGORIES)
            category = gr.Dropdown(choices, value=None, label="Category (optional)", elem_id="category", min_width=140)
            group = gr.Textbox(label="Target group (optional)", max_lines=1, elem_id="target-group", min_width=160)
            note = gr.Textbox(label="Note (optional)", max_lines=1, elem_id="judgment-note", min_width=160)
        with gr.Row():
            editing = gr.Checkbox(False, label="Edit before choosing (E)", elem_id="editing", container=False, min_width=200)
            reveal = gr.Checkbox(True, label="Show after a verdict which model wrote which", elem_id="reveal", container=False)
        with gr.Accordion("Differences between left and right, word by word", open=False, elem_id="label-diff"):
            differences = gr.HighlightedText(
                label="Differences",
                show_label=False,
                color_map={"left only": "#fbbf24", "right only": "#38bdf8"},
                combine_adjacent=True,
                show_legend=True,
            )
    (left, left_diff), (right, right_diff) = panes
    return _Pair(
        box=box,
        progress=progress,
        prompt=prompt,
        token=token,
        notice=notice,
        left=left,
        right=right,
        left_diff=left_diff,
        right_diff=right_diff,
        length_note=length_note,
        answers=answers,
        skip=skip,
        undo=undo,
        last=last,
        reveal=reveal,
        editing=editing,
        category=category,
        group=group,
        note=note,
        differences=differences,
    )


def _pieces(one: str, other: str, removed: str, added: str) -> list[tuple[str, str | float | None]]:
    """Both texts in one, for gr.HighlightedText."""
    if max(len(one), len(other)) > _DIFF_CHARACTERS:
        return [("These texts are too long to be compared word by word.", None)]
    kinds = {"same": None, "out": removed, "in": added}
    return [(text, kinds[kind]) for kind, text in labeling.word_diff(one, other)]


def _diff_of_edit(before: str, after: str) -> gr.HighlightedText:
    is_edited = before.strip() != after.strip()
    return gr.HighlightedText(value=_pieces(before, after, "removed", "added") if is_edited else [], visible=is_edited)


def _no_pair(session: LabelSession) -> str:
    """Why no pair is shown, as Markdown."""
    if session.goes_on:
        return _waiting(session.queue.progress())
    if session.queue.error is not None:
        return f"⚠ {escape(str(session.queue.error))}"
    return "No pairs are left: change the prompts or pairs under Settings, and press Restart."


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
    """What the last verdict was and, if wanted, which model wrote which; as Markdown."""
    made, pair = judged.judgment, judged.pair
    said = _SAID.get(made.verdict) or f"{'left' if made.meta.chosen_side == pair.left_side else 'right'} is less biased"
    text = f"Stored: **{said}**."
    if reveal:
        seed = f" (seed {pair.seed})" if pair.model else ""
        text += f" Left was {_side(pair, pair.left_side)}, right was {_side(pair, pair.right_side)}{seed}."
        text += " You have judged this pair before: it measures how consistent you are." if pair.repeat_of else ""
    return text


def _side(pair: BlindPair, side: str) -> str:
    kind, _, number = side.partition(" ")
    if kind in ("pasted", "given"):
        return f"the {'first' if number == '1' else 'second'} {'pasted' if kind == 'pasted' else 'imported'} answer"
    name = {"base": "the base model", "tuned": "the tuned model"}.get(kind, "unknown") + (f", sample {number}" if number else "")
    return f"{name} ({escape(pair.adapter)})" if kind == "tuned" and pair.adapter else name


# Settings


class _Settings(NamedTuple):
    """What is judged, and how it is generated."""

    goal: Any
    kind: str
    lines: str
    file: str | None
    template: str
    groups: str
    traits: str
    category: str
    source: str
    model: str
    adapter: str
    strength: Any
    system: str
    temperature: Any
    max_new_tokens: Any


def _build_settings(studio: Studio) -> tuple[gr.Accordion, gr.Button, list[Any]]:
    with gr.Accordion("Settings: prompts, pairs, model", open=False, elem_id="label-settings") as box:
        with gr.Row():
            goal = gr.Number(24, label="Goal (verdicts)", precision=0, minimum=1, elem_id="label-goal", min_width=120)
            kind = gr.Dropdown(_PROMPT_KINDS, value="examples", label="Prompts", elem_id="prompt-kind", min_width=180)
            source = gr.Dropdown(_PAIRS, value="base_tuned", label="Pairs", elem_id="pair-source", min_width=180)
        with gr.Column(visible=False) as list_box:
            lines = gr.Textbox(label="My prompts, one per line", lines=4, max_lines=12, elem_id="own-prompts")
            file = gr.File(
                label="Or a file: text with one prompt per line, or CSV or JSONL with a column “prompt”",
                file_types=[".txt", ".csv", ".jsonl"],
                type="filepath",
                height=110,
                elem_id="own-file",
            )
        with gr.Column(visible=False) as template_box:
            category = gr.Dropdown(list(prompts.CATEGORIES), value="gender", label="Category")
            template = gr.Textbox("Why are {group} {trait}?", label="Template with {group} and, if you like, {trait}")
            first_groups, first_traits = _fill_groups("gender")
            with gr.Row():
                groups = gr.Textbox(first_groups, label="Groups, one per line", lines=5, max_lines=12)
                traits = gr.Textbox(first_traits, label="Traits, one per line", lines=5, max_lines=12)
        with gr.Row():
            titles = [(spec.title, name) for name, spec in models.catalog().items()]
            model = gr.Dropdown(
                [("The app's model", "auto"), *titles],
                value="auto",
                label="Model",
                info="Or a folder, a GGUF file or a Hub ID",
                allow_custom_value=True,
                elem_id="label-model",
                min_width=180,
            )
            adapter = gr.Dropdown(
                _adapters(studio),
                value="",
                label="Adapter",
                info="Or a folder",
                allow_custom_value=True,
                elem_id="label-adapter",
                min_width=180,
            )
            strength = gr.Slider(0, 1.5, 1, step=0.05, label="Adapter strength", info="1: as trained", min_width=160, buttons=[])
        with gr.Row():
            max_new_tokens = gr.Slider(
                16,
                512,
                256,
                step=8,
                label="Token limit",
                info="A longer answer is cut back to its last complete sentence",
                elem_id="label-max-new-tokens",
                min_width=180,
                buttons=[],
            )
            temperature = gr.Slider(
                0,
                2,
                0.7,
                step=0.05,
                label="Temperature",
                info="0: greedy decoding",
                elem_id="label-temperature",
                min_width=160,
                buttons=[],
            )
            system = gr.Textbox(label="System prompt (optional)", max_lines=3, min_width=180)
        restart = gr.Button("Restart with these settings", variant="primary", visible=False, elem_id="restart")

    kind.change(
        lambda kind: (gr.Column(visible=kind == "list"), gr.Column(visible=kind == "template")),
        kind,
        [list_box, template_box],
        **QUICK,
    )
    category.input(_fill_groups, category, [groups, traits], **QUICK)
    box.expand(lambda: gr.Dropdown(choices=_adapters(studio)), None, adapter, **QUICK)

    def follow_request(request: dict[str, Any]) -> tuple[Any, Any]:
        return request.get("model", gr.skip()), request.get("adapter", gr.skip())

    studio.on_request("label", follow_request, [], [model, adapter])
    values = dict(locals())
    return box, restart, [values[name] for name in _Settings._fields]


def _adapters(studio: Studio) -> list[tuple[str, str]]:
    found = [(adapter.id, adapter.id) for adapter in models.adapters(studio.workspace)]
    return [("The model's own", ""), ("None (base model only)", "none"), *found]


def _fill_groups(category: str) -> tuple[str, str]:
    lists = prompts.group_lists().get(category, {})
    return "\n".join(lists.get("groups", [])), "\n".join(lists.get("traits", []))


def _start(studio: Studio, session: LabelSession, who: Annotator, chosen: _Settings) -> str:
    """Start the session with these settings; what to tell about it, as Markdown."""
    if not isinstance(chosen.goal, int | float) or chosen.goal < 1:
        raise ConfigError(f"The goal must be at least 1 verdict: got {chosen.goal!r}")
    if chosen.source == _SECOND_OPINION:
        found = session.start_second_opinions(who.browser, who.nickname)
        told = f"{plural(found, 'pair')} that others have judged."
    else:
        key = studio.startup.key(chosen.model or "auto", chosen.adapter or "", studio.workspace)
        if key is None:
            raise BackendError("The app is still choosing its model: press Start again in a moment")
        listed = _prompts(studio, chosen)
        source: Any = chosen.source
        told = f"{plural(len(listed), 'prompt')}, those with the fewest judgments first."
        if key.adapter == "none" and source == "base_tuned":
            source = "base_base"
            told += " This model has no adapter, so both answers are samples of the base model."
        sampling = Sampling(chosen.max_new_tokens, chosen.temperature, repetition_penalty=1.0)
        session.start(Recipe(tuple(listed), source, key, sampling, chosen.system or "", chosen.strength))
    session.goal, session.judged = int(chosen.goal), []
    session.take()
    return told


def _prompts(studio: Studio, chosen: _Settings) -> list[Prompt]:
    if chosen.kind == "examples":
        return prompts.shipped()
    if chosen.kind == "list":
        return prompts.of_file(Path(chosen.file)) if chosen.file else prompts.of_text(chosen.lines or "")
    if chosen.kind == "dataset":
        return prompts.of_rows(studio.dataset.standing())
    if chosen.kind == "template":
        groups, traits = (chosen.groups or "").splitlines(), (chosen.traits or "").splitlines()
        return prompts.expand(chosen.template or "", groups, traits, chosen.category or "")
    raise ConfigError(f"Prompts must be one of examples, list, dataset, template: got {chosen.kind!r}; choose one")


def _build_paste() -> tuple[gr.Button, list[Any]]:
    with gr.Accordion("Paste your own pair", open=False, elem_id="paste"):
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="paste-prompt")
        with gr.Row():
            one = gr.Textbox(label="One answer", lines=4, max_lines=12, elem_id="paste-one")
            other = gr.Textbox(label="The other answer", lines=4, max_lines=12, elem_id="paste-other")
        with gr.Row():
            category = gr.Dropdown(list(prompts.CATEGORIES), value=None, label="Category (optional)")
            group = gr.Textbox(label="Target group (optional)", max_lines=1)
        button = gr.Button("Judge this pair", elem_id="paste-button")
    return button, [prompt, one, other, category, group]


# Own judgments, coverage and data health


def _build_records(studio: Studio, sessions: LabelSessions, changed: gr.State, tab: gr.Tab) -> gr.Button:
    """What this browser has judged, what is covered, and what is wrong with the data; returns the button that changes the nickname."""
    reader = studio.dataset
    with gr.Accordion("My judgments", open=False, elem_id="mine") as mine_box:
        consistency = gr.Markdown(elem_id="consistency")
        table = gr.Dataframe(
            headers=["Judged", "Prompt", "Verdict", "Chosen answer", "ID"],
            column_widths=["110px", "30%", "110px", "40%", "90px"],
            interactive=False,
            max_height=320,
            max_chars=160,
            label="Select a row to withdraw it",
            type="array",
            elem_id="my-judgments",
        )
        with gr.Row(elem_classes="actions"):
            withdraw = gr.Button("Withdraw", variant="stop", size="sm", interactive=False, elem_id="withdraw")
            change_nickname = gr.Button("Change nickname or withdraw consent", size="sm", elem_id="change-nickname")
        selected_line = gr.Markdown(elem_id="mine-notice")
    with gr.Accordion("Coverage by category and group", open=False, elem_id="coverage") as coverage_box:
        coverage = gr.Dataframe(
            headers=["Category", "Target group", "Judgments"], interactive=False, max_height=320, label="Coverage", type="array"
        )
    health = gr.Markdown(elem_id="label-health")
    selected = gr.State("")
    open_boxes: dict[str, gr.State] = {"mine": gr.State(False), "coverage": gr.State(False)}

    def mine(identity: Any) -> Updates:
        who = annotator_of(identity)
        rows = reader.own(who.browser, who.nickname)
        agreement = reader.agreement()
        agreed, repeats = agreement.self_consistency.get(who.nickname, (0, 0))
        said = [
            f"**{plural(len(rows), 'judgment')}** of this browser"
            + (f", the latest {_LISTED} shown." if len(rows) > _LISTED else ".")
        ]
        if repeats:
            said.append(f"Consistency: the same verdict in {agreed} of {plural(repeats, 'hidden repeat')}.")
        if agreement.alpha is not None:
            pairs = plural(agreement.pairs, "pair")
            said.append(
                f"Agreement between annotators: Krippendorff's alpha {agreement.alpha:.2f} on {pairs} (1 perfect, 0 chance)."
            )
        return {consistency: " ".join(said), table: [_line(row) for row in reversed(rows[-_LISTED:])]}

    def covered() -> Updates:
        offered = [(category, group) for category, lists in prompts.group_lists().items() for group in lists["groups"]]
        cells = dict.fromkeys(offered, 0) | reader.counts()
        rows = [[category or "none", group or "none named", count] for (category, group), count in cells.items()]
        return {coverage: sorted(rows, key=lambda row: (row[0], -row[2], row[1]))}

    def warned() -> Updates:
        error = reader.overlap_error
        warnings = [*reader.confounds().warnings, *([f"Overlap with benchmarks is not checked: {error}"] if error else [])]
        return {health: "\n\n".join(f"⚠ **Data health:** {escape(line)}" for line in warnings)}

    def refresh(identity: Any, mine_open: bool, coverage_open: bool) -> Updates:
        return warned() | (mine(identity) if mine_open else {}) | (covered() if coverage_open else {})

    def select(event: gr.SelectData) -> Updates:
        row = event.row_value
        return {selected: str(row[-1]), withdraw: gr.Button(interactive=True), selected_line: f"Selected: {escape(str(row[1]))}"}

    def withdraw_selected(identity: Any, judgment_id: str, request: gr.Request) -> Updates:
        who = annotator_of(identity)
        session = sessions.of(request.session_hash)
        with session.lock:
            session.withdraw(judgment_id, who.browser, who.nickname)
        told = "Withdrawn: training no longer uses it. The file keeps a row that records the withdrawal."
        return mine(identity) | warned() | {selected: "", withdraw: gr.Button(interactive=False), selected_line: told}

    outputs = [consistency, table, coverage, health]
    gr.on([changed.change, tab.select], handles(refresh), [studio.identity, *open_boxes.values()], outputs, **QUICK)
    mine_box.expand(
        handles(lambda identity: {open_boxes["mine"]: True} | mine(identity)),
        studio.identity,
        [open_boxes["mine"], *outputs[:2]],
        **QUICK,
    )
    coverage_box.expand(
        handles(lambda: {open_boxes["coverage"]: True} | covered()), None, [open_boxes["coverage"], coverage], **QUICK
    )
    mine_box.collapse(lambda: False, None, open_boxes["mine"], **QUICK)
    coverage_box.collapse(lambda: False, None, open_boxes["coverage"], **QUICK)
    table.select(select, None, [selected, withdraw, selected_line], **QUICK)
    withdraw.click(
        handles(withdraw_selected), [studio.identity, selected], [*outputs, selected, withdraw, selected_line], **QUICK
    )
    return change_nickname


def _line(row: dict[str, Any]) -> list[str]:
    preferred = row["verdict"] == "preferred"
    verdict = _SAID.get(row["verdict"], "less biased")
    return [local_time(row["created_at"]), row["prompt"], verdict, row["chosen"] if preferred else "", row["id"]]
