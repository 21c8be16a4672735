"""Log-probabilities of pairs under the reference, kept across runs: WORKSPACE/cache/reference/, one file a base model.

The reference never changes, so a pair's two numbers are computed once, whatever the epochs, and found again by any later run on
the same base, with another rank, seed or learning rate. They are computed in groups, which is faster; and as a number's last
digits depend on the group that it was computed in, a group is kept and found as a whole. Else a run's result would depend on
what earlier runs had left here.
"""

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

FORMAT = 1  # raise it where the same pair would get other numbers
ROWS_A_GROUP = 8  # on average
TOKENS_A_GROUP = 2048  # that fill a group

Logps = tuple[float, float]  # chosen, rejected: summed over the completion's tokens, nats
Row = Mapping[str, Any]  # with the token ids `prompt_ids`, `chosen_ids`, `rejected_ids`


@dataclass(frozen=True)
class Group:
    """Rows that are computed together, and their `row_key`s, in the same order."""

    keys: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256("".join(self.keys).encode()).hexdigest()


def groups(rows: Mapping[str, Row]) -> Iterator[Group]:
    """Share rows (by `row_key`) out among groups.

    The rows themselves say where a group ends, by their hash, so that one more row, or one fewer, changes its own group and
    leaves the others as they were, to be found.
    """
    keys: list[str] = []
    tokens = 0
    for key in sorted(rows):
        keys.append(key)
        tokens += sum(len(rows[key][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        if int(key[-8:], 16) % ROWS_A_GROUP == 0 or tokens >= TOKENS_A_GROUP:
            yield Group(tuple(keys), tuple(rows[k] for k in keys))
            keys, tokens = [], 0
    if keys:
        yield Group(tuple(keys), tuple(rows[k] for k in keys))


def row_key(row: Row) -> str:
    """Hex SHA-256 of a row's token ids."""
    ids = [list(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


@dataclass(frozen=True)
class ReferenceCache:
    """The file that holds one base model's numbers: those of each group, by `Group.key`, in the order of its rows.

    path    WORKSPACE/cache/reference/NAME.json; NAME tells all on which the numbers depend, beside the tokens
    """

    path: Path

    def load(self) -> dict[str, list[Logps]]:
        """What is known. A file that is missing or damaged in any way knows nothing."""
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

    def add(self, found: Mapping[str, list[Logps]]) -> None:
        """Keep more groups beside those that other runs may have added meanwhile."""
        if found:
            with locked(self.path):
                known = {**self.load(), **found}
                write_json(self.path, {"sha256": _checksum(known), "groups": known})


def open_cache(folder: Path, base_sha256: str, device: str, threads: int) -> ReferenceCache:
    """The cache of a base model, by its weights' hash, as it is computed in fp32 on `device` ("cpu", "cuda").

    `threads` counts on a CPU alone: they decide how sums are split up, hence last digits.
    """
    splitting = f"-{threads}-threads" if device == "cpu" else ""
    return ReferenceCache(folder / f"{base_sha256[:16]}-{device}{splitting}-v{FORMAT}.json")


def _checksum(known: Mapping[str, list[Logps]]) -> str:
    return hashlib.sha256(json.dumps(sorted(known.items())).encode()).hexdigest()
