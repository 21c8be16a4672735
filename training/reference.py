"""Log-probabilities of pairs under the reference model, cached across runs in WORKSPACE/cache/reference/."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasdpo.errors import WorkspaceError
from biasdpo.workspace import locked, read_json, write_json

FORMAT = 1  # raise it when the same pair would get other numbers
ROWS_PER_GROUP = 8  # on average
TOKENS_PER_GROUP = 2048  # that fill a group

Logps = tuple[float, float]  # chosen, rejected: summed over the completion's tokens, nats
Row = Mapping[str, Any]  # with the token ids `prompt_ids`, `chosen_ids`, `rejected_ids`
_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Group:
    """Rows that are computed in one batch, with their `row_key`s. A row's last digits depend on its batch, so the cache stores
    whole groups."""

    keys: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256("".join(self.keys).encode()).hexdigest()


def groups(rows: Mapping[str, Row]) -> Iterator[Group]:
    """Divide rows (by `row_key`) into groups. The hash of a row decides whether it ends its group, so one row more or fewer
    changes only its own group, and the others are still found in the cache."""
    keys: list[str] = []
    tokens, last = 0, max(rows, default="")
    for key in sorted(rows):
        keys.append(key)
        tokens += sum(len(rows[key][name]) for name in _COLUMNS)
        if int(key[-8:], 16) % ROWS_PER_GROUP == 0 or tokens >= TOKENS_PER_GROUP or key == last:
            yield Group(tuple(keys), tuple(rows[k] for k in keys))
            keys, tokens = [], 0


def row_key(row: Row) -> str:
    """Hex SHA-256 of a row's token ids."""
    return hashlib.sha256(json.dumps([list(row[name]) for name in _COLUMNS]).encode()).hexdigest()


@dataclass(frozen=True)
class ReferenceCache:
    """The file with one base model's numbers: for each `Group.key` those of its rows, in order."""

    path: Path

    def load(self) -> dict[str, list[Logps]]:
        """What is known. A missing or damaged file is empty: its numbers are computed again."""
        with suppress(WorkspaceError, KeyError, TypeError, ValueError):
            content = read_json(self.path)
            known = {
                str(key): [(float(chosen), float(rejected)) for chosen, rejected in logps]
                for key, logps in content["groups"].items()
            }
            numbers = [number for logps in known.values() for pair in logps for number in pair]
            if content["sha256"] == _checksum(known) and all(map(math.isfinite, numbers)):
                return known
        return {}

    def add(self, computed: Mapping[str, list[Logps]]) -> None:
        """Add groups to those that other runs may have added meanwhile."""
        if computed:
            with locked(self.path):
                known = {**self.load(), **computed}
                write_json(self.path, {"sha256": _checksum(known), "groups": known})


def open_cache(folder: Path, base_sha256: str, device: str, threads: int) -> ReferenceCache:
    """The cache of a base model, by its weights' hash, computed in fp32 on `device` ("cpu", "cuda").

    On a CPU it also depends on `threads`, which decide how sums are divided, hence their last digits.
    """
    variant = f"-{threads}-threads" if device == "cpu" else ""
    return ReferenceCache(folder / f"{base_sha256[:16]}-{device}{variant}-v{FORMAT}.json")


def _checksum(known: Mapping[str, list[Logps]]) -> str:
    return hashlib.sha256(json.dumps(sorted(known.items())).encode()).hexdigest()
