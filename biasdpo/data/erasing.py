"""Erasure of what one annotator stored, and where copies of it remain."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import orjson

from biasdpo.access import audit, require_owner
from biasdpo.data import sync
from biasdpo.data.journal import Row, opened, parse_row, sync_folder, truncated_file
from biasdpo.data.pairs import TEXTS, pair_id_of
from biasdpo.errors import DatasetError, WorkspaceError
from biasdpo.hub import reason_of
from biasdpo.workspace import Workspace, replacing, sha256_of

_STRING = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_PAIR_ID = re.compile(rb"\b[0-9a-f]{16}\b")
_NO_ROW = dict.fromkeys(("id", "retracts", "verdict", "annotator"), "")


def erase(workspace: Workspace, annotator: str, browser: str = "", *, dry_run: bool = False) -> tuple[int, list[Path]]:
    """Delete an annotator's judgments (`browser`: of the browser with this hash), and the rows that withdraw them; return the
    number of rows, and the files that still hold some of it or were made of it. Nothing by that name is a DatasetError.

    The journal is replaced under its lock: a kill leaves the old file or the new one. Other lines stay byte for byte; rows by
    which the annotator withdrew judgments of others lose only the name, since without them those would count again.
    """
    require_owner("Erasing")
    path = workspace.preferences.resolve()  # a link stays one
    with opened(workspace.preferences) as (file, _repaired):
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed meanwhile
            left.unlink()
        lines = path.read_bytes().split(b"\n")
        rows = [_row(line) for line in lines]
        erased = [row for row in rows if row["verdict"] != "retracted" and _is_by(row, annotator, browser)]
        kept = [line for line in _replaced(lines, annotator, browser) if line is not None]
        removed = len(lines) - len(kept)
        if not annotator or kept == lines:
            raise DatasetError(f"Nothing by {annotator!r} (browser: {browser or 'any'}) in {path}: `dataset stats` lists names")
        if not dry_run:
            name = hashlib.sha256(annotator.encode()).hexdigest()[:16]  # the log must not keep what is erased
            audit(workspace.root, "erase", annotator_sha256=name, rows=str(removed))
            with replacing(path, mode=os.fstat(file).st_mode & 0o777) as temporary:
                temporary.write_bytes(b"\n".join(kept))
            sync_folder(path.parent)
    remaining = [truncated_file(workspace.preferences)]  # whose a line is that was cut off can't be told
    if any(row is _NO_ROW and orjson.dumps(annotator) in line for line, row in zip(lines, rows, strict=True)):
        remaining.append(workspace.preferences)
    return removed, [*filter(Path.exists, remaining), *_remaining(workspace.root, erased, "" if browser else annotator)]


def erase_everywhere(
    workspace: Workspace, targets: Collection[str], annotator: str, browser: str = "", *, dry_run: bool = False
) -> tuple[dict[str, int], list[Path | str]]:
    """`erase`, and the same in the files of sync targets (see `biasdpo.data.sync`); return the number of rows by place, and what
    was not reached. Where the Hub can't be reached, that says what to do, and the call may be repeated."""
    counts: dict[str, int] = {}
    remaining: list[Path | str] = []
    nothing: DatasetError | None = None
    with sync.alone(workspace) if targets else nullcontext():  # or a running app might restore rows between two steps
        try:
            counts[str(workspace.preferences)], files = erase(workspace, annotator, browser, dry_run=dry_run)
            remaining += files
        except DatasetError as exc:
            nothing = exc
        for target in targets:
            try:
                count = sync.rewrite(workspace, target, lambda lines: _replaced(lines, annotator, browser), dry_run=dry_run)
                counts |= {target: count} if count or not nothing else {}
            except Exception as exc:  # the Hub's, and those of the network below it
                why = f"{reason_of(exc)}. Run this command again before the app is started, which would restore the rows"
                remaining.append(f"{target}: {why}")
    if nothing and not counts:
        raise DatasetError(str(remaining[0])) if remaining else nothing
    return counts, remaining


def _is_by(row: Row, annotator: str, browser: str) -> bool:
    return bool(annotator and row["annotator"] == annotator and browser in ("", row["meta"]["browser"]))


def _replaced(lines: list[bytes], annotator: str, browser: str) -> list[bytes | None]:
    """What takes the place of each line: nothing (None) for the annotator's judgments and what withdraws them."""
    rows = [_row(line) for line in lines]
    ids = {row["id"] for row in rows if row["verdict"] != "retracted" and _is_by(row, annotator, browser)}
    replaced: list[bytes | None] = []
    for line, row in zip(lines, rows, strict=True):
        kept = orjson.dumps(row | {"annotator": ""}) if _is_by(row, annotator, browser) else line
        replaced.append(None if {row["id"], row["retracts"]} & ids else kept)
    return replaced


def _row(line: bytes) -> Row:
    with suppress(ValueError):
        return parse_row(line)
    return _NO_ROW


def _remaining(root: Path, erased: list[Row], name: str) -> Iterator[Path]:
    """The files that hold a judgment or, unless it is "", the name; and what was trained on them."""
    texts = [[row[column] for column in TEXTS] for row in erased]
    together = [*texts, *([pair_id_of(*each)] for each in texts), *([[key, name] for key in ("annotator", "by")] if name else ())]
    wanted = {frozenset(orjson.dumps(text)[1:-1] for text in each) for each in together}
    log = root / "audit.jsonl"
    logged = _strings(log) if log.is_file() else ()
    exported = {Path(orjson.loads(b'"%b"' % text)) for text in logged if text.endswith((b".jsonl", b".csv", b".parquet"))}
    files = [file for folder in ("runs", "evaluations", "exports") for file in sorted((root / folder).rglob("*.json*"))]
    snapshots = set()
    for path in filter(Path.is_file, [log, *files, *sorted(exported)]):
        strings = _strings(path)
        if any(each <= strings for each in wanted):
            yield path
            if path.name == "dataset.jsonl":
                snapshots.add(sha256_of(path).encode())
                yield from (part for part in (path.parent / "adapter", path.parent / "checkpoints") if part.is_dir())
    yield from (path.with_suffix("") for path in files if path.name.endswith(".gguf.json") and snapshots & _strings(path))


def _strings(path: Path) -> set[bytes]:
    """The strings in a file, as JSON has them. Line by line, since a truncated line may have an odd number of quotes."""
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            return {text.encode() for text in parquet.read_table(path, columns=["pair_id"])["pair_id"].to_pylist()}
        with path.open("rb") as file:
            return {text for line in file for text in (*_STRING.findall(line), *_PAIR_ID.findall(line))}
    except (OSError, ValueError) as exc:
        raise WorkspaceError(f"Can't search {path} for what is erased ({exc}): move it away, or make it readable") from exc
