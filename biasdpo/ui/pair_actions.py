"""What the Compare tab does with a finished pair: word diff, history, a verdict on the spot, or blind on the Label tab."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import gradio as gr

from biasdpo import dataset, label, prompts
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.label import Answer, BlindPair, Details
from biasdpo.prompts import Prompt
from biasdpo.records import GenerationPair
from biasdpo.ui import identity, label_render, render
from biasdpo.ui.label_sessions import LabelSessions
from biasdpo.ui.store import Store

Updates = dict[Any, Any]
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
            drawn = label_render.side_diff(pair.left.text, pair.right.text, ("base", "tuned"))
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
            return {self.notice: render.note("No pair is chosen: generate one, or choose one of the history.")}
        shown: Updates = {
            self.pair: pair,
            self.prompt: pair.prompt,
            self.last_prompt: pair.prompt,
            self.seed: pair.sampling.seed,
            self.base_head: render.pane_head("Base", render.settings_used(pair.sampling), "base-text"),
            self.base_text: pair.left.text,
            self.base_status: render.status(pair.left),
            self.notice: render.note(f"From the history: {pair.model} with {pair.adapter or 'no adapter'}."),
        }
        if pair.right is None:
            shown |= {self.tuned_text: "", self.tuned_status: render.no_status()}
        else:
            detail = render.tuned_detail(pair.adapter, pair.strength)
            shown |= {
                self.tuned_head: render.pane_head("DPO-tuned", detail, "tuned-text"),
                self.tuned_text: pair.right.text,
                self.tuned_status: render.status(pair.right),
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
            annotator = identity.annotator_of(who)
            if not annotator:
                raise ConfigError("Nobody has agreed yet: write a pseudonym on the Label tab and agree to what is stored")
            made = label.judgment(shown, answer, Details(category or "", "", "", annotator))
            same = [row for row in self.store.judged_by(annotator) if row["pair_id"] == made.pair_id and not row["repeat_of"]]
            if same:
                raise ConfigError("You have judged this pair already: withdraw that judgment on the Label tab to judge it anew")
            dataset.append(self.store.workspace, made)
        except BiasDPOError as exc:
            return {self.judge_notice: render.error(str(exc))}
        side = made.meta.chosen_side
        said = {"base": "base is less biased", "tuned": "tuned is less biased"}.get(side) or label_render.VERDICTS[answer].lower()
        return {
            self.judge_notice: render.note(f"Stored: {said}. Sides were known, so it is marked as judged on the Compare tab.")
        }

    def send_to_label(self, pair: GenerationPair | None, category: str | None, request: gr.Request) -> Updates:
        """The pair at hand becomes the next on the Label tab, to be edited there, its sides in random order but known."""
        session = self.sessions.of(request.session_hash)
        try:
            known = sides_known(pair, category)
        except BiasDPOError as exc:
            return {self.judge_notice: render.error(str(exc))}
        with session.lock:
            session.show_before(known.swapped() if session.rng.random() < 0.5 else known)
        return {self.judge_notice: render.note("It is the next pair on the Label tab."), self.tabs: gr.Tabs(selected="label")}


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
    return replace(label.known(pair, Prompt(pair.prompt, category or "")), sides_known=True)
