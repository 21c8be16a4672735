"""The Data set tab: what it is made of and what sets off what. What the handlers do is in `dataset_actions` (the journal) and
`file_actions` (import, export)."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import date, timedelta
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from biasdpo.data import exporting, importing, journal
from biasdpo.data.exporting import Exported
from biasdpo.data.importing import HUB, ColumnMapping, ForeignPair, Imported, Preview, import_name, shown_columns
from biasdpo.data.journal import BadLine
from biasdpo.data.summary import Counts, Page, Query, count
from biasdpo.errors import BiasDPOError, ConfigError, RefusedError
from biasdpo.labeling import word_diff
from biasdpo.ui import components
from biasdpo.ui.components import Row, Store
from biasdpo.ui.label import LabelSessions
from biasdpo.workspace import ASSETS, is_public_space, refuse_on_public_space

# Dataset render


VERDICTS = {"preferred": "preferred", "tie": "tie", "both_biased": "both biased", "retracted": "withdrawn"}
MAX_DIFF_CHARACTERS = 4_000  # of each text: comparing two of 16,000 takes 16 s, of 4,000 half a second
_SHOWN_PROMPT = 200  # characters in the table's line
_COLUMNS = ("Prompt", "Verdict", "Category", "Annotator", "Source", "When (UTC)")


def empty() -> str:
    """The journal holds no judgment."""
    return (
        '<div class="bd-empty" role="note"><h2>No judgments yet</h2><p>Judge pairs on the <b>Label</b> tab, or bring some along '
        "under <b>Import</b> below: a file, a data set of the Hub, or the seed set that is shipped with BiasDPO.</p></div>"
    )


def trouble(bad_lines: int, repaired_lines: int) -> str:
    """Lines of the journal that are no rows, or were torn; nothing where there are none."""
    told = []
    if bad_lines:
        lines = "1 line of preferences.jsonl is" if bad_lines == 1 else f"{bad_lines:,} lines of preferences.jsonl are"
        told.append(f"{lines} no judgment, and not in this table: python -m biasdpo dataset validate says why.")
    if repaired_lines:
        lines = "1 line that was torn is" if repaired_lines == 1 else f"{repaired_lines:,} lines that were torn are"
        told.append(f"{lines} set aside in preferences.jsonl.torn: none of them had been acknowledged.")
    return components.warning(" ".join(told))


# The table


def position(page: Page, page_rows: int) -> str:
    """Which rows of how many are shown."""
    if page.total == 0:
        return '<div class="bd-position" role="status">Nothing found</div>'
    first = page.number * page_rows + 1
    rows = f"{first:,} to {first + len(page.rows) - 1:,} of <b>{page.total:,}</b>, the newest first"
    return f'<div class="bd-position" role="status">{rows} · page {page.number + 1:,} of {page.pages:,}</div>'


def table(page: Page, chosen: str) -> str:
    """A page of judgments. `chosen` is the id of the row that is shown beside it."""
    if not page.rows:
        return '<div class="bd-note">No judgment is like that: clear the search, or set a filter back to “All”.</div>'
    heads = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    # One row takes the focus from outside; arrows lead on from there (assets/page.js).
    reached = chosen if any(row["id"] == chosen for row in page.rows) else page.rows[0]["id"]
    rows = "".join(
        _line(row, row["id"] in page.retracted, is_chosen=row["id"] == chosen, is_reached=row["id"] == reached)
        for row in page.rows
    )
    return (
        '<div class="bd-rows-box"><table class="bd-rows" aria-label="Judgments: arrow keys go from row to row, Enter shows one">'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _line(row: Row, withdrawn: bool, *, is_chosen: bool, is_reached: bool) -> str:
    prompt = " ".join(row["prompt"].split())
    shown = prompt if len(prompt) <= _SHOWN_PROMPT else prompt[: _SHOWN_PROMPT - 1] + "…"
    marks = ' aria-current="true"' if is_chosen else ""
    marks += ' class="bd-withdrawn"' if withdrawn else ""
    category = " · ".join(part for part in (row["category"], row["target_group"]) if part)
    cells = "".join(
        f'<td title="{escape(text)}">{escape(text) or "–"}</td>'
        for text in (category, row["annotator"], row["source"], minute(row["created_at"]))
    )
    return (
        f'<tr data-id="{escape(row["id"])}"{marks}><td><button type="button" tabindex="{0 if is_reached else -1}">'
        f"{escape(shown)}</button></td><td>{_verdict(row, withdrawn)}</td>{cells}</tr>"
    )


def _verdict(row: Row, withdrawn: bool) -> str:
    verdict = "retracted" if withdrawn else row["verdict"]
    return f'<span class="bd-chip bd-is-{verdict}">{VERDICTS[verdict]}</span>'


def minute(created_at: str) -> str:
    """A time to the minute, as people read it."""
    return created_at[:16].replace("T", " ")


# One judgment


def detail_head(row: Row, retraction: Row | None) -> str:
    """What was judged and how, in chips."""
    chips = "".join(f'<span class="bd-chip">{escape(row[name])}</span>' for name in ("category", "target_group") if row[name])
    repeat = '<span class="bd-chip" title="shown again, to measure consistency">hidden repeat</span>' if row["repeat_of"] else ""
    return f'<div class="bd-detail-head"><h3>Judgment</h3>{_verdict(row, retraction is not None)}{chips}{repeat}</div>'


def detail(row: Row, retraction: Row | None) -> str:
    """A judgment in full: texts, word diff, edits, note, and where it comes from."""
    names = ("Chosen", "Rejected") if row["verdict"] == "preferred" else ("Left", "Right")
    kinds = ("bd-chosen", "bd-rejected") if row["verdict"] == "preferred" else ("", "")
    parts = [_text("Prompt", row["prompt"])]
    parts += [_text(name, row[column], kind) for name, column, kind in zip(names, ("chosen", "rejected"), kinds, strict=True)]
    if row["verdict"] == "preferred":
        parts.append(_diff("Word by word: rejected against chosen", row["rejected"], row["chosen"], ("rejected", "chosen")))
    else:
        parts.append(_diff("Word by word: left against right", row["chosen"], row["rejected"], ("left", "right")))
    for name, column in zip(names, ("chosen", "rejected"), strict=True):
        if row[f"original_{column}"]:
            title = f"{name} was edited before it was judged"
            parts.append(_diff(title, row[f"original_{column}"], row[column], ("before", "after the edit")))
    if row["note"]:
        parts.append(_text("Note", row["note"]))
    facts = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in provenance(row, retraction) if value)
    # Scrolls by itself beside the table, so the keyboard must get there.
    return (
        f'<div class="bd-detail-body" tabindex="0" role="region" aria-label="The judgment in full">{"".join(parts)}'
        f'<section><h4>Provenance</h4><dl class="bd-provenance">{facts}</dl></section></div>'
    )


def _text(title: str, text: str, kind: str = "") -> str:
    return f'<section><h4>{title}</h4><div class="bd-text {kind}">{escape(text)}</div></section>'


def _diff(title: str, one: str, other: str, names: tuple[str, str]) -> str:
    if max(len(one), len(other)) > MAX_DIFF_CHARACTERS:
        drawn = f'<div class="bd-note">Only texts of up to {MAX_DIFF_CHARACTERS:,} characters are compared word by word.</div>'
        if names[0] == "before":
            drawn += f'<div class="bd-text">{escape(one)}</div>'
    elif names[0] == "before":
        drawn = f'<div class="bd-diff">{components.diff(word_diff(one, other))}</div>'
    else:
        drawn = components.side_diff(one, other, names)
    return f"<section><h4>{title}</h4>{drawn}</section>"


def provenance(row: Row, retraction: Row | None) -> Iterable[tuple[str, str]]:
    """Name and value of everything that a row says of its origin; "" where it says nothing."""
    meta = row["meta"]
    yield "Judged", minute(row["created_at"]) + " UTC"
    yield "By", row["annotator"]
    yield "In", f"{meta['seconds']:.1f} s" if meta["seconds"] else ""
    yield "Source", row["source"]
    if retraction is not None:
        by = f" by {retraction['annotator']}" if retraction["annotator"] else ""
        yield "Withdrawn", f"{minute(retraction['created_at'])} UTC{by}"
    yield "Model", meta["model"]
    yield "Adapter", meta["adapter"]
    yield "Backend", meta["backend"]
    yield "Sampling", _sampling(meta["sampling"])
    yield "Seed", str(meta["seed"]) if meta["model"] else ""
    yield "Stood left", meta["left_side"]
    yield "Was chosen", meta["chosen_side"]
    yield "Repeats", row["repeat_of"] and f"pair {row['repeat_of']}"
    yield "Judgment", row["id"]
    yield "Pair", row["pair_id"]


def _sampling(text: str) -> str:
    """The settings in words, where they are the JSON that we write; else as they stand."""
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(settings, dict):
        return text
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if name != "seed" and value != "")


# Dataset charts


_MOST_BARS = 10  # of one chart; the rest are one bar together
_MOST_DAYS = 30
_LENGTHS = ("under ½", "½ to ¾", "¾ to 1", "the same", "1 to 1⅓", "1⅓ to 2", "over 2")


def charts(counts: Counts) -> str:
    """All charts, or a line where there is nothing to draw."""
    if not counts.judgments:
        return '<div class="bd-note">Nothing to count yet: no judgment stands.</div>'
    verdicts = [(VERDICTS[name], number) for name, number in counts.by_verdict.most_common()]
    drawn = (
        _bars("Pairs by category", _most(counts.by_category, "no category")),
        _bars("Judgments by verdict", verdicts),
        _bars("Judgments by source", _most(counts.by_source, "no source")),
        _lengths(counts),
        _days(counts.by_day),
    )
    return f'<div class="bd-charts">{"".join(drawn)}</div>'


def _most(counted: Counter[str], unnamed: str) -> list[tuple[str, int]]:
    listed = [(name or unnamed, number) for name, number in counted.most_common(_MOST_BARS)]
    rest = sum(counted.values()) - sum(number for _, number in listed)
    return [*listed, (f"{len(counted) - len(listed):,} others", rest)] if rest else listed


def _bars(title: str, counted: Sequence[tuple[str, int]], note: str = "", kinds: Iterable[str] = ()) -> str:
    if not counted:
        return f'<figure class="bd-chart"><figcaption>{title}</figcaption><div class="bd-note">None yet.</div></figure>'
    most = max(max(number for _, number in counted), 1)
    classes = [*kinds] or [""] * len(counted)
    rows = "".join(
        f'<tr><th scope="row" title="{escape(name)}">{escape(name)}</th><td><span class="bd-bar {kind}">'
        f'<i style="width: {100 * number / most:.1f}%"></i></span></td><td>{number:,}</td></tr>'
        for (name, number), kind in zip(counted, classes, strict=True)
    )
    noted = f"<p>{note}</p>" if note else ""
    return f'<figure class="bd-chart"><figcaption>{title}</figcaption><table><tbody>{rows}</tbody></table>{noted}</figure>'


def _lengths(counts: Counts) -> str:
    pairs = sum(counts.by_length)
    note = ""
    if pairs:
        note = f"Chosen is the longer one in {counts.longer / pairs:.1%}, the shorter one in {counts.shorter / pairs:.1%}."
    middle = len(_LENGTHS) // 2
    kinds = ["bd-shorter"] * middle + [""] + ["bd-longer"] * middle
    return _bars("Length of chosen, in lengths of rejected", list(zip(_LENGTHS, counts.by_length, strict=True)), note, kinds)


def _days(by_day: Counter[date]) -> str:
    """A column a day, the latest right; days of the calendar, so that a pause is seen as one."""
    title = "<figcaption>Judgments a day (UTC)</figcaption>"
    if not by_day:
        return f'<figure class="bd-chart">{title}<div class="bd-note">None has a date.</div></figure>'
    last = max(by_day)
    days = [last - timedelta(days=back) for back in range(min((last - min(by_day)).days + 1, _MOST_DAYS) - 1, -1, -1)]
    most = max(by_day[day] for day in days)
    columns = "".join(
        f'<i style="height: {100 * by_day[day] / most:.1f}%" title="{day.isoformat()}: {by_day[day]:,}"></i>' for day in days
    )
    before = sum(by_day.values()) - sum(by_day[day] for day in days)
    earlier = f" {before:,} before that." if before else ""
    busiest = max(days, key=lambda day: by_day[day])
    told = f"Most on {busiest.isoformat()}: {most:,}.{earlier}"
    span = f"<span>{days[0].isoformat()}</span>" if len(days) > 1 else ""
    return (
        f'<figure class="bd-chart">{title}<div class="bd-days" role="img" aria-label="{days[0].isoformat()} to {last.isoformat()}'
        f'. {told}">{columns}</div><div class="bd-days-span">{span}<span>{last.isoformat()}</span></div><p>{told}</p></figure>'
    )


# Dataset actions


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
            return {self.meter: components.meter(self.store.confounds())}
        except BiasDPOError as exc:
            return {self.meter: components.error(str(exc))}

    def open_tab(self, *view: Any) -> Updates:
        """Everything else as it is now: the tab was chosen, or the journal has changed."""
        seen = View(*view)
        try:
            choices = self.store.choices()
            known = bool(choices["verdict"])
            shown: Updates = {
                self.trouble: trouble(self.store.bad_lines(), journal.repaired_lines(self.store.workspace)),
                self.empty: gr.update(visible=not known),
                self.browse: gr.update(visible=known),
            }
        except BiasDPOError as exc:
            return {self.trouble: components.error(str(exc))}
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
            return {self.position: components.error(str(exc))}
        return {self.number: page.number, self.position: position(page, PAGE_ROWS), self.table: table(page, seen.chosen)}

    # One judgment

    def choose(self, event: gr.EventData) -> Updates:
        """A row was chosen: show its judgment in full."""
        wanted = event._data.get("id") if isinstance(event._data, dict) else None
        return self._detail(wanted) | {self.detail_notice: ""} | self.keep()

    def _detail(self, judgment_id: Any) -> Updates:
        try:
            found = self.store.judgment(judgment_id) if isinstance(judgment_id, str) else None
        except BiasDPOError as exc:
            return {self.position: components.error(str(exc))}
        if found is None:
            return {self.position: components.error("This judgment is not in the journal any more: choose another")}
        row, retraction = found
        return {
            self.chosen: row["id"],
            self.detail_box: gr.update(visible=True),
            self.detail_head: detail_head(row, retraction),
            self.detail: detail(row, retraction),
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
            row, annotator = found[0], components.annotator_of(who)
            if is_public_space():
                if asked not in {judged.judgment.id for judged in session.judged}:
                    raise RefusedError("Only what this page has stored can be withdrawn on a public Space: ask the Space's owner")
                journal.undo(self.store.workspace, row["id"], row["pair_id"], row["annotator"], row["source"])
            else:
                journal.retract(self.store.workspace, row["id"], annotator)
        except BiasDPOError as exc:
            return {self.detail_notice: components.error(str(exc))}
        with session.lock:
            session.judged = [judged for judged in session.judged if judged.judgment.id != asked]
        told = components.note("Withdrawn: training no longer sees it. The journal keeps a row that says so.")
        return self._detail(asked) | self.keep() | {self.detail_notice: told}

    # Counts

    def show_charts(self) -> Updates:
        """The charts were opened."""
        try:
            drawn = charts(count(self.store.standing()))
        except BiasDPOError as exc:
            drawn = components.error(str(exc))
        return {self.charts: drawn, self.charts_open: True}


def _choices(name: str, counted: Counter[str]) -> list[tuple[str, str]]:
    words = VERDICTS if name == "verdict" else {"": f"(no {name})"}
    return [
        ("All", ""),
        *((f"{words.get(value, value)} ({number:,})", f"={value}") for value, number in counted.most_common(_MOST_CHOICES)),
    ]


# File render


MAX_BAD_ROWS = 500  # listed; the others are counted
_MAX_CELL = 300  # characters of a text in the preview
_TEXTS = (
    ("prompt", "Prompt"),
    ("chosen", "Chosen"),
    ("rejected", "Rejected"),
    ("category", "Category"),
    ("target_group", "Group"),
)


def preview(seen: Preview, name: str) -> str:
    """What an import would make of the first rows."""
    if not (seen.mapping.chosen and seen.mapping.rejected):
        return components.note("Say which columns hold the chosen and the rejected completion.")
    if seen.pairs:
        told = f"The first pairs, as they would be stored with the source import:{name}."
    else:
        told = "None of the first rows is a pair with these columns."
    table = _pairs(seen.pairs) if seen.pairs else ""
    return f"{components.note(told)}{table}{components.note(_left_out(seen))}{bad_rows(seen.bad, 'The first bad rows')}"


def _left_out(seen: Preview) -> str:
    """Columns beyond the pickers: taken over all the same, or not."""
    shown = {"prompt", "chosen", "rejected", "category", "target_group"}
    more = [f"{column} (as {field})" for field, column in seen.mapping.to_json().items() if field not in shown]
    ignored = [column for column in seen.columns if column not in seen.mapping.to_json().values()]
    told = f"Also taken over: {shown_columns(more)}. " if more else ""
    return told + (f"Not taken over: {shown_columns(ignored)}." if ignored else "")


def _pairs(pairs: Sequence[ForeignPair]) -> str:
    columns = [(field, title) for field, title in _TEXTS if any(getattr(pair, field) for pair in pairs)]
    heads = "".join(f'<th scope="col">{title}</th>' for _, title in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(_cut(getattr(pair, field)))}</td>" for field, _ in columns) + "</tr>" for pair in pairs
    )
    return (
        '<div class="bd-rows-box" tabindex="0" role="region" aria-label="The first pairs"><table class="bd-preview"><thead><tr>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…"


def bad_rows(bad: Sequence[BadLine], title: str) -> str:
    """Line and reason of each bad row, in a box of its own; nothing where there are none."""
    if not bad:
        return ""
    rows = "".join(f"<tr><td>line {row.line:,}</td><td>{escape(row.reason)}</td></tr>" for row in bad[:MAX_BAD_ROWS])
    rest = len(bad) - MAX_BAD_ROWS
    more = f"<p>and {rest:,} more: <code>python -m biasdpo dataset validate FILE</code> lists all.</p>" if rest > 0 else ""
    return (
        f'<section class="bd-bad"><h4>{title}</h4><div class="bd-bad-box" tabindex="0" role="region" aria-label="{title}">'
        f"<table><tbody>{rows}</tbody></table></div>{more}</section>"
    )


def imported(done: Imported) -> str:
    """What an import did, the bad rows listed."""
    counts = (
        f"Stored as {escape(done.source)}: <b>{done.written:,}</b> new, <b>{done.known:,}</b> known already, "
        f"<b>{len(done.bad):,}</b> bad rows left out."
    )
    notes = "".join(f"<p>{escape(note)}.</p>" for note in done.notes)
    return f'<div class="bd-done" role="status">{counts}{notes}</div>{bad_rows(done.bad, "Bad rows")}'


def reading(rows: int) -> str:
    """An import is under way."""
    return components.busy(f"Importing: {rows:,} rows read …" if rows else "Importing …")


def exported(done: Exported) -> str:
    """What an export wrote."""
    told = f" {_number(done.repeats, 'further judgment')} of the same pairs went into their votes." if done.repeats else ""
    if done.contradictions:
        told += f" Left out: {_number(done.contradictions, 'pair')}, chosen as often one way as the other."
    return (
        f'<div class="bd-done" role="status"><b>{done.rows:,}</b> pairs, with a data set card (README.md) that goes beside them.'
        f"{told} SHA-256 <code>{escape(done.sha256[:16])}…</code></div>"
    )


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def mapping_choices(columns: Sequence[str]) -> list[tuple[str, str]]:
    """What a column's picker offers."""
    return [("(none)", ""), *((column, column) for column in columns)]


