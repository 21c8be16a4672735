"""The Compare tab: what it is made of and what sets off what. What the handlers do is in `compare_actions`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from biasdpo import prompts
from biasdpo.engines import EnginePool
from biasdpo.label import Answer
from biasdpo.records import STRENGTH_RANGE, Sampling
from biasdpo.ui import render
from biasdpo.ui.compare_actions import CompareActions
from biasdpo.ui.label_sessions import LabelSessions
from biasdpo.ui.startup import Startup
from biasdpo.ui.store import Store
from biasdpo.ui.visitors import Visitors
from biasdpo.workspace import is_public_space

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
        self.proof = gr.HTML(render.choosing(), js_on_load=None, elem_id="proof")
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
                self.base_head = gr.HTML(render.pane_head("Base", "", "base-text"), js_on_load=None)
                self.base_text = self._pane_text("Base completion", "base-text")
                self.base_status = gr.HTML(render.no_status(), js_on_load=None, elem_id="base-status")
            with gr.Column(elem_classes="bd-pane bd-tuned", min_width=300) as self.tuned_pane:
                self.tuned_head = gr.HTML(render.pane_head("DPO-tuned", "", "tuned-text"), js_on_load=None)
                self.tuned_text = self._pane_text("DPO-tuned completion", "tuned-text")
                self.tuned_status = gr.HTML(render.no_status(), js_on_load=None, elem_id="tuned-status")
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
            render.strength_note, self.strength, self.strength_note, trigger_mode="always_last", **quick, preprocess=False
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
