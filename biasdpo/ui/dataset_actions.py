"""What the Data set tab does with the journal: search, pages, one judgment in full, withdrawal, counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from biasdpo import dataset
from biasdpo.dataset import Page, Query
from biasdpo.dataset.counts import count
from biasdpo.errors import BiasDPOError, ConfigError, RefusedError
from biasdpo.ui import dataset_charts, dataset_render, identity, label_render, render
from biasdpo.ui.label_sessions import LabelSessions
from biasdpo.ui.store import Store
from biasdpo.workspace import is_public_space

Updates = dict[Any, Any]
PAGE_ROWS = 25
MAX_SEARCH_CHARACTERS = 200  # each word is looked for in every row
STATES = {"all": "All", "standing": "Standing", "retracted": "Withdrawn"}
FILTERS = ("category", "verdict", "annotator", "source")
_MOST_CHOICES = 300  # of one filter, the commonest: the search finds the others


@dataclass(frozen=True)
class View:
    """What a visitor looks at. The first three are the page's own states; the others come from outside, and `query` checks them.

    number              of the page of the table, from 0
    chosen              id of the judgment that is shown in full, or ""
    charts_open         whether the charts are in view
    category … source   "" filters nothing, "=VALUE" wants this value, "=" those that have none
    """

    number: int
    chosen: str
    charts_open: bool
    search: Any = ""
    category: Any = ""
    verdict: Any = ""
    annotator: Any = ""
    source: Any = ""
    state: Any = "all"

    def query(self) -> Query:
        """What to ask the table for; ConfigError for what no page of ours sends."""
        search = "" if self.search is None else self.search
        if not isinstance(search, str) or len(search) > MAX_SEARCH_CHARACTERS:
            raise ConfigError(f"A search is text of at most {MAX_SEARCH_CHARACTERS} characters: shorten it")
        if self.state not in (*STATES,):
            raise ConfigError(f"Show one of {', '.join(STATES)}: got {self.state!r}; choose one")
        category, verdict, annotator, source = (_wanted(name, getattr(self, name)) for name in FILTERS)
        return Query(search, category, verdict, annotator, source, self.state)


def _wanted(name: str, value: Any) -> str | None:
    if value in ("", None):
        return None
    if not isinstance(value, str) or not value.startswith("="):
        raise ConfigError(f"The filter {name} is none of its choices: choose one")
    return value[1:]


class DatasetActions:
    """The handlers. `View` is what each is told of the page, in the order of its fields."""

    store: Store
    sessions: LabelSessions
    meter: gr.HTML
    trouble: gr.HTML
    empty: gr.HTML
    browse: gr.Column
    filters: list[gr.Dropdown]
    position: gr.HTML
    next_button: gr.Button
    table: gr.HTML
    number: gr.State
    chosen: gr.State
    asked: gr.State
    detail_box: gr.Column
    detail_head: gr.HTML
    detail: gr.HTML
    detail_notice: gr.HTML
    withdraw_button: gr.Button
    confirm_box: gr.Row
    charts_open: gr.State
    charts: gr.HTML

    # The table

    def show_meter(self) -> Updates:
        """The confound meter, apart from the table: of a large journal it takes longer, the first time."""
        try:
            return {self.meter: label_render.meter(self.store.confounds())}
        except BiasDPOError as exc:
            return {self.meter: render.error(str(exc))}

    def open_tab(self, *view: Any) -> Updates:
        """Everything else as it is now: the tab was chosen, or the journal has changed."""
        seen = View(*view)
        try:
            choices = self.store.choices()
            known = bool(choices["verdict"])
            shown: Updates = {
                self.trouble: dataset_render.trouble(self.store.bad_lines(), dataset.repaired_lines(self.store.workspace)),
                self.empty: gr.update(visible=not known),
                self.browse: gr.update(visible=known),
            }
        except BiasDPOError as exc:
            return {self.trouble: render.error(str(exc))}
        for box, name in zip(self.filters, FILTERS, strict=True):
            shown[box] = gr.update(choices=_choices(name, choices[name]))
        if seen.charts_open:
            shown |= self.show_charts()
        if seen.chosen:  # others may have withdrawn it
            shown |= self._detail(seen.chosen)
        return shown | self._table(seen, seen.number)

    def search(self, *view: Any) -> Updates:
        """Another search or filter: its first page."""
        return self._table(View(*view), 0)

    def turn(self, event: gr.EventData, *view: Any) -> Updates:
        """To the next page, or back, whichever button was pressed. One handler, so that two of its answers can't cross."""
        seen = View(*view)
        return self._table(seen, seen.number + (1 if event.target is self.next_button else -1))

    def _table(self, seen: View, number: int) -> Updates:
        try:
            page: Page = self.store.page(seen.query(), number, PAGE_ROWS)
        except BiasDPOError as exc:
            return {self.position: render.error(str(exc))}
        return {
            self.number: page.number,
            self.position: dataset_render.position(page, PAGE_ROWS),
            self.table: dataset_render.table(page, seen.chosen),
        }

    # One judgment

    def choose(self, event: gr.EventData) -> Updates:
        """A row was chosen: show its judgment in full."""
        wanted = event._data.get("id") if isinstance(event._data, dict) else None
        return self._detail(wanted) | {self.detail_notice: ""} | self.keep()

    def _detail(self, judgment_id: Any) -> Updates:
        try:
            found = self.store.judgment(judgment_id) if isinstance(judgment_id, str) else None
        except BiasDPOError as exc:
            return {self.position: render.error(str(exc))}
        if found is None:
            return {self.position: render.error("This judgment is not in the journal any more: choose another")}
        row, retraction = found
        return {
            self.chosen: row["id"],
            self.detail_box: gr.update(visible=True),
            self.detail_head: dataset_render.detail_head(row, retraction),
            self.detail: dataset_render.detail(row, retraction),
            self.withdraw_button: gr.update(visible=retraction is None),
        }

    def close_detail(self, *view: Any) -> Updates:
        """Put the judgment away."""
        seen = replace(View(*view), chosen="")
        return {self.chosen: "", self.detail_box: gr.update(visible=False)} | self._table(seen, seen.number)

    def ask(self, chosen: str) -> Updates:
        """Ask before withdrawing: the answer is of this judgment, whichever is chosen meanwhile."""
        return {self.asked: chosen, self.confirm_box: gr.update(visible=True)}

    def keep(self) -> Updates:
        """Nothing is to be withdrawn."""
        return {self.asked: "", self.confirm_box: gr.update(visible=False)}

    def withdraw(self, who: Any, asked: str, request: gr.Request) -> Updates:
        """Take a judgment back: anyone's on one's own machine, on a public Space what this very page has stored."""
        session = self.sessions.of(request.session_hash)
        try:
            found = self.store.judgment(asked)
            if found is None:
                raise ConfigError("No judgment is chosen: choose one in the table")
            row, annotator = found[0], identity.annotator_of(who)
            if is_public_space():
                if asked not in {judged.judgment.id for judged in session.judged}:
                    raise RefusedError("Only what this page has stored can be withdrawn on a public Space: ask the Space's owner")
                dataset.undo(self.store.workspace, row["id"], row["pair_id"], row["annotator"], row["source"])
            else:
                dataset.retract(self.store.workspace, row["id"], annotator)
        except BiasDPOError as exc:
            return {self.detail_notice: render.error(str(exc))}
        with session.lock:
            session.judged = [judged for judged in session.judged if judged.judgment.id != asked]
        told = render.note("Withdrawn: training no longer sees it. The journal keeps a row that says so.")
        return self._detail(asked) | self.keep() | {self.detail_notice: told}

    # Counts

    def show_charts(self) -> Updates:
        """The charts were opened."""
        try:
            drawn = dataset_charts.charts(count(self.store.standing()))
        except BiasDPOError as exc:
            drawn = render.error(str(exc))
        return {self.charts: drawn, self.charts_open: True}


def _choices(name: str, counted: Counter[str]) -> list[tuple[str, str]]:
    words = dataset_render.VERDICTS if name == "verdict" else {"": f"(no {name})"}
    return [
        ("All", ""),
        *((f"{words.get(value, value)} ({number:,})", f"={value}") for value, number in counted.most_common(_MOST_CHOICES)),
    ]