def guessed(mapping: ColumnMapping) -> tuple[str, ...]:
    """The guess for each picker, in the pickers' order."""
    return tuple(getattr(mapping, field) for field, _ in _TEXTS)


# File actions


ORIGINS = {"file": "A file", "hub": "A data set of the Hub", "seed": "The shipped seed set"}
FORMATS = {".jsonl": "JSONL", ".csv": "CSV", ".parquet": "Parquet"}
SEED_SET = ASSETS / "seed_pairs.jsonl"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SHOWN_ROWS = 5
_TELL_SECONDS = 0.5  # between two counts of an import that takes long


@dataclass(frozen=True)
class Previewed:
    """What was previewed, and is imported: kept with the visitor's own page."""

    source: str
    name: str
    columns: tuple[str, ...]
    guess: ColumnMapping

    def mapping(self, picked: tuple[Any, ...]) -> ColumnMapping:
        """The guess with the columns that were picked: prompt, chosen, rejected, category, target group."""
        fields = ("prompt", "chosen", "rejected", "category", "target_group")
        given = dict(zip(fields, (column or "" for column in picked), strict=True))
        for field, column in given.items():
            if column not in ("", *self.columns):
                raise ConfigError(f"The column for {field} is none of this file's: choose one of the list")
        if given["prompt"] != self.guess.prompt:  # these belong to the prompt's column that was recognised
            given |= {"input": "", "history": ""}
        return replace(self.guess, **given)


