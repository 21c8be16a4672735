"""What the Label tab's buttons and keys do: validate, call one function, render."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

import gradio as gr

from biasdpo import label
from biasdpo.errors import BackendError, BiasDPOError
from biasdpo.label import Answer, Details
from biasdpo.ui import identity, label_render, render
from biasdpo.ui.label_mine import MineActions
from biasdpo.ui.label_sessions import LabelSession
from biasdpo.ui.label_sources import SourceActions
from biasdpo.ui.label_view import Updates


class LabelActions(SourceActions, MineActions):
    """The handlers. Every one answers for one visitor; their sessions lie in `sessions`."""

    # Who judges

    def open_page(self, who: Any) -> Updates:
        """The page was opened: whoever agreed before goes on at once."""
        annotator = identity.annotator_of(who)
        return {
            self.gate: gr.update(visible=not annotator),
            self.work: gr.update(visible=bool(annotator)),
            self.meter: self._meter(),
        }

    def open_tab(self, token: str, request: gr.Request) -> Updates:
        """The tab was chosen: others may have judged meanwhile, and a pair may have been sent here."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            return {self.meter: self._meter()} | self._news(session, token)

    def agree(self, pseudonym: str) -> Updates:
        """Consent, with a pseudonym."""
        if not isinstance(pseudonym, str) or not pseudonym.strip():
            return {
                self.gate_notice: render.error(
                    "A pseudonym is needed, so that your judgments can be told from others': write any"
                )
            }
        return {
            self.identity: identity.agreed(pseudonym),
            self.gate: gr.update(visible=False),
            self.work: gr.update(visible=True),
            self.gate_notice: "",
        }

    def change_pseudonym(self) -> Updates:
        """Back to the gate."""
        return {
            self.identity: {"annotator": "", "consent": ""},
            self.gate: gr.update(visible=True),
            self.work: gr.update(visible=False),
        }

    # Judging

    def answering(self, answer: Answer) -> Callable[..., Updates]:
        """The handler of one verdict's button."""

        def judge(request: gr.Request, *said: Any) -> Updates:
            return self.answer(answer, request, *said)

        return judge

    def answer(
        self,
        answer: Answer,
        request: gr.Request,
        who: Any,
        token: str,
        editing: bool,
        left: str,
        right: str,
        category: str | None,
        group: str | None,
        note: str | None,
        reveal: bool,
    ) -> Updates:
        """A verdict: store it, then show the next pair. Where it can't be stored, the pair stays and the same verdict may be
        given again."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            if session.shown is None or token != session.token:
                return self._of_no_pair(session, token)
            try:
                annotator = self._annotator(who)
                details = Details(category or "", group or "", note or "", annotator)
                judged = session.store_answer(answer, details, left if editing else None, right if editing else None)
            except BiasDPOError as exc:
                return {self.notice: render.error(str(exc))}
            except Exception as exc:  # a fault of ours: one line for the visitor, the trace for the terminal
                traceback.print_exc(file=sys.stderr)
                fault = BackendError(f"Not stored: the app failed ({type(exc).__name__}: {exc}); give the verdict again")
                return {self.notice: render.error(str(fault))}
            told = label_render.saved(judged.judgment, judged.pair, bool(reveal), len(session.judged))
            try:
                return {self.last: told, self.meter: self._meter()} | self._next(session, annotator)
            except BiasDPOError as exc:  # it is stored; the next pair is what failed
                return {self.last: told} | self._shown(session) | {self.notice: render.error(str(exc))}

    def _of_no_pair(self, session: LabelSession, token: str) -> Updates:
        """An answer to a pair that is not on: a key pressed twice, a page that missed an answer of ours, an app that was started
        again meanwhile."""
        if token and not session.has_shown:
            return {self.notice: render.error("The app was started again, and this pair's origin is gone: press Begin")}
        return self._news(session, token)

    def skip(self, who: Any, token: str, request: gr.Request) -> Updates:
        """Show the next pair; nothing is stored of this one."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            if session.shown is None or token != session.token:
                return self._of_no_pair(session, token)
            session.skipped += 1
            session.show(None)
            told = render.note(f"Skipped: nothing was stored. {session.skipped} skipped so far.")
            return {self.last: told} | self._next(session, identity.annotator_of(who))

    def undo(self, who: Any, reveal: bool, request: gr.Request) -> Updates:
        """Take the last verdict back and show its pair again, with what was said and written."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            try:
                judged = session.undo(revealed=bool(reveal))
            except BiasDPOError as exc:
                return {self.notice: render.error(str(exc))}
            told = render.note("Taken back: judge this pair again, or skip it.")
            shown = self._shown_again(session, judged) | self._boxes(session, identity.annotator_of(who))
            return {self.last: told, self.meter: self._meter()} | shown

    def watch(self, token: str, request: gr.Request) -> Updates:
        """A tick of the clock while the next pair is being written."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            if session.shown is None:
                session.take()
            return self._news(session, token)

    def change_editing(self, editing: bool, request: gr.Request) -> Updates:
        """Edit mode on or off; off brings back what was generated."""
        pair = self.sessions.of(request.session_hash).shown
        updates: Updates = {self.left_diff: "", self.right_diff: "", self.length_note: ""}
        for box, text in ((self.left, pair.left if pair else ""), (self.right, pair.right if pair else "")):
            updates[box] = gr.update(interactive=bool(editing)) if editing else gr.update(value=text, interactive=False)
        if editing and pair is not None:
            updates[self.length_note] = label_render.warning(label.length_warning(pair.left, pair.right))
        return updates

    def show_edit(self, editing: bool, left: str, right: str, request: gr.Request) -> Updates:
        """While somebody edits: what has changed, and whether one has grown too long."""
        pair = self.sessions.of(request.session_hash).shown
        if pair is None or not editing:
            return {self.left_diff: "", self.right_diff: "", self.length_note: ""}
        return self._edits(pair, left or "", right or "")
