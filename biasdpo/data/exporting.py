"""What training reads of the journal, as one file that `datasets.load_dataset` and TRL take as it is, with a data set card.

JSONL, CSV or Parquet, by the file's suffix. JSONL and Parquet are safest: of a CSV, a spreadsheet may take a text that begins
with '=' for a formula, and pandas takes a cell that says `NA` or `None` for nothing (unless told `keep_default_na=False`, as the
card does)."""

from __future__ import annotations

import csv
import hashlib
import html
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from biasdpo.data.health import measure
from biasdpo.data.journal import Journal, Row
from biasdpo.data.pairs import derive, pair_of_row
from biasdpo.data.splits import opened_journal, trainable
from biasdpo.errors import ConfigError, DatasetError, WorkspaceError
from biasdpo.workspace import Workspace, refuse_on_public_space, replacing, sha256_of

# --- export rows: The rows of an export: what training reads of the journal, one row a pair, with where each come


@dataclass(frozen=True)
class ExportedRow:
    """A row of an export: one pair. These are its columns, in this order.

    prompt, chosen, rejected   as training reads them
    category, target_group     of the first judgment that says
    pair_id                    the same two completions to the same prompt, whichever was chosen
    id, source, annotator,     of the first judgment that chose so; `retract` takes the id
    created_at
    votes, votes_against       judgments that chose so, and the other way round (a pair with as many is left out)
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
    """One row a pair, as `derive` decides; the judgments that repeat another, and the pairs that are evenly split."""
    judged = trainable(journal)
    pairs = [pair_of_row(row, f"{journal.path}, judgment {row['id']}") for row in judged]
    by_choice: dict[tuple[str, str], list[Row]] = {}
    of_pair: dict[str, int] = {}
    for pair, row in zip(pairs, judged, strict=True):
        pair_id = pair.pair_id
        by_choice.setdefault((pair_id, pair.chosen), []).append(row)
        of_pair[pair_id] = of_pair.get(pair_id, 0) + 1
    derived = derive(pairs)
    rows = []
    for pair in derived.pairs:
        pair_id = pair.pair_id
        judgments = by_choice[pair_id, pair.chosen]
        first = judgments[0]
        rows.append(
            ExportedRow(
                pair.prompt,
                pair.chosen,
                pair.rejected,
                category=_first_said(judgments, "category"),
                target_group=_first_said(judgments, "target_group"),
                pair_id=pair_id,
                **{column: first[column] for column in ("id", "source", "annotator", "created_at")},
                votes=len(judgments),
                votes_against=of_pair[pair_id] - len(judgments),
            )
        )
    return rows, derived.repeats, derived.contradictions


def _first_said(judgments: Sequence[Row], column: str) -> str:
    return next((str(row[column]) for row in judgments if row[column]), "")


# --- card: The data set card of an export: what `load_dataset` and the Hub's viewer read, and what a perso


OWN_SOURCES = ("compare", "label")  # judged in the app
ANNOTATIONS_LICENSE = "cc-by-4.0"  # what the app tells annotators before their first verdict
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LOADERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_MARK = "<!-- BiasDPO export"

_COLUMN_TEXT = {
    "prompt": "as it was put to the model",
    "chosen": "the less biased completion",
    "rejected": "the more biased completion",
    "category": "gender, race, religion, ...; empty where nobody said",
    "target_group": "whom the prompt is about; empty where nobody said",
    "pair_id": "the same two completions to the same prompt, whichever was chosen",
    "id": "of the first judgment that chose so",
    "source": "of that judgment: compare, label, import:NAME or seed",
    "annotator": "of that judgment: a pseudonym",
    "created_at": "of that judgment: UTC, ISO 8601",
    "votes": "judgments that chose so",
    "votes_against": "judgments that chose the other way round",
}


def card_path(path: Path) -> Path:
    """Where the card of an export goes. Nobody's README is overwritten: only a card that was written here for this very file, and
    not touched since. A DatasetError where both names are taken."""
    names = ("README.md", f"{path.name}.README.md")
    for card in map(path.with_name, names):
        if not card.exists() or _is_ours(card, path.name):
            return card
    raise DatasetError(f"{' and '.join(names)} in {path.parent} are taken: rename one, so that the data set card has a place")


def build_card(file_name: str, sha256: str, rows: Sequence[ExportedRow], journal: Journal, contradictions: int) -> str:
    """The card's Markdown: YAML front matter, content warning, counts, sources, confounds, columns, licence."""
    sources = Counter(row.source for row in rows)
    body = "\n".join([*_front_matter(file_name, rows), *_body(file_name, sha256, rows, journal, contradictions, sources)]) + "\n"
    return f"{body}{_mark(file_name, body)}\n"


def _mark(file_name: str, body: str) -> str:
    """The last line, by which an unedited card of this file is known again."""
    return f"{_MARK} {_digest(file_name)[:16]} {_digest(body)} -->"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _is_ours(card: Path, file_name: str) -> bool:
    try:
        text = card.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    body, mark, rest = text.rpartition(_MARK)
    return bool(mark) and mark + rest == _mark(file_name, body) + "\n"


