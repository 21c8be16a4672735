"""The Dataset tab: import, the table of judgments, edits, bulk changes, charts, export."""

from __future__ import annotations

import itertools
import secrets
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from biasdpo.access import is_owner
from biasdpo.data import exporting, importing, journal
from biasdpo.data.importing import HUB, ColumnMapping, import_name
from biasdpo.data.journal import EDITABLE, BadLine, Row, replacement
from biasdpo.data.splits import WORKSPACE
from biasdpo.data.summary import FILTERS, Page, Query, counts
from biasdpo.data.sync import sync_of
from biasdpo.errors import ConfigError, plural
from biasdpo.prompts import CATEGORIES
from biasdpo.ui.charts import TUNED, WARN, counted
from biasdpo.ui.components import QUICK, Studio, Updates, annotator_of, diff, duration, escape, handles, local_time, short
from biasdpo.workspace import ASSETS

_PAGE_ROWS = 25
_MAX_CHOICES = 300  # of one filter, the commonest: the search finds the others
_MAX_BAD_ROWS = 500  # listed; the others are counted
_SHOWN = 90  # characters of a text in a table
_FILES = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt", ".parquet"]
_SEED_PAIRS = str(ASSETS / "seed_pairs.jsonl")
_PICKED = ("prompt", "chosen", "rejected", "category", "target_group")  # columns that the user may map
_STATES = {"Current": "standing", "Withdrawn or edited": "retracted", "All": "all"}
_COLUMNS = {
    "": 40,
    "Prompt": 245,
    "Chosen, or left": 245,
    "Rejected, or right": 245,
    "Verdict": 95,
    "Category": 120,
    "From": 110,
    "Date": 105,
    "ID": 1,
}
_COLORS = (WARN, TUNED)
_EMPTY = """### No pairs yet
A pair is a prompt with a better (chosen) and a worse (rejected) completion. Start from the example pairs, import a file below, or
judge completions yourself."""


