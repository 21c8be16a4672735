"""The Dataset tab: import, the table of judgments, edits, bulk changes, charts, export."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from biasdpo.data import exporting, importing, journal
from biasdpo.data.health import health_warnings
from biasdpo.data.importing import HUB, ColumnMapping, import_name
from biasdpo.data.journal import BadLine, Row, replacement
from biasdpo.data.summary import FILTERS, Page, Query, counts
from biasdpo.errors import ConfigError
from biasdpo.labeling import word_diff
from biasdpo.prompts import CATEGORIES
from biasdpo.ui.charts import counted
from biasdpo.ui.components import QUICK, Studio, Updates, annotator_of, escape, handles, local_time, plural
from biasdpo.workspace import ASSETS, is_public_space, refuse_on_public_space

_PAGE_ROWS = 25
_MAX_SEARCH_CHARACTERS = 200  # each word is looked for in every row
_MAX_CHOICES = 300  # of one filter, the commonest: the search finds the others
_MAX_DIFF_CHARACTERS = 4_000  # of each text: comparing two of 16,000 takes 16 s, of 4,000 half a second
_MAX_BAD_ROWS = 500  # listed; the others are counted
_SHOWN_CHARACTERS = 160  # of a text in a table
_FILES = [".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet"]
_SEED_PAIRS = ASSETS / "seed_pairs.jsonl"
_PICKED = ("prompt", "chosen", "rejected", "category", "target_group")  # columns that the user may map
_STATES = {"Current": "standing", "Withdrawn or edited since": "retracted", "All": "all"}
_HEADERS = ["Select", "Prompt", "Verdict", "Category", "Annotator", "Source", "Judged", "ID"]
_WIDTHS: list[str | int] = ["64px", "34%", "104px", "104px", "104px", "130px", "110px", "120px"]
_EMPTY = """### No pairs yet
A pair is a prompt with a better (chosen) and a worse (rejected) completion. Import a file below, start from the example pairs, or
judge completions yourself."""


def build_dataset(studio: Studio, tab: gr.Tab) -> None:
    """Lay out and wire the tab; called once, inside it."""
    changed = gr.State("")  # a new value whenever this page has changed the journal
    with gr.Row(visible=False, elem_id="dataset-top", equal_height=True) as top:
        summary = gr.Markdown(elem_id="dataset-summary")
        studio.next_step("train", "Train on these pairs", "primary")
    health = gr.Markdown(visible=False, elem_id="dataset-health")
    with gr.Row(visible=False, elem_id="dataset-empty", equal_height=True) as empty:
        gr.Markdown(_EMPTY)
        seed = gr.Button("Import the example pairs", variant="primary", elem_id="import-seed")
        studio.next_step("label", "Label completions")
    with gr.Column(visible=False, elem_id="dataset-browse") as browse:
        refresh_table, table_outputs = _build_table(studio, changed)
        charts = _build_charts(studio)
    with gr.Accordion("Import", open=False, elem_id="dataset-import", visible=not is_public_space()) as import_box:
        imports = _build_import(studio, changed, seed)
    with gr.Accordion("Export", open=False, elem_id="dataset-export", visible=not is_public_space()) as export_box:
        _build_export(studio)
    studio.next_step("train", "Next: Train")

    def refresh(*view: Any) -> Updates:
        """Everything as it is now."""
        choices = studio.dataset.choices()
        known = bool(choices["verdict"])
        health_now = _health(studio)
        listed = list(studio.dataset.imports().items())
        return {
            top: gr.Row(visible=known),
            summary: _summary(studio),
            health: gr.Markdown(health_now, visible=bool(health_now)),
            empty: gr.Row(visible=not known),
            browse: gr.Column(visible=known),
            import_box: gr.Accordion(open=not known) if not known else gr.skip(),
            export_box: gr.Accordion(visible=known and not is_public_space()),
            imports: gr.Radio(
                [(f"{source.removeprefix('import:')} ({plural(number, 'judgment')})", source) for source, number in listed],
                value=None,
                visible=bool(listed),
            ),
            charts: gr.Accordion(open=False),
        } | refresh_table(choices, *view)

    view, outputs = table_outputs
    everything = [top, summary, health, empty, browse, import_box, export_box, imports, charts, *outputs]
    gr.on([tab.select, changed.change], handles(refresh), view, everything, **QUICK)


def _summary(studio: Studio) -> str:
    shares = studio.dataset.confounds()
    judged = sum(not row["repeat_of"] for row in studio.dataset.standing())
    return f"**{plural(shares.pairs, 'pair')}** to train on, from {plural(judged, 'judgment')}."


def _health(studio: Studio) -> str:
    """What is wrong with the data; nothing where nothing is."""
    lines = health_warnings(studio.dataset.confounds())
    if bad := studio.dataset.bad_lines():
        are = "line is" if bad == 1 else "lines are"
        lines.append(f"{bad:,} {are} no judgment and left out: `python -m biasdpo dataset validate` says why")
    if studio.dataset.overlap_error is not None:
        lines.append(str(studio.dataset.overlap_error))
    return "\n".join(f"> ⚠ {escape(line)}\n" for line in lines)


# The table


def _wanted(search: str, category: Any, verdict: Any, annotator: Any, source: Any, state: Any) -> Query:
    """The query of the filters: "" filters nothing, "=VALUE" wants this value."""
    if len(search) > _MAX_SEARCH_CHARACTERS:
        raise ConfigError(f"A search has at most {_MAX_SEARCH_CHARACTERS} characters: shorten it")
    values = [str(value)[1:] if value else None for value in (category, verdict, annotator, source)]
    return Query(search, *values, state=state)  # type: ignore[misc]


def _choices(name: str, counts_: dict[str, int]) -> list[tuple[str, str]]:
    listed = sorted(counts_.items(), key=lambda item: -item[1])[:_MAX_CHOICES]
    return [("All", ""), *((f"{_word(value) or f'(no {name})'} ({number:,})", f"={value}") for value, number in listed)]


def _word(value: str) -> str:
    return "both " + value[5:] if value.startswith("both_") else value


def _line(row: Row, page: Page) -> list[Any]:
    gone = page.retractions.get(row["id"])
    verdict = _word(row["verdict"]) if gone is None else "edited since" if replacement(gone) else "withdrawn"
    category = ", ".join(filter(None, (row["category"], row["target_group"])))
    texts = [" ".join(text.split()) for text in (row["prompt"], verdict, category, row["annotator"], row["source"])]
    return [False, *map(_cut, texts), local_time(row["created_at"]), row["id"]]


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"


def _position(page: Page) -> str:
    if not page.total:
        return "Nothing matches: clear the search, or set the filters back to All."
    first = page.number * _PAGE_ROWS + 1
    return f"{first:,} to {first + len(page.rows) - 1:,} of **{page.total:,}**, newest first"


def _build_table(studio: Studio, changed: gr.State) -> tuple[Any, tuple[list[Any], list[Any]]]:
    """The filters, the table, a judgment in full, and bulk changes; returns how to refresh it, its inputs and its outputs."""
    number = gr.State(0)
    with gr.Row(elem_id="dataset-filters"):
        search = gr.Textbox(
            "", label="Search", placeholder="Words in any column", max_lines=1, scale=2, min_width=180, elem_id="dataset-search"
        )
        filters = [
            gr.Dropdown([("All", "")], value="", label=name.capitalize(), min_width=120, elem_id=f"dataset-filter-{name}")
            for name in FILTERS
        ]
        state = gr.Dropdown(list(_STATES.items()), value="standing", label="Show", min_width=120, elem_id="dataset-filter-state")
    sought = [search, *filters, state]
    with gr.Row(elem_id="dataset-panes"):
        with gr.Column(scale=3, min_width=340):
            table = gr.Dataframe(
                headers=_HEADERS,
                datatype=["bool", *["str"] * (len(_HEADERS) - 1)],
                type="array",
                interactive=True,
                static_columns=list(range(1, len(_HEADERS))),
                column_widths=_WIDTHS,
                show_label=False,
                label="Judgments",
                buttons=[],
                max_height=420,
                elem_id="dataset-table",
            )
            with gr.Row(elem_classes="actions"):
                position = gr.Markdown(elem_id="dataset-position")
                newer = gr.Button("← Newer", size="sm", min_width=80, elem_id="dataset-previous")
                older = gr.Button("Older →", size="sm", min_width=80, elem_id="dataset-next")
        _build_detail(studio, table, changed)
    _build_bulk(studio, table, sought, changed)

    def show(wanted_number: int, *query: Any) -> Updates:
        page = studio.dataset.page(_wanted(*query), wanted_number, _PAGE_ROWS)
        return {
            number: page.number,
            table: [_line(row, page) for row in page.rows],
            position: _position(page),
            newer: gr.Button(interactive=page.number > 0),
            older: gr.Button(interactive=page.number + 1 < page.pages),
        }

    def refresh(choices: dict[str, Any], wanted_number: int, *query: Any) -> Updates:
        options = {box: gr.Dropdown(choices=_choices(name, choices[name])) for box, name in zip(filters, FILTERS, strict=True)}
        return options | show(wanted_number, *query)

    outputs = [number, table, position, newer, older]
    gr.on(
        [search.change, *(box.input for box in (*filters, state))],
        handles(lambda *query: show(0, *query)),
        sought,
        outputs,
        trigger_mode="always_last",
        **QUICK,
    )
    newer.click(handles(lambda now, *query: show(now - 1, *query)), [number, *sought], outputs, **QUICK)
    older.click(handles(lambda now, *query: show(now + 1, *query)), [number, *sought], outputs, **QUICK)
    return refresh, ([number, *sought], [*filters, *outputs])


# One judgment


def _pieces(one: str, other: str, names: tuple[str, str]) -> Any:
    """The word diff of two texts for gr.HighlightedText; nothing of texts that take too long to compare."""
    if max(len(one), len(other)) > _MAX_DIFF_CHARACTERS:
        return gr.HighlightedText(value=None, visible=False)
    label = {"same": None, "out": names[0], "in": names[1]}
    pieces = [(text, label[kind]) for kind, text in word_diff(one, other)]
    return gr.HighlightedText(pieces, color_map=dict(zip(names, ("#d97706", "#0d9488"), strict=True)), visible=True)


def _facts(row: Row, retraction: Row | None, earlier: Sequence[Row]) -> str:
    """Where a judgment comes from and what became of it, as Markdown."""
    meta = row["meta"]
    by = f", {row['annotator']}" if row["annotator"] else ""
    facts = [("Judged", f"{local_time(row['created_at'])}{by}" + (f", in {meta['seconds']:.1f} s" if meta["seconds"] else ""))]
    if retraction is not None:
        word = "Edited since, as" if (new := replacement(retraction)) else "Withdrawn"
        facts.append((word, new or " by ".join(filter(None, (local_time(retraction["created_at"]), retraction["annotator"])))))
    for old in earlier:
        change = "; ".join(f"{c.replace('_', ' ')} was “{old[c]}”" for c in journal.EDITABLE if old[c] != row[c])
        facts.append(("Edited from", f"{old['id']}: {change}"))
    facts += [("Source", row["source"]), ("Model", meta["model"]), ("Adapter", meta["adapter"]), ("Backend", meta["backend"])]
    facts += [("Sampling", _sampling(meta["sampling"])), ("Seed", str(meta["seed"]) if meta["model"] else "")]
    facts += [("Left side", meta["left_side"]), ("Chosen side", meta["chosen_side"])]
    facts += [("Hidden repeat of", row["repeat_of"]), ("Judgment", row["id"]), ("Pair", row["pair_id"])]
    return "\n".join(f"- **{name}**: {escape(' '.join(value.split()))}" for name, value in facts if value)


def _sampling(text: str) -> str:
    """The settings in words where they are the JSON that we write, else as they stand."""
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(settings, dict):
        return text
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if name != "seed" and value != "")


def _build_detail(studio: Studio, table: gr.Dataframe, changed: gr.State) -> None:
    """A judgment in full beside the table: texts, word diff, provenance; edit and withdraw."""
    shown = gr.State("")
    may = not is_public_space()
    with gr.Column(scale=2, min_width=340, visible=False, elem_id="dataset-detail") as box:
        with gr.Row(elem_classes="actions"):
            edit = gr.Button("Edit", size="sm", min_width=60, elem_id="dataset-edit")
            withdraw = gr.Button("Withdraw", size="sm", min_width=60, elem_id="dataset-withdraw")
            close = gr.Button("Close", size="sm", min_width=60, elem_id="dataset-close")
        with gr.Row(visible=False, elem_classes="actions", elem_id="dataset-confirm") as confirm:
            really = gr.Button("Really withdraw", variant="stop", size="sm", elem_id="dataset-really-withdraw")
            keep = gr.Button("Keep", size="sm", elem_id="dataset-keep")
        fields: dict[str, Any] = {
            name: gr.Textbox(label=name.capitalize(), max_lines=8, interactive=False, elem_id=f"dataset-{name}")
            for name in ("prompt", "chosen", "rejected")
        }
        diff = gr.HighlightedText(label="Rejected against chosen", combine_adjacent=True, elem_id="dataset-diff")
        first = gr.HighlightedText(label="Edits of the completion that was shown", visible=False, elem_id="dataset-edits")
        with gr.Row():
            for name in ("category", "target_group", "note"):
                label = name.replace("_", " ").capitalize()
                fields[name] = gr.Textbox(label=label, interactive=False, min_width=100, elem_id=f"dataset-{name}")
        with gr.Row(visible=False, elem_classes="actions", elem_id="dataset-edit-actions") as edit_actions:
            save = gr.Button("Save as a new version", variant="primary", size="sm", elem_id="dataset-save")
            cancel = gr.Button("Cancel", size="sm", elem_id="dataset-cancel")
        with gr.Accordion("Provenance", open=True, elem_id="dataset-provenance"):
            facts = gr.Markdown(elem_id="dataset-facts")

    def render(judgment_id: str) -> Updates:
        found = studio.dataset.judgment(judgment_id)
        if found is None:
            return {shown: "", box: gr.Column(visible=False)}
        row, retraction = found
        names = ("chosen", "rejected") if row["verdict"] == "preferred" else ("left", "right")
        updates: Updates = {
            shown: row["id"],
            box: gr.Column(visible=True),
            edit: gr.Button(visible=may and retraction is None),
            withdraw: gr.Button(visible=may and retraction is None),
            confirm: gr.Row(visible=False),
            edit_actions: gr.Row(visible=False),
            diff: _pieces(row["rejected"], row["chosen"], (f"only {names[1]}", f"only {names[0]}")),
            facts: _facts(row, retraction, studio.dataset.earlier_versions(row["id"])),
        }
        labels = dict(zip(("chosen", "rejected"), (name.capitalize() for name in names), strict=True))
        for name, field in fields.items():
            updates[field] = gr.Textbox(row[name], interactive=False, **({"label": labels[name]} if name in labels else {}))
        edited = next((column for column in ("chosen", "rejected") if row[f"original_{column}"]), "")
        updates[first] = gr.HighlightedText(visible=False)
        if edited:
            updates[first] = _pieces(row[f"original_{edited}"], row[edited], ("before the edit", "after"))
        return updates

    def choose(event: gr.SelectData) -> Updates:
        if event.index[1] == 0:  # the check box
            return {shown: gr.skip()}
        return render(str(event.row_value[-1]))

    def open_edit() -> Updates:
        return {edit_actions: gr.Row(visible=True)} | {field: gr.Textbox(interactive=True) for field in fields.values()}

    def save_edit(judgment_id: str, who: Any, *texts: str) -> Updates:
        row = (studio.dataset.judgment(judgment_id) or ({},))[0]
        changes = {name: text for name, text in zip(fields, texts, strict=True) if text != row.get(name)}
        new = journal.edit(studio.workspace, [judgment_id], changes, annotator_of(who).nickname)
        if changes and not new:
            raise ConfigError("This judgment was edited or withdrawn meanwhile: open it again")
        return render(new[0] if new else judgment_id) | _tick(changed)

    def do_withdraw(judgment_id: str, who: Any) -> Updates:
        journal.withdraw(studio.workspace, [judgment_id], annotator_of(who).nickname)
        return render(judgment_id) | _tick(changed)

    rendered = [shown, box, edit, withdraw, confirm, edit_actions, diff, first, facts, *fields.values()]
    table.select(handles(choose), None, rendered, trigger_mode="multiple", **QUICK)
    edit.click(open_edit, None, [edit_actions, *fields.values()], **QUICK)
    cancel.click(handles(render), shown, rendered, **QUICK)
    save.click(handles(save_edit), [shown, studio.identity, *fields.values()], [*rendered, changed], **QUICK)
    close.click(lambda: ("", gr.Column(visible=False)), None, [shown, box], **QUICK)
    withdraw.click(lambda: gr.Row(visible=True), None, confirm, **QUICK)
    keep.click(lambda: gr.Row(visible=False), None, confirm, **QUICK)
    really.click(handles(do_withdraw), [shown, studio.identity], [*rendered, changed], **QUICK)


def _tick(changed: gr.State) -> Updates:
    return {changed: secrets.token_hex(4)}


# Several judgments


def _build_bulk(studio: Studio, table: gr.Dataframe, sought: list[Any], changed: gr.State) -> None:
    """Tag or withdraw the selected rows, or all that match; asks first, and does what was asked about."""
    asked = gr.State(([], {}))  # ids, and what to change; {} withdraws
    with gr.Accordion("Change several", open=False, elem_id="dataset-bulk", visible=not is_public_space()):
        with gr.Row():
            scope = gr.Radio(
                [("Selected rows", "selected"), ("All that match the filters", "found")],
                value="selected",
                label="Which",
                elem_id="bulk-scope",
            )
            category = gr.Dropdown(
                ["", *CATEGORIES],
                value="",
                label="Category",
                allow_custom_value=True,
                info="Empty: no change",
                elem_id="bulk-category",
            )
            group = gr.Textbox("", label="Target group", info="Empty: no change", elem_id="bulk-group")
        with gr.Row(elem_classes="actions"):
            tag = gr.Button("Tag", size="sm", elem_id="bulk-tag")
            withdraw = gr.Button("Withdraw", size="sm", variant="stop", elem_id="bulk-withdraw")
        with gr.Row(visible=False, elem_classes="actions", elem_id="bulk-confirm") as confirm:
            question = gr.Markdown(elem_id="bulk-question")
            go = gr.Button("Yes", variant="stop", size="sm", elem_id="bulk-go")
            cancel = gr.Button("Cancel", size="sm", elem_id="bulk-cancel")

    def ask(scope_: str, rows: list[list[Any]], changes: dict[str, str], query: Sequence[Any]) -> Updates:
        if scope_ == "selected":
            ids = [str(row[-1]) for row in rows if row[0] in (True, "true")]
        else:
            ids = studio.dataset.ids(_wanted(*query))
        if not ids:
            raise ConfigError("Nothing is selected: check rows in the table, or choose all that match the filters")
        what = ", ".join(f"{name.replace('_', ' ')} “{escape(text)}”" for name, text in changes.items())
        verb = f"Tag with {what}" if changes else "Withdraw"
        return {
            asked: (ids, changes),
            confirm: gr.Row(visible=True),
            question: f"{verb}: **{plural(len(ids), 'judgment')}**?",
            go: f"{'Tag' if changes else 'Withdraw'} {plural(len(ids), 'judgment')}",
        }

    def ask_tag(scope_: str, rows: list[list[Any]], category_: str, group_: str, *query: Any) -> Updates:
        changes = {name: text.strip() for name, text in (("category", category_ or ""), ("target_group", group_)) if text.strip()}
        if not changes:
            raise ConfigError("Choose a category or write a target group first")
        return ask(scope_, rows, changes, query)

    def apply(asked_: tuple[list[str], dict[str, str]], who: Any) -> Updates:
        ids, changes = asked_
        if changes:
            done = len(journal.edit(studio.workspace, ids, changes, annotator_of(who).nickname))
        else:
            done = journal.withdraw(studio.workspace, ids, annotator_of(who).nickname)
        gr.Info(f"{plural(done, 'judgment')} {'tagged' if changes else 'withdrawn'}.")
        return {asked: ([], {}), confirm: gr.Row(visible=False)} | _tick(changed)

    asking = [asked, confirm, question, go]
    tag.click(handles(ask_tag), [scope, table, category, group, *sought], asking, **QUICK)
    withdraw.click(handles(lambda scope_, rows, *query: ask(scope_, rows, {}, query)), [scope, table, *sought], asking, **QUICK)
    cancel.click(lambda: gr.Row(visible=False), None, confirm, **QUICK)
    go.click(handles(apply), [asked, studio.identity], [asked, confirm, changed], **QUICK)


def _build_charts(studio: Studio) -> gr.Accordion:
    """Charts of what stands, drawn when they are opened."""
    with gr.Accordion("Charts", open=False, elem_id="dataset-charts") as box, gr.Row():
        plots = [gr.Plot(show_label=False, min_width=300, elem_id=f"dataset-chart-{i}") for i in range(4)]
    box.expand(
        handles(lambda: [counted(title, numbers) for title, numbers in counts(studio.dataset.standing()).items()]),
        None,
        plots,
        **QUICK,
    )
    return box


# Import


def _source(named: str, request: gr.Request | None) -> str:
    """A path on this machine, or hub:OWNER/NAME. A browser elsewhere must upload: it would read this machine's files."""
    named = named.strip()
    if not named:
        raise ConfigError("Choose a file, or write a path or hub:OWNER/NAME")
    client = request.client.host if request is not None and request.client else ""
    forwarded = request is not None and "x-forwarded-for" in request.headers
    if not named.startswith(HUB) and (client not in ("127.0.0.1", "::1") or forwarded):
        raise ConfigError("A path is read only for a browser on the same machine: upload the file instead")
    return named