class FileActions:
    """Import and export. On a public Space the functions behind them refuse, and the page shows what they say."""

    store: Store
    previewed: gr.State
    import_notice: gr.HTML
    preview_box: gr.Column
    pickers: list[gr.Dropdown]
    preview: gr.HTML
    imported: gr.HTML
    export_notice: gr.HTML
    export_box: gr.Row
    download: gr.DownloadButton
    download_card: gr.DownloadButton

    # Import

    def choose_origin(self, origin: Any) -> tuple[Any, Any]:
        """File or Hub: show what that one needs."""
        return gr.update(visible=origin == "file"), gr.update(visible=origin == "hub")

    def show_preview(self, origin: Any, file: Any, hub: Any) -> Iterator[Updates]:
        """Read the first rows of a source, guess its columns, and show both."""
        yield self._put_away() | {self.import_notice: components.busy("Reading the first rows …"), self.imported: ""}
        source = ""
        try:
            refuse_on_public_space("Import")  # before any word on what was named
            source = _source(origin, file, hub)
            seen = importing.preview(source, rows=_SHOWN_ROWS)
        except Exception as exc:
            yield {self.import_notice: components.error(_told(exc, "Not read", source))}
            return
        known = Previewed(source, import_name(source), seen.columns, seen.mapping)
        choices = mapping_choices(seen.columns)
        yield {
            self.previewed: known,
            self.import_notice: "",
            self.preview_box: gr.update(visible=True),
            self.preview: preview(seen, known.name),
        } | {
            picker: gr.update(choices=choices, value=guess)
            for picker, guess in zip(self.pickers, guessed(seen.mapping), strict=True)
        }

    def map_columns(self, previewed: Previewed | None, *picked: Any) -> Updates:
        """A column was picked by hand: the first rows as they would be now."""
        try:
            known = _known(previewed)
            seen = importing.preview(known.source, known.mapping(picked), _SHOWN_ROWS)
        except Exception as exc:
            return {self.import_notice: components.error(_told(exc, "Not read", previewed.source if previewed else ""))}
        return {self.import_notice: "", self.preview: preview(seen, known.name)}

    def import_rows(self, origin: Any, file: Any, hub: Any, previewed: Previewed | None, *picked: Any) -> Iterator[Updates]:
        """Import what was previewed. Where the page is closed meanwhile, the thread goes on: all of it is stored, or nothing."""
        rows = 0

        def on_row() -> None:
            nonlocal rows
            rows += 1

        yield {self.import_notice: reading(0), self.imported: ""}
        try:
            refuse_on_public_space("Import")
            known = _known(previewed)
            if _source(origin, file, hub) != known.source:
                raise ConfigError("Another source was named since this preview: press Preview again")
            mapping = known.mapping(picked)
            for name, column in (("chosen", mapping.chosen), ("rejected", mapping.rejected)):
                if not column:
                    raise ConfigError(f"No column is {name}: choose one of the list above")
            with ThreadPoolExecutor(1) as pool:
                task = pool.submit(importing.import_file, self.store.workspace, known.source, mapping, known.name, on_row)
                while wait([task], _TELL_SECONDS).not_done:
                    yield {self.import_notice: reading(rows)}
            done = task.result()
        except Exception as exc:
            yield {self.import_notice: components.error(_told(exc, "Not imported", previewed.source if previewed else ""))}
            return
        yield self._put_away() | {self.import_notice: "", self.imported: imported(done)}

    def _put_away(self) -> Updates:
        return {self.previewed: None, self.preview_box: gr.update(visible=False)}

    # Export

    def export(self, suffix: Any) -> Iterator[Updates]:
        """Write what training reads, with its card, and offer both for download."""
        yield {self.export_notice: components.busy("Exporting …"), self.export_box: gr.update(visible=False)}
        try:
            if suffix not in (*FORMATS,):
                raise ConfigError(f"An export is {', '.join(FORMATS.values())}: got {suffix!r}; choose one")
            with tempfile.TemporaryDirectory(prefix="biasdpo-export-") as folder:
                done = exporting.export_file(self.store.workspace, Path(folder) / f"biasdpo_pairs{suffix}")
                # Gradio serves its own cache to whoever has the address, and nothing else: the workspace stays closed.
                data, card = (save_file_to_cache(path, self.download.GRADIO_CACHE) for path in (done.path, done.card))
        except Exception as exc:
            yield {self.export_notice: components.error(_told(exc, "Not exported"))}
            return
        yield {
            self.export_notice: exported(done),
            self.export_box: gr.update(visible=True),
            self.download: gr.update(label=f"Download {done.path.name}", value=data),
            self.download_card: gr.update(label=f"Download its card, {done.card.name}", value=card),
        }