def build_dataset(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    changed = gr.State("")  # a new value whenever this page has changed the journal
    with gr.Row(visible=False, elem_id="dataset-top") as top:
        summary = gr.Markdown(elem_id="dataset-summary")
        train = gr.Button("Train on these pairs", variant="primary", elem_id="dataset-train", elem_classes="next-step")
    health = gr.Markdown(visible=False, elem_id="dataset-health")
    with gr.Column(visible=False, elem_id="dataset-empty") as empty:
        gr.Markdown(_EMPTY)
        with gr.Row(elem_classes="actions"):
            seed = gr.Button("Import the example pairs", variant="primary", elem_id="import-seed")
            studio.next_step("label", "Label completions")
    with gr.Column(visible=False, elem_id="dataset-browse") as browse:
        show, query, shown = _build_table(studio, changed)
        charts = gr.Accordion("Charts", open=False, elem_id="dataset-charts")
        with charts, gr.Row():
            plots = [gr.Plot(show_label=False, min_width=420, elem_id=f"dataset-chart-{i}") for i in range(4)]
    with gr.Accordion("Import", open=False, elem_id="dataset-import") as import_box:
        imports, undo, examples = _build_import(studio, changed, seed)
    with gr.Accordion("Export", open=False, elem_id="dataset-export") as export_box:
        _build_export(studio)
    studio.next_step("train", "Next: Train")

    def refresh(chosen: str | None, *query: Any) -> Updates:
        """The current state of everything shown. A chosen import stays chosen, also one that is chosen meanwhile."""
        warnings = _warnings(studio)
        listed = studio.dataset.imports()
        titles = [(f"{source.removeprefix('import:')} ({plural(count, 'row')})", source) for source, count in listed.items()]
        judged = sum(not row["repeat_of"] for row in studio.dataset.standing())
        pairs = plural(studio.dataset.confounds().pairs, "pair")
        gone = {"value": None} if chosen and chosen not in listed else {}
        return {
            top: gr.Row(visible=judged > 0),
            summary: f"**{pairs}** to train on, from {plural(judged, 'row')}.",
            health: gr.Markdown(warnings, visible=bool(warnings)),
            empty: gr.Column(visible=not judged),
            browse: gr.Column(visible=bool(studio.dataset.choices("all")["verdict"])),
            charts: gr.Accordion(open=False),
            import_box: gr.skip() if judged else gr.Accordion(open=True),
            export_box: gr.Accordion(visible=judged > 0 and is_owner()),
            imports: gr.update(choices=titles, visible=bool(listed), **gone),
            undo: gr.Button(visible=False) if gone or not listed else gr.skip(),
            examples: gr.Button(visible=judged > 0),
        } | show(*query)

    draw = handles(lambda: list(itertools.starmap(counted, counts(studio.dataset.standing()).items())))
    everything = [top, summary, health, empty, browse, charts, import_box, export_box, imports, undo, examples, *shown]
    gr.on([tab.select, changed.change], handles(refresh), [imports, *query], everything, **QUICK)
    charts.expand(draw, None, plots, **QUICK)
    train.click(lambda: studio.open("train", data=WORKSPACE), None, studio.open_outputs("train"), **QUICK)
    studio.changes.append(changed.change)


def _warnings(studio: Studio) -> str:
    """Data health warnings, as Markdown; empty if there are none."""
    lines = list(studio.dataset.confounds().warnings)
    if bad := studio.dataset.bad_lines():
        lines.append(f"{plural(bad, 'line')} of the journal can't be read: python -m biasdpo dataset validate says why")
    lines += [str(studio.dataset.overlap_error)] if studio.dataset.overlap_error else []
    lines += _unsynced(studio) if is_owner() else []
    return "\n".join(f"> ⚠ {escape(line)}\n" for line in lines)


def _unsynced(studio: Studio) -> list[str]:
    """What the owner should know of --sync: rows that are not on the Hub, for how long and why, and files that were skipped."""
    hub = sync_of(studio.workspace)
    if hub is None:
        return []
    state, lines = hub.state(), []
    if state.unsent:
        rows, age = plural(state.unsent, "row"), duration(state.age_seconds)
        lines.append(f"{rows} not saved to {state.target} yet, the oldest for {age}: {state.reason}")
    elif state.reason:
        lines.append(f"Labels in {state.target} are not restored yet: {state.reason}")
    return [*lines, *state.notes]


def _build_question(name: str) -> tuple[gr.Row, gr.Markdown, gr.Button]:
    """A question before something is withdrawn or changed: the row, the question, and the button that does it."""
    with gr.Row(visible=False, elem_classes="actions", elem_id=f"{name}-confirm") as row:
        question = gr.Markdown(elem_id=f"{name}-question")
        go = gr.Button("Withdraw", variant="stop", size="sm", elem_id=f"{name}-go")
        cancel = gr.Button("Cancel", size="sm", elem_id=f"{name}-cancel")
    cancel.click(lambda: gr.Row(visible=False), None, row, **QUICK)
    return row, question, go


# The table


def _wanted(search: str, *filters: Any) -> Query:
    """The query of the filters and the state: "" filters nothing, "=VALUE" wants this value."""
    *values, state = filters
    wanted: dict[str, Any] = {name: str(value)[1:] if value else None for name, value in zip(FILTERS, values, strict=True)}
    return Query(search, state=state, **wanted)


def _choices(name: str, counted_: Counter[str], chosen: str) -> list[tuple[str, str]]:
    listed = dict(counted_.most_common(_MAX_CHOICES)) | ({chosen[1:]: counted_[chosen[1:]]} if chosen else {})
    named = ((value.replace("both_", "both ") or f"(no {name})", value, n) for value, n in listed.items())
    return [("All", ""), *((f"{title} ({n:,})", f"={value}") for title, value, n in named)]


def _line(row: Row, page: Page) -> list[Any]:
    gone = page.retractions.get(row["id"])
    verdict = row["verdict"].replace("both_", "both ") if gone is None else "edited since" if replacement(gone) else "withdrawn"
    category = ", ".join(filter(None, (row["category"], row["target_group"])))
    sides = ("", "") if row["verdict"] == "preferred" else ("Left: ", "Right: ")
    texts = (
        row["prompt"],
        sides[0] + row["chosen"],
        sides[1] + row["rejected"],
        verdict,
        category,
        row["annotator"] or row["source"],
    )
    return [False, *(short(text, _SHOWN) for text in texts), local_time(row["created_at"])[:10], row["id"]]


def _build_table(studio: Studio, changed: gr.State) -> tuple[Callable[..., Updates], list[Any], list[Any]]:
    """The filters, the table, a judgment in full, and bulk changes; return how to fill the table, with its inputs and outputs."""
    number = gr.State(0)
    with gr.Row(elem_id="dataset-filters"):
        look: dict[str, Any] = {"placeholder": "Words in any column", "scale": 2, "min_width": 160}
        search = gr.Textbox("", label="Search", elem_id="dataset-search", **look)
        every: dict[str, Any] = {"choices": [("All", "")], "value": "", "min_width": 110}
        filters = [gr.Dropdown(label=name.capitalize(), elem_id=f"dataset-filter-{name}", **every) for name in FILTERS]
        state = gr.Dropdown(list(_STATES.items()), value="standing", label="Show", min_width=110, elem_id="dataset-filter-state")
    with gr.Row(elem_id="dataset-panes"):
        with gr.Column(scale=3, min_width=340):
            # Interactive for its check boxes only.
            grid: dict[str, Any] = {"headers": list(_COLUMNS), "column_widths": list(_COLUMNS.values()), "max_height": 420}
            others = len(_COLUMNS) - 1
            grid |= {"datatype": ["bool", *["str"] * others], "static_columns": list(range(1, others + 1)), "wrap": True}
            grid |= {"type": "array", "interactive": True}
            table = gr.Dataframe(label="Pairs and verdicts", show_label=False, buttons=[], elem_id="dataset-table", **grid)
            with gr.Row(elem_classes="actions"):
                position = gr.Markdown(elem_id="dataset-position")
                newer = gr.Button("← Newer", size="sm", min_width=80, elem_id="dataset-previous")
                older = gr.Button("Older →", size="sm", min_width=80, elem_id="dataset-next")
        _build_detail(studio, table, changed)
    sought: list[Any] = [search, *filters, state]
    _build_bulk(studio, table, sought, changed)

    def page_of(number_: int, *query: Any) -> Updates:
        page = studio.dataset.page(_wanted(*query), number_, _PAGE_ROWS)
        first = page.number * _PAGE_ROWS + 1
        shown = f"{first:,} to {first + len(page.rows) - 1:,} of **{page.total:,}**, newest first. Select a row to see all of it."
        return {
            number: page.number,
            table: [_line(row, page) for row in page.rows],
            position: shown if page.total else "Nothing matches: clear the search, or set the filters back to All.",
            newer: gr.Button(interactive=page.number > 0),
            older: gr.Button(interactive=page.number + 1 < page.pages),
        }

    def show(number_: int, _search: str, *query: Any) -> Updates:
        """The page, and what there is to filter by in the chosen state."""
        *chosen, state_ = query
        counts_ = studio.dataset.choices(state_)
        options = zip(filters, FILTERS, chosen, strict=True)
        updates = {box: gr.Dropdown(_choices(name, counts_[name], value)) for box, name, value in options}
        return updates | page_of(number_, _search, *query)

    outputs = [number, table, position, newer, older]
    sets = [box.change for box in sought[:-1]]  # not `input`, which a dropdown also sends when it loses the focus
    gr.on(sets, handles(lambda *query: page_of(0, *query)), sought, outputs, trigger_mode="always_last", **QUICK)
    filtered = [*filters, *outputs]
    state.change(handles(lambda *query: show(0, *query)), sought, filtered, trigger_mode="always_last", **QUICK)
    newer.click(handles(lambda now, *query: page_of(now - 1, *query)), [number, *sought], outputs, **QUICK)
    older.click(handles(lambda now, *query: page_of(now + 1, *query)), [number, *sought], outputs, **QUICK)
    return show, [number, *sought], filtered


# One judgment


def _build_detail(studio: Studio, table: gr.Dataframe, changed: gr.State) -> None:
    """A judgment in full beside the table: texts, word diff, provenance; edit and withdraw."""
    shown = gr.State("")
    marks: dict[str, Any] = {"show_inline_category": False, "show_legend": True, "elem_classes": "marks"}
    with gr.Column(scale=2, min_width=340, visible=False, elem_id="dataset-detail") as box:
        with gr.Row(elem_classes="actions"):
            edit = gr.Button("Edit", size="sm", min_width=60, elem_id="dataset-edit")
            withdraw = gr.Button("Withdraw", size="sm", min_width=60, elem_id="dataset-withdraw")
            close = gr.Button("Close", size="sm", min_width=60, elem_id="dataset-close")
        confirm, question, really = _build_question("dataset")
        fields: dict[str, gr.Textbox] = {}

        def add_fields(*names: str, **look: Any) -> None:
            for name in names:
                title = name.replace("_", " ").capitalize()
                fields[name] = gr.Textbox(label=title, interactive=False, elem_id=f"dataset-{name}", **look)

        add_fields(*EDITABLE[:3], max_lines=8)
        with gr.Row():
            add_fields(*EDITABLE[3:], min_width=100)
        with gr.Row(visible=False, elem_classes="actions", elem_id="dataset-edit-actions") as edit_actions:
            save = gr.Button("Save as a new version", variant="primary", size="sm", elem_id="dataset-save")
            cancel = gr.Button("Cancel", size="sm", elem_id="dataset-cancel")
        words = gr.HighlightedText(label="Word by word", elem_id="dataset-diff", **marks)
        edits = gr.HighlightedText(label="Edited after it was shown", visible=False, elem_id="dataset-edits", **marks)
        with gr.Accordion("Provenance", open=True):
            facts = gr.Markdown(elem_id="dataset-facts")

    def render(judgment_id: str) -> Updates:
        known = studio.dataset.judgment(judgment_id)
        if known is None:
            raise ConfigError("This row is no longer there: choose another")
        row, retraction = known
        found = studio.dataset.provenance(row, retraction).items()
        names = ("Chosen", "Rejected") if row["verdict"] == "preferred" else ("Left", "Right")
        only, around = (f"only {names[1].lower()}", f"only {names[0].lower()}"), ("before the edit", "after it")
        compared, edited = diff(row["rejected"], row["chosen"], *only), list[Any]()
        for title, column in zip(names, ("chosen", "rejected"), strict=True):
            if before := row[f"original_{column}"]:
                edited += [(f"{title}: ", None), *diff(before, row[column], *around)]
        return {field: gr.Textbox(row[name], interactive=False) for name, field in fields.items()} | {
            fields["chosen"]: gr.Textbox(row["chosen"], label=names[0], interactive=False),
            fields["rejected"]: gr.Textbox(row["rejected"], label=names[1], interactive=False),
            shown: row["id"],
            box: gr.Column(visible=True),
            edit: gr.Button(visible=is_owner() and retraction is None),
            withdraw: gr.Button(visible=is_owner() and retraction is None),
            confirm: gr.Row(visible=False),
            edit_actions: gr.Row(visible=False),
            words: gr.HighlightedText(compared, color_map=dict(zip(only, _COLORS, strict=True))),
            edits: gr.HighlightedText(edited, color_map=dict(zip(around, _COLORS, strict=True)), visible=bool(edited)),
            facts: "\n".join(f"- **{name}**: {escape(text)}" for name, text in found),
        }

    def choose(event: gr.SelectData) -> Updates:
        return render(str(event.row_value[-1])) if event.index[1] else {shown: gr.skip()}  # 0: the check box

    def save_edit(judgment_id: str, who: Any, *texts: str) -> Updates:
        row, _retraction = studio.dataset.judgment(judgment_id) or ({}, None)
        changes = {name: text for name, text in zip(fields, texts, strict=True) if text != row.get(name)}
        new = journal.edit(studio.workspace, [judgment_id], changes, annotator_of(who).nickname)
        if changes and not new:
            raise ConfigError("This row was edited or withdrawn meanwhile: choose it again in the table")
        return render(new[0] if new else judgment_id) | {changed: secrets.token_hex(4)}

    def withdraw_it(judgment_id: str, who: Any) -> Updates:
        journal.withdraw(studio.workspace, [judgment_id], annotator_of(who).nickname)
        return render(judgment_id) | {changed: secrets.token_hex(4)}

    rendered = [shown, box, edit, withdraw, confirm, edit_actions, words, edits, facts, *fields.values()]
    table.select(handles(choose), None, rendered, trigger_mode="multiple", **QUICK)
    editing = [edit_actions, *fields.values()]
    edit.click(lambda: (gr.Row(visible=True), *[gr.Textbox(interactive=True)] * len(fields)), None, editing, **QUICK)
    cancel.click(handles(render), shown, rendered, **QUICK)
    save.click(handles(save_edit), [shown, studio.identity, *fields.values()], [*rendered, changed], **QUICK)
    close.click(lambda: gr.Column(visible=False), None, box, **QUICK)
    asks = "Withdraw this row? Training will leave it out."
    withdraw.click(lambda: (gr.Row(visible=True), asks), None, [confirm, question], **QUICK)
    really.click(handles(withdraw_it), [shown, studio.identity], [*rendered, changed], **QUICK)


# Several judgments


def _build_bulk(studio: Studio, table: gr.Dataframe, sought: list[Any], changed: gr.State) -> None:
    """Tag or withdraw the checked rows, or all that match; asks first, and changes exactly what was asked about."""
    asked = gr.State(([], {}))  # ids, and their new columns; {} withdraws
    scopes = [("The checked rows", "checked"), ("All that match the filters", "found")]
    with gr.Accordion("Bulk edit", open=False, elem_id="dataset-bulk"):
        with gr.Row():
            scope = gr.Radio(scopes, value="checked", label="Rows", elem_id="bulk-scope")
            own: dict[str, Any] = {"info": "Empty: unchanged", "allow_custom_value": True, "elem_id": "bulk-category"}
            category = gr.Dropdown(["", *CATEGORIES], label="Category", **own)
            group = gr.Textbox("", label="Target group", info="Empty: unchanged", elem_id="bulk-group")
        with gr.Row(elem_classes="actions"):
            tag = gr.Button("Tag", size="sm", elem_id="bulk-tag")
            withdraw = gr.Button("Withdraw", size="sm", elem_id="bulk-withdraw")
        confirm, question, go = _build_question("bulk")

    def ask(scope_: str, rows: list[list[Any]], changes: dict[str, str], query: Sequence[Any]) -> Updates:
        checked = [str(row[-1]) for row in rows if row[0] in (True, "true")]
        ids = checked if scope_ == "checked" else studio.dataset.ids(_wanted(*query))
        if not ids:
            raise ConfigError("No row is selected: check rows in the table, or choose all that match the filters")
        columns = ", ".join(f"{name.replace('_', ' ')} “{escape(text)}”" for name, text in changes.items())
        what = plural(len(ids), "row")
        asks = f"Tag **{what}** with {columns}?" if changes else f"Withdraw **{what}**? Training will leave them out."
        button = gr.Button(f"Tag {what}", variant="primary") if changes else gr.Button(f"Withdraw {what}", variant="stop")
        return {asked: (ids, changes), confirm: gr.Row(visible=True), question: asks, go: button}

    def ask_tag(scope_: str, rows: list[list[Any]], category_: str | None, group_: str, *query: Any) -> Updates:
        changes = {name: text.strip() for name, text in (("category", category_ or ""), ("target_group", group_)) if text.strip()}
        if not changes:
            raise ConfigError("Choose a category or enter a target group first")
        return ask(scope_, rows, changes, query)

    def apply(asked_: tuple[list[str], dict[str, str]], who: Any) -> Updates:
        ids, changes = asked_
        to = studio.workspace, ids
        by = annotator_of(who).nickname
        done = len(journal.edit(*to, changes, by)) if changes else journal.withdraw(*to, by)
        gr.Info(f"{plural(done, 'row')} {'tagged' if changes else 'withdrawn'}.")
        return {asked: ([], {}), confirm: gr.Row(visible=False)} | {changed: secrets.token_hex(4)}

    asking = [asked, confirm, question, go]
    tag.click(handles(ask_tag), [scope, table, category, group, *sought], asking, **QUICK)
    withdraw.click(handles(lambda scope_, rows, *query: ask(scope_, rows, {}, query)), [scope, table, *sought], asking, **QUICK)
    go.click(handles(apply), [asked, studio.identity], [asked, confirm, changed], **QUICK)


# Import


def _check_source(source: str, request: gr.Request) -> str:
    """A path on this machine, or hub:OWNER/NAME. A browser elsewhere would read this machine's files, so it must upload."""
    source = source.strip()
    if not source:
        raise ConfigError("Enter a path or hub:OWNER/NAME first, or choose a file on the left")
    is_local = request.client is not None and request.client.host in ("127.0.0.1", "::1")
    if not source.startswith(HUB) and (not is_local or "x-forwarded-for" in request.headers):
        raise ConfigError("Paths are for a browser on the same machine: choose the file on the left to upload it")
    return source


def _bad_rows(bad: Sequence[BadLine], label: str) -> Any:
    rows: list[list[Any]] = [[row.line, row.reason] for row in bad[:_MAX_BAD_ROWS]]
    if len(bad) > _MAX_BAD_ROWS:
        rows.append(["…", f"{len(bad) - _MAX_BAD_ROWS:,} more: python -m biasdpo dataset validate FILE lists all"])
    return gr.Dataframe(rows, label=label, visible=bool(bad))


def _build_import(studio: Studio, changed: gr.State, seed: gr.Button) -> tuple[gr.Radio, gr.Button, gr.Button]:
    """Choose a source, see its first rows, import it; undo an import. Returns the list of imports, the button that undoes one,
    and one that imports the example pairs, as `seed` does in an empty workspace."""
    source, guess = gr.State(""), gr.State(ColumnMapping())
    grid: dict[str, Any] = {"interactive": False, "wrap": True, "buttons": [], "visible": False, "max_height": 260}
    with gr.Row():
        file = gr.File(label="JSONL, JSON, CSV or Parquet", file_types=_FILES, type="filepath", height=120, elem_id="import-file")
        with gr.Column(min_width=280):
            path = gr.Textbox("", label="Or a path on this machine, or hub:OWNER/NAME", elem_id="import-path")
            look = gr.Button("Preview", size="sm", elem_id="import-preview")
            examples = gr.Button("Import the example pairs", size="sm", visible=False, elem_id="import-examples")
    with gr.Column(visible=False, elem_id="import-box") as box:
        format_ = gr.Markdown(elem_id="import-format")
        titles = [field.replace("_", " ").capitalize() for field in _PICKED]
        with gr.Row():
            ids = [f"import-column-{field.replace('_', '-')}" for field in _PICKED]
            pickers = [gr.Dropdown([], label=f"{t} column", min_width=120, elem_id=i) for t, i in zip(titles, ids, strict=True)]
        unwrap = gr.Checkbox(False, label="Unwrap: drop the chat template's markers", visible=False, elem_id="import-unwrap")
        widths: list[str | int] = ["30%", "25%", "25%", "10%", "10%"]
        first = gr.Dataframe(headers=titles, label="First pairs", column_widths=widths, elem_id="import-first-rows", **grid)
        with gr.Row(elem_classes="actions"):
            name = gr.Textbox(label="Name of this import", elem_id="import-name")
            go = gr.Button("Import", variant="primary", elem_id="import-button")
    result = gr.Markdown(visible=False, elem_id="import-result")
    bad = gr.Dataframe(headers=["Line", "Reason"], column_widths=["12%", "88%"], elem_id="import-bad-rows", **grid)
    imports = gr.Radio([], label="Imports so far: choose one to undo it", visible=False, elem_id="imports")
    undo = gr.Button("Undo this import: withdraw its rows", size="sm", variant="stop", visible=False, elem_id="import-undo")

    def preview(source_: str, mapping: ColumnMapping | None, unwrap_: bool) -> tuple[importing.Preview, Updates]:
        seen = importing.preview(source_, mapping, unwrap=unwrap_)
        rows = [[short(getattr(pair, field), _SHOWN) for field in _PICKED] for pair in seen.pairs]
        missing = [field for field in ("chosen", "rejected") if not getattr(seen.mapping, field)]
        marker = next((pair.marker for pair in seen.pairs if pair.marker), "")
        templated = f" **Holds a chat template's markers ({escape(marker)}), which would be trained as text.**" if marker else ""
        ask = f" **Choose the column of the {' and the '.join(missing)} completion.**" if missing else ""
        return seen, {
            format_: escape(str(seen)) + ask + templated,
            unwrap: gr.Checkbox(value=unwrap_, visible=unwrap_ or bool(marker)),
            first: gr.Dataframe(rows, visible=bool(rows)),
            bad: _bad_rows(seen.bad, "First rows that will be left out"),
            go: gr.Button(interactive=not missing),
        }

    def open_source(source_: str) -> Updates:
        seen, updates = preview(source_, None, False)
        columns = [("(none)", ""), *((column, column) for column in seen.columns)]
        guesses = {p: gr.Dropdown(columns, value=getattr(seen.mapping, f)) for p, f in zip(pickers, _PICKED, strict=True)}
        opened = {source: source_, guess: seen.mapping, name: import_name(source_), box: gr.Column(visible=True)}
        return updates | guesses | opened | {result: gr.Markdown(visible=False)}

    def open_named(named: str, request: gr.Request) -> Updates:
        return open_source(_check_source(named, request))

    def import_rows(source_: str, guess_: ColumnMapping, name_: str, unwrap_: bool, *picked: str) -> Updates:
        """Import what was previewed. If the page is closed meanwhile, the thread goes on: all of it is stored, or nothing."""
        done = importing.import_file(studio.workspace, source_, guess_.with_columns(*picked), name_, unwrap=unwrap_)
        told = f"**{plural(done.written, 'pair')} imported** as {escape(done.source)}"
        told += f", {plural(done.known, 'row')} already there" * bool(done.known)
        told += f", {plural(len(done.bad), 'row')} left out" * bool(done.bad)
        notes = "".join(f". {escape(note)}" for note in done.notes)
        updates: Updates = {result: gr.Markdown(f"{told}{notes}.", visible=True), box: gr.Column(visible=False)}
        return updates | {bad: _bad_rows(done.bad, "Rows that were left out")} | {changed: secrets.token_hex(4)}

    def undo_import(chosen: str, who: Any) -> Updates:
        done = journal.undo_import(studio.workspace, chosen, annotator_of(who).nickname)
        told = f"Import undone: {plural(done, 'row')} withdrawn."
        return {changed: secrets.token_hex(4), result: gr.Markdown(told, visible=True), bad: gr.Dataframe(visible=False)}

    previewed = [format_, first, bad, go, unwrap]
    opened = [*previewed, *pickers, source, guess, name, box, result]
    work: dict[str, Any] = {"concurrency_limit": 4, "api_visibility": "private"}  # a file may be long, the Hub far away
    file.upload(handles(open_source), file, opened, show_progress_on=file, **work)
    gr.on([look.click, path.submit], handles(open_named), path, opened, show_progress_on=path, **work)
    again = handles(lambda source_, guess_, unwrap_, *picked: preview(source_, guess_.with_columns(*picked), unwrap_)[1])
    inputs: list[Any] = [*pickers, unwrap]
    gr.on([one.input for one in inputs], again, [source, guess, unwrap, *pickers], previewed, show_progress_on=first, **work)
    imported = [result, bad, box, changed]
    go.click(handles(import_rows), [source, guess, name, unwrap, *pickers], imported, show_progress_on=go, **work)
    import_examples = handles(lambda: import_rows(_SEED_PAIRS, ColumnMapping(*_PICKED), "", False, *_PICKED))
    seed.click(import_examples, None, imported, show_progress_on=seed, **work)
    examples.click(import_examples, None, imported, show_progress_on=examples, **work)
    imports.input(lambda: gr.Button(visible=True), None, undo, **QUICK)
    undo.click(handles(undo_import), [imports, studio.identity], [changed, result, bad], **QUICK)
    return imports, undo, examples


# Export


def _build_export(studio: Studio) -> None:
    """Write what training reads, with its card, and offer both for download."""
    formats = [("JSONL", ".jsonl"), ("CSV", ".csv"), ("Parquet", ".parquet")]
    info = "One row per pair, by majority, as training reads it, and a dataset card."
    with gr.Row(elem_classes="actions"):
        suffix = gr.Radio(formats, value=".jsonl", label="Format", info=info, elem_id="export-format")
        go = gr.Button("Export", elem_id="export-button")
    result = gr.Markdown(visible=False, elem_id="export-result")
    with gr.Row(visible=False, elem_classes="actions") as files:
        data = gr.DownloadButton("", size="sm", elem_id="export-data")
        card = gr.DownloadButton("", size="sm", elem_id="export-card")

    def export(suffix_: str) -> Updates:
        with tempfile.TemporaryDirectory(prefix="biasdpo-export-") as folder:
            done = exporting.export_file(studio.workspace, Path(folder) / f"biasdpo_pairs{suffix_}")
            # Gradio serves its own cache to whoever has the address, and nothing else: the workspace stays closed.
            paths = [save_file_to_cache(path, data.GRADIO_CACHE) for path in (done.path, done.card)]
        split = f" Left out: {plural(done.contradictions, 'evenly split pair')}." if done.contradictions else ""
        return {
            result: gr.Markdown(f"**{plural(done.rows, 'pair')}** exported.{split} SHA-256 {done.sha256[:16]}…", visible=True),
            files: gr.Row(visible=True),
            data: gr.DownloadButton(f"Download {done.path.name}", value=paths[0]),
            card: gr.DownloadButton(f"Download its card, {done.card.name}", value=paths[1]),
        }

    work: dict[str, Any] = {"concurrency_limit": 1, "api_visibility": "private", "show_progress_on": go}
    go.click(handles(export), suffix, [result, files, data, card], **work)
