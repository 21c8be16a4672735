"""What the Label tab shows of a session: the pair that is on, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from biasdpo.engines import EngineKey
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.ui import identity, label_render, render
from biasdpo.ui.label_sessions import LabelSession, LabelSessions
from biasdpo.ui.store import Store

Updates = dict[Any, Any]


class LabelView:
    """The tab's components, and what is written into them."""

    sessions: LabelSessions
    store: Store
    pick_key: Callable[[str, str], EngineKey | None]
    identity: gr.BrowserState
    gate: gr.Column
    work: gr.Column
    pseudonym: gr.Textbox
    gate_notice: gr.HTML
    meter: gr.HTML
    prompt: gr.HTML
    empty: gr.HTML
    pair_area: gr.Column
    details_area: gr.Column
    token: gr.Textbox
    left: gr.Textbox
    right: gr.Textbox
    left_diff: gr.HTML
    right_diff: gr.HTML
    length_note: gr.HTML
    side_diff: gr.HTML
    editing: gr.Checkbox
    category: gr.Dropdown
    target_group: gr.Textbox
    note: gr.Textbox
    notice: gr.HTML
    last: gr.HTML
    timer: gr.Timer
    coverage: gr.HTML
    consistency: gr.HTML
    mine: gr.Dropdown
    mine_notice: gr.HTML
    source_notice: gr.HTML
    begin: gr.Button

    def _annotator(self, who: Any) -> str:
        annotator = identity.annotator_of(who)
        if not annotator:
            raise ConfigError("Nobody has agreed yet: write a pseudonym on the Label tab and agree to what is stored")
        return annotator

    def _meter(self) -> str:
        try:
            return label_render.meter(self.store.confounds())
        except BiasDPOError as exc:
            return render.error(str(exc))

    def _next(self, session: LabelSession, annotator: str) -> Updates:
        session.next(annotator)
        return self._shown(session)

    def _news(self, session: LabelSession, token: str) -> Updates:
        """As `_shown`, but nothing where the page has this pair already: that would undo what is being edited there."""
        if session.shown is not None and (token == session.token or session.was_just_sent()):
            return {self.timer: gr.skip()}
        return self._shown(session)

    def _shown(self, session: LabelSession) -> Updates:
        """The pair that is on, or why there is none."""
        pair = session.shown
        session.sent()
        if pair is None:
            waits = session.queue.begun and session.queue.error is None
            if waits:
                told = label_render.waiting(session.queue.latest, session.queue.loading())
            elif session.queue.error is not None:
                told = render.error(str(session.queue.error))
            else:
                told = render.note("No pair is waiting: choose prompts and pairs, and press Begin.")
            return {
                self.notice: told,
                self.timer: gr.Timer(active=waits),
                # What was on stays in its place, empty: a button that went away would take the focus with it.
                self.prompt: label_render.prompt(None),
                self.left: gr.update(value="", interactive=False),
                self.right: gr.update(value="", interactive=False),
                self.left_diff: "",
                self.right_diff: "",
                self.empty: gr.update(visible=not session.queue.begun and not session.judged),
                self.token: "",
                self.begin: _begin_title(session),
            }
        return {
            self.notice: "",
            self.timer: gr.Timer(active=False),
            self.pair_area: gr.update(visible=True),
            self.details_area: gr.update(visible=True),
            self.empty: gr.update(visible=False),
            self.begin: _begin_title(session),
            self.token: session.token,
            self.prompt: label_render.prompt(pair.prompt),
            self.left: gr.update(value=pair.left, interactive=False),
            self.right: gr.update(value=pair.right, interactive=False),
            self.editing: False,
            self.left_diff: "",
            self.right_diff: "",
            self.length_note: "",
            self.side_diff: label_render.side_diff(pair.left, pair.right, ("left", "right")),
            self.category: pair.prompt.category or None,
            self.target_group: pair.prompt.target_group,
            self.note: "",
        }


def _begin_title(session: LabelSession) -> str:
    return "Begin again" if session.queue.begun else "Begin"
