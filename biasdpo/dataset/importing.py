"""A foreign file into the journal: previewed, converted row by row, the good rows stored in one go, the bad ones listed.

Importing the same rows again writes nothing: a row's id follows from its texts and its annotator (and from how often the file
said the same before), or is the one that it has, where BiasDPO made it: a row of a journal, or of `dataset export`. So a row that
was withdrawn stays withdrawn. What a row says beside that (its category) is taken over once, with the row.

A journal of another workspace is taken over as well: its judgments that are `preferred` and stand, with category, group,
annotator, note, time, and what produced the completions; `source` becomes `import:NAME`. Ties and withdrawn judgments are left
out and counted.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from biasdpo.dataset.formats import ColumnMapping, ForeignPair, check_required, convert, detect
from biasdpo.dataset.journal import append_all
from biasdpo.dataset.pairs import pair_id_of, text_fault
from biasdpo.dataset.reading import HUB, rows_of
from biasdpo.dataset.rows import BadLine, Journal, row_of
from biasdpo.dataset.source_rows import SourceRow, bad_line, columns_of
from biasdpo.errors import ConfigError, DatasetError
from biasdpo.records import SEED_RANGE, Judgment, JudgmentMeta
from biasdpo.workspace import Workspace, refuse_on_public_space

SAMPLE_ROWS = 1000  # rows read ahead to learn a file's columns
_MAX_NAME_CHARACTERS = 100
_OWN_ID = re.compile(r"[0-9a-f]{32}")
_JOURNAL_COLUMNS = {"id", "pair_id", "verdict", "retracts"}


@dataclass(frozen=True)
class Preview:
    """What an import would make of a source's first rows.

    columns   of the first SAMPLE_ROWS rows, in the order in which they come up
    mapping   as given, else guessed; "" where no column was recognised
    pairs     the first converted rows
    bad       the first bad rows (with a mapping that lacks chosen or rejected, none are converted, and none are bad)
    """

    columns: tuple[str, ...]
    mapping: ColumnMapping
    pairs: tuple[ForeignPair, ...]
    bad: tuple[BadLine, ...]


@dataclass(frozen=True)
class Converted:
    """A whole source, converted. `notes`: one line each on what was changed or left out, beside the bad rows."""

    judgments: tuple[Judgment, ...]
    bad: tuple[BadLine, ...]
    columns: tuple[str, ...]
    mapping: ColumnMapping
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Imported:
    """What an import did. `known`: rows that the journal had already (or that were withdrawn since)."""

    written: int
    known: int
    bad: tuple[BadLine, ...]
    columns: tuple[str, ...]
    mapping: ColumnMapping
    source: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `dataset import --json` prints."""
        return asdict(self) | {"columns": list(self.columns), "mapping": self.mapping.to_json()}


def preview(source: str | Path, mapping: ColumnMapping | None = None, rows: int = 5) -> Preview:
    """The columns of a source and its first `rows` pairs and bad rows. Stores nothing; a source that can't be read at all is
    a DatasetError, and a public Space a RefusedError."""
    refuse_on_public_space("Import")
    head = list(_head(rows_of(source)))
    columns, mapping = _columns_and_mapping(head, mapping)
    pairs: list[ForeignPair] = []
    bad: list[BadLine] = []
    for row in head if mapping.chosen and mapping.rejected else ():
        if isinstance(row, BadLine):
            bad.append(row)
        elif not is_journal_row(row.value) or row.value.get("verdict") == "preferred":
            try:
                pairs.append(convert(row.value, mapping))
            except ValueError as exc:
                bad.append(bad_line(row.line, str(exc)))
        if len(pairs) >= rows and len(bad) >= rows:
            break
    return Preview(columns, mapping, tuple(pairs[:rows]), tuple(bad[:rows]))


def import_file(
    workspace: Workspace,
    source: str | Path,
    mapping: ColumnMapping | None = None,
    name: str = "",
    on_row: Callable[[], object] = lambda: None,
) -> Imported:
    """Take a file, or `hub:OWNER/NAME`, into the journal as `import:NAME` (default: the file's name without its suffix).

    mapping   which column is what; None guesses it (see `preview`)
    on_row    called after each row that was read

    Raises DatasetError where not one row is good, WorkspaceError where the journal can't be written (then nothing of it is), and
    RefusedError on a public Space.
    """
    refuse_on_public_space("Import")
    converted = convert_source(source, mapping, import_name(source, name), on_row)
    check_some_good(source, converted)
    appended = append_all(workspace, converted.judgments)
    return _imported(converted, appended.written, appended.known)


def try_import(
    workspace: Workspace,
    source: str | Path,
    mapping: ColumnMapping | None = None,
    name: str = "",
    on_row: Callable[[], object] = lambda: None,
) -> Imported:
    """What `import_file` would do, and its errors; stores nothing."""
    refuse_on_public_space("Import")
    converted = convert_source(source, mapping, import_name(source, name), on_row)
    check_some_good(source, converted)
    known = Journal(workspace.preferences).refresh().rows
    written = len({judgment.id for judgment in converted.judgments} - known.keys())
    return _imported(converted, written, len(converted.judgments) - written)


def _imported(converted: Converted, written: int, known: int) -> Imported:
    source = converted.judgments[0].source
    return Imported(written, known, converted.bad, converted.columns, converted.mapping, source, converted.notes)


def import_name(source: str | Path, name: str = "") -> str:
    """The NAME of `import:NAME`: as given, else the file's name without its suffix, or OWNER/NAME on the Hub."""
    text = str(source)
    name = name or (text.removeprefix(HUB) if text.startswith(HUB) else Path(text).stem)
    if not name.isprintable() or len(name) > _MAX_NAME_CHARACTERS:
        raise ConfigError(
            f"An import's name has at most {_MAX_NAME_CHARACTERS} printable characters: got {name[:120]!r}; choose another"
        )
    return name


