"""After judging: the coverage matrix, one's own judgments, and how consistent they are."""

from __future__ import annotations

from typing import Any

import gradio as gr

from biasdpo import dataset
from biasdpo.errors import BiasDPOError, ConfigError, RefusedError
from biasdpo.ui import identity, render
from biasdpo.ui.label_view import LabelView, Updates
from biasdpo.workspace import is_public_space


class MineActions(LabelView):
    """Handlers of the accordions below the pair."""

    def open_coverage(self, request: gr.Request) -> Updates:
        """Show the coverage matrix, and keep it up to date."""
        self.sessions.of(request.session_hash).open_boxes.add("coverage")
        return self._coverage()

    def close_coverage(self, request: gr.Request) -> None:
        """It is folded."""
        self.sessions.of(request.session_hash).open_boxes.discard("coverage")

    def open_mine(self, who: Any, request: gr.Request) -> Updates:
        """Show an annotator's own judgments, newest first, and how consistent they are; keep both up to date."""
        session = self.sessions.of(request.session_hash)
        session.open_boxes.add("mine")
        return self._mine(session, identity.annotator_of(who))

    def close_mine(self, request: gr.Request) -> None:
        """It is folded."""
        self.sessions.of(request.session_hash).open_boxes.discard("mine")

    def withdraw(self, who: Any, judgment_id: str | None, request: gr.Request) -> Updates:
        """Take back one of my own judgments."""
        session = self.sessions.of(request.session_hash)
        with session.lock:
            try:
                annotator = self._annotator(who)
                if is_public_space() and judgment_id not in {judged.judgment.id for judged in session.judged}:
                    raise RefusedError("Only what this page has stored can be withdrawn on a public Space: ask the Space's owner")
                row = next((row for row in self.store.judged_by(annotator) if row["id"] == judgment_id), None)
                if row is None:
                    raise ConfigError("No judgment of yours is chosen: choose one from the list")
                dataset.undo(self.store.workspace, row["id"], row["pair_id"], annotator)
            except BiasDPOError as exc:
                return {self.mine_notice: render.error(str(exc))}
            session.judged = [judged for judged in session.judged if judged.judgment.id != judgment_id]
            told = render.note("Withdrawn: training no longer sees it. The journal keeps a row that says so.")
            return {self.mine_notice: told, self.meter: self._meter()} | self._mine(session, annotator)
