"""Where pairs come from: a file, `hub:OWNER/NAME`, or `workspace` (the journal)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from biasdpo.dataset.importing import convert_source
from biasdpo.dataset.pairs import PreferencePair, pair_of_row
from biasdpo.dataset.rows import Journal
from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace

WORKSPACE = "workspace"


def load(sources: Iterable[str], workspace: Workspace) -> list[PreferencePair]:
    """The rows of all sources in their order. A source: a file that `dataset import` takes (JSONL, JSON, CSV, Parquet; strings
    or chat messages), `hub:OWNER/NAME`, or `workspace` (the journal)."""
    rows: list[PreferencePair] = []
    for source in sources:
        rows += load_journal(workspace) if source == WORKSPACE else load_file(source)
    return rows


def load_file(source: str | Path) -> list[PreferencePair]:
    """Rows of a file or of `hub:OWNER/NAME`, all of them: unlike in an import, the first bad row is a DatasetError with file,
    line and reason, since nobody would see what a run leaves out."""
    converted = convert_source(source)
    if converted.bad:
        first = converted.bad[0]
        raise DatasetError(f"{source}:{first.line}: {first.reason}; mend or drop the row")
    kept = (row for row in converted.judgments if not row.repeat_of)
    return [PreferencePair(row.prompt, row.chosen, row.rejected, row.category) for row in kept]


load_jsonl = load_file  # its name where the file is a run's snapshot


def load_journal(workspace: Workspace) -> list[PreferencePair]:
    """The journal's rows that are judged `preferred`, not retracted, and no hidden repeats. A bad line is a DatasetError."""
    journal = opened_journal(workspace)
    return [pair_of_row(row, f"{journal.path}, judgment {row['id']}") for row in trainable(journal)]


def opened_journal(workspace: Workspace) -> Journal:
    """The workspace's journal, read. One that is missing, or has a bad line, is a DatasetError."""
    path = workspace.preferences
    if not path.is_file():
        raise DatasetError(
            f"No preference pairs in the workspace yet ({path} is missing): judge some in the app, or train on a file with "
            "--dataset FILE.jsonl"
        )
    journal = Journal(path).refresh()
    if journal.bad_lines:
        first = journal.bad_lines[0]
        raise DatasetError(f"{path}:{first.line}: {first.reason}; mend or drop the line (`dataset validate` lists all such)")
    return journal


def trainable(journal: Journal) -> list[dict[str, Any]]:
    """The journal's rows that a run may use: `preferred`, not retracted, no hidden repeats."""
    return [row for row in journal.standing() if row["verdict"] == "preferred" and not row["repeat_of"]]