def _source(origin: Any, file: Any, hub: Any) -> str:
    """The file or Hub name that was chosen. A file is what Gradio took up itself: it refuses any other path before we see it."""
    if origin == "seed":
        return str(SEED_SET)
    if origin == "hub":
        name = hub.strip().removeprefix(HUB) if isinstance(hub, str) else ""
        if not _HUB_NAME.fullmatch(name):
            raise ConfigError(f"A data set of the Hub is OWNER/NAME: got {name[:60]!r}; write such a name")
        return HUB + name
    if origin != "file":
        raise ConfigError(f"Pairs come from {', '.join(ORIGINS)}: got {origin!r}; choose one")
    path = file.get("path") if isinstance(file, dict) else None
    if not isinstance(path, str):
        raise ConfigError("No file yet: choose a JSONL, JSON, CSV or Parquet file")
    return path


def _known(previewed: Previewed | None) -> Previewed:
    if not isinstance(previewed, Previewed):
        raise ConfigError("Nothing was previewed on this page (or the app was started again): press Preview first")
    return previewed


def _told(exc: Exception, failed: str, source: str = "") -> str:
    """One line for the visitor; the trace of a fault of ours goes to the terminal."""
    if not isinstance(exc, BiasDPOError):
        traceback.print_exc(file=sys.stderr)
        return f"{failed}: the app failed ({type(exc).__name__}: {exc}); the terminal says more"
    text = str(exc).replace("name its columns with --map", "choose other columns")  # that is the command line's way
    return text.replace(f"{Path(source).parent}/", "") if source and not source.startswith(HUB) else text


