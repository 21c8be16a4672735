"""A result as a table: one row a benchmark and metric. Page, Markdown and CSV show the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Ci = tuple[float, float]


@dataclass(frozen=True)
class TableRow:
    """One metric, overall or of one group. None stands for what there is not: tuned where there is no adapter, the sides of a
    metric that needs both.

    group        "" overall
    n, n_failed  items scored, and those that could not be (counted overall)
    base_ci      95 % interval
    difference   tuned - base; of a metric of both sides: its value
    no_change    what `difference` is where the adapter changes nothing
    p_holm       corrected for the table: of the overall rows, or of the benchmark's groups
    verdict      "less biased", "better", "no clear difference", "worse"; "" where there is nothing to decide
    better       "higher", "lower", or "nearer 50"; "" where there is no adapter
    measures     "bias", or "quality": the price; "" where there is no adapter
    comparable   whether it may be set beside others
    why_not      why it may not be; "" where it may
    """

    benchmark: str
    metric: str
    group: str
    n: int
    n_failed: int
    base: float | None
    base_ci: Ci | None
    tuned: float | None
    tuned_ci: Ci | None
    difference: float | None
    ci: Ci | None
    p_value: float | None
    p_holm: float | None
    verdict: str
    better: str
    measures: str
    comparable: bool
    why_not: str
    no_change: float = 0.0


def table(result: Mapping[str, Any]) -> list[TableRow]:
    """The overall rows, benchmark by benchmark."""
    return [row for name, found in result["benchmarks"].items() for row in _rows(name, "", found, found)]


def group_table(result: Mapping[str, Any], benchmark: str) -> list[TableRow]:
    """The rows of one benchmark's groups (categories, domains), group by group; [] where it has none."""
    found = result["benchmarks"].get(benchmark, {})
    return [row for group, part in found.get("groups", {}).items() for row in _rows(benchmark, group, part, found)]


def _rows(name: str, group: str, part: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[TableRow]:
    """`part`: the metrics of all items or of a group's; `whole`: what is known of the benchmark."""

    def row(metric: str, sides: tuple[Mapping[str, Any], Mapping[str, Any]], change: Mapping[str, Any]) -> TableRow:
        base, tuned = sides
        why_not = whole.get("not_comparable", "")
        return TableRow(
            benchmark=name,
            metric=metric,
            group=group,
            n=part["n"],
            n_failed=0 if group else whole["n_failed"],
            base=base.get("value"),
            base_ci=_ci(base),
            tuned=tuned.get("value"),
            tuned_ci=_ci(tuned),
            difference=change.get("value"),
            ci=_ci(change),
            p_value=change.get("p_value"),
            p_holm=change.get("p_holm"),
            verdict=change.get("verdict", ""),
            better=change.get("better", ""),
            measures=change.get("measures", ""),
            comparable=not why_not,
            why_not=why_not,
            no_change=change.get("without_change", 0.0),
        )

    for metric, base in part["base"].items():
        yield row(metric, (base, part["tuned"].get(metric, {})), part["difference"].get(metric, {}))
    for metric, change in part["paired"].items():
        yield row(metric, ({}, {}), change)


def _ci(interval: Mapping[str, Any]) -> Ci | None:
    return (interval["ci95"][0], interval["ci95"][1]) if "ci95" in interval else None
