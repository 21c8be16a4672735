"""What the Data set tab shows of files that come in and go out, as HTML. Everything that is not ours is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from biasdpo.dataset import BadLine, ColumnMapping, Exported, ForeignPair, Imported, Preview, shown_columns
from biasdpo.ui import render

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
        return render.note("Say which columns hold the chosen and the rejected completion.")
    if seen.pairs:
        told = f"The first pairs, as they would be stored with the source import:{name}."
    else:
        told = "None of the first rows is a pair with these columns."
    table = _pairs(seen.pairs) if seen.pairs else ""
    return f"{render.note(told)}{table}{render.note(_left_out(seen))}{bad_rows(seen.bad, 'The first bad rows')}"


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
    return render.busy(f"Importing: {rows:,} rows read …" if rows else "Importing …")


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