def convert_source(
    source: str | Path, mapping: ColumnMapping | None = None, name: str = "file", on_row: Callable[[], object] = lambda: None
) -> Converted:
    """Every row of a source as a judgment that could be stored, its source `import:NAME`.

    Raises DatasetError where the source can't be read at all, or where no column is recognised as chosen or rejected."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    rows = rows_of(source)
    head = list(_head(rows))
    columns, mapping = _columns_and_mapping(head, mapping)
    if columns:
        check_required(mapping, columns)
    judgments: list[tuple[str, Judgment]] = []  # with the id that a journal's row has there
    bad: list[BadLine] = []
    left_out: Counter[str] = Counter()
    withdrawn: set[str] = set()
    said: Counter[tuple[str, ...]] = Counter()
    with_system = 0
    for row in chain(head, rows):
        on_row()
        if isinstance(row, BadLine):
            bad.append(row)
            continue
        try:
            if is_journal_row(row.value):
                own = row_of(row.value)
                if own["verdict"] != "preferred":
                    withdrawn |= {own["retracts"]} - {""}
                    left_out[own["verdict"]] += own["verdict"] != "retracted"
                    continue
                pair, extra = convert(row.value, mapping), _of_journal(own, now)
            else:
                pair, extra = convert(row.value, mapping), {}
        except ValueError as exc:
            bad.append(bad_line(row.line, str(exc)))
            continue
        with_system += pair.has_system
        texts = (pair.prompt, pair.chosen, pair.rejected)
        said[*texts, pair.annotator] += 1
        pair_id = pair_id_of(*texts)
        judgment = Judgment(
            _own_id(row.value, pair_id) or _id_of(*texts, pair.annotator, str(said[*texts, pair.annotator])),
            extra.pop("created_at", now),
            pair_id,
            *texts,
            category=pair.category,
            target_group=pair.target_group,
            annotator=pair.annotator,
            note=pair.note,
            source=f"import:{name}",
            **extra,
        )
        judgments.append((row.value["id"] if extra else "", judgment))
    standing = [judgment for there, judgment in judgments if there not in withdrawn]
    left_out["withdrawn"] = len(judgments) - len(standing)
    return Converted(tuple(standing), tuple(bad), columns, mapping, _notes(with_system, +left_out))


def check_some_good(source: str | Path, converted: Converted) -> None:
    """Raise DatasetError where a source has not one good row."""
    if converted.judgments:
        return
    if not converted.bad:
        notes = "".join(f" ({note})" for note in converted.notes)
        raise DatasetError(f"{source} has no rows to take over{notes}; name another file")
    first = converted.bad[0]
    raise DatasetError(
        f"No good row in {source}, {len(converted.bad):,} bad ones, the first in line {first.line}: {first.reason}; "
        "mend the file, or name its columns with --map"
    )


def is_journal_row(value: Any) -> bool:
    """Whether a row is a line of a journal (this workspace's or another's), by its columns."""
    return isinstance(value, dict) and value.keys() >= _JOURNAL_COLUMNS


def _head(rows: Iterator[SourceRow | BadLine]) -> Iterator[SourceRow | BadLine]:
    """The first rows, until SAMPLE_ROWS of them are objects."""
    objects = 0
    while objects < SAMPLE_ROWS:
        row = next(rows, None)
        if row is None:
            return
        objects += isinstance(row, SourceRow) and isinstance(row.value, dict)
        yield row


def _columns_and_mapping(head: list[SourceRow | BadLine], mapping: ColumnMapping | None) -> tuple[tuple[str, ...], ColumnMapping]:
    columns = columns_of(head)
    return columns, mapping or detect(columns, [row.value for row in head if isinstance(row, SourceRow)])


def _own_id(row: dict[str, Any], pair_id: str) -> str:
    """The id that a row brings along, where BiasDPO made it; else ""."""
    own = row.get("id")
    return own if isinstance(own, str) and _OWN_ID.fullmatch(own) and row.get("pair_id") == pair_id else ""


def _id_of(*parts: str) -> str:
    """32 hex digits of texts that hold no NUL character."""
    return hashlib.sha256("\0".join(("import", *parts)).encode()).hexdigest()[:32]


def _of_journal(row: dict[str, Any], now: str) -> dict[str, Any]:
    """What a journal's row says beside its pair; a text that can't be stored is a ValueError."""
    try:
        datetime.fromisoformat(row["created_at"])
        created_at = row["created_at"]
    except ValueError:
        created_at = now
    kept = {column: row[column] for column in ("original_chosen", "original_rejected", "repeat_of")}
    meta = _meta_of(row["meta"])
    for column, text in chain(kept.items(), asdict(meta).items()):
        if isinstance(text, str) and text.strip() and (fault := text_fault(text, column)):
            raise ValueError(fault)
    return {"created_at": created_at, **kept, "meta": meta}


def _meta_of(meta: dict[str, Any]) -> JudgmentMeta:
    """What `row_of` left of it, without numbers that can't be stored."""
    seed, seconds = meta["seed"], meta["seconds"]
    seed = seed if SEED_RANGE[0] <= seed <= SEED_RANGE[1] else 0
    return JudgmentMeta(**meta | {"seed": seed, "seconds": seconds if math.isfinite(seconds) else 0.0})


def _notes(with_system: int, left_out: Counter[str]) -> tuple[str, ...]:
    notes = []
    if with_system:
        notes.append(f"{with_system:,} rows have a system text, which now stands before the prompt")
    if left_out:
        counts = ", ".join(f"{count:,} {what}" for what, count in sorted(left_out.items()))
        notes.append(f"left out of the journal: {counts}")
    return tuple(notes)
