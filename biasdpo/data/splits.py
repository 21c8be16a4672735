"""Train and held out: near-duplicate prompts never straddle, and rows that are added later move none."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from biasdpo.data.health import NearDuplicates, normalise_prompt
from biasdpo.data.importing import convert_source
from biasdpo.data.journal import Journal
from biasdpo.data.pairs import Derived, PreferencePair, derive, pair_of_row
from biasdpo.errors import DatasetError
from biasdpo.workspace import Workspace, replacing, sha256_of

# --- sources: Where pairs come from: a file, `hub:OWNER/NAME`, or `workspace` (the journal)


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


# --- mixture: Pairs of several sources, each with a weight: how often an epoch sees its training pairs


@dataclass(frozen=True)
class Mixed:
    """One row a pair, whatever number of sources holds it, with the largest weight among those.

    derived     the pairs, and what was left out
    weights     one a pair of `derived`
    per_source  rows read of each source, in their order
    """

    derived: Derived
    weights: tuple[float, ...]
    per_source: tuple[tuple[str, int], ...]

    @property
    def rows_read(self) -> int:
        return sum(rows for _source, rows in self.per_source)


def mix(sources: Sequence[str], weights: Sequence[float], workspace: Workspace) -> Mixed:
    """Read all sources. `weights`: one a source, or none for 1 each. Raises DatasetError as `load` does."""
    rows: list[PreferencePair] = []
    largest: dict[str, float] = {}
    per_source = []
    for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        read = load([source], workspace)
        for row in read:
            largest[row.pair_id] = max(weight, largest.get(row.pair_id, 0.0))
        rows += read
        per_source.append((source, len(read)))
    derived = derive(rows)
    return Mixed(derived, tuple(largest[pair.pair_id] for pair in derived.pairs), tuple(per_source))


def weighted(pairs: Sequence[PreferencePair], weights: Sequence[float], seed: int) -> list[PreferencePair]:
    """The rows of an epoch: a pair of weight 2 twice, of pairs of weight 0.5 a half, of weight 1.5 all and a half again.

    Which half is drawn by seed and pair id, for all epochs: the order of the pairs, and other pairs, change nothing but the
    last one drawn. With weights of 1 these are `pairs`.
    """
    whole = [math.floor(weight) for weight in weights]
    part = [weight - count for weight, count in zip(weights, whole, strict=True)]
    for share in sorted(set(part) - {0.0}):
        drawn = sorted((_lot(pairs[i], seed), i) for i in range(len(pairs)) if part[i] == share)
        for _, i in drawn[: round(share * len(drawn))]:
            whole[i] += 1
    return [pair for pair, count in zip(pairs, whole, strict=True) for _ in range(count)]


def _lot(pair: PreferencePair, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}-{pair.pair_id}".encode()).digest()


def load_snapshot(path: Path) -> tuple[list[PreferencePair], dict[str, float]]:
    """A run's snapshot: its pairs, and the weights by pair id (1 each where the snapshot names none)."""
    pairs = load_jsonl(path)
    with path.open("rb") as file:
        named = {row["pair_id"]: float(row["weight"]) for row in map(orjson.loads, file) if "weight" in row}
    return pairs, {pair.pair_id: named.get(pair.pair_id, 1.0) for pair in pairs}


# --- splits: Train and held out: near-duplicate prompts never straddle, and rows that are added later move n


@dataclass(frozen=True)
class Split:
    """`bridging`: rows whose prompt is a near-duplicate of prompts on both sides; they are on neither."""

    train: tuple[PreferencePair, ...]
    held_out: tuple[PreferencePair, ...]
    bridging: tuple[PreferencePair, ...] = ()


def is_held_out(prompt: str, held_out_share: float) -> bool:
    """Whether a prompt without near-duplicates is held out: a hash of it decides."""
    digest = hashlib.sha256(normalise_prompt(prompt).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < held_out_share * 2**64


def split(rows: Sequence[PreferencePair], held_out_share: float = 0.1) -> Split:
    """By prompt, in the order of the rows: a prompt goes where its earlier near-duplicates went, else where its hash says.

    So rows that are appended change nothing for those before them. The share is met on average, not exactly.
    """
    sides: list[bool | None] = []  # by prompt number: held out; None bridges
    places: tuple[list[PreferencePair], list[PreferencePair], list[PreferencePair]] = ([], [], [])
    for row, (number, near) in zip(rows, NearDuplicates().add_all([row.prompt for row in rows]), strict=True):
        if number == len(sides):
            taken = {sides[other] for other in near} - {None}
            sides.append(is_held_out(row.prompt, held_out_share) if not taken else taken.pop() if len(taken) == 1 else None)
        side = sides[number]
        places[2 if side is None else int(side)].append(row)
    return Split(*map(tuple, places))


def snapshot(rows: Sequence[PreferencePair], path: Path, weights: Sequence[float] = ()) -> str:
    """Write rows as canonical JSONL (fixed columns, sorted keys, UTF-8); return its SHA-256.

    Weights, one a row, make a column `weight` where one of them is not 1.
    """
    columns: list[dict[str, float]] = (
        [{}] * len(rows) if all(weight == 1 for weight in weights) else [{"weight": float(weight)} for weight in weights]
    )
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row, more in zip(rows, columns, strict=True):
            values = {"pair_id": row.pair_id, **asdict(row), **more}
            file.write(json.dumps(values, ensure_ascii=False, sort_keys=True) + "\n")
    return sha256_of(path)
