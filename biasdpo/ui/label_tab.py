"""The Label tab: what it is made of and what sets off what. What the handlers do is in `label_actions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from biasdpo import label, prompts
from biasdpo.engines import EngineKey
from biasdpo.label import Answer
from biasdpo.records import Sampling
from biasdpo.ui import identity, label_render, render
from biasdpo.ui.label_actions import LabelActions
from biasdpo.ui.label_sessions import LabelSessions
from biasdpo.ui.label_sources import SECOND_OPINION
from biasdpo.ui.store import Store

_PROMPT_KINDS = [
    ("Shipped examples", "examples"),
    ("My own list", "list"),
    ("The data set's own", "dataset"),
    ("Template × groups", "template"),
]
# Key, button, answer. The keys are in assets/page.js.
_ANSWERS: list[tuple[str, Answer]] = [
    ("1 ← Left is less biased", "left"),
    ("2 → Right is less biased", "right"),
    ("3 ↓ Tie", "tie"),
    ("4 ↑ Both are biased", "both_biased"),
]


class LabelTab(LabelActions):
    """One tab over the store; `build` is called once, inside the page's Blocks."""

    def __init__(
        self,
        sessions: LabelSessions,
        store: Store,
        who: gr.BrowserState,
        pick_key: Callable[[str, str], EngineKey | None],
        engine_inputs: list[Any],
    ) -> None:
        """`engine_inputs`: model, adapter, system prompt and strength, as they are set on the Compare tab."""
        self.sessions = sessions
        self.store = store
        self.identity = who
        self.pick_key = pick_key
        self.engine_inputs = engine_inputs

    def build(self, demo: gr.Blocks, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.meter = gr.HTML("", js_on_load=None, elem_id="label-meter")
        with gr.Column(elem_id="label-gate") as self.gate:
            gr.HTML(identity.TEXT, js_on_load=None)
            with gr.Row():
                self.pseudonym = gr.Textbox(
                    label="Pseudonym", placeholder="any name but your own", max_lines=1, elem_id="pseudonym", scale=3
                )
                self.agree_button = gr.Button("I agree, go on", variant="primary", elem_id="agree", scale=1)
            self.gate_notice = gr.HTML("", js_on_load=None, elem_id="gate-notice")
        with gr.Column(visible=False, elem_id="label-work") as self.work:
            self._build_sources()
            self._build_judging()
            self._build_afterwards()
        self.timer = gr.Timer(0.25, active=False)
        self._wire(demo, tab)

    def _build_sources(self) -> None:
        defaults = Sampling()
        with gr.Row(elem_id="label-sources"):
            self.kind = gr.Dropdown(_PROMPT_KINDS, value="examples", label="Prompts", elem_id="prompt-kind", min_width=180)
            pair_sources = [(title, name) for name, title in label.PAIR_SOURCES.items()]
            self.source = gr.Dropdown(
                [*pair_sources, ("Second opinion: pairs that others judged", SECOND_OPINION)],
                value="base_tuned",
                label="Pairs",
                elem_id="pair-source",
                min_width=180,
            )
            self.max_new_tokens = gr.Slider(
                16, 400, value=96, step=8, label="Max new tokens", elem_id="label-max-new-tokens", min_width=140, buttons=[]
            )
            self.temperature = gr.Slider(
                0,
                2,
                value=defaults.temperature,
                step=0.05,
                label="Temperature",
                elem_id="label-temperature",
                min_width=140,
                buttons=[],
            )
            self.begin = gr.Button("Begin", variant="primary", elem_id="begin", min_width=150, scale=0)
        with gr.Column(visible=False, elem_id="own-list") as self.list_box:
            self.lines = gr.Textbox(label="My prompts, one a line", lines=4, max_lines=12, elem_id="own-prompts")
            self.file = gr.File(
                label="Or a file: text (one a line), CSV or JSONL with a column `prompt`",
                file_types=[".txt", ".csv", ".jsonl"],
                type="filepath",
                height=110,
                elem_id="own-file",
            )
        with gr.Column(visible=False, elem_id="template-box") as self.template_box:
            with gr.Row():
                self.template = gr.Textbox(
                    "Why are {group} {trait}?", label="Template with {group} and, if you like, {trait}", scale=3
                )
                self.template_category = gr.Dropdown(list(prompts.CATEGORIES), value="gender", label="Category", scale=1)
            groups, traits = self.fill_groups("gender")
            with gr.Row():
                self.groups = gr.Textbox(groups, label="Groups, one a line", lines=5, max_lines=12)
                self.traits = gr.Textbox(traits, label="Traits, one a line", lines=5, max_lines=12)
        self.source_notice = gr.HTML("", js_on_load=None, elem_id="source-notice")

    def _build_judging(self) -> None:
        self.empty = gr.HTML(label_render.nothing_begun(), js_on_load=None, elem_id="label-empty")
        self.notice = gr.HTML("", js_on_load=None, elem_id="label-notice")
        with gr.Column(visible=False, elem_id="pair-area") as self.pair_area:
            self.prompt = gr.HTML("", js_on_load=None, elem_id="label-prompt")
            self.token = gr.Textbox("", elem_id="pair-token")  # hidden by the style
            with gr.Row(elem_id="label-panes", equal_height=True):
                self.left, self.left_diff = self._pane("Left", "label-left-text")
                self.right, self.right_diff = self._pane("Right", "label-right-text")
            self.length_note = gr.HTML("", js_on_load=None, elem_id="length-note")
            with gr.Row(elem_id="verdicts"):
                self.answers = [
                    (
                        gr.Button(
                            title, elem_id=f"answer-{name.replace('_', '-')}", min_width=60, elem_classes="bd-verdict-button"
                        ),
                        name,
                    )
                    for title, name in _ANSWERS
                ]
                self.skip_button = gr.Button("5 Skip", elem_id="answer-skip", min_width=60, elem_classes="bd-verdict-button")
        with gr.Row(elem_id="label-last-row"):
            self.last = gr.HTML("", js_on_load=None, elem_id="label-last")
            self.reveal = gr.Checkbox(
                True, label="Reveal sides after a verdict", elem_id="reveal", container=False, min_width=230, scale=0
            )
            self.undo_button = gr.Button("Undo last verdict (U)", size="sm", elem_id="undo", min_width=170, scale=0)
        with gr.Column(visible=False) as self.details_area:
            with gr.Row(elem_id="judgment-details"):
                self.category = gr.Dropdown(
                    list(prompts.CATEGORIES), value=None, label="Category", elem_id="category", min_width=120
                )
                self.target_group = gr.Textbox(
                    label="Target group (optional)",
                    placeholder="whom the bias is about",
                    max_lines=1,
                    elem_id="target-group",
                    min_width=140,
                )
                self.note = gr.Textbox(label="Note (optional)", max_lines=1, elem_id="judgment-note", min_width=140)
                self.editing = gr.Checkbox(False, label="Edit before choosing (E)", elem_id="editing", min_width=140)
            with gr.Accordion("Word by word: left against right", open=False, elem_id="label-diff"):
                self.side_diff = gr.HTML("", js_on_load=None)

    @staticmethod
    def _pane(title: str, elem_id: str) -> tuple[gr.Textbox, gr.HTML]:
        with gr.Column(elem_classes="bd-pane bd-blind", min_width=280):
            gr.HTML(render.pane_head(title, "", elem_id), js_on_load=None)
            text = gr.Textbox(
                label=f"{title} completion",
                show_label=False,
                container=False,
                interactive=False,
                lines=7,
                max_lines=20,
                elem_id=elem_id,
                placeholder="The next pair is being written …",
            )
            return text, gr.HTML("", js_on_load=None, elem_id=f"{elem_id}-diff")

    def _build_afterwards(self) -> None:
        with gr.Accordion("Paste your own pair", open=False, elem_id="paste"):
            self.paste_prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, elem_id="paste-prompt")
            with gr.Row():
                self.paste_one = gr.Textbox(label="One completion", lines=4, max_lines=12, elem_id="paste-one")
                self.paste_other = gr.Textbox(label="The other completion", lines=4, max_lines=12, elem_id="paste-other")
            with gr.Row():
                self.paste_category = gr.Dropdown(list(prompts.CATEGORIES), value=None, label="Category")
                self.paste_group = gr.Textbox(label="Target group", max_lines=1)
                self.paste_button = gr.Button("Judge this pair", elem_id="paste-button")
        with gr.Accordion(
            "Coverage: what has been judged, by category and group", open=False, elem_id="coverage"
        ) as self.coverage_box:
            self.coverage = gr.HTML("", js_on_load=None)
        with gr.Accordion("My judgments, consistency and agreement", open=False, elem_id="mine") as self.mine_box:
            self.consistency = gr.HTML("", js_on_load=None, elem_id="consistency")
            with gr.Row():
                self.mine = gr.Dropdown([], label="My judgments", elem_id="my-judgments", scale=4)
                self.withdraw_button = gr.Button("Withdraw it", elem_id="withdraw", scale=1, min_width=120)
            self.mine_notice = gr.HTML("", js_on_load=None, elem_id="mine-notice")
            self.change_button = gr.Button("Change pseudonym or take consent back", size="sm", elem_id="change-pseudonym")

    def _wire(self, demo: gr.Blocks, tab: gr.Tab) -> None:
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        demo.load(self.open_page, self.identity, [self.gate, self.work, self.meter], **quick)
        demo.unload(self.close_page)
        gate = [self.identity, self.gate, self.work, self.gate_notice]
        gr.on([self.agree_button.click, self.pseudonym.submit], self.agree, self.pseudonym, gate, **quick)
        self.change_button.click(self.change_pseudonym, None, gate[:3], **quick)

        shown = [
            self.notice,
            self.timer,
            self.pair_area,
            self.details_area,
            self.empty,
            self.token,
            self.prompt,
            self.left,
            self.right,
            self.editing,
            self.left_diff,
            self.right_diff,
            self.length_note,
            self.side_diff,
            self.category,
            self.target_group,
            self.note,
            self.begin,
            self.coverage,
            self.mine,
            self.consistency,
        ]
        tab.select(self.open_tab, self.token, [self.meter, *shown], **quick)
        self.kind.change(
            lambda kind: (gr.update(visible=kind == "list"), gr.update(visible=kind == "template")),
            self.kind,
            [self.list_box, self.template_box],
            **quick,
        )
        self.template_category.input(self.fill_groups, self.template_category, [self.groups, self.traits], **quick)
        what = [self.kind, self.lines, self.file, self.template, self.groups, self.traits, self.template_category, self.source]
        how = [self.max_new_tokens, self.temperature, *self.engine_inputs]
        begun = [self.source_notice, self.last, *shown]
        self.begin.click(self.begin_judging, [self.identity, *what, *how], begun, **quick)
        pasted = [self.paste_prompt, self.paste_one, self.paste_other, self.paste_category, self.paste_group]
        self.paste_button.click(self.paste_pair, [self.identity, *pasted], [self.source_notice, *shown], **quick)

        said = [
            self.identity,
            self.token,
            self.editing,
            self.left,
            self.right,
            self.category,
            self.target_group,
            self.note,
            self.reveal,
        ]
        judged = [self.last, self.meter, *shown]
        for button, name in self.answers:
            # "multiple": a second verdict is not swallowed while the first is on its way; the token tells which pair it is of.
            button.click(self.answering(name), said, judged, trigger_mode="multiple", **quick)
        self.skip_button.click(self.skip, [self.identity, self.token], [self.last, *shown], trigger_mode="multiple", **quick)
        self.undo_button.click(self.undo, [self.identity, self.reveal], judged, **quick)
        self.timer.tick(self.watch, self.token, shown, **quick)
        edits = [self.left_diff, self.right_diff, self.length_note]
        self.editing.input(self.change_editing, self.editing, [self.left, self.right, *edits], **quick)
        # `change`, since `input` is not sent for text that is pasted or comes from an input method.
        changed = [self.editing, self.left, self.right]
        gr.on([self.left.change, self.right.change], self.show_edit, changed, edits, trigger_mode="always_last", **quick)

        self.coverage_box.expand(self.open_coverage, None, self.coverage, **quick)
        self.coverage_box.collapse(self.close_coverage, None, None, **quick)
        mine = [self.mine, self.consistency, self.mine_notice]
        self.mine_box.expand(self.open_mine, self.identity, mine[:2], **quick)
        self.mine_box.collapse(self.close_mine, None, None, **quick)
        self.withdraw_button.click(self.withdraw, [self.identity, self.mine], [*mine, self.meter], **quick)

    def close_page(self, request: gr.Request) -> None:
        """The tab was closed or reloaded, or its connection dropped: generate nothing ahead for nobody."""
        self.sessions.pause(request.session_hash)
