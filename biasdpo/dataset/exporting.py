"""What training reads of the journal, as one file that `datasets.load_dataset` and TRL take as it is, with a data set card.

JSONL, CSV or Parquet, by the file's suffix. JSONL and Parquet are safest: of a CSV, a spreadsheet may take a text that begins
with '=' for a formula, and pandas takes a cell that says `NA` or `None` for nothing (unless told `keep_default_na=False`, as the
card does).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from biasdpo.dataset.card import build_card, card_path
from biasdpo.dataset.export_rows import COLUMNS, NUMBERS, ExportedRow, build_rows
from biasdpo.dataset.sources import opened_journal
from biasdpo.errors import ConfigError, DatasetError, WorkspaceError
from biasdpo.workspace import Workspace, refuse_on_public_space, replacing, sha256_of


@dataclass(frozen=True)
class Exported:
    """What an export wrote. `repeats` and `contradictions`: judgments beside one a pair, and pairs left out as evenly split."""

    path: Path
    card: Path
    rows: int
    repeats: int
    contradictions: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """The object that `dataset export --json` prints."""
        return asdict(self) | {"path": str(self.path), "card": str(self.card)}


def export_file(workspace: Workspace, path: Path) -> Exported:
    """Write what training reads, and its card beside it: README.md, or FILE.README.md where a README.md of another origin is.

    The file is there whole or not at all; one of that name is replaced. Raises ConfigError for another suffix, DatasetError
    where there is nothing to export, WorkspaceError where it can't be written, RefusedError on a public Space.
    """
    refuse_on_public_space("Export")
    write = _writer_for(path)
    _keep_the_journal(path, workspace)
    journal = opened_journal(workspace)
    rows, repeats, contradictions = build_rows(journal)
    if not rows:
        raise DatasetError(f"Nothing to export: {workspace.preferences} has no pair that is preferred one way; judge some first")
    card = card_path(path)
    try:
        with replacing(path) as temporary:
            write(rows, temporary)
        digest = sha256_of(path)
        with replacing(card) as temporary:
            temporary.write_text(build_card(path.name, digest, rows, journal, contradictions), encoding="utf-8", newline="\n")
    except OSError as exc:
        raise WorkspaceError(f"Can't write {path}: {exc.strerror or exc}; name a file in a writable folder") from exc
    return Exported(path, card, len(rows), repeats, contradictions, digest)


def _keep_the_journal(path: Path, workspace: Workspace) -> None:
    journal = workspace.preferences
    if path.resolve() == journal.resolve() or (path.exists() and journal.exists() and path.samefile(journal)):
        raise ConfigError(f"{path} is the journal itself, which an export would replace; name another file")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it")


def _writer_for(path: Path) -> Callable[[Sequence[ExportedRow], Path], None]:
    writers = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
    if path.suffix.lower() not in writers:
        raise ConfigError(f"An export ends in .jsonl, .csv or .parquet: got {path.name!r}; name such a file")
    return writers[path.suffix.lower()]


def _write_jsonl(rows: Sequence[ExportedRow], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)


def _write_csv(rows: Sequence[ExportedRow], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(vars, rows))


def _write_parquet(rows: Sequence[ExportedRow], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = [(column, pyarrow.int64() if column in NUMBERS else pyarrow.string()) for column in COLUMNS]
    parquet.write_table(pyarrow.Table.from_pylist(list(map(vars, rows)), schema=pyarrow.schema(kinds)), path)
