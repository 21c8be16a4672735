"""What the Label tab shows of a session: the pair that is on, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from biasdpo import label, prompts
from biasdpo.engines import EngineKey
from biasdpo.errors import BiasDPOError, ConfigError
from biasdpo.label import BlindPair
from biasdpo.ui import identity, label_render, render
from biasdpo.ui.label_sessions import Judged, LabelSession, LabelSessions
from biasdpo.ui.store import Row, Store
from biasdpo.workspace import is_public_space

Updates = dict[Any, Any]
_LISTED = 200  # of one's own judgments


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
            problem = "" if self.store.overlap_error is None else f"Overlap is not counted: {self.store.overlap_error}"
            return label_render.meter(self.store.confounds(), problem)
        except BiasDPOError as exc:
            return render.error(str(exc))

    def _next(self, session: LabelSession, annotator: str) -> Updates:
        session.next(annotator)
        return self._shown(session) | self._boxes(session, annotator)

    def _boxes(self, session: LabelSession, annotator: str) -> Updates:
        """The accordions that are open, up to date."""
        shown: Updates = {}
        if "coverage" in session.open_boxes:
            shown |= self._coverage()
        if "mine" in session.open_boxes:
            shown |= self._mine(session, annotator)
        return shown

    def _news(self, session: LabelSession, token: str) -> Updates:
        """As `_shown`, but nothing where the page has this pair already: that would undo what is being edited there."""
        if session.shown is not None and (token == session.token or session.was_just_sent()):
            return {self.timer: gr.skip()}
        return self._shown(session)

    def _shown_again(self, session: LabelSession, judged: Judged) -> Updates:
        """As `_shown`, with what the annotator had said and written before they took it back."""
        pair, details = judged.pair, judged.details
        shown = self._shown(session) | {
            self.category: details.category or None,
            self.target_group: details.target_group,
            self.note: details.note,
        }
        if judged.left is not None or judged.right is not None:
            left, right = judged.left or pair.left, judged.right or pair.right
            shown |= {
                self.editing: True,
                self.left: gr.update(value=left, interactive=True),
                self.right: gr.update(value=right, interactive=True),
            } | self._edits(pair, left, right)
        return shown

    def _edits(self, pair: BlindPair, left: str, right: str) -> Updates:
        """What an edit has changed, and whether one completion has grown too long."""
        return {
            self.left_diff: label_render.edit_diff(pair.left, left),
            self.right_diff: label_render.edit_diff(pair.right, right),
            self.length_note: label_render.warning(label.length_warning(left, right)),
        }

    # What stands in the accordions

    def _coverage(self) -> Updates:
        lists = prompts.group_lists()
        offered = [(category, group) for category in lists for group in lists[category]["groups"]]
        return {self.coverage: label_render.coverage(self.store.counts(), prompts.CATEGORIES, offered)}

    def _mine(self, session: LabelSession, annotator: str) -> Updates:
        rows = self.store.judged_by(annotator)
        if is_public_space():  # pseudonyms prove nothing there: a visitor sees what this very page has stored
            made = {judged.judgment.id for judged in session.judged}
            rows = [row for row in rows if row["id"] in made]
        agreement = self.store.agreement()
        own = agreement.self_consistency.get(annotator, (0, 0))
        title = f"My judgments ({len(rows):,}, the latest {min(len(rows), _LISTED)} listed)"
        return {
            self.mine: gr.update(choices=[(_line(row), row["id"]) for row in reversed(rows[-_LISTED:])], value=None, label=title),
            self.consistency: label_render.consistency(annotator, own, agreement.alpha, agreement.pairs),
        }

    def _shown(self, session: LabelSession) -> Updates:
        """The pair that is on, or why there is none."""
        pair = session.shown
        session.sent()
        if pair is None:
            waits = session.goes_on
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
                self.empty: gr.update(visible=not session.queue.begun and not session.has_shown),
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


def _line(row: Row) -> str:
    said = {"tie": "tie", "both_biased": "both biased"}.get(row["verdict"]) or f"chose “{_short(row['chosen'], 50)}”"
    return f"{row['created_at'][:16].replace('T', ' ')} · {_short(row['prompt'], 60)} · {said}"


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
