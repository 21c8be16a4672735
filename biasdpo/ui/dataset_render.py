"""What the Data set tab shows of the journal, as HTML: pure functions of rows. Everything that is not ours is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape

from biasdpo.dataset import Page
from biasdpo.label import word_diff
from biasdpo.ui import label_render
from biasdpo.ui.store import Row

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
    return label_render.warning(" ".join(told))


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
        drawn = f'<div class="bd-diff">{label_render.diff(word_diff(one, other))}</div>'
    else:
        drawn = label_render.side_diff(one, other, names)
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
    except ValueError:
        return text
    if not isinstance(settings, dict):
        return text
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if name != "seed" and value != "")
