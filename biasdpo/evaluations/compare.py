"""Several evaluations side by side: only what was measured on the same items may be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biasdpo.evaluations.table import TableRow, table


@dataclass(frozen=True)
class ComparedRow:
    """One metric of several evaluations.

    cells        in the order of the evaluations; None where one does not have it
    comparable   whether all that have it were scored on the same items
    why_not      why not, in words; "" where they were
    """

    benchmark: str
    metric: str
    better: str
    cells: tuple[TableRow | None, ...]
    comparable: bool
    why_not: str


def compare(labelled: Sequence[tuple[str, Mapping[str, Any]]]) -> list[ComparedRow]:
    """The overall rows of several results, metric by metric in the order of the first that has it."""
    tables = [{(row.benchmark, row.metric): row for row in table(result)} for _, result in labelled]
    keys = dict.fromkeys(key for rows in tables for key in rows)
    whys = {name: _why_not(name, [result for _, result in labelled]) for name in dict.fromkeys(name for name, _ in keys)}
    compared = []
    for key in keys:
        cells = tuple(rows.get(key) for rows in tables)
        better = next((cell.better for cell in cells if cell is not None and cell.better), "")
        compared.append(ComparedRow(*key, better, cells, not whys[key[0]], whys[key[0]]))
    return compared


def _why_not(benchmark: str, results: Sequence[Mapping[str, Any]]) -> str:
    """Why the figures of one benchmark must not be set beside each other; "" where they may.

    A limited evaluation may stand beside another of the same limit and seed: that is the same draw.
    """
    found = [result["benchmarks"][benchmark] for result in results if benchmark in result["benchmarks"]]
    if len({one["data_sha256"] for one in found}) > 1:
        return "scored on different data"
    if any(one.get("settings", {}) != found[0].get("settings", {}) for one in found):
        return "generated with different settings"
    counts = [one["n"] for one in found]
    if len(set(counts)) > 1:
        return f"scored on different numbers of items ({', '.join(map(str, counts))})"
    seeds = {result["provenance"].get("seed") for result in results if benchmark in result["benchmarks"]}
    indices = [[item["index"] for item in one.get("items", ())] for one in found]
    if len(seeds) > 1 and any(other != indices[0] for other in indices):
        return "scored on different draws of items"
    return ""