def _bad_rows(bad: Sequence[BadLine], label: str) -> Any:
    rows = [[row.line, row.reason] for row in bad[:_MAX_BAD_ROWS]]
    if len(bad) > _MAX_BAD_ROWS:
        rows.append(["…", f"{len(bad) - _MAX_BAD_ROWS:,} more: `python -m biasdpo dataset validate FILE` lists all"])
    return gr.Dataframe(rows, label=label, visible=bool(bad))


def _build_import(studio: Studio, changed: gr.State, seed: gr.Button) -> gr.Radio:
    """Choose a source, see its first rows, import it; undo an import. Returns the list of imports."""
    source = gr.State("")
    guess = gr.State(ColumnMapping())
    with gr.Row():
        file = gr.File(label="JSONL, JSON, CSV or Parquet", file_types=_FILES, type="filepath", height=120, elem_id="import-file")
        with gr.Column(min_width=280):
            path = gr.Textbox(
                "",
                label="Or a path on this machine, or a Hub dataset",
                placeholder="/path/to/pairs.jsonl or hub:OWNER/NAME",
                max_lines=1,
                elem_id="import-path",
            )
            look = gr.Button("Preview", elem_id="import-preview")
    with gr.Column(visible=False, elem_id="import-box") as box:
        sentence = gr.Markdown(elem_id="import-format")
        with gr.Row():
            pickers = [
                gr.Dropdown(
                    [("(none)", "")],
                    value="",
                    label=f"{field.replace('_', ' ').capitalize()} column",
                    min_width=120,
                    elem_id=f"import-column-{field.replace('_', '-')}",
                )
                for field in _PICKED
            ]
        first_rows = gr.Dataframe(
            headers=["Prompt", "Chosen", "Rejected", "Category", "Target group"],
            label="First pairs",
            interactive=False,
            wrap=True,
            buttons=[],
            max_height=260,
            elem_id="import-first-rows",
        )
        name = gr.Textbox(label="Name of this import", max_lines=1, elem_id="import-name")
    bad_rows = gr.Dataframe(
        headers=["Line", "Why it is left out"],
        interactive=False,
        visible=False,
        wrap=True,
        buttons=[],
        max_height=220,
        column_widths=["80px", "auto"],
        elem_id="import-bad-rows",
    )
    go = gr.Button("Import", variant="primary", visible=False, elem_id="import-button")
    result = gr.Markdown(visible=False, elem_id="import-result")
    imports = gr.Radio([], label="Imports", visible=False, elem_id="imports")
    with gr.Row(elem_classes="actions"):
        undo = gr.Button("Undo this import", size="sm", visible=False, elem_id="import-undo")
        really = gr.Button("", size="sm", variant="stop", visible=False, elem_id="import-really-undo")

    def preview(source_: str, mapping: ColumnMapping | None) -> tuple[importing.Preview, Updates]:
        seen = importing.preview(source_, mapping)
        rows = [[_cut(getattr(pair, field)) for field in _PICKED] for pair in seen.pairs]
        missing = [field for field in ("chosen", "rejected") if not getattr(seen.mapping, field)]
        hint = f" **Choose the column with the {' and the '.join(missing)} completion.**" if missing else ""
        return seen, {
            sentence: escape(str(seen)) + hint,
            first_rows: gr.Dataframe(rows, visible=bool(rows)),
            bad_rows: _bad_rows(seen.bad, "Rows that will be left out (the first ones)"),
            go: gr.Button(visible=True, interactive=not missing),
        }

    def open_source(source_: str) -> Updates:
        refuse_on_public_space("Import")  # before any word on what was named
        seen, updates = preview(source_, None)
        picked: Updates = {
            picker: gr.Dropdown([("(none)", ""), *seen.columns], value=getattr(seen.mapping, field))
            for picker, field in zip(pickers, _PICKED, strict=True)
        }
        opened = {source: source_, guess: seen.mapping, name: import_name(source_), box: gr.Column(visible=True)}
        return updates | picked | opened | {result: gr.Markdown(visible=False)}

    def open_named(named: str, request: gr.Request) -> Updates:
        return open_source(_source(named, request))

    def mapping_of(guess_: ColumnMapping, picked: Sequence[str]) -> ColumnMapping:
        given = dict(zip(_PICKED, picked, strict=True))
        if given["prompt"] != guess_.prompt:  # these belong to the prompt's column that was recognized
            given |= {"input": "", "history": ""}
        return replace(guess_, **given)

    def import_rows(
        source_: str,
        guess_: ColumnMapping,
        name_: str,
        *picked: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Updates:
        """Import what was previewed. If the page is closed meanwhile, the thread goes on: all of it is stored, or nothing."""
        rows = 0

        def on_row() -> None:
            nonlocal rows
            rows += 1
            if rows % 1000 == 0:
                progress((rows, None), unit="rows")

        done = importing.import_file(studio.workspace, source_, mapping_of(guess_, picked), name_, on_row)
        known = f", {plural(done.known, 'row')} already there" if done.known else ""
        left_out = f", {plural(len(done.bad), 'row')} left out" if done.bad else ""
        notes = "".join(f" {escape(note)}." for note in done.notes)
        return {
            result: gr.Markdown(
                f"**{plural(done.written, 'pair')} imported** as {escape(done.source)}{known}{left_out}.{notes}", visible=True
            ),
            bad_rows: _bad_rows(done.bad, "Rows left out"),
            box: gr.Column(visible=False),
            go: gr.Button(visible=False),
        } | _tick(changed)

    def import_seed() -> Updates:
        return import_rows(str(_SEED_PAIRS), importing.preview(_SEED_PAIRS).mapping, "", *_PICKED)

    def ask_undo(chosen: str | None) -> Updates:
        number = studio.dataset.imports().get(chosen or "", 0)
        label = f"Withdraw the {plural(number, 'judgment')} of {str(chosen).removeprefix('import:')}"
        return {undo: gr.Button(visible=False), really: gr.Button(label, visible=bool(number))}

    def undo_import(chosen: str, who: Any) -> Updates:
        done = journal.undo_import(studio.workspace, chosen, annotator_of(who).nickname)
        gr.Info(f"Import undone: {plural(done, 'judgment')} withdrawn.")
        return {undo: gr.Button(visible=False), really: gr.Button(visible=False)} | _tick(changed)

    previewed = [sentence, first_rows, bad_rows, go]
    opened = [*previewed, *pickers, source, guess, name, box, result]
    work: dict[str, Any] = QUICK | {"concurrency_limit": 4}
    file.upload(handles(open_source), file, opened, **work)
    gr.on([look.click, path.submit], handles(open_named), path, opened, **work)
    gr.on(
        [picker.input for picker in pickers],
        handles(lambda source_, guess_, *picked: preview(source_, mapping_of(guess_, picked))[1]),
        [source, guess, *pickers],
        previewed,
        **work,
    )
    long: dict[str, Any] = {"concurrency_limit": 1, "api_visibility": "private", "show_progress_on": result}
    imported = [result, bad_rows, box, go, changed]
    go.click(handles(import_rows), [source, guess, name, *pickers], imported, **long)
    seed.click(handles(import_seed), None, imported, **long)
    imports.input(lambda: (gr.Button(visible=True), gr.Button(visible=False)), None, [undo, really], **QUICK)
    undo.click(handles(ask_undo), imports, [undo, really], **QUICK)
    really.click(handles(undo_import), [imports, studio.identity], [undo, really, changed], **QUICK)
    return imports


# Export


def _build_export(studio: Studio) -> None:
    """Write what training reads, with its card, and offer both for download."""
    with gr.Row():
        suffix = gr.Radio(
            [("JSONL", ".jsonl"), ("CSV", ".csv"), ("Parquet", ".parquet")],
            value=".jsonl",
            label="Format",
            info="One row per pair, by majority, as training reads them; with a dataset card.",
            elem_id="export-format",
        )
        go = gr.Button("Export", scale=0, min_width=140, elem_id="export-button")
    result = gr.Markdown(visible=False, elem_id="export-result")
    with gr.Row(visible=False, elem_classes="actions", elem_id="export-files") as files:
        data = gr.DownloadButton("Download the pairs", size="sm", elem_id="export-data")
        card = gr.DownloadButton("Download the dataset card", size="sm", elem_id="export-card")

    def export(suffix_: str) -> Updates:
        with tempfile.TemporaryDirectory(prefix="biasdpo-export-") as folder:
            done = exporting.export_file(studio.workspace, Path(folder) / f"biasdpo_pairs{suffix_}")
            # Gradio serves its own cache to whoever has the address, and nothing else: the workspace stays closed.
            paths = [save_file_to_cache(path, data.GRADIO_CACHE) for path in (done.path, done.card)]
        split = f" {plural(done.contradictions, 'evenly split pair')} left out." if done.contradictions else ""
        return {
            result: gr.Markdown(f"**{plural(done.rows, 'pair')}** exported.{split} SHA-256 {done.sha256[:16]}…", visible=True),
            files: gr.Row(visible=True),
            data: gr.DownloadButton(f"Download {done.path.name}", value=paths[0]),
            card: gr.DownloadButton(f"Download its card, {done.card.name}", value=paths[1]),
        }

    go.click(
        handles(export),
        suffix,
        [result, files, data, card],
        concurrency_limit=1,
        api_visibility="private",
        show_progress_on=result,
    )
