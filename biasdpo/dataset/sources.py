"""Where pairs come from: a JSONL file, `hub:OWNER/NAME`, or `workspace` (the journal)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from biasdpo.dataset.journal import Journal
from biasdpo.dataset.pairs import PreferencePair, pair_of_row
from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace

WORKSPACE = "workspace"
HUB = "hub:"


def load(sources: Iterable[str], workspace: Workspace) -> list[PreferencePair]:
    """The rows of all sources in their order. A source: a JSONL file, `hub:OWNER/NAME`, or `workspace` (the journal)."""
    rows: list[PreferencePair] = []
    for source in sources:
        if source == WORKSPACE:
            rows += load_journal(workspace)
        elif source.startswith(HUB):
            rows += [pair_of_row(row, f"{source} row {number}") for number, row in hub_rows(source.removeprefix(HUB))]
        else:
            rows += load_jsonl(Path(source).expanduser())
    return rows


def load_jsonl(path: Path) -> list[PreferencePair]:
    """Rows of a JSONL file with prompt, chosen, rejected. The first bad row is a DatasetError with file, line and reason."""
    return [pair_of_row(row, f"{path}:{number}") for number, row in _lines(path)]


def hub_rows(name: str) -> list[tuple[int, Any]]:
    """Rows of a Hub data set's split `train`, else its first, with their numbers."""
    from datasets import load_dataset

    try:
        splits = load_dataset(name)
        split = "train" if "train" in splits else next(iter(splits))
        return list(enumerate(splits[split]))
    except Exception as exc:  # datasets raises a dozen unrelated kinds, all of which mean "not to be had"
        reason = str(exc).strip().split("\n")[0][:160] or type(exc).__name__
        raise DatasetError(f"Can't load {HUB}{name}: {reason}; check the name and the network, or name a JSONL file") from exc


def load_journal(workspace: Workspace) -> list[PreferencePair]:
    """The journal's rows that are judged `preferred`, not retracted, and no hidden repeats. A bad line is a DatasetError."""
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
    return [pair_of_row(row, f"{path}, judgment {row['id']}") for row in trainable(journal)]


def trainable(journal: Journal) -> list[dict[str, Any]]:
    """The journal's rows that a run may use: `preferred`, not retracted, no hidden repeats."""
    return [row for row in journal.standing() if row["verdict"] == "preferred" and not row["repeat_of"]]


def _lines(path: Path) -> Iterable[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as exc:
        raise DatasetError(f"No dataset file {path}: check the path (or name hub:OWNER/NAME, or workspace)") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise DatasetError(f"Can't read {path}: {exc}; name a UTF-8 JSONL file") from exc
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as exc:
                raise DatasetError(f"{path}:{number}: no JSON ({exc}); mend or drop the line") from exc
