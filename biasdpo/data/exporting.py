"""Export of what training reads from the journal: a file that `datasets.load_dataset` and TRL read as it is, and a dataset card.

JSONL, CSV or Parquet, by the file's suffix. JSONL and Parquet are safest: in CSV, a quote stands before a text that a
spreadsheet would take for a formula (the import takes it away), and pandas reads a cell `NA` or `None` as missing (unless
given `keep_default_na=False`, as the card does).
"""

from __future__ import annotations

import csv
import hashlib
import html
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import orjson

from biasdpo.access import audit, require_owner
from biasdpo.data.health import measure
from biasdpo.data.journal import Journal, Row
from biasdpo.data.pairs import PreferencePair, derive, judged_pair_id, pair_of_row
from biasdpo.data.splits import open_journal, trainable
from biasdpo.errors import ConfigError, DatasetError, WorkspaceError
from biasdpo.records import csv_cell
from biasdpo.workspace import ASSETS, Workspace, replacing, sha256_of

# Rows


@dataclass(frozen=True)
class ExportedRow:
    """A row of an export: one pair. These are its columns, in this order.

    prompt, chosen, rejected   as training reads them
    category, target_group     of the first judgment that names one
    pair_id                    the same two completions to the same prompt, whichever was chosen
    id, source, annotator,     of the first judgment that chose so; `dataset retract` takes the id
    created_at
    votes, votes_against       judgments that chose so, and the other way round (an evenly split pair is left out)
    """

    prompt: str
    chosen: str
    rejected: str
    category: str
    target_group: str
    pair_id: str
    id: str
    source: str
    annotator: str
    created_at: str
    votes: int
    votes_against: int


COLUMNS = tuple(field.name for field in fields(ExportedRow))
NUMBERS = ("votes", "votes_against")


def build_rows(journal: Journal) -> tuple[list[ExportedRow], int, int]:
    """One row per pair, as `derive` decides; the number of repeats, and of contradictions."""
    judged = trainable(journal)
    pairs = [pair_of_row(row, f"{journal.path}, judgment {row['id']}") for row in judged]
    judgments: dict[tuple[str, str], list[Row]] = {}
    for pair, row in zip(pairs, judged, strict=True):
        judgments.setdefault((pair.pair_id, pair.chosen), []).append(row)
    derived = derive(pairs)
    rows = []
    for pair in derived.pairs:
        pair_id = pair.pair_id
        agreeing = judgments[pair_id, pair.chosen]
        rows.append(
            ExportedRow(
                pair.prompt,
                pair.chosen,
                pair.rejected,
                category=next((row["category"] for row in agreeing if row["category"]), ""),
                target_group=next((row["target_group"] for row in agreeing if row["target_group"]), ""),
                pair_id=pair_id,
                **{column: agreeing[0][column] for column in ("id", "source", "annotator", "created_at")},
                votes=len(agreeing),
                votes_against=len(judgments.get((pair_id, pair.rejected), ())),
            )
        )
    return rows, derived.repeats, derived.contradictions


