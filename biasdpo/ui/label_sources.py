"""What is to be judged: where prompts and pairs come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from biasdpo import label, prompts
from biasdpo.dataset.pairs import shown_pair_id
from biasdpo.errors import BackendError, BiasDPOError, ConfigError
from biasdpo.label import BlindPair
from biasdpo.label_queue import Recipe
from biasdpo.prompts import Prompt
from biasdpo.records import Sampling, check_strength
from biasdpo.ui import render
from biasdpo.ui.label_sessions import LabelSession
from biasdpo.ui.label_view import LabelView, Updates
from biasdpo.ui.store import Row

SECOND_OPINION = "second_opinion"


class SourceActions(LabelView):
    """Handlers of Begin, the template editor and pasted pairs."""

    def begin_judging(
        self,
        who: Any,
        kind: str,
        lines: str,
        file: str | None,
        template: str,
        groups: str,
        traits: str,
        template_category: str,
        source: str,
        max_new_tokens: Any,
        temperature: Any,
        model: str,
        adapter: str,
        system: str,
        strength: Any,
        request: gr.Request,
    ) -> Updates:
        """Begin, or begin again with other prompts or pairs."""
        session = self.sessions.of(request.session_hash)
        try:
            annotator = self._annotator(who)
            if source == SECOND_OPINION:
                pairs = self.second_opinions(annotator, session)
                with session.lock:
                    session.given.clear()
                    session.given.extend(pairs)
                    session.show(None)
                told = f"{len(pairs):,} pairs that others judged and you did not."
            else:
                found = self._prompts(kind, lines, file, template, groups, traits, template_category)
                if source not in label.PAIR_SOURCES:
                    raise ConfigError(f"A source of pairs is one of {', '.join(label.PAIR_SOURCES)}: got {source!r}; choose one")
                key = self.pick_key(model, adapter)
                if key is None:
                    raise BackendError("The model is still being chosen: press Begin again in a moment")
                sampling = Sampling(max_new_tokens, temperature)
                if source != "base_tuned" and sampling.temperature == 0:
                    raise ConfigError(
                        "Two samples of one side need a temperature above 0: got 0, which writes the same twice; raise it"
                    )
                with session.lock:
                    session.given.clear()
                    session.queue.begin(Recipe(tuple(found), source, key, sampling, system or "", check_strength(strength)))
                    session.show(None)
                told = f"{len(found):,} prompts, the thinnest cell of the coverage matrix first."
        except BiasDPOError as exc:
            return {self.source_notice: render.error(str(exc))}
        with session.lock:
            return {self.source_notice: render.note(told), self.last: ""} | self._next(session, annotator)

    def _prompts(
        self, kind: str, lines: str, file: str | None, template: str, groups: str, traits: str, category: str
    ) -> list[Prompt]:
        if kind == "examples":
            return prompts.shipped()
        if kind == "list":
            if file:
                return prompts.of_file(Path(file))
            return prompts.of_text(lines or "")
        if kind == "dataset":
            return prompts.of_rows(self.store.standing())
        if kind == "template":
            return prompts.expand(template or "", (groups or "").splitlines(), (traits or "").splitlines(), category or "")
        raise ConfigError(f"Prompts come from examples, list, dataset or template: got {kind!r}; choose one")

    def second_opinions(self, annotator: str, session: LabelSession) -> list[BlindPair]:
        """The pairs that others judged and this annotator did not, in random order and with random sides."""
        rows = [row for row in self.store.standing() if not row["repeat_of"] and row["verdict"] != "retracted"]
        own = {shown_pair_id(row) for row in rows if row["annotator"] == annotator}
        others: dict[str, Row] = {}
        for row in rows:
            if row["annotator"] != annotator and shown_pair_id(row) not in own:
                others.setdefault(shown_pair_id(row), row)
        if not others:
            raise ConfigError(
                "No pairs for a second opinion: nobody else has judged a pair that you have not; choose another source"
            )
        pairs = [label.second_opinion(row, session.rng) for row in others.values()]
        session.rng.shuffle(pairs)
        return pairs

    def fill_groups(self, category: str) -> tuple[str, str]:
        """The template editor's lists for a category."""
        lists = prompts.group_lists().get(category, {})
        return "\n".join(lists.get("groups", [])), "\n".join(lists.get("traits", []))

    def paste_pair(self, who: Any, text: str, one: str, other: str, category: str, group: str, request: gr.Request) -> Updates:
        """Judge a pair that somebody brought along, now."""
        session = self.sessions.of(request.session_hash)
        try:
            self._annotator(who)
            prompt = Prompt((text or "").strip(), category or "", (group or "").strip())
            pair = label.pasted(prompt, one or "", other or "", session.rng)
        except BiasDPOError as exc:
            return {self.source_notice: render.error(str(exc))}
        with session.lock:
            session.show_before(pair)
            return {self.source_notice: render.note("Your pair is shown, its sides in random order.")} | self._shown(session)
