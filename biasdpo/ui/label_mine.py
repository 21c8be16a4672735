"""After judging: the coverage matrix, one's own judgments, and how consistent they are."""

from __future__ import annotations

from typing import Any

import gradio as gr

from biasdpo import dataset, prompts
from biasdpo.errors import BiasDPOError, ConfigError, RefusedError
from biasdpo.ui import identity, label_render, render
from biasdpo.ui.label_view import LabelView, Updates
from biasdpo.ui.store import Row
from biasdpo.workspace import is_public_space

_LISTED = 200  # of one's own judgments


class MineHandlers(LabelView):
    """Handlers of the accordions below the pair."""

    def show_coverage(self) -> Updates:
        """The coverage matrix."""
        return {self.coverage: label_render.coverage(self.store.counts(), prompts.CATEGORIES)}

    def show_mine(self, who: Any, request: gr.Request) -> Updates:
        """An annotator's own judgments, newest first, and how consistent they are."""
        annotator = identity.annotator_of(who)
        rows = self.store.judged_by(annotator)
        if is_public_space():  # pseudonyms prove nothing there: a visitor sees what this very page has stored
            made = self._made_here(request)
            rows = [row for row in rows if row["id"] in made]
        choices = [(_line(row), row["id"]) for row in reversed(rows[-_LISTED:])]
        agreement = self.store.agreement()
        own = agreement.self_consistency.get(annotator, (0, 0))
        told = label_render.consistency(annotator, own, agreement.alpha, agreement.pairs)
        shown = gr.update(
            choices=choices, value=None, label=f"My judgments ({len(rows):,}, the latest {min(len(rows), _LISTED)} listed)"
        )
        return {self.mine: shown, self.consistency: told, self.mine_notice: gr.skip()}

    def _made_here(self, request: gr.Request) -> set[str]:
        return {judged.judgment.id for judged in self.sessions.of(request.session_hash).judged}

    def withdraw(self, who: Any, judgment_id: str | None, request: gr.Request) -> Updates:
        """Take back one of my own judgments."""
        try:
            annotator = self._annotator(who)
            if is_public_space() and judgment_id not in self._made_here(request):
                raise RefusedError("Only what this page has stored can be withdrawn on a public Space: ask the Space's owner")
            row = next((row for row in self.store.judged_by(annotator) if row["id"] == judgment_id), None)
            if row is None:
                raise ConfigError("No judgment of yours is chosen: choose one from the list")
            dataset.undo(self.store.workspace, row["id"], row["pair_id"], annotator)
        except BiasDPOError as exc:
            return {self.mine_notice: render.error(str(exc))}
        session = self.sessions.of(request.session_hash)
        with session.lock:
            session.judged = [judged for judged in session.judged if judged.judgment.id != judgment_id]
        return self.show_mine(who, request) | {
            self.mine_notice: render.note("Withdrawn: training no longer sees it. The journal keeps a row that says so."),
            self.meter: self._meter(),
        }


def _line(row: Row) -> str:
    said = {"tie": "tie", "both_biased": "both biased"}.get(row["verdict"]) or f"chose “{_short(row['chosen'], 50)}”"
    return f"{row['created_at'][:16].replace('T', ' ')} · {_short(row['prompt'], 60)} · {said}"


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