# The file


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    repeats         judgments of a pair beyond the first
    contradictions  pairs left out, since they were chosen as often one way as the other
    """

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
    """Write what training reads, and a card beside it: README.md, or FILE.README.md if there is a README.md of another origin.

    An existing file is replaced as a whole or not at all. Raises ConfigError for another suffix, DatasetError if there is nothing
    to export, WorkspaceError if it can't be written, RefusedError for a visitor.
    """
    require_owner("Export")
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise ConfigError(f"An export ends in .jsonl, .csv or .parquet: got {path.name!r}; name such a file")
    if path.resolve() == workspace.preferences.resolve() or _is_same_file(path, workspace.preferences):
        raise ConfigError(f"{path} is the journal itself, which an export would replace; name another file")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it")
    journal = open_journal(workspace)
    rows, repeats, contradictions = build_rows(journal)
    if not rows:
        raise DatasetError(f"Nothing to export: {workspace.preferences} has no pair that is preferred one way; judge some first")
    card = card_path(path)
    try:
        with replacing(path) as temporary:
            write(rows, temporary)
        sha256 = sha256_of(path)
        with replacing(card) as temporary:
            temporary.write_text(build_card(path.name, sha256, rows, journal, contradictions), encoding="utf-8", newline="\n")
    except OSError as exc:
        raise WorkspaceError(f"Can't write {path}: {exc.strerror or exc}; name a file in a writable folder") from exc
    audit(workspace.root, "export", file=str(path.resolve()))  # `erase` looks there
    return Exported(path, card, len(rows), repeats, contradictions, sha256)


def _is_same_file(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _write_jsonl(rows: Sequence[ExportedRow], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(_line, rows))


def _line(row: ExportedRow) -> str:
    return json.dumps(vars(row), ensure_ascii=False) + "\n"


def _write_csv(rows: Sequence[ExportedRow], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: csv_cell(value) for column, value in vars(row).items()} for row in rows)


def _write_parquet(rows: Sequence[ExportedRow], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    types = [(column, pyarrow.int64() if column in NUMBERS else pyarrow.string()) for column in COLUMNS]
    parquet.write_table(pyarrow.Table.from_pylist(list(map(vars, rows)), schema=pyarrow.schema(types)), path)


_WRITERS: dict[str, Callable[[Sequence[ExportedRow], Path], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}

# For the public


@dataclass(frozen=True)
class PublicPairs:
    """The judgments of some pairs, as they may be published.

    content     a JSONL file, and `card`, the dataset card that belongs to it
    annotators  the names behind it
    edited      pairs of which annotators wrote a part
    """

    content: bytes
    card: str
    rows: list[ExportedRow]
    annotators: list[str]
    edited: int


def public_pairs(
    workspace: Workspace, pairs: Iterable[PreferencePair], file_name: str, *, with_annotators: bool = False
) -> PublicPairs:
    """The journal's rows whose chosen and rejected texts are these pairs', with numbered annotators and dates without times.

    Pairs that the journal does not hold (of files), that were withdrawn or erased, or that were chosen the other way round since
    are left out. `with_annotators`: with names and times.
    """
    require_owner("Export")
    wanted = {(pair.pair_id, pair.chosen) for pair in pairs}
    ids = {pair_id for pair_id, _chosen in wanted}
    every = list(open_journal(workspace).rows.values()) if workspace.preferences.is_file() else []
    judged = {row["id"]: row for row in every if row["verdict"] != "retracted" and judged_pair_id(row) in ids}
    names = list(dict.fromkeys(row["annotator"] for row in judged.values() if row["annotator"]))
    aliases = {name: name if with_annotators else f"annotator {i}" for i, name in enumerate(names, 1)}

    def public(row: Row) -> Row:
        meta = row["meta"] | {key: _without_folder(row["meta"][key]) for key in ("model", "adapter")} | {"browser": ""}
        day = row["created_at"] if with_annotators else row["created_at"][:10]
        return row | {"annotator": aliases.get(row["annotator"], ""), "created_at": day, "note": "", "meta": meta}

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "preferences.jsonl"
        with path.open("wb") as file:
            file.writelines(orjson.dumps(public(row)) + b"\n" for row in every if {row["id"], row["retracts"]} & judged.keys())
        journal = Journal(path).refresh()
    rows, _repeats, contradictions = build_rows(journal)
    rows = [row for row in rows if (row.pair_id, row.chosen) in wanted]
    content = "".join(map(_line, rows)).encode("utf-8")
    card = build_card(file_name, hashlib.sha256(content).hexdigest(), rows, journal, contradictions)
    edited = sum(bool(judged[row.id]["original_chosen"] or judged[row.id]["original_rejected"]) for row in rows)
    return PublicPairs(content, card, rows, names, edited)


def _without_folder(name: str) -> str:
    return Path(name).name if name.startswith(("/", "~")) else name


# The card

OWN_SOURCES = ("compare", "label")  # judged in the app
ANNOTATIONS_LICENSE = "cc-by-4.0"  # what the app tells annotators before their first verdict
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LOADERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_MARK = "<!-- BiasDPO export"


def card_path(path: Path) -> Path:
    """Where the card of an export goes; a DatasetError if both names are taken.

    Nobody's README is overwritten: only a card that was written here for this very file and has not been edited since.
    """
    names = ("README.md", f"{path.name}.README.md")
    for card in map(path.with_name, names):
        if not card.exists() or _is_unedited_card(card, path.name):
            return card
    raise DatasetError(f"{' and '.join(names)} in {path.parent} are taken: rename one to make room for the dataset card")


def build_card(file_name: str, sha256: str, rows: Sequence[ExportedRow], journal: Journal, contradictions: int) -> str:
    """Render assets/dataset_card.md.j2: front matter, content warning, counts, sources, confounds, columns, license."""
    from huggingface_hub import DatasetCard, DatasetCardData
    from jinja2 import Environment

    own = sum(row.source in OWN_SOURCES for row in rows)
    license_name = f"{ANNOTATIONS_LICENSE}-and-that-of-each-source" if own else "that-of-each-source"
    suffix = Path(file_name).suffix.lower()
    sources = Counter(row.source for row in rows)
    data = DatasetCardData(
        pretty_name="Preference pairs collected with BiasDPO",
        license=ANNOTATIONS_LICENSE if own == len(rows) else "other",
        license_name=None if own == len(rows) else license_name,
        task_categories=["text-generation"],
        tags=["preference", "dpo", "trl", "bias"],
        size_categories=[next((name for limit, name in _SIZES if len(rows) < limit), "n>1M")],
        # The columns' types are stated: a loader that guesses takes texts that look like numbers, dates or nothing for such.
        dataset_info={
            "config_name": "default",
            "features": [{"name": name, "dtype": "int64" if name in NUMBERS else "string"} for name in COLUMNS],
        },
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": file_name}],
                **({"keep_default_na": False} if suffix == ".csv" else {}),
            }
        ],
    )
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["text"] = _text
    template = environment.from_string((ASSETS / "dataset_card.md.j2").read_text(encoding="utf-8"))
    card = template.render(
        card_data=data.to_yaml(),
        pairs=len(rows),
        loader=_LOADERS[suffix],
        file_name=file_name,
        file_json=json.dumps(file_name),
        sha256=sha256,
        tables=_tables(rows, journal, sources),
        annotators=len({row["annotator"] for row in journal.standing() if row["annotator"]}),
        contradictions=contradictions,
        confounds=measure([journal.rows[row.id] for row in rows]),
        judged_here=own > 0,
        imported=[source for source in sources if source.startswith("import:")],
        seed="seed" in sources,
    )
    body = DatasetCard(card).content  # raises if the front matter is not valid
    return f"{body}{_mark(file_name, body)}\n"


def _tables(rows: Sequence[ExportedRow], journal: Journal, sources: Counter[str]) -> list[tuple[str, str, list[tuple[str, int]]]]:
    """The tables of counts: title, unit, and (name, count) in descending order."""
    standing = journal.standing()
    withdrawn = sum(row["verdict"] != "retracted" for row in journal.rows.values()) - len(standing)
    judged = [journal.rows[row.id]["meta"] for row in rows]
    models = [f"{meta['model']} with {meta['adapter']}" if meta["adapter"] else meta["model"] for meta in judged]
    tables = [
        ("Category", "Pairs", _counts(row.category or "(none)" for row in rows)),
        ("Target group", "Pairs", _counts(row.target_group or "(none)" for row in rows)),
        (
            "Verdict, over all judgments",
            "Judgments",
            [*_counts(r["verdict"] for r in standing), ("(withdrawn since)", withdrawn)],
        ),
        ("Source", "Pairs", sources.most_common()),
        ("Completions written by", "Pairs", _counts(filter(None, models))),
    ]
    return [table for table in tables if table[2] and (table[0] != "Target group" or any(row.target_group for row in rows))]


def _counts(names: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))


def _text(text: str) -> str:
    """Somebody's words inside Markdown: no markup, no line break, no end of a cell."""
    return html.escape(" ".join(text.split())).replace("|", "\\|").replace("`", "'")


def _mark(file_name: str, body: str) -> str:
    """The last line, by which an unedited card of this file is recognized."""
    return f"{_MARK} {_digest(file_name)[:16]} {_digest(body)} -->"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _is_unedited_card(card: Path, file_name: str) -> bool:
    try:
        text = card.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    body, mark, rest = text.rpartition(_MARK)
    return bool(mark) and mark + rest == _mark(file_name, body) + "\n"
