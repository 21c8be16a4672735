"""The panel of one evaluation: what its buttons and pickers do. What it shows is in `evaluate_view`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import gradio as gr

from biasdpo import evaluations
from biasdpo.errors import BiasDPOError, ConfigError, EvaluationError
from biasdpo.evaluations import Evaluation, report
from biasdpo.evaluations.flips import Flip, flips
from biasdpo.ui import evaluate_flips, render
from biasdpo.ui.evaluate_view import EvaluationsView
from biasdpo.ui.evaluate_words import setup
from biasdpo.ui.label_sessions import LabelSessions
from biasdpo.ui.news import Updates
from biasdpo.workspace import is_public_space, refuse_on_public_space

_MOST_SAVED = 6  # results side by side in one report


class EvaluationActions(EvaluationsView):
    """The handlers of one evaluation."""

    sessions: LabelSessions
    pick_compared: Callable[[str, str], Updates]
    compare_prompt: gr.Textbox

    def cancel(self, evaluation_id: Any) -> Updates:
        """Ask it to end; what it has scored becomes its result."""
        try:
            refuse_on_public_space("Cancelling an evaluation")
            evaluations.cancel(self.one(evaluation_id))
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        return {self.notice: render.note("Asked to end: what is scored so far is kept and shown. Asked twice, it is killed.")}

    def resume(self, evaluation_id: Any) -> Updates:
        """Go on; what was scored is not scored again."""
        try:
            refuse_on_public_space("Evaluation")
            evaluations.resume(self.one(evaluation_id), self.workspace)
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        return self.show_one(str(evaluation_id), render.note("Goes on: what was scored is read from the cache."))

    def to_card(self, evaluation_id: Any) -> Updates:
        """Put the report into the adapter's card."""
        try:
            refuse_on_public_space("Writing a card")
            one = self.one(evaluation_id)
            result = self.results.of(one)
            report.add_to_card(result, self.workspace, one.request.command() if one.request is not None else ())
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        return {self.notice: render.note(f"The card (README.md) of {setup(result)[1]} now has the section “Evaluation”.")}

    def open_in_compare(self, evaluation_id: Any) -> Updates:
        """The Compare tab, with the model and the adapter that were measured."""
        try:
            picked = self._picked(self.one(evaluation_id))
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        return picked

    def _picked(self, one: Evaluation) -> Updates:
        model, adapter = setup(self.results.of(one))
        if one.request is not None:
            model, adapter = one.request.model, one.request.adapter
        return self.pick_compared(model, adapter or "none") | {self.tabs: gr.Tabs(selected="compare")}

    # What is shown of a result

    def pick_bars(self, evaluation_id: Any, picked: Any) -> str:
        """Another metric by group."""
        try:
            return self.drawn_bars(self.results.of(self.one(evaluation_id)), _named(picked))
        except BiasDPOError as exc:
            return render.error(str(exc))

    def pick_plane(self, evaluation_id: Any, picked: Any) -> str:
        """Another metric by strength."""
        try:
            return self.drawn_plane(self.results.of(self.one(evaluation_id)), _named(picked))
        except BiasDPOError as exc:
            return render.error(str(exc))

    def pick_flips(self, evaluation_id: Any, benchmark: Any) -> Updates:
        """Another benchmark's flips, all of them."""
        return self.filter_flips(evaluation_id, benchmark, "")

    def filter_flips(self, evaluation_id: Any, benchmark: Any, wanted: Any) -> Updates:
        """Those that flipped one way."""
        return self.more_flips(evaluation_id, benchmark, wanted, 0)

    def more_flips(self, evaluation_id: Any, benchmark: Any, wanted: Any, most: Any) -> Updates:
        """A page more of them."""
        try:
            result = self.results.of(self.one(evaluation_id))
            shown = (most if isinstance(most, int) and most >= 0 else 0) + evaluate_flips.PAGE
            return self.drawn_flips(result, _named(benchmark), wanted if isinstance(wanted, str) else "", shown)
        except BiasDPOError as exc:
            return {self.flips: render.error(str(exc))}

    def take_flip(self, evaluation_id: Any, benchmark: Any, event: gr.EventData, request: gr.Request) -> Updates:
        """One item to the Compare tab (its prompt, this model and adapter) or to the Label tab (its two texts)."""
        asked = event._data if isinstance(event._data, dict) else {}
        try:
            one = self.one(evaluation_id)
            flip = self._flip(one, _named(benchmark), asked.get("id"))
            if asked.get("to") == "compare":
                return self._picked(one) | {self.compare_prompt: evaluate_flips.prompt_of(flip.texts)}
            session = self.sessions.of(request.session_hash)
            with session.lock:
                session.show_before(evaluate_flips.to_judge(flip, session.rng))
        except BiasDPOError as exc:
            return {self.notice: render.error(str(exc))}
        if benchmark != "preference":
            gr.Warning("This is a benchmark’s item: whoever trains on it can no longer measure with it.")
        return {self.tabs: gr.Tabs(selected="label"), self.notice: ""}

    def _flip(self, one: Evaluation, benchmark: str, index: Any) -> Flip:
        found = next((flip for flip in flips(self.results.of(one), benchmark) if str(flip.index) == str(index)), None)
        if found is None:
            raise EvaluationError(f"No flipped item {index!r:.20} of {benchmark} in {one.id}: choose one of the list")
        return found

    # Files

    def saved(self, asked: Any) -> dict[str, str]:
        """A result as a file, or several side by side. `asked`: {"kind": "md", "csv" or "json", "ids": evaluation ids}."""
        kind, ids = (asked.get("kind"), asked.get("ids")) if isinstance(asked, dict) else (None, None)
        if kind not in ("md", "csv", "json") or not isinstance(ids, list) or not 1 <= len(ids) <= _MOST_SAVED:
            raise ConfigError(f"A kind of file and evaluations are needed: got {asked!r:.80}; use the page's own button")
        found = [(one, self.results.of(one)) for one in map(self.one, ids)]
        (one, result), *others = found
        name = one.id if not others else f"{one.id}-and-{len(others)}-more"
        if kind == "md":
            command = one.request.command() if one.request is not None and not is_public_space() else ()
            labelled = [(other.id, its) for other, its in found]
            text = report.markdown(labelled) if others else report.markdown(result, command)
        elif kind == "csv":
            text = _csv(report.csv_rows(result))
        else:
            text = json.dumps(result, ensure_ascii=False, indent=1)
        return {"name": f"{name}.{kind}", "text": text}


def _csv(rows: list[dict[str, Any]]) -> str:
    written = io.StringIO()
    writer = csv.DictWriter(written, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def _named(picked: Any) -> str:
    return picked if isinstance(picked, str) else ""