# Dataset tab


_PICKERS = ("Prompt", "Chosen", "Rejected", "Category", "Target group")
_FILES = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"]

_IMPORT = (
    "A prompt with a chosen and a rejected completion a row: plain texts, or chat messages as TRL and LLaMA-Factory write them. "
    "Preview guesses which column is what, and you may say otherwise."
)

# Where the focus goes when what it was on has gone away.
_FOCUS_ROW = "() => window.bdFocus('#dataset-table tr[aria-current] button', '#dataset-table button')"
_FOCUS_WITHDRAW = "() => window.bdFocus('#dataset-withdraw', '#dataset-close')"


class DatasetTab(DatasetActions, FileActions):
    """One tab over the store; `build` is called once, inside the page's Blocks."""

    def __init__(self, store: Store, sessions: LabelSessions, identity: gr.BrowserState) -> None:
        """`sessions`: what each page has stored, which is all that it may withdraw on a public Space."""
        self.store = store
        self.sessions = sessions
        self.identity = identity

    def build(self, tab: gr.Tab) -> None:
        """Lay out the tab, then wire it."""
        self.number = gr.State(0)
        self.chosen = gr.State("")
        self.asked = gr.State("")
        self.charts_open = gr.State(False)
        self.previewed = gr.State(None)
        self.meter = gr.HTML("", js_on_load=None, elem_id="dataset-meter")
        self.trouble = gr.HTML("", js_on_load=None, elem_id="dataset-trouble")
        self.empty = gr.HTML(empty(), js_on_load=None, visible=False, elem_id="dataset-empty")
        with gr.Column(visible=False, elem_id="dataset-browse") as self.browse:
            self._build_filters()
            with gr.Row(elem_id="dataset-panes"):
                with gr.Column(scale=3, min_width=340, elem_id="dataset-list"):
                    self._build_table()
                with gr.Column(scale=2, min_width=340, visible=False, elem_id="dataset-detail") as self.detail_box:
                    self._build_detail()
        with gr.Accordion("Counts and charts", open=False, elem_id="dataset-charts") as self.charts_box:
            self.charts = gr.HTML("", js_on_load=None, apply_default_css=False)
        with gr.Accordion("Import", open=False, elem_id="dataset-import"):
            self._build_import()
        with gr.Accordion("Export", open=False, elem_id="dataset-export"):
            self._build_export()
        self._wire(tab)

    def _build_filters(self) -> None:
        with gr.Row(elem_id="dataset-filters"):
            self.search_box = gr.Textbox(
                "",
                label="Search",
                placeholder="words in any column",
                max_lines=1,
                max_length=MAX_SEARCH_CHARACTERS,
                elem_id="dataset-search",
                min_width=220,
                scale=2,
            )
            self.filters = [
                gr.Dropdown(
                    [("All", "")], value="", label=name.capitalize(), elem_id=f"dataset-filter-{name}", min_width=140, scale=1
                )
                for name in FILTERS
            ]
            self.state = gr.Dropdown(
                [(title, state) for state, title in STATES.items()],
                value="all",
                label="State",
                elem_id="dataset-filter-state",
                min_width=140,
                scale=1,
            )

    def _build_table(self) -> None:
        with gr.Row(elem_id="dataset-pager"):
            self.position = gr.HTML("", js_on_load=None, elem_id="dataset-position")
            self.previous_button = gr.Button("← Previous page", size="sm", elem_id="dataset-previous", min_width=60, scale=0)
            self.next_button = gr.Button("Next page →", size="sm", elem_id="dataset-next", min_width=60, scale=0)
        self.table = gr.HTML("", js_on_load="window.bdTable(element, trigger)", apply_default_css=False, elem_id="dataset-table")

    def _build_detail(self) -> None:
        with gr.Row(elem_id="dataset-detail-top"):
            self.detail_head = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="dataset-detail-head")
            self.withdraw_button = gr.Button("Withdraw …", size="sm", elem_id="dataset-withdraw", min_width=60, scale=0)
            self.close_button = gr.Button("Close", size="sm", elem_id="dataset-close", min_width=60, scale=0)
        with gr.Row(visible=False, elem_id="dataset-confirm") as self.confirm_box:
            self.really_button = gr.Button(
                "Really withdraw", variant="stop", size="sm", elem_id="dataset-really-withdraw", min_width=60
            )
            self.keep_button = gr.Button("Keep it", size="sm", elem_id="dataset-keep", min_width=60)
        self.detail_notice = gr.HTML("", js_on_load=None, elem_id="dataset-detail-notice")
        self.detail = gr.HTML("", js_on_load=None, apply_default_css=False)

    def _build_import(self) -> None:
        gr.HTML(components.note(_IMPORT), js_on_load=None)
        self.origin = gr.Radio(
            [(title, name) for name, title in ORIGINS.items()], value="file", label="From", elem_id="import-origin"
        )
        self.file = gr.File(
            label="JSONL, JSON, CSV or Parquet", file_types=_FILES, type="filepath", height=120, elem_id="import-file"
        )
        self.hub = gr.Textbox(label="Data set", placeholder="hub:OWNER/NAME", max_lines=1, visible=False, elem_id="import-hub")
        self.preview_button = gr.Button("Preview", variant="secondary", elem_id="import-preview")
        self.import_notice = gr.HTML("", js_on_load=None, elem_id="import-notice")
        with gr.Column(visible=False, elem_id="import-box") as self.preview_box:
            with gr.Row(elem_id="import-columns"):
                self.pickers = [
                    gr.Dropdown(
                        [("(none)", "")],
                        value="",
                        label=f"{title} column",
                        elem_id=f"import-column-{title.lower().replace(' ', '-')}",
                        min_width=140,
                    )
                    for title in _PICKERS
                ]
            self.preview = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="import-first-rows")
            self.import_button = gr.Button("Import", variant="primary", elem_id="import-button")
        self.imported = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="import-result")

    def _build_export(self) -> None:
        with gr.Row(elem_id="export-row"):
            self.format = gr.Radio(
                [(title, suffix) for suffix, title in FORMATS.items()],
                value=".jsonl",
                label="What training reads: one row a pair, by majority, withdrawn judgments left out",
                elem_id="export-format",
                scale=3,
                min_width=280,
            )
            self.export_button = gr.Button("Export", variant="primary", elem_id="export-button", scale=0, min_width=150)
        self.export_notice = gr.HTML("", js_on_load=None, apply_default_css=False, elem_id="export-notice")
        with gr.Row(visible=False, elem_id="export-files") as self.export_box:
            self.download = gr.DownloadButton("", elem_id="export-data", min_width=60)
            self.download_card = gr.DownloadButton("", elem_id="export-card", min_width=60)

    def _wire(self, tab: gr.Tab) -> None:
        # Validation is ours (preprocess=False), so that a value that is no choice gets our line, not the component's.
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        sought = [self.search_box, *self.filters, self.state]
        view = [self.number, self.chosen, self.charts_open, *sought]
        listed = [self.number, self.position, self.table]
        in_full = [
            self.chosen,
            self.detail_box,
            self.detail_head,
            self.detail,
            self.detail_notice,
            self.withdraw_button,
            self.confirm_box,
            self.asked,
        ]
        everything = [self.trouble, self.empty, self.browse, *self.filters, self.charts, self.charts_open]
        everything += [*listed, *(c for c in in_full if c not in (self.detail_notice, self.confirm_box, self.asked))]

        tab.select(self.open_tab, view, everything, **quick)
        tab.select(self.show_meter, None, self.meter, **quick)
        # A textbox's `input` is a pressed key only: what is pasted or deleted shows as a change.
        gr.on(
            [self.search_box.change, *(box.input for box in (*self.filters, self.state))],
            self.search,
            view,
            listed,
            trigger_mode="always_last",
            **quick,
        )
        pager = [self.previous_button.click, self.next_button.click]
        gr.on(pager, self.turn, view, listed, trigger_mode="always_last", **quick)

        # Not "always_last": that would send the first row's id again for a click while it is answered.
        self.table.click(self.choose, None, [*in_full, self.position], trigger_mode="multiple", **quick).success(
            None, None, None, js="() => window.bdShow('dataset-detail')", api_visibility="private"
        )
        self.close_button.click(self.close_detail, view, [*in_full, *listed], **quick).then(
            None, None, None, js=_FOCUS_ROW, api_visibility="private"
        )
        self.withdraw_button.click(self.ask, self.chosen, [self.asked, self.confirm_box], **quick)
        self.keep_button.click(self.keep, None, [self.asked, self.confirm_box], **quick).then(
            None, None, None, js=_FOCUS_WITHDRAW, api_visibility="private"
        )
        withdrawn = self.really_button.click(self.withdraw, [self.identity, self.asked], [*in_full, self.position], **quick).then(
            None, None, None, js=_FOCUS_WITHDRAW, api_visibility="private"
        )
        self.charts_box.expand(self.show_charts, None, [self.charts, self.charts_open], **quick)
        self.charts_box.collapse(lambda: False, None, self.charts_open, **quick)

        named = [self.origin, self.file, self.hub]
        outcome = [self.previewed, self.preview_box, self.import_notice, self.imported]
        seen = [*outcome, self.preview, *self.pickers]
        self.origin.input(self.choose_origin, self.origin, [self.file, self.hub], **quick)
        # Files may be long, and the Hub far away: through the queue, where nobody else waits for them but who imports, too.
        queued: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "preprocess": False}
        gr.on([self.preview_button.click, self.hub.submit], self.show_preview, named, seen, concurrency_limit=4, **queued)
        gr.on(
            [picker.input for picker in self.pickers],
            self.map_columns,
            [self.previewed, *self.pickers],
            [self.import_notice, self.preview],
            concurrency_limit=4,
            trigger_mode="always_last",
            **queued,
        )
        imported = self.import_button.click(
            self.import_rows, [*named, self.previewed, *self.pickers], outcome, concurrency_limit=1, **queued
        )
        for changed in (withdrawn, imported):
            changed.then(self.open_tab, view, everything, **quick).then(self.show_meter, None, self.meter, **quick)
        self.export_button.click(
            self.export,
            self.format,
            [self.export_notice, self.export_box, self.download, self.download_card],
            concurrency_limit=1,
            **queued,
        )
