"""Pairs of several sources, each with a weight: how often an epoch sees its training pairs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from biasdpo.dataset.pairs import Derived, PreferencePair, derive
from biasdpo.dataset.sources import load, load_jsonl
from biasdpo.workspace import Workspace


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