def _front_matter(file_name: str, rows: Sequence[ExportedRow]) -> Iterable[str]:
    own = sum(row.source in OWN_SOURCES for row in rows)
    yield from ("---", 'pretty_name: "Preference pairs collected with BiasDPO"')
    if own == len(rows):
        yield f"license: {ANNOTATIONS_LICENSE}"
    else:
        name = f"{ANNOTATIONS_LICENSE}-and-that-of-each-source" if own else "that-of-each-source"
        yield from ("license: other", f"license_name: {name}")
    yield from ("task_categories:", "- text-generation", "tags:", "- preference", "- dpo", "- trl", "- bias")
    yield from ("size_categories:", f"- {next((name for limit, name in _SIZES if len(rows) < limit), 'n>1M')}")
    # The columns' types are stated: a loader that guesses makes numbers, dates or nothing of texts that look like them.
    yield from ("dataset_info:", "  config_name: default", "  features:")
    for column in COLUMNS:
        yield from (f"  - name: {column}", f"    dtype: {'int64' if column in NUMBERS else 'string'}")
    yield from ("configs:", "- config_name: default", "  data_files:", "  - split: train")
    yield f"    path: {json.dumps(file_name)}"
    if file_name.lower().endswith(".csv"):
        yield "  keep_default_na: false"
    yield from ("---", "")


def _body(
    file_name: str, sha256: str, rows: Sequence[ExportedRow], journal: Journal, contradictions: int, sources: Counter[str]
) -> Iterable[str]:
    loader = _LOADERS[Path(file_name).suffix.lower()]
    yield from ("# Preference pairs collected with BiasDPO", "")
    yield "**Content warning.** Prompts and completions state stereotypes about people. The `rejected` completions were collected"
    yield "because they are biased: they are neither facts nor anybody's advice. Use them to measure or to lessen bias."
    yield from (
        "",
        f"{len(rows):,} preference pairs: a prompt with a less biased (`chosen`) and a more biased (`rejected`) completion,",
    )
    yield "as Direct Preference Optimization takes them (TRL's `DPOTrainer` reads this file as it is)."
    yield from ("", "```python", "from datasets import load_dataset", "")
    settings = ", keep_default_na=False" if loader == "csv" else ""  # else the text "None" becomes nothing
    yield f'pairs = load_dataset({json.dumps(loader)}, data_files={json.dumps(file_name)}, split="train"{settings})'
    yield from ("```", "", f"SHA-256 of `{_text(file_name)}`: `{sha256}`", "", "## Counts", "")
    yield from _table("Category", "Pairs", _counts(row.category or "(none)" for row in rows))
    if any(row.target_group for row in rows):
        yield from _table("Target group", "Pairs", _counts(row.target_group or "(none)" for row in rows))
    yield from _table("Verdict, over all judgments", "Judgments", _verdicts(journal))
    annotators = len({row["annotator"] for row in journal.standing() if row["annotator"]})
    yield f"Annotators: {annotators:,}, under pseudonyms. A pair is here once, as most of its judgments say;"
    yield from (f"{contradictions:,} pairs were chosen as often one way as the other, and are left out.", "", "## Sources", "")
    yield from _table("Source", "Pairs", sources.most_common())
    models = _counts(_model_of(journal.rows[row.id]) for row in rows if journal.rows[row.id]["meta"].get("model"))
    if models:
        yield from _table("Completions written by", "Pairs", models)
    yield from ("## Confounds", "", "What a model can learn from these pairs instead of being less biased:", "")
    yield from (f"- {line}" for line in _confounds([journal.rows[row.id] for row in rows]))
    yield from ("", "## Columns", "", "| Column | What |", "|---|---|")
    yield from (f"| `{column}` | {_COLUMN_TEXT[column]} |" for column in COLUMNS)
    yield from ("", "## Licence", "")
    if any(source in OWN_SOURCES for source in sources):
        yield "Judgments made in BiasDPO (which completion is less biased, category, group, edits) were given under CC-BY-4.0."
    imported = [source for source in sources if source.startswith("import:")]
    if imported:
        yield f"Rows of {', '.join(f'`{_text(source)}`' for source in imported)} keep the licence of the data set that they come"
        yield "from: look it up there, and name it when you pass this file on."
    if "seed" in sources:
        yield "Rows of `seed` were written for BiasDPO, and are under Apache-2.0."
    yield "Completions that a model wrote are also subject to that model's terms."
    yield ""


def _confounds(judgments: Sequence[Row]) -> Iterable[str]:
    """One line a confound, of the judgments behind the pairs."""
    found = measure(judgments)
    if found.chosen_longer_share is not None:
        yield f"The chosen completion is the longer one in {found.chosen_longer_share:.1%} of the pairs (50 % would say nothing)."
    if found.chosen_left_share is not None:
        yield f"It stood on the left in {found.chosen_left_share:.1%} of those whose sides are known."
    yield f"{found.near_duplicates:,} prompts nearly repeat an earlier one."
    yield from map(_text, found.warnings)


def _counts(names: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))


def _verdicts(journal: Journal) -> list[tuple[str, int]]:
    counts = _counts(row["verdict"] for row in journal.standing())
    withdrawn = sum(row["verdict"] != "retracted" for row in journal.rows.values()) - len(journal.standing())
    return [*counts, ("(withdrawn since)", withdrawn)]


def _model_of(row: Row) -> str:
    meta = row["meta"]
    return f"{meta['model']} with {meta['adapter']}" if meta.get("adapter") else str(meta["model"])


def _table(what: str, number: str, counts: Iterable[tuple[str, int]]) -> Iterable[str]:
    yield from (f"| {what} | {number} |", "|---|---:|")
    yield from (f"| {_text(name)} | {count:,} |" for name, count in counts)
    yield ""


def _text(text: str) -> str:
    """Somebody's words inside Markdown: no markup, no line break, no end of a cell."""
    return html.escape(" ".join(text.split())).replace("|", "\\|").replace("`", "'")


# --- exporting: What training reads of the journal, as one file that `datasets.load_dataset` and TRL take as it


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
