"""Train and held out: near-duplicate prompts never straddle, and rows that are added later move none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from biasdpo.dataset.near_duplicates import NearDuplicates, normalise_prompt
from biasdpo.dataset.pairs import PreferencePair
from biasdpo.workspace import replacing, sha256_of


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
