"""Erasure of what one annotator stored, and where copies of it remain."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import orjson

from biasdpo.access import audit, read_audit, require_owner
from biasdpo.data.journal import Journal, Row, opened, parse_row, repairs, sync_folder, truncated_file
from biasdpo.data.pairs import TEXTS, pair_id_of
from biasdpo.data.splits import DATASET
from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace, replacing, sha256_of

_STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_PAIR_ID = re.compile(rb"\b[0-9a-f]{16}\b")
_ANNOTATOR = re.compile(r'"annotator": ?("(?:[^"\\]|\\.)*")')  # within a text its quotes would be escaped


@dataclass(frozen=True)
class Erased:
    """`removed`: rows, retractions included. `remaining`: files that still hold what was erased, or were made of it."""

    removed: int
    remaining: tuple[Path, ...]


def count(workspace: Workspace, annotator: str, browser: str = "") -> int:
    """The number of rows an annotator stored. None is a DatasetError."""
    rows, _mark = Journal(workspace.preferences).refresh().since((0, 0))
    stored = sum(_is_by(row, annotator, browser) for row in rows)
    if not stored or not annotator:
        where = f" from browser {browser!r}" if browser else ""
        raise DatasetError(f"Nothing by {annotator!r}{where} in {workspace.preferences}: `dataset stats` lists the annotators")
    return stored


def erase(workspace: Workspace, annotator: str, browser: str = "") -> Erased:
    """Delete an annotator's judgments, and the rows that withdraw them, from the journal. Only for the owner.

    browser   only what was judged in the browser with this hash (see `JudgmentMeta`)

    The journal is replaced under its lock, so a kill leaves the old file or the new one. Other lines stay byte for byte; rows by
    which the annotator withdrew the judgments of others lose the name only, since without them those would count again.
    Raises DatasetError where there is nothing to erase, WorkspaceError where the journal can't be written.
    """
    require_owner("Erasing")
    count(workspace, annotator, browser)
    path = workspace.preferences.resolve()  # a link stays one
    with opened(workspace.preferences) as (file, _repaired):
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed meanwhile
            left.unlink()
        lines = path.read_bytes().split(b"\n")
        rows = [_row(line) for line in lines]
        erased = [row for row in rows if row and row["verdict"] != "retracted" and _is_by(row, annotator, browser)]
        ids = {row["id"] for row in erased}
        kept, unreadable = [], False
        for line, row in zip(lines, rows, strict=True):
            if row is None:
                unreadable |= _encoded(annotator) in line
            elif row["id"] in ids or row["retracts"] in ids:
                continue
            elif _is_by(row, annotator, browser):
                line = orjson.dumps(row | {"annotator": ""})
            kept.append(line)
        removed = len(lines) - len(kept)
        name = sha256(annotator.encode()).hexdigest()[:16]  # the log must not keep what is erased
        audit(workspace.root, "erase", annotator_sha256=name, rows=str(removed))
        mode = os.fstat(file).st_mode & 0o777
        _erase_truncated(truncated_file(workspace.preferences), annotator, mode)  # before the rows, by which a second try is told
        with replacing(path, mode=mode) as temporary:
            temporary.write_bytes(b"\n".join(kept))
        sync_folder(path.parent)
    names = [] if browser else [{"annotator", annotator}, {"by", annotator}]  # the name may be others', too
    remaining = [workspace.preferences] if unreadable else []
    return Erased(removed, (*remaining, *_remaining(workspace, erased, names)))


def _is_by(row: Row, annotator: str, browser: str) -> bool:
    return bool(row["annotator"] == annotator and browser in ("", row["meta"]["browser"]))


def _row(line: bytes) -> Row | None:
    try:
        return parse_row(line)
    except ValueError:
        return None


def _erase_truncated(record: Path, annotator: str, mode: int) -> None:
    """Clear the truncated lines that are the annotator's, or may be, since they were cut off before the name."""
    entries = repairs(record)
    for entry in entries:
        found = _ANNOTATOR.search(entry["text"])
        if found is None or found[1].encode() == _encoded(annotator):
            entry["text"] = ""
    if entries:
        with replacing(record, mode=mode) as temporary:
            temporary.write_bytes(b"\n".join(map(orjson.dumps, entries)) + b"\n")


# What remains


def _remaining(workspace: Workspace, erased: list[Row], names: list[set[str]]) -> Iterator[Path]:
    """`names`: strings that stand together in a file that names the annotator."""
    texts = [{row[column] for column in TEXTS} for row in erased]
    wanted = {frozenset(_encoded(text)[1:-1] for text in each) for each in (*texts, *names)}
    ids = {pair_id_of(*(row[column] for column in TEXTS)).encode() for row in erased}
    root, snapshots = workspace.root, set()
    files = [file for folder in ("runs", "evaluations", "exports") for file in sorted((root / folder).rglob("*.json*"))]
    for path in filter(Path.is_file, [root / "audit.jsonl", *files]):
        if _holds(path, lambda path: any(map(_strings(path).issuperset, wanted))):
            yield path
            if path.name == DATASET:
                snapshots.add(sha256_of(path).encode())
                yield from (part for part in (path.parent / "adapter", path.parent / "checkpoints") if part.is_dir())
    for path in files:
        if path.name.endswith(".gguf.json") and _holds(path, lambda path: bool(snapshots & _strings(path))):
            yield path.with_suffix("")
    exported = {Path(str(row.get("file"))) for row in read_audit(root) if row.get("action") == "export"}
    yield from (path for path in sorted(exported) if path.is_file() and _holds(path, lambda path: bool(ids & _pair_ids(path))))


def _holds(path: Path, check: Callable[[Path], bool]) -> bool:
    """Whether a file passes the check, or can't be read."""
    try:
        return check(path)
    except (OSError, ValueError, KeyError):
        return True


def _strings(path: Path) -> set[bytes]:
    """The strings in a JSON file, as encoded. Line by line, since a truncated line may have an odd number of quotes."""
    with path.open("rb") as file:
        return {text for line in file for text in _STRING.findall(line)}


def _pair_ids(path: Path) -> set[bytes]:
    """The pair ids in a file that `dataset export` wrote."""
    if path.suffix.lower() != ".parquet":
        return {*_PAIR_ID.findall(path.read_bytes())}
    from pyarrow import parquet

    return {text.encode() for text in parquet.read_table(path, columns=["pair_id"])["pair_id"].to_pylist()}


def _encoded(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")
